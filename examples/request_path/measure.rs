//! What is counted: time by stage, system calls as they are made, CPU, memory, wake-ups.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// A part of the loop that is timed by itself.
#[derive(Clone, Copy)]
pub(crate) enum Stage {
    Wait,
    Pending,
    CopyIn,
    Queue,
    Submit,
    Reap,
    CopyOut,
    Notify,
    Unmask,
    /// The whole of a turn of the pump, the seven above included.
    Turn,
    Guest,
}

/// The stages and their names, in the order of a request's way; those within the pump's turn are marked.
pub(crate) const STAGES: [(Stage, &str, bool); 11] = [
    (Stage::Wait, "wait (reactor)", false),
    (Stage::Pending, "take events (read)", false),
    (Stage::CopyIn, "copy in", true),
    (Stage::Queue, "storage queue", true),
    (Stage::Submit, "storage submit", true),
    (Stage::Reap, "storage reap", true),
    (Stage::CopyOut, "copy out", true),
    (Stage::Notify, "notify", true),
    (Stage::Unmask, "unmask", true),
    (Stage::Turn, "turn", false),
    (Stage::Guest, "guest", false),
];

/// A kind of system call of the path, counted where it is made.
#[derive(Clone, Copy)]
pub(crate) enum Call {
    /// Times the reactor was waited on; each costs what its implementation makes of it.
    Wait,
    Read,
    Copy,
    Notify,
    Unmask,
    /// `io_uring_enter`, or a `pread` or `pwrite` of a file in memory.
    Storage,
}

/// The calls and their names.
pub(crate) const CALLS: [(Call, &str); 6] = [
    (Call::Wait, "waits"),
    (Call::Read, "read"),
    (Call::Copy, "copy"),
    (Call::Notify, "notify"),
    (Call::Unmask, "unmask"),
    (Call::Storage, "storage"),
];

/// Counts calls always, and times stages when asked to.
pub(crate) struct Clock {
    timing: bool,
    spent: [Cell<Duration>; STAGES.len()],
    times: [Cell<u32>; STAGES.len()],
    calls: [Cell<u64>; CALLS.len()],
}

impl Clock {
    pub(crate) fn new(timing: bool) -> Clock {
        Clock { timing, spent: Default::default(), times: Default::default(), calls: Default::default() }
    }

    pub(crate) fn time<T>(&self, stage: Stage, what: impl FnOnce() -> T) -> T {
        if !self.timing {
            return what();
        }
        let start = Instant::now();
        let result = what();
        let spent = &self.spent[stage as usize];
        spent.set(spent.get() + start.elapsed());
        let times = &self.times[stage as usize];
        times.set(times.get() + 1);
        result
    }

    pub(crate) fn count(&self, call: Call) {
        let calls = &self.calls[call as usize];
        calls.set(calls.get() + 1);
    }

    pub(crate) fn calls(&self, call: Call) -> u64 {
        self.calls[call as usize].get()
    }

    pub(crate) fn reset(&self) {
        self.spent.iter().for_each(|spent| spent.set(Duration::ZERO));
        self.times.iter().for_each(|times| times.set(0));
        self.calls.iter().for_each(|calls| calls.set(0));
    }

    /// Time of a stage without the clock's own, given what one reading of the clock costs.
    pub(crate) fn net(&self, stage: Stage, reading: Duration) -> Duration {
        let index = stage as usize;
        self.spent[index].get().saturating_sub(reading * self.times[index].get())
    }

    /// What of a turn no inner stage accounts for: taking and parsing requests, keeping books, publishing answers.
    pub(crate) fn pump_itself(&self, reading: Duration) -> Duration {
        let inner = STAGES.iter().filter(|(_, _, inner)| *inner).map(|(stage, ..)| {
            let index = *stage as usize;
            // The interval holds one reading of the clock, the other lies outside of it, yet within the turn.
            self.spent[index].get() + reading * self.times[index].get()
        });
        self.net(Stage::Turn, reading).saturating_sub(inner.sum())
    }
}

/// What one reading of the clock costs.
pub(crate) fn clock_reading() -> Duration {
    let rounds = 100_000;
    let start = Instant::now();
    for _ in 0..rounds {
        std::hint::black_box(Instant::now());
    }
    start.elapsed() / rounds
}

/// User and system time of the whole process, its threads and kernel workers included.
pub(crate) fn cpu() -> (Duration, Duration) {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage fills the structure, which is plain numbers and zeroed.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let time = |time: libc::timeval| {
        Duration::from_micros(u64::try_from(time.tv_sec * 1_000_000 + time.tv_usec).unwrap_or(0))
    };
    (time(usage.ru_utime), time(usage.ru_stime))
}

/// A line of `/proc/self/status`: KiB, or a count.
pub(crate) fn status(name: &str) -> u64 {
    field("/proc/self/status", name)
}

/// Times that any thread of the process went to sleep by itself.
pub(crate) fn voluntary_switches() -> u64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0 };
    let paths = tasks.flatten().map(|task| task.path().join("status"));
    paths.map(|path| field(&path.to_string_lossy(), "voluntary_ctxt_switches")).sum()
}

fn field(path: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
