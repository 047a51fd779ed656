//! A reader of VHDs written from the specification alone, and what blktap's `vhd-util check` checks.

use super::sparse::Sector;

/// Sectors and length of an image.
pub trait Bytes {
    fn at(&self, sector: u64) -> Sector;
    fn len(&self) -> u64;
}

impl Bytes for super::sparse::Sparse {
    fn at(&self, sector: u64) -> Sector {
        self.sector(sector)
    }
    fn len(&self) -> u64 {
        self.length()
    }
}

impl Bytes for super::sparse::Crash<'_> {
    fn at(&self, sector: u64) -> Sector {
        self.sector(sector)
    }
    fn len(&self) -> u64 {
        self.length()
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

fn sum(bytes: &[u8], without: std::ops::Range<usize>) -> u64 {
    let total: u32 = bytes
        .iter()
        .enumerate()
        .filter(|(at, _)| !without.contains(at))
        .map(|(_, &byte)| u32::from(byte))
        .sum();
    u64::from(!total)
}

pub fn footer_is_good(footer: &Sector) -> bool {
    &footer[..8] == b"conectix" && sum(footer, 64..68) == number(&footer[64..68])
}

#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    Here(Sector),
    Parent,
}

pub struct Model<'a> {
    image: &'a dyn Bytes,
    pub footer: Sector,
    pub blocks: u64,
    differencing: bool,
    table: u64,
    entries: u64,
    /// Map, if its checksum is right; where its header lies.
    pub batmap: Option<Vec<u8>>,
    pub has_batmap: bool,
    pub end_of_headers: u64,
    pub bat: Vec<u64>,
}

impl<'a> Model<'a> {
    /// Opens from the copy at 0.
    pub fn new(image: &'a dyn Bytes) -> Model<'a> {
        let footer = image.at(0);
        assert!(footer_is_good(&footer), "the copy at 0 is not good");
        let at = number(&footer[16..24]) / 512;
        let header = [image.at(at), image.at(at + 1)].concat();
        assert_eq!(&header[..8], b"cxsparse");
        assert_eq!(sum(&header, 36..40), number(&header[36..40]), "header checksum");
        assert_eq!(number(&header[32..36]), 2 << 20);
        let table = number(&header[16..24]);
        let entries = number(&header[28..32]);
        let blocks = number(&footer[48..56]).div_ceil(2 << 20);
        assert!(blocks <= entries);
        let bat = (0..blocks)
            .map(|block| {
                let place = table + block * 4;
                number(&image.at(place / 512)[(place % 512) as usize..][..4])
            })
            .collect();
        let mut end = (at * 512 + 1024).max(table + (entries * 4).next_multiple_of(512));
        let map_header_at = table + (entries * 4).next_multiple_of(512);
        let map_header = image.at(map_header_at / 512);
        let mut batmap = None;
        let has_batmap = &map_header[..8] == b"tdbatmap";
        if has_batmap {
            let (map_at, sectors) = (number(&map_header[8..16]), number(&map_header[16..20]));
            end = end.max(map_header_at + 512).max(map_at + sectors * 512);
            let used = (blocks / 8).div_ceil(512).max(1);
            let map: Vec<u8> = (0..used).flat_map(|sector| image.at(map_at / 512 + sector)).collect();
            batmap = (sum(&map, 0..0) == number(&map_header[24..28])).then_some(map);
        }
        for place in (576..768).step_by(24).filter(|&place| number(&header[place..place + 4]) > 0) {
            end = end.max(number(&header[place + 16..place + 24]) + number(&header[place + 4..place + 8]));
        }
        let differencing = number(&footer[60..64]) == 4;
        Model {
            image,
            footer,
            blocks,
            differencing,
            table,
            entries,
            batmap,
            has_batmap,
            end_of_headers: end,
            bat,
        }
    }

    fn bitmap(&self, block: u64) -> Option<Sector> {
        let start = self.bat[block as usize];
        (start != 0xffff_ffff).then(|| self.image.at(start))
    }

    pub fn sector(&self, sector: u64) -> Found {
        let (block, within) = (sector / 4096, sector % 4096);
        match self.bitmap(block) {
            Some(bits) if bits[(within / 8) as usize] & 0x80 >> (within % 8) > 0 => {
                Found::Here(self.image.at(self.bat[block as usize] + 1 + within))
            }
            _ if self.differencing => Found::Parent,
            _ => Found::Here([0; 512]),
        }
    }

    /// As qemu reads a dynamic image: without the bitmap.
    pub fn sector_by_qemu(&self, sector: u64) -> Sector {
        let start = self.bat[(sector / 4096) as usize];
        if start == 0xffff_ffff { [0; 512] } else { self.image.at(start + 1 + sector % 4096) }
    }

    /// What must be true at any time: blocks do not overlap, their bitmaps lie in the file, and the batmap promises nothing wrong.
    pub fn check(&self, atomic_batmap: bool) {
        let mut starts: Vec<u64> = self.bat.iter().copied().filter(|&start| start != 0xffff_ffff).collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[0] + 4097 <= pair[1]), "blocks overlap: {starts:?}");
        if let (Some(&first), Some(&last)) = (starts.first(), starts.last()) {
            assert!(first * 512 >= self.end_of_headers, "a block clobbers headers");
            assert!((last + 1) * 512 <= self.image.len(), "a block behind the end");
        }
        assert!(self.batmap.is_some() || !atomic_batmap, "the batmap's checksum is wrong");
        for block in 0..self.blocks {
            let full =
                self.batmap.as_ref().is_some_and(|map| map[(block / 8) as usize] & 0x80 >> (block % 8) > 0);
            if let Some(bits) = self.bitmap(block).filter(|_| full) {
                assert_eq!(bits, [0xff; 512], "the batmap calls block {block} full");
            }
        }
    }

    /// What `vhd-util check` asks of a closed image.
    pub fn check_closed(&self) {
        let end = self.image.len() / 512 - 1;
        assert_eq!(self.image.len() % 512, 0);
        assert_eq!(self.image.at(end), self.footer, "primary and backup footers do not match");
        for (block, &start) in self.bat.iter().enumerate().filter(|(_, start)| **start != 0xffff_ffff) {
            assert!(start + 4097 <= end, "block {block} clobbers the footer");
        }
        assert!(!self.has_batmap || self.batmap.is_some(), "the batmap's checksum is wrong");
        for block in 0..self.blocks {
            let map = self.batmap.as_ref();
            let full = map.is_some_and(|map| map[(block / 8) as usize] & 0x80 >> (block % 8) > 0);
            assert!(!full || self.bat[block as usize] != 0xffff_ffff, "unallocated block {block} shown full");
        }
        for entry in self.blocks..self.entries {
            let place = self.table + entry * 4;
            let value = number(&self.image.at(place / 512)[(place % 512) as usize..][..4]);
            assert_eq!(value, 0xffff_ffff, "entry {entry} behind the disk");
        }
    }
}
