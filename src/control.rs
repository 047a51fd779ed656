//! The control door: a unix socket that answers questions about the running process.
//!
//! One request a line, one line of JSON as the answer; see `docs/control.md`. Sessions are tasks of a local executor that
//! the daemon's loop drives: they wait for the poller through `Wakeups`, and for the backend by leaving a [`Request`].
//! Control work is rare; that it allocates and takes turns with the rings does no harm.

pub mod client;
mod session;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

use smol::LocalExecutor;

use crate::error::Error;
use crate::limits::{CONTROL_REST, CONTROL_SESSION_AGE, CONTROL_SESSIONS_MAX};
use crate::reactor::{Reactor, Ready};

/// The socket's name within the state directory.
pub const SOCKET_NAME: &str = "control";

/// A question that a session waits to have answered.
#[derive(Debug)]
pub struct Request {
    /// The words of the line.
    pub words: Vec<String>,
    session: usize,
}

/// The answer to a request that cannot be served.
#[must_use]
pub fn refusal(error: &str, hint: &str) -> String {
    let mut text = String::from("{\"error\":");
    crate::cli::json_string(error, &mut text);
    text.push_str(",\"hint\":");
    crate::cli::json_string(hint, &mut text);
    text.push('}');
    text
}

/// What sessions and the loop share: who waits for which descriptor, and questions with their answers.
#[derive(Debug, Default)]
struct Shared {
    wakers: BTreeMap<usize, Waker>,
    requests: VecDeque<Request>,
    answers: BTreeMap<usize, String>,
    /// Who waits to write.
    writing: BTreeSet<usize>,
}

#[derive(Clone, Debug, Default)]
struct Wakeups(Rc<RefCell<Shared>>);

struct Running {
    task: smol::Task<()>,
    stream: Rc<std::os::unix::net::UnixStream>,
    ends_at: Duration,
    /// The poller tells when it can be written.
    polls_writable: bool,
}

/// The door.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    executor: LocalExecutor<'static>,
    wakeups: Wakeups,
    sessions: BTreeMap<usize, Running>,
    first_key: usize,
    /// When it listens again, after it could not take a client.
    listens_at: Option<Duration>,
}

impl Server {
    /// Opens the socket in `directory`. Descriptors of sessions are polled under keys from `first_key` on; the listener
    /// under `first_key` itself.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(directory: &Path, first_key: usize, reactor: &mut Reactor) -> Result<Server, Error> {
        let path = directory.join(SOCKET_NAME);
        // The state directory's lock says that no other process listens there.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).and_then(|listener| {
            listener.set_nonblocking(true)?;
            // Whatever the umask, and should the directory be open to others: only the owner may ask.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        });
        let listener = listener.map_err(|error| {
            Error::new(format!("cannot listen on {}: {error}", path.display()), "see --state-dir")
        })?;
        reactor.add(listener.as_fd(), first_key, false)?;
        Ok(Server {
            listener,
            path,
            executor: LocalExecutor::new(),
            wakeups: Wakeups::default(),
            sessions: BTreeMap::new(),
            first_key,
            listens_at: None,
        })
    }

    /// A descriptor of the door is ready.
    pub fn ready(&mut self, ready: Ready, now: Duration, reactor: &mut Reactor) {
        if ready.key == self.first_key {
            self.accept(now, reactor);
        } else if let Some(waker) = self.wakeups.0.borrow_mut().wakers.remove(&ready.key) {
            waker.wake();
        }
    }

    fn accept(&mut self, now: Duration, reactor: &mut Reactor) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // A descriptor is missing, and the client stays in line: the listener would be ready for ever.
                Err(error) => return self.rest(now, &error, reactor),
            };
            let free = (self.first_key + 1..).find(|key| !self.sessions.contains_key(key));
            let Some(key) = free.filter(|_| self.sessions.len() < CONTROL_SESSIONS_MAX) else { continue };
            if stream.set_nonblocking(true).is_err() || reactor.add(stream.as_fd(), key, false).is_err() {
                continue;
            }
            let stream = Rc::new(stream);
            let task = self.executor.spawn(session::run(Rc::clone(&stream), key, self.wakeups.clone()));
            self.sessions.insert(
                key,
                Running { task, stream, ends_at: now + CONTROL_SESSION_AGE, polls_writable: false },
            );
        }
    }

    /// Stops to listen for a while.
    fn rest(&mut self, now: Duration, error: &std::io::Error, reactor: &mut Reactor) {
        log::warn!("the control door cannot take a client: {error}; it opens again in a second");
        reactor.remove(self.listener.as_fd());
        self.listens_at = Some(now + CONTROL_REST);
    }

    /// Lets sessions run, and returns the next question; answer it with [`Server::answer`].
    pub fn turn(&mut self, now: Duration, reactor: &mut Reactor) -> Option<Request> {
        if self.listens_at.is_some_and(|at| at <= now)
            && reactor.add(self.listener.as_fd(), self.first_key, false).is_ok()
        {
            self.listens_at = None;
        }
        while self.executor.try_tick() {}
        self.poll_writers(reactor);
        let over: Vec<usize> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.task.is_finished() || session.ends_at <= now)
            .map(|(key, _)| *key)
            .collect();
        for key in over {
            if let Some(session) = self.sessions.remove(&key) {
                reactor.remove(session.stream.as_fd());
                drop(session);
            }
            let mut shared = self.wakeups.0.borrow_mut();
            shared.wakers.remove(&key);
            shared.answers.remove(&key);
            shared.writing.remove(&key);
            shared.requests.retain(|request| request.session != key);
        }
        self.wakeups.0.borrow_mut().requests.pop_front()
    }

    /// Has the poller tell when a client's socket can be written, as long as its session waits for that.
    fn poll_writers(&mut self, reactor: &mut Reactor) {
        let shared = self.wakeups.0.borrow();
        for (key, session) in &mut self.sessions {
            let wanted = shared.writing.contains(key);
            if wanted != session.polls_writable
                && reactor.modify(session.stream.as_fd(), *key, wanted).is_ok()
            {
                session.polls_writable = wanted;
            }
        }
    }

    /// Answers a question with a line of JSON.
    pub fn answer(&mut self, request: &Request, mut line: String) {
        line.push('\n');
        let mut shared = self.wakeups.0.borrow_mut();
        shared.answers.insert(request.session, line);
        if let Some(waker) = shared.wakers.remove(&request.session) {
            waker.wake();
        }
    }

    /// When [`Server::turn`] is due though nothing happens: a session has been open for too long.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.sessions.values().map(|session| session.ends_at).chain(self.listens_at).min()
    }

    /// The listener's descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn an_answer_longer_than_a_sockets_buffer_arrives_whole() {
        let directory = std::env::temp_dir().join(format!("vbdd-control-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut reactor = Reactor::new().unwrap();
        let mut server = Server::open(&directory, 16, &mut reactor).unwrap();
        let mut client = UnixStream::connect(directory.join(SOCKET_NAME)).unwrap();
        client.write_all(b"status json\n").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let reader = std::thread::spawn(move || {
            let mut answer = String::new();
            client.read_to_string(&mut answer).map(|_| answer.len())
        });
        let long = "x".repeat(3 << 20);
        let mut ready = Vec::new();
        let mut turns = 0;
        while !reader.is_finished() {
            reactor.wait(Some(Duration::from_millis(20)), &mut ready);
            for one in ready.drain(..) {
                server.ready(one, Duration::ZERO, &mut reactor);
            }
            while let Some(request) = server.turn(Duration::ZERO, &mut reactor) {
                server.answer(&request, long.clone());
            }
            turns += 1;
            assert!(turns < 100_000, "it spins");
        }
        assert_eq!(reader.join().unwrap().unwrap(), long.len() + 1);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
