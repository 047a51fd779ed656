//! New images.

use alloc::string::String;
use alloc::vec::Vec;

use super::footer::{Footer, Kind};
use super::headers::Headers;
use super::layout::{
    BLOCK_BYTES, BatmapHeader, DISK_BYTES_MAX, FOOTER_BYTES, HEADER_BYTES, Header, LOCATOR_BYTES_MAX,
    Locator, batmap_used_bytes,
};
use crate::bytes::{index, narrow, wide};
use crate::error::{Failure, Unsupported};
use crate::medium::Medium;

/// Room left behind the metadata, so that a header with another parent's name can be written beside the old one.
const SPARE_BYTES: u64 = 16 << 10;

/// The parent of a differencing image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its identity; `None` for a raw one.
    pub uuid: Option<[u8; 16]>,
    /// Time of its creation, in seconds since 2000. No reader of today goes by it.
    pub timestamp: u32,
    /// Path relative to the child's directory. blktap puts it in all three locators, so do we: an absolute path in one would win over
    /// the relative ones, and be wrong as soon as the directory is mounted elsewhere.
    pub path: String,
}

impl Parent {
    /// The parent that this image would be.
    #[must_use]
    pub fn of(headers: &Headers, path: String) -> Parent {
        Parent { uuid: Some(headers.footer.uuid()), timestamp: headers.footer.timestamp(), path }
    }

    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// The three locators, and their texts, from an offset on.
    pub(super) fn locators(&self, from_bytes: u64) -> Result<Vec<(Locator, Vec<u8>)>, Unsupported> {
        let mut offset_bytes = from_bytes;
        let mut found = Vec::new();
        for code in [*b"MacX", *b"W2ku", *b"W2ru"] {
            let mut text = Locator::text(code, &self.path);
            if self.name().is_empty()
                || text.len() > index(u64::from(LOCATOR_BYTES_MAX))
                || self.name().len() > 255
            {
                return Err(Unsupported::Refused("the parent's path is empty or too long for a VHD"));
            }
            let length_bytes = narrow(wide(text.len()));
            text.resize(text.len().next_multiple_of(512), 0);
            let space_bytes = wide(text.len());
            found.push((Locator { code, space_bytes, length_bytes, offset_bytes }, text));
            offset_bytes += space_bytes;
        }
        Ok(found)
    }

    pub(super) fn write_into(&self, header: &mut Header, locators: &[(Locator, Vec<u8>)]) {
        let places: Vec<Locator> = locators.iter().map(|(locator, _)| *locator).collect();
        header.set_parent(self.uuid.unwrap_or_default(), self.timestamp, self.name(), &places);
    }
}

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    /// Which kind; differencing if and only if there is a parent.
    pub kind: Kind,
    /// Size of the disk: a multiple of 512. Of all but fixed images it is rounded up to 2 MiB, as libvhd counts whole blocks only.
    pub disk_bytes: u64,
    /// Disk for which there is to be room in the metadata, if that is more.
    pub room_bytes: u64,
    /// The image's identity.
    pub uuid: [u8; 16],
    /// Now, in seconds since 1970.
    pub seconds: u64,
    /// The parent.
    pub parent: Option<Parent>,
}

impl Create {
    /// A snapshot: a new leaf over an image, which from then on must not be written. The leaf has room to grow as far as the image has.
    #[must_use]
    pub fn snapshot(below: &Headers, path: String, uuid: [u8; 16], seconds: u64) -> Create {
        let entries = below.header.as_ref().map_or(0, Header::entries);
        let room_bytes = (u64::from(entries) * below.block_bytes()).min(DISK_BYTES_MAX);
        let parent = Some(Parent::of(below, path));
        Create { kind: Kind::Differencing, disk_bytes: below.disk_bytes, room_bytes, uuid, seconds, parent }
    }

    /// A snapshot of a raw image.
    #[must_use]
    pub fn snapshot_of_raw(disk_bytes: u64, path: String, uuid: [u8; 16], seconds: u64) -> Create {
        let parent = Some(Parent { uuid: None, timestamp: 0, path });
        Create { kind: Kind::Differencing, disk_bytes, room_bytes: 0, uuid, seconds, parent }
    }
}

/// Where the metadata of an image lie: BAT, batmap header, two maps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) table_bytes: u64,
    pub(super) table_length: u64,
    pub(super) entries: u32,
    pub(super) map_length: u64,
}

impl Plan {
    pub(super) fn new(table_bytes: u64, room_bytes: u64) -> Plan {
        let entries = room_bytes.div_ceil(BLOCK_BYTES);
        Plan {
            table_bytes,
            table_length: (entries * 4).next_multiple_of(512),
            entries: narrow(entries),
            map_length: entries.div_ceil(8).next_multiple_of(512).max(512),
        }
    }

    pub(super) fn batmap_header_bytes(&self) -> u64 {
        self.table_bytes + self.table_length
    }

    pub(super) fn map_bytes(&self) -> u64 {
        self.batmap_header_bytes() + 512
    }

    /// The byte behind the second map.
    pub(super) fn end(&self) -> u64 {
        self.map_bytes() + 2 * self.map_length
    }

    /// Writes a BAT and a batmap.
    pub(super) fn write(
        &self,
        medium: &mut dyn Medium,
        table: &[u8],
        map: &[u8],
        current_bytes: u64,
    ) -> Result<(), Failure> {
        let mut full_table = table.to_vec();
        full_table.resize(index(self.table_length), 0xff);
        let mut full_map = map.to_vec();
        full_map.resize(index(self.map_length), 0);
        medium.write(self.table_bytes, &full_table)?;
        medium.write(self.map_bytes(), &full_map)?;
        medium.zero(self.map_bytes() + self.map_length, self.map_length)?;
        let used = full_map.get(..index(batmap_used_bytes(current_bytes))).unwrap_or_default();
        let header = BatmapHeader::new(self.map_bytes(), narrow(self.map_length / 512), used);
        medium.write(self.batmap_header_bytes(), &header.0)
    }
}

/// Makes an image in an empty file, or on a device whose content is given up. The footers are written last, so what is interrupted
/// is no image. Returns the size of the disk.
///
/// # Errors
/// [`Unsupported::Refused`] for what the format cannot be, and what the medium says.
pub fn create(medium: &mut dyn Medium, create: &Create) -> Result<u64, Unsupported> {
    let fixed = create.kind == Kind::Fixed;
    let unit = if fixed { 512 } else { BLOCK_BYTES };
    let too_large = Unsupported::Refused("a VHD cannot be larger than 2040 GiB");
    let disk_bytes = create.disk_bytes.checked_next_multiple_of(unit).ok_or(too_large.clone())?;
    if disk_bytes == 0 {
        return Err(Unsupported::Refused("a disk needs at least one sector"));
    }
    if disk_bytes.max(create.room_bytes) > DISK_BYTES_MAX {
        return Err(too_large);
    }
    if (create.kind == Kind::Differencing) != create.parent.is_some() {
        return Err(Unsupported::Refused("a differencing VHD has a parent, and no other has"));
    }
    let device_bytes = medium.length_bytes();
    let footer = Footer::new(create.kind, disk_bytes, create.uuid, create.seconds);
    // What was there before must not be taken for an image while this one is made.
    medium.zero(0, FOOTER_BYTES)?;
    let end = if fixed { disk_bytes } else { write_metadata(medium, create, disk_bytes)? };
    let footer_at = end.max(device_bytes.saturating_sub(FOOTER_BYTES));
    medium.set_length(footer_at + FOOTER_BYTES)?;
    if device_bytes > 0 {
        medium.zero(device_bytes.saturating_sub(FOOTER_BYTES), FOOTER_BYTES)?;
    }
    medium.sync()?;
    if !fixed {
        medium.write(0, &footer.0)?;
    }
    medium.write(footer_at, &footer.0)?;
    medium.sync()?;
    Ok(disk_bytes)
}

/// Header, BAT, batmap, locators. Says where they end.
fn write_metadata(medium: &mut dyn Medium, create: &Create, disk_bytes: u64) -> Result<u64, Unsupported> {
    let plan = Plan::new(FOOTER_BYTES + HEADER_BYTES, disk_bytes.max(create.room_bytes));
    let mut header = Header::new(plan.table_bytes, plan.entries);
    let mut end = plan.end();
    if let Some(parent) = &create.parent {
        let locators = parent.locators(end)?;
        parent.write_into(&mut header, &locators);
        for (locator, text) in &locators {
            medium.write(locator.offset_bytes, text)?;
            end = locator.offset_bytes + locator.space_bytes;
        }
    }
    end += SPARE_BYTES;
    let length_bytes = medium.length_bytes();
    medium.set_length(end.max(length_bytes))?;
    plan.write(medium, &[], &[], disk_bytes)?;
    medium.write(FOOTER_BYTES, &header.0)?;
    Ok(end)
}
