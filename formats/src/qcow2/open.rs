//! Opening: the header, and what must be known before the first request.

use core::cell::Cell;

use crate::SECTOR_BYTES;
use crate::bytes::{be64, index};
use crate::error::{Corruption, Unsupported};
use crate::format::Facts;
use crate::medium::Medium;
use crate::qcow2::header::{CORRUPT, DIRTY, Header};
use crate::qcow2::marks::Marks;
use crate::qcow2::shape::refcount;
use crate::qcow2::space::Space;
use crate::qcow2::tables::Tables;
use crate::qcow2::{Planted, Qcow2, Table};

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// As the leaf of a chain that may be written.
    pub writable: bool,
    /// Space to reserve ahead: what a crash can leak. 64 MiB as a rule.
    pub reserve_bytes: u64,
    /// The file can be made longer; a device cannot.
    pub grows: bool,
    /// What it grows by reads as zero, also after a crash.
    pub new_space_is_zero: bool,
}

impl Default for Options {
    /// A file, for reading.
    fn default() -> Options {
        Options { writable: false, reserve_bytes: 64 << 20, grows: true, new_space_is_zero: true }
    }
}

/// What a header says about the last one who had the image open for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// It closed the image.
    NotNeeded,
    /// It did not: `repair` is to be run before the image is opened for writing.
    Needed,
    /// The image's version cannot say. Leaks, if any, do no harm.
    Unknown,
}

impl Repair {
    /// See [`Repair`].
    #[must_use]
    pub fn of(header: &Header) -> Repair {
        match header {
            header if header.incompatible & DIRTY != 0 => Repair::Needed,
            header if header.shape.version < 3 => Repair::Unknown,
            _ => Repair::NotNeeded,
        }
    }
}

impl Qcow2 {
    /// Opens an image. If its header names a parent, that is to be the next image of the chain.
    ///
    /// # Errors
    /// What is wrong or refused. For writing also an image that is marked as corrupt, or as not closed: see [`Repair`].
    pub fn open(medium: &mut dyn Medium, options: Options) -> Result<(Qcow2, Header), Unsupported> {
        let header = Header::read(medium)?;
        if options.writable && header.incompatible & CORRUPT != 0 {
            return Err(Unsupported::Refused(
                "it is marked as corrupt: repair it, or open it for reading only",
            ));
        }
        if options.writable && header.incompatible & DIRTY != 0 {
            return Err(Unsupported::Refused("it was not closed: repair it first"));
        }
        let facts = Facts {
            length_bytes: medium.length_bytes(),
            grows: options.grows,
            new_space_is_zero: options.new_space_is_zero,
        };
        let end = if options.writable && !options.grows { last_used(medium, &header)? } else { 0 };
        let image = Qcow2 {
            shape: header.shape,
            sectors: header.size_bytes / SECTOR_BYTES,
            l1: Table { offset_bytes: header.l1_offset, entries: header.l1_entries.into() },
            reftable: Table {
                offset_bytes: header.reftable_offset,
                entries: u64::from(header.reftable_clusters) * header.shape.cluster_bytes() / 8,
            },
            compression: header.compression,
            has_parent: header.backing.is_some(),
            writable: options.writable,
            corruption: None,
            space: Space::new(&header.shape, facts, end, options.reserve_bytes),
            tables: Tables::default(),
            recent: Cell::default(),
            marks: Marks::new(&header),
            planted: Planted::default(),
        };
        Ok((image, header))
    }

    /// Leaves out orders, for tests that must notice.
    pub fn plant(&mut self, planted: Planted) {
        self.marks.leave_out(planted.no_dirty_bit);
        self.planted = planted;
    }
}

/// On a device, which has no end of its own: the cluster behind the last that is counted.
fn last_used(medium: &mut dyn Medium, header: &Header) -> Result<u64, Unsupported> {
    let (shape, (at, end)) = (header.shape, header.reftable_range());
    let mut table = alloc::vec![0; index(end - at)];
    medium.read(at, &mut table)?;
    let mut block = alloc::vec![0; index(shape.cluster_bytes())];
    for number in (0..(end - at) / 8).rev() {
        let entry = be64(&table, index(number * 8));
        if entry == 0 {
            continue;
        }
        if !entry.is_multiple_of(shape.cluster_bytes()) {
            let at_bytes = at + number * 8;
            return Err(Unsupported::Malformed(Corruption { what: "refcount table entry", at_bytes }));
        }
        medium.read(entry, &mut block)?;
        let per_block = shape.refcounts_per_block();
        let last = (0..per_block).rev().find(|n| refcount(&block, shape.refcount_order, *n) != 0);
        if let Some(last) = last {
            return Ok(number * per_block + last + 1);
        }
    }
    Ok(1)
}
