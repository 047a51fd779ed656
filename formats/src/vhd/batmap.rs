//! Which blocks are full, so that their bitmaps need not be looked at: in memory, and as blktap's batmap in the image.

use alloc::vec::Vec;

use super::layout::BatmapHeader;
use crate::bytes::index;

/// One bit for each block, the highest of a byte first: full, all sectors present.
#[derive(Clone, Debug, Default)]
pub(super) struct Full {
    bits: Vec<u8>,
}

impl Full {
    /// A map that begins with these bytes, for at least so many bytes.
    pub(super) fn new(mut bits: Vec<u8>, bytes: u64) -> Full {
        bits.resize(bits.len().max(index(bytes)), 0);
        Full { bits }
    }

    fn mask(block: u32) -> u8 {
        0x80 >> (block % 8)
    }

    pub(super) fn has(&self, block: u32) -> bool {
        self.bits.get(block as usize / 8).is_some_and(|byte| byte & Full::mask(block) != 0)
    }

    /// Says whether that was a change.
    pub(super) fn set(&mut self, block: u32, full: bool) -> bool {
        let Some(byte) = self.bits.get_mut(block as usize / 8) else { return false };
        let old = *byte;
        *byte = if full { old | Full::mask(block) } else { old & !Full::mask(block) };
        *byte != old
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bits
    }
}

/// Where the batmap lies in the image, and how far saving it has come.
#[derive(Debug)]
pub(super) struct Saver {
    pub(super) header: BatmapHeader,
    pub(super) header_bytes: u64,
    /// Bytes of the map that the checksum covers.
    pub(super) used_bytes: u64,
    /// Two places for the map: it is written to the one that is not in use, and then the header, in one sector, points to it. Where an
    /// image has room for one only, both are the same, and the map is saved when the image is closed, and never else.
    pub(super) places: [u64; 2],
    /// Bytes of each.
    pub(super) room_bytes: u64,
    /// Changes of the map since it was saved.
    pub(super) changes: u32,
    pub(super) stage: Stage,
}

/// How far saving has come.
#[derive(Debug)]
pub(super) enum Stage {
    Idle,
    /// A copy was taken; what it says must be durable first.
    Copied(Vec<u8>, crate::Stamp),
    /// The copy is on its way.
    Writing(Vec<u8>),
    /// It is there.
    Written(Vec<u8>),
}

impl Saver {
    /// The place that the next map goes to.
    pub(super) fn target(&self) -> u64 {
        if self.header.map_bytes() == self.places[0] { self.places[1] } else { self.places[0] }
    }

    /// The byte behind both places.
    pub(super) fn end(&self) -> u64 {
        self.places[0].max(self.places[1]) + self.room_bytes
    }

    pub(super) fn atomic(&self) -> bool {
        self.places[0] != self.places[1]
    }
}
