//! How a request is cut into transfers that the medium accepts: pure arithmetic.
//!
//! A request is a row of legs, one after the other. Most have one: everything aligned, straight to or from the caller's
//! memory. What is not aligned goes through a bounce buffer; what lies in the ragged end of a file, past its last whole
//! block, goes through the page cache by a second descriptor.

use super::{IoKind, StorageError};

/// The unit of requests, in bytes.
pub(super) const SECTOR_BYTES: u32 = 512;

/// Length of a bounce buffer in bytes: longer pieces go one after the other. At least the largest block.
pub(super) const BOUNCE_BYTES: u32 = 64 * 1024;

/// The largest block of a medium that is served without the page cache, in bytes.
pub(super) const BLOCK_BYTES_MAX: u32 = 4096;

/// What a file's size and medium ask of transfers. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Size when it was opened, or when it was last changed or measured.
    pub size: u64,
    /// Where writes must end: the size rounded up to whole sectors.
    pub limit: u64,
    /// Offsets and lengths are multiples of this; 1 when the page cache takes any.
    pub block: u32,
    /// Addresses are multiples of this.
    pub memory: u32,
    /// From here on the page cache serves: the last whole block's end, or `u64::MAX` when nothing is ragged.
    pub tail: u64,
}

impl Shape {
    pub(super) fn new(size: u64, block: u32, memory: u32) -> Shape {
        let limit = size.next_multiple_of(u64::from(SECTOR_BYTES));
        let ragged = limit % u64::from(block);
        let tail = if ragged == 0 { u64::MAX } else { limit - ragged };
        Shape { size, limit, block, memory, tail }
    }

    /// The same file with another size. Without a descriptor for a ragged end only as far as whole blocks go.
    pub(super) fn resized(self, size: u64, has_tail: bool) -> Shape {
        let size = if has_tail { size } else { size - size % u64::from(self.block) };
        Shape::new(size, self.block, self.memory)
    }

    /// The same file through the page cache.
    pub(super) fn cached(self) -> Shape {
        Shape { block: 1, memory: 1, tail: u64::MAX, ..self }
    }

    /// Whether a transfer may start there. Blocks and alignments are powers of two.
    fn fits(self, offset: u64, address: usize) -> bool {
        offset & (u64::from(self.block) - 1) == 0 && address & (self.memory as usize - 1) == 0
    }

    /// The start of the block that `offset` lies in.
    fn down(self, offset: u64) -> u64 {
        offset & !(u64::from(self.block) - 1)
    }

    /// The end of the block that the byte before `offset` lies in.
    fn up(self, offset: u64) -> u64 {
        self.down(offset + u64::from(self.block) - 1)
    }
}

/// Where a leg's bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Between the file and the caller's memory.
    Straight,
    /// Between the file's page cache and the caller's memory.
    Tail,
    /// Through a bounce buffer, by whole blocks. `from..to` is what the file is asked for.
    Bounce { from: u64, to: u64 },
}

/// The next piece of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leg {
    pub way: Way,
    /// First byte of the request that it covers.
    pub offset: u64,
    /// How many bytes of the request it covers.
    pub length: u32,
}

/// What is left to do for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This leg.
    Leg(Leg),
    /// The rest lies past the end and reads as zeroes.
    Zeroes,
    /// Nothing.
    Nothing,
}

/// Whether a request may be done at all.
pub(super) fn check(shape: &Shape, kind: IoKind, offset: u64, length: u64) -> Result<(), StorageError> {
    let sector = u64::from(SECTOR_BYTES);
    match kind {
        IoKind::Flush => return Ok(()),
        IoKind::SetLength if offset.is_multiple_of(sector) => return Ok(()),
        _ => {}
    }
    if !offset.is_multiple_of(sector) || !length.is_multiple_of(sector) || length == 0 {
        return Err(StorageError::Os(libc::EINVAL));
    }
    let Some(end) = offset.checked_add(length) else {
        return Err(StorageError::PastEnd);
    };
    if kind != IoKind::Read && end > shape.limit {
        return Err(StorageError::PastEnd);
    }
    Ok(())
}

fn narrow(length: u64) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The next leg of a request of which nothing before `offset` is left: `left` bytes from there, at `address` in memory.
pub(super) fn next(shape: &Shape, offset: u64, address: usize, left: u32) -> Next {
    if left == 0 {
        return Next::Nothing;
    }
    if offset >= shape.limit {
        return Next::Zeroes;
    }
    if offset >= shape.tail {
        let length = left.min(narrow(shape.limit - offset));
        return Next::Leg(Leg { way: Way::Tail, offset, length });
    }
    let length = left.min(narrow(shape.tail.min(shape.limit) - offset));
    if shape.fits(offset, address) {
        let whole = length & !(shape.block - 1);
        if whole > 0 {
            return Next::Leg(Leg { way: Way::Straight, offset, length: whole });
        }
    }
    let from = shape.down(offset);
    let boundary = from + u64::from(shape.block);
    let skip = narrow(boundary - offset);
    // When what follows the first block can go straight, only that block takes the detour.
    let straight_after = skip < length && shape.fits(boundary, address.wrapping_add(skip as usize));
    let wanted = if straight_after { boundary } else { shape.up(offset + u64::from(length)) };
    let to = wanted.min(from + u64::from(BOUNCE_BYTES));
    let length = length.min(narrow(to - offset));
    Next::Leg(Leg { way: Way::Bounce { from, to }, offset, length })
}

/// The blocks that a request touches, as `(first byte, end)`: the unit of serialisation between writes.
pub(super) fn blocks(shape: &Shape, offset: u64, length: u64) -> (u64, u64) {
    (shape.down(offset), shape.up(offset + length))
}

/// Whether a write must read before it writes.
pub(super) fn is_partial(shape: &Shape, offset: u64, length: u64) -> bool {
    let (from, to) = blocks(shape, offset, length);
    let end = offset + length;
    // What lies in the tail is written byte for byte.
    (from < offset && offset < shape.tail) || (end < to && end < shape.tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks a whole request; checks every leg and that together they cover it.
    fn walk(shape: &Shape, offset: u64, address: usize, length: u32) -> usize {
        let mut at = 0;
        let mut legs = 0;
        loop {
            match next(shape, offset + u64::from(at), address + at as usize, length - at) {
                Next::Nothing => {
                    assert_eq!(at, length);
                    return legs;
                }
                Next::Zeroes => {
                    assert!(offset + u64::from(at) >= shape.limit);
                    return legs;
                }
                Next::Leg(leg) => {
                    assert!(leg.length > 0, "no progress");
                    assert_eq!(leg.offset, offset + u64::from(at));
                    let end = leg.offset + u64::from(leg.length);
                    assert!(end <= shape.limit);
                    let block = u64::from(shape.block);
                    match leg.way {
                        Way::Straight => {
                            assert_eq!(leg.offset % block, 0);
                            assert_eq!(u64::from(leg.length) % block, 0);
                            assert_eq!((address + at as usize) % shape.memory as usize, 0);
                            assert!(end <= shape.tail);
                        }
                        Way::Tail => assert!(leg.offset >= shape.tail),
                        Way::Bounce { from, to } => {
                            assert_eq!((from % block, to % block), (0, 0));
                            assert!(from <= leg.offset && end <= to);
                            assert!(to - from <= u64::from(BOUNCE_BYTES));
                            assert!(to <= shape.tail);
                        }
                    }
                    at += leg.length;
                    legs += 1;
                }
            }
        }
    }

    #[test]
    fn legs_cover_every_request() {
        let mut walked = 0;
        for size in [0, 1, 511, 512, 1000, 4095, 4096, 4608, 9000, 70_000, 200_000, 1 << 20] {
            for block in [1, 512, 1024, 4096] {
                for memory in [1, 4, 512, 4096] {
                    let shape = Shape::new(size, block, memory);
                    for offset in (0..12).chain([16, 17, 100, 130, 137, 390]) {
                        for sectors in [1, 2, 7, 8, 9, 16, 17, 88, 127, 128, 129, 256] {
                            for address in [0x10_0000, 0x10_0200, 0x10_0c00] {
                                walk(&shape, offset * 512, address, sectors * 512);
                                walked += 1;
                            }
                        }
                    }
                }
            }
        }
        assert!(walked > 50_000, "{walked}");
    }

    #[test]
    fn aligned_requests_have_one_leg() {
        let shape = Shape::new(1 << 30, 4096, 512);
        assert_eq!(walk(&shape, 8192, 0x10_0000, 1 << 20), 1);
        // Head and tail detour, the middle straight, when the memory allows.
        assert_eq!(walk(&shape, 512, 0x10_0200, 64 * 1024), 3);
        let strict = Shape::new(1 << 30, 4096, 4096);
        assert_eq!(walk(&strict, 512, 0x10_0000, 256 * 1024), 5);
    }

    #[test]
    fn ends() {
        let odd = Shape::new(1000, 512, 512);
        assert_eq!((odd.limit, odd.tail), (1024, u64::MAX));
        let odd = Shape::new(5000, 4096, 4096);
        assert_eq!((odd.limit, odd.tail), (5120, 4096));
        assert_eq!(odd.cached().tail, u64::MAX);
        assert!(check(&odd, IoKind::Write, 4608, 512).is_ok());
        assert_eq!(check(&odd, IoKind::Write, 4608, 1024), Err(StorageError::PastEnd));
        assert_eq!(check(&odd, IoKind::Write, u64::MAX - 511, 512), Err(StorageError::PastEnd));
        assert!(check(&odd, IoKind::Read, 8192, 512).is_ok());
        assert_eq!(check(&odd, IoKind::Read, 8191, 512), Err(StorageError::Os(libc::EINVAL)));
        assert_eq!(check(&odd, IoKind::Read, 0, 0), Err(StorageError::Os(libc::EINVAL)));
        assert!(check(&odd, IoKind::Flush, 1, 0).is_ok());
    }

    #[test]
    fn partial_writes() {
        let shape = Shape::new(5120, 4096, 512);
        assert!(is_partial(&shape, 512, 512));
        assert!(is_partial(&shape, 512, 4096));
        assert!(!is_partial(&shape, 0, 4096));
        assert!(!is_partial(&shape, 4096, 512), "in the tail");
        assert!(!is_partial(&shape, 0, 5120), "whole blocks and the tail");
        assert!(!is_partial(&Shape::new(5120, 512, 512), 512, 512));
    }
}
