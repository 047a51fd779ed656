//! The footer, and its copy at byte 0: kind, size, identity.

use super::layout::{EPOCH, FOOTER_BYTES, FORMAT_VERSION, checksum};
use crate::bytes::{be16, be32, be64, put};

const COOKIE: &[u8; 8] = b"conectix";
const POISON: &[u8; 8] = b"v_poison";
const TAP: &[u8; 3] = b"tap";
const TAP_0_1: u32 = 0x0000_0001;
const TAP_1_1: u32 = 0x0001_0001;
const CREATOR_VERSION: u32 = 0x0001_0003;
const CHS_SECTORS_MAX: u64 = 65535 * 16 * 255;

/// Which of the three kinds an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The disk's bytes, then a footer.
    Fixed,
    /// Blocks where there are data, zeroes elsewhere.
    Dynamic,
    /// Sectors that differ from a parent's.
    Differencing,
}

impl Kind {
    fn code(self) -> u32 {
        match self {
            Kind::Fixed => 2,
            Kind::Dynamic => 3,
            Kind::Differencing => 4,
        }
    }

    /// The word for operators.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Fixed => "fixed",
            Kind::Dynamic => "dynamic",
            Kind::Differencing => "differencing",
        }
    }
}

/// What is wrong with 512 bytes that should be a footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// They are something else.
    NoFooter,
    /// The cookie is right, the checksum is not.
    Checksum,
    /// The image was disabled by a tool (`v_poison`).
    Poisoned,
    /// A type or version that nobody knows.
    Unknown,
}

/// A footer, or its copy at byte 0. What it does not understand it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer(pub [u8; 512]);

impl Footer {
    /// A footer of a new image. `seconds` count from 1970.
    #[must_use]
    pub fn new(kind: Kind, disk_bytes: u64, uuid: [u8; 16], seconds: u64) -> Footer {
        let mut footer = Footer([0; 512]);
        let bytes = &mut footer.0;
        put(bytes, 0, COOKIE);
        put(bytes, 8, &2u32.to_be_bytes());
        put(bytes, 12, &FORMAT_VERSION.to_be_bytes());
        put(bytes, 16, &(if kind == Kind::Fixed { u64::MAX } else { FOOTER_BYTES }).to_be_bytes());
        put(bytes, 24, &crate::bytes::narrow(seconds.saturating_sub(EPOCH)).to_be_bytes());
        put(bytes, 28, b"tap\0");
        put(bytes, 32, &CREATOR_VERSION.to_be_bytes());
        put(bytes, 60, &kind.code().to_be_bytes());
        put(bytes, 68, &uuid);
        put(bytes, 40, &disk_bytes.to_be_bytes());
        footer.set_disk_bytes(disk_bytes);
        footer
    }

    /// Takes 512 bytes for a footer, or says why not.
    ///
    /// # Errors
    /// [`Flaw`].
    pub fn parse(bytes: [u8; 512]) -> Result<Footer, Flaw> {
        let footer = Footer(bytes);
        let cookie = footer.0.get(..8);
        if cookie != Some(COOKIE) && cookie != Some(POISON) {
            return Err(Flaw::NoFooter);
        }
        if !footer.sum_is_right() {
            return Err(Flaw::Checksum);
        }
        if cookie == Some(POISON) {
            return Err(Flaw::Poisoned);
        }
        let known = be32(&footer.0, 12) >> 16 == 1 && matches!(be32(&footer.0, 60), 2..=4);
        if known { Ok(footer) } else { Err(Flaw::Unknown) }
    }

    /// blktap 0.1 and 1.1 did not sum up again after setting the hidden flag.
    fn sum_is_right(&self) -> bool {
        let sum = be32(&self.0, 64);
        if checksum(&self.0, 64) == sum {
            return true;
        }
        let old = self.by_tap() && matches!(be32(&self.0, 32), TAP_0_1 | TAP_1_1);
        old && self.hidden() && checksum(&self.0, 64).wrapping_add(u32::from(self.0[85])) == sum
    }

    /// The kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match be32(&self.0, 60) {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            _ => Kind::Differencing,
        }
    }

    /// Where the dynamic header lies.
    #[must_use]
    pub fn header_bytes(&self) -> u64 {
        be64(&self.0, 16)
    }

    /// Identity of the image.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.0[68..84]);
        uuid
    }

    /// Time of creation, in seconds since 2000.
    #[must_use]
    pub fn timestamp(&self) -> u32 {
        be32(&self.0, 24)
    }

    /// The creator application's four bytes.
    #[must_use]
    pub fn creator(&self) -> [u8; 4] {
        [self.0[28], self.0[29], self.0[30], self.0[31]]
    }

    /// Whether blktap (or we) wrote it: only then may there be a batmap.
    #[must_use]
    pub fn by_tap(&self) -> bool {
        self.0.get(28..31) == Some(TAP)
    }

    /// Written by the first blktap, whose bitmaps count bits in another order.
    #[must_use]
    pub fn by_tap_0_1(&self) -> bool {
        self.by_tap() && be32(&self.0, 32) == TAP_0_1
    }

    /// Size of the disk: `current_size`, except where the creator goes by the geometry (Virtual PC, and qemu without `force_size`) and
    /// the geometry is not at its maximum. This is the table of `qemu/block/vpc.c`; unknown creators get `current_size`.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        let (cylinders, heads, sectors) = (be16(&self.0, 56), self.0[58], self.0[59]);
        let chs = u64::from(cylinders) * u64::from(heads) * u64::from(sectors);
        let by_chs = matches!(&self.creator(), b"vpc " | b"vs  " | b"qemu");
        if by_chs && chs > 0 && chs < CHS_SECTORS_MAX { chs * 512 } else { self.current_bytes() }
    }

    /// The field `current_size`.
    #[must_use]
    pub fn current_bytes(&self) -> u64 {
        be64(&self.0, 48)
    }

    /// The flag by which storage managers mark images that only serve as parents.
    #[must_use]
    pub fn hidden(&self) -> bool {
        self.0[85] != 0
    }

    /// Hides or shows the image.
    pub fn set_hidden(&mut self, hidden: bool) {
        self.0[85] = u8::from(hidden);
        self.seal();
    }

    /// Gives the disk another size, and the geometry that goes with it.
    pub fn set_disk_bytes(&mut self, disk_bytes: u64) {
        put(&mut self.0, 48, &disk_bytes.to_be_bytes());
        put(&mut self.0, 56, &geometry(disk_bytes));
        self.seal();
    }

    /// Points to another dynamic header.
    pub fn set_header_bytes(&mut self, at_bytes: u64) {
        put(&mut self.0, 16, &at_bytes.to_be_bytes());
        self.seal();
    }

    /// Makes it a footer of another kind.
    pub fn set_kind(&mut self, kind: Kind) {
        put(&mut self.0, 60, &kind.code().to_be_bytes());
        self.seal();
    }

    /// Gives the image another identity.
    pub fn set_uuid(&mut self, uuid: [u8; 16]) {
        put(&mut self.0, 68, &uuid);
        self.seal();
    }

    /// A disabled image's footer, with its cookie back.
    #[must_use]
    pub fn enabled(bytes: [u8; 512]) -> Footer {
        let mut footer = Footer(bytes);
        put(&mut footer.0, 0, COOKIE);
        footer.seal();
        footer
    }

    fn seal(&mut self) {
        let sum = checksum(&self.0, 64);
        put(&mut self.0, 64, &sum.to_be_bytes());
    }
}

/// Cylinders, heads and sectors for a size, by the specification's appendix.
#[must_use]
pub(super) fn geometry(disk_bytes: u64) -> [u8; 4] {
    let sectors = disk_bytes.div_ceil(512).clamp(1, CHS_SECTORS_MAX);
    let (per_track, heads) = if sectors >= 65535 * 16 * 63 {
        (255, 16)
    } else {
        let tracks = sectors / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if tracks < heads * 1024 && heads <= 16 {
            (17, heads)
        } else if sectors / 31 < 16 * 1024 {
            (31, 16)
        } else {
            (63, 16)
        }
    };
    let cylinders = u16::try_from(sectors / per_track / heads).unwrap_or(u16::MAX).to_be_bytes();
    let small = |number: u64| u8::try_from(number).unwrap_or(u8::MAX);
    [cylinders[0], cylinders[1], small(heads), small(per_track)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn footers_are_what_they_were() {
        let footer = Footer::new(Kind::Dynamic, 1 << 30, [7; 16], EPOCH + 5);
        let again = Footer::parse(footer.0).unwrap();
        assert_eq!((again.kind(), again.disk_bytes(), again.uuid()), (Kind::Dynamic, 1 << 30, [7; 16]));
        assert_eq!((again.timestamp(), again.header_bytes(), again.hidden()), (5, 512, false));
        for at in 0..512 {
            let mut bytes = footer.0;
            bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1);
            assert!(Footer::parse(bytes).is_err(), "a flip in byte {at} went unnoticed");
        }
    }

    #[test]
    fn old_tap_footers_hide_without_a_new_checksum() {
        let mut footer = Footer::new(Kind::Dynamic, 1 << 30, [7; 16], EPOCH);
        put(&mut footer.0, 32, &TAP_1_1.to_be_bytes());
        footer.seal();
        footer.0[85] = 1;
        assert!(Footer::parse(footer.0).unwrap().hidden());
        put(&mut footer.0, 32, &CREATOR_VERSION.to_be_bytes());
        assert_eq!(Footer::parse(footer.0), Err(Flaw::Checksum));
    }

    #[test]
    fn geometry_is_the_specifications() {
        let chs = |bytes: u64| {
            let found = geometry(bytes);
            (u32::from(be16(&found, 0)), found[2], found[3])
        };
        assert_eq!(chs(40 << 20), (963, 5, 17));
        assert_eq!(chs(1 << 30), (2080, 16, 63));
        assert_eq!(chs(2040 << 30), (65535, 16, 255));
        assert_eq!(chs(0), (0, 4, 17));
    }

    #[test]
    fn sizes_go_by_the_creator() {
        let mut footer = Footer::new(Kind::Dynamic, 100 << 20, [0; 16], EPOCH);
        assert_eq!(footer.disk_bytes(), 100 << 20);
        put(&mut footer.0, 28, b"vpc ");
        let [high, low, heads, sectors] = geometry(100 << 20);
        let chs = u64::from(u16::from_be_bytes([high, low])) * u64::from(heads) * u64::from(sectors) * 512;
        assert!(chs < 100 << 20);
        assert_eq!(footer.disk_bytes(), chs);
        put(&mut footer.0, 28, b"win ");
        assert_eq!(footer.disk_bytes(), 100 << 20);
        footer.set_disk_bytes(2000 << 30);
        put(&mut footer.0, 28, b"qemu");
        assert_eq!(footer.disk_bytes(), 2000 << 30, "the geometry is at its maximum");
    }
}
