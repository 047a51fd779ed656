//! An engine that does real transfers, late, out of order, in parts, or not at all.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;

use vbdd::storage::engine::{Action, Engine, Landed, Transfer};

use super::Dice;

/// What is to go wrong, and what did.
#[derive(Debug, Default)]
pub struct Plan {
    /// Per cent of transfers that answer EINTR or EAGAIN, and of those that are cut short.
    pub again: u64,
    pub short: u64,
    /// Per cent of reads and writes that fail, with this errno.
    pub fail: u64,
    pub errno: i32,
    /// Fails the next so many transfers of one sort.
    pub next: Vec<(Action, i32)>,
    /// Per cent of chances to answer that are let pass, so that answers come in another order.
    pub late: u64,
    /// Reads and writes of this byte fail (EIO).
    pub bad: Option<u64>,
    /// Submits that fail before one works.
    pub stalls: u32,
    /// Transfers in flight at most (0: no bound).
    pub room: usize,
    /// Refuse (EINVAL) what is not aligned to this.
    pub block: u64,
    pub memory: usize,
    /// Say that page cache and flush are not for this engine.
    pub old: bool,
    /// Counters.
    pub pushed: u64,
    pub shortened: u64,
    pub refused: u64,
    pub misaligned: u64,
    pub in_flight_max: usize,
}

pub struct Faulty {
    pub inner: Box<dyn Engine>,
    pub plan: Rc<RefCell<Plan>>,
    dice: Dice,
    held: Vec<Landed>,
    in_flight: usize,
    awake: OwnedFd,
}

impl std::fmt::Debug for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an engine that fails on purpose")
    }
}

impl Faulty {
    pub fn new(inner: Box<dyn Engine>, plan: &Rc<RefCell<Plan>>, seed: u64) -> Faulty {
        // Always readable: what is held back must not wait for the kernel to wake anyone.
        let awake = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        Faulty { inner, plan: Rc::clone(plan), dice: Dice(seed), held: Vec::new(), in_flight: 0, awake }
    }

    /// What to answer instead of doing it.
    fn verdict(&mut self, transfer: &Transfer, parts: &[libc::iovec]) -> Option<i32> {
        let mut plan = self.plan.borrow_mut();
        if let Some(place) = plan.next.iter().position(|(action, _)| *action == transfer.action) {
            return Some(-plan.next.remove(place).1);
        }
        let moves = transfer.action != Action::Sync;
        let range = transfer.offset_bytes..transfer.offset_bytes + u64::from(transfer.length_bytes);
        if moves && plan.bad.is_some_and(|bad| range.contains(&bad)) {
            return Some(-libc::EIO);
        }
        if moves && plan.block > 0 {
            let off = transfer.offset_bytes | u64::from(transfer.length_bytes);
            let whole = libc::iovec { iov_base: transfer.address.cast(), iov_len: 0 };
            let parts = if parts.is_empty() { &[whole] } else { parts };
            let odd = |part: &libc::iovec| {
                !(part.iov_base as usize).is_multiple_of(plan.memory)
                    || !(part.iov_len as u64).is_multiple_of(plan.block)
            };
            if !off.is_multiple_of(plan.block) || parts.iter().any(odd) {
                plan.misaligned += 1;
                return Some(-libc::EINVAL);
            }
        }
        if self.dice.below(100) < plan.again {
            return Some(if self.dice.below(2) == 0 { -libc::EINTR } else { -libc::EAGAIN });
        }
        if moves && self.dice.below(100) < plan.fail {
            plan.refused += 1;
            return Some(-plan.errno);
        }
        None
    }
}

impl Engine for Faulty {
    fn attach(&mut self, index: u32, fd: BorrowedFd<'_>) -> bool {
        self.inner.attach(index, fd)
    }

    fn detach(&mut self, index: u32) {
        self.inner.detach(index);
    }

    fn push(&mut self, transfer: &Transfer) -> bool {
        let room = self.plan.borrow().room;
        if room > 0 && self.in_flight >= room {
            return false;
        }
        let mut transfer = *transfer;
        if let Some(result) = self.verdict(&transfer, &[]) {
            self.held.push(Landed { tag: transfer.tag, result });
        } else {
            let unit = u32::try_from(self.plan.borrow().block.max(512)).unwrap();
            let units = transfer.length_bytes / unit;
            if units >= 2 && self.dice.below(100) < self.plan.borrow().short {
                let fewer = 1 + self.dice.below(u64::from(units) - 1);
                transfer.length_bytes = u32::try_from(fewer).unwrap() * unit;
                self.plan.borrow_mut().shortened += 1;
            }
            if !self.inner.push(&transfer) {
                return false;
            }
        }
        self.in_flight += 1;
        let mut plan = self.plan.borrow_mut();
        plan.pushed += 1;
        plan.in_flight_max = plan.in_flight_max.max(self.in_flight);
        true
    }

    fn push_vectored(&mut self, transfer: &Transfer, parts: usize) -> bool {
        let room = self.plan.borrow().room;
        if room > 0 && self.in_flight >= room {
            return false;
        }
        // SAFETY: the transfer's address is that of so many pieces, as `push_vectored` asks for.
        let pieces = unsafe { std::slice::from_raw_parts(transfer.address.cast::<libc::iovec>(), parts) };
        if let Some(result) = self.verdict(transfer, pieces) {
            self.held.push(Landed { tag: transfer.tag, result });
        } else {
            let mut parts = parts;
            if self.dice.below(100) < self.plan.borrow().short {
                parts = 1 + usize::try_from(self.dice.below(parts as u64 - 1)).unwrap();
                self.plan.borrow_mut().shortened += 1;
            }
            if !self.inner.push_vectored(transfer, parts) {
                return false;
            }
        }
        self.in_flight += 1;
        let mut plan = self.plan.borrow_mut();
        plan.pushed += 1;
        plan.in_flight_max = plan.in_flight_max.max(self.in_flight);
        true
    }

    fn submit(&mut self) -> bool {
        if self.plan.borrow().stalls > 0 {
            self.plan.borrow_mut().stalls -= 1;
            return false;
        }
        self.inner.submit()
    }

    fn reap(&mut self) -> Option<Landed> {
        while let Some(landed) = self.inner.reap() {
            self.held.push(landed);
        }
        if self.held.is_empty() || self.dice.below(100) < self.plan.borrow().late {
            return None;
        }
        let place = usize::try_from(self.dice.below(self.held.len() as u64)).unwrap();
        self.in_flight -= 1;
        Some(self.held.swap_remove(place))
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.awake.as_raw_fd())
    }

    fn acknowledge(&mut self) {
        self.inner.acknowledge();
    }

    fn blocks_on_cached_files(&self) -> bool {
        self.plan.borrow().old || self.inner.blocks_on_cached_files()
    }

    fn syncs(&self) -> bool {
        !self.plan.borrow().old && self.inner.syncs()
    }
}
