//! Where the bytes of a disk lie, asked in any order, without a cache to speak of: for tools, which go from end to end.

use crate::error::Unsupported;
use crate::medium::Medium;
use crate::{Extent, Place, Run, SECTOR_BYTES};

/// Answers like [`crate::Format::map`], at once. What comes next on the disk is cheap; what lies elsewhere is read again.
pub trait Cursor {
    /// Where the first part of an extent of the disk lies. The run may end before its place does.
    ///
    /// # Errors
    /// What is wrong with the image, or what the medium says.
    fn run(&mut self, medium: &mut dyn Medium, extent: Extent) -> Result<Run, Unsupported>;
}

/// Whether a run that begins `sectors` behind a place goes on with it.
#[must_use]
pub fn follows(first: &Place, sectors: u64, next: &Place) -> bool {
    match (first, next) {
        (Place::Data { offset_bytes }, Place::Data { offset_bytes: next }) => {
            offset_bytes.checked_add(sectors.saturating_mul(SECTOR_BYTES)) == Some(*next)
        }
        (Place::Zero, Place::Zero) | (Place::Parent, Place::Parent) => true,
        _ => false,
    }
}

/// Calls `found` for every run of a disk in turn, as long as possible: with its first sector, and where it lies.
///
/// # Errors
/// See [`Cursor::run`].
pub fn for_each_run(
    cursor: &mut dyn Cursor,
    medium: &mut dyn Medium,
    sectors: u64,
    found: &mut dyn FnMut(u64, Run),
) -> Result<(), Unsupported> {
    let mut known: Option<(u64, Run)> = None;
    let mut at = 0;
    while at < sectors {
        let run = cursor.run(medium, Extent { sector: at, sectors: sectors - at })?;
        match &mut known {
            Some((_, known)) if follows(&known.place, known.sectors, &run.place) => {
                known.sectors += run.sectors
            }
            _ => {
                if let Some((from, run)) = known.replace((at, run)) {
                    found(from, run);
                }
            }
        }
        at += run.sectors.max(1);
    }
    if let Some((from, run)) = known {
        found(from, run);
    }
    Ok(())
}
