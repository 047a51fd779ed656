//! Files in memory, mapped: a grant copy goes straight between a guest's page and the file's page.
//!
//! Nothing in this process ever touches the mappings. Their addresses are only named to the kernel, which looks up the
//! pages behind them and answers `EFAULT` where a file was cut short, so that nothing here can meet a SIGBUS. Only pages
//! known to be allocated are named: a page fault on a hole would allocate it for a mere read, and would meet a full file
//! system without an `ENOSPC` to tell. `docs/design/storage.md` has the rules.

use std::os::fd::BorrowedFd;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::buffers::Span;
use crate::limits::{MAPPED_CHUNKS_MAX, MAPPED_FILE_BYTES_MAX};

/// What one page of page table maps on x86 and arm64: the unit in which mappings are counted and given back.
const CHUNK_LENGTH: usize = 2 << 20;
const CHUNK_BYTES: u64 = CHUNK_LENGTH as u64;
const PAGE_BYTES: u64 = 4096;
const PAGES: usize = CHUNK_LENGTH / 4096;
const WORDS: usize = PAGES / 64;

/// `statfs` number of tmpfs (`linux/magic.h`). Of the file systems in memory it is the one that tells holes from pages and
/// maps them in pages of 4 KiB.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Misses after which the kernel is asked again which pages of a chunk are there, and after which a chunk takes the place
/// of another when all places are taken: so neither costs more than a small part of the transfers that miss.
const PATIENCE: u8 = 64;

/// What one fault of a read maps at once, in bytes (Linux's `fault_around_bytes`); a fault of a write maps one page.
const BLOCK_LENGTH: usize = 16 * 4096;
const BLOCK_BYTES: u64 = BLOCK_LENGTH as u64;
const _: () = assert!(CHUNK_BYTES / BLOCK_BYTES == 32);

/// A chunk that may have page tables.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    /// Pages known to be allocated.
    present: [u64; WORDS],
    /// Blocks of [`BLOCK_BYTES`] that were asked for: their pages are mapped, or will be by the copy's own faults.
    touched: u32,
    /// Whose it is: the file's place in the table of files, and its number in that file. `None` when it is free.
    owner: Option<(u32, u32)>,
    /// Turn in which it was last handed out.
    used_in: u32,
    /// Whether it was handed out since the hand last passed.
    recent: bool,
    misses: u8,
}

const FREE: Chunk =
    Chunk { present: [0; WORDS], touched: 0, owner: None, used_in: 0, recent: false, misses: 0 };

/// A file's mapping. It covers the whole pages that the file had when it was made, or has grown to since, for as long as it
/// lives; giving up a chunk only drops page tables. Pages behind the file's end, if it was cut, are not known to be there.
#[derive(Debug)]
pub(super) struct Mapping {
    base: usize,
    length: u64,
    /// Address space from `base` on that is kept for a file that grows: at least `length`.
    reserved: u64,
    /// Turn in which any of it was last handed out.
    used_in: u32,
    /// The file has outgrown it: nothing is handed out until it can be made anew.
    outgrown: bool,
    protection: ProtFlags,
    /// The place of each chunk among [`Maps::chunks`], plus one; 0 for none.
    chunks: Vec<u16>,
}

impl Mapping {
    /// Maps `file`, `size` bytes long. `None` when it is too small or too large, or the system does not want to.
    fn new(file: BorrowedFd<'_>, size: u64, writable: bool) -> Option<Mapping> {
        let length = size - size % PAGE_BYTES;
        let is_tmpfs = rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type & 0xffff_ffff == TMPFS_MAGIC);
        if length == 0 || length > MAPPED_FILE_BYTES_MAX || !is_tmpfs {
            return None;
        }
        let bytes = usize::try_from(length).ok()?;
        // Twice its size, so that a file that grows all the time is mapped anew a few times only.
        let kept = usize::try_from((2 * length).min(MAPPED_FILE_BYTES_MAX)).ok()?;
        let reserved = kept + CHUNK_LENGTH;
        // SAFETY: a reservation without access at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                reserved,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .ok()? as usize;
        let base = start.next_multiple_of(CHUNK_LENGTH);
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let count = usize::try_from(length.div_ceil(CHUNK_BYTES)).ok()?;
        // From here on dropping it unmaps.
        let mapping = Mapping {
            base,
            length,
            reserved: kept as u64,
            used_in: 0,
            outgrown: false,
            protection,
            chunks: vec![0; count],
        };
        // SAFETY: the edges of the reservation just made, in whole pages, which nobody knows of.
        unsafe {
            if base > start {
                let _ = rustix::mm::munmap(start as *mut _, base - start);
            }
            let end = base + kept;
            if start + reserved > end {
                let _ = rustix::mm::munmap(end as *mut _, start + reserved - end);
            }
        }
        mapping.map(file, 0, bytes).then_some(mapping)
    }

    /// Puts the file's pages over a part of the reservation; what page tables were there are dropped.
    fn map(&self, file: BorrowedFd<'_>, offset: u64, bytes: usize) -> bool {
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        let address = self.base + usize::try_from(offset).unwrap_or(0);
        // SAFETY: replaces a part of our own reservation, of which no reference is ever made.
        unsafe { rustix::mm::mmap(address as *mut _, bytes, self.protection, flags, file, offset) }.is_ok()
    }

    /// Maps what has been added to the file since. What is mapped already stays as it is, so spans of this turn do too.
    fn grow(&mut self, file: BorrowedFd<'_>, size: u64) {
        let wanted = size - size % PAGE_BYTES;
        let length = wanted.min(self.reserved);
        self.outgrown |= wanted > length && length < MAPPED_FILE_BYTES_MAX;
        let more = length.saturating_sub(self.length);
        let count = usize::try_from(length.div_ceil(CHUNK_BYTES)).unwrap_or(0);
        if more > 0 && usize::try_from(more).is_ok_and(|more| self.map(file, self.length, more)) {
            self.length = length;
            self.chunks.resize(count, 0);
        }
    }

    fn chunk_bytes(&self, chunk: u32) -> usize {
        let left = self.length - u64::from(chunk) * CHUNK_BYTES;
        usize::try_from(left.min(CHUNK_BYTES)).unwrap_or(0)
    }

    /// Which pages of a chunk are in memory.
    fn present(&self, chunk: u32) -> Option<[u64; WORDS]> {
        let address = self.base + chunk as usize * CHUNK_LENGTH;
        let mut told = [0_u8; PAGES];
        // SAFETY: the range lies in our mapping, and the kernel writes one byte for each of its at most `PAGES` pages.
        let code = unsafe { libc::mincore(address as *mut _, self.chunk_bytes(chunk), told.as_mut_ptr()) };
        if code != 0 {
            return None;
        }
        let mut present = [0; WORDS];
        for (word, bytes) in present.iter_mut().zip(told.chunks(64)) {
            *word = bytes.iter().enumerate().fold(0, |word, (bit, byte)| word | u64::from(byte & 1) << bit);
        }
        Some(present)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let bytes = usize::try_from(self.reserved).unwrap_or(0);
        // SAFETY: our own mapping, and what is reserved behind it; spans in it live no longer than the turn that they were made in.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut _, bytes) };
    }
}

/// Whether a file is mapped.
#[derive(Debug, Default)]
pub(super) enum Mapped {
    /// Not yet, or not since the last rest.
    #[default]
    No,
    Yes(Mapping),
    /// It cannot be, or it turned out that it should not: it is read and written by calls.
    Never,
}

/// The chunks of all mapped files.
#[derive(Debug, Default)]
pub(super) struct Maps {
    /// Grows to [`MAPPED_CHUNKS_MAX`].
    chunks: Vec<Chunk>,
    free: Vec<u16>,
    /// Where the search for a chunk to give up goes on.
    hand: usize,
    /// Wishes for a chunk while all places were taken.
    crowded: u8,
    turn: u32,
}

/// What a request asks to be mapped.
pub(super) struct Wish<'a> {
    /// The file's place in the table of files.
    pub place: u32,
    pub fd: BorrowedFd<'a>,
    pub size: u64,
    pub writable: bool,
    /// The copy will write there.
    pub writes: bool,
    pub offset: u64,
    pub length: u32,
}

/// A chunk to be given up: whose, and its number in the file.
pub(super) type Victim = (u32, u32);

/// What became of a wish.
#[derive(Debug)]
pub(super) enum Answer {
    /// Here are the bytes, until the turn ends.
    Here(Span),
    /// They are to be moved by calls.
    No,
    /// They may be mapped once this chunk was given up: see [`Maps::give_up`].
    After(Victim),
}

impl Maps {
    /// Spans that were handed out before the last call of this are not in use any more.
    pub(super) fn next_turn(&mut self) {
        self.turn = self.turn.wrapping_add(1);
    }

    /// The bytes that `wish` names, if all their pages are known to be allocated.
    #[inline]
    pub(super) fn find(&mut self, mapped: &mut Mapped, wish: &Wish<'_>) -> Answer {
        if wish.size < PAGE_BYTES {
            return Answer::No;
        }
        if let Mapped::No = mapped {
            *mapped = Mapping::new(wish.fd, wish.size, wish.writable).map_or(Mapped::Never, Mapped::Yes);
        }
        let Mapped::Yes(mapping) = mapped else { return Answer::No };
        let Some(end) = wish.offset.checked_add(wish.length.into()).filter(|end| *end <= wish.size) else {
            return Answer::No;
        };
        if end > mapping.length {
            mapping.grow(wish.fd, wish.size);
        }
        if mapping.outgrown {
            if self.turn.wrapping_sub(mapping.used_in) >= 2 {
                self.unmap(mapped);
            }
            return Answer::No;
        }
        if end > mapping.length {
            return Answer::No;
        }
        let (Ok(first), Ok(last)) =
            (u32::try_from(wish.offset / CHUNK_BYTES), u32::try_from((end - 1) / CHUNK_BYTES))
        else {
            return Answer::No;
        };
        for number in first..=last {
            let place = match mapping.chunks.get(number as usize) {
                Some(0) => match self.admit(mapping, wish.place, number) {
                    Ok(place) => place,
                    Err(answer) => return answer,
                },
                Some(place) => usize::from(*place) - 1,
                None => return Answer::No,
            };
            let start = u64::from(number) * CHUNK_BYTES;
            let (from, to) = (wish.offset.max(start) - start, end.min(start + CHUNK_BYTES) - start);
            let Some(chunk) = self.chunks.get_mut(place) else { return Answer::No };
            if !chunk.has(from, to) {
                chunk.miss(mapping, number);
                return Answer::No;
            }
            chunk.touch(mapping, number, from / BLOCK_BYTES, (to - 1) / BLOCK_BYTES, wish.writes);
            chunk.used_in = self.turn;
            chunk.recent = true;
        }
        mapping.used_in = self.turn;
        let address = mapping.base + usize::try_from(wish.offset).unwrap_or(0);
        // SAFETY: the range lies in the mapping, which stays for this turn; the pump names the span to the hypervisor
        // only, as `Storage::direct` demands.
        Answer::Here(unsafe { Span::foreign(address as *mut u8, wish.length) })
    }

    /// Gives a chunk a place, and asks the kernel what is in it.
    fn admit(&mut self, mapping: &mut Mapping, owner: u32, number: u32) -> Result<usize, Answer> {
        let place = if let Some(place) = self.free.pop() {
            usize::from(place)
        } else if self.chunks.len() < MAPPED_CHUNKS_MAX {
            self.chunks.push(FREE);
            self.chunks.len() - 1
        } else {
            self.crowded += 1;
            if self.crowded < PATIENCE {
                return Err(Answer::No);
            }
            self.crowded = 0;
            return Err(self.victim().map_or(Answer::No, Answer::After));
        };
        let present = mapping.present(number).unwrap_or([0; WORDS]);
        if let Some(chunk) = self.chunks.get_mut(place) {
            *chunk = Chunk { present, owner: Some((owner, number)), ..FREE };
        }
        if let Some(entry) = mapping.chunks.get_mut(number as usize) {
            *entry = u16::try_from(place + 1).unwrap_or(0);
        }
        Ok(place)
    }

    /// A chunk that was not handed out lately, and not since the last turn but one.
    fn victim(&mut self) -> Option<Victim> {
        for _ in 0..2 * self.chunks.len() {
            self.hand = (self.hand + 1) % self.chunks.len();
            let Some(chunk) = self.chunks.get_mut(self.hand) else { continue };
            if self.turn.wrapping_sub(chunk.used_in) >= 2 && !std::mem::take(&mut chunk.recent) {
                return chunk.owner;
            }
        }
        None
    }

    /// Drops the page tables of a chunk, and frees its place.
    pub(super) fn give_up(&mut self, mapped: &mut Mapped, file: BorrowedFd<'_>, number: u32) {
        let Mapped::Yes(mapping) = mapped else { return };
        let Some(entry) = mapping.chunks.get_mut(number as usize) else { return };
        let place = std::mem::take(entry);
        self.release(place);
        if !mapping.map(file, u64::from(number) * CHUNK_BYTES, mapping.chunk_bytes(number)) {
            // There may be a gap now.
            self.unmap(mapped);
            *mapped = Mapped::Never;
        }
    }

    fn release(&mut self, entry: u16) {
        let Some(place) = entry.checked_sub(1) else { return };
        if let Some(chunk) = self.chunks.get_mut(usize::from(place))
            && chunk.owner.take().is_some()
        {
            self.free.push(place);
        }
    }

    /// Ends a file's mapping. Spans of this turn must not be used any more.
    pub(super) fn unmap(&mut self, mapped: &mut Mapped) {
        if let Mapped::Yes(mapping) = mapped {
            for entry in &mut mapping.chunks {
                self.release(std::mem::take(entry));
            }
            *mapped = Mapped::No;
        }
    }

    /// Bytes were written by a call: their pages are allocated now.
    pub(super) fn wrote(&mut self, mapped: &Mapped, offset: u64, length: u32) {
        self.mark(mapped, offset, length, |word, mask| *word |= mask);
    }

    /// Bytes are about to be given back to the file system.
    pub(super) fn punched(&mut self, mapped: &Mapped, offset: u64, length: u64) {
        let Mapped::Yes(mapping) = mapped else { return };
        let (mut at, end) = (offset, offset.saturating_add(length).min(mapping.length));
        while at < end {
            let part = u32::try_from(end - at).unwrap_or(0xFFFF_F000);
            self.mark(mapped, at, part, |word, mask| *word &= !mask);
            at += u64::from(part);
        }
    }

    fn mark(&mut self, mapped: &Mapped, offset: u64, length: u32, change: fn(&mut u64, u64)) {
        let Mapped::Yes(mapping) = mapped else { return };
        let end = offset.saturating_add(length.into()).min(mapping.length);
        let mut at = offset;
        while at < end {
            let number = at / CHUNK_BYTES;
            let start = number * CHUNK_BYTES;
            let to = end.min(start + CHUNK_BYTES);
            let entry = usize::try_from(number).ok().and_then(|number| mapping.chunks.get(number));
            if let Some(place) = entry.and_then(|entry| entry.checked_sub(1))
                && let Some(chunk) = self.chunks.get_mut(usize::from(place))
            {
                each_word(at - start, to - start, |word, mask| {
                    if let Some(word) = chunk.present.get_mut(word) {
                        change(word, mask);
                    }
                });
            }
            at = to;
        }
    }

    /// Chunks that may have page tables now.
    pub(super) fn in_use(&self) -> usize {
        self.chunks.len() - self.free.len()
    }

    /// After every file was unmapped: gives the books back too.
    pub(super) fn forget_all(&mut self) {
        if self.in_use() == 0 {
            *self = Maps { turn: self.turn, ..Maps::default() };
        }
    }
}

impl Chunk {
    /// Whether all pages of `from..to`, bytes of the chunk, are known to be there.
    fn has(&self, from: u64, to: u64) -> bool {
        let mut all = true;
        each_word(from, to, |word, mask| {
            all &= self.present.get(word).is_some_and(|word| word & mask == mask)
        });
        all
    }

    /// Sees to it that writes to the blocks `first..=last` need no page fault for every page.
    fn touch(&mut self, mapping: &Mapping, number: u32, first: u64, last: u64, writes: bool) {
        for block in first..=last {
            let bit = 1_u32 << (block % 32);
            if self.touched & bit != 0 {
                continue;
            }
            self.touched |= bit;
            let (from, to) = (block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
            // A hole in it would be filled. Where the call does not exist (before Linux 5.14) there are faults.
            if writes && self.has(from, to) {
                let offset = u64::from(number) * CHUNK_BYTES + from;
                let address = mapping.base + usize::try_from(offset).unwrap_or(0);
                // SAFETY: whole pages of our mapping, all within the file as it was when it was mapped; no content changes.
                let _ = unsafe {
                    rustix::mm::madvise(address as *mut _, BLOCK_LENGTH, Advice::LinuxPopulateRead)
                };
            }
        }
    }

    /// A page was asked for that is not known to be there: it may have come by other ways.
    fn miss(&mut self, mapping: &Mapping, number: u32) {
        self.misses += 1;
        if self.misses >= PATIENCE {
            self.misses = 0;
            self.present = mapping.present(number).unwrap_or(self.present);
        }
    }
}

/// The pages of `from..to`, bytes of a chunk: words of the bitmap, and which bits of each.
#[inline]
fn each_word(from: u64, to: u64, mut with: impl FnMut(usize, u64)) {
    let place = |bytes: u64| usize::try_from(bytes).unwrap_or(PAGES);
    let (mut page, end) = (place(from / PAGE_BYTES), place(to.div_ceil(PAGE_BYTES)));
    while page < end {
        let next = end.min((page / 64 + 1) * 64);
        with(page / 64, (u64::MAX >> (64 - (next - page))) << (page % 64));
        page = next;
    }
}

#[cfg(test)]
mod tests;
