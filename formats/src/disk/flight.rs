//! Work that is out: what each piece is for.

use alloc::vec::Vec;

use crate::disk::{Actor, WorkId};
use crate::pages::PageRef;

/// What a piece of work is for.
#[derive(Debug)]
pub(super) enum Flight {
    /// A page is read.
    PageIn(PageRef),
    /// A copy of a page is written.
    PageOut(PageRef),
    /// The leaf is synced.
    Sync,
    /// Data of a request move, to or from its own memory.
    Guest(u32),
    /// Data of an allocating write move, or zeroes are written for it.
    Payment(u32),
    /// What an allocating write does not cover is read, to be written at `to_bytes`.
    FillIn { payment: u32, bounce: Vec<u8>, to_bytes: u64 },
    /// And written.
    FillOut { payment: u32, bounce: Vec<u8> },
    /// A packed unit is read.
    UnitIn { for_whom: Actor, layer: usize, offset_bytes: u64, cut: (usize, usize) },
    /// A part of the unpacked unit is copied to a guest.
    CopyUnit { request: u32, from: usize, length: usize },
    /// What became known of an extent is copied to a guest.
    StatusOut(u32),
    /// A long request lets others have their turn.
    Turn(u32),
    /// The owner moves all data of a request, to or from where they are.
    InPlace(u32),
    /// A format's own transfer.
    Order { tag: u64, bytes: Vec<u8> },
}

/// A table of what is out.
#[derive(Debug)]
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<u32>,
}

impl Flights {
    /// A table of so many places, and 80 more for what others wait for: pages, orders, syncs.
    pub(super) fn new(max: usize) -> Flights {
        let places = crate::bytes::narrow((max + RESERVED) as u64);
        Flights { slots: (0..places).map(|_| None).collect(), free: (0..places).rev().collect() }
    }

    /// Whether data of requests find room.
    pub(super) fn room(&self) -> bool {
        self.free.len() > RESERVED
    }

    pub(super) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Enters a flight. When the reserve is used up the table grows: orders are rare, and bounded by their formats.
    pub(super) fn add(&mut self, flight: Flight) -> WorkId {
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            crate::bytes::narrow(self.slots.len() as u64 - 1)
        });
        if let Some(slot) = self.slots.get_mut(at as usize) {
            *slot = Some(flight);
        }
        WorkId(at)
    }

    pub(super) fn find(&self, id: WorkId) -> Option<&Flight> {
        self.slots.get(id.0 as usize)?.as_ref()
    }

    pub(super) fn take(&mut self, id: WorkId) -> Option<Flight> {
        let flight = self.slots.get_mut(id.0 as usize)?.take()?;
        self.free.push(id.0);
        Some(flight)
    }
}

const RESERVED: usize = 80;
