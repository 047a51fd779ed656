//! The cache of metadata pages, one for all disks of a process: a bound on memory that no image can raise.
//!
//! A page is at most [`PAGE_BYTES`] of an image's metadata (or of a disk's merged map). Clean pages of any disk may be
//! evicted by any other, by a clock; dirty ones stay until their disk has written them.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use crate::ledger::{Stamp, Tick};

/// Bytes of a page at most. Formats whose metadata lies closer together than that use smaller ones: see
/// [`crate::Format::page_bytes`].
pub const PAGE_BYTES: usize = 4096;

const NONE: u32 = u32::MAX;

/// Names a page in the cache while it cannot be evicted: until the next page is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRef(pub(crate) u32);

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Which disk.
    pub disk: u32,
    /// Which image of its chain, by a number that stays the same when the chain changes; [`Key::MAP`] for the merged map.
    pub image: u32,
    /// Where in the image, or which line of the map.
    pub offset_bytes: u64,
}

impl Key {
    /// The image number of lines of the merged map.
    pub const MAP: u32 = u32::MAX;

    fn hash(self) -> usize {
        let mixed = (self.offset_bytes >> 9)
            .wrapping_add(u64::from(self.disk) << 40)
            .wrapping_add(u64::from(self.image) << 52)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(mixed >> 33).unwrap_or(0)
    }
}

/// Memory that outlives the process, for pages that have changed and are not in the image yet: a guest that was answered must
/// find its data although the process was killed.
pub trait Keeper: fmt::Debug {
    /// What a page holds from now on. `slot` is its place in the cache: what was kept of that place before is replaced, and
    /// whoever reads it finds either of the two whole.
    fn keep(&mut self, slot: u32, key: &Key, bytes: &[u8]);

    /// The page is in the image, or means nothing any more.
    fn release(&mut self, slot: u32);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Being read: has no bytes yet.
    Reading,
    Clean,
    Dirty,
}

#[derive(Debug)]
struct Slot {
    key: Key,
    state: State,
    referenced: bool,
    /// Copies of it on their way to the medium: until they are there, it must not be read again.
    pins: u8,
    /// It is in [`Pages::touched`].
    touched: bool,
    /// The keeper has it.
    kept: bool,
    /// Of a dirty page: its oldest change that no copy holds.
    first: Stamp,
    /// Of a dirty page: the sync that must be over before it may be written.
    after: Tick,
    next: u32,
    bytes: Box<[u8; PAGE_BYTES]>,
}

/// Answer of [`Pages::find`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Here.
    Ready(PageRef),
    /// Being read.
    Reading(PageRef),
    /// Not here.
    Absent,
}

/// What the cache has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounters {
    /// Pages found.
    pub hits: u64,
    /// Pages that had to be read.
    pub misses: u64,
    /// Pages that gave way to others.
    pub evictions: u64,
}

/// The cache.
#[derive(Debug)]
pub struct Pages {
    slots: Vec<Slot>,
    heads: Vec<u32>,
    free: Vec<u32>,
    hand: usize,
    pages_max: usize,
    /// Pages beyond that, when all others are dirty or being read.
    overdraft: usize,
    dirty: usize,
    keeper: Option<Box<dyn Keeper>>,
    /// Pages of which the keeper does not know the latest.
    touched: Vec<u32>,
    /// What it has done so far.
    pub counters: PageCounters,
}

impl Pages {
    /// A cache of at most `bytes_max`, rounded up to 64 pages: less could not hold what one batch of requests touches. While all of
    /// it is dirty, a quarter more. Memory is taken as pages are needed, and kept.
    #[must_use]
    pub fn new(bytes_max: usize) -> Pages {
        let mut pages = Pages::of_pages((bytes_max / PAGE_BYTES).max(64));
        pages.overdraft = pages.pages_max / 4;
        pages
    }

    /// A cache of exactly so many pages, for tests of pressure.
    #[must_use]
    pub fn of_pages(pages_max: usize) -> Pages {
        let heads = pages_max.next_power_of_two();
        Pages {
            slots: Vec::new(),
            heads: alloc::vec![NONE; heads],
            free: Vec::new(),
            hand: 0,
            pages_max,
            overdraft: 0,
            dirty: 0,
            keeper: None,
            touched: Vec::new(),
            counters: PageCounters::default(),
        }
    }

    /// How many pages there can be.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.pages_max
    }

    /// From now on pages that change are kept by `keeper` until they are in the image. Before the first disk.
    pub fn set_keeper(&mut self, keeper: Box<dyn Keeper>) {
        self.keeper = Some(keeper);
    }

    /// Tells nobody of changed pages any more. Before the first change.
    pub fn forget_keeper(&mut self) {
        self.keeper = None;
    }

    fn touch(&mut self, at: u32) {
        if self.keeper.is_none() {
            return;
        }
        if let Some(slot) = self.slots.get_mut(at as usize)
            && !core::mem::replace(&mut slot.touched, true)
        {
            self.touched.push(at);
        }
    }

    /// Tells the keeper what has changed: between two events of a disk, when nothing is half done, and before anybody is
    /// answered. `length` is how much of a page the format uses.
    pub(crate) fn tell_keeper(&mut self, length: usize) {
        let Some(keeper) = &mut self.keeper else { return };
        while let Some(at) = self.touched.pop() {
            let Some(slot) = self.slots.get_mut(at as usize) else { continue };
            slot.touched = false;
            // A copy of it may have been taken since it changed: until that is written, it is as good as dirty.
            if slot.state == State::Dirty || slot.pins > 0 {
                keeper.keep(at, &slot.key, slot.bytes.get(..length).unwrap_or_default());
                slot.kept = true;
            } else if core::mem::take(&mut slot.kept) {
                keeper.release(at);
            }
        }
    }

    fn slot(&self, page: PageRef) -> Option<&Slot> {
        self.slots.get(page.0 as usize)
    }

    fn slot_mut(&mut self, page: PageRef) -> Option<&mut Slot> {
        self.slots.get_mut(page.0 as usize)
    }

    fn head(&self, key: Key) -> usize {
        key.hash() & (self.heads.len() - 1)
    }

    /// Looks for a page.
    pub fn find(&mut self, key: Key) -> Found {
        let mut at = self.heads.get(self.head(key)).copied().unwrap_or(NONE);
        while let Some(slot) = self.slots.get_mut(at as usize) {
            if slot.key == key {
                slot.referenced = true;
                if slot.state == State::Reading {
                    return Found::Reading(PageRef(at));
                }
                self.counters.hits += 1;
                return Found::Ready(PageRef(at));
            }
            at = slot.next;
        }
        Found::Absent
    }

    /// Takes a page for `key`, which must be absent, evicting a clean one if need be. Its bytes are what they are: fill it, or
    /// [`Pages::abandon`] it. `None` when every page is dirty or being read.
    pub fn claim(&mut self, key: Key) -> Option<PageRef> {
        let at = self.vacate()?;
        let head = self.head(key);
        let next = self.heads.get(head).copied().unwrap_or(NONE);
        let slot = self.slots.get_mut(at as usize)?;
        slot.key = key;
        slot.state = State::Reading;
        slot.referenced = true;
        slot.next = next;
        if let Some(first) = self.heads.get_mut(head) {
            *first = at;
        }
        self.counters.misses += 1;
        Some(PageRef(at))
    }

    /// A slot in no chain.
    fn vacate(&mut self) -> Option<u32> {
        if let Some(at) = self.free.pop() {
            return Some(at);
        }
        if self.slots.len() < self.pages_max {
            return self.add_slot();
        }
        for _ in 0..self.slots.len().saturating_mul(2) {
            self.hand = if self.hand + 1 < self.slots.len() { self.hand + 1 } else { 0 };
            let slot = self.slots.get_mut(self.hand)?;
            if slot.state != State::Clean || slot.pins > 0 {
                continue;
            }
            if slot.referenced {
                slot.referenced = false;
                continue;
            }
            let at = u32::try_from(self.hand).ok()?;
            self.counters.evictions += 1;
            self.unlink(at);
            return Some(at);
        }
        if self.slots.len() < self.pages_max + self.overdraft { self.add_slot() } else { None }
    }

    fn add_slot(&mut self) -> Option<u32> {
        let at = u32::try_from(self.slots.len()).ok()?;
        self.slots.push(Slot {
            key: Key { disk: 0, image: 0, offset_bytes: 0 },
            state: State::Free,
            referenced: false,
            pins: 0,
            touched: false,
            kept: false,
            first: Stamp(0),
            after: Tick::NONE,
            next: NONE,
            bytes: Box::new([0; PAGE_BYTES]),
        });
        Some(at)
    }

    /// Whether so much of the cache is dirty, by all disks, that each should write what it has.
    #[must_use]
    pub fn crowded(&self) -> bool {
        self.dirty * 2 > self.pages_max
    }

    fn unlink(&mut self, at: u32) {
        let Some(slot) = self.slots.get_mut(at as usize) else { return };
        let (key, next) = (slot.key, slot.next);
        self.dirty = self.dirty.saturating_sub(usize::from(slot.state == State::Dirty));
        slot.state = State::Free;
        slot.pins = 0;
        slot.next = NONE;
        if core::mem::take(&mut slot.kept)
            && let Some(keeper) = &mut self.keeper
        {
            keeper.release(at);
        }
        let head = self.head(key);
        let Some(first) = self.heads.get_mut(head) else { return };
        if *first == at {
            *first = next;
            return;
        }
        let mut before = *first;
        while let Some(slot) = self.slots.get_mut(before as usize) {
            if slot.next == at {
                slot.next = next;
                return;
            }
            before = slot.next;
        }
    }

    /// The page has been read (or is known): it is clean from now on. Shorter bytes are followed by zeroes.
    pub fn fill(&mut self, page: PageRef, bytes: &[u8]) {
        if self.slot(page).is_some_and(|slot| slot.kept) {
            self.touch(page.0);
        }
        let Some(slot) = self.slots.get_mut(page.0 as usize) else { return };
        self.dirty = self.dirty.saturating_sub(usize::from(slot.state == State::Dirty));
        let length = bytes.len().min(PAGE_BYTES);
        let (filled, rest) = slot.bytes.split_at_mut(length);
        filled.copy_from_slice(bytes.get(..length).unwrap_or_default());
        rest.fill(0);
        slot.state = State::Clean;
    }

    /// The page could not be read: it is free again.
    pub fn abandon(&mut self, page: PageRef) {
        if self.slot(page).is_some_and(|slot| slot.state != State::Free) {
            self.unlink(page.0);
            self.free.push(page.0);
        }
    }

    /// What a page holds.
    #[must_use]
    pub fn bytes(&self, page: PageRef) -> &[u8] {
        self.slot(page).map_or(&[], |slot| slot.bytes.as_slice())
    }

    /// What a page of the merged map holds, to change it. Metadata is changed through [`crate::Context::put`] only.
    pub(crate) fn bytes_mut(&mut self, page: PageRef) -> &mut [u8] {
        self.slot_mut(page).map_or(&mut [], |slot| slot.bytes.as_mut_slice())
    }

    /// Marks a page as changed: it stays until [`Pages::stage`] has taken a copy. Says whether it was clean before.
    pub(crate) fn mark(&mut self, page: PageRef, stamp: Stamp, after: Tick) -> bool {
        self.touch(page.0);
        let Some(slot) = self.slots.get_mut(page.0 as usize) else { return false };
        match slot.state {
            State::Dirty => {
                slot.first = slot.first.min(stamp);
                slot.after = slot.after.max(after);
                false
            }
            State::Clean | State::Reading => {
                self.dirty += 1;
                slot.state = State::Dirty;
                slot.first = stamp;
                slot.after = after;
                true
            }
            State::Free => false,
        }
    }

    /// Takes a copy of a dirty page, which is clean from then on, but stays until [`Pages::unpin`]. `None` for what is not
    /// dirty, or of another disk.
    pub(crate) fn stage(&mut self, page: PageRef, disk: u32, copy: &mut [u8]) -> Option<(Key, Stamp, Tick)> {
        let slot = self.slots.get_mut(page.0 as usize)?;
        if slot.state != State::Dirty || slot.key.disk != disk {
            return None;
        }
        self.dirty = self.dirty.saturating_sub(1);
        slot.state = State::Clean;
        slot.pins = slot.pins.saturating_add(1);
        copy.copy_from_slice(slot.bytes.get(..copy.len())?);
        Some((slot.key, slot.first, slot.after))
    }

    /// A copy of the page is on the medium, or given up.
    pub(crate) fn unpin(&mut self, page: PageRef) {
        self.touch(page.0);
        if let Some(slot) = self.slot_mut(page) {
            slot.pins = slot.pins.saturating_sub(1);
        }
    }

    /// The oldest change of a dirty page that no copy holds.
    pub(crate) fn first_change(&self, page: PageRef, disk: u32) -> Option<Stamp> {
        self.slot(page)
            .filter(|slot| slot.state == State::Dirty && slot.key.disk == disk)
            .map(|slot| slot.first)
    }

    /// Drops a clean page whose place in the image means something else from now on.
    pub(crate) fn forget(&mut self, key: Key) {
        if let Found::Ready(page) = self.find(key)
            && self.slot(page).is_some_and(|slot| slot.state == State::Clean && slot.pins == 0)
        {
            self.abandon(page);
        }
    }

    /// What a page is of.
    #[must_use]
    pub(crate) fn key(&self, page: PageRef) -> Option<Key> {
        self.slot(page).filter(|slot| slot.state != State::Free).map(|slot| slot.key)
    }

    /// Drops all pages of a disk, for example when it is closed.
    pub fn forget_disk(&mut self, disk: u32) {
        for at in 0..self.slots.len() {
            let page = PageRef(u32::try_from(at).unwrap_or(NONE));
            if self.key(page).is_some_and(|key| key.disk == disk) {
                self.abandon(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(offset_bytes: u64) -> Key {
        Key { disk: 1, image: 0, offset_bytes }
    }

    #[test]
    fn clean_pages_give_way_and_dirty_ones_stay() {
        let mut pages = Pages::of_pages(4);
        for at in 0..4 {
            let page = pages.claim(key(at * 4096)).unwrap();
            assert_eq!(pages.find(key(at * 4096)), Found::Reading(page));
            pages.fill(page, &[u8::try_from(at).unwrap(); 10]);
            assert!(at % 2 == 0 || pages.mark(page, Stamp(1), Tick::NONE));
        }
        for at in 4..100 {
            let page = pages.claim(key(at * 4096)).unwrap();
            pages.fill(page, &[]);
        }
        for at in [1, 3] {
            let Found::Ready(page) = pages.find(key(at * 4096)) else { panic!("dirty page {at} went") };
            assert_eq!(pages.bytes(page).get(9).copied(), u8::try_from(at).ok());
            assert_eq!(pages.bytes(page).get(10).copied(), Some(0));
        }
        assert_eq!(pages.find(key(0)), Found::Absent);
        pages.forget_disk(1);
        assert_eq!(pages.find(key(4096)), Found::Absent);
    }

    #[test]
    fn a_cache_of_dirty_pages_says_no() {
        let mut pages = Pages::of_pages(2);
        for at in 0..2 {
            let page = pages.claim(key(at * 512)).unwrap();
            pages.fill(page, &[]);
            pages.mark(page, Stamp(1), Tick::NONE);
        }
        assert_eq!(pages.claim(key(4096)), None);
    }
}
