//! Where xenstored is, and how a connection to it is opened.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Looked at in this order. Where xenstored runs in dom0 its socket is there; everywhere else the kernel's device is.
const USUAL_PLACES: [&str; 4] =
    ["/run/xenstored/socket", "/var/run/xenstored/socket", "/dev/xen/xenbus", "/proc/xen/xenbus"];

/// What a place turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Socket,
    Device,
}

/// A place where xenstored was found.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

/// No connection to xenstored: what was tried, and how each attempt failed.
#[derive(Debug)]
pub struct OpenError {
    tried: Vec<(PathBuf, Errno)>,
}

impl std::fmt::Display for OpenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no connection to xenstored:")?;
        for (index, (path, error)) in self.tried.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma} {}: {error}", path.display())?;
        }
        f.write_str("; is this a Xen domain, and is xenstored running?")
    }
}

impl std::error::Error for OpenError {}

impl Place {
    /// Opens the given place, or the first of the usual ones that can be opened.
    pub(super) fn find(given: Option<&Path>) -> Result<(Place, OwnedFd), OpenError> {
        let usual = USUAL_PLACES.map(Path::new);
        let candidates = match &given {
            Some(path) => std::slice::from_ref(path),
            None => &usual[..],
        };
        let mut tried = Vec::new();
        for path in candidates {
            match Place::look(path).and_then(|place| place.connect().map(|fd| (place, fd))) {
                Ok(found) => return Ok(found),
                Err(error) => tried.push((path.to_path_buf(), error)),
            }
        }
        Err(OpenError { tried })
    }

    fn look(path: &Path) -> Result<Place, Errno> {
        let status = rustix::fs::stat(path)?;
        let kind = match FileType::from_raw_mode(status.st_mode) {
            FileType::Socket => Kind::Socket,
            _ => Kind::Device,
        };
        Ok(Place { path: path.to_path_buf(), kind })
    }

    /// Opens a connection that never blocks.
    pub(super) fn connect(&self) -> Result<OwnedFd, Errno> {
        match self.kind {
            Kind::Socket => {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                rustix::net::connect(&socket, &SocketAddrUnix::new(&self.path)?)?;
                Ok(socket)
            }
            Kind::Device => {
                rustix::fs::open(&self.path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
            }
        }
    }
}
