//! Signals as a descriptor, so that the reactor waits for them like for everything else.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::Error;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM, SIGINT: end, leaving the rings to a successor.
    Stop,
    /// SIGUSR1: write the status to the log.
    Report,
}

/// The descriptor.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks the signals for this thread and all that it starts from now on, and opens the descriptor.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open() -> Result<Signals, Error> {
        // SAFETY: `set` is initialised by `sigemptyset` before use; the calls touch nothing but it and the thread's mask.
        let fd = unsafe {
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGHUP] {
                libc::sigaddset(&raw mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Error::new(format!("cannot open a signal descriptor: {error}"), ""));
        }
        // SAFETY: signalfd returned a descriptor that nobody else owns.
        Ok(Signals { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The descriptor to poll.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Takes one signal. SIGHUP, which a closing terminal sends, asks for nothing.
    pub fn take(&mut self) -> Option<Signal> {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        loop {
            rustix::io::read(&self.fd, &mut info).ok().filter(|length| *length == info.len())?;
            let [b0, b1, b2, b3, ..] = info;
            match i32::from_ne_bytes([b0, b1, b2, b3]) {
                libc::SIGTERM | libc::SIGINT => return Some(Signal::Stop),
                libc::SIGUSR1 => return Some(Signal::Report),
                _ => {}
            }
        }
    }
}
