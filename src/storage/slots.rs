//! The requests in flight: a slab whose places are linked into lists by their numbers, so that nothing is allocated for a
//! request once the slab has grown to the load.

use super::legs::{Leg, Way};
use super::{FileId, Io, IoKind};
use crate::buffers::Span;

/// Requests held at once, over all files. More are answered with `ENOBUFS`: what the daemon lets all guests have in flight
/// is below it. Each costs about 150 bytes.
pub(super) const SLOTS_MAX: u32 = 16 * 1024;

/// No place.
pub(super) const NONE: u32 = u32::MAX;

/// What the current transfer of a request does for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Moves the leg itself.
    Move,
    /// Reads the blocks of a bounced leg, for a read.
    Fetch,
    /// Reads the blocks of a bounced leg, for a write that changes a part of them.
    Fill,
    /// Writes the blocks of a bounced leg.
    Store,
    /// Makes durable.
    Sync,
    /// Lets go of content.
    Discard,
    /// Makes a range read as zero.
    Zero,
    /// Changes the file's length.
    Length,
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub io: Io,
    /// Bytes of it that are finished.
    pub at: u32,
    pub leg: Leg,
    pub stage: Stage,
    /// Memory and place of the current transfer, and how much of it has been moved.
    pub memory: Span,
    pub place: u64,
    pub moved: u32,
    /// Where a discard or a range of zeroes ends, and how much of it is under way.
    pub until: u64,
    pub piece: u64,
    /// The range of zeroes that this write is a piece of.
    pub parent: u32,
    /// It is not to be merged with others: that was tried.
    pub alone: bool,
    /// The table of the merged transfer that begins with it.
    pub table: u32,
    /// Tries of the current transfer that moved nothing.
    pub tries: u8,
    pub bounce: Option<Span>,
    /// Whether it is in its file's list of writes under way, and in which.
    pub listed: Option<bool>,
    /// The list that it waits in.
    pub next: u32,
    /// The list of writes under way.
    pub write_before: u32,
    pub write_after: u32,
}

impl Slot {
    fn new(io: Io) -> Slot {
        Slot {
            io,
            at: 0,
            leg: Leg { way: Way::Straight, offset: 0, length: 0 },
            stage: Stage::Move,
            memory: Span::EMPTY,
            place: 0,
            moved: 0,
            until: 0,
            piece: 0,
            parent: NONE,
            alone: false,
            table: NONE,
            tries: 0,
            bounce: None,
            listed: None,
            next: NONE,
            write_before: NONE,
            write_after: NONE,
        }
    }
}

impl Slot {
    /// Its current transfer goes between the file and the caller's memory.
    pub(super) fn is_straight(&self) -> bool {
        self.stage == Stage::Move && self.leg.way == Way::Straight
    }
}

/// All requests in flight.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: u32,
    used: u32,
    /// What a number that names nothing leads to: it cannot be, and it does no harm.
    stray: Slot,
}

impl Slots {
    pub(super) fn new() -> Slots {
        let nothing =
            Io { token: 0, file: FileId(u32::MAX), kind: IoKind::Flush, offset_bytes: 0, span: Span::EMPTY };
        Slots { slots: Vec::new(), free: NONE, used: 0, stray: Slot::new(nothing) }
    }

    /// Takes a place. `None` when all are in use.
    pub(super) fn take(&mut self, io: Io) -> Option<u32> {
        let number = if self.free != NONE {
            let number = self.free;
            let slot = self.slots.get_mut(number as usize)?;
            self.free = slot.next;
            *slot = Slot::new(io);
            number
        } else {
            let number = u32::try_from(self.slots.len()).ok().filter(|number| *number < SLOTS_MAX)?;
            self.slots.push(Slot::new(io));
            number
        };
        self.used += 1;
        Some(number)
    }

    /// Gives a place back.
    pub(super) fn give(&mut self, number: u32) {
        let free = self.free;
        if let Some(slot) = self.slots.get_mut(number as usize) {
            slot.next = free;
            self.free = number;
            self.used = self.used.saturating_sub(1);
        }
    }

    pub(super) fn used(&self) -> u32 {
        self.used
    }

    #[inline]
    pub(super) fn at(&self, number: u32) -> &Slot {
        self.slots.get(number as usize).unwrap_or(&self.stray)
    }

    #[inline]
    pub(super) fn at_mut(&mut self, number: u32) -> &mut Slot {
        self.slots.get_mut(number as usize).unwrap_or(&mut self.stray)
    }
}

/// Requests that wait, first come first served. A request is in at most one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fifo {
    head: u32,
    tail: u32,
}

impl Fifo {
    pub(super) const EMPTY: Fifo = Fifo { head: NONE, tail: NONE };

    pub(super) fn push(&mut self, slots: &mut Slots, number: u32) {
        slots.at_mut(number).next = NONE;
        if self.tail == NONE {
            self.head = number;
        } else {
            slots.at_mut(self.tail).next = number;
        }
        self.tail = number;
    }

    pub(super) fn first(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    pub(super) fn pop(&mut self, slots: &Slots) -> Option<u32> {
        let number = self.first()?;
        self.head = slots.at(number).next;
        if self.head == NONE {
            self.tail = NONE;
        }
        Some(number)
    }

    /// Puts `other` behind what waits here.
    pub(super) fn append(&mut self, slots: &mut Slots, other: Fifo) {
        if other.is_empty() {
            return;
        }
        if self.tail == NONE {
            *self = other;
        } else {
            slots.at_mut(self.tail).next = other.head;
            self.tail = other.tail;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head == NONE
    }
}
