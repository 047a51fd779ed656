//! What an image holds, from end to end: for `map` and `info`, without a cache and with little memory.

use alloc::vec::Vec;

use crate::bytes::{be64, index};
use crate::error::Unsupported;
use crate::medium::Medium;
use crate::qcow2::header::Header;
use crate::qcow2::shape::{Cluster, OFFSET};
use crate::{Place, Run, SECTOR_BYTES};

/// Calls `found` for every run of the disk in turn, as long as possible: with its first sector, and where it lies. Compressed
/// clusters come one by one.
///
/// # Errors
/// What is wrong with the image, or what the medium says.
pub fn map(
    medium: &mut dyn Medium,
    header: &Header,
    found: &mut dyn FnMut(u64, Run),
) -> Result<(), Unsupported> {
    let shape = header.shape;
    let sectors = header.size_bytes / SECTOR_BYTES;
    let mut table = alloc::vec![0; index(u64::from(header.l1_entries) * 8)];
    medium.read(header.l1_offset, &mut table)?;
    let mut joined = Joined { from: 0, run: Run { place: Place::Parent, sectors: 0 }, end: sectors };
    let mut l2: Vec<u8> = alloc::vec![0; index(shape.cluster_bytes())];
    let covers = shape.l2_covers_bytes() / SECTOR_BYTES;
    for (number, entry) in (0..).zip(table.chunks_exact(8).map(|entry| be64(entry, 0))) {
        let first: u64 = number * covers;
        if first >= sectors {
            break;
        }
        let at = entry & OFFSET;
        if at == 0 {
            joined.add(Place::Parent, covers, found);
            continue;
        }
        medium.read(at, &mut l2)?;
        for cluster in 0..shape.l2_entries() {
            if first + cluster * shape.cluster_sectors() >= sectors {
                break;
            }
            let within = index(cluster * shape.entry_bytes());
            let word = be64(&l2, within);
            let bitmap = if shape.extended { be64(&l2, within + 8) } else { 0 };
            let entry_at = at + cluster * shape.entry_bytes();
            match shape.cluster(word, bitmap, entry_at).map_err(Unsupported::Malformed)? {
                Cluster::Packed { offset_bytes, bytes } => {
                    let place = Place::Compressed { offset_bytes, bytes, skip_bytes: 0 };
                    joined.add(place, shape.cluster_sectors(), found);
                }
                Cluster::Plain { host, data, zero, .. } => {
                    let unit = shape.subcluster_bytes();
                    for bit in 0..u64::from(shape.subclusters()) {
                        let place = match (data >> bit & 1, zero >> bit & 1) {
                            (1, _) => Place::Data { offset_bytes: host + bit * unit },
                            (_, 1) => Place::Zero,
                            _ => Place::Parent,
                        };
                        joined.add(place, unit / SECTOR_BYTES, found);
                    }
                }
            }
        }
    }
    joined.end(found);
    Ok(())
}

/// Joins runs that continue each other.
struct Joined {
    from: u64,
    run: Run,
    end: u64,
}

impl Joined {
    fn add(&mut self, place: Place, sectors: u64, found: &mut dyn FnMut(u64, Run)) {
        let length = self.run.sectors;
        let continues = match (self.run.place, place) {
            (Place::Data { offset_bytes }, Place::Data { offset_bytes: next }) => {
                offset_bytes + length * SECTOR_BYTES == next
            }
            (Place::Zero, Place::Zero) | (Place::Parent, Place::Parent) => true,
            _ => false,
        };
        if continues && length > 0 {
            self.run.sectors += sectors;
            return;
        }
        self.end(found);
        self.run = Run { place, sectors };
    }

    fn end(&mut self, found: &mut dyn FnMut(u64, Run)) {
        let sectors = self.run.sectors.min(self.end.saturating_sub(self.from));
        if sectors > 0 {
            found(self.from, Run { sectors, ..self.run });
        }
        self.from += self.run.sectors;
        self.run.sectors = 0;
    }
}

/// Bytes of the disk by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In clusters of the image's own.
    pub data_bytes: u64,
    /// In compressed clusters.
    pub packed_bytes: u64,
    /// Known to be zero.
    pub zero_bytes: u64,
}

/// Sums up what an image holds.
///
/// # Errors
/// See [`map`].
pub fn usage(medium: &mut dyn Medium, header: &Header) -> Result<Usage, Unsupported> {
    let mut sum = Usage::default();
    map(medium, header, &mut |_, run| {
        let bytes = run.sectors * SECTOR_BYTES;
        match run.place {
            Place::Data { .. } => sum.data_bytes += bytes,
            Place::Compressed { .. } => sum.packed_bytes += bytes,
            Place::Zero => sum.zero_bytes += bytes,
            Place::Parent => {}
        }
    })?;
    Ok(sum)
}
