//! Requests on a disk in a file, one at a time, beside a shadow of what it must hold.

use formats::{Extent, Op};

use super::driver::Driver;
use super::file::FileMedium;
use super::rng::Rng;

/// All bytes of a disk.
pub fn read_all(driver: &mut Driver<FileMedium>) -> Vec<u8> {
    let sectors = driver.disk.geometry().sectors;
    let mut out = Vec::new();
    for sector in (0..sectors).step_by(4096) {
        let extent = Extent { sector, sectors: (sectors - sector).min(4096) };
        let (result, memory) = driver.run(Op::Read, extent, vec![0x77; (extent.sectors * 512) as usize]);
        result.unwrap();
        out.extend(memory);
    }
    out
}

pub fn same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: sizes");
    let sector = (0..ours.len() / 512).find(|at| ours[at * 512..][..512] != theirs[at * 512..][..512]);
    assert_eq!(sector, None, "{what}: that sector differs");
}

/// What random requests are like: of whole units of so many sectors, up to so many, and now and then up to `far`.
#[derive(Clone, Copy)]
pub struct Habits {
    pub unit: u64,
    pub most: u64,
    pub far: u64,
}

/// Random requests, alone, beside a shadow.
pub fn shadow_run(
    driver: &mut Driver<FileMedium>,
    shadow: &mut [u8],
    rng: &mut Rng,
    count: u64,
    habits: Habits,
) {
    let sectors = (shadow.len() / 512) as u64;
    for number in 0..count {
        let sector = rng.below(sectors) / habits.unit * habits.unit;
        let most = if rng.one_in(6) { habits.far } else { habits.most };
        let length = (1 + rng.below(most)).next_multiple_of(habits.unit);
        let extent = Extent { sector, sectors: length.min(sectors - sector) };
        let range = (sector * 512) as usize..(extent.end() * 512) as usize;
        match rng.below(8) {
            0..4 => {
                let data: Vec<u8> =
                    (0..extent.sectors * 512).map(|at| (at / 512 + number * 7 + 1) as u8 | 1).collect();
                shadow[range].copy_from_slice(&data);
                driver.run(Op::Write, extent, data).0.unwrap();
            }
            4 => {
                driver.run(Op::WriteZeroes, extent, Vec::new()).0.unwrap();
                shadow[range].fill(0);
            }
            5 => {
                driver.run(Op::Discard, extent, Vec::new()).0.unwrap();
                // A discard zeroes, or leaves be.
                let (result, memory) = driver.run(Op::Read, extent, vec![7; range.len()]);
                result.unwrap();
                for (old, new) in shadow[range].chunks_mut(512).zip(memory.chunks(512)) {
                    assert!(new == old || new.iter().all(|byte| *byte == 0), "discard shows something else");
                    old.copy_from_slice(new);
                }
            }
            6 => driver.run(Op::Flush, extent, Vec::new()).0.unwrap(),
            _ => {
                let (result, memory) = driver.run(Op::Read, extent, vec![7; range.len()]);
                result.unwrap();
                same(&memory, &shadow[range], "read");
            }
        }
    }
}
