//! Which servers may be asked, and how they are reached. Everything here may block, and runs on threads.

use std::io::{Error, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::images::Roots;
use crate::nbd::client::{Address, Allowed, Export, Place, greet};

/// How long a server may take to be connected to and greeted, and for each request while an image is opened.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that is not there any more is noticed: after 10 s of silence it is asked, and after 30 s without an answer it
/// counts as gone.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_PAUSE: Duration = Duration::from_secs(5);
const KEEPALIVE_TRIES: u32 = 4;
const SILENCE_MS: u32 = 30_000;

/// The servers that the operator allows.
#[derive(Debug)]
pub(in crate::storage) struct Servers {
    sockets: Roots,
    hosts: Vec<(String, u16)>,
}

impl Servers {
    /// Opens the directories in which sockets may lie.
    pub(in crate::storage) fn new(allowed: &[Allowed]) -> Result<Servers, String> {
        let mut directories: Vec<PathBuf> = Vec::new();
        let mut hosts = Vec::new();
        for one in allowed {
            match one {
                Allowed::Sockets(directory) => directories.push(directory.clone()),
                Allowed::Host { host, port } => hosts.push((host.clone(), *port)),
            }
        }
        let sockets = Roots::of_option("--allow-nbd", &directories).map_err(|error| error.to_string())?;
        Ok(Servers { sockets, hosts })
    }

    /// Connects to a server and greets it.
    pub(super) fn connect(&self, address: &Address) -> Result<(Stream, Export), String> {
        let by = Instant::now() + PATIENCE;
        let mut stream = match &address.place {
            Place::Unix(path) => self.to_socket(path, by)?,
            Place::Tcp { host, port } => self.to_host(host, *port, by)?,
        };
        let export = greet(&mut stream, &address.export).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => String::from("the server hung up during the handshake"),
            _ => error.to_string(),
        })?;
        Ok((stream, export))
    }

    fn to_socket(&self, path: &str, by: Instant) -> Result<Stream, String> {
        let node = self.sockets.socket(path).map_err(|error| format!("its socket {error}"))?;
        let fd = socket(AddressFamily::UNIX)?;
        let name = format!("/proc/self/fd/{}", node.as_raw_fd());
        let name = SocketAddrUnix::new(name.as_str()).map_err(|errno| errno.to_string())?;
        let result = rustix::net::connect(&fd, &name);
        Stream { fd, by }.connecting(result).map_err(|errno| not_connected(errno, path))
    }

    fn to_host(&self, host: &str, port: u16, by: Instant) -> Result<Stream, String> {
        if !self.hosts.iter().any(|(allowed, at)| allowed == host && *at == port) {
            return Err(format!(
                "the server {host}:{port} is none of those given with --allow-nbd; add --allow-nbd {host}:{port}"
            ));
        }
        let found = addresses(host, &std::fs::read_to_string("/etc/hosts").unwrap_or_default());
        let mut last = format!("{host} is no IP address and not in /etc/hosts, and no name server is asked");
        for to in found.into_iter().map(|address| SocketAddr::new(address, port)) {
            match to_address(&to, by) {
                Ok(stream) => return Ok(stream),
                Err(errno) => last = not_connected(errno, &to.to_string()),
            }
        }
        Err(last)
    }
}

/// The addresses of a host, by what it says itself or by the text of `/etc/hosts`.
///
/// The C library's resolver is not used: it loads other libraries at run time, which a static program in a small image has
/// not, and a disk that needs a name server to open waits for one more machine.
fn addresses(host: &str, hosts: &str) -> Vec<IpAddr> {
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        return vec![address];
    }
    let of_line = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|name| name.eq_ignore_ascii_case(host)).then_some(address)
    };
    hosts.lines().filter_map(of_line).collect()
}

fn not_connected(errno: Errno, to: &str) -> String {
    match errno {
        Errno::CONNREFUSED => format!("no server answers at {to}; is it running?"),
        Errno::TIMEDOUT => format!("{to} does not answer"),
        Errno::ACCESS | Errno::PERM => format!("{to} may not be connected to by vbdd; check its permissions"),
        other => format!("{to} cannot be connected to: {other}"),
    }
}

fn socket(family: AddressFamily) -> Result<OwnedFd, String> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None)
        .map_err(|errno| format!("no socket can be had: {errno}"))
}

fn to_address(to: &SocketAddr, by: Instant) -> Result<Stream, Errno> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // Small requests are not held back to wait for more.
    sockopt::set_tcp_nodelay(&fd, true)?;
    sockopt::set_socket_keepalive(&fd, true)?;
    sockopt::set_tcp_keepidle(&fd, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&fd, KEEPALIVE_PAUSE)?;
    sockopt::set_tcp_keepcnt(&fd, KEEPALIVE_TRIES)?;
    sockopt::set_tcp_user_timeout(&fd, SILENCE_MS)?;
    let result = rustix::net::connect(&fd, to);
    Stream { fd, by }.connecting(result)
}

/// A socket that is waited for, until a time.
#[derive(Debug)]
pub(super) struct Stream {
    fd: OwnedFd,
    by: Instant,
}

impl Stream {
    /// A connection that is used further, with as much time from now on.
    pub(super) fn new(fd: OwnedFd) -> Stream {
        Stream { fd, by: Instant::now() + PATIENCE }
    }

    /// From now on it has as much time again.
    pub(super) fn renew(&mut self) {
        self.by = Instant::now() + PATIENCE;
    }

    /// The socket, which answers `EAGAIN` rather than wait.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    fn connecting(self, result: Result<(), Errno>) -> Result<Stream, Errno> {
        match result {
            Ok(()) => Ok(self),
            Err(Errno::INPROGRESS | Errno::AGAIN | Errno::INTR) => {
                self.wait(PollFlags::OUT)?;
                sockopt::socket_error(&self.fd)??;
                Ok(self)
            }
            Err(errno) => Err(errno),
        }
    }

    fn wait(&self, for_what: PollFlags) -> Result<(), Errno> {
        loop {
            let left = self.by.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            match rustix::event::poll(&mut [PollFd::new(&self.fd, for_what)], Some(&left)) {
                Ok(0) => return Err(Errno::TIMEDOUT),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn again<T>(
        &self,
        wait: PollFlags,
        mut call: impl FnMut(&OwnedFd) -> Result<T, Errno>,
    ) -> Result<T, Error> {
        loop {
            match call(&self.fd) {
                Ok(value) => return Ok(value),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(wait).map_err(|errno| match errno {
                    Errno::TIMEDOUT => Error::new(ErrorKind::TimedOut, "the server does not answer"),
                    other => other.into(),
                })?,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize, Error> {
        self.again(PollFlags::IN, |fd| rustix::io::read(fd, &mut *bytes))
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        let flags = rustix::net::SendFlags::NOSIGNAL;
        self.again(PollFlags::OUT, |fd| rustix::net::send(fd, bytes, flags))
    }

    fn flush(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_found_by_address_or_in_the_table_and_nowhere_else() {
        let table = "127.0.0.1 localhost\n::1 localhost ip6-loopback # localhost2\n\n#10.0.0.9 old\n10.0.0.3\tstore Store2\n";
        let found =
            |host: &str| -> Vec<String> { addresses(host, table).iter().map(ToString::to_string).collect() };
        assert_eq!(found("localhost"), ["127.0.0.1", "::1"]);
        assert_eq!(found("STORE2"), ["10.0.0.3"]);
        assert_eq!(found("10.0.0.7"), ["10.0.0.7"]);
        assert_eq!(found("[fe80::1]"), ["fe80::1"]);
        for unknown in ["old", "localhost2", "", "10.0.0.256"] {
            assert!(found(unknown).is_empty(), "{unknown}");
        }
    }
}
