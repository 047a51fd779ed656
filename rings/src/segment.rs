//! Where a request's data is in the guest's memory: segments in the slot, or in a page of descriptors.

use heapless::Vec;

use crate::abi::RING_PAGE_BYTES;
use crate::request::Refusal;

/// Segments of a request that carries its grants in the slot itself.
pub const DIRECT_SEGMENTS: usize = 11;

/// Most segments of an indirect request that this crate reads: 1 MiB of whole pages. Their descriptors fit one page.
pub const INDIRECT_SEGMENTS_MAX: u16 = 256;

/// One segment's description, in a slot as in a page of descriptors.
pub const DESCRIPTOR_BYTES: usize = 8;

const _: () = assert!(INDIRECT_SEGMENTS_MAX as usize * DESCRIPTOR_BYTES <= RING_PAGE_BYTES);

/// Last sector within a page.
const LAST_SECTOR_OF_PAGE: u8 = 7;

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

    /// Length in sectors: 1..=8.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        u64::from(self.last.saturating_sub(self.first)) + 1
    }

    /// Reads a description.
    ///
    /// # Errors
    /// [`Refusal::SegmentSectors`] where the sectors are not `first <= last <= 7`.
    pub fn parse(bytes: &[u8; DESCRIPTOR_BYTES]) -> Result<Segment, Refusal> {
        let &[g0, g1, g2, g3, first, last, _, _] = bytes;
        if first > last || last > LAST_SECTOR_OF_PAGE {
            return Err(Refusal::SegmentSectors(first, last));
        }
        Ok(Segment { grant: u32::from_le_bytes([g0, g1, g2, g3]), first, last })
    }

    /// The description that a frontend writes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; DESCRIPTOR_BYTES] {
        let [g0, g1, g2, g3] = self.grant.to_le_bytes();
        [g0, g1, g2, g3, self.first, self.last, 0, 0]
    }
}

/// The page of descriptors that an indirect request names: 1 to [`INDIRECT_SEGMENTS_MAX`] of them. The slot has room for
/// eight pages; only the first is ever needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indirect {
    count: u16,
    /// The granted page that holds the descriptors, from its first byte on.
    pub grant: u32,
}

impl Indirect {
    pub(crate) fn new(count: u16, grant: u32) -> Option<Indirect> {
        (1..=INDIRECT_SEGMENTS_MAX).contains(&count).then_some(Indirect { count, grant })
    }

    /// How many segments: 1 to [`INDIRECT_SEGMENTS_MAX`].
    #[must_use]
    pub fn count(&self) -> u16 {
        self.count
    }

    /// How much of the page is to be copied, in bytes: 8 to 2048.
    #[must_use]
    pub fn descriptor_bytes(&self) -> u32 {
        u32::from(self.count) * 8
    }

    /// The most data that the segments can name, in bytes.
    #[must_use]
    pub fn length_bytes_max(&self) -> u32 {
        u32::from(self.count) * 4096
    }
}

/// Where a request's data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segments {
    /// In pages that the slot names; none for a flush without data and for a discard.
    Direct(Vec<Segment, DIRECT_SEGMENTS, u8>),
    /// In pages that a page of descriptors names.
    Indirect(Indirect),
}

impl Segments {
    /// The segments in order. `descriptors` is the private copy that [`Request::describe`] has read; of no meaning for a
    /// request that is not indirect.
    ///
    /// [`Request::describe`]: crate::request::Request::describe
    pub fn iter<'a>(&'a self, descriptors: &'a [u8]) -> impl Iterator<Item = Segment> + 'a {
        let (direct, indirect) = match self {
            Segments::Direct(segments) => (segments.as_slice(), None),
            Segments::Indirect(indirect) => (&[][..], Some(Described::new(*indirect, descriptors))),
        };
        direct.iter().copied().chain(indirect.into_iter().flatten().map_while(Result::ok))
    }
}

/// The segments that a copied page of descriptors names.
pub(crate) struct Described<'a> {
    entries: core::slice::Iter<'a, [u8; DESCRIPTOR_BYTES]>,
    left: u16,
}

impl<'a> Described<'a> {
    pub(crate) fn new(indirect: Indirect, descriptors: &'a [u8]) -> Described<'a> {
        let (entries, _) = descriptors.as_chunks::<DESCRIPTOR_BYTES>();
        Described { entries: entries.iter(), left: indirect.count }
    }
}

impl Iterator for Described<'_> {
    type Item = Result<Segment, Refusal>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        self.entries.next().map(Segment::parse)
    }
}
