//! Internal snapshots of an image that nobody has open: listed, made, applied, deleted.
//!
//! Each change is one sector of the header, written when all that it names is durable. Before it refcounts are only raised, behind it
//! only lowered, by counting the references of the image as it will be, or is. So whatever an interruption leaves is a leak, or a
//! mark of being the only one that is missing; the dirty bit is set meanwhile, and [`Fix::Leaks`] mends both.

use alloc::string::String;
use alloc::vec::Vec;

use crate::bytes::{be16, be32, be64, index, narrow, put, wide};
use crate::error::{Corruption, Unsupported};
use crate::medium::Medium;
use crate::qcow2::check::{Fix, check, recount, write_bytes};
use crate::qcow2::header::{CORRUPT, DIRTY, Header, field};
use crate::qcow2::marks::mark_bitmaps;
use crate::qcow2::resize::{find_free, set_counts};
use crate::qcow2::shape::{COPIED, refcount};

/// Bytes of the snapshot table at most.
const TABLE_BYTES_MAX: u64 = 64 << 20;
const SNAPSHOTS_MAX: u32 = 65536;

/// A snapshot, as the image's table describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// A number, as a rule.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Where its L1 table lies.
    pub l1_offset: u64,
    /// Entries of that table.
    pub l1_entries: u32,
    /// Size of the disk then.
    pub disk_bytes: u64,
    /// Bytes of a saved machine's state.
    pub vm_state_bytes: u64,
    /// When it was made: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// The guest's clock then, in nanoseconds.
    pub vm_clock_ns: u64,
    /// Instructions that the guest had executed, where that was recorded.
    pub icount: Option<u64>,
    /// The entry as it stands.
    entry: Vec<u8>,
}

/// Reads the table of snapshots.
///
/// # Errors
/// What is wrong with it, or what the medium says.
pub fn list(medium: &mut dyn Medium, header: &Header) -> Result<Vec<Snapshot>, Unsupported> {
    let mut found = Vec::new();
    let mut at = header.snapshots_offset;
    let end = at.saturating_add(TABLE_BYTES_MAX).min(medium.length_bytes());
    for _ in 0..header.snapshots {
        let wrong = Unsupported::Malformed(Corruption { what: "snapshot table entry", at_bytes: at });
        let mut fixed = [0; 40];
        medium.read(at, &mut fixed)?;
        let (id, name) = (usize::from(be16(&fixed, 12)), usize::from(be16(&fixed, 14)));
        let extra = be32(&fixed, 36) as usize;
        let length = 40 + extra + id + name;
        if extra > 1 << 16 || at.saturating_add(wide(length)) > end {
            return Err(wrong);
        }
        let mut entry = alloc::vec![0; length];
        medium.read(at, &mut entry)?;
        found.push(parse(entry, (extra, id), header));
        at += wide(length.next_multiple_of(8));
    }
    Ok(found)
}

fn parse(entry: Vec<u8>, (extra, id): (usize, usize), header: &Header) -> Snapshot {
    let text = |from: usize, to: usize| {
        String::from_utf8_lossy(entry.get(from..to).unwrap_or_default()).into_owned()
    };
    let names = 40 + extra;
    let old_state = u64::from(be32(&entry, 32));
    Snapshot {
        id: text(names, names + id),
        name: text(names + id, entry.len()),
        l1_offset: be64(&entry, 0),
        l1_entries: be32(&entry, 8),
        disk_bytes: if extra >= 16 { be64(&entry, 48) } else { header.size_bytes },
        vm_state_bytes: if extra >= 8 { be64(&entry, 40) } else { old_state },
        date: (be32(&entry, 16), be32(&entry, 20)),
        vm_clock_ns: be64(&entry, 24),
        icount: (extra >= 24).then(|| be64(&entry, 56)).filter(|count| *count != u64::MAX),
        entry,
    }
}

/// Finds a snapshot by its name, else by its ID.
///
/// # Errors
/// [`Unsupported::Refused`] where there is none.
pub fn find<'a>(snapshots: &'a [Snapshot], which: &str) -> Result<&'a Snapshot, Unsupported> {
    let named = snapshots.iter().find(|snapshot| snapshot.name == which);
    let found = named.or_else(|| snapshots.iter().find(|snapshot| snapshot.id == which));
    found.ok_or(Unsupported::Refused("it has no snapshot of that name or ID"))
}

/// An image in which references are about to change.
struct Change<'a> {
    medium: &'a mut dyn Medium,
    header: Header,
}

impl Change<'_> {
    /// Sees that the image is sound, and marks it as open.
    fn begin(medium: &mut dyn Medium) -> Result<Change<'_>, Unsupported> {
        let header = Header::read(medium)?;
        if header.incompatible & (DIRTY | CORRUPT) != 0 {
            return Err(Unsupported::Refused("it was not closed, or is marked as corrupt: repair it first"));
        }
        if check(medium, Fix::Nothing)?.corruptions > 0 {
            return Err(Unsupported::Refused("its metadata are damaged: repair it first"));
        }
        if header.shape.version >= 3 {
            let bits = header.incompatible | DIRTY;
            write_bytes(medium, field::INCOMPATIBLE as u64, &bits.to_be_bytes())?;
            medium.sync()?;
        }
        Ok(Change { medium, header })
    }

    /// Writes a table to clusters of its own behind the end of the file; nothing names it yet. Says where it lies.
    fn write_table(&mut self, bytes: &[u8]) -> Result<u64, Unsupported> {
        let cluster = self.header.shape.cluster_bytes();
        let count = wide(bytes.len()).div_ceil(cluster).max(1);
        let first = find_free(self.medium, &self.header, count)?;
        let mut whole = bytes.to_vec();
        whole.resize(index(count * cluster), 0);
        self.medium.set_length((first + count) * cluster)?;
        self.medium.write(first * cluster, &whole)?;
        set_counts(self.medium, &self.header, first, count, 1)?;
        Ok(first * cluster)
    }

    fn write_snapshots(&mut self, entries: &[&[u8]]) -> Result<(u32, u64), Unsupported> {
        if entries.is_empty() {
            return Ok((0, 0));
        }
        let mut table = Vec::new();
        for entry in entries {
            table.extend_from_slice(entry);
            table.resize(table.len().next_multiple_of(8), 0);
        }
        if wide(table.len()) > TABLE_BYTES_MAX {
            return Err(Unsupported::Refused("its table of snapshots is full"));
        }
        Ok((narrow(wide(entries.len())), self.write_table(&table)?))
    }

    /// A copy of an L1 table, without marks.
    fn copy_l1(&mut self, offset: u64, entries: u32) -> Result<u64, Unsupported> {
        let mut table = alloc::vec![0; index(u64::from(entries) * 8)];
        self.medium.read(offset, &mut table)?;
        for at in (0..table.len()).step_by(8) {
            let entry = be64(&table, at) & !COPIED;
            put(&mut table, at, &entry.to_be_bytes());
        }
        self.write_table(&table)
    }

    /// Raises refcounts to what they will have to be, and removes marks that will not fit any more.
    fn raise(&mut self, new: &Header) -> Result<(), Unsupported> {
        let report = recount(self.medium, new, Fix::Low)?;
        if report.corruptions > report.corruptions_repaired {
            check(self.medium, Fix::Leaks)?;
            let what = "its refcounts are too narrow for another snapshot: convert it, with refcount_bits=16";
            return Err(Unsupported::Refused(what));
        }
        Ok(())
    }

    /// All that the new header names becomes durable; then its sector is written; then what nothing names any more is given back.
    fn switch(&mut self, new: &Header) -> Result<(), Unsupported> {
        self.medium.sync()?;
        let mut sector = [0; 512];
        self.medium.read(0, &mut sector)?;
        put(&mut sector, field::SIZE, &new.size_bytes.to_be_bytes());
        put(&mut sector, field::L1_ENTRIES, &new.l1_entries.to_be_bytes());
        put(&mut sector, field::L1_OFFSET, &new.l1_offset.to_be_bytes());
        put(&mut sector, field::SNAPSHOTS, &new.snapshots.to_be_bytes());
        put(&mut sector, field::SNAPSHOTS_OFFSET, &new.snapshots_offset.to_be_bytes());
        self.medium.write(0, &sector)?;
        self.medium.sync()?;
        check(self.medium, Fix::Leaks)?;
        Ok(())
    }
}

/// Keeps the disk as it is now under a name. `date` is now: seconds since 1970, and nanoseconds.
///
/// # Errors
/// [`Unsupported::Refused`] for an image that must be repaired first, a name that is too long, too many snapshots, or refcounts
/// without room; and what the medium says.
pub fn create(medium: &mut dyn Medium, name: &str, date: (u32, u32)) -> Result<(), Unsupported> {
    if name.is_empty() || name.len() > 255 {
        return Err(Unsupported::Refused("a snapshot's name has 1 to 255 bytes"));
    }
    let mut change = Change::begin(medium)?;
    let header = change.header.clone();
    let snapshots = list(change.medium, &header)?;
    if header.snapshots >= SNAPSHOTS_MAX {
        return Err(Unsupported::Refused("it has as many snapshots as an image can have"));
    }
    let l1_offset = change.copy_l1(header.l1_offset, header.l1_entries)?;
    let last = snapshots.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok()).max();
    let id = alloc::format!("{}", last.unwrap_or(0).saturating_add(1));
    let mut entry = alloc::vec![0; 56];
    put(&mut entry, 0, &l1_offset.to_be_bytes());
    put(&mut entry, 8, &header.l1_entries.to_be_bytes());
    put(&mut entry, 12, &u16::try_from(id.len()).unwrap_or(0).to_be_bytes());
    put(&mut entry, 14, &u16::try_from(name.len()).unwrap_or(0).to_be_bytes());
    put(&mut entry, 16, &date.0.to_be_bytes());
    put(&mut entry, 20, &date.1.to_be_bytes());
    put(&mut entry, 36, &16_u32.to_be_bytes());
    put(&mut entry, 48, &header.size_bytes.to_be_bytes());
    entry.extend_from_slice(id.as_bytes());
    entry.extend_from_slice(name.as_bytes());
    let mut entries: Vec<&[u8]> = snapshots.iter().map(|snapshot| snapshot.entry.as_slice()).collect();
    entries.push(&entry);
    let (snapshots, snapshots_offset) = change.write_snapshots(&entries)?;
    let new = Header { snapshots, snapshots_offset, ..header };
    change.raise(&new)?;
    change.switch(&new)
}

/// Drops a snapshot, and gives back what only it held.
///
/// # Errors
/// See [`create`].
pub fn delete(medium: &mut dyn Medium, which: &str) -> Result<(), Unsupported> {
    let header = Header::read(medium)?;
    let snapshots = list(medium, &header)?;
    let gone = find(&snapshots, which)?;
    let mut change = Change::begin(medium)?;
    let kept = snapshots.iter().filter(|snapshot| *snapshot != gone);
    let entries: Vec<&[u8]> = kept.map(|snapshot| snapshot.entry.as_slice()).collect();
    let (snapshots, snapshots_offset) = change.write_snapshots(&entries)?;
    change.switch(&Header { snapshots, snapshots_offset, ..header })?;
    give_back(medium)
}

/// Makes the disk what it was when a snapshot was made; its size too. What was written since is lost. Persistent bitmaps are marked
/// as inconsistent.
///
/// # Errors
/// See [`create`].
pub fn apply(medium: &mut dyn Medium, which: &str) -> Result<(), Unsupported> {
    let header = Header::read(medium)?;
    let snapshots = list(medium, &header)?;
    let wanted = find(&snapshots, which)?;
    let (l1_entries, size_bytes) = (wanted.l1_entries, wanted.disk_bytes);
    if size_bytes.div_ceil(header.shape.l2_covers_bytes()) > u64::from(l1_entries) {
        let at_bytes = header.snapshots_offset;
        return Err(Unsupported::Malformed(Corruption {
            what: "snapshot's L1 table is too short",
            at_bytes,
        }));
    }
    let mut change = Change::begin(medium)?;
    if let Some(bitmaps) = header.bitmaps {
        let mut directory = alloc::vec![0; index(bitmaps.directory_bytes.next_multiple_of(512))];
        change.medium.read(bitmaps.directory_offset, &mut directory)?;
        mark_bitmaps(&mut directory, bitmaps)?;
        change.medium.write(bitmaps.directory_offset, &directory)?;
    }
    let l1_offset = change.copy_l1(wanted.l1_offset, l1_entries)?;
    let new = Header { l1_offset, l1_entries, size_bytes, ..header };
    change.raise(&new)?;
    change.switch(&new)?;
    give_back(medium)
}

/// Gives the space of clusters that nothing uses back to the file system.
///
/// # Errors
/// What the medium says.
pub fn give_back(medium: &mut dyn Medium) -> Result<(), Unsupported> {
    let header = Header::read(medium)?;
    let shape = header.shape;
    let (from, to) = header.reftable_range();
    let mut table = alloc::vec![0; index(to - from)];
    medium.read(from, &mut table)?;
    let end = medium.length_bytes() / shape.cluster_bytes();
    let per_block = shape.refcounts_per_block();
    let mut block = alloc::vec![0; index(shape.cluster_bytes())];
    let mut free: Option<(u64, u64)> = None;
    for first in (0..end).step_by(index(per_block)) {
        let at = be64(&table, index(first / per_block * 8));
        block.fill(0);
        if at != 0 && at.is_multiple_of(shape.cluster_bytes()) {
            medium.read(at, &mut block)?;
        }
        for cluster in first..end.min(first + per_block) {
            let is_free = refcount(&block, shape.refcount_order, cluster - first) == 0;
            match (&mut free, is_free) {
                (Some((_, count)), true) => *count += 1,
                (None, true) => free = Some((cluster, 1)),
                (Some((first, count)), false) => {
                    medium.zero(*first << shape.cluster_bits, *count << shape.cluster_bits)?;
                    free = None;
                }
                (None, false) => {}
            }
        }
    }
    if let Some((first, _)) = free {
        medium.set_length(first << shape.cluster_bits)?;
    }
    medium.sync()?;
    Ok(())
}
