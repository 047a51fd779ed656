//! Access to memory that another domain writes at any time.
//!
//! All unsafe code of this crate is here. Every access is volatile or atomic, bounded by the length that was given at
//! construction, and copies: no reference into shared memory is ever made.

use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering, fence};

use crate::abi::{Abi, ENTRIES_AT, LARGEST_STRIDE, RING_PAGE_BYTES};

/// Offsets of the four indices in the shared header.
#[derive(Clone, Copy)]
pub(crate) enum Index {
    RequestProducer = 0,
    RequestEvent = 4,
    ResponseProducer = 8,
    ResponseEvent = 12,
}

/// The pages of one ring, mapped in this process.
#[derive(Debug)]
pub struct SharedPages {
    base: *mut u8,
    pages: usize,
}

impl SharedPages {
    /// Takes over `pages` pages at `base`.
    ///
    /// # Safety
    /// `base` must be aligned to 8 bytes and point to `pages * 4096` bytes that stay mapped readable and writable, and
    /// are touched by this process only through this value, for as long as it lives. The other domain may write there.
    #[must_use]
    pub unsafe fn new(base: *mut u8, pages: usize) -> SharedPages {
        SharedPages { base, pages }
    }

    /// How many entries the ring has under `abi`.
    #[must_use]
    pub fn entries(&self, abi: Abi) -> u32 {
        abi.entries(self.pages)
    }

    fn index(&self, index: Index) -> &AtomicU32 {
        // SAFETY: the header lies within the first page; offsets are multiples of 4 and `base` is aligned to 8. An
        // atomic may be shared with writers that we do not control.
        unsafe { AtomicU32::from_ptr(self.base.add(index as usize).cast::<u32>()) }
    }

    pub(crate) fn load(&self, index: Index) -> u32 {
        self.index(index).load(Ordering::Acquire)
    }

    pub(crate) fn store(&self, index: Index, value: u32) {
        self.index(index).store(value, Ordering::Release);
    }

    /// The full barrier between publishing an index and looking at the other side's.
    pub(crate) fn full_fence() {
        fence(Ordering::SeqCst);
    }

    /// Offset of the entry that the free-running `counter` names, or `None` for a ring too small to have entries.
    fn entry_at(&self, abi: Abi, counter: u32) -> Option<usize> {
        let last = self.entries(abi).checked_sub(1)?;
        let offset = ENTRIES_AT + (counter & last) as usize * abi.layout().stride;
        (offset + abi.layout().stride <= self.pages * RING_PAGE_BYTES).then_some(offset)
    }

    /// Copies one entry, each byte read exactly once.
    pub(crate) fn copy_entry(&self, abi: Abi, counter: u32) -> [u8; LARGEST_STRIDE] {
        let mut copy = [0_u8; LARGEST_STRIDE];
        let Some(offset) = self.entry_at(abi, counter) else { return copy };
        let (words, _) = copy.as_chunks_mut::<4>();
        for (n, word) in words.iter_mut().take(abi.layout().stride / 4).enumerate() {
            // SAFETY: `entry_at` proved that the whole stride lies within the pages; strides, `ENTRIES_AT` and thus
            // this address are multiples of 4.
            let value = unsafe { ptr::read_volatile(self.base.add(offset + n * 4).cast::<u32>()) };
            *word = value.to_ne_bytes();
        }
        copy
    }

    /// Writes the first bytes of one entry. `bytes` longer than the entry are cut.
    pub(crate) fn write_entry(&self, abi: Abi, counter: u32, bytes: &[u8]) {
        let Some(offset) = self.entry_at(abi, counter) else { return };
        let (words, _) = bytes.as_chunks::<4>();
        for (n, word) in words.iter().take(abi.layout().stride / 4).enumerate() {
            let value = u32::from_ne_bytes(*word);
            // SAFETY: as in `copy_entry`.
            unsafe { ptr::write_volatile(self.base.add(offset + n * 4).cast::<u32>(), value) };
        }
    }
}
