//! What an image holds, from end to end: for `map` and `info`, without a cache and with little memory.

use alloc::vec::Vec;

use crate::bytes::{be64, index};
use crate::error::{Corruption, Unsupported};
use crate::map::{Cursor, for_each_run};
use crate::medium::Medium;
use crate::qcow2::header::Header;
use crate::qcow2::shape::{COPIED, Cluster, OFFSET, READS_ZERO, Shape};
use crate::{Extent, Place, Run, SECTOR_BYTES};

/// An L1 table, and the L2 table that was looked at last.
#[derive(Debug)]
pub struct Tree {
    shape: Shape,
    sectors: u64,
    l1_offset: u64,
    l1: Vec<u8>,
    l2: Vec<u8>,
    loaded: u64,
    /// Behind the file's last cluster.
    end_bytes: u64,
}

impl Tree {
    /// The disk as it is.
    ///
    /// # Errors
    /// What the medium says.
    pub fn active(medium: &mut dyn Medium, header: &Header) -> Result<Tree, Unsupported> {
        Tree::of(medium, header.shape, (header.l1_offset, header.l1_entries), header.size_bytes)
    }

    /// A disk by its L1 table (place and entries) and size: the active one's, or a snapshot's.
    ///
    /// # Errors
    /// What the medium says; a table that is too short.
    pub fn of(
        medium: &mut dyn Medium,
        shape: Shape,
        (l1_offset, l1_entries): (u64, u32),
        size_bytes: u64,
    ) -> Result<Tree, Unsupported> {
        let length = u64::from(l1_entries) * 8;
        if length > 32 << 20 || size_bytes.div_ceil(shape.l2_covers_bytes()) > u64::from(l1_entries) {
            let what = "L1 table too short or too long for the virtual size";
            return Err(Unsupported::Malformed(Corruption { what, at_bytes: l1_offset }));
        }
        let end_bytes = medium.length_bytes().next_multiple_of(shape.cluster_bytes());
        let mut l1 = alloc::vec![0; index(length)];
        medium.read(l1_offset, &mut l1)?;
        let l2 = alloc::vec![0; index(shape.cluster_bytes())];
        let sectors = size_bytes / SECTOR_BYTES;
        Ok(Tree { shape, sectors, l1_offset, l1, l2, loaded: 0, end_bytes })
    }

    /// The L2 table of the L1 entry `number`; 0 for none.
    fn table(&self, number: u64) -> Result<u64, Corruption> {
        let at_bytes = self.l1_offset + number * 8;
        let entry = be64(&self.l1, index(number * 8));
        let table = entry & OFFSET;
        let bad = entry & !(OFFSET | COPIED) != 0
            || !table.is_multiple_of(self.shape.cluster_bytes())
            || table >= self.end_bytes;
        if bad { Err(Corruption { what: "L1 entry", at_bytes }) } else { Ok(table) }
    }

    /// Bytes of the disk, from the L1 entry `number` on, for which there is no L2 table.
    fn hole(&self, mut number: u64) -> u64 {
        let from = number;
        let entries = crate::bytes::wide(self.l1.len() / 8);
        while number < entries && be64(&self.l1, index(number * 8)) == 0 {
            number += 1;
        }
        (number - from).max(1) * self.shape.l2_covers_bytes()
    }

    fn cluster(&self, number: u64) -> Result<Cluster, Corruption> {
        let at = index(number * self.shape.entry_bytes());
        let bitmap = if self.shape.extended { be64(&self.l2, at + 8) } else { 0 };
        let at_bytes = self.loaded + crate::bytes::wide(at);
        let cluster = self.shape.cluster(be64(&self.l2, at), bitmap, at_bytes)?;
        let (from, length) = match cluster {
            Cluster::Plain { host: 0, .. } => return Ok(cluster),
            Cluster::Plain { host, .. } => (host, self.shape.cluster_bytes()),
            Cluster::Packed { offset_bytes, bytes } => (offset_bytes, u64::from(bytes)),
        };
        let inside = from >= self.shape.cluster_bytes() && from.saturating_add(length) <= self.end_bytes;
        let what = "offset beyond the end of the file, or within the header";
        if inside { Ok(cluster) } else { Err(Corruption { what, at_bytes }) }
    }

    /// How many entries from `number` on, `number` among them, go on where a whole cluster with this place ends.
    fn alike(&self, number: u64, place: &Place) -> u64 {
        let rest = self.l2.get(index(number * 8)..).unwrap_or_default().chunks_exact(8);
        let words = rest.map(|word| be64(word, 0));
        let count = match place {
            Place::Data { .. } => {
                let first = be64(&self.l2, index(number * 8)) & !COPIED;
                let cluster = self.shape.cluster_bytes();
                let limit = self.end_bytes;
                let next = core::iter::successors(Some(first), |word| word.checked_add(cluster));
                words.zip(next).take_while(|(word, next)| word & !COPIED == *next && *next < limit).count()
            }
            Place::Zero => words.take_while(|word| word & !(OFFSET | COPIED) == READS_ZERO).count(),
            Place::Parent => words.take_while(|word| *word == 0).count(),
            Place::Compressed { .. } => 1,
        };
        crate::bytes::wide(count).max(1)
    }
}

impl Cursor for Tree {
    fn run(&mut self, medium: &mut dyn Medium, extent: Extent) -> Result<Run, Unsupported> {
        let guest = extent.sector.saturating_mul(SECTOR_BYTES);
        if extent.sectors == 0 || extent.end() > self.sectors {
            return Err(Unsupported::Io(0));
        }
        let (covers, cluster) = (self.shape.l2_covers_bytes(), self.shape.cluster_bytes());
        let bounded = |place, bytes: u64| Run { place, sectors: (bytes / SECTOR_BYTES).min(extent.sectors) };
        let table = self.table(guest / covers).map_err(Unsupported::Malformed)?;
        if table == 0 {
            return Ok(bounded(Place::Parent, self.hole(guest / covers) - guest % covers));
        }
        if table != self.loaded {
            self.loaded = 0;
            medium.read(table, &mut self.l2)?;
            self.loaded = table;
        }
        let number = guest % covers / cluster;
        let within = guest % cluster;
        match self.cluster(number).map_err(Unsupported::Malformed)? {
            Cluster::Packed { offset_bytes, bytes } => {
                let skip_bytes = crate::bytes::narrow(within);
                Ok(bounded(Place::Compressed { offset_bytes, bytes, skip_bytes }, cluster - within))
            }
            Cluster::Plain { host, data, zero, .. } => {
                let unit = self.shape.subcluster_bytes();
                let mut bit = within / unit;
                let state = |bit: u64| (data >> bit & 1, zero >> bit & 1);
                let first = state(bit);
                let place = match first {
                    (1, _) => Place::Data { offset_bytes: host + within },
                    (_, 1) => Place::Zero,
                    _ => Place::Parent,
                };
                if !self.shape.extended {
                    return Ok(bounded(place, self.alike(number, &place) * cluster - within));
                }
                while bit < u64::from(self.shape.subclusters()) && state(bit) == first {
                    bit += 1;
                }
                Ok(bounded(place, bit * unit - within))
            }
        }
    }
}

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
    let mut tree = Tree::active(medium, header)?;
    let sectors = tree.sectors;
    for_each_run(&mut tree, medium, sectors, found)
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
