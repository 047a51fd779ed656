//! What a disk must hold, as far as its guest can know.
//!
//! Every write stamps each of its sectors with a number of its own, and a sector's 512 bytes follow from stamp and
//! sector number. So whatever is read tells which write it came from, and nothing reads like zeroes, holes or another
//! sector by chance.

use std::collections::{BTreeMap, BTreeSet};

/// Spreads every bit of `z` over the result.
pub fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The stamp of a sector whose content was let go: it reads as zeroes, or as it was.
pub const ZEROES: u64 = u64::MAX;

/// The bytes of `sector` after the write `stamp`.
pub fn sector_bytes(stamp: u64, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    if stamp == ZEROES {
        return bytes;
    }
    let (words, _) = bytes.as_chunks_mut::<8>();
    let seed = mix(stamp ^ mix(sector));
    for (n, word) in words.iter_mut().enumerate() {
        let value = if n == 0 { stamp } else { seed.wrapping_add(mix(n as u64)) };
        *word = value.to_le_bytes();
    }
    bytes
}

/// Which write `bytes` of `sector` came from, if they are whole.
pub fn stamp_of(bytes: &[u8; 512], sector: u64) -> Option<u64> {
    if *bytes == [0; 512] {
        return Some(ZEROES);
    }
    let stamp = u64::from_le_bytes(bytes[..8].try_into().ok()?);
    (sector_bytes(stamp, sector) == *bytes).then_some(stamp)
}

/// A sector as the guest knows it.
#[derive(Clone, Debug)]
struct Known {
    /// Stamps that a read may find now.
    now: Vec<u64>,
    /// Stamps that may survive power loss, oldest first.
    survivors: Vec<u64>,
    writing: bool,
    /// The last read that began before the last write was answered: it may have seen what was there before.
    read_before: u64,
}

/// The sectors that a flush will have made durable: sector, and the newest write that it covers.
pub type Covered = Vec<(u64, u64)>;

/// A disk as the guest knows it.
#[derive(Clone, Debug)]
pub struct DiskModel {
    pub image: usize,
    pub read_only: bool,
    sectors: Vec<Known>,
    stamps: u64,
    /// Acknowledged since the last flush that covers it: sector → stamp.
    dirty: BTreeMap<u64, u64>,
    /// Reads in flight: what each of their sectors may show.
    reads: BTreeMap<u64, (u64, Vec<BTreeSet<u64>>)>,
    reads_begun: u64,
}

impl DiskModel {
    pub fn new(image: usize, sectors: usize, read_only: bool) -> DiskModel {
        let known = Known { now: vec![0], survivors: vec![0], writing: false, read_before: 0 };
        DiskModel {
            image,
            read_only,
            sectors: vec![known; sectors],
            stamps: 0,
            dirty: BTreeMap::new(),
            reads: BTreeMap::new(),
            reads_begun: 0,
        }
    }

    pub fn size(&self) -> u64 {
        self.sectors.len() as u64
    }

    fn range(&mut self, sector: u64, count: u64) -> &mut [Known] {
        &mut self.sectors[sector as usize..(sector + count) as usize]
    }

    /// Begins a write, unless another one of these sectors is in flight: a guest never does that. Answers with the
    /// first of its stamps, one for each sector.
    pub fn write_begins(&mut self, sector: u64, count: u64) -> Option<u64> {
        if self.range(sector, count).iter().any(|known| known.writing) {
            return None;
        }
        let first = self.stamps + 1;
        self.stamps += count;
        for (n, known) in self.range(sector, count).iter_mut().enumerate() {
            known.writing = true;
            known.now.push(first + n as u64);
            known.survivors.push(first + n as u64);
        }
        for (from, allowed) in self.reads.values_mut() {
            for n in 0..count {
                let at = (sector + n).checked_sub(*from).and_then(|at| allowed.get_mut(at as usize));
                if let Some(allowed) = at {
                    allowed.insert(first + n);
                }
            }
        }
        Some(first)
    }

    /// A write was answered. After an error each sector may hold the old or the new.
    pub fn write_ends(&mut self, sector: u64, count: u64, first: u64, okay: bool) {
        let reads_begun = self.reads_begun;
        for (n, known) in self.range(sector, count).iter_mut().enumerate() {
            known.writing = false;
            known.read_before = reads_begun;
            if okay {
                known.now = vec![first + n as u64];
            }
        }
        if okay {
            self.dirty.extend((0..count).map(|n| (sector + n, first + n)));
        }
    }

    /// Begins a discard, unless a write of one of these sectors is in flight. Only whole units may change.
    pub fn discard_begins(&mut self, sector: u64, count: u64) -> bool {
        if self.range(sector, count).iter().any(|known| known.writing) {
            return false;
        }
        let (from, to) = super::storage::UNIT.within(sector * 512, count * 512);
        let units = from / 512..to / 512;
        for (n, known) in self.range(sector, count).iter_mut().enumerate() {
            known.writing = true;
            if units.contains(&(sector + n as u64)) {
                known.now.push(ZEROES);
                known.survivors.push(ZEROES);
            }
        }
        for (first, allowed) in self.reads.values_mut() {
            for sector in units.clone() {
                let at = sector.checked_sub(*first).and_then(|at| allowed.get_mut(at as usize));
                if let Some(allowed) = at {
                    allowed.insert(ZEROES);
                }
            }
        }
        true
    }

    /// A discard was answered: each sector may hold what it held, or nothing.
    pub fn discard_ends(&mut self, sector: u64, count: u64) {
        let reads_begun = self.reads_begun;
        for known in self.range(sector, count) {
            known.writing = false;
            known.read_before = reads_begun;
        }
    }

    /// What an answered request has written is durable with its answer.
    pub fn written_through(&mut self, sector: u64, count: u64, first: u64) {
        let covered = (0..count).map(|n| (sector + n, first + n)).collect();
        self.flush_ends(&covered);
    }

    pub fn read_begins(&mut self, sector: u64, count: u64) -> u64 {
        let allowed = self.range(sector, count).iter().map(|known| known.now.iter().copied().collect());
        let allowed = allowed.collect();
        self.reads_begun += 1;
        self.reads.insert(self.reads_begun, (sector, allowed));
        self.reads_begun
    }

    /// A read was answered with these bytes, or without (`None`).
    pub fn read_ends(&mut self, read: u64, bytes: Option<&[u8]>) -> Result<(), String> {
        let (first, allowed) = self.reads.remove(&read).unwrap();
        let Some(bytes) = bytes else { return Ok(()) };
        for ((n, allowed), bytes) in allowed.iter().enumerate().zip(bytes.as_chunks::<512>().0) {
            let sector = first + n as u64;
            match stamp_of(bytes, sector) {
                Some(stamp) if allowed.contains(&stamp) => {
                    let known = &mut self.sectors[sector as usize];
                    // What a failed write left is known once it was read.
                    if !known.writing && read > known.read_before && known.now.contains(&stamp) {
                        known.now = vec![stamp];
                    }
                }
                Some(stamp) => {
                    return Err(format!("sector {sector} read as write {stamp}, not one of {allowed:?}"));
                }
                None => {
                    let head = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                    return Err(format!("sector {sector} read as junk ({head:#x}), not one of {allowed:?}"));
                }
            }
        }
        Ok(())
    }

    /// A flush is sent: it covers what was acknowledged until now.
    pub fn flush_begins(&self) -> Covered {
        self.dirty.iter().map(|(sector, stamp)| (*sector, *stamp)).collect()
    }

    /// A flush was acknowledged: nothing older than what it covers survives from now on.
    pub fn flush_ends(&mut self, covered: &Covered) {
        for (sector, stamp) in covered {
            let survivors = &mut self.sectors[*sector as usize].survivors;
            if let Some(at) = survivors.iter().position(|survivor| survivor == stamp) {
                survivors.drain(..at);
            }
            if self.dirty.get(sector) == Some(stamp) {
                self.dirty.remove(sector);
            }
        }
    }

    /// Checks a sector of the medium after power loss.
    pub fn check_survivor(&self, sector: u64, bytes: &[u8; 512], torn: bool) -> Result<(), String> {
        let survivors = &self.sectors[sector as usize].survivors;
        if stamp_of(bytes, sector).is_some_and(|stamp| survivors.contains(&stamp)) {
            return Ok(());
        }
        let versions: Vec<_> = survivors.iter().map(|stamp| sector_bytes(*stamp, sector)).collect();
        let mixed =
            (0..512).step_by(8).all(|at| versions.iter().any(|whole| whole[at..at + 8] == bytes[at..at + 8]));
        if torn && versions.len() > 1 && mixed {
            return Ok(());
        }
        let found = stamp_of(bytes, sector);
        Err(format!("after power loss sector {sector} holds {found:?}, not one of {survivors:?}"))
    }

    /// Checks a sector of the medium while no request is in flight.
    pub fn check_now(&self, sector: u64, bytes: &[u8; 512]) -> Result<(), String> {
        let now = &self.sectors[sector as usize].now;
        match stamp_of(bytes, sector) {
            Some(stamp) if now.contains(&stamp) => Ok(()),
            found => Err(format!("at rest sector {sector} holds {found:?}, not one of {now:?}")),
        }
    }
}
