//! The simulated server behind a real unix socket, for clients that know nothing but sockets.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{ConnectionId, Domain, XenstoreServer};

/// How long the thread sleeps at most before it looks whether it is to stop, or the script changed something.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// Distinguishes the sockets of one test process.
static SOCKETS: AtomicU32 = AtomicU32::new(0);

/// A thread that serves a [`XenstoreServer`]. Ends when dropped.
#[derive(Debug)]
pub struct SocketServer {
    path: PathBuf,
    server: Arc<Mutex<XenstoreServer>>,
    stop: Arc<AtomicBool>,
    drop_all: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SocketServer {
    /// Serves `server` on a fresh socket; every client speaks for `domain`.
    pub fn start(server: XenstoreServer, domain: Domain) -> std::io::Result<SocketServer> {
        let number = SOCKETS.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vbdd-xenstored-{}-{number}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        let server = Arc::new(Mutex::new(server));
        let (stop, drop_all) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (server, stop, drop_all) = (Arc::clone(&server), Arc::clone(&stop), Arc::clone(&drop_all));
            std::thread::spawn(move || {
                let mut clients: Vec<(UnixStream, ConnectionId, Vec<u8>)> = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    wait(&listener, &clients);
                    let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
                    if drop_all.swap(false, Ordering::Relaxed) {
                        clients.drain(..).for_each(|(_, id, _)| server.disconnect(id));
                    }
                    while let Ok((stream, _)) = listener.accept() {
                        if stream.set_nonblocking(true).is_ok() {
                            clients.push((stream, server.connect(domain), Vec::new()));
                        }
                    }
                    clients.retain_mut(|client| exchange(&mut server, client));
                }
            })
        };
        Ok(SocketServer { path, server, stop, drop_all, thread: Some(thread) })
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The server, for the script to look at and to change.
    pub fn server(&self) -> MutexGuard<'_, XenstoreServer> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts all connections at the thread's next turn.
    pub fn drop_connections(&self) {
        self.drop_all.store(true, Ordering::Relaxed);
    }
}

impl Drop for SocketServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn wait(listener: &UnixListener, clients: &[(UnixStream, ConnectionId, Vec<u8>)]) {
    let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
    for (stream, _, unsent) in clients {
        let out = if unsent.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        fds.push(PollFd::new(stream, PollFlags::IN | out));
    }
    let _ = poll(&mut fds, Some(&TICK));
}

/// Moves bytes in and out; false when the connection ended.
fn exchange(
    server: &mut XenstoreServer,
    (stream, id, unsent): &mut (UnixStream, ConnectionId, Vec<u8>),
) -> bool {
    let mut buffer = [0_u8; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => {
                server.disconnect(*id);
                return false;
            }
            Ok(bytes) => server.receive(*id, &buffer[..bytes]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => {
                server.disconnect(*id);
                return false;
            }
        }
    }
    server.settle();
    loop {
        if unsent.is_empty() {
            *unsent = server.transmit(*id, 65_536);
            server.settle();
        }
        if unsent.is_empty() {
            break;
        }
        match stream.write(unsent) {
            Ok(bytes) => drop(unsent.drain(..bytes)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => {
                server.disconnect(*id);
                return false;
            }
        }
    }
    if server.is_closed(*id) {
        server.disconnect(*id);
        return false;
    }
    true
}
