//! Writes that must not run together: where a medium's block is larger than a sector, a write of a part of a block reads
//! the block, changes it and writes it back, and whatever else writes to that block in between would be lost.
//!
//! The unit is the whole request. Partial writes exclude every write that touches one of their blocks; whole writes may
//! overlap each other, as they may on a disk.

use super::legs::{Shape, blocks, is_partial};
use super::slots::{Fifo, NONE, Slots};

/// The writes under way on one file, and those that wait for them.
#[derive(Debug)]
pub(super) struct Hazards {
    /// The shape of the file, with the block that it was opened with: that stays even when the file goes over to the page
    /// cache, since partial writes of before may be under way.
    shape: Shape,
    /// First of the writes of whole blocks under way, and of the partial ones.
    heads: [u32; 2],
    waiting: Fifo,
}

impl Hazards {
    pub(super) fn new(shape: Shape) -> Hazards {
        Hazards { shape, heads: [NONE; 2], waiting: Fifo::EMPTY }
    }

    /// The file has another size: where its tail begins decides which writes are partial. Those under way stay in the list
    /// that they are in, where everything partial waits for them.
    pub(super) fn resize(&mut self, size: u64, has_tail: bool) {
        self.shape = self.shape.resized(size, has_tail);
    }

    fn range(&self, slots: &Slots, number: u32) -> (u64, u64) {
        let io = &slots.at(number).io;
        blocks(&self.shape, io.offset_bytes, io.length_bytes())
    }

    fn partial(&self, slots: &Slots, number: u32) -> bool {
        let io = &slots.at(number).io;
        is_partial(&self.shape, io.offset_bytes, io.length_bytes())
    }

    /// Whether a write under way of the given sort touches a block of `number`'s.
    fn collides(&self, slots: &Slots, number: u32, partial: bool) -> bool {
        let (from, to) = self.range(slots, number);
        let mut other = self.heads[usize::from(partial)];
        while other != NONE {
            let (start, end) = self.range(slots, other);
            if from < end && start < to {
                return true;
            }
            other = slots.at(other).write_after;
        }
        false
    }

    fn may_start(&self, slots: &Slots, number: u32) -> bool {
        let after_whole = self.partial(slots, number) && self.collides(slots, number, false);
        !after_whole && !self.collides(slots, number, true)
    }

    fn list(&mut self, slots: &mut Slots, number: u32) {
        let partial = self.partial(slots, number);
        let head = &mut self.heads[usize::from(partial)];
        let after = *head;
        *head = number;
        let slot = slots.at_mut(number);
        slot.listed = Some(partial);
        slot.write_before = NONE;
        slot.write_after = after;
        if after != NONE {
            slots.at_mut(after).write_before = number;
        }
    }

    /// A write arrives. `true`: it may start. `false`: it waits here, and comes out of [`Hazards::freed`].
    pub(super) fn arrive(&mut self, slots: &mut Slots, number: u32) -> bool {
        // A partial write never overtakes one that waits; a whole one only where it does not keep the first waiting.
        let overtakes = match self.waiting.first() {
            None => true,
            Some(_) if self.partial(slots, number) => false,
            Some(first) => {
                let ((from, to), (start, end)) = (self.range(slots, number), self.range(slots, first));
                to <= start || end <= from
            }
        };
        if overtakes && self.may_start(slots, number) {
            self.list(slots, number);
            return true;
        }
        self.waiting.push(slots, number);
        false
    }

    /// A write that was under way has ended.
    pub(super) fn leave(&mut self, slots: &mut Slots, number: u32) {
        let slot = *slots.at(number);
        let Some(partial) = slot.listed else { return };
        slots.at_mut(number).listed = None;
        if slot.write_before == NONE {
            self.heads[usize::from(partial)] = slot.write_after;
        } else {
            slots.at_mut(slot.write_before).write_after = slot.write_after;
        }
        if slot.write_after != NONE {
            slots.at_mut(slot.write_after).write_before = slot.write_before;
        }
    }

    /// Takes one waiting write that may start now, in the order of arrival.
    pub(super) fn freed(&mut self, slots: &mut Slots) -> Option<u32> {
        let number = self.waiting.first()?;
        if !self.may_start(slots, number) {
            return None;
        }
        self.waiting.pop(slots);
        self.list(slots, number);
        Some(number)
    }
}
