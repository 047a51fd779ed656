//! Time: since the process began, and since there was load.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::limits::TRIM_AFTER;
use crate::pump::Pump;
use crate::storage::linux::LinuxStorage;

/// Time since the process began, a few milliseconds coarse. The exact clock is a system call in some Xen domains, and the loop
/// looks at the time with every batch of requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Duration);

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock(Clock::system())
    }

    pub(crate) fn now(self) -> Duration {
        Clock::system().saturating_sub(self.0)
    }

    fn system() -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
    }
}

/// Fires when it may be time to give memory back. A timer of its own, and no timeout of the wait: that would be set and
/// cancelled with every batch of requests.
#[derive(Debug)]
pub(crate) struct TrimTimer {
    timer: OwnedFd,
    is_set: bool,
}

impl TrimTimer {
    pub(crate) fn new() -> Result<TrimTimer, Error> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|errno| Error::new(format!("cannot make a timer: {errno}"), ""))?;
        Ok(TrimTimer { timer, is_set: false })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Has the memory of a load looked at later, if there was any.
    pub(crate) fn set(&mut self, storage: &mut LinuxStorage) {
        if self.is_set || !storage.was_busy() {
            return;
        }
        let seconds = i64::try_from(TRIM_AFTER.as_secs()).unwrap_or(i64::MAX);
        let it_value = Timespec { tv_sec: seconds, tv_nsec: 0 };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        self.is_set = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok();
    }

    /// It has fired: gives the memory of past load back to the system, once, when there has been none for a while.
    pub(crate) fn fired<H: Hypervisor>(&mut self, pump: &mut Pump<H, LinuxStorage>) {
        let _ = rustix::io::read(&self.timer, &mut [0_u8; 8]);
        self.is_set = false;
        self.set(&mut pump.storage);
        if !self.is_set {
            pump.trim();
        }
    }
}
