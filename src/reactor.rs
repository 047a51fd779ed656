//! Waiting: one poller for all descriptors of the process, level-triggered.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use polling::{Event, Events, PollMode, Poller};

use crate::error::Error;

/// What woke the process: the key under which a descriptor was added, and what it is ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The key.
    pub key: usize,
    /// There is something to read, or the other side is gone.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
}

/// The poller.
#[derive(Debug)]
pub struct Reactor {
    poller: Poller,
    events: Events,
}

impl Reactor {
    /// A poller without descriptors.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn new() -> Result<Reactor, Error> {
        let poller =
            Poller::new().map_err(|error| Error::new(format!("cannot make a poller: {error}"), ""))?;
        Ok(Reactor { poller, events: Events::new() })
    }

    /// Watches a descriptor under `key`.
    ///
    /// # Errors
    /// When the kernel refuses the descriptor.
    pub fn add(&mut self, fd: BorrowedFd<'_>, key: usize, writable: bool) -> Result<(), Error> {
        let interest = Event::new(key, true, writable);
        // SAFETY: every descriptor is removed with `remove` before it is closed; a descriptor that is closed
        // nevertheless leaves the poller by itself, as epoll holds no reference to it.
        unsafe { self.poller.add_with_mode(fd.as_raw_fd(), interest, PollMode::Level) }
            .map_err(|error| Error::new(format!("cannot poll descriptor {}: {error}", fd.as_raw_fd()), ""))
    }

    /// Changes whether room to write is of interest.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn modify(&mut self, fd: BorrowedFd<'_>, key: usize, writable: bool) -> Result<(), Error> {
        self.poller
            .modify_with_mode(fd, Event::new(key, true, writable), PollMode::Level)
            .map_err(|error| Error::new(format!("cannot poll descriptor {}: {error}", fd.as_raw_fd()), ""))
    }

    /// Forgets a descriptor.
    pub fn remove(&mut self, fd: BorrowedFd<'_>) {
        if let Err(error) = self.poller.delete(fd) {
            log::debug!("descriptor {} was not polled: {error}", fd.as_raw_fd());
        }
    }

    /// Waits until something is ready, at most for `timeout`, and appends what is ready to `ready`.
    pub fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<Ready>) {
        self.events.clear();
        if let Err(error) = self.poller.wait(&mut self.events, timeout) {
            log::error!("polling failed: {error}");
        }
        ready.extend(self.events.iter().map(|event| Ready {
            key: event.key,
            readable: event.readable,
            writable: event.writable,
        }));
    }
}
