//! What goes on behind requests: blocks are made ready before they are needed, freed ones are given back, the batmap is saved.

use alloc::vec::Vec;

use super::Vhd;
use super::batmap::Stage as Save;
use super::layout::FOOTER_BYTES;
use super::space::{Chunk, Space, Stage, tag};
use crate::SECTOR_BYTES;
use crate::bytes::{index, wide};
use crate::error::Failure;
use crate::format::{Context, Order, OrderKind, Step, Wait};

/// Bytes of the batmap in an order.
const MAP_PART: usize = 64 << 10;

impl Vhd {
    /// See [`crate::Format::work`].
    pub(super) fn go_on(&mut self, cx: &mut Context<'_>) -> Step<()> {
        let Some(space) = self.space.as_mut().filter(|space| !space.fixed) else { return Ok(()) };
        space.closing = None;
        if self.corruption.is_some() {
            return Ok(());
        }
        reclaim(space, cx);
        let made = make_ready(space, cx);
        let due = |space: &Space| {
            space.saver.as_ref().is_some_and(|saver| saver.atomic() && saver.changes >= space.save_after)
        };
        let busy_saving = space.saver.as_ref().is_some_and(|saver| !matches!(saver.stage, Save::Idle));
        // The map is a hint: that it cannot be saved now is nobody's failure.
        let saved =
            if due(space) || busy_saving { self.save_batmap(cx).map_err(|_| Wait::Busy) } else { Ok(()) };
        made.and(saved)
    }

    /// Saves the batmap, if it has changed. A copy is taken; when all that it says is durable it is written beside the old one; when it
    /// is durable itself the header points to it.
    pub(super) fn save_batmap(&mut self, cx: &mut Context<'_>) -> Step<()> {
        let Some(space) = &mut self.space else { return Ok(()) };
        let planted = space.planted;
        let Some(saver) = &mut space.saver else { return Ok(()) };
        loop {
            match core::mem::replace(&mut saver.stage, Save::Idle) {
                Save::Idle if saver.changes == 0 => return Ok(()),
                Save::Idle => {
                    let mut map: Vec<u8> = self.full.bytes().to_vec();
                    map.resize(index(saver.used_bytes), 0);
                    saver.changes = 0;
                    saver.stage = Save::Copied(map, cx.stamp());
                }
                Save::Copied(map, stamp) => {
                    if !planted.no_batmap_wait && !cx.durable(stamp) {
                        saver.stage = Save::Copied(map, stamp);
                        return Err(Wait::Busy);
                    }
                    for (at, part) in map.chunks(MAP_PART).enumerate() {
                        let offset_bytes = saver.target() + wide(at * MAP_PART);
                        cx.order(Order {
                            tag: tag::MAP,
                            offset_bytes,
                            kind: OrderKind::Write(part.to_vec()),
                        });
                        space.map_outstanding += 1;
                    }
                    saver.stage = Save::Writing(map);
                }
                Save::Writing(map) => {
                    if space.map_outstanding > 0 {
                        saver.stage = Save::Writing(map);
                        return Err(Wait::Busy);
                    }
                    if let Some(failure) = space.map_failed.take() {
                        saver.changes += 1;
                        return Err(failure.into());
                    }
                    saver.stage = Save::Written(map);
                }
                Save::Written(map) => {
                    let page = match cx.page(saver.header_bytes) {
                        Ok((page, _)) => page,
                        Err(wait) => {
                            saver.stage = Save::Written(map);
                            return Err(wait);
                        }
                    };
                    let target = saver.target();
                    saver.header.set_map(target, &map);
                    let after = if planted.no_map_tick { crate::Tick::NONE } else { cx.tick() };
                    cx.put(page, 0, &saver.header.0, after);
                    return Ok(());
                }
            }
        }
    }
}

/// Gives back the space of blocks that nothing points to any more, on the medium either, and that no request uses.
fn reclaim(space: &mut Space, cx: &mut Context<'_>) {
    while let Some(freed) = space.freed.front().copied() {
        let urgent = space.demand && space.ready.is_empty() && space.chunk.is_none();
        let durable = if urgent { cx.durable(freed.unlinked) } else { cx.is_durable(freed.unlinked) };
        if !(durable || space.planted.no_unlink_wait) || !cx.unused(freed.user) {
            return;
        }
        space.freed.pop_front();
        space.punching += 1;
        let offset_bytes = u64::from(freed.start) * SECTOR_BYTES;
        let length_bytes = space.stride * SECTOR_BYTES;
        cx.forget(offset_bytes, SECTOR_BYTES);
        let tag = tag::PUNCH | u64::from(freed.start) << 8;
        cx.order(Order { tag, offset_bytes, kind: OrderKind::Punch(length_bytes) });
    }
}

/// Makes blocks ready: space, zeroes, bitmaps, all of it durable, so that a BAT entry may point to them at any time.
pub(super) fn make_ready(space: &mut Space, cx: &mut Context<'_>) -> Step<()> {
    if space.chunk.is_none() {
        if !space.wants_chunk() {
            return Ok(());
        }
        let chunk = space.next_chunk();
        if chunk.starts.is_empty() {
            // No room: prepare says so, unless freed blocks are on their way.
            return if space.freed.is_empty() && space.punching == 0 { Ok(()) } else { Err(Wait::Busy) };
        }
        begin(space, cx, chunk);
    }
    loop {
        let Some(chunk) = &mut space.chunk else { return Ok(()) };
        if chunk.outstanding > 0 {
            return Err(Wait::Busy);
        }
        if let Some(failure) = chunk.failed {
            space.drop_chunk();
            space.not_ahead = true;
            return if space.demand { Err(failure.into()) } else { Ok(()) };
        }
        match chunk.stage {
            Stage::Length => zero_old(space, cx),
            Stage::Zeroing => write_bitmaps(space, cx),
            Stage::Bitmaps => chunk.stage = Stage::Sync(cx.tick()),
            Stage::Sync(tick) => {
                if !space.planted.no_reserve_sync && !cx.synced(tick) {
                    return Err(Wait::Busy);
                }
                end(space);
                return Ok(());
            }
        }
    }
}

/// Makes the file longer.
fn begin(space: &mut Space, cx: &mut Context<'_>, mut chunk: Chunk) {
    let length_bytes = chunk.end_sector * SECTOR_BYTES + FOOTER_BYTES;
    space.footer_stale = true;
    if space.grows && length_bytes > space.length_bytes && chunk.starts.len() > chunk.reused {
        // One sector more than blocks need, so that no crash makes a sector of a guest's the last one, where footers are looked for.
        cx.order(Order { tag: tag::CHUNK, offset_bytes: length_bytes, kind: OrderKind::SetLength });
        chunk.outstanding += 1;
    }
    space.chunk = Some(chunk);
}

/// Zeroes what may hold old bytes and would be read.
fn zero_old(space: &mut Space, cx: &mut Context<'_>) {
    let Some(chunk) = &mut space.chunk else { return };
    chunk.stage = Stage::Zeroing;
    if space.exact || space.planted.no_zeroing {
        return;
    }
    for (at, &start) in chunk.starts.iter().enumerate() {
        let offset_bytes = u64::from(start) * SECTOR_BYTES;
        if at < chunk.reused || offset_bytes < space.zero_from {
            let kind = OrderKind::Zero(space.stride * SECTOR_BYTES);
            cx.order(Order { tag: tag::CHUNK, offset_bytes, kind });
            chunk.outstanding += 1;
        }
    }
}

/// Full bitmaps where every sector reads as zero by itself, else empty ones where what is there may be something else.
fn write_bitmaps(space: &mut Space, cx: &mut Context<'_>) {
    let Some(chunk) = &mut space.chunk else { return };
    for (at, &start) in chunk.starts.iter().enumerate() {
        let offset_bytes = u64::from(start) * SECTOR_BYTES;
        let empty = at >= chunk.reused && space.zero_space && offset_bytes >= space.zero_from;
        if space.exact && (empty || space.planted.no_zeroing) {
            continue;
        }
        let bitmap = alloc::vec![if space.exact { 0 } else { 0xff }; 512];
        cx.forget(offset_bytes, SECTOR_BYTES);
        cx.order(Order { tag: tag::CHUNK, offset_bytes, kind: OrderKind::Write(bitmap) });
        chunk.outstanding += 1;
    }
    chunk.stage = Stage::Bitmaps;
}

fn end(space: &mut Space) {
    let Some(chunk) = space.chunk.take() else { return };
    space.end_sector = chunk.end_sector;
    space.length_bytes = space.length_bytes.max(chunk.end_sector * SECTOR_BYTES + FOOTER_BYTES);
    space.ready.extend(&chunk.starts);
    space.demand = false;
    space.not_ahead = false;
}

/// What a write is told for which there is no block.
pub(super) fn no_block(space: &mut Space) -> Wait {
    if !space.hopes() && space.no_room() {
        return Wait::Failed(Failure::NoSpace);
    }
    space.demand = true;
    Wait::Busy
}
