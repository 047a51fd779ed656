//! Where new blocks go: what is ready to be pointed to, what is being made ready, what was given up.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::batmap::Saver;
use super::headers::Headers;
use super::layout::{FOOTER_BYTES, next_start};
use super::open::Layout;
use crate::SECTOR_BYTES;
use crate::error::Failure;
use crate::format::Facts;
use crate::ledger::{Stamp, Tick};

/// Blocks that are kept for reuse at most: 256 KiB. What is discarded beyond that is zeroed where it lies.
pub(super) const FREE_MAX: usize = 64 << 10;
/// Blocks that were unlinked and may still be in use at most.
pub(super) const FREED_MAX: usize = 256;
/// Blocks made ready at a time: the first, and at most.
const CHUNK_FIRST: usize = 4;
const CHUNK_MAX: usize = 64;
/// Newly full blocks after which the batmap is saved: at most 128 KiB for 512 MiB of new data.
const SAVE_AFTER: u32 = 256;
/// Bytes that blocks may take: sector numbers in the BAT have 32 bits, and all ones is taken.
const BLOCKS_END: u64 = (u32::MAX as u64 - 4200) * SECTOR_BYTES;

/// Orders that a test leaves out, to see that it is noticed. All false outside tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Planted {
    /// New blocks are pointed to before their bitmaps are durable.
    pub no_reserve_sync: bool,
    /// Old bytes in space that is used again are not zeroed.
    pub no_zeroing: bool,
    /// Bitmap bits are set without waiting for the data.
    pub no_data_tick: bool,
    /// Freed blocks are used again although the BAT still points to them on the medium.
    pub no_unlink_wait: bool,
    /// The batmap is saved before what it says is durable.
    pub no_batmap_wait: bool,
    /// The batmap's header is switched before the map is durable.
    pub no_map_tick: bool,
    /// A differencing image forgets what discarded sectors held: the parent's data reappear.
    pub discard_shows_parent: bool,
    /// Closing cuts the file while the BAT may still point behind it.
    pub no_close_wait: bool,
}

/// A block that writes are on their way to, and that no BAT entry may point to yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) block: u32,
    pub(super) start: u32,
    /// Writes that are neither committed nor released.
    pub(super) writes: u32,
    pub(super) linked: bool,
    /// Its space may hold something already.
    pub(super) touched: bool,
}

/// How far a chunk has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Space is made,
    Length,
    /// and made to read as zero.
    Zeroing,
    /// Bitmaps are written.
    Bitmaps,
    /// What was done becomes durable.
    Sync(Tick),
}

/// Blocks that are being made ready.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) starts: Vec<u32>,
    pub(super) stage: Stage,
    pub(super) outstanding: u32,
    pub(super) failed: Option<Failure>,
    /// How many of the first of `starts` are used again.
    pub(super) reused: usize,
    /// The sector behind the last, if that is new.
    pub(super) end_sector: u64,
}

/// A block that the BAT does not point to any more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Freed {
    pub(super) start: u32,
    pub(super) unlinked: Stamp,
    pub(super) user: u64,
}

/// How far closing has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    /// What was changed becomes durable.
    Settling(Stamp),
    /// The batmap is saved.
    Batmap,
    /// The footer is on its way, and the file's end.
    Footer { outstanding: u32, failed: Option<Failure> },
    /// That is done.
    Done,
}

/// Tags of orders: the kind in the lowest byte, a block's start above it.
pub(super) mod tag {
    pub(in super::super) const CHUNK: u64 = 1;
    pub(in super::super) const PUNCH: u64 = 2;
    pub(in super::super) const MAP: u64 = 3;
    pub(in super::super) const CLOSE: u64 = 4;
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// A fixed image: nothing is ever allocated.
    pub(super) fixed: bool,
    /// New blocks begin with an empty bitmap, and every write sets bits: what differencing images need, and media whose new space holds
    /// old bytes. Else they begin with a full bitmap over zeroes, and only the BAT changes.
    pub(super) exact: bool,
    pub(super) grows: bool,
    /// New space of a file reads as zero.
    pub(super) zero_space: bool,
    /// From here on the file reads as zero wherever nothing was written since.
    pub(super) zero_from: u64,
    pub(super) length_bytes: u64,
    /// The sector behind every block that is in use, ready or free.
    pub(super) end_sector: u64,
    /// What it was when the image was opened.
    pub(super) first_end: u64,
    pub(super) footer_stale: bool,
    pub(super) stride: u64,
    pub(super) ready: VecDeque<u32>,
    pub(super) chunk: Option<Chunk>,
    pub(super) next_blocks: usize,
    /// A write waits for a block.
    pub(super) demand: bool,
    /// Nothing is made ready ahead: it failed. Whoever needs a block tries again, and hears of it.
    pub(super) not_ahead: bool,
    pub(super) free: Vec<u32>,
    pub(super) freed: VecDeque<Freed>,
    /// Blocks whose space is being given back.
    pub(super) punching: u32,
    pub(super) pending: Vec<Pending>,
    pub(super) saver: Option<Saver>,
    /// Newly full blocks after which the batmap is saved.
    pub(super) save_after: u32,
    pub(super) map_outstanding: u32,
    pub(super) map_failed: Option<Failure>,
    pub(super) closing: Option<Closing>,
    pub(super) planted: Planted,
}

impl Space {
    pub(super) fn new(
        headers: &Headers,
        facts: Facts,
        layout: &Layout,
        exact: bool,
        saver: Option<Saver>,
    ) -> Space {
        Space {
            exact,
            grows: facts.grows,
            zero_space: facts.grows && facts.new_space_is_zero,
            zero_from: facts.length_bytes,
            length_bytes: facts.length_bytes,
            end_sector: layout.end_sector,
            first_end: layout.end_sector,
            footer_stale: headers.footers.stale() || headers.footers.short || !headers.footers.copy,
            stride: headers.bitmap_sectors() + headers.block_bytes() / SECTOR_BYTES,
            next_blocks: CHUNK_FIRST,
            free: layout.gaps.iter().rev().copied().collect(),
            saver,
            save_after: SAVE_AFTER,
            ..Space::default()
        }
    }

    pub(super) fn of_fixed() -> Space {
        Space { fixed: true, ..Space::default() }
    }

    /// Whether blocks are to be made ready: somebody waits, or half of the last chunk is used.
    pub(super) fn wants_chunk(&self) -> bool {
        let used_before = self.next_blocks > CHUNK_FIRST && !self.not_ahead;
        self.demand && self.ready.is_empty() || used_before && self.ready.len() < self.next_blocks / 4
    }

    /// The blocks to make ready next: first what can be used again, then what lies at the end. Empty where there is no room.
    pub(super) fn next_chunk(&mut self) -> Chunk {
        let count = self.next_blocks;
        let mut starts = Vec::with_capacity(count);
        while starts.len() < count {
            let Some(start) = self.free.pop() else { break };
            starts.push(start);
        }
        let reused = starts.len();
        let limit = if self.grows { BLOCKS_END } else { self.length_bytes.saturating_sub(FOOTER_BYTES) };
        let mut end_sector = self.end_sector;
        while starts.len() < count {
            let start = next_start(end_sector);
            if (start + self.stride) * SECTOR_BYTES > limit.min(BLOCKS_END) {
                break;
            }
            starts.push(crate::bytes::narrow(start));
            end_sector = start + self.stride;
        }
        self.next_blocks = (count * 2).min(CHUNK_MAX);
        Chunk { starts, stage: Stage::Length, outstanding: 0, failed: None, reused, end_sector }
    }

    /// Gives up a chunk: nothing is known of what its space reads as.
    pub(super) fn drop_chunk(&mut self) {
        if let Some(chunk) = self.chunk.take() {
            let reused = chunk.starts.get(..chunk.reused).unwrap_or_default();
            self.free.extend(reused.iter().rev());
            self.zero_from = self.zero_from.max(chunk.end_sector * SECTOR_BYTES + FOOTER_BYTES);
            self.next_blocks = CHUNK_FIRST;
        }
    }

    /// Whether space may still come: from a chunk or from blocks that were freed.
    pub(super) fn hopes(&self) -> bool {
        self.chunk.is_some() || !self.free.is_empty() || !self.freed.is_empty() || self.punching > 0
    }

    /// Whether transfers of the image's own are on their way.
    pub(super) fn in_flight(&self) -> bool {
        let chunk = self.chunk.as_ref().map_or(0, |chunk| chunk.outstanding);
        let footer = matches!(self.closing, Some(Closing::Footer { outstanding: 1.., .. }));
        chunk > 0 || footer || self.punching > 0 || self.map_outstanding > 0
    }

    pub(super) fn pending_of(&mut self, block: u32) -> Option<&mut Pending> {
        self.pending.iter_mut().find(|pending| pending.block == block)
    }

    /// Room for one more freed block.
    pub(super) fn may_free(&self) -> bool {
        self.freed.len() < FREED_MAX
            && self.free.len() + self.freed.len() + (self.punching as usize) < FREE_MAX
    }

    /// An order ended.
    pub(super) fn answered(&mut self, tag: u64, result: Result<(), Failure>) {
        match tag & 0xff {
            tag::CHUNK => {
                if let Some(chunk) = &mut self.chunk {
                    chunk.outstanding = chunk.outstanding.saturating_sub(1);
                    chunk.failed = chunk.failed.or(result.err());
                }
            }
            tag::PUNCH => {
                self.punching = self.punching.saturating_sub(1);
                self.free.push(crate::bytes::narrow(tag >> 8));
            }
            tag::MAP => {
                self.map_outstanding = self.map_outstanding.saturating_sub(1);
                self.map_failed = self.map_failed.or(result.err());
            }
            _ => {
                if let Some(Closing::Footer { outstanding, failed }) = &mut self.closing {
                    *outstanding = outstanding.saturating_sub(1);
                    *failed = failed.or(result.err());
                }
            }
        }
    }

    /// The sector behind the last block in use, when what is ready and free at the end is cut off.
    pub(super) fn used_end(&self) -> u64 {
        let mut unused: Vec<u32> = self.ready.iter().chain(&self.free).copied().collect();
        unused.extend(self.freed.iter().map(|freed| freed.start));
        unused.sort_unstable();
        let mut end = self.end_sector;
        while let Some(&start) = unused.last() {
            let behind = u64::from(start) + self.stride;
            if behind != end && next_start(behind) != end {
                break;
            }
            end = u64::from(start);
            unused.pop();
        }
        if end == next_start(self.first_end) { self.first_end } else { end }
    }

    /// Whether not even one block fits at the end.
    pub(super) fn no_room(&self) -> bool {
        let limit = if self.grows { BLOCKS_END } else { self.length_bytes.saturating_sub(FOOTER_BYTES) };
        (next_start(self.end_sector) + self.stride) * SECTOR_BYTES > limit.min(BLOCKS_END)
    }
}
