//! The bytes of a VHD's structures: dynamic header, batmap header, parent locators; the footer is next door. Big endian throughout.
//!
//! Source: Microsoft's "Virtual Hard Disk Image Format Specification" 1.0, and blktap's libvhd for what it adds (the hidden flag, the
//! batmap) and for where it is at variance (locator space in bytes, a file of 511 bytes less).

use alloc::string::String;
use alloc::vec::Vec;

use crate::bytes::{be32, be64, put};

/// Bytes of a footer, and of the copy at byte 0.
pub(super) const FOOTER_BYTES: u64 = 512;
/// Bytes of a dynamic header.
pub(super) const HEADER_BYTES: u64 = 1024;
/// Bytes of a block's data in every image that is written.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Largest disk: 2040 GiB, the bound of Microsoft, qemu and blktap alike. All of it and its bitmaps stay below 2^32 sectors.
pub const DISK_BYTES_MAX: u64 = 2040 << 30;
/// A BAT entry of a block that is not there.
pub(super) const NO_BLOCK: u32 = u32::MAX;
/// Bytes of a parent locator's text at most: a path of 4096 characters in UTF-16.
pub(super) const LOCATOR_BYTES_MAX: u32 = 8192;
/// Seconds from 1970 to 2000, the origin of time stamps.
pub(super) const EPOCH: u64 = 946_684_800;

const HEADER_COOKIE: &[u8; 8] = b"cxsparse";
const BATMAP_COOKIE: &[u8; 8] = b"tdbatmap";
pub(super) const FORMAT_VERSION: u32 = 0x0001_0000;
const BATMAP_1_1: u32 = 0x0001_0001;
const BATMAP_1_2: u32 = 0x0001_0002;

/// Ones' complement of the sum of all bytes, with the checksum's own taken as zero.
pub(super) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let own = at..at + 4;
    let sum = bytes.iter().enumerate().filter(|(place, _)| !own.contains(place));
    !sum.fold(0u32, |sum, (_, &byte)| sum.wrapping_add(u32::from(byte)))
}

/// Where one of the eight places for a parent's path points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locator {
    /// Platform code: `W2ru`, `W2ku`, `MacX`, …
    pub code: [u8; 4],
    /// Room that it has, in bytes.
    pub space_bytes: u64,
    /// Length of the text.
    pub length_bytes: u32,
    /// Where in the image.
    pub offset_bytes: u64,
}

/// A dynamic header. What it does not understand it keeps.
#[derive(Clone, PartialEq, Eq)]
pub struct Header(pub [u8; 1024]);

impl core::fmt::Debug for Header {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Header {{ table {} entries {} }}", self.table_bytes(), self.entries())
    }
}

impl Header {
    /// A header of a new image with blocks of 2 MiB.
    #[must_use]
    pub fn new(table_bytes: u64, entries: u32) -> Header {
        let mut header = Header([0; 1024]);
        let bytes = &mut header.0;
        put(bytes, 0, HEADER_COOKIE);
        put(bytes, 8, &u64::MAX.to_be_bytes());
        put(bytes, 16, &table_bytes.to_be_bytes());
        put(bytes, 24, &FORMAT_VERSION.to_be_bytes());
        put(bytes, 28, &entries.to_be_bytes());
        put(bytes, 32, &crate::bytes::narrow(BLOCK_BYTES).to_be_bytes());
        header.seal();
        header
    }

    /// Takes 1024 bytes for a dynamic header, or says what is wrong.
    ///
    /// # Errors
    /// What is wrong, in the specification's terms.
    pub fn parse(bytes: [u8; 1024]) -> Result<Header, &'static str> {
        let header = Header(bytes);
        if header.0.get(..8) != Some(HEADER_COOKIE) {
            return Err("no dynamic header (cxsparse)");
        }
        if checksum(&header.0, 36) != be32(&header.0, 36) {
            return Err("dynamic header with a wrong checksum");
        }
        if be32(&header.0, 24) >> 16 != 1 {
            return Err("dynamic header of an unknown version");
        }
        Ok(header)
    }

    /// Where the BAT begins.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        be64(&self.0, 16)
    }

    /// Entries that the BAT has room for.
    #[must_use]
    pub fn entries(&self) -> u32 {
        be32(&self.0, 28)
    }

    /// Bytes of data in a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        u64::from(be32(&self.0, 32))
    }

    /// Identity of the parent; all zero for a raw one.
    #[must_use]
    pub fn parent_uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.0[40..56]);
        uuid
    }

    /// The parent's base name, as the creator saw it.
    #[must_use]
    pub fn parent_name(&self) -> String {
        utf16(&self.0[64..576], u16::from_be_bytes)
    }

    /// The places for paths that are in use, as they say; nothing of them is checked.
    #[must_use]
    pub fn locators(&self) -> Vec<Locator> {
        let places = (576..768).step_by(24).filter_map(|at| self.0.get(at..at + 24));
        places.filter(|place| be32(place, 0) != 0).map(Locator::parse).collect()
    }

    /// Names a parent. A null UUID is a raw one. `timestamp` counts from 2000.
    pub fn set_parent(&mut self, uuid: [u8; 16], timestamp: u32, name: &str, locators: &[Locator]) {
        put(&mut self.0, 40, &uuid);
        put(&mut self.0, 56, &timestamp.to_be_bytes());
        self.0[64..768].fill(0);
        for (at, unit) in name.encode_utf16().take(255).enumerate() {
            put(&mut self.0, 64 + at * 2, &unit.to_be_bytes());
        }
        for (at, locator) in locators.iter().take(8).enumerate() {
            put(&mut self.0, 576 + at * 24, &locator.encode());
        }
        self.seal();
    }

    /// Takes what another header says of the parent, with the texts of the locators in other places.
    pub(super) fn set_parent_like(&mut self, other: &Header, locators: &[Locator]) {
        self.0[40..576].copy_from_slice(&other.0[40..576]);
        for (at, locator) in locators.iter().take(8).enumerate() {
            put(&mut self.0, 576 + at * 24, &locator.encode());
        }
        self.seal();
    }

    fn seal(&mut self) {
        let sum = checksum(&self.0, 36);
        put(&mut self.0, 36, &sum.to_be_bytes());
    }
}

impl Locator {
    /// Space counts sectors by the specification, and bytes by habit: what is below a sector can only be sectors.
    fn parse(place: &[u8]) -> Locator {
        let space = u64::from(be32(place, 4));
        let mut code = [0; 4];
        code.copy_from_slice(place.get(..4).unwrap_or(&[0; 4]));
        Locator {
            code,
            space_bytes: if space < 512 { space * 512 } else { space },
            length_bytes: be32(place, 8),
            offset_bytes: be64(place, 16),
        }
    }

    fn encode(&self) -> [u8; 24] {
        let mut place = [0; 24];
        put(&mut place, 0, &self.code);
        put(&mut place, 4, &crate::bytes::narrow(self.space_bytes).to_be_bytes());
        put(&mut place, 8, &self.length_bytes.to_be_bytes());
        put(&mut place, 16, &self.offset_bytes.to_be_bytes());
        place
    }

    /// The path in a locator's bytes, with slashes; `None` where the code is one that nobody can read (`Mac ` is an alias record).
    #[must_use]
    pub fn path(&self, bytes: &[u8]) -> Option<String> {
        let bytes = bytes.get(..self.length_bytes as usize).unwrap_or(bytes);
        let path = match &self.code {
            b"W2ku" | b"W2ru" => utf16(bytes, u16::from_le_bytes),
            b"Wi2k" | b"Wi2r" => {
                bytes.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte)).collect()
            }
            b"MacX" => {
                let text = core::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
                return Some(String::from(text.strip_prefix("file://").unwrap_or(text)));
            }
            _ => return None,
        };
        let path = path.replace('\\', "/");
        let rest = path.strip_prefix("C:").or_else(|| path.strip_prefix("c:")).unwrap_or(&path);
        Some(String::from(rest))
    }

    /// The bytes for a path with slashes in the form that a code asks for: `W2ku`, `W2ru` or `MacX`.
    #[must_use]
    pub fn text(code: [u8; 4], path: &str) -> Vec<u8> {
        if &code == b"MacX" {
            return [b"file://", path.as_bytes()].concat();
        }
        let bare = path.strip_prefix("./").unwrap_or(path);
        let start = if path.starts_with('/') { "" } else { ".\\" };
        let units = start.encode_utf16().chain(bare.encode_utf16());
        let slash = |unit: u16| if unit == u16::from(b'/') { u16::from(b'\\') } else { unit };
        units.flat_map(|unit| slash(unit).to_le_bytes()).collect()
    }
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let pairs = bytes.chunks_exact(2).filter_map(|pair| <[u8; 2]>::try_from(pair).ok());
    let units = pairs.map(unit).take_while(|&unit| unit != 0);
    char::decode_utf16(units).map(|found| found.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

/// blktap's hint of which blocks are full: where the map lies, and its sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatmapHeader(pub [u8; 512]);

impl BatmapHeader {
    /// A header of a map of so many sectors.
    #[must_use]
    pub fn new(map_bytes: u64, map_sectors: u32, map: &[u8]) -> BatmapHeader {
        let mut header = BatmapHeader([0; 512]);
        put(&mut header.0, 0, BATMAP_COOKIE);
        put(&mut header.0, 16, &map_sectors.to_be_bytes());
        put(&mut header.0, 20, &BATMAP_1_2.to_be_bytes());
        header.set_map(map_bytes, map);
        header
    }

    /// Takes 512 bytes for a batmap header.
    #[must_use]
    pub fn parse(bytes: [u8; 512]) -> Option<BatmapHeader> {
        let header = BatmapHeader(bytes);
        let fits = header.0.get(..8) == Some(BATMAP_COOKIE) && be32(&header.0, 20) <= BATMAP_1_2;
        fits.then_some(header)
    }

    /// Where the map lies.
    #[must_use]
    pub fn map_bytes(&self) -> u64 {
        be64(&self.0, 8)
    }

    /// Its room in sectors.
    #[must_use]
    pub fn map_sectors(&self) -> u32 {
        be32(&self.0, 16)
    }

    /// The marker byte of blktap's tools.
    #[must_use]
    pub fn marker(&self) -> u8 {
        self.0[28]
    }

    /// Whether this is the map that the header was written for. The map's part that is in use counts, as in libvhd.
    #[must_use]
    pub fn fits(&self, map: &[u8]) -> bool {
        self.sum(map) == be32(&self.0, 24)
    }

    /// Version 1.1 summed up signed bytes.
    fn sum(&self, map: &[u8]) -> u32 {
        let signed = be32(&self.0, 20) == BATMAP_1_1;
        let value = |byte: u8| {
            if signed { i32::from(byte.cast_signed()).cast_unsigned() } else { u32::from(byte) }
        };
        !map.iter().fold(0u32, |sum, &byte| sum.wrapping_add(value(byte)))
    }

    /// Says where the map lies from now on, and sums it up.
    pub fn set_map(&mut self, map_bytes: u64, map: &[u8]) {
        put(&mut self.0, 8, &map_bytes.to_be_bytes());
        let sum = self.sum(map);
        put(&mut self.0, 24, &sum.to_be_bytes());
    }
}

/// Bytes of the part of a batmap that a disk of this size uses, and that its checksum covers: libvhd rounds down to whole blocks of
/// 8 and up to sectors.
#[must_use]
pub(super) fn batmap_used_bytes(current_bytes: u64) -> u64 {
    (current_bytes / BLOCK_BYTES / 8).div_ceil(512).max(1) * 512
}

/// The sector where a new block's bitmap begins, at or behind `end_sector`: data begin at a multiple of 4 KiB.
#[must_use]
pub(super) fn next_start(end_sector: u64) -> u64 {
    (end_sector + 1).next_multiple_of(8) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_come_back_from_every_kind_of_locator() {
        for (code, path, back) in [
            (*b"W2ru", "./base.vhd", "./base.vhd"),
            (*b"W2ku", "/sr/base.vhd", "/sr/base.vhd"),
            (*b"MacX", "./bäse.vhd", "./bäse.vhd"),
            (*b"W2ru", "up/bäse.vhd", "./up/bäse.vhd"),
        ] {
            let text = Locator::text(code, path);
            let locator = Locator {
                code,
                space_bytes: 512,
                length_bytes: u32::try_from(text.len()).unwrap(),
                offset_bytes: 0,
            };
            assert_eq!(locator.path(&text).as_deref(), Some(back));
        }
        let old = Locator { code: *b"Wi2k", space_bytes: 512, length_bytes: 9, offset_bytes: 0 };
        assert_eq!(old.path(b"C:\\a\\b.vhd").as_deref(), Some("/a/b.vh"));
        assert_eq!(Locator { code: *b"Mac ", ..old }.path(b"x"), None);
    }

    #[test]
    fn signed_and_unsigned_batmap_sums() {
        let mut header = BatmapHeader::new(4096, 1, &[0xff; 512]);
        assert!(header.fits(&[0xff; 512]));
        put(&mut header.0, 20, &BATMAP_1_1.to_be_bytes());
        assert!(!header.fits(&[0xff; 512]));
        header.set_map(4096, &[0xff; 512]);
        assert!(header.fits(&[0xff; 512]));
    }
}
