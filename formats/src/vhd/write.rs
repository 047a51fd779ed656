//! Writes, discards and closing.

use super::footer::{Footer, Kind};
use super::layout::{FOOTER_BYTES, NO_BLOCK};
use super::reserve::{make_ready, no_block};
use super::space::{Closing, Freed, Pending, Space, tag};
use super::{Spot, Vhd};
use crate::bytes::index;
use crate::error::Failure;
use crate::format::{Before, Context, Order, OrderKind, Payout, Prepared, Step, Wait, Zeroed};
use crate::ledger::Tick;
use crate::{Extent, SECTOR_BYTES};

impl Vhd {
    fn may_write(&self, extent: Extent) -> Step<()> {
        self.check(extent)?;
        if let Some(what) = self.corruption {
            return Err(what.into());
        }
        if self.space.is_some() { Ok(()) } else { Err(Wait::Failed(Failure::ReadOnly)) }
    }

    /// A BAT entry, before something is changed: after a contradiction nothing is written any more.
    fn entry_to_write(&mut self, cx: &mut Context<'_>, block: u32) -> Step<Option<u32>> {
        let found = self.entry(cx, block);
        if let Err(Wait::Failed(Failure::Corrupt(what))) = found {
            self.corruption = Some(what);
        }
        found
    }

    /// See [`crate::Format::prepare`].
    pub(super) fn prepare_write(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Prepared> {
        self.may_write(extent)?;
        if self.kind == Kind::Fixed {
            let offset_bytes = extent.sector * SECTOR_BYTES;
            return Ok(Prepared::InPlace { offset_bytes, sectors: extent.sectors });
        }
        let spot = self.spot(extent);
        let before = if self.kind == Kind::Differencing { Before::Parent } else { Before::Zero };
        let (start, sectors, reads_zero) = match self.entry_to_write(cx, spot.block)? {
            Some(start) => match self.present(cx, start, spot)? {
                (true, sectors) => {
                    let offset_bytes = self.data_bytes(start, spot.within);
                    return Ok(Prepared::InPlace { offset_bytes, sectors });
                }
                (false, sectors) => (start, sectors, false),
            },
            None => {
                let Some(space) = &mut self.space else { return Err(Failure::ReadOnly.into()) };
                (new_block(space, spot.block)?, spot.sectors, !space.exact)
            }
        };
        Ok(Prepared::Allocated(Payout {
            extent: Extent { sector: extent.sector, sectors },
            locked: Extent { sector: extent.sector, sectors },
            offset_bytes: self.data_bytes(start, spot.within),
            reads_zero,
            before,
            ticket: u64::from(spot.block),
        }))
    }

    /// See [`crate::Format::in_place`].
    pub(super) fn in_place_write(
        &mut self,
        cx: &mut Context<'_>,
        extent: Extent,
    ) -> Step<Option<(u64, u64)>> {
        self.may_write(extent)?;
        if self.kind == Kind::Fixed {
            return Ok(Some((extent.sector * SECTOR_BYTES, extent.sectors)));
        }
        let spot = self.spot(extent);
        let Some(start) = self.entry_to_write(cx, spot.block)? else { return Ok(None) };
        Ok(match self.present(cx, start, spot)? {
            (true, sectors) => Some((self.data_bytes(start, spot.within), sectors)),
            (false, _) => None,
        })
    }

    /// See [`crate::Format::commit`]. Of a new block over zeroes only the BAT entry changes; else bits are set.
    pub(super) fn commit_write(&mut self, cx: &mut Context<'_>, payout: &Payout, after: Tick) -> Step<()> {
        let spot = self.spot(payout.extent);
        let Some(space) = &mut self.space else { return Err(Failure::ReadOnly.into()) };
        let exact = space.exact;
        let pending = space.pending_of(spot.block).copied();
        match pending {
            Some(pending) if !exact => {
                if !pending.linked {
                    self.link(cx, pending, after)?;
                    self.note_full(spot.block);
                }
            }
            Some(pending) => {
                let new = !pending.linked;
                if new {
                    // Both pages are to be at hand before one is changed.
                    cx.page(self.entry_bytes(spot.block))?;
                }
                self.set_bits(cx, pending.start, spot, after, new && !pending.touched)?;
                self.pending_mut(spot.block, |pending| pending.touched = true);
                if new {
                    self.link(cx, pending, Tick::NONE)?;
                }
            }
            None => {
                if let Some(start) = self.entry_to_write(cx, spot.block)? {
                    self.set_bits(cx, start, spot, after, false)?;
                }
            }
        }
        self.write_ended(spot.block);
        Ok(())
    }

    fn pending_mut(&mut self, block: u32, change: impl FnOnce(&mut Pending)) {
        if let Some(pending) = self.space.as_mut().and_then(|space| space.pending_of(block)) {
            change(pending);
        }
    }

    /// Points to a new block.
    fn link(&mut self, cx: &mut Context<'_>, pending: Pending, after: Tick) -> Step<()> {
        let (page, at) = cx.page(self.entry_bytes(pending.block))?;
        cx.put(page, at, &pending.start.to_be_bytes(), after);
        self.pending_mut(pending.block, |pending| pending.linked = true);
        Ok(())
    }

    /// One write to a new block has ended. Gives back the block when it was the last and nothing points to it.
    fn write_ended(&mut self, block: u32) -> Option<Pending> {
        let space = self.space.as_mut()?;
        let at = space.pending.iter().position(|pending| pending.block == block)?;
        let pending = space.pending.get_mut(at)?;
        pending.writes = pending.writes.saturating_sub(1);
        if pending.writes > 0 {
            return None;
        }
        Some(space.pending.swap_remove(at)).filter(|pending| !pending.linked)
    }

    /// See [`crate::Format::release`].
    pub(super) fn release_write(&mut self, cx: &mut Context<'_>, payout: &Payout) {
        let block = self.spot(payout.extent).block;
        let Some(pending) = self.write_ended(block) else { return };
        let Some(space) = &mut self.space else { return };
        if space.exact && !pending.touched {
            space.ready.push_front(pending.start);
        } else {
            let freed = Freed { start: pending.start, unlinked: cx.stamp(), user: cx.user() };
            space.freed.push_back(freed);
        }
    }

    /// Sets the bits of the sectors that a write was about.
    fn set_bits(&mut self, cx: &mut Context<'_>, start: u32, spot: Spot, after: Tick, new: bool) -> Step<()> {
        let at_bytes = u64::from(start) * SECTOR_BYTES;
        let page = if new { cx.new_page(at_bytes)? } else { cx.page(at_bytes)?.0 };
        let mut bitmap = [0; super::PAGE as usize];
        if let Some(old) = cx.bytes(page).get(..bitmap.len()) {
            bitmap.copy_from_slice(old);
        }
        for bit in spot.within..spot.within + spot.sectors {
            if let Some(byte) = bitmap.get_mut(index(bit / 8)) {
                *byte |= 0x80 >> (bit % 8);
            }
        }
        let planted = self.space.as_ref().is_some_and(|space| space.planted.no_data_tick);
        let changed = index(spot.within / 8)..index((spot.within + spot.sectors).div_ceil(8));
        let first = changed.start;
        cx.put(
            page,
            first,
            bitmap.get(changed).unwrap_or_default(),
            if planted { Tick::NONE } else { after },
        );
        if bitmap.iter().all(|&byte| byte == 0xff) {
            self.note_full(spot.block);
        }
        Ok(())
    }

    fn note_full(&mut self, block: u32) {
        self.change_full(block, true);
    }

    fn change_full(&mut self, block: u32, full: bool) {
        let changed = self.full.set(block, full);
        if let Some(saver) = self.space.as_mut().and_then(|space| space.saver.as_mut()) {
            saver.changes += u32::from(changed);
        }
    }

    /// See [`crate::Format::zero`].
    pub(super) fn zero_some(&mut self, cx: &mut Context<'_>, extent: Extent, discard: bool) -> Step<Zeroed> {
        self.may_write(extent)?;
        if self.kind == Kind::Fixed {
            let offset_bytes = extent.sector * SECTOR_BYTES;
            return Ok(Zeroed::InPlace { offset_bytes, sectors: extent.sectors });
        }
        let spot = self.spot(extent);
        let planted = self.space.as_ref().is_some_and(|space| space.planted.discard_shows_parent);
        // Without a parent what is not there is zero. With one it can only be written; a discard may leave what the guest sees.
        let absent = |sectors| {
            if self.kind == Kind::Dynamic || discard {
                Zeroed::Done { sectors }
            } else {
                Zeroed::Write { sectors }
            }
        };
        let Some(start) = self.entry(cx, spot.block)? else {
            return Ok(absent(self.hole(cx, extent, spot)?));
        };
        let whole = spot.within == 0 && (spot.sectors == self.block_sectors || extent.end() == self.sectors);
        let may_free = self.kind == Kind::Dynamic || planted && discard;
        if whole
            && may_free
            && self.space.as_ref().is_some_and(|space| !space.exact && space.may_free() || planted)
        {
            self.free_block(cx, spot.block, start)?;
            return Ok(Zeroed::Done { sectors: spot.sectors });
        }
        match self.present(cx, start, spot)? {
            (true, sectors) => {
                Ok(Zeroed::InPlace { offset_bytes: self.data_bytes(start, spot.within), sectors })
            }
            (false, sectors) => Ok(absent(sectors)),
        }
    }

    /// Takes a block out of the BAT. Its space is used again when that is durable and nobody reads it any more.
    fn free_block(&mut self, cx: &mut Context<'_>, block: u32, start: u32) -> Step<()> {
        let (page, at) = cx.page(self.entry_bytes(block))?;
        cx.put(page, at, &NO_BLOCK.to_be_bytes(), Tick::NONE);
        self.change_full(block, false);
        if let Some(space) = &mut self.space {
            space.freed.push_back(Freed { start, unlinked: cx.stamp(), user: cx.user() });
        }
        Ok(())
    }

    /// See [`crate::Format::close`].
    pub(super) fn close_some(&mut self, cx: &mut Context<'_>) -> Step<()> {
        loop {
            let Some(space) = self.space.as_mut().filter(|space| !space.fixed) else { return Ok(()) };
            if self.corruption.is_some() {
                // Not even the footer is written.
                return if space.in_flight() { Err(Wait::Busy) } else { Ok(()) };
            }
            match space.closing {
                None => {
                    cx.forget(0, FOOTER_BYTES);
                    finish_chunk(space, cx)?;
                    if space.punching > 0 {
                        return Err(Wait::Busy);
                    }
                    space.closing = Some(Closing::Settling(cx.stamp()));
                }
                Some(Closing::Settling(stamp)) => {
                    if !space.planted.no_close_wait && !cx.durable(stamp) {
                        return Err(Wait::Busy);
                    }
                    space.closing = Some(Closing::Batmap);
                }
                Some(Closing::Batmap) => {
                    match self.save_batmap(cx) {
                        Err(Wait::Failed(_)) => {}
                        Err(wait) => return Err(wait),
                        Ok(()) if self.space.as_ref().is_some_and(Space::unsaved) => continue,
                        Ok(()) => {}
                    }
                    self.write_footer(cx)?;
                }
                Some(Closing::Footer { outstanding: 0, failed: Some(failure) }) => {
                    space.closing = None;
                    return Err(failure.into());
                }
                Some(Closing::Footer { outstanding: 0, failed: None }) => {
                    space.footer_stale = false;
                    space.closing = Some(Closing::Done);
                }
                Some(Closing::Footer { .. }) => return Err(Wait::Busy),
                Some(Closing::Done) => return Ok(()),
            }
        }
    }

    /// The footer behind the last block in use (or at the end of the device), and nothing behind it. It is the copy as it is now: a tool
    /// may have hidden the image meanwhile.
    fn write_footer(&mut self, cx: &mut Context<'_>) -> Step<()> {
        let Some(space) = &mut self.space else { return Ok(()) };
        let mut outstanding = 0;
        if space.footer_stale {
            let (page, _) = cx.page(0)?;
            let mut copy = [0; 512];
            copy.copy_from_slice(cx.bytes(page).get(..512).unwrap_or(&[0; 512]));
            let found = Footer::parse(copy).ok().filter(|found| found.uuid() == self.footer.uuid());
            let footer = found.unwrap_or(self.footer);
            let at_bytes =
                if space.grows { space.cut() } else { space.length_bytes.saturating_sub(FOOTER_BYTES) };
            let mut order = |offset_bytes, kind| {
                cx.order(Order { tag: tag::CLOSE, offset_bytes, kind });
                outstanding += 1;
            };
            if found.is_none() {
                order(0, OrderKind::Write(footer.0.to_vec()));
            }
            order(at_bytes, OrderKind::Write(footer.0.to_vec()));
            if space.grows {
                order(at_bytes + FOOTER_BYTES, OrderKind::SetLength);
            }
        }
        space.closing = Some(Closing::Footer { outstanding, failed: None });
        Ok(())
    }
}

/// The block that a write goes to which finds none: one that another write took already, or one that is ready.
fn new_block(space: &mut Space, block: u32) -> Step<u32> {
    if let Some(pending) = space.pending_of(block) {
        pending.writes += 1;
        return Ok(pending.start);
    }
    let Some(start) = space.ready.pop_front() else { return Err(no_block(space)) };
    space.pending.push(Pending { block, start, writes: 1, linked: false, touched: false });
    Ok(start)
}

/// A chunk that is being made ready comes to its end, well or not.
fn finish_chunk(space: &mut Space, cx: &mut Context<'_>) -> Step<()> {
    match if space.chunk.is_some() { make_ready(space, cx) } else { Ok(()) } {
        Err(Wait::Failed(_)) => Ok(()),
        step => step,
    }
}

impl Space {
    fn unsaved(&self) -> bool {
        self.saver.as_ref().is_some_and(|saver| saver.changes > 0)
    }

    /// Forgets what lies behind the last block in use. Says where that ends.
    fn cut(&mut self) -> u64 {
        let end = self.used_end();
        let kept = |start: u32| u64::from(start) < end;
        self.ready.retain(|&start| kept(start));
        self.free.retain(|&start| kept(start));
        self.freed.retain(|freed| kept(freed.start));
        self.zero_from = self.zero_from.max(self.length_bytes);
        self.end_sector = end;
        self.length_bytes = end * SECTOR_BYTES + FOOTER_BYTES;
        end * SECTOR_BYTES
    }
}
