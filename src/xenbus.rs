//! Xenstore over a real connection: the daemon's socket, or the kernel's device.
//!
//! The two differ, and only this file knows how:
//! - `/run/xenstored/socket` is a byte stream with payloads of up to 4096 bytes. It exists in dom0 only, and not where
//!   xenstored runs in a domain of its own.
//! - `/dev/xen/xenbus` takes exactly one message per `write` (what follows it in the same write is dropped), header
//!   and payload together at most 4096 bytes, and **only one request at a time**: the kernel keeps the message in the
//!   one buffer of the open file until its own thread has sent it, and the next `write` overwrites it there. Requests
//!   sent without waiting for the reply before are lost or mixed up (seen with Linux 6.1). It reports some errors of WATCH and UNWATCH as the errno of that write
//!   instead of a reply. It never becomes "not writable", and its `poll` never says that it is writable, so what is to
//!   be written is written at once. Watches and transactions end with the file descriptor.
//!
//! A connection that ends is made again, with growing pauses, for ever: guests go on with their I/O meanwhile, only
//! attaching and detaching waits. The [`Session`] tells its owner with [`Event::Reset`] to look at everything anew.

mod place;
mod session;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::io::Errno;
use xenstore::{Config, ErrorCode, limits, wire};

pub use place::OpenError;
use place::{Kind, Place};
pub use session::Session;
pub use xenstore::Event;

/// The pause before the first attempt to connect again, in milliseconds; it doubles with each.
const RECONNECT_FIRST_MS: u64 = 100;

/// The longest pause between attempts to connect, in milliseconds.
const RECONNECT_MS_MAX: u64 = 5_000;

/// Reads per call of [`Xenbus::handle_readable`], so that a flood of watch events leaves time for the rings. The poller
/// is level-triggered and brings us back.
const READS_PER_TURN_MAX: usize = 16;

/// How to reach xenstored.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The socket or device to use; without it the usual places are tried.
    pub path: Option<PathBuf>,
    /// Seed of the random waiting times after transactions that clashed.
    pub seed: u64,
}

/// A connection to xenstored that renews itself, and the session on it.
#[derive(Debug)]
pub struct Xenbus {
    session: Session,
    place: Place,
    connection: Option<OwnedFd>,
    connections_made: u64,
    connected_at_ms: u64,
    /// While there is no connection: when to try again, and the pause after that.
    retry_at_ms: u64,
    retry_pause_ms: u64,
    blocked: bool,
}

impl Xenbus {
    /// Connects.
    ///
    /// # Errors
    /// [`OpenError`] lists what was tried and why it failed.
    pub fn open(options: &Options, now_ms: u64) -> Result<Xenbus, OpenError> {
        let (place, connection) = Place::find(options.path.as_deref())?;
        let (payload_bytes_max, requests_max) = match place.kind {
            Kind::Socket => (wire::PAYLOAD_BYTES_MAX, limits::REQUESTS_OUTSTANDING_MAX),
            Kind::Device => (wire::DEVICE_PAYLOAD_BYTES_MAX, 1),
        };
        let config = Config { payload_bytes_max, requests_max, seed: options.seed };
        let mut xenbus = Xenbus {
            session: Session::new(config),
            place,
            connection: Some(connection),
            connections_made: 1,
            connected_at_ms: now_ms,
            retry_at_ms: 0,
            retry_pause_ms: RECONNECT_FIRST_MS,
            blocked: false,
        };
        xenbus.session.handle_time(now_ms);
        xenbus.session.connected();
        xenbus.flush(now_ms);
        Ok(xenbus)
    }

    /// What is watched, asked and told. After a round of submissions call [`Xenbus::flush`].
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Whether it is the kernel's device, with its lower limit on messages, and not a socket.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.place.kind == Kind::Device
    }

    /// Where xenstored was found, for the log.
    #[must_use]
    pub fn place(&self) -> &std::path::Path {
        &self.place.path
    }

    /// The descriptor to poll for reading, and for writing while [`Xenbus::wants_write`]. `None` while there is no
    /// connection. It is another one whenever [`Xenbus::connections_made`] has changed.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(OwnedFd::as_fd)
    }

    /// Counts connections: tells a poller that the descriptor is a new one.
    #[must_use]
    pub fn connections_made(&self) -> u64 {
        self.connections_made
    }

    /// Whether something is left to write that the socket did not take.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.blocked
    }

    /// When [`Xenbus::handle_time`] is due at the latest, in milliseconds of the caller's clock.
    #[must_use]
    pub fn timeout(&self) -> Option<u64> {
        let retry = self.connection.is_none().then_some(self.retry_at_ms);
        [retry, self.session.timeout()].into_iter().flatten().min()
    }

    /// Tells the time, in milliseconds since any fixed instant; connects again when that is due.
    pub fn handle_time(&mut self, now_ms: u64) {
        self.session.handle_time(now_ms);
        if self.connection.is_none() && now_ms >= self.retry_at_ms {
            self.reconnect(now_ms);
        }
        self.flush(now_ms);
    }

    /// Reads what is there, within a bound, and answers.
    pub fn handle_readable(&mut self, now_ms: u64) {
        self.session.handle_time(now_ms);
        let mut buffer = [0_u8; 4096];
        for _ in 0..READS_PER_TURN_MAX {
            let Some(connection) = &self.connection else { return };
            match rustix::io::read(connection, &mut buffer[..]) {
                Ok(0) => return self.lost(now_ms, "xenstored closed the connection"),
                Ok(bytes) => {
                    if let Err(error) = self.session.receive(&buffer[..bytes]) {
                        return self.lost(now_ms, &error.to_string());
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return self.lost(now_ms, &error.to_string()),
            }
        }
        self.flush(now_ms);
    }

    /// The descriptor takes bytes again.
    pub fn handle_writable(&mut self, now_ms: u64) {
        self.session.handle_time(now_ms);
        self.flush(now_ms);
    }

    /// Writes what is to be written, as far as it goes.
    pub fn flush(&mut self, now_ms: u64) {
        self.blocked = false;
        while let Some(connection) = &self.connection {
            let Some(bytes) = self.session.transmit() else { return };
            match rustix::io::write(connection, bytes) {
                Ok(written) => self.session.transmitted(written),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.blocked = true;
                    return;
                }
                Err(error) if self.place.kind == Kind::Device && !means_no_device(error) => {
                    if let Err(error) = self.session.refused(code_of(error)) {
                        return self.lost(now_ms, &error.to_string());
                    }
                }
                Err(error) => return self.lost(now_ms, &error.to_string()),
            }
        }
    }

    fn lost(&mut self, now_ms: u64, why: &str) {
        log::warn!("xenstore: connection to {} lost: {why}; connecting again", self.place.path.display());
        self.connection = None;
        self.blocked = false;
        self.session.disconnected();
        if now_ms.saturating_sub(self.connected_at_ms) >= RECONNECT_MS_MAX {
            self.retry_pause_ms = RECONNECT_FIRST_MS;
        }
        self.retry_at_ms = now_ms.saturating_add(self.retry_pause_ms);
    }

    fn reconnect(&mut self, now_ms: u64) {
        match self.place.connect() {
            Ok(connection) => {
                log::info!("xenstore: connected to {} again", self.place.path.display());
                self.connection = Some(connection);
                self.connections_made += 1;
                self.connected_at_ms = now_ms;
                self.session.connected();
            }
            Err(error) => {
                log::debug!("xenstore: {}: {error}", self.place.path.display());
                self.retry_at_ms = now_ms.saturating_add(self.retry_pause_ms);
            }
        }
        // Also after a success: a server that takes connections only to drop them is asked ever less often. The pause
        // falls back once a connection has lasted.
        self.retry_pause_ms = (self.retry_pause_ms * 2).min(RECONNECT_MS_MAX);
    }
}

/// Whether the errno of a write to the device is about the device and not about the message.
fn means_no_device(error: Errno) -> bool {
    matches!(error, Errno::NODEV | Errno::NXIO | Errno::BADF | Errno::PIPE | Errno::CONNRESET)
}

/// The protocol's word for an errno of the device.
fn code_of(error: Errno) -> ErrorCode {
    match error {
        Errno::INVAL | Errno::ILSEQ => ErrorCode::Invalid,
        Errno::ACCESS => ErrorCode::Denied,
        Errno::PERM => ErrorCode::NotOwner,
        Errno::EXIST => ErrorCode::Exists,
        Errno::NOENT => ErrorCode::Missing,
        Errno::NOMEM => ErrorCode::NoMemory,
        Errno::NOSPC => ErrorCode::NoSpace,
        Errno::TOOBIG => ErrorCode::TooBig,
        Errno::BUSY => ErrorCode::Busy,
        Errno::IO => ErrorCode::Io,
        Errno::NOSYS => ErrorCode::Unsupported,
        _ => ErrorCode::Other,
    }
}
