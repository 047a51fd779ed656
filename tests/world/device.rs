//! A medium with a limited speed: what keeps one guest waiting for another.
//!
//! A solid-state disk, seen from its host: up to [`Speed::active_max`] commands are worked on at once, the others wait in
//! the order in which they were submitted. A command first takes `setup_us` by itself (flash access, controller, interrupt),
//! many of them at the same time; then its bytes pass a bus that serves all commands equally, `bytes_per_us` in all.
//! With `active_max` 1 it is a disk that does one thing after the other.

use std::collections::VecDeque;

/// How fast a device is.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    pub active_max: usize,
    pub setup_us: u64,
    pub bytes_per_us: u64,
}

impl Speed {
    /// A common solid-state disk: 32 commands, 60 us, 2 GB/s.
    pub const FLASH: Speed = Speed { active_max: 32, setup_us: 60, bytes_per_us: 2000 };
    /// One command at a time, 2 ms of seeking, 200 MB/s.
    pub const SPINNING: Speed = Speed { active_max: 1, setup_us: 2000, bytes_per_us: 200 };
}

#[derive(Clone, Copy, Debug)]
struct Command {
    number: u64,
    /// Nanoseconds of setup that are left.
    setup_ns: u64,
    /// Thousandths of bytes that are left to be moved: whole numbers at every step of a nanosecond.
    left: u64,
}

/// A device and its queue.
#[derive(Clone, Debug)]
pub struct Device {
    speed: Speed,
    now_ns: u64,
    active: Vec<Command>,
    waiting: VecDeque<Command>,
    /// Commands that are done, and when, in nanoseconds.
    done: Vec<u64>,
    /// The most that were ever waiting or being worked on.
    pub queued_max: usize,
    /// Bytes moved since the world began.
    pub moved_bytes: u64,
}

impl Device {
    pub fn new(speed: Speed) -> Device {
        Device {
            speed,
            now_ns: 0,
            active: Vec::new(),
            waiting: VecDeque::new(),
            done: Vec::new(),
            queued_max: 0,
            moved_bytes: 0,
        }
    }

    pub fn submit(&mut self, now_us: u64, number: u64, bytes: u64) {
        self.advance(now_us);
        self.moved_bytes += bytes;
        self.waiting.push_back(Command { number, setup_ns: self.speed.setup_us * 1000, left: bytes * 1000 });
        self.fill();
        self.queued_max = self.queued_max.max(self.active.len() + self.waiting.len());
    }

    fn fill(&mut self) {
        while self.active.len() < self.speed.active_max {
            let Some(next) = self.waiting.pop_front() else { break };
            self.active.push(next);
        }
    }

    /// Thousandths of bytes that each moving command gets in a nanosecond.
    fn rate(&self) -> u64 {
        let moving = self.active.iter().filter(|one| one.setup_ns == 0).count() as u64;
        (self.speed.bytes_per_us / moving.max(1)).max(1)
    }

    /// Nanoseconds until some command gets on to its next stage.
    fn next_step_ns(&self) -> Option<u64> {
        let rate = self.rate();
        let step = |one: &Command| match one.setup_ns {
            0 => one.left.div_ceil(rate).max(1),
            setup => setup,
        };
        self.active.iter().map(step).min()
    }

    fn step(&mut self, ns: u64) {
        let rate = self.rate();
        for one in &mut self.active {
            if one.setup_ns > 0 {
                one.setup_ns = one.setup_ns.saturating_sub(ns);
            } else {
                one.left = one.left.saturating_sub(rate * ns);
            }
        }
        self.now_ns += ns;
        let (done, active) = self.active.iter().partition(|one| one.setup_ns == 0 && one.left == 0);
        let _: &Vec<Command> = &done;
        self.done.extend(done.iter().map(|one| one.number));
        self.active = active;
        self.fill();
    }

    /// Works until then.
    pub fn advance(&mut self, now_us: u64) {
        let end = now_us * 1000;
        while self.now_ns < end {
            let room = end - self.now_ns;
            match self.next_step_ns() {
                Some(ns) => self.step(ns.min(room)),
                None => self.now_ns = end,
            }
        }
    }

    /// When the next command will be done, in microseconds; now, if one is.
    pub fn next_due(&self) -> Option<u64> {
        if !self.done.is_empty() {
            return Some(self.now_ns / 1000);
        }
        let mut ahead = self.clone();
        while ahead.done.is_empty() {
            let ns = ahead.next_step_ns()?;
            ahead.step(ns);
        }
        Some(ahead.now_ns.div_ceil(1000))
    }

    /// Takes what is done.
    pub fn take_done(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.done)
    }
}
