//! Where clients come in: a unix socket that only its owner may use, or a TCP port.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::Error;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port. Whoever reaches it may use the export.
    Tcp(SocketAddr),
}

#[derive(Debug)]
enum Kind {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// A socket that listens. A unix socket's name goes with it.
#[derive(Debug)]
pub struct Listener(Kind);

pub(super) enum Arrival {
    Nobody,
    Client(OwnedFd),
    Failed(std::io::Error),
}

impl Listener {
    /// Listens. A unix socket gets the permissions 0600, whatever the umask; one that a process left behind that is gone
    /// is replaced.
    ///
    /// # Errors
    /// When there is no listening at that address.
    pub fn open(address: &Address) -> Result<Listener, Error> {
        match address {
            Address::Unix(path) => {
                let listener = bind(path).map_err(|error| refused(&path.display(), &error))?;
                Ok(Listener(Kind::Unix(listener, path.clone())))
            }
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address).and_then(|listener| {
                    listener.set_nonblocking(true)?;
                    Ok(listener)
                });
                Ok(Listener(Kind::Tcp(listener.map_err(|error| refused(address, &error))?)))
            }
        }
    }

    /// Where it listens: the port that was chosen, if none was named.
    #[must_use]
    pub fn address(&self) -> Option<Address> {
        match &self.0 {
            Kind::Unix(_, path) => Some(Address::Unix(path.clone())),
            Kind::Tcp(listener) => listener.local_addr().ok().map(Address::Tcp),
        }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Unix(listener, _) => listener.as_fd(),
            Kind::Tcp(listener) => listener.as_fd(),
        }
    }

    /// Takes a client that waits.
    pub(super) fn accept(&self) -> Arrival {
        let accepted = match &self.0 {
            Kind::Unix(listener, _) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(OwnedFd::from(stream))
            }),
            Kind::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                // Replies go out in batches as they are: to wait for more would only delay them.
                stream.set_nodelay(true)?;
                Ok(OwnedFd::from(stream))
            }),
        };
        match accepted {
            Ok(socket) => Arrival::Client(socket),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {
                    Arrival::Nobody
                }
                _ => Arrival::Failed(error),
            },
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Unix(_, path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Clients that may wait to be taken, as the standard library has it.
const BACKLOG: i32 = 128;

fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let taken = path.try_exists()?
        && UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    if taken {
        std::fs::remove_file(path)?;
    }
    // Nobody can connect before it listens, and then it has its permissions. (The umask is the whole process's.)
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

fn refused(place: &impl std::fmt::Display, error: &std::io::Error) -> Error {
    Error::new(format!("cannot listen at {place}: {error}"), "")
}
