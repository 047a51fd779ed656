//! Raw: byte n of the disk is byte n of the image.

use crate::error::Failure;
use crate::format::{Context, Format, Payout, Prepared, Step, Wait, Zeroed};
use crate::ledger::Tick;
use crate::{Extent, Geometry, OutOfRange, Place, Run, SECTOR_BYTES};

/// A raw image of a size that was fixed when it was opened. A file that grows meanwhile does not grow the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raw {
    sectors: u64,
    ragged_bytes: u64,
}

/// An image that has no whole sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall;

impl Raw {
    /// A raw image of `size_bytes`.
    ///
    /// # Errors
    /// [`TooSmall`] for less than one sector.
    pub fn open(size_bytes: u64) -> Result<Raw, TooSmall> {
        let raw = Raw { sectors: size_bytes / SECTOR_BYTES, ragged_bytes: size_bytes % SECTOR_BYTES };
        if raw.sectors == 0 { Err(TooSmall) } else { Ok(raw) }
    }

    /// A raw image of whole sectors; none at all makes a disk on which no extent lies.
    #[must_use]
    pub fn of_sectors(sectors: u64) -> Raw {
        Raw { sectors, ragged_bytes: 0 }
    }

    /// The disk, without the trait.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry { sectors: self.sectors }
    }

    /// Bytes at the end of the image that are no whole sector. The guest does not see them: a sector that is half outside the
    /// image could not keep what is written to it.
    #[must_use]
    pub fn ragged_bytes(&self) -> u64 {
        self.ragged_bytes
    }

    /// Where an extent lies.
    ///
    /// # Errors
    /// [`OutOfRange`] where it is empty, ends behind the disk, or wraps.
    pub fn map(&self, extent: Extent) -> Result<Run, OutOfRange> {
        let end = extent.sector.checked_add(extent.sectors).ok_or(OutOfRange(extent))?;
        let offset_bytes = extent.sector.checked_mul(SECTOR_BYTES).ok_or(OutOfRange(extent))?;
        if end > self.sectors || extent.sectors == 0 {
            return Err(OutOfRange(extent));
        }
        Ok(Run { place: Place::Data { offset_bytes }, sectors: extent.sectors })
    }
}

impl Format for Raw {
    fn geometry(&self) -> Geometry {
        Raw::geometry(self)
    }

    fn page_bytes(&self) -> u32 {
        512
    }

    fn unit_bytes(&self) -> u64 {
        1 << 20
    }

    fn map(&self, _: &mut Context<'_>, extent: Extent) -> Step<Run> {
        Raw::map(self, extent).map_err(|_| Wait::Failed(Failure::OutOfRange))
    }

    fn prepare(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Prepared> {
        let run = Format::map(self, cx, extent)?;
        match run.place {
            Place::Data { offset_bytes } => Ok(Prepared::InPlace { offset_bytes, sectors: run.sectors }),
            _ => Err(Wait::Failed(Failure::OutOfRange)),
        }
    }

    fn commit(&mut self, _: &mut Context<'_>, _: &Payout, _: Tick) -> Step<()> {
        Ok(())
    }

    fn release(&mut self, _: &mut Context<'_>, _: &Payout) {}

    fn zero(&mut self, cx: &mut Context<'_>, extent: Extent, _: bool) -> Step<Zeroed> {
        let run = Format::map(self, cx, extent)?;
        match run.place {
            Place::Data { offset_bytes } => Ok(Zeroed::InPlace { offset_bytes, sectors: run.sectors }),
            _ => Err(Wait::Failed(Failure::OutOfRange)),
        }
    }

    fn work(&mut self, _: &mut Context<'_>) -> Step<()> {
        Ok(())
    }

    fn answered(&mut self, _: &mut Context<'_>, _: u64, _: Result<&[u8], Failure>) {}

    fn close(&mut self, _: &mut Context<'_>) -> Step<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_sizes_end_at_the_last_whole_sector() {
        for (size, sectors, ragged) in [(512, 1, 0), (513, 1, 1), (1023, 1, 511), (1 << 40, 1 << 31, 0)] {
            let raw = Raw::open(size).unwrap();
            assert_eq!((raw.geometry().sectors, raw.ragged_bytes()), (sectors, ragged));
        }
        assert_eq!(Raw::open(0), Err(TooSmall));
        assert_eq!(Raw::open(511), Err(TooSmall));
    }

    #[test]
    fn extents_map_to_themselves_and_never_beyond_the_disk() {
        let raw = Raw::open(100 * 512).unwrap();
        let run = raw.map(Extent { sector: 92, sectors: 8 }).unwrap();
        assert_eq!(run, Run { place: Place::Data { offset_bytes: 92 * 512 }, sectors: 8 });
        for (sector, sectors) in
            [(93, 8), (100, 1), (0, 0), (u64::MAX, 1), (u64::MAX, 2), (1, u64::MAX), (0, 101)]
        {
            assert!(raw.map(Extent { sector, sectors }).is_err(), "{sector} {sectors}");
        }
    }
}
