//! Changes of images that nobody has open: size, parent, the hidden flag. Each can be interrupted at any time: what counts is the copy
//! of the footer at byte 0, one sector, and it is switched when all else is durable.

use alloc::vec::Vec;

use super::check::write_footers;
use super::create::{Parent, Plan};
use super::footer::{Footer, Kind};
use super::headers::{Headers, read_headers};
use super::layout::{BLOCK_BYTES, DISK_BYTES_MAX, FOOTER_BYTES, HEADER_BYTES, Header, NO_BLOCK, next_start};
use super::open::for_each_entry;
use crate::SECTOR_BYTES;
use crate::bytes::{index, narrow, wide};
use crate::error::Unsupported;
use crate::medium::Medium;

/// Bytes that are copied at a time when a block moves.
const COPY_BYTES: u64 = 64 << 10;

/// Hides an image, or shows it again.
///
/// # Errors
/// [`Unsupported`].
pub fn set_hidden(medium: &mut dyn Medium, hidden: bool) -> Result<(), Unsupported> {
    let headers = read_headers(medium)?;
    let mut footer = headers.footer;
    footer.set_hidden(hidden);
    if footer.kind() != Kind::Fixed {
        medium.write(0, &footer.0)?;
        medium.sync()?;
    }
    // Where the footer at the end is missing, whoever has the image open will write it, or repair.
    if headers.footers.end {
        let own = if headers.footers.short { FOOTER_BYTES - 1 } else { FOOTER_BYTES };
        medium.write(headers.length_bytes - own, &footer.0)?;
        medium.sync()?;
    }
    Ok(())
}

/// Gives a differencing image another parent (or the same one another path). No data are looked at: the new parent must hold what the
/// old one did, where the image shows it.
///
/// # Errors
/// [`Unsupported`].
pub fn set_parent(medium: &mut dyn Medium, grows: bool, parent: &Parent) -> Result<(), Unsupported> {
    let headers = read_headers(medium)?;
    let Some(old) = headers.header.as_ref().filter(|_| headers.footer.kind() == Kind::Differencing) else {
        return Err(Unsupported::Refused("only a differencing VHD has a parent"));
    };
    let mut image = Image::new(medium, &headers, grows)?;
    let length =
        HEADER_BYTES + parent.locators(0)?.iter().map(|(locator, _)| locator.space_bytes).sum::<u64>();
    let at_bytes = image.make_room(medium, length)?;
    let locators = parent.locators(at_bytes + HEADER_BYTES)?;
    let mut header = old.clone();
    parent.write_into(&mut header, &locators);
    medium.write(at_bytes, &header.0)?;
    for (locator, text) in &locators {
        medium.write(locator.offset_bytes, text)?;
    }
    let mut footer = headers.footer;
    footer.set_header_bytes(at_bytes);
    image.switch(medium, &footer)
}

/// Makes the disk larger. Within the room of the metadata nothing moves; beyond it, the blocks that are in the way of a larger BAT move
/// to the end, one by one, each durable before it is pointed to. Returns the size of the disk.
///
/// # Errors
/// [`Unsupported`].
pub fn grow(medium: &mut dyn Medium, grows: bool, disk_bytes: u64) -> Result<u64, Unsupported> {
    let headers = read_headers(medium)?;
    if disk_bytes < headers.disk_bytes {
        return Err(Unsupported::Refused("a VHD cannot be made smaller"));
    }
    if headers.footer.kind() == Kind::Fixed {
        return grow_fixed(medium, &headers, disk_bytes);
    }
    let disk_bytes = disk_bytes.next_multiple_of(BLOCK_BYTES);
    if disk_bytes > DISK_BYTES_MAX {
        return Err(Unsupported::Refused("a VHD cannot be larger than 2040 GiB"));
    }
    if headers.block_bytes() != BLOCK_BYTES {
        return Err(Unsupported::Refused("a VHD whose blocks are not of 2 MiB cannot be grown"));
    }
    let mut image = Image::new(medium, &headers, grows)?;
    let mut footer = headers.footer;
    footer.set_disk_bytes(disk_bytes);
    let entries = headers.header.as_ref().map_or(0, Header::entries);
    if disk_bytes.div_ceil(BLOCK_BYTES) <= u64::from(entries) {
        image.clear_entries(medium, narrow(disk_bytes / BLOCK_BYTES))?;
    } else {
        let at_bytes = image.enlarge(medium, disk_bytes)?;
        footer.set_header_bytes(at_bytes);
    }
    image.switch(medium, &footer)?;
    Ok(disk_bytes)
}

fn grow_fixed(medium: &mut dyn Medium, headers: &Headers, disk_bytes: u64) -> Result<u64, Unsupported> {
    let disk_bytes = disk_bytes.next_multiple_of(SECTOR_BYTES);
    if disk_bytes == headers.disk_bytes {
        return Ok(disk_bytes);
    }
    let mut footer = headers.footer;
    footer.set_disk_bytes(disk_bytes);
    let old_end = headers.length_bytes.next_multiple_of(SECTOR_BYTES) - FOOTER_BYTES;
    medium.set_length(disk_bytes + FOOTER_BYTES)?;
    medium.write(disk_bytes, &footer.0)?;
    medium.sync()?;
    // The old footer is now a sector of the disk that was never written.
    medium.zero(old_end, FOOTER_BYTES)?;
    medium.sync()?;
    Ok(disk_bytes)
}

/// An image whose blocks are moved.
struct Image<'a> {
    headers: &'a Headers,
    table_bytes: u64,
    end_sector: u64,
    /// Where the first block begins.
    lowest: u64,
    grows: bool,
    device_end: u64,
}

impl Image<'_> {
    fn new<'a>(medium: &mut dyn Medium, headers: &'a Headers, grows: bool) -> Result<Image<'a>, Unsupported> {
        let table_bytes = headers.header.as_ref().map_or(0, Header::table_bytes);
        let report = super::check::check(medium, grows, false)?;
        if report.corruptions > 0 {
            let what = report
                .findings
                .iter()
                .find(|found| found.what.contains("block") || found.what.contains("BAT"));
            return Err(match what {
                Some(what) => Unsupported::Malformed(*what),
                None => Unsupported::Refused("the image contradicts itself"),
            });
        }
        let stride = headers.block_bytes() / SECTOR_BYTES + headers.bitmap_sectors();
        let (mut end_sector, mut lowest) = (headers.end_of_metadata().div_ceil(SECTOR_BYTES), u64::MAX);
        for_each_entry(medium, table_bytes, headers.blocks(), |_, start| {
            if start != NO_BLOCK {
                end_sector = end_sector.max(u64::from(start) + stride);
                lowest = lowest.min(u64::from(start));
            }
            Ok(())
        })?;
        if grows && headers.footers.end {
            // What another tool left free before its footer stays free.
            end_sector = end_sector.max(headers.length_bytes / SECTOR_BYTES - 1);
        }
        let device_end = headers.length_bytes.saturating_sub(FOOTER_BYTES);
        Ok(Image { headers, table_bytes, end_sector, lowest, grows, device_end })
    }

    /// Finds room for metadata before the first block: a gap, the last one, or else blocks move away.
    fn make_room(&mut self, medium: &mut dyn Medium, length: u64) -> Result<u64, Unsupported> {
        let length = length.next_multiple_of(SECTOR_BYTES);
        let lowest = if self.lowest == u64::MAX { self.end_sector } else { self.lowest };
        let end = self.headers.end_of_metadata();
        let mut free_from = FOOTER_BYTES;
        let mut gap = None;
        for region in &self.headers.regions {
            if region.from >= free_from + length {
                gap = Some(region.from - length);
            }
            free_from = free_from.max(region.to);
        }
        if end + length <= lowest * SECTOR_BYTES {
            // The end of the room, so that a second place for the batmap, which lies before it, stays free.
            return Ok((lowest * SECTOR_BYTES - length) / SECTOR_BYTES * SECTOR_BYTES);
        }
        if let Some(gap) = gap {
            return Ok(gap);
        }
        self.move_blocks(medium, (end + length).div_ceil(SECTOR_BYTES))?;
        Ok(end)
    }

    /// Moves every block that begins before a sector to the end.
    fn move_blocks(&mut self, medium: &mut dyn Medium, before: u64) -> Result<(), Unsupported> {
        let no_space = Unsupported::Refused("no space left on the medium");
        if !self.grows && before * SECTOR_BYTES > self.device_end {
            return Err(no_space);
        }
        let mut moving = Vec::new();
        for_each_entry(medium, self.table_bytes, self.headers.blocks(), |block, start| {
            if u64::from(start) < before {
                moving.push((block, start));
            }
            Ok(())
        })?;
        self.end_sector = self.end_sector.max(before);
        for (block, start) in moving {
            let to = next_start(self.end_sector);
            self.end_sector = to + BLOCK_BYTES / SECTOR_BYTES + 1;
            let past_device = !self.grows && self.end_sector * SECTOR_BYTES > self.device_end;
            if past_device || self.end_sector > u64::from(NO_BLOCK) - 8 {
                return Err(no_space);
            }
            self.copy(medium, u64::from(start) * SECTOR_BYTES, to * SECTOR_BYTES)?;
            medium.sync()?;
            self.put_entry(medium, block, narrow(to))?;
            medium.sync()?;
        }
        Ok(())
    }

    fn copy(&self, medium: &mut dyn Medium, from: u64, to: u64) -> Result<(), Unsupported> {
        let length = BLOCK_BYTES + SECTOR_BYTES;
        if self.grows {
            // One sector more, as while an image is open: a guest's sector must not be the last one.
            medium.set_length(to + length + FOOTER_BYTES)?;
        }
        let mut done = 0;
        while done < length {
            let part = (length - done).min(COPY_BYTES);
            let mut bytes = alloc::vec![0; index(part)];
            medium.read(from + done, &mut bytes)?;
            if bytes.iter().any(|&byte| byte != 0) {
                medium.write(to + done, &bytes)?;
            } else {
                medium.zero(to + done, part)?;
            }
            done += part;
        }
        Ok(())
    }

    fn put_entry(&self, medium: &mut dyn Medium, block: u32, start: u32) -> Result<(), Unsupported> {
        let at = self.table_bytes + u64::from(block) * 4;
        let sector = at / SECTOR_BYTES * SECTOR_BYTES;
        let mut bytes = [0; 512];
        medium.read(sector, &mut bytes)?;
        crate::bytes::put(&mut bytes, index(at - sector), &start.to_be_bytes());
        medium.write(sector, &bytes)?;
        Ok(())
    }

    /// Sees to it that the entries behind the disk's blocks point nowhere, and that the batmap says nothing of them.
    fn clear_entries(&self, medium: &mut dyn Medium, blocks: u32) -> Result<(), Unsupported> {
        let first = self.headers.blocks();
        let mut stale = Vec::new();
        let skip = u64::from(first) * 4;
        for_each_entry(medium, self.table_bytes + skip, blocks.saturating_sub(first), |at, start| {
            if start != NO_BLOCK {
                stale.push(first + at);
            }
            Ok(())
        })?;
        for block in stale {
            self.put_entry(medium, block, NO_BLOCK)?;
        }
        if let Some(batmap) = &self.headers.batmap {
            let used = super::layout::batmap_used_bytes(self.headers.footer.current_bytes());
            let room = u64::from(batmap.header.map_sectors()) * 512;
            if room > used {
                medium.zero(batmap.header.map_bytes() + used, room - used)?;
            }
            let mut map = alloc::vec![0; batmap.map.len()];
            medium.read(batmap.header.map_bytes(), &mut map)?;
            if map != batmap.map {
                let mut header = batmap.header;
                header.set_map(header.map_bytes(), &batmap.map);
                medium.write(header.map_bytes(), &batmap.map)?;
                medium.write(batmap.at_bytes, &header.0)?;
            }
        }
        medium.sync()?;
        Ok(())
    }

    /// Writes header, BAT, batmap and locators for a larger disk beside the old ones. Says where the header lies.
    fn enlarge(&mut self, medium: &mut dyn Medium, disk_bytes: u64) -> Result<u64, Unsupported> {
        let locators =
            self.headers.parents.iter().map(|parent| parent.locator.space_bytes.next_multiple_of(512));
        let plan = Plan::new(0, disk_bytes);
        let length = HEADER_BYTES + plan.end() + locators.sum::<u64>();
        let at_bytes = self.headers.end_of_metadata().next_multiple_of(SECTOR_BYTES);
        self.move_blocks(medium, (at_bytes + length).div_ceil(SECTOR_BYTES))?;
        let plan = Plan::new(at_bytes + HEADER_BYTES, disk_bytes);
        let mut table = Vec::new();
        for_each_entry(medium, self.table_bytes, self.headers.blocks(), |_, start| {
            table.extend_from_slice(&start.to_be_bytes());
            Ok(())
        })?;
        let map = self.headers.batmap.as_ref().map_or(&[][..], |batmap| &batmap.map);
        if self.grows {
            medium
                .set_length((self.end_sector.max((at_bytes + length) / SECTOR_BYTES) + 1) * SECTOR_BYTES)?;
        }
        plan.write(medium, &table, map, disk_bytes)?;
        let mut places = Vec::new();
        let mut to = plan.end();
        for parent in &self.headers.parents {
            let mut text = alloc::vec![0; index(parent.locator.space_bytes.next_multiple_of(512))];
            medium.read(parent.locator.offset_bytes, &mut text)?;
            medium.write(to, &text)?;
            places.push(super::Locator { offset_bytes: to, ..parent.locator });
            to += wide(text.len());
        }
        let Some(old) = &self.headers.header else { return Ok(at_bytes) };
        let mut header = Header::new(plan.table_bytes, plan.entries);
        header.set_parent_like(old, &places);
        medium.write(at_bytes, &header.0)?;
        Ok(at_bytes)
    }

    /// All is written: it becomes durable, and the footer points to it.
    fn switch(&self, medium: &mut dyn Medium, footer: &Footer) -> Result<(), Unsupported> {
        medium.sync()?;
        write_footers(medium, footer, self.grows.then_some(self.end_sector * SECTOR_BYTES))
    }
}
