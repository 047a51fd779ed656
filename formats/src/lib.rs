//! Disk-image formats as state machines without I/O: where the bytes of a disk lie in its image.
//!
//! A format is asked and never does: it says *where*, somebody else moves bytes. [`raw`] is the only one so far; its answers
//! never wait for metadata, so the interface has no more than raw needs. Formats with metadata add pages to fill, and
//! prepare, commit and release for writes that allocate.
#![no_std]
#![forbid(unsafe_code)]
#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

pub mod raw;

pub use raw::Raw;

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

/// Where a run of sectors lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the image, from this byte on.
    Data {
        /// Offset in the image file or device.
        offset_bytes: u64,
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
