//! Waiting: one poller for all descriptors of the process, level-triggered.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use polling::{Event, Events, PollMode, Poller};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use crate::error::Error;

/// Events fetched by one `epoll_wait`; more come with the next. 12 bytes each.
const EVENTS_PER_WAIT: usize = 64;

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

/// How a [`Reactor`] waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Waiting {
    /// The polling crate: five system calls a wait, and eight when io_uring's answers interrupt it.
    Polling,
    /// One `epoll_wait` a wait; timeouts are whole milliseconds, rounded up.
    #[default]
    Epoll,
}

enum Poll {
    Polling(Poller, Events),
    Epoll(OwnedFd, Vec<epoll::Event>),
}

/// The poller.
pub struct Reactor {
    poll: Poll,
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor").finish_non_exhaustive()
    }
}

impl Reactor {
    /// A poller without descriptors.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn new() -> Result<Reactor, Error> {
        Reactor::waiting_by(Waiting::default())
    }

    /// The same, waiting in the way that is asked for.
    ///
    /// # Errors
    /// As [`Reactor::new`].
    pub fn waiting_by(waiting: Waiting) -> Result<Reactor, Error> {
        let refused = |error: std::io::Error| Error::new(format!("cannot make a poller: {error}"), "");
        let poll = match waiting {
            Waiting::Polling => Poll::Polling(Poller::new().map_err(refused)?, Events::new()),
            Waiting::Epoll => {
                let epoll =
                    epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|errno| refused(errno.into()))?;
                Poll::Epoll(epoll, Vec::with_capacity(EVENTS_PER_WAIT))
            }
        };
        Ok(Reactor { poll })
    }

    /// Watches a descriptor under `key`.
    ///
    /// # Errors
    /// When the kernel refuses the descriptor.
    pub fn add(&mut self, fd: BorrowedFd<'_>, key: usize, writable: bool) -> Result<(), Error> {
        let result = match &self.poll {
            Poll::Polling(poller, _) => {
                let interest = Event::new(key, true, writable);
                // SAFETY: every descriptor is removed with `remove` before it is closed; a descriptor that is closed
                // nevertheless leaves the poller by itself, as epoll holds no reference to it.
                unsafe { poller.add_with_mode(fd.as_raw_fd(), interest, PollMode::Level) }
            }
            Poll::Epoll(epoll, _) => {
                epoll::add(epoll, fd, data(key), interest(writable)).map_err(std::io::Error::from)
            }
        };
        result.map_err(|error| not_polled(fd, &error))
    }

    /// Changes whether room to write is of interest.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn modify(&mut self, fd: BorrowedFd<'_>, key: usize, writable: bool) -> Result<(), Error> {
        self.set_interest(fd, key, true, writable)
    }

    /// Changes what is of interest. That the other side is gone is told in any case.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_interest(
        &mut self,
        fd: BorrowedFd<'_>,
        key: usize,
        readable: bool,
        writable: bool,
    ) -> Result<(), Error> {
        let result = match &self.poll {
            Poll::Polling(poller, _) => {
                poller.modify_with_mode(fd, Event::new(key, readable, writable), PollMode::Level)
            }
            Poll::Epoll(epoll, _) => {
                let mut flags = interest(writable);
                flags.set(epoll::EventFlags::IN, readable);
                epoll::modify(epoll, fd, data(key), flags).map_err(std::io::Error::from)
            }
        };
        result.map_err(|error| not_polled(fd, &error))
    }

    /// Forgets a descriptor.
    pub fn remove(&mut self, fd: BorrowedFd<'_>) {
        let result = match &self.poll {
            Poll::Polling(poller, _) => poller.delete(fd),
            Poll::Epoll(epoll, _) => epoll::delete(epoll, fd).map_err(std::io::Error::from),
        };
        if let Err(error) = result {
            log::debug!("descriptor {} was not polled: {error}", fd.as_raw_fd());
        }
    }

    /// Waits until something is ready, at most for `timeout`, and appends what is ready to `ready`.
    pub fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<Ready>) {
        match &mut self.poll {
            Poll::Polling(poller, events) => {
                events.clear();
                if let Err(error) = poller.wait(events, timeout) {
                    log::error!("polling failed: {error}");
                }
                ready.extend(events.iter().map(|event| Ready {
                    key: event.key,
                    readable: event.readable,
                    writable: event.writable,
                }));
            }
            Poll::Epoll(epoll, events) => {
                events.clear();
                let timeout = timeout.map(whole_milliseconds);
                match epoll::wait(&*epoll, spare_capacity(events), timeout.as_ref()) {
                    // An interruption counts as a wake-up: the caller looks at everything and waits again.
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => log::error!("polling failed: {errno}"),
                }
                ready.extend(events.iter().map(|event| {
                    let (data, flags) = (event.data, event.flags);
                    let gone = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
                    Ready {
                        key: usize::try_from(data.u64()).unwrap_or(usize::MAX),
                        readable: flags.intersects(epoll::EventFlags::IN | gone),
                        writable: flags.intersects(epoll::EventFlags::OUT | gone),
                    }
                }));
            }
        }
    }
}

fn data(key: usize) -> epoll::EventData {
    epoll::EventData::new_u64(key as u64)
}

fn interest(writable: bool) -> epoll::EventFlags {
    if writable { epoll::EventFlags::IN | epoll::EventFlags::OUT } else { epoll::EventFlags::IN }
}

fn not_polled(fd: BorrowedFd<'_>, error: &std::io::Error) -> Error {
    Error::new(format!("cannot poll descriptor {}: {error}", fd.as_raw_fd()), "")
}

/// Rounded up, so that nobody is woken before the time and waits again for nothing.
fn whole_milliseconds(time: Duration) -> Timespec {
    let millis = i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
    Timespec { tv_sec: (millis / 1000).into(), tv_nsec: (millis % 1000 * 1_000_000).into() }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use super::*;

    #[test]
    fn both_ways_of_waiting_tell_the_same() {
        for waiting in [Waiting::Polling, Waiting::Epoll] {
            let mut reactor = Reactor::waiting_by(waiting).unwrap();
            let (mut near, far) = UnixStream::pair().unwrap();
            reactor.add(far.as_fd(), 7, false).unwrap();
            let mut ready = Vec::new();
            let start = Instant::now();
            reactor.wait(Some(Duration::from_micros(1500)), &mut ready);
            assert!(ready.is_empty() && start.elapsed() >= Duration::from_micros(1500), "{waiting:?}");
            near.write_all(b"x").unwrap();
            for _ in 0..2 {
                reactor.wait(None, &mut ready);
                let readable = Ready { key: 7, readable: true, writable: false };
                assert_eq!(std::mem::take(&mut ready), [readable], "{waiting:?}: level-triggered");
            }
            reactor.modify(far.as_fd(), 8, true).unwrap();
            reactor.wait(None, &mut ready);
            let both = Ready { key: 8, readable: true, writable: true };
            assert_eq!(std::mem::take(&mut ready), [both], "{waiting:?}");
            reactor.set_interest(far.as_fd(), 8, false, false).unwrap();
            reactor.wait(Some(Duration::ZERO), &mut ready);
            assert!(ready.is_empty(), "{waiting:?}: nothing is of interest");
            drop(near);
            reactor.modify(far.as_fd(), 8, false).unwrap();
            reactor.wait(None, &mut ready);
            assert!(ready.drain(..).all(|ready| ready.readable), "{waiting:?}: the other side is gone");
            reactor.remove(far.as_fd());
            reactor.wait(Some(Duration::ZERO), &mut ready);
            assert!(ready.is_empty(), "{waiting:?}");
        }
    }

    #[test]
    fn a_timeout_is_never_cut_short_and_never_overflows() {
        let millis = |time: Duration| {
            let whole = whole_milliseconds(time);
            whole.tv_sec * 1000 + whole.tv_nsec / 1_000_000
        };
        assert_eq!(millis(Duration::ZERO), 0);
        assert_eq!(millis(Duration::from_nanos(1)), 1);
        assert_eq!(millis(Duration::from_millis(1999)), 1999);
        assert_eq!(millis(Duration::MAX), i32::MAX.into());
    }
}
