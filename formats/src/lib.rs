//! Disk-image formats as state machines without I/O: where the bytes of a disk lie in its image.
//!
//! A [`Format`] is asked and never does: it says *where*. A [`Disk`] is an open chain of formats, leaf first; it takes guest
//! requests and says which transfers are to be done, in which order; somebody else moves bytes. Metadata is cached in
//! [`Pages`] that all disks share, and the [`Ledger`] knows what of it is durable. `docs/design/formats.md` is the map.
//!
//! Tools work without a `Disk`, on a [`Medium`] that answers at once: create, check, repair, resize, info.
#![no_std]
#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing)]

extern crate alloc;

pub mod bytes;
pub mod disk;
pub mod error;
pub mod format;
pub mod ledger;
pub mod map;
pub mod medium;
pub mod pages;
pub mod qcow2;
pub mod raw;
pub mod vhd;

pub use disk::status::{STATUS_BYTES, StatusRun};
pub use disk::{Disk, InPlace, Limits, Op, Outcome, Payload, Request, Work, WorkId, WorkKind};
pub use error::{Corruption, Failure, Unsupported};
pub use format::{Context, Facts, Format, Order, PageAt, Payout, Prepared, Step, Wait, Zeroed};
pub use ledger::{Ledger, Stamp, Tick};
pub use medium::Medium;
pub use pages::{Keeper, PAGE_BYTES, PageRef, Pages};
pub use qcow2::Qcow2;
pub use raw::Raw;
pub use vhd::Vhd;

/// Unit of sector numbers and counts, in bytes, whatever the medium's blocks are.
pub const SECTOR_BYTES: u64 = 512;

/// What a disk looks like from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in sectors.
    pub sectors: u64,
}

/// A range of the disk that is asked about, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First sector.
    pub sector: u64,
    /// How many; at least one.
    pub sectors: u64,
}

impl Extent {
    /// The sector behind the last; saturates.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.sector.saturating_add(self.sectors)
    }

    /// Whether two extents share a sector.
    #[must_use]
    pub fn overlaps(&self, other: &Extent) -> bool {
        self.sector < other.end() && other.sector < self.end()
    }
}

/// Where a run of sectors lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the image, from this byte on.
    Data {
        /// Offset in the image file or device; a multiple of 512.
        offset_bytes: u64,
    },
    /// Nowhere: it reads as zero, whatever the parent holds.
    Zero,
    /// Not in this image: the parent says, or zero where there is none or it is shorter.
    Parent,
    /// In the image, compressed: `bytes` from `offset_bytes` on (any alignment) unpack to a whole unit, of which the run begins
    /// `skip_bytes` inside. [`Format::unpack`] knows how.
    Compressed {
        /// Offset of the packed bytes in the image.
        offset_bytes: u64,
        /// How many there are at most.
        bytes: u32,
        /// What of the unpacked unit comes before the run.
        skip_bytes: u32,
    },
}

/// One uniform answer: the first `sectors` of the extent lie at `place`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where.
    pub place: Place,
    /// How many of the asked sectors, from the first on: at least one.
    pub sectors: u64,
}

/// An extent that is not on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange(pub Extent);
