//! Which transfer goes to a storage device next, and how much is there at once.
//!
//! A device works on what it is given in about the order in which it came, so whoever gives it most is served most, and who
//! comes with a single request waits behind all of it. So what a guest has for a device waits here, in a [`Flow`] of its
//! own, and goes there in turns of bytes (deficit round robin); and no more goes there than keeps it busy. A flow that
//! had nothing at the device goes first, with one turn's worth: a guest that sends one request after the other waits for
//! nobody's backlog.
//!
//! How much keeps a device busy is what it does in [`DEVICE_DELAY`], measured; a guest alone is let through up to
//! [`DEVICE_COST_ALONE`], as the queue at the device is then its own.

use std::collections::VecDeque;
use std::time::Duration;

use super::memory::PIECE_BYTES;
use crate::limits::{
    DEVICE_CONTENDED_FOR, DEVICE_COST_ALONE, DEVICE_COST_CONTENDED, DEVICE_DELAY, TRANSFER_COST,
};
use crate::storage::{Io, Storage};

/// What a flow may send in its turn: the longest transfer.
const QUANTUM: u64 = PIECE_BYTES as u64 + TRANSFER_COST;

/// How long a device is watched before its speed is judged; much longer than the clock is coarse.
const WINDOW: Duration = Duration::from_millis(30);

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
    /// What may be there while several flows are.
    budget: u64,
    window_began: Duration,
    window_cost: u64,
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
            // Until it has shown what it can do, one after the other.
            budget: QUANTUM,
            window_began: Duration::ZERO,
            window_cost: 0,
        }
    }

    /// What may be there at once.
    fn limit(&self, now: Duration) -> u64 {
        if are_two(&self.recent, now) { self.budget } else { DEVICE_COST_ALONE }
    }

    fn has_room(&self, cost: u64, now: Duration) -> bool {
        self.in_flight == 0 || self.in_flight + cost <= self.limit(now)
    }

    /// Judges the device's speed by what it has done of late. By Little's law what it does in `DEVICE_DELAY` is what may be
    /// there if nothing is to stay longer than that.
    fn measure(&mut self, cost: u64, now: Duration) {
        self.window_cost += cost;
        let elapsed = now.saturating_sub(self.window_began);
        if elapsed >= WINDOW {
            let rate = u128::from(self.window_cost) * DEVICE_DELAY.as_nanos() / elapsed.as_nanos().max(1);
            self.budget = u64::try_from(rate).unwrap_or(u64::MAX).min(DEVICE_COST_CONTENDED);
            self.window_began = now;
            self.window_cost = 0;
        }
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
        device.measure(cost, now);
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
