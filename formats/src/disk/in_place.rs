//! Requests whose bytes lie in one piece where they are: whoever has the image's bytes in memory moves them by itself.

use super::flight::Flight;
use super::requests::Active;
use super::{Descent, Disk, Op, Request, WorkId};
use crate::format::{Step, Wait};
use crate::pages::Pages;
use crate::{Extent, Place};

/// Where all of a request's bytes are, until [`Disk::done`] says that they have been moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InPlace {
    /// To be answered by [`Disk::done`].
    pub id: WorkId,
    /// In which image: the number given to [`Disk::new`].
    pub image: u32,
    /// Where in it.
    pub offset_bytes: u64,
}

impl Disk {
    /// Where a read finds, or a write may put, all its bytes without anything else being done before or after. Until it is
    /// answered by [`Disk::done`] it counts as a request in flight, for flushes and for what reuses space; it has no outcome.
    /// `None` where [`Disk::submit`] is the way; pages that it will need may be on their way then.
    pub fn begin_in_place(&mut self, pages: &mut Pages, op: Op, extent: Extent) -> Option<InPlace> {
        let inside = extent.sectors > 0 && extent.end() <= self.sectors;
        if !inside || !self.flights.room() || self.closing.is_some() {
            return None;
        }
        let place = self.free_actives.pop()?;
        let found = match op {
            Op::Read => self.whole_read(pages, extent),
            Op::Write => self.whole_write(pages, extent),
            _ => Err(Wait::Busy),
        };
        let Ok(Some((image, offset_bytes))) = found else {
            self.free_actives.push(place);
            return None;
        };
        let epoch = (op == Op::Write).then(|| self.epochs.write_begins());
        self.shared.users.1 += 1;
        let active = Active::in_place(Request { token: 0, op, extent }, self.shared.users.1, epoch);
        if let Some(slot) = self.actives.get_mut(place as usize) {
            *slot = Some(active);
        }
        Some(InPlace { id: self.flights.add(Flight::InPlace(place)), image, offset_bytes })
    }

    fn whole_read(&mut self, pages: &mut Pages, extent: Extent) -> Step<Option<(u32, u64)>> {
        let (run, layer) = self.resolve(pages, extent, &mut Descent::default())?;
        let image = self.layers.get(layer).map_or(0, |layer| layer.image);
        Ok(match run.place {
            Place::Data { offset_bytes } if run.sectors == extent.sectors => Some((image, offset_bytes)),
            _ => None,
        })
    }

    fn whole_write(&mut self, pages: &mut Pages, extent: Extent) -> Step<Option<(u32, u64)>> {
        if self.read_only || self.shared.ledger.failed() || self.unlocked(extent)? != extent {
            return Ok(None);
        }
        let found = self.ask(pages, 0, |leaf, cx| leaf.in_place(cx, extent))?;
        let whole = found.filter(|(_, sectors)| *sectors >= extent.sectors);
        Ok(whole.map(|(offset_bytes, _)| (self.leaf_image(), offset_bytes)))
    }

    /// The bytes have been moved, or not: whoever moved them knows.
    pub(super) fn in_place_ended(&mut self, at: u32) {
        let Some(active) = self.actives.get_mut(at as usize).and_then(Option::take) else { return };
        self.free_actives.push(at);
        if let Some(epoch) = active.epoch() {
            self.epochs.write_ends(epoch);
        }
    }
}
