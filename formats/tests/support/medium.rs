//! A file or device in memory that can crash: what was not synced survives sector by sector, or not. Space that nobody wrote is garbage.

use formats::{Failure, Medium};

use super::rng::Rng;

pub const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    /// Zeroes, or garbage from a seed.
    Fill(u64, u64, Option<u64>),
    Length(u64, bool),
}

#[derive(Clone, Debug)]
pub struct SimMedium {
    pub now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    pub grows: bool,
    pub new_space_is_zero: bool,
    /// Bytes that a file may have at most.
    pub full_at: u64,
    garbage: u64,
    pub counters: Counters,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub writes: u64,
    pub syncs: u64,
}

fn garble(bytes: &mut [u8], at: u64, seed: u64) {
    for (number, word) in bytes.chunks_mut(8).enumerate() {
        let value = (0xdead_0000_0000_0000 | (seed << 32) | (at / 8 + number as u64)).to_be_bytes();
        word.copy_from_slice(&value[..word.len()]);
    }
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>, mut keep: impl FnMut() -> bool) {
        match self {
            Change::Write(at, data) => {
                for (number, sector) in data.chunks(SECTOR).enumerate() {
                    let from = *at as usize + number * SECTOR;
                    if keep() && from + sector.len() <= bytes.len() {
                        bytes[from..from + sector.len()].copy_from_slice(sector);
                    }
                }
            }
            Change::Fill(at, length, garbage) => {
                let end = ((at + length) as usize).min(bytes.len());
                for from in (*at as usize..end).step_by(SECTOR) {
                    if keep() {
                        let to = (from + SECTOR).min(end);
                        match garbage {
                            None => bytes[from..to].fill(0),
                            Some(seed) => garble(&mut bytes[from..to], from as u64, *seed),
                        }
                    }
                }
            }
            Change::Length(length, zero) => {
                if keep() {
                    let old = bytes.len();
                    bytes.resize(*length as usize, 0);
                    if !zero && *length as usize > old {
                        garble(&mut bytes[old..], old as u64, 77);
                    }
                }
            }
        }
    }
}

impl SimMedium {
    pub fn file() -> SimMedium {
        SimMedium {
            now: Vec::new(),
            durable: Vec::new(),
            pending: Vec::new(),
            grows: true,
            new_space_is_zero: true,
            full_at: u64::MAX,
            garbage: 1,
            counters: Counters::default(),
        }
    }

    pub fn device(length: u64) -> SimMedium {
        let mut bytes = vec![0; length as usize];
        garble(&mut bytes, 0, 3);
        let durable = bytes.clone();
        SimMedium { now: bytes, durable, grows: false, new_space_is_zero: false, ..SimMedium::file() }
    }

    pub fn with_bytes(&self, bytes: Vec<u8>) -> SimMedium {
        SimMedium { durable: bytes.clone(), now: bytes, pending: Vec::new(), ..*self }
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.now, || true);
        self.pending.push(change);
    }

    pub fn punch(&mut self, at: u64, length: u64) {
        self.garbage += 1;
        let garbage = Some(self.garbage);
        self.change(Change::Fill(at, length, garbage));
    }

    /// A sync begins: what it covers.
    pub fn sync_begins(&self) -> usize {
        self.pending.len()
    }

    /// It ends. At most one is under way.
    pub fn sync_ends(&mut self, covered: usize) {
        self.counters.syncs += 1;
        let rest = self.pending.split_off(covered.min(self.pending.len()));
        for change in std::mem::replace(&mut self.pending, rest) {
            change.apply(&mut self.durable, || true);
        }
    }

    pub fn unsynced(&self) -> usize {
        self.pending.len()
    }

    /// What may be there after a crash now: of what was not synced, any subset of sectors. `half_done` are writes that had begun.
    pub fn crash(&self, rng: &mut Rng, half_done: &[(u64, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        // All, none, most, few: uniform coins alone hardly ever keep or lose a whole table.
        let mode = rng.below(4);
        let keep = |rng: &mut Rng| match mode {
            0 => !rng.one_in(8),
            1 => rng.one_in(8),
            _ => rng.one_in(2),
        };
        for change in &self.pending {
            let whole = if rng.one_in(2) { Some(keep(rng)) } else { None };
            change.apply(&mut bytes, || whole.unwrap_or_else(|| keep(rng)));
        }
        for (at, data) in half_done {
            Change::Write(*at, data.clone()).apply(&mut bytes, || keep(rng));
        }
        bytes
    }
}

impl Medium for SimMedium {
    fn length_bytes(&mut self) -> u64 {
        self.now.len() as u64
    }

    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        bytes.fill(0);
        let from = (offset_bytes as usize).min(self.now.len());
        let length = bytes.len().min(self.now.len() - from);
        bytes[..length].copy_from_slice(&self.now[from..from + length]);
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.counters.writes += 1;
        let end = offset_bytes + bytes.len() as u64;
        if end > self.now.len() as u64 {
            self.set_length(end)?;
        }
        self.change(Change::Write(offset_bytes, bytes.to_vec()));
        Ok(())
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        self.change(Change::Fill(offset_bytes, length_bytes, None));
        Ok(())
    }

    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        if !self.grows {
            return if length_bytes <= self.now.len() as u64 { Ok(()) } else { Err(Failure::NoSpace) };
        }
        if length_bytes > self.full_at && length_bytes > self.now.len() as u64 {
            return Err(Failure::NoSpace);
        }
        self.change(Change::Length(length_bytes, self.new_space_is_zero));
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        let covered = self.sync_begins();
        self.sync_ends(covered);
        Ok(())
    }
}
