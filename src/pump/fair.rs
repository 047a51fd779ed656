//! Which transfer goes to a storage device next, and how much is there at once.
//!
//! A device works on what it is given in about the order in which it came, so whoever gives it most is served most, and who
//! comes with a single request waits behind all of it. So what a guest has for a device waits here, in a [`Flow`] of its
//! own, and goes there in turns of bytes (deficit round robin); and no more goes there than keeps it busy. A flow that
//! had nothing at the device goes first, with one turn's worth: a guest that sends one request after the other waits for
//! nobody's backlog.
//!
//! How much keeps a device busy is found by trying: see [`Gauge`]. A guest alone is let through up to
//! [`DEVICE_COST_ALONE`], as the queue at the device is then its own.

use std::collections::VecDeque;
use std::time::Duration;

use super::memory::PIECE_BYTES;
use crate::limits::{
    DEVICE_CONTENDED_FOR, DEVICE_COST_ALONE, DEVICE_COST_CONTENDED, DEVICE_COST_FIRST, TRANSFER_COST,
};
use crate::storage::{Io, Storage};

/// What a flow may send in its turn: the longest transfer.
const QUANTUM: u64 = PIECE_BYTES as u64 + TRANSFER_COST;

/// How long a device is watched before its speed is judged, much longer than the clock is coarse; and for how many
/// transfers at least.
const WINDOW: Duration = Duration::from_millis(30);
const WINDOW_TRANSFERS: u32 = 8;

/// Windows between two trials: some 4 s.
const REST_WINDOWS: u8 = 128;

/// The least that a device is given: one transfer of a page.
const BUDGET_MIN: u64 = TRANSFER_COST + 4096;

/// What a device does in a second: cost, and transfers. Either may mislead, as it may be the bytes or the number of transfers
/// that takes it its time, and guests send transfers of different lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rate {
    cost: u64,
    transfers: u64,
}

/// What a [`Gauge`] is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    /// Nothing for so many windows.
    Rest(u8),
    /// Twice as much. The rate before was so much.
    More(Rate),
    /// Half as much.
    Less(Rate),
}

/// Finds what keeps a device busy: more at once is worth it only as long as more is done, and less is better when as much is
/// done with it. A disk that does one thing after the other ends with one transfer, storage far away with many.
#[derive(Debug)]
struct Gauge {
    budget: u64,
    trial: Trial,
    next_is_less: bool,
    began: Duration,
    cost: u64,
    transfers: u32,
    /// Something waited for room in this window: what was done is what the device can do.
    was_full: bool,
}

impl Rate {
    /// By a quarter, in both.
    fn is_well_above(self, before: Rate) -> bool {
        self.cost / 5 >= before.cost / 4 && self.transfers * 4 >= before.transfers * 5
    }

    /// No less than nine tenths, in one.
    fn is_about(self, before: Rate) -> bool {
        self.cost / 9 >= before.cost / 10 || self.transfers * 10 >= before.transfers * 9
    }
}

impl Gauge {
    fn new() -> Gauge {
        Gauge {
            budget: DEVICE_COST_FIRST,
            trial: Trial::Rest(2),
            next_is_less: true,
            began: Duration::ZERO,
            cost: 0,
            transfers: 0,
            was_full: false,
        }
    }

    /// A transfer has ended.
    fn done(&mut self, cost: u64, now: Duration) {
        self.cost += cost;
        self.transfers += 1;
        let elapsed = now.saturating_sub(self.began);
        if elapsed < WINDOW || self.transfers < WINDOW_TRANSFERS {
            return;
        }
        let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
        let a_second = |count: u64| count.saturating_mul(1000) / elapsed_ms;
        if std::mem::take(&mut self.was_full) {
            self.judge(Rate { cost: a_second(self.cost), transfers: a_second(self.transfers.into()) });
        }
        (self.began, self.cost, self.transfers) = (now, 0, 0);
    }

    fn judge(&mut self, rate: Rate) {
        let rest = Trial::Rest(REST_WINDOWS);
        self.trial = match self.trial {
            Trial::Rest(0) => {
                self.next_is_less = !self.next_is_less;
                if self.next_is_less { self.more(rate) } else { self.less(rate) }
            }
            Trial::Rest(windows) => Trial::Rest(windows - 1),
            Trial::More(before) if rate.is_well_above(before) => self.more(rate),
            Trial::More(_) => {
                self.budget = (self.budget / 2).max(BUDGET_MIN);
                rest
            }
            Trial::Less(before) if rate.is_about(before) => self.less(rate),
            Trial::Less(_) => {
                self.budget = (self.budget * 2).min(DEVICE_COST_CONTENDED);
                rest
            }
        };
    }

    fn more(&mut self, rate: Rate) -> Trial {
        if self.budget >= DEVICE_COST_CONTENDED {
            return Trial::Rest(REST_WINDOWS);
        }
        self.budget = (self.budget * 2).min(DEVICE_COST_CONTENDED);
        Trial::More(rate)
    }

    fn less(&mut self, rate: Rate) -> Trial {
        if self.budget <= BUDGET_MIN {
            return Trial::Rest(REST_WINDOWS);
        }
        self.budget = (self.budget / 2).max(BUDGET_MIN);
        Trial::Less(rate)
    }
}

/// Where a flow stands in its device's rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// In no list: nothing waits.
    Out,
    /// It had nothing at the device, and goes first.
    New,
    /// It takes its turns.
    Old,
}

/// The transfers of one guest for one device, over all its disks and queues there.
#[derive(Debug)]
struct Flow {
    guest: u32,
    device: u32,
    queues: u32,
    waiting: VecDeque<Io>,
    standing: Standing,
    deficit: u64,
    /// Cost of what is at the device.
    in_flight: u64,
}

/// A device and who waits for it.
#[derive(Debug)]
struct Device {
    key: u64,
    queues: u32,
    new: VecDeque<u32>,
    old: VecDeque<u32>,
    in_flight: u64,
    /// The two flows that were here last, and when; the latest first.
    recent: Recent,
    gauge: Gauge,
}

impl Device {
    fn new(key: u64) -> Device {
        Device {
            key,
            queues: 0,
            new: VecDeque::new(),
            old: VecDeque::new(),
            in_flight: 0,
            recent: [(None, Duration::ZERO); 2],
            gauge: Gauge::new(),
        }
    }

    /// What may be there at once.
    fn limit(&self, now: Duration) -> u64 {
        if are_two(&self.recent, now) { self.gauge.budget } else { DEVICE_COST_ALONE }
    }

    fn has_room(&self, cost: u64, now: Duration) -> bool {
        self.in_flight == 0 || self.in_flight + cost <= self.limit(now)
    }
}

/// All devices and flows.
#[derive(Debug, Default)]
pub(super) struct Fair {
    devices: Vec<Device>,
    flows: Vec<Flow>,
    /// Transfers that wait here.
    waiting: usize,
    /// The two guests that had a transfer last, and when; the latest first.
    recent: Recent,
}

/// What a transfer of so many bytes counts: a small one keeps a device busy for longer than its bytes say.
fn cost(length_bytes: u32) -> u64 {
    u64::from(length_bytes) + TRANSFER_COST
}

impl Fair {
    /// Counts a queue of a guest on a device; the flow's number, until [`Fair::leave`].
    pub(super) fn join(&mut self, guest: u32, key: u64) -> u32 {
        let known = self.devices.iter().position(|device| device.key == key && device.queues > 0);
        let free = || self.devices.iter().position(|device| device.queues == 0);
        let device = known.or_else(free).unwrap_or(self.devices.len());
        match self.devices.get_mut(device) {
            Some(old) if known.is_none() => *old = Device::new(key),
            Some(_) => {}
            None => self.devices.push(Device::new(key)),
        }
        if let Some(device) = self.devices.get_mut(device) {
            device.queues += 1;
        }
        let device = u32::try_from(device).unwrap_or(u32::MAX);
        let same = |flow: &Flow| flow.guest == guest && flow.device == device && flow.queues > 0;
        let known = self.flows.iter().position(same);
        let free = || self.flows.iter().position(|flow| flow.queues == 0);
        let place = known.or_else(free).unwrap_or(self.flows.len());
        let fresh = Flow {
            guest,
            device,
            queues: 0,
            waiting: VecDeque::new(),
            standing: Standing::Out,
            deficit: 0,
            in_flight: 0,
        };
        match self.flows.get_mut(place) {
            Some(old) if known.is_none() => *old = fresh,
            Some(_) => {}
            None => self.flows.push(fresh),
        }
        if let Some(flow) = self.flows.get_mut(place) {
            flow.queues += 1;
        }
        u32::try_from(place).unwrap_or(u32::MAX)
    }

    /// A queue that owes nothing any more is gone.
    pub(super) fn leave(&mut self, id: u32) {
        let Some(flow) = self.flows.get_mut(id as usize) else { return };
        flow.queues = flow.queues.saturating_sub(1);
        let (gone, device) = (flow.queues == 0, flow.device);
        if let Some(device) = self.devices.get_mut(device as usize) {
            device.queues = device.queues.saturating_sub(1);
            if gone {
                device.new.retain(|other| *other != id);
                device.old.retain(|other| *other != id);
                device.recent.iter_mut().filter(|(flow, _)| *flow == Some(id)).for_each(|it| it.0 = None);
            }
        }
    }

    /// Takes a transfer of a flow. Gives it back if it may go to storage at once, counted.
    pub(super) fn queue(&mut self, id: u32, io: Io, now: Duration) -> Option<Io> {
        // A flow that is not known is nobody's: its transfers are not held up.
        let Some(flow) = self.flows.get_mut(id as usize) else { return Some(io) };
        let Some(device) = self.devices.get_mut(flow.device as usize) else { return Some(io) };
        seen(&mut self.recent, flow.guest, now);
        seen(&mut device.recent, id, now);
        let cost = cost(io.span.length_bytes());
        let nobody_waits = device.new.is_empty() && device.old.is_empty();
        if nobody_waits && device.has_room(cost, now) {
            device.in_flight += cost;
            flow.in_flight += cost;
            return Some(io);
        }
        flow.waiting.push_back(io);
        self.waiting += 1;
        if flow.standing == Standing::Out {
            flow.deficit = QUANTUM;
            if flow.in_flight == 0 {
                flow.standing = Standing::New;
                device.new.push_back(id);
            } else {
                flow.standing = Standing::Old;
                device.old.push_back(id);
            }
        }
        None
    }

    /// A transfer ended. `length_bytes` may be rounded up, as it was when it was queued.
    pub(super) fn done(&mut self, id: u32, length_bytes: u32, now: Duration) {
        let Some(flow) = self.flows.get_mut(id as usize) else { return };
        let Some(device) = self.devices.get_mut(flow.device as usize) else { return };
        let cost = cost(length_bytes).min(flow.in_flight);
        flow.in_flight -= cost;
        device.in_flight = device.in_flight.saturating_sub(cost);
        device.gauge.done(cost, now);
    }

    /// Whether more than one guest had something to do of late.
    pub(super) fn is_shared(&self, now: Duration) -> bool {
        are_two(&self.recent, now)
    }

    /// Sends what may go. True if there was something.
    pub(super) fn dispatch<S: Storage>(&mut self, storage: &mut S, now: Duration) -> bool {
        let before = self.waiting;
        if before == 0 {
            return false;
        }
        for device in &mut self.devices {
            while let Some((id, is_new)) = next_of(device) {
                let Some(flow) = self.flows.get_mut(id as usize) else { break };
                let list = if is_new { &mut device.new } else { &mut device.old };
                let Some(first) = flow.waiting.front() else {
                    list.pop_front();
                    flow.standing = Standing::Out;
                    continue;
                };
                let cost = cost(first.span.length_bytes());
                if flow.deficit < cost {
                    list.pop_front();
                    flow.deficit += QUANTUM;
                    flow.standing = Standing::Old;
                    device.old.push_back(id);
                    continue;
                }
                if !is_new && !device.has_room(cost, now) {
                    device.gauge.was_full = true;
                    break;
                }
                let Some(io) = flow.waiting.pop_front() else { break };
                self.waiting -= 1;
                flow.deficit -= cost;
                flow.in_flight += cost;
                device.in_flight += cost;
                storage.queue(io);
            }
        }
        self.waiting < before
    }
}

/// Who was last, and when; and who was before, if that was another. The latest first.
type Recent = [(Option<u32>, Duration); 2];

/// Notes that somebody came.
fn seen(recent: &mut Recent, who: u32, now: Duration) {
    if recent[0].0 != Some(who) {
        recent[1] = recent[0];
    }
    recent[0] = (Some(who), now);
}

/// Whether two have come of late.
fn are_two(recent: &Recent, now: Duration) -> bool {
    matches!(recent[1], (Some(_), at) if now < at + DEVICE_CONTENDED_FOR)
}

/// Whose turn it is, and whether it is a new one.
fn next_of(device: &Device) -> Option<(u32, bool)> {
    let new = device.new.front().map(|id| (*id, true));
    new.or_else(|| device.old.front().map(|id| (*id, false)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a gauge ends with on a device that does `rate(budget)`, always full.
    fn settles(rate: impl Fn(u64) -> u64) -> u64 {
        let mut gauge = Gauge::new();
        for _ in 0..5000 {
            let cost = rate(gauge.budget);
            gauge.judge(Rate { cost, transfers: cost / 1000 });
        }
        gauge.budget
    }

    #[test]
    fn what_does_one_thing_after_the_other_gets_one_transfer() {
        assert!(settles(|_| 1_000_000) <= 2 * BUDGET_MIN);
    }

    #[test]
    fn what_does_more_the_more_it_has_gets_much() {
        assert_eq!(settles(|budget| budget * 100), DEVICE_COST_CONTENDED);
    }

    #[test]
    fn what_is_busy_from_some_point_on_gets_about_that() {
        let found = settles(|budget| budget.min(200_000) * 100);
        assert!((90_000..450_000).contains(&found), "{found}");
    }

    #[test]
    fn turns_are_of_bytes_and_nothing_is_forgotten() {
        let mut fair = Fair::default();
        let (one, other) = (fair.join(1, 9), fair.join(2, 9));
        assert_eq!((fair.join(1, 9), fair.join(1, 8)), (one, 2), "a guest has one flow on each device");
        let now = Duration::from_secs(5);
        let io = |length: u32| Io {
            token: length.into(),
            file: crate::storage::FileId(0),
            kind: crate::storage::IoKind::Read,
            offset_bytes: 0,
            span: crate::buffers::Span::EMPTY,
        };
        // Spans of no length count the least.
        let mut direct = 0;
        for n in 0..200 {
            direct += u64::from(fair.queue(if n % 2 == 0 { one } else { other }, io(n), now).is_some());
        }
        assert_eq!(direct, DEVICE_COST_FIRST / TRANSFER_COST);
        assert_eq!(fair.waiting as u64, 200 - direct);
        fair.leave(one);
        fair.leave(one);
        fair.leave(other);
    }
}
