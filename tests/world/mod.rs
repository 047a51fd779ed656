//! One simulated world: guests, hypervisor, storage, journals and clock, on one thread, driven by one seed.
//!
//! The fault model is in `docs/design/simulation.md`. Everything random comes from [`Shared::below`], time from
//! [`clock::Clock`], so that a seed replays bit for bit; [`Shared::trace`] is a hash of all that crossed a seam.
#![allow(
    dead_code,
    missing_docs,
    unused_imports,
    clippy::cast_sign_loss,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::cast_possible_truncation
)]

pub mod backend;
pub mod chains;
pub mod clock;
pub mod device;
pub mod guest;
pub mod host;
pub mod hostile;
pub mod hypervisor;
pub mod journals;
pub mod memory;
pub mod model;
pub mod rng;
pub mod run;
pub mod storage;
pub mod xenstore;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use clock::Clock;
use hypervisor::Xen;
use journals::Vault;
use model::{DiskModel, mix};
use rng::Rng;
use storage::Media;

/// The payload with which a process dies at one of the world's [`Shared::point`]s.
pub struct Death;

/// Bugs that a run may be given on purpose. The oracles must find each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Plant {
    #[default]
    None,
    /// A flush is acknowledged and nothing made durable.
    FlushNotDone,
    /// A flush leaves out the write that ended last.
    FlushSkipsLast,
    /// A failed flush is reported as done.
    FlushErrorHidden,
    /// An event is not let through again.
    UnmaskDropped,
    /// The guest is not told of answers.
    NotifyDropped,
    /// A batch of grant copies that failed is reported as done.
    CopyStatusIgnored,
    /// A grant copy is left out and reported as done.
    CopySkipped,
    /// The journal forgets a request that was taken.
    JournalForgets,
    /// What a killed process had changed of an image is not put back.
    NothingLeft,
    /// A write is done one sector further.
    WriteMisplaced,
    /// A failed write is reported as done.
    WriteErrorHidden,
    /// A batch of copies that could not reach an image is reported as done.
    DirectFaultIgnored,
    /// A ring stays mapped.
    UnmapDropped,
    /// A port stays bound.
    UnbindDropped,
}

/// How often things fail: numerators over 1024.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub read_error: u64,
    pub write_error: u64,
    pub flush_error: u64,
    /// A whole batch of grant copies fails.
    pub copy_batch: u64,
    /// The queue of events overflows.
    pub overflow: u64,
    /// An event that nobody sent.
    pub spurious: u64,
    /// A transfer takes a hundred times as long.
    pub slow: u64,
    /// Longest usual latency of a transfer.
    pub latency_us_max: u64,
    /// Unflushed sectors may be torn by power loss.
    pub torn: bool,
}

/// An inhabitant of a guest domain.
pub trait Actor {
    /// Does something, if there is something to do. False if it only waits.
    fn act(&mut self, shared: &Shared) -> bool;
    /// Has nothing more to do and waits for nothing.
    fn finished(&self) -> bool;
    /// Its domain, while it lives.
    fn domain(&self) -> u16;
    /// What it waits for, for the report of a stuck world.
    fn describe(&self) -> String;
    /// When it will act though nothing happens.
    fn wakes_at(&self) -> Option<u64> {
        None
    }
}

/// All that the inhabitants of the world share.
pub struct Shared {
    pub clock: Clock,
    pub xen: RefCell<Xen>,
    pub media: RefCell<Media>,
    pub vault: RefCell<Vault>,
    pub models: RefCell<Vec<DiskModel>>,
    pub guests: RefCell<Vec<Box<dyn Actor>>>,
    pub faults: Cell<Faults>,
    pub plant: Cell<Plant>,
    /// How often of 1024 times storage lets a grant copy go straight to an image, and how often such a batch fails.
    pub direct: Cell<(u64, u64)>,
    /// Guests run while the backend is inside a call.
    pub preempt: Cell<bool>,
    /// Every guest acts at every call of the backend: none is ever late with its next request.
    pub eager: Cell<bool>,
    /// Sane guests send nothing more.
    pub stop_sending: Cell<bool>,
    /// The backend dies when it makes this many more calls.
    pub countdown: Cell<Option<u64>>,
    /// Calls of the backend since the world began.
    pub calls: Cell<u64>,
    /// `VBDD_TRACE` is set: everything noted is printed.
    loud: bool,
    trace: Cell<u64>,
    rng: RefCell<Rng>,
    failure: RefCell<Option<String>>,
}

impl Shared {
    pub fn new(seed: u64) -> Rc<Shared> {
        Rc::new(Shared {
            clock: Clock::default(),
            xen: RefCell::default(),
            media: RefCell::default(),
            vault: RefCell::default(),
            models: RefCell::default(),
            guests: RefCell::default(),
            faults: Cell::new(Faults { latency_us_max: 500, ..Faults::default() }),
            plant: Cell::default(),
            direct: Cell::default(),
            preempt: Cell::new(true),
            eager: Cell::new(false),
            stop_sending: Cell::new(false),
            countdown: Cell::new(None),
            calls: Cell::new(0),
            loud: std::env::var_os("VBDD_TRACE").is_some(),
            trace: Cell::new(seed),
            rng: RefCell::new(Rng::new(seed)),
            failure: RefCell::new(None),
        })
    }

    pub fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n as usize) as u64
    }

    pub fn chance(&self, num: u64, den: u64) -> bool {
        self.rng.borrow_mut().chance(num as usize, den as usize)
    }

    /// True `rate` times of 1024. Draws nothing for a rate of 0.
    pub fn strikes(&self, rate: u64) -> bool {
        rate > 0 && self.chance(rate, 1024)
    }

    pub fn index(&self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// Adds to the hash of what happened.
    pub fn note(&self, what: &str, a: u64, b: u64) {
        if self.loud {
            eprintln!("{:>9} {what} {a:#x} {b:#x}", self.clock.now_us());
        }
        let mut hash = self.trace.get();
        for byte in what.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        }
        self.trace.set(mix(hash ^ mix(a).wrapping_add(b)));
    }

    pub fn trace(&self) -> u64 {
        self.trace.get()
    }

    /// An oracle was contradicted. The first one counts.
    pub fn fail(&self, what: impl Into<String>) {
        let mut failure = self.failure.borrow_mut();
        if failure.is_none() {
            *failure = Some(what.into());
        }
    }

    pub fn check(&self) -> Result<(), String> {
        self.failure.borrow().clone().map_or(Ok(()), Err)
    }

    /// Every call of the backend passes here first: it may die here, and guests may run.
    pub fn point(&self, call: &str, a: u64, b: u64) {
        self.note(call, a, b);
        self.calls.set(self.calls.get() + 1);
        if let Some(left) = self.countdown.get() {
            if left == 0 {
                self.countdown.set(None);
                std::panic::resume_unwind(Box::new(Death));
            }
            self.countdown.set(Some(left - 1));
        }
        if self.eager.get()
            && let Ok(mut guests) = self.guests.try_borrow_mut()
        {
            for guest in guests.iter_mut() {
                guest.act(self);
            }
        }
        if self.preempt.get() && self.chance(1, 4) {
            self.let_one_act();
        }
    }

    /// Lets one inhabitant act. False if it had nothing to do.
    pub fn let_one_act(&self) -> bool {
        let Ok(mut guests) = self.guests.try_borrow_mut() else { return false };
        if guests.is_empty() {
            return false;
        }
        let pick = self.index(guests.len());
        guests[pick].act(self)
    }
}

/// Runs `run` under many seeds. `VBDD_SEED=n` replays one, `VBDD_SEEDS=n` sets how many.
pub fn for_seeds(default: u64, run: impl Fn(u64) -> Result<(), String>) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("VBDD_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("VBDD_SEEDS").unwrap_or(default),
    };
    for seed in seeds {
        if let Err(what) = run(seed) {
            panic!("{what}\n  replay with VBDD_SEED={seed}");
        }
    }
}
