//! Requests: a private copy of a slot, and what it says.
//!
//! A slot is copied out of the ring once and parsed from the copy (XSA-155). Parsing checks form only: what depends on
//! the disk (its size, its mode) is checked by [`Request::check_range`] and by the caller.

use heapless::Vec;

use crate::abi::{Abi, LARGEST_STRIDE};

/// Unit of every sector number and count on the ring, in bytes, whatever `sector-size` says.
pub const SECTOR_BYTES: u64 = 512;

/// Segments of a request that carries its grants in the slot itself.
pub const DIRECT_SEGMENTS: usize = 11;

/// Last sector within a page.
const LAST_SECTOR_OF_PAGE: u8 = 7;

/// Status of a response, as blkif numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Okay,
    /// Failed, or refused because it was malformed.
    Error,
    /// Not offered by this backend.
    Unsupported,
}

impl Status {
    /// The number on the ring.
    #[must_use]
    pub fn code(self) -> i16 {
        match self {
            Status::Okay => 0,
            Status::Error => -1,
            Status::Unsupported => -2,
        }
    }
}

/// Operation numbers of blkif.
pub mod operation {
    /// Read sectors.
    pub const READ: u8 = 0;
    /// Write sectors.
    pub const WRITE: u8 = 1;
    /// Write ordered against everything before and after it.
    pub const BARRIER: u8 = 2;
    /// Make all completed writes durable.
    pub const FLUSH: u8 = 3;
    /// The sectors' content is no longer needed.
    pub const DISCARD: u8 = 5;
    /// A read or write whose segments lie in pages of their own.
    pub const INDIRECT: u8 = 6;
}

/// What a well-formed request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Guest reads the disk.
    Read,
    /// Guest writes the disk.
    Write,
    /// Guest wants its completed writes durable.
    Flush,
}

/// Why a request is answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// An operation that was not offered: status -2.
    Unsupported(u8),
    /// No segment, or more than fit: status -1.
    SegmentCount(u16),
    /// A segment whose sectors are not `first <= last <= 7`: status -1.
    SegmentSectors(u8, u8),
    /// Past the end of the disk, or wrapping: status -1.
    Range(u64),
}

impl Refusal {
    /// The status that answers it.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            Refusal::Unsupported(_) => Status::Unsupported,
            _ => Status::Error,
        }
    }
}

/// One piece of a request's data: sectors `first..=last` of a granted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The granted page.
    pub grant: u32,
    /// First sector within the page, 0..=7.
    pub first: u8,
    /// Last sector within the page, `first..=7`.
    pub last: u8,
}

impl Segment {
    /// Offset of the first byte within the page.
    #[must_use]
    pub fn offset_bytes(&self) -> u16 {
        u16::from(self.first) * 512
    }

    /// Length in bytes: 512..=4096.
    #[must_use]
    pub fn length_bytes(&self) -> u16 {
        (u16::from(self.last.saturating_sub(self.first)) + 1) * 512
    }
}

/// A private copy of one ring entry.
#[derive(Clone)]
pub struct Slot {
    bytes: [u8; LARGEST_STRIDE],
    abi: Abi,
}

/// A request that has the right form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The frontend's own name for it: opaque, echoed once.
    pub id: u64,
    /// What is asked.
    pub operation: Operation,
    /// First sector on the disk; meaningless for a flush without data.
    pub sector: u64,
    /// Where the data is in the guest's memory, in order.
    pub segments: Vec<Segment, DIRECT_SEGMENTS, u8>,
}

impl Slot {
    /// Wraps the copied bytes of one entry.
    #[must_use]
    pub fn new(bytes: [u8; LARGEST_STRIDE], abi: Abi) -> Slot {
        Slot { bytes, abi }
    }

    /// The copied bytes, to be written down for a successor.
    #[must_use]
    pub fn bytes(&self) -> &[u8; LARGEST_STRIDE] {
        &self.bytes
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    /// The id, which is echoed even where the rest makes no sense.
    #[must_use]
    pub fn id(&self) -> u64 {
        u64::from_le_bytes(self.field(self.abi.layout().id))
    }

    /// The operation's number.
    #[must_use]
    pub fn operation(&self) -> u8 {
        self.field::<1>(0)[0]
    }

    /// The operation's number to put in the response: an indirect request is answered with its inner operation, which
    /// is what Linux's frontend checks.
    #[must_use]
    pub fn response_operation(&self) -> u8 {
        match self.operation() {
            operation::INDIRECT => self.field::<1>(1)[0],
            plain => plain,
        }
    }

    /// Reads the copy as a request.
    ///
    /// # Errors
    /// What is wrong with it; answer with the refusal's status.
    pub fn parse(&self) -> Result<Request, Refusal> {
        let operation = match self.operation() {
            operation::READ => Operation::Read,
            operation::WRITE => Operation::Write,
            operation::FLUSH => Operation::Flush,
            other => return Err(Refusal::Unsupported(other)),
        };
        let segments = self.segments()?;
        if segments.is_empty() && operation != Operation::Flush {
            return Err(Refusal::SegmentCount(0));
        }
        let sector = u64::from_le_bytes(self.field(self.abi.layout().sector));
        Ok(Request { id: self.id(), operation, sector, segments })
    }

    fn segments(&self) -> Result<Vec<Segment, DIRECT_SEGMENTS, u8>, Refusal> {
        let count = self.field::<1>(1)[0];
        let mut segments = Vec::new();
        let Some(bytes) = self.bytes.get(self.abi.layout().segments..) else { return Ok(segments) };
        let (entries, _) = bytes.as_chunks::<8>();
        for &[g0, g1, g2, g3, first, last, _, _] in entries.iter().take(usize::from(count)) {
            if first > last || last > LAST_SECTOR_OF_PAGE {
                return Err(Refusal::SegmentSectors(first, last));
            }
            let grant = u32::from_le_bytes([g0, g1, g2, g3]);
            if segments.push(Segment { grant, first, last }).is_err() {
                return Err(Refusal::SegmentCount(count.into()));
            }
        }
        if segments.len() != usize::from(count) {
            return Err(Refusal::SegmentCount(count.into()));
        }
        Ok(segments)
    }
}

impl Request {
    /// Length of the data in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> u32 {
        self.segments.iter().map(|segment| u32::from(segment.length_bytes())).sum()
    }

    /// Checks that the sectors lie on a disk of `size_sectors`.
    ///
    /// # Errors
    /// [`Refusal::Range`] where they do not, or where the sum wraps.
    pub fn check_range(&self, size_sectors: u64) -> Result<(), Refusal> {
        if self.segments.is_empty() {
            return Ok(());
        }
        let sectors = u64::from(self.length_bytes()) / SECTOR_BYTES;
        match self.sector.checked_add(sectors) {
            Some(end) if end <= size_sectors => Ok(()),
            _ => Err(Refusal::Range(self.sector)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets written out by hand from blkif.h, not taken from `Layout`.
    fn slot(abi: Abi, op: u8, nseg: u8, id: u64, sector: u64, segments: &[(u32, u8, u8)]) -> Slot {
        let mut bytes = [0xAA_u8; LARGEST_STRIDE];
        let (id_at, sector_at, segments_at) = if abi == Abi::X86_32 { (4, 12, 20) } else { (8, 16, 24) };
        bytes[0] = op;
        bytes[1] = nseg;
        bytes[id_at..id_at + 8].copy_from_slice(&id.to_le_bytes());
        bytes[sector_at..sector_at + 8].copy_from_slice(&sector.to_le_bytes());
        for (n, (grant, first, last)) in segments.iter().enumerate() {
            let at = segments_at + n * 8;
            bytes[at..at + 4].copy_from_slice(&grant.to_le_bytes());
            bytes[at + 4] = *first;
            bytes[at + 5] = *last;
        }
        Slot::new(bytes, abi)
    }

    #[test]
    fn a_write_is_read_alike_in_every_abi() {
        for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
            let id = 0xFFFF_8000_1234_5678;
            let parsed = slot(abi, 1, 2, id, 77, &[(9, 0, 7), (0xFFFF_FFFF, 3, 3)]).parse().unwrap();
            assert_eq!((parsed.id, parsed.operation, parsed.sector), (id, Operation::Write, 77));
            assert_eq!(parsed.length_bytes(), 4096 + 512);
            assert_eq!(parsed.segments[1], Segment { grant: 0xFFFF_FFFF, first: 3, last: 3 });
            assert_eq!(parsed.segments[1].offset_bytes(), 1536);
        }
    }

    #[test]
    fn eleven_segments_fit_and_twelve_do_not() {
        for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
            let eleven = [(5, 0, 7); 11];
            assert_eq!(slot(abi, 0, 11, 1, 0, &eleven).parse().unwrap().segments.len(), 11);
            for count in [12, 13, 255] {
                let refused = slot(abi, 0, count, 1, 0, &eleven).parse();
                assert!(refused.is_err(), "{abi:?} {count}");
            }
        }
    }

    #[test]
    fn malformed_segments_are_refused_with_an_error() {
        for (first, last) in [(1, 0), (0, 8), (7, 255), (255, 255), (8, 8)] {
            let refusal = slot(Abi::X86_64, 0, 1, 1, 0, &[(1, first, last)]).parse().unwrap_err();
            assert_eq!(refusal, Refusal::SegmentSectors(first, last));
            assert_eq!(refusal.status().code(), -1);
        }
        let refusal = slot(Abi::X86_64, 1, 0, 1, 0, &[]).parse().unwrap_err();
        assert_eq!(refusal, Refusal::SegmentCount(0));
    }

    #[test]
    fn what_is_not_offered_is_unsupported() {
        for op in (2..=255).filter(|op| *op != operation::FLUSH) {
            let refusal = slot(Abi::X86_64, op, 1, 1, 0, &[(1, 0, 0)]).parse().unwrap_err();
            assert_eq!((refusal, refusal.status().code()), (Refusal::Unsupported(op), -2));
        }
    }

    #[test]
    fn a_flush_may_have_data_or_none() {
        let bare = slot(Abi::X86_64, 3, 0, 1, u64::MAX, &[]).parse().unwrap();
        assert_eq!((bare.operation, bare.check_range(0)), (Operation::Flush, Ok(())));
        let full = slot(Abi::X86_64, 3, 1, 1, 8, &[(1, 0, 7)]).parse().unwrap();
        assert_eq!((full.check_range(15), full.check_range(16)), (Err(Refusal::Range(8)), Ok(())));
    }

    #[test]
    fn ranges_end_at_the_disk_and_never_wrap() {
        let request = |sector| slot(Abi::X86_64, 0, 1, 1, sector, &[(1, 0, 7)]).parse().unwrap();
        assert_eq!(request(92).check_range(100), Ok(()));
        for sector in [93, 100, u64::MAX, u64::MAX - 7, u64::MAX / 512] {
            assert_eq!(request(sector).check_range(100), Err(Refusal::Range(sector)));
        }
    }

    #[test]
    fn an_indirect_request_is_answered_with_its_inner_operation() {
        let slot = slot(Abi::X86_64, operation::INDIRECT, operation::WRITE, 9, 0, &[]);
        assert_eq!((slot.response_operation(), slot.id()), (operation::WRITE, 9));
    }
}
