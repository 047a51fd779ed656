//! Another virtual size, of an image that nobody has open.

use alloc::vec::Vec;

use crate::bytes::{index, narrow, put};
use crate::error::{Corruption, Failure, Unsupported};
use crate::medium::Medium;
use crate::qcow2::check::{Fix, check, write_bytes};
use crate::qcow2::header::{CORRUPT, DIRTY, Header, field};
use crate::qcow2::marks::mark_bitmaps;
use crate::qcow2::shape::{COPIED, OFFSET, refcount, refcount_bytes};

/// Makes an image longer. What is new reads as what the parent holds there, if the parent is longer than the image was: the caller
/// writes zeroes over that range through a [`crate::Disk`] before anybody else reads it.
///
/// The L1 table grows first (a new one is made durable, then the header switched in one sector), the size last; what an
/// interruption leaves is a leak.
///
/// # Errors
/// [`Unsupported::Refused`] for a smaller size, one that the format does not have, or an image that must be repaired first.
pub fn grow(medium: &mut dyn Medium, size_bytes: u64) -> Result<(), Unsupported> {
    let header = Header::read(medium)?;
    if header.incompatible & (DIRTY | CORRUPT) != 0 {
        return Err(Unsupported::Refused("it was not closed, or is marked as corrupt: repair it first"));
    }
    if !size_bytes.is_multiple_of(512) || size_bytes > 1 << 62 {
        return Err(Unsupported::Refused("a size is a multiple of 512"));
    }
    if size_bytes < header.size_bytes {
        return Err(Unsupported::Refused("it would become smaller, which is not supported"));
    }
    if size_bytes == header.size_bytes {
        return Ok(());
    }
    // A bitmap that is shorter than the disk makes qemu refuse the image; one that is in use is only not to be trusted.
    if let Some(bitmaps) = header.trusted_bitmaps() {
        let mut directory = alloc::vec![0; index(bitmaps.directory_bytes.next_multiple_of(512))];
        medium.read(bitmaps.directory_offset, &mut directory)?;
        mark_bitmaps(&mut directory, bitmaps)?;
        medium.write(bitmaps.directory_offset, &directory)?;
        medium.sync()?;
    }
    let entries = size_bytes.div_ceil(header.shape.l2_covers_bytes());
    if entries > u64::from(header.l1_entries) {
        if entries * 8 > 32 << 20 {
            return Err(Unsupported::Refused("its L1 table would be too long: use larger clusters"));
        }
        grow_l1(medium, &header, entries)?;
    }
    write_bytes(medium, field::SIZE as u64, &size_bytes.to_be_bytes())?;
    medium.sync()?;
    Ok(())
}

/// Why an image cannot be made shorter, if it cannot.
///
/// # Errors
/// What is wrong with it, or what the medium says.
pub fn may_shrink(medium: &mut dyn Medium) -> Result<Option<&'static str>, Unsupported> {
    let header = Header::read(medium)?;
    Ok(match &header {
        header if header.incompatible & (DIRTY | CORRUPT) != 0 => {
            Some("it was not closed, or is marked as corrupt: repair it first")
        }
        header if header.snapshots > 0 => {
            Some("it has internal snapshots, which are longer: delete them first")
        }
        header if header.bitmaps.is_some() => {
            Some("it has persistent bitmaps, which are longer: remove them first")
        }
        _ => None,
    })
}

/// Makes an image shorter that [`may_shrink`]. What lies behind the new end was discarded by the caller, through a [`crate::Disk`].
///
/// # Errors
/// [`Unsupported::Refused`] for a size that is not smaller; what the medium says.
pub fn shrink(medium: &mut dyn Medium, size_bytes: u64) -> Result<(), Unsupported> {
    let header = Header::read(medium)?;
    if !size_bytes.is_multiple_of(512) || size_bytes > header.size_bytes {
        return Err(Unsupported::Refused("a smaller size is a multiple of 512"));
    }
    write_bytes(medium, field::SIZE as u64, &size_bytes.to_be_bytes())?;
    medium.sync()?;
    Ok(())
}

/// Within the clusters that the table has, it only has to be counted longer.
fn grow_l1(medium: &mut dyn Medium, header: &Header, entries: u64) -> Result<(), Unsupported> {
    let cluster = header.shape.cluster_bytes();
    let (at, end) = header.l1_range();
    let room = (end - at) / 8;
    if entries <= room {
        let used = u64::from(header.l1_entries) * 8;
        zero_part(medium, at + used, end - at - used)?;
        medium.sync()?;
        write_bytes(medium, field::L1_ENTRIES as u64, &narrow(entries).to_be_bytes())?;
        medium.sync()?;
        return Ok(());
    }
    let count = (entries * 8).div_ceil(cluster);
    let first = find_free(medium, header, count)?;
    let mut table = alloc::vec![0; index(u64::from(header.l1_entries) * 8)];
    medium.read(at, &mut table)?;
    table.resize(index(count * cluster), 0);
    medium.set_length((first + count) * cluster)?;
    medium.write(first * cluster, &table)?;
    set_counts(medium, header, first, count, 1)?;
    medium.sync()?;
    let mut fields = Vec::from(narrow(entries).to_be_bytes());
    fields.extend_from_slice(&(first * cluster).to_be_bytes());
    write_bytes(medium, field::L1_ENTRIES as u64, &fields)?;
    medium.sync()?;
    set_counts(medium, header, at / cluster, (end - at) / cluster, 0)?;
    Ok(())
}

/// Zeroes a part of a cluster, sector by sector.
fn zero_part(medium: &mut dyn Medium, mut at: u64, mut length: u64) -> Result<(), Failure> {
    while length > 0 {
        let step = (512 - at % 512).min(length);
        let zeroes = [0; 512];
        write_bytes(medium, at, zeroes.get(..index(step)).unwrap_or_default())?;
        at += step;
        length -= step;
    }
    Ok(())
}

/// Clusters in a row behind the end of the file that existing blocks count, or for which blocks can be made.
pub(super) fn find_free(medium: &mut dyn Medium, header: &Header, count: u64) -> Result<u64, Unsupported> {
    let shape = header.shape;
    let per_block = shape.refcounts_per_block();
    let cluster = shape.cluster_bytes();
    let mut first = medium.length_bytes().div_ceil(cluster);
    let (at, end) = header.reftable_range();
    loop {
        let last = first + count - 1;
        if last / per_block >= (end - at) / 8 {
            return Err(Unsupported::Refused("its refcount table is full: convert it"));
        }
        let missing = (first / per_block..=last / per_block).find_map(|number| {
            match block_at(medium, header, number) {
                Ok(0) => Some(Ok(number)),
                Ok(_) => None,
                Err(why) => Some(Err(why)),
            }
        });
        let Some(number) = missing.transpose()? else { return Ok(first) };
        // A block that counts itself, at the first cluster that it can.
        let place = first.max(number * per_block);
        let mut block = alloc::vec![0; index(cluster)];
        let (within, bytes, length) = refcount_bytes(&block, shape.refcount_order, place % per_block, 1);
        put(&mut block, within, bytes.get(..length).unwrap_or_default());
        medium.set_length((place + 1) * cluster)?;
        medium.write(place * cluster, &block)?;
        medium.sync()?;
        write_bytes(medium, at + number * 8, &(place * cluster).to_be_bytes())?;
        first = place + 1;
    }
}

/// Where a refcount block lies, or 0: in the file, and not over what is always there.
fn block_at(medium: &mut dyn Medium, header: &Header, number: u64) -> Result<u64, Unsupported> {
    let at_bytes = header.reftable_offset + number * 8;
    let mut entry = [0; 8];
    medium.read(at_bytes, &mut entry)?;
    let (from, cluster) = (u64::from_be_bytes(entry), header.shape.cluster_bytes());
    if from == 0 {
        return Ok(0);
    }
    let to = from.saturating_add(cluster);
    let always = [(0, cluster), header.l1_range(), header.reftable_range()];
    let over = always.iter().any(|range| from < range.1 && range.0 < to);
    if over || !from.is_multiple_of(cluster) || to > medium.length_bytes().next_multiple_of(cluster) {
        return Err(Unsupported::Malformed(Corruption { what: "refcount table entry", at_bytes }));
    }
    Ok(from)
}

pub(super) fn set_counts(
    medium: &mut dyn Medium,
    header: &Header,
    first: u64,
    count: u64,
    value: u64,
) -> Result<(), Unsupported> {
    let shape = header.shape;
    let per_block = shape.refcounts_per_block();
    let mut block = alloc::vec![0; index(shape.cluster_bytes())];
    for cluster in first..first + count {
        let at = block_at(medium, header, cluster / per_block)?;
        if at == 0 {
            continue;
        }
        medium.read(at, &mut block)?;
        let (within, bytes, length) =
            refcount_bytes(&block, shape.refcount_order, cluster % per_block, value);
        put(&mut block, within, bytes.get(..length).unwrap_or_default());
        medium.write(at, &block)?;
    }
    Ok(())
}

/// Cuts what lies behind the last cluster in use off a file, after repairing leaks. Says how long it is then.
///
/// # Errors
/// See [`check`].
pub fn trim(medium: &mut dyn Medium) -> Result<u64, Unsupported> {
    let report = check(medium, Fix::Leaks)?;
    let header = Header::read(medium)?;
    let shape = header.shape;
    let per_block = shape.refcounts_per_block();
    let mut block = alloc::vec![0; index(shape.cluster_bytes())];
    let (mut end, mut loaded) = (report.clusters, u64::MAX);
    while end > 1 {
        let last = end - 1;
        if last / per_block != loaded {
            loaded = last / per_block;
            let mut entry = [0; 8];
            medium.read(header.reftable_offset + loaded * 8, &mut entry)?;
            block.fill(0);
            if entry != [0; 8] && loaded * 8 < header.reftable_range().1 - header.reftable_offset {
                medium.read(u64::from_be_bytes(entry) & (OFFSET | COPIED), &mut block)?;
            }
        }
        if refcount(&block, shape.refcount_order, last % per_block) != 0 {
            break;
        }
        end = last;
    }
    medium.set_length(end * shape.cluster_bytes())?;
    medium.sync()?;
    Ok(end * shape.cluster_bytes())
}
