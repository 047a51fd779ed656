//! What an image holds, from end to end: for `map`, without a cache and with little memory.

use super::footer::Kind;
use super::headers::Headers;
use super::layout::{Header, NO_BLOCK};
use super::open::for_each_entry;
use super::{Vhd, run_of_bits};
use crate::bytes::index;
use crate::error::{Corruption, Unsupported};
use crate::medium::Medium;
use crate::{Place, Run, SECTOR_BYTES};

/// Calls `found` for every run of the disk in turn, as long as possible: with its first sector, and where it lies.
///
/// # Errors
/// What is wrong with the image, or what the medium says.
pub fn map(
    medium: &mut dyn Medium,
    headers: &Headers,
    found: &mut dyn FnMut(u64, Run),
) -> Result<(), Unsupported> {
    let vhd = Vhd::of_headers(headers);
    let mut joined = Joined { from: 0, run: None, end: vhd.sectors, found };
    if vhd.kind == Kind::Fixed {
        joined.add(Place::Data { offset_bytes: 0 }, vhd.sectors);
        joined.end();
        return Ok(());
    }
    // The whole table, of which an image can have 4 bytes for each block of its disk: 4 MiB at most, with blocks of 2 MiB.
    let table_bytes = headers.header.as_ref().map_or(0, Header::table_bytes);
    let mut bitmap = alloc::vec![0; index(vhd.bitmap_sectors * SECTOR_BYTES)];
    let batch = 1 << 16;
    let mut first = 0;
    while first < headers.blocks() {
        let count = (headers.blocks() - first).min(batch);
        let mut starts = alloc::vec::Vec::with_capacity(count as usize);
        for_each_entry(medium, table_bytes + u64::from(first) * 4, count, |_, start| {
            starts.push(start);
            Ok(())
        })?;
        for (block, start) in (first..).zip(starts) {
            if start == NO_BLOCK {
                joined.add(vhd.nowhere(), vhd.block_sectors);
                continue;
            }
            if let Some(what) = vhd.contradiction(start) {
                return Err(Unsupported::Malformed(Corruption { what, at_bytes: vhd.entry_bytes(block) }));
            }
            if vhd.full.has(block) {
                joined.add(Place::Data { offset_bytes: vhd.data_bytes(start, 0) }, vhd.block_sectors);
                continue;
            }
            medium.read(u64::from(start) * SECTOR_BYTES, &mut bitmap)?;
            let mut within = 0;
            while within < vhd.block_sectors {
                let (present, sectors) = run_of_bits(&bitmap, within, vhd.block_sectors);
                let data = Place::Data { offset_bytes: vhd.data_bytes(start, within) };
                joined.add(if present { data } else { vhd.nowhere() }, sectors);
                within += sectors;
            }
        }
        first += count;
    }
    joined.end();
    Ok(())
}

/// Joins runs that go on where the one before ended.
struct Joined<'a> {
    from: u64,
    run: Option<Run>,
    end: u64,
    found: &'a mut dyn FnMut(u64, Run),
}

impl Joined<'_> {
    fn add(&mut self, place: Place, sectors: u64) {
        let known = self.run.map_or(0, |run| run.sectors);
        let sectors = sectors.min(self.end.saturating_sub(self.from + known));
        if sectors == 0 {
            return;
        }
        if let Some(run) = &mut self.run {
            let goes_on = match (run.place, place) {
                (Place::Data { offset_bytes }, Place::Data { offset_bytes: next }) => {
                    offset_bytes + run.sectors * SECTOR_BYTES == next
                }
                (one, other) => one == other,
            };
            if goes_on {
                run.sectors += sectors;
                return;
            }
        }
        self.end();
        self.run = Some(Run { place, sectors });
    }

    fn end(&mut self) {
        if let Some(run) = self.run.take() {
            (self.found)(self.from, run);
            self.from += run.sectors;
        }
    }
}
