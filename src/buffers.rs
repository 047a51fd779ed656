//! Memory for data in flight: page-aligned, bounded, never handed out twice.
//!
//! The arena is one reservation of address space, divided into chunks. Pages of it become resident when they are first
//! written, and it stays mapped for the life of the process, so that a [`Span`] can be given to the kernel without a
//! lifetime: at worst a mistake mixes up data, it never touches foreign memory. Pages of spans that are free may be given
//! back to the system with [`Pool::trim`].

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// The unit of allocation, in bytes.
pub const PAGE_BYTES: u32 = 4096;

/// Pages in a chunk: what four machine words of bitmap describe.
const CHUNK_PAGES: u32 = 256;

/// Spans up to this are had from the first chunks, longer ones from the last: eleven pages are what a request of a plain
/// ring names.
const SHORT_PAGES: u32 = 11;

/// The longest span that can be had, in bytes: one chunk, 1 MiB.
pub const SPAN_BYTES_MAX: u32 = CHUNK_PAGES * PAGE_BYTES;

/// The largest arena, in bytes: what a `u32` of pages at 2 GiB describes without overflow anywhere.
pub const POOL_BYTES_MAX: usize = 2 << 30;

/// How many refused frees are written to the log: a mistake that repeats must not fill the disk.
const REFUSALS_LOGGED_MAX: u64 = 16;

/// A piece of the arena: where, and how long. Made only by [`Pool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    address: *mut u8,
    length_bytes: u32,
}

impl Span {
    /// The span without bytes.
    pub const EMPTY: Span = Span { address: std::ptr::null_mut(), length_bytes: 0 };

    /// A span that lies in no arena: bytes that only the kernel touches, such as a mapped file's.
    ///
    /// # Safety
    /// `length_bytes` from `address` on belong to one mapping, which stays as long as the span is used; and it is only
    /// named to the kernel, or to a [`Pool`], which refuses it. Whoever touches it with loads and stores needs reasons of
    /// his own why that is sound.
    #[must_use]
    pub unsafe fn foreign(address: *mut u8, length_bytes: u32) -> Span {
        Span { address, length_bytes }
    }

    /// First byte.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> u32 {
        self.length_bytes
    }

    /// The part of this span from `from`, `length` bytes long, or `None` where it would reach past the end.
    #[must_use]
    pub fn part(&self, from: u32, length: u32) -> Option<Span> {
        if from.checked_add(length)? > self.length_bytes {
            return None;
        }
        Some(Span { address: self.address.wrapping_add(from as usize), length_bytes: length })
    }

    /// Fills it with zeroes. For the owner of the transfer that the span belongs to.
    pub(crate) fn zero(&self) {
        // SAFETY: a span lies in an arena that is mapped for ever, or is empty; slices of an arena are borrowed from its
        // pool, whose owner is the only caller.
        unsafe { std::ptr::write_bytes(self.address, 0, self.length_bytes as usize) };
    }

    /// Copies the start of `other` over this, as much as both hold. For the owner of the transfer that they belong to.
    pub(crate) fn copy_from(&self, other: &Span) {
        let length = self.length_bytes.min(other.length_bytes) as usize;
        // SAFETY: as in `zero`, for both; `copy` allows that they overlap.
        unsafe { std::ptr::copy(other.address, self.address, length) };
    }
}

/// A set of the pages of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pages([u64; 4]);

impl Pages {
    const NONE: Pages = Pages([0; 4]);

    /// The set of `count` pages from `first` on. Bits past the chunk are dropped.
    fn range(first: u32, count: u32) -> Pages {
        let mut words = [0; 4];
        for (word, base) in words.iter_mut().zip([0u32, 64, 128, 192]) {
            let from = first.clamp(base, base + 64) - base;
            let to = (first + count).clamp(base, base + 64) - base;
            if to > from {
                *word = (u64::MAX >> (64 - (to - from))) << from;
            }
        }
        Pages(words)
    }

    /// Each bit moved `by` places towards the first page.
    fn shifted_down(self, by: u32) -> Pages {
        let words = (by / 64) as usize;
        let bits = by % 64;
        let mut out = [0; 4];
        for (index, word) in out.iter_mut().enumerate() {
            let low = self.0.get(index + words).copied().unwrap_or(0);
            let high = self.0.get(index + words + 1).copied().unwrap_or(0);
            *word = if bits == 0 { low } else { (low >> bits) | (high << (64 - bits)) };
        }
        Pages(out)
    }

    fn and(self, other: Pages) -> Pages {
        Pages(std::array::from_fn(|index| self.0[index] & other.0[index]))
    }

    fn or(self, other: Pages) -> Pages {
        Pages(std::array::from_fn(|index| self.0[index] | other.0[index]))
    }

    fn not(self) -> Pages {
        Pages(self.0.map(|word| !word))
    }

    fn is_empty(self) -> bool {
        self.0 == [0; 4]
    }

    fn first(self) -> Option<u32> {
        let mut base = 0;
        for word in self.0 {
            if word != 0 {
                return Some(base + word.trailing_zeros());
            }
            base += 64;
        }
        None
    }

    /// The first page from which `count` pages in a row are in the set.
    fn first_run(self, count: u32) -> Option<u32> {
        let mut starts = self;
        let mut known = 1;
        while known < count {
            let step = known.min(count - known);
            starts = starts.and(starts.shifted_down(step));
            known += step;
        }
        starts.first()
    }

    fn has(self, page: u32) -> bool {
        self.0.get(page as usize / 64).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    fn set(&mut self, page: u32) {
        if let Some(word) = self.0.get_mut(page as usize / 64) {
            *word |= 1 << (page % 64);
        }
    }

    fn clear(&mut self, page: u32) {
        if let Some(word) = self.0.get_mut(page as usize / 64) {
            *word &= !(1 << (page % 64));
        }
    }

    /// How many pages from `first` on are in the set without a gap.
    fn run_length(self, first: u32) -> u32 {
        let gap = self.not().shifted_down(first).first().unwrap_or(CHUNK_PAGES);
        gap.min(CHUNK_PAGES - first)
    }
}

/// The books of one chunk.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    used: Pages,
    /// First pages of allocated spans: what tells a whole span from a part of one.
    starts: Pages,
    /// Pages that were handed out since they were last given back to the system.
    touched: Pages,
    free_pages: u32,
}

/// The arena and what of it is free. Figures are in bytes.
#[derive(Debug)]
pub struct Pool {
    base: *mut u8,
    chunks: Vec<Chunk>,
    used_bytes: u64,
    used_bytes_max: u64,
    refused_frees: u64,
}

impl Pool {
    /// Reserves an arena of `capacity_bytes`, rounded up to whole chunks of 1 MiB. Nothing of it is resident yet.
    ///
    /// # Errors
    /// The system's, when the address space cannot be had; `EINVAL` for none, or more than [`POOL_BYTES_MAX`].
    pub fn new(capacity_bytes: usize) -> std::io::Result<Pool> {
        if capacity_bytes == 0 || capacity_bytes > POOL_BYTES_MAX {
            return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
        }
        let count = capacity_bytes.div_ceil(SPAN_BYTES_MAX as usize);
        let length = count * SPAN_BYTES_MAX as usize;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        // A huge page would make 2 MiB resident for the first 4 KiB used. Kernels without huge pages refuse: no matter.
        // SAFETY: the range is the mapping just made; this advice changes no content.
        let _ = unsafe { rustix::mm::madvise(base, length, Advice::LinuxNoHugepage) };
        let chunk =
            Chunk { used: Pages::NONE, starts: Pages::NONE, touched: Pages::NONE, free_pages: CHUNK_PAGES };
        Ok(Pool {
            base: base.cast(),
            chunks: vec![chunk; count],
            used_bytes: 0,
            used_bytes_max: 0,
            refused_frees: 0,
        })
    }

    /// A span of `length_bytes` (1 to [`SPAN_BYTES_MAX`]) that starts on a page; `None` when there is no such run of free
    /// pages. What it holds is left over from earlier use.
    pub fn alloc(&mut self, length_bytes: u32) -> Option<Span> {
        if length_bytes == 0 || length_bytes > SPAN_BYTES_MAX {
            return None;
        }
        let count = length_bytes.div_ceil(PAGE_BYTES);
        let chunks = self.chunks.len();
        for at in 0..chunks {
            // Long spans from the other end: short ones that stay would leave no long run anywhere.
            let index = if count > SHORT_PAGES { chunks - 1 - at } else { at };
            let Some(chunk) = self.chunks.get_mut(index) else { continue };
            if chunk.free_pages < count {
                continue;
            }
            let free = chunk.used.not();
            // One page is what most requests ask for.
            let Some(first) = (if count == 1 { free.first() } else { free.first_run(count) }) else {
                continue;
            };
            if count == 1 {
                chunk.used.set(first);
                chunk.touched.set(first);
            } else {
                let pages = Pages::range(first, count);
                chunk.used = chunk.used.or(pages);
                chunk.touched = chunk.touched.or(pages);
            }
            chunk.starts.set(first);
            chunk.free_pages -= count;
            self.used_bytes += u64::from(count) * u64::from(PAGE_BYTES);
            self.used_bytes_max = self.used_bytes_max.max(self.used_bytes);
            let offset = index * SPAN_BYTES_MAX as usize + (first * PAGE_BYTES) as usize;
            return Some(Span { address: self.base.wrapping_add(offset), length_bytes });
        }
        None
    }

    /// Takes a span back. One that is not allocated as it stands (freed before, a part, of another pool) is refused: the
    /// answer is `false`, and the log says so.
    pub fn free(&mut self, span: Span) -> bool {
        let Some((index, first, count)) = self.whole(span) else {
            self.refused_frees += 1;
            if self.refused_frees <= REFUSALS_LOGGED_MAX {
                log::error!(
                    "buffer pool: refused to free {} bytes at {:p}: not allocated as such (a bug in vbdd, please report)",
                    span.length_bytes,
                    span.address
                );
            }
            return false;
        };
        let chunk = &mut self.chunks[index];
        if count == 1 {
            chunk.used.clear(first);
        } else {
            chunk.used = chunk.used.and(Pages::range(first, count).not());
        }
        chunk.starts.clear(first);
        chunk.free_pages += count;
        self.used_bytes -= u64::from(count) * u64::from(PAGE_BYTES);
        true
    }

    /// Chunk, first page and page count of a span that is allocated exactly so.
    fn whole(&self, span: Span) -> Option<(usize, u32, u32)> {
        let offset = self.offset_of(span)?;
        if span.length_bytes == 0 || offset % PAGE_BYTES as usize != 0 {
            return None;
        }
        let index = offset / SPAN_BYTES_MAX as usize;
        let chunk = self.chunks.get(index)?;
        let first = u32::try_from(offset % SPAN_BYTES_MAX as usize).ok()? / PAGE_BYTES;
        let count = span.length_bytes.div_ceil(PAGE_BYTES);
        if first + count > CHUNK_PAGES || !chunk.starts.has(first) {
            return None;
        }
        let next = first + count;
        let ends_here = chunk.starts.has(next) || !chunk.used.has(next);
        if count == 1 {
            return (chunk.used.has(first) && ends_here).then_some((index, first, count));
        }
        let inner_starts = chunk.starts.and(Pages::range(first + 1, count - 1));
        let all_used = chunk.used.run_length(first) >= count;
        (inner_starts.is_empty() && all_used && ends_here).then_some((index, first, count))
    }

    /// Offset in the arena of a span that lies in it.
    fn offset_of(&self, span: Span) -> Option<usize> {
        let offset = (span.address as usize).checked_sub(self.base as usize)?;
        (offset + span.length_bytes as usize <= self.capacity_bytes()).then_some(offset)
    }

    /// Whether `span` lies in this arena. The empty span lies nowhere.
    #[must_use]
    pub fn contains(&self, span: Span) -> bool {
        self.offset_of(span).is_some()
    }

    /// Copies `bytes` into the start of `span`. `false`, and nothing is done, when they do not fit or it is not ours.
    pub fn copy_in(&mut self, span: Span, bytes: &[u8]) -> bool {
        if bytes.len() > span.length_bytes as usize || !self.contains(span) {
            return false;
        }
        // SAFETY: the destination lies in the arena, which is mapped for ever; `bytes` cannot, as slices of the arena
        // are borrowed from `self`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), span.address, bytes.len()) };
        true
    }

    /// Copies the start of `span` over `bytes`. `false`, and nothing is done, when it is shorter or not ours.
    #[must_use]
    pub fn copy_out(&self, span: Span, bytes: &mut [u8]) -> bool {
        if bytes.len() > span.length_bytes as usize || !self.contains(span) {
            return false;
        }
        // SAFETY: the source lies in the arena, which is mapped for ever; `bytes` cannot, as in `copy_in`.
        unsafe { std::ptr::copy_nonoverlapping(span.address, bytes.as_mut_ptr(), bytes.len()) };
        true
    }

    /// Fills `span` with zeroes. `false`, and nothing is done, when it is not ours.
    pub fn fill_zero(&mut self, span: Span) -> bool {
        if !self.contains(span) {
            return false;
        }
        // SAFETY: the range lies in the arena, which is mapped for ever, and no slice of it is borrowed.
        unsafe { std::ptr::write_bytes(span.address, 0, span.length_bytes as usize) };
        true
    }

    /// The bytes of `span`, which must not be in flight. Empty when it is not ours.
    #[must_use]
    pub fn bytes(&self, span: Span) -> &[u8] {
        if !self.contains(span) {
            return &[];
        }
        // SAFETY: mapped for ever, initialised (by the kernel, with zeroes), and only `&mut self` writes to it, or a
        // transfer in flight, which the caller excludes.
        unsafe { std::slice::from_raw_parts(span.address, span.length_bytes as usize) }
    }

    /// The bytes of `span` to write to; it must not be in flight. Empty when it is not ours.
    pub fn bytes_mut(&mut self, span: Span) -> &mut [u8] {
        if !self.contains(span) {
            return &mut [];
        }
        // SAFETY: as in `bytes`; `&mut self` keeps every other slice of the arena away.
        unsafe { std::slice::from_raw_parts_mut(span.address, span.length_bytes as usize) }
    }

    /// Gives the free pages that were in use before back to the system; they read as zeroes when used again. Meant for
    /// moments without load: it costs a system call per run of pages. Answers with the bytes given back.
    pub fn trim(&mut self) -> u64 {
        let mut given = 0;
        for index in 0..self.chunks.len() {
            loop {
                let chunk = self.chunks[index];
                let idle = chunk.touched.and(chunk.used.not());
                let Some(first) = idle.first() else { break };
                let count = idle.run_length(first);
                let offset = index * SPAN_BYTES_MAX as usize + (first * PAGE_BYTES) as usize;
                let length = (count * PAGE_BYTES) as usize;
                // SAFETY: whole pages of the arena that no span covers; they stay mapped.
                let done = unsafe {
                    rustix::mm::madvise(self.base.wrapping_add(offset).cast(), length, Advice::LinuxDontNeed)
                };
                if done.is_ok() {
                    given += length as u64;
                }
                self.chunks[index].touched = chunk.touched.and(Pages::range(first, count).not());
            }
        }
        given
    }

    /// Size of the arena.
    #[must_use]
    pub fn capacity_bytes(&self) -> usize {
        self.chunks.len() * SPAN_BYTES_MAX as usize
    }

    /// What is handed out now, in whole pages.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// The most that was ever handed out at once.
    #[must_use]
    pub fn used_bytes_max(&self) -> u64 {
        self.used_bytes_max
    }

    /// How many spans were refused by [`Pool::free`]: anything but 0 is a bug.
    #[must_use]
    pub fn refused_frees(&self) -> u64 {
        self.refused_frees
    }
}

impl Drop for Pool {
    /// Gives the memory back, not the addresses: a span that outlives its pool reads zeroes.
    fn drop(&mut self) {
        // SAFETY: the range is our mapping, which stays mapped.
        let _ =
            unsafe { rustix::mm::madvise(self.base.cast(), self.capacity_bytes(), Advice::LinuxDontNeed) };
    }
}

#[cfg(test)]
mod tests;
