//! Reading what an image says about itself. Every length is bounded before it is trusted.

use alloc::string::String;
use alloc::vec::Vec;

use super::footer::{Flaw, Footer, Kind};
use super::layout::{
    BLOCK_BYTES, BatmapHeader, DISK_BYTES_MAX, FOOTER_BYTES, HEADER_BYTES, Header, LOCATOR_BYTES_MAX,
    Locator, batmap_used_bytes,
};
use crate::bytes::index;
use crate::error::{Corruption, Unsupported};
use crate::medium::Medium;

/// Block sizes that are read; written are only those of 2 MiB, as libvhd counts with no other.
const BLOCK_BYTES_READ: core::ops::RangeInclusive<u64> = 512..=256 << 20;

/// A part of the image that is no block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its name.
    pub what: &'static str,
    /// Its first byte.
    pub from: u64,
    /// The byte behind its last.
    pub to: u64,
}

/// What the two footers are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footers {
    /// There is a valid copy at byte 0 (never asked of a fixed image).
    pub copy: bool,
    /// There is a valid one at the end.
    pub end: bool,
    /// Both are there and equal.
    pub equal: bool,
    /// The one at the end lacks its last byte, as the first Virtual PC wrote it.
    pub short: bool,
}

impl Footers {
    /// Whether the footer at the end must be written anew.
    #[must_use]
    pub fn stale(&self) -> bool {
        !self.end || self.copy && !self.equal
    }
}

/// A path to the parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentPath {
    /// Where it stands.
    pub locator: Locator,
    /// The path with slashes, if it can be read. Relative ones are relative to the child.
    pub path: Option<String>,
}

/// A batmap that is where it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batmap {
    /// Its header.
    pub header: BatmapHeader,
    /// Where the header lies.
    pub at_bytes: u64,
    /// The part in use, without what it says of blocks behind the disk; empty where the checksum does not fit, so that nothing is
    /// taken from it.
    pub map: Vec<u8>,
}

/// What an image says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The footer that counts.
    pub footer: Footer,
    /// The dynamic header, of all but fixed images.
    pub header: Option<Header>,
    /// Length of the file or device.
    pub length_bytes: u64,
    /// Size of the disk, in whole sectors.
    pub disk_bytes: u64,
    /// The footers.
    pub footers: Footers,
    /// The batmap.
    pub batmap: Option<Batmap>,
    /// What is no block, in the order of the file.
    pub regions: Vec<Region>,
    /// Where the parent may be found.
    pub parents: Vec<ParentPath>,
}

fn malformed(what: &'static str, at_bytes: u64) -> Unsupported {
    Unsupported::Malformed(Corruption { what, at_bytes })
}

fn read<const N: usize>(medium: &mut dyn Medium, at_bytes: u64) -> Result<[u8; N], Unsupported> {
    let mut bytes = [0; N];
    medium.read(at_bytes, &mut bytes)?;
    Ok(bytes)
}

/// The footer at the end, and whether it is a short one.
fn end_footer(
    medium: &mut dyn Medium,
    length_bytes: u64,
) -> Result<(Result<Footer, Flaw>, bool), Unsupported> {
    let whole = Footer::parse(read(medium, length_bytes - FOOTER_BYTES)?);
    if matches!(whole, Ok(_) | Err(Flaw::Poisoned)) {
        return Ok((whole, false));
    }
    match Footer::parse(read(medium, length_bytes - FOOTER_BYTES + 1)?) {
        short @ (Ok(_) | Err(Flaw::Poisoned)) => Ok((short, true)),
        Err(_) => Ok((whole, false)),
    }
}

/// Which footer counts. A guest can write sector 0 of a fixed image, and, after a crash, what is the last sector of a dynamic one: so
/// two footers that are not of one image are never weighed against each other.
fn choose(copy: Result<Footer, Flaw>, end: Result<Footer, Flaw>, end_at: u64) -> Result<Footer, Unsupported> {
    match (copy, end) {
        (Err(Flaw::Poisoned), Ok(footer)) if footer.kind() == Kind::Fixed => Ok(footer),
        (Err(Flaw::Poisoned), _) | (Err(_), Err(Flaw::Poisoned)) => {
            Err(Unsupported::Refused("the image was disabled by a tool (v_poison); repair takes that back"))
        }
        (Ok(copy), Ok(end)) if copy.uuid() != end.uuid() || copy.kind() != end.kind() => {
            Err(malformed("two footers that contradict each other (one may be a guest's)", end_at))
        }
        (Ok(copy), _) if copy.kind() != Kind::Fixed => Ok(copy),
        (_, Ok(end)) => Ok(end),
        (Ok(_), Err(_)) => Err(malformed("fixed image without its footer", end_at)),
        (Err(Flaw::Unknown), _) | (_, Err(Flaw::Unknown)) => {
            Err(malformed("footer of an unknown type or version", end_at))
        }
        (Err(Flaw::Checksum), _) | (_, Err(Flaw::Checksum)) => {
            Err(malformed("footer with a wrong checksum, and no good copy", end_at))
        }
        _ => Err(malformed("no footer (conectix)", end_at)),
    }
}

/// Reads footers, header, locators and batmap. Blocks are not looked at.
///
/// # Errors
/// [`Unsupported`], with the name of what is wrong and where.
pub fn read_headers(medium: &mut dyn Medium) -> Result<Headers, Unsupported> {
    let length_bytes = medium.length_bytes();
    if length_bytes < FOOTER_BYTES {
        return Err(malformed("shorter than a footer", 0));
    }
    let end_at = length_bytes - FOOTER_BYTES;
    let copy = Footer::parse(read(medium, 0)?);
    let (end, short) = end_footer(medium, length_bytes)?;
    let footer = choose(copy, end, end_at)?;
    let footers = Footers { copy: copy.is_ok(), end: end.is_ok(), equal: copy == end, short };
    let disk_bytes = footer.disk_bytes() / 512 * 512;
    if disk_bytes == 0 {
        return Err(malformed("a disk without a sector", end_at));
    }
    let mut headers = Headers {
        footer,
        header: None,
        length_bytes,
        disk_bytes,
        footers,
        batmap: None,
        regions: Vec::new(),
        parents: Vec::new(),
    };
    if footer.kind() == Kind::Fixed {
        if disk_bytes > end_at + u64::from(short) {
            return Err(malformed("a fixed disk that is larger than its image", end_at));
        }
        return Ok(headers);
    }
    if disk_bytes > DISK_BYTES_MAX {
        return Err(Unsupported::Refused("a dynamic VHD cannot be larger than 2040 GiB"));
    }
    if footer.by_tap_0_1() {
        return Err(Unsupported::Refused(
            "written by tapdisk 0.1, whose bitmaps are in another order; convert it with vhd-util",
        ));
    }
    headers.read_dynamic(medium)?;
    Ok(headers)
}

impl Headers {
    fn read_dynamic(&mut self, medium: &mut dyn Medium) -> Result<(), Unsupported> {
        let at = self.footer.header_bytes();
        self.region("footer", 0, FOOTER_BYTES)?;
        self.region("dynamic header", at, HEADER_BYTES)?;
        let header = Header::parse(read(medium, at)?).map_err(|what| malformed(what, at))?;
        let block = header.block_bytes();
        if !block.is_power_of_two() || !BLOCK_BYTES_READ.contains(&block) {
            return Err(malformed("a block size that is no power of two from 512 B to 256 MiB", at + 32));
        }
        let (table, table_length) = (header.table_bytes(), u64::from(header.entries()) * 4);
        if table % 512 != 0 {
            return Err(malformed("a BAT that does not begin at a sector", at + 16));
        }
        if u64::from(header.entries()) < self.disk_bytes.div_ceil(block) {
            return Err(malformed("a BAT that is smaller than the disk", at + 28));
        }
        self.region("BAT", table, table_length.next_multiple_of(512))?;
        self.header = Some(header);
        self.read_batmap(medium, table + table_length.next_multiple_of(512))?;
        if self.footer.kind() == Kind::Differencing {
            self.read_parents(medium)?;
        }
        self.regions.sort_unstable_by_key(|region| region.from);
        let behind = self.regions.iter().skip(1);
        let overlaps = self.regions.iter().zip(behind).find(|(one, next)| {
            one.to > next.from && (one.what, next.what) != ("parent locator", "parent locator")
        });
        match overlaps {
            Some((_, next)) => Err(malformed("metadata that overlap", next.from)),
            None => Ok(()),
        }
    }

    fn region(&mut self, what: &'static str, from: u64, length: u64) -> Result<(), Unsupported> {
        match from.checked_add(length) {
            Some(to) if to <= self.length_bytes => {
                self.regions.push(Region { what, from, to });
                Ok(())
            }
            _ => Err(malformed(what_is_outside(what), from)),
        }
    }

    /// A batmap that is not as it should be is no batmap: it is only a hint.
    fn read_batmap(&mut self, medium: &mut dyn Medium, at_bytes: u64) -> Result<(), Unsupported> {
        let entries = self.header.as_ref().map_or(0, Header::entries);
        let fits = self.footer.by_tap()
            && self.header.as_ref().is_some_and(|header| header.block_bytes() == BLOCK_BYTES);
        if !fits || at_bytes.saturating_add(512) > self.length_bytes {
            return Ok(());
        }
        let Some(header) = BatmapHeader::parse(read(medium, at_bytes)?) else { return Ok(()) };
        let room = u64::from(header.map_sectors()) * 512;
        let from = header.map_bytes();
        let used = batmap_used_bytes(self.footer.current_bytes());
        let whole = from % 512 == 0 && room * 8 >= u64::from(entries) && used <= room && room <= 1 << 20;
        if !whole || from.checked_add(room).is_none_or(|to| to > self.length_bytes) {
            return Ok(());
        }
        let mut map = alloc::vec![0; index(used)];
        medium.read(from, &mut map)?;
        if header.fits(&map) {
            only_first(&mut map, self.blocks());
        } else {
            map.clear();
        }
        self.region("batmap header", at_bytes, 512)?;
        self.region("batmap", from, room)?;
        self.batmap = Some(Batmap { header, at_bytes, map });
        Ok(())
    }

    fn read_parents(&mut self, medium: &mut dyn Medium) -> Result<(), Unsupported> {
        let locators = self.header.as_ref().map_or_else(Vec::new, Header::locators);
        for locator in locators {
            if locator.length_bytes > LOCATOR_BYTES_MAX {
                return Err(malformed("a parent locator longer than any path", locator.offset_bytes));
            }
            let space = locator.space_bytes.max(u64::from(locator.length_bytes));
            self.region("parent locator", locator.offset_bytes, space)?;
            let mut bytes = alloc::vec![0; locator.length_bytes as usize];
            medium.read(locator.offset_bytes, &mut bytes)?;
            self.parents.push(ParentPath { locator, path: locator.path(&bytes) });
        }
        Ok(())
    }

    /// Bytes of a block's data.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.header.as_ref().map_or(BLOCK_BYTES, Header::block_bytes)
    }

    /// Sectors of a block's bitmap.
    #[must_use]
    pub fn bitmap_sectors(&self) -> u64 {
        (self.block_bytes() / 512).div_ceil(8).div_ceil(512)
    }

    /// Entries of the BAT that the disk uses.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        crate::bytes::narrow(self.disk_bytes.div_ceil(self.block_bytes()))
    }

    /// The byte behind all metadata.
    #[must_use]
    pub fn end_of_metadata(&self) -> u64 {
        self.regions.iter().map(|region| region.to).max().unwrap_or(0)
    }

    /// Identity of the parent, of a differencing image; `Some(None)` where it is raw.
    #[must_use]
    pub fn parent_uuid(&self) -> Option<Option<[u8; 16]>> {
        let header = self.header.as_ref().filter(|_| self.footer.kind() == Kind::Differencing)?;
        Some(Some(header.parent_uuid()).filter(|uuid| uuid != &[0; 16]))
    }
}

/// Clears all bits but the first so many.
fn only_first(map: &mut [u8], bits: u32) {
    for (at, byte) in (0_u32..).zip(map) {
        let left = bits.saturating_sub(at.saturating_mul(8)).min(8);
        *byte &= !0xff_u8.checked_shr(left).unwrap_or(0);
    }
}

fn what_is_outside(what: &str) -> &'static str {
    match what {
        "dynamic header" => "a dynamic header past the end of the image",
        "BAT" => "a BAT past the end of the image",
        "parent locator" => "a parent locator past the end of the image",
        _ => "metadata past the end of the image",
    }
}
