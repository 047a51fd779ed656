//! Requests: a private copy of a slot, and what it says.
//!
//! A slot is copied out of the ring once and parsed from the copy (XSA-155). Parsing checks form only: what depends on
//! the disk (its size, its mode) is checked by [`Request::check_range`] and by the caller. The segments of an indirect
//! request lie in a page of the guest: the caller copies that page once, and [`Request::describe`] reads the copy.

use heapless::Vec;

use crate::abi::{Abi, LARGEST_STRIDE};
use crate::segment::{DESCRIPTOR_BYTES, DIRECT_SEGMENTS, Described, Indirect, Segment, Segments};

/// Unit of every sector number and count on the ring, in bytes, whatever `sector-size` says.
pub const SECTOR_BYTES: u64 = 512;

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
    /// Guest wants its completed writes durable; data that comes along is written then, and durable with the answer.
    Flush,
    /// As a flush with or without data, and everything before it is done before, everything after it after it.
    Barrier,
    /// Guest needs the sectors' content no longer: a hint.
    Discard,
}

/// What a frontend was told that it may ask for, besides reads, writes and flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offers {
    /// `feature-max-indirect-segments`: most segments of an indirect request, at most [`INDIRECT_SEGMENTS_MAX`]; 0 for
    /// none.
    ///
    /// [`INDIRECT_SEGMENTS_MAX`]: crate::segment::INDIRECT_SEGMENTS_MAX
    pub indirect_segments: u16,
    /// `feature-barrier`
    pub barrier: bool,
    /// `feature-discard`
    pub discard: bool,
}

impl Offers {
    /// Reads, writes and flushes alone.
    pub const NONE: Offers = Offers { indirect_segments: 0, barrier: false, discard: false };
}

/// The flag of a discard that asks for the old content to be out of reach for good.
const SECURE: u8 = 1;

/// Why a request is answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// An operation that was not offered: status -2.
    Unsupported(u8),
    /// No segment, or more than fit: status -1.
    SegmentCount(u16),
    /// A segment whose sectors are not `first <= last <= 7`: status -1.
    SegmentSectors(u8, u8),
    /// Past the end of the disk, wrapping, or a discard of nothing: status -1.
    Range(u64),
    /// An indirect request whose inner operation is neither read nor write: status -1.
    InnerOperation(u8),
    /// A discard with flags that were not offered, such as a secure one: status -2.
    DiscardFlags(u8),
}

impl Refusal {
    /// The status that answers it.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            Refusal::Unsupported(_) | Refusal::DiscardFlags(_) => Status::Unsupported,
            _ => Status::Error,
        }
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
    /// How many sectors, of 512 bytes: of data, or to discard. 0 for an indirect request that was not described yet.
    pub sectors: u64,
    /// Where the data is in the guest's memory, in order.
    pub segments: Segments,
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

    /// Reads the copy as a request of a frontend that was told of `offers`.
    ///
    /// # Errors
    /// What is wrong with it; answer with the refusal's status.
    pub fn parse(&self, offers: &Offers) -> Result<Request, Refusal> {
        let operation = match self.operation() {
            operation::READ => Operation::Read,
            operation::WRITE => Operation::Write,
            operation::FLUSH => Operation::Flush,
            operation::BARRIER if offers.barrier => Operation::Barrier,
            operation::DISCARD if offers.discard => return self.discard(),
            operation::INDIRECT if offers.indirect_segments > 0 => return self.indirect(offers),
            other => return Err(Refusal::Unsupported(other)),
        };
        let segments = self.segments()?;
        if segments.is_empty() && matches!(operation, Operation::Read | Operation::Write) {
            return Err(Refusal::SegmentCount(0));
        }
        let sectors = segments.iter().map(Segment::sectors).sum();
        let (id, sector) = (self.id(), self.sector());
        Ok(Request { id, operation, sector, sectors, segments: Segments::Direct(segments) })
    }

    fn sector(&self) -> u64 {
        u64::from_le_bytes(self.field(self.abi.layout().sector))
    }

    fn discard(&self) -> Result<Request, Refusal> {
        let (flags, sector) = (self.field::<1>(1)[0], self.sector());
        if flags & SECURE != 0 {
            return Err(Refusal::DiscardFlags(flags));
        }
        let sectors = u64::from_le_bytes(self.field(self.abi.layout().discard_count));
        if sectors == 0 {
            return Err(Refusal::Range(sector));
        }
        let segments = Segments::Direct(Vec::new());
        Ok(Request { id: self.id(), operation: Operation::Discard, sector, sectors, segments })
    }

    fn indirect(&self, offers: &Offers) -> Result<Request, Refusal> {
        let operation = match self.field::<1>(1)[0] {
            operation::READ => Operation::Read,
            operation::WRITE => Operation::Write,
            other => return Err(Refusal::InnerOperation(other)),
        };
        let count = u16::from_le_bytes(self.field(2));
        let grant = u32::from_le_bytes(self.field(self.abi.layout().indirect_grants));
        let Some(indirect) =
            Indirect::new(count, grant).filter(|indirect| indirect.count() <= offers.indirect_segments)
        else {
            return Err(Refusal::SegmentCount(count));
        };
        let segments = Segments::Indirect(indirect);
        Ok(Request { id: self.id(), operation, sector: self.sector(), sectors: 0, segments })
    }

    fn segments(&self) -> Result<Vec<Segment, DIRECT_SEGMENTS, u8>, Refusal> {
        let count = self.field::<1>(1)[0];
        let mut segments = Vec::new();
        let Some(bytes) = self.bytes.get(self.abi.layout().segments..) else { return Ok(segments) };
        let (entries, _) = bytes.as_chunks::<DESCRIPTOR_BYTES>();
        for entry in entries.iter().take(usize::from(count)) {
            if segments.push(Segment::parse(entry)?).is_err() {
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
    /// Whether data moves: a write of it needs a disk that may be written.
    #[must_use]
    pub fn has_data(&self) -> bool {
        match &self.segments {
            Segments::Direct(segments) => !segments.is_empty(),
            Segments::Indirect(_) => true,
        }
    }

    /// Length of the data in bytes, 0 for a discard; at most what the segments could hold as long as an indirect request
    /// is not described.
    #[must_use]
    pub fn length_bytes(&self) -> u32 {
        match &self.segments {
            Segments::Indirect(indirect) if self.sectors == 0 => indirect.length_bytes_max(),
            _ if self.operation == Operation::Discard => 0,
            _ => u32::try_from(self.sectors.saturating_mul(SECTOR_BYTES)).unwrap_or(u32::MAX),
        }
    }

    /// Reads the segments of an indirect request from a private copy of its descriptors, all of them before any is used.
    /// Does nothing for other requests.
    ///
    /// # Errors
    /// The first segment that is malformed; a copy that is too short counts as a wrong number of segments.
    pub fn describe(&mut self, descriptors: &[u8]) -> Result<(), Refusal> {
        let Segments::Indirect(indirect) = &self.segments else { return Ok(()) };
        let mut described = Described::new(*indirect, descriptors);
        let sectors = described.try_fold(0, |sum, segment| segment.map(|segment| sum + segment.sectors()))?;
        if descriptors.len() < indirect.descriptor_bytes() as usize {
            return Err(Refusal::SegmentCount(indirect.count()));
        }
        self.sectors = sectors;
        Ok(())
    }

    /// Checks that the sectors lie on a disk of `size_sectors`. An indirect request must have been described.
    ///
    /// # Errors
    /// [`Refusal::Range`] where they do not, or where the sum wraps.
    pub fn check_range(&self, size_sectors: u64) -> Result<(), Refusal> {
        if self.sectors == 0 {
            return Ok(());
        }
        match self.sector.checked_add(self.sectors) {
            Some(end) if end <= size_sectors => Ok(()),
            _ => Err(Refusal::Range(self.sector)),
        }
    }
}

#[cfg(test)]
mod tests;
