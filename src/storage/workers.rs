//! A few threads for calls that have no asynchronous form: opening and closing files, and transfers on cached files where
//! the engine is Linux AIO.
//!
//! Threads start when there is work and no idle one, up to a bound; they sleep without a timeout, so an idle process has
//! no wake-ups from them. A call that never returns (a dead file server) occupies one thread; the others go on.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::EventfdFlags;

/// Stack of a worker. They do little more than system calls; only touched pages count.
const STACK_BYTES: usize = 128 * 1024;

/// An eventfd that wakes the reactor.
#[derive(Debug)]
pub(super) struct Bell {
    fd: OwnedFd,
    rung: AtomicBool,
}

impl Bell {
    pub(super) fn new() -> std::io::Result<Bell> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Bell { fd, rung: AtomicBool::new(false) })
    }

    /// Wakes the reactor, once until it has looked.
    pub(super) fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // It cannot fail but for a full counter, which is readable anyway.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Whether it was rung since the last look; makes it quiet again.
    pub(super) fn answer(&self) -> bool {
        if !self.rung.load(Ordering::Relaxed) {
            return false;
        }
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.fd, &mut count);
        // After the read: a ring in between is seen by the caller, who looks at the queues next.
        self.rung.store(false, Ordering::SeqCst);
        true
    }

    pub(super) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

struct Queues<J, A> {
    jobs: VecDeque<J>,
    answers: VecDeque<A>,
    idle: usize,
    threads: usize,
    stop: bool,
}

struct Shared<J, A> {
    queues: Mutex<Queues<J, A>>,
    more: Condvar,
    answered: AtomicBool,
    bell: Arc<Bell>,
    work: Box<dyn Fn(J) -> Option<A> + Send + Sync>,
}

impl<J, A> Shared<J, A> {
    /// A worker does not panic while it holds the lock; if one did, the queues would still be sound.
    fn lock(&self) -> MutexGuard<'_, Queues<J, A>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads, their jobs and their answers.
pub(super) struct Workers<J, A> {
    shared: Arc<Shared<J, A>>,
    name: &'static str,
    threads_max: usize,
}

impl<J, A> std::fmt::Debug for Workers<J, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<J: Send + 'static, A: Send + 'static> Workers<J, A> {
    /// No thread starts yet. `work` does one job; what it answers is told through `bell`.
    pub(super) fn new(
        name: &'static str,
        threads_max: usize,
        bell: Arc<Bell>,
        work: impl Fn(J) -> Option<A> + Send + Sync + 'static,
    ) -> Self {
        let queues =
            Queues { jobs: VecDeque::new(), answers: VecDeque::new(), idle: 0, threads: 0, stop: false };
        let shared = Shared {
            queues: Mutex::new(queues),
            more: Condvar::new(),
            answered: AtomicBool::new(false),
            bell,
            work: Box::new(work),
        };
        Self { shared: Arc::new(shared), name, threads_max }
    }

    /// Queues a job. Gives it back when no thread could be started and none is there.
    pub(super) fn give(&self, job: J) -> Result<(), J> {
        let mut queues = self.shared.lock();
        if queues.idle <= queues.jobs.len() && queues.threads < self.threads_max {
            let shared = Arc::clone(&self.shared);
            let builder = std::thread::Builder::new().name(self.name.into()).stack_size(STACK_BYTES);
            match builder.spawn(move || serve(&shared)) {
                Ok(_) => queues.threads += 1,
                Err(error) if queues.threads == 0 => {
                    log::error!("cannot start a thread for {}: {error}", self.name);
                    return Err(job);
                }
                Err(_) => {}
            }
        }
        queues.jobs.push_back(job);
        drop(queues);
        self.shared.more.notify_one();
        Ok(())
    }

    /// How many jobs wait for a thread.
    pub(super) fn waiting(&self) -> usize {
        self.shared.lock().jobs.len()
    }

    /// Takes one answer; without a lock when there is none.
    #[inline]
    pub(super) fn take(&self) -> Option<A> {
        if !self.shared.answered.load(Ordering::Acquire) {
            return None;
        }
        let mut queues = self.shared.lock();
        let answer = queues.answers.pop_front();
        if queues.answers.is_empty() {
            self.shared.answered.store(false, Ordering::Release);
        }
        answer
    }
}

fn serve<J, A>(shared: &Shared<J, A>) {
    let mut queues = shared.lock();
    loop {
        if queues.stop {
            return;
        }
        let Some(job) = queues.jobs.pop_front() else {
            queues.idle += 1;
            queues = shared.more.wait(queues).unwrap_or_else(PoisonError::into_inner);
            queues.idle -= 1;
            continue;
        };
        drop(queues);
        let answer = (shared.work)(job);
        queues = shared.lock();
        if let Some(answer) = answer {
            queues.answers.push_back(answer);
            shared.answered.store(true, Ordering::Release);
            shared.bell.ring();
        }
    }
}

impl<J, A> Drop for Workers<J, A> {
    /// Tells the threads to end. One that hangs in a call is left behind.
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.more.notify_all();
    }
}
