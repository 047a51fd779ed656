//! A file or device of sectors that crashes: what was not synced survives sector by sector, or not. Only sectors that were written take
//! memory, and looking at a crash copies nothing.

use std::collections::BTreeMap;
use std::rc::Rc;

use formats::{Failure, Medium};

use crate::support::driver::SlowSync;
use crate::support::rng::Rng;

pub type Sector = [u8; 512];

#[derive(Clone, Debug)]
enum Cell {
    Zero,
    Garbage(u64),
    Bytes(Rc<Sector>),
}

impl Cell {
    fn bytes(&self, sector: u64) -> Sector {
        match self {
            Cell::Zero => [0; 512],
            Cell::Garbage(seed) => {
                let mut out = [0; 512];
                let value = (0xdead_0000_0000_0000 | (seed << 32) | sector).to_be_bytes();
                out.chunks_mut(8).for_each(|word| word.copy_from_slice(&value));
                out
            }
            Cell::Bytes(bytes) => **bytes,
        }
    }
}

/// Sectors, what those that were never written hold, and the length in bytes.
#[derive(Clone, Debug)]
struct Image {
    cells: BTreeMap<u64, Cell>,
    new: Cell,
    length: u64,
}

impl Image {
    fn get(&self, sector: u64) -> Cell {
        if sector * 512 >= self.length {
            Cell::Zero
        } else {
            self.cells.get(&sector).unwrap_or(&self.new).clone()
        }
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Write(first, cells) => {
                for (sector, cell) in (*first..).zip(cells) {
                    if sector * 512 < self.length {
                        self.cells.insert(sector, cell.clone());
                    }
                }
            }
            Change::Fill(first, end, cell) => {
                let end = (*end).min(self.length.div_ceil(512));
                if matches!((cell, &self.new), (Cell::Zero, Cell::Zero)) {
                    let gone: Vec<u64> =
                        self.cells.range(*first..end.max(*first)).map(|(at, _)| *at).collect();
                    gone.iter().for_each(|at| drop(self.cells.remove(at)));
                } else {
                    (*first..end).for_each(|sector| drop(self.cells.insert(sector, cell.clone())));
                }
            }
            Change::Length(length) => {
                self.length = *length;
                self.cells.split_off(&length.div_ceil(512));
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<Cell>),
    Fill(u64, u64, Cell),
    Length(u64),
}

#[derive(Clone, Debug)]
pub struct Sparse {
    now: Image,
    durable: Image,
    pending: Vec<Change>,
    pub grows: bool,
    /// Bytes that a file may have at most.
    pub full_at: u64,
    garbage: u64,
    pub writes: u64,
    pub syncs: u64,
}

impl Sparse {
    fn new(length: u64, grows: bool, new: Cell) -> Sparse {
        let now = Image { cells: BTreeMap::new(), new, length };
        let durable = now.clone();
        Sparse {
            now,
            durable,
            pending: Vec::new(),
            grows,
            full_at: u64::MAX,
            garbage: 1,
            writes: 0,
            syncs: 0,
        }
    }

    pub fn file() -> Sparse {
        Sparse::new(0, true, Cell::Zero)
    }

    /// A file whose new space holds anything.
    pub fn dirty_file() -> Sparse {
        Sparse::new(0, true, Cell::Garbage(2))
    }

    pub fn device(length: u64) -> Sparse {
        Sparse::new(length, false, Cell::Garbage(3))
    }

    pub fn facts(&self) -> formats::Facts {
        let new_space_is_zero = matches!(self.now.new, Cell::Zero);
        formats::Facts { length_bytes: self.now.length, grows: self.grows, new_space_is_zero }
    }

    fn change(&mut self, change: Change) {
        self.now.apply(&change);
        self.pending.push(change);
    }

    pub fn sector(&self, sector: u64) -> Sector {
        self.now.get(sector).bytes(sector)
    }

    pub fn length(&self) -> u64 {
        self.now.length
    }

    pub fn unsynced(&self) -> usize {
        self.pending.len()
    }

    /// All bytes, for files small enough.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..self.now.length.div_ceil(512)).flat_map(|at| self.sector(at)).collect();
        bytes.truncate(self.now.length as usize);
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Sparse {
        let mut medium = Sparse::file();
        medium.set_length(bytes.len() as u64).unwrap();
        for (at, sector) in
            bytes.chunks(512).enumerate().filter(|(_, sector)| sector.iter().any(|&byte| byte > 0))
        {
            medium.write(at as u64 * 512, sector).unwrap();
        }
        medium.set_length(bytes.len() as u64).unwrap();
        medium.sync().unwrap();
        medium
    }

    /// What may be there after a crash now. `half_done` are writes that had begun.
    pub fn crash<'a>(&'a self, rng: &mut Rng, half_done: &[(u64, Vec<u8>)]) -> Crash<'a> {
        let halves = half_done.iter().map(|(at, data)| Change::Write(at / 512, cells(data))).collect();
        let count = self.pending.len() + half_done.len();
        let mode = rng.below(4);
        // All, none, most, few: uniform coins alone hardly ever keep or lose a whole table.
        let whole = (0..count)
            .map(|_| match (rng.one_in(2), mode) {
                (false, _) => None,
                (true, 0) => Some(!rng.one_in(8)),
                (true, 1) => Some(rng.one_in(8)),
                (true, _) => Some(rng.one_in(2)),
            })
            .collect();
        Crash { medium: self, halves, whole, mode, seed: rng.next() }
    }
}

fn cells(data: &[u8]) -> Vec<Cell> {
    data.chunks(512)
        .map(|part| {
            let mut sector = [0; 512];
            sector[..part.len()].copy_from_slice(part);
            if sector == [0; 512] { Cell::Zero } else { Cell::Bytes(Rc::new(sector)) }
        })
        .collect()
}

/// A state after a crash, looked at sector by sector.
pub struct Crash<'a> {
    medium: &'a Sparse,
    halves: Vec<Change>,
    whole: Vec<Option<bool>>,
    mode: u64,
    seed: u64,
}

impl Crash<'_> {
    fn kept(&self, change: usize, sector: u64) -> bool {
        if let Some(kept) = self.whole[change] {
            return kept;
        }
        let mut rng = Rng::new(self.seed ^ (change as u64) << 40 ^ sector);
        match self.mode {
            0 => !rng.one_in(8),
            1 => rng.one_in(8),
            _ => rng.one_in(2),
        }
    }

    fn changes(&self) -> impl Iterator<Item = (usize, &Change)> {
        self.medium.pending.iter().chain(&self.halves).enumerate()
    }

    pub fn length(&self) -> u64 {
        let mut length = self.medium.durable.length;
        for (number, change) in self.changes() {
            if let Change::Length(to) = change
                && self.kept(number, 0)
            {
                length = *to;
            }
        }
        length
    }

    pub fn sector(&self, sector: u64) -> Sector {
        let durable = &self.medium.durable;
        let (mut cell, mut length) = (durable.get(sector), durable.length);
        for (number, change) in self.changes() {
            match change {
                Change::Length(to) if self.kept(number, 0) => {
                    length = *to;
                    if sector * 512 >= length {
                        cell = durable.new.clone();
                    }
                }
                Change::Write(first, cells) if (*first..*first + cells.len() as u64).contains(&sector) => {
                    if sector * 512 < length && self.kept(number, sector) {
                        cell = cells[(sector - first) as usize].clone();
                    }
                }
                Change::Fill(first, end, with) if (*first..*end).contains(&sector) => {
                    if sector * 512 < length && self.kept(number, sector) {
                        cell = with.clone();
                    }
                }
                _ => {}
            }
        }
        if sector * 512 >= length { [0; 512] } else { cell.bytes(sector) }
    }

    /// The medium after the crash.
    pub fn medium(&self) -> Sparse {
        let mut after = self.medium.clone();
        let mut image = self.medium.durable.clone();
        for (number, change) in self.changes() {
            match change {
                Change::Length(_) if self.kept(number, 0) => image.apply(change),
                Change::Length(_) => {}
                Change::Write(first, cells) => {
                    for (at, cell) in cells.iter().enumerate() {
                        if self.kept(number, first + at as u64) {
                            image.apply(&Change::Write(first + at as u64, vec![cell.clone()]));
                        }
                    }
                }
                Change::Fill(first, end, with) => {
                    for sector in *first..*end {
                        if self.kept(number, sector) {
                            image.apply(&Change::Fill(sector, sector + 1, with.clone()));
                        }
                    }
                }
            }
        }
        after.now = image.clone();
        after.durable = image;
        after.pending = Vec::new();
        after
    }
}

impl Medium for Sparse {
    fn length_bytes(&mut self) -> u64 {
        self.now.length
    }

    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset_bytes + done as u64;
            let within = (at % 512) as usize;
            let part = (512 - within).min(bytes.len() - done);
            let sector = self.sector(at / 512);
            for (to, (place, from)) in bytes[done..done + part].iter_mut().zip((at..).zip(&sector[within..]))
            {
                *to = if place < self.now.length { *from } else { 0 };
            }
            done += part;
        }
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        assert_eq!(offset_bytes % 512, 0);
        self.writes += 1;
        let end = offset_bytes + bytes.len() as u64;
        if end > self.now.length {
            self.set_length(end)?;
        }
        self.change(Change::Write(offset_bytes / 512, cells(bytes)));
        Ok(())
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        self.change(Change::Fill(offset_bytes / 512, (offset_bytes + length_bytes) / 512, Cell::Zero));
        Ok(())
    }

    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        if !self.grows {
            return if length_bytes <= self.now.length { Ok(()) } else { Err(Failure::NoSpace) };
        }
        if length_bytes > self.full_at && length_bytes > self.now.length {
            return Err(Failure::NoSpace);
        }
        if length_bytes != self.now.length {
            self.change(Change::Length(length_bytes));
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        let covered = self.begins();
        self.ends(covered)
    }
}

impl SlowSync for Sparse {
    fn begins(&mut self) -> usize {
        self.pending.len()
    }

    fn ends(&mut self, covered: usize) -> Result<(), Failure> {
        self.syncs += 1;
        let rest = self.pending.split_off(covered.min(self.pending.len()));
        for change in std::mem::replace(&mut self.pending, rest) {
            self.durable.apply(&change);
        }
        Ok(())
    }

    /// What a guest discards reads as zero (or as before); what a whole block with its bitmap reads as that the format gave up, nobody
    /// may rely on.
    fn punched(&mut self, at: u64, length: u64) {
        if length != 4097 * 512 {
            return self.change(Change::Fill(at / 512, (at + length) / 512, Cell::Zero));
        }
        self.garbage += 1;
        let cell = Cell::Garbage(self.garbage);
        self.change(Change::Fill(at / 512, (at + length) / 512, cell));
    }
}
