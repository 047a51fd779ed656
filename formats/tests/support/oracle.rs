//! What a sector of a disk may hold: every write that nothing has definitely replaced.

use formats::{Extent, Op};

use super::medium::SECTOR;

const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Written {
    value: u64,
    begun: u64,
    ended: u64,
    /// A discard: it may have done nothing.
    perhaps: bool,
    /// No crash can bring it back. A read that began long ago may still find it.
    gone: bool,
}

#[derive(Clone, Debug)]
pub struct Oracle {
    sectors: Vec<Vec<Written>>,
    now: u64,
}

/// A sector's bytes for a value.
pub fn sector_of(value: u64) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    for word in out.chunks_mut(8) {
        word.copy_from_slice(&value.to_be_bytes());
    }
    out
}

/// The value of a sector, or `None` where it is torn.
pub fn value_of(sector: &[u8]) -> Option<u64> {
    let first = u64::from_be_bytes(sector[..8].try_into().unwrap());
    sector.chunks(8).all(|word| word == first.to_be_bytes()).then_some(first)
}

impl Oracle {
    pub fn new(values: impl Iterator<Item = u64>) -> Oracle {
        let sectors = values
            .map(|value| vec![Written { value, begun: 0, ended: 0, perhaps: false, gone: false }])
            .collect();
        Oracle { sectors, now: 1 }
    }

    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// The next moment.
    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A change begins; `value` says what each sector is to hold.
    pub fn begins(&mut self, extent: Extent, op: Op, value: impl Fn(u64) -> u64) -> u64 {
        let begun = self.tick();
        for sector in extent.sector..extent.sector + extent.sectors {
            let value = if op == Op::Write { value(sector) } else { 0 };
            let perhaps = op == Op::Discard;
            self.sectors[sector as usize].push(Written { value, begun, ended: NEVER, perhaps, gone: false });
        }
        begun
    }

    /// It ends. What failed may or may not be there, for good.
    pub fn ends(&mut self, extent: Extent, begun: u64, ok: bool) {
        let now = self.tick();
        for sector in extent.sector..extent.sector + extent.sectors {
            for written in &mut self.sectors[sector as usize] {
                if written.begun == begun {
                    written.ended = now;
                    written.perhaps |= !ok;
                }
            }
        }
    }

    /// A flush that began at `begun` has ended: what it covers has replaced what was before.
    pub fn flushed(&mut self, begun: u64) {
        for sector in &mut self.sectors {
            let covered = |other: &Written| !other.perhaps && other.ended < begun;
            let latest = sector.iter().filter(|other| covered(other)).map(|other| other.begun).max();
            if let Some(latest) = latest {
                sector.iter_mut().for_each(|written| written.gone |= written.ended < latest);
            }
        }
    }

    /// Whether a crash now may leave this value.
    pub fn allows(&self, sector: u64, value: u64) -> bool {
        self.sectors[sector as usize].iter().any(|written| written.value == value && !written.gone)
    }

    /// Whether a read that began at `begun` may find this value.
    pub fn reads(&self, sector: u64, value: u64, begun: u64) -> bool {
        let all = &self.sectors[sector as usize];
        let replaced = |one: &Written| {
            all.iter().any(|other| !other.perhaps && other.ended < begun && other.begun > one.ended)
        };
        all.iter().any(|written| written.value == value && !replaced(written))
    }

    /// After a crash and a reopening: what is there is the truth.
    pub fn settle(&mut self, sector: u64, value: u64) {
        self.sectors[sector as usize] =
            vec![Written { value, begun: 0, ended: 0, perhaps: false, gone: false }];
    }

    pub fn describe(&self, sector: u64) -> String {
        format!("{:x?}", self.sectors[sector as usize])
    }
}
