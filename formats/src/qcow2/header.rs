//! The header of a QCOW2 image and what follows it in cluster 0: extensions and the parent's name.
//!
//! No number is used before it is bounded. Sources: qemu `docs/interop/qcow2.txt`.

use alloc::string::String;
use alloc::vec::Vec;

use crate::bytes::{be16, be32, be64, index};
use crate::error::{Corruption, Failure, Unsupported};
use crate::medium::Medium;
use crate::qcow2::shape::Shape;

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;

/// Byte offsets of header fields that are changed in place.
pub(crate) mod field {
    pub(crate) const SIZE: usize = 24;
    pub(crate) const L1_ENTRIES: usize = 36;
    pub(crate) const L1_OFFSET: usize = 40;
    pub(crate) const REFTABLE_OFFSET: usize = 48;
    pub(crate) const REFTABLE_CLUSTERS: usize = 56;
    pub(crate) const SNAPSHOTS: usize = 60;
    pub(crate) const SNAPSHOTS_OFFSET: usize = 64;
    pub(crate) const INCOMPATIBLE: usize = 72;
    pub(crate) const AUTOCLEAR: usize = 88;
}

/// Incompatible: refcounts may be too high, or (lazy refcounts) too low.
pub const DIRTY: u64 = 1;
/// Incompatible: metadata are known to be wrong.
pub const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
/// Incompatible: the compression type is not zlib.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible: subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Compatible: refcounts may be written late, under the dirty bit.
pub const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear: the bitmaps extension is consistent with the image.
pub const BITMAPS_CONSISTENT: u64 = 1;

pub(crate) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_BITMAPS: u32 = 0x2385_2875;

const L1_BYTES_MAX: u64 = 32 << 20;
const REFTABLE_BYTES_MAX: u64 = 8 << 20;
const SNAPSHOTS_MAX: u32 = 65536;
const BITMAPS_MAX: u32 = 65535;
const BITMAP_DIRECTORY_BYTES_MAX: u64 = 4 << 20;

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// The image below, as the header names it. To open it is the caller's decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// A path, absolute or relative to the image's own directory.
    pub name: String,
    /// Its format, if the image says.
    pub format: Option<String>,
}

/// Where the directory of persistent bitmaps is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_bytes: u64,
    /// Where it is.
    pub directory_offset: u64,
}

/// An extension that is not interpreted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// A header that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version and sizes.
    pub shape: Shape,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where it is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub reftable_offset: u64,
    /// Its length.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// Feature bits.
    pub incompatible: u64,
    /// Feature bits.
    pub compatible: u64,
    /// Feature bits.
    pub autoclear: u64,
    /// How compressed clusters are packed.
    pub compression: Compression,
    /// Bytes of the header.
    pub header_bytes: u32,
    /// The parent.
    pub backing: Option<Backing>,
    /// Persistent bitmaps.
    pub bitmaps: Option<Bitmaps>,
    /// All extensions, in their order.
    pub extensions: Vec<Extension>,
}

fn wrong(what: &'static str, at: usize) -> Unsupported {
    Unsupported::Malformed(Corruption { what, at_bytes: at as u64 })
}

impl Header {
    /// Reads and checks the header of an image.
    ///
    /// # Errors
    /// What is wrong or refused, by name.
    pub fn read(medium: &mut dyn Medium) -> Result<Header, Unsupported> {
        let length = medium.length_bytes();
        if length < 512 {
            return Err(wrong("shorter than a header", 0));
        }
        let mut first = [0; 512];
        medium.read(0, &mut first).map_err(Unsupported::from)?;
        if be32(&first, 0) != MAGIC {
            return Err(wrong("no QCOW2 magic", 0));
        }
        let bits = be32(&first, 20);
        if !(9..=21).contains(&bits) {
            return Err(wrong("cluster_bits not within 9 and 21", 20));
        }
        let mut cluster = alloc::vec![0; 1 << bits];
        medium.read(0, &mut cluster).map_err(Unsupported::from)?;
        let header = Header::parse(&cluster)?;
        header.check_places(length)?;
        Ok(header)
    }

    /// Checks cluster 0.
    ///
    /// # Errors
    /// What is wrong or refused, by name.
    pub fn parse(bytes: &[u8]) -> Result<Header, Unsupported> {
        if be32(bytes, 0) != MAGIC {
            return Err(wrong("no QCOW2 magic", 0));
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(wrong("version neither 2 nor 3", 4));
        }
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) || bytes.len() < 1 << cluster_bits {
            return Err(wrong("cluster_bits not within 9 and 21", 20));
        }
        let new = version == 3;
        let header_bytes = if new { be32(bytes, 100) } else { 72 };
        if new && (header_bytes < 104 || header_bytes % 8 != 0 || u64::from(header_bytes) > 1 << cluster_bits)
        {
            return Err(wrong("header_length", 100));
        }
        let incompatible = if new { be64(bytes, field::INCOMPATIBLE) } else { 0 };
        let refcount_order = if new { be32(bytes, 96) } else { 4 };
        if refcount_order > 6 {
            return Err(wrong("refcount_order above 6", 96));
        }
        let extended = incompatible & EXTENDED_L2 != 0;
        if extended && cluster_bits < 14 {
            return Err(wrong("extended L2 entries with clusters below 16 KiB", 20));
        }
        let shape = Shape { version, cluster_bits, extended, refcount_order };
        let (extensions, bitmaps, format) = read_extensions(bytes, header_bytes, &shape)?;
        refuse_features(incompatible, &extensions)?;
        match be32(bytes, 32) {
            0 => {}
            1 => return Err(Unsupported::Refused("it is encrypted (AES), which is not supported")),
            _ => return Err(Unsupported::Refused("it is encrypted (LUKS), which is not supported")),
        }
        let header = Header {
            size_bytes: be64(bytes, field::SIZE),
            l1_entries: be32(bytes, field::L1_ENTRIES),
            l1_offset: be64(bytes, field::L1_OFFSET),
            reftable_offset: be64(bytes, field::REFTABLE_OFFSET),
            reftable_clusters: be32(bytes, field::REFTABLE_CLUSTERS),
            snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible,
            compatible: if new { be64(bytes, 80) } else { 0 },
            autoclear: if new { be64(bytes, field::AUTOCLEAR) } else { 0 },
            compression: compression(bytes, incompatible, header_bytes)?,
            header_bytes,
            backing: read_backing(bytes, header_bytes, &shape, format)?,
            bitmaps,
            extensions,
            shape,
        };
        header.check_sizes()?;
        Ok(header)
    }

    fn check_sizes(&self) -> Result<(), Unsupported> {
        let shape = &self.shape;
        let cluster = shape.cluster_bytes();
        if self.size_bytes > 1 << 62 {
            return Err(wrong("virtual size", field::SIZE));
        }
        if u64::from(self.l1_entries) * 8 > L1_BYTES_MAX {
            return Err(wrong("L1 table longer than 32 MiB", field::L1_ENTRIES));
        }
        if self.size_bytes.div_ceil(shape.l2_covers_bytes()) > u64::from(self.l1_entries) {
            return Err(wrong("L1 table too short for the virtual size", field::L1_ENTRIES));
        }
        if !self.l1_offset.is_multiple_of(cluster) || (self.l1_entries > 0 && self.l1_offset == 0) {
            return Err(wrong("L1 table offset", field::L1_OFFSET));
        }
        if !self.reftable_offset.is_multiple_of(cluster) || self.reftable_offset == 0 {
            return Err(wrong("refcount table offset", field::REFTABLE_OFFSET));
        }
        let reftable = u64::from(self.reftable_clusters).saturating_mul(cluster);
        if reftable == 0 || reftable > REFTABLE_BYTES_MAX.max(cluster) {
            return Err(wrong("refcount table length", field::REFTABLE_CLUSTERS));
        }
        if self.snapshots > SNAPSHOTS_MAX
            || (self.snapshots > 0 && !self.snapshots_offset.is_multiple_of(cluster))
        {
            return Err(wrong("snapshot table", 60));
        }
        Ok(())
    }

    /// Checks that the tables lie within the file and not over each other.
    fn check_places(&self, length_bytes: u64) -> Result<(), Unsupported> {
        let cluster = self.shape.cluster_bytes();
        let end = length_bytes.div_ceil(cluster).saturating_mul(cluster);
        let l1 = self.l1_range();
        let reftable = self.reftable_range();
        for (range, what, at) in [
            (l1, "L1 table beyond the file", field::L1_OFFSET),
            (reftable, "refcount table beyond the file", 48),
        ] {
            if range.1 > end || range.0 >= 1 << 56 {
                return Err(wrong(what, at));
            }
        }
        let overlap = |one: (u64, u64), other: (u64, u64)| one.0 < other.1 && other.0 < one.1;
        if overlap(l1, reftable) {
            return Err(wrong("L1 table and refcount table overlap", field::L1_OFFSET));
        }
        // The directory is written when the image is: no entry of it may be a part of something else.
        if let Some(bitmaps) = self.trusted_bitmaps() {
            let to = bitmaps.directory_offset.saturating_add(bitmaps.directory_bytes.next_multiple_of(512));
            let directory = (bitmaps.directory_offset, to);
            if to > end {
                return Err(wrong("bitmap directory beyond the file", 0));
            }
            if overlap(directory, (0, cluster)) || overlap(directory, l1) || overlap(directory, reftable) {
                return Err(wrong("bitmap directory over the header or a table", 0));
            }
        }
        Ok(())
    }

    /// The persistent bitmaps, if they count: one who does not know them clears their autoclear bit.
    #[must_use]
    pub fn trusted_bitmaps(&self) -> Option<Bitmaps> {
        self.bitmaps.filter(|_| self.autoclear & BITMAPS_CONSISTENT != 0)
    }

    /// First byte of the active L1 table and the first behind it, whole clusters.
    #[must_use]
    pub fn l1_range(&self) -> (u64, u64) {
        let bytes = (u64::from(self.l1_entries) * 8).next_multiple_of(self.shape.cluster_bytes());
        (self.l1_offset, self.l1_offset.saturating_add(bytes))
    }

    /// First byte of the refcount table and the first behind it.
    #[must_use]
    pub fn reftable_range(&self) -> (u64, u64) {
        let bytes = u64::from(self.reftable_clusters).saturating_mul(self.shape.cluster_bytes());
        (self.reftable_offset, self.reftable_offset.saturating_add(bytes))
    }
}

fn compression(bytes: &[u8], incompatible: u64, header_bytes: u32) -> Result<Compression, Unsupported> {
    let kind = if header_bytes > 104 { bytes.get(104).copied().unwrap_or(0) } else { 0 };
    match (incompatible & COMPRESSION != 0, kind) {
        (false, 0) => Ok(Compression::Zlib),
        (true, 1) => Ok(Compression::Zstd),
        (true, 0) | (false, _) => Err(wrong("compression type and its feature bit disagree", 104)),
        (true, _) => Err(Unsupported::Refused("its compression type is neither zlib nor zstd")),
    }
}

fn refuse_features(incompatible: u64, extensions: &[Extension]) -> Result<(), Unsupported> {
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(Unsupported::Refused("it keeps its data in another file, which is refused"));
    }
    let unknown = incompatible & !(DIRTY | CORRUPT | COMPRESSION | EXTENDED_L2);
    if unknown == 0 {
        return Ok(());
    }
    let bit = u8::try_from(unknown.trailing_zeros()).unwrap_or(0);
    let names = extensions.iter().filter(|extension| extension.kind == EXT_FEATURE_NAMES);
    let name = names
        .flat_map(|extension| extension.data.chunks_exact(48))
        .find(|entry| entry.starts_with(&[0, bit]))
        .map(|entry| {
            let text = entry.get(2..).unwrap_or_default();
            let printable = text.iter().take_while(|byte| byte.is_ascii_graphic() || **byte == b' ');
            printable.map(|byte| char::from(*byte)).collect()
        });
    Err(Unsupported::Feature(bit, name.unwrap_or_default()))
}

type Extensions = (Vec<Extension>, Option<Bitmaps>, Option<String>);

fn read_extensions(bytes: &[u8], header_bytes: u32, shape: &Shape) -> Result<Extensions, Unsupported> {
    let name_at = be64(bytes, 8);
    let end = if name_at == 0 { bytes.len() } else { index(name_at).min(bytes.len()) };
    let (mut list, mut bitmaps, mut format) = (Vec::new(), None, None);
    let mut at = header_bytes as usize;
    while at + 8 <= end {
        let (kind, length) = (be32(bytes, at), be32(bytes, at + 4) as usize);
        if kind == 0 {
            break;
        }
        let data = at.checked_add(8).and_then(|from| bytes.get(from..from.checked_add(length)?));
        let Some(data) = data.filter(|_| at + 8 + length <= end) else {
            return Err(wrong("header extension beyond its place", at));
        };
        match kind {
            EXT_BACKING_FORMAT => {
                let text = core::str::from_utf8(data).map_err(|_| wrong("backing format", at))?;
                format = Some(String::from(text));
            }
            EXT_BITMAPS => bitmaps = Some(read_bitmaps(data, at, shape)?),
            _ => {}
        }
        list.push(Extension { kind, data: Vec::from(data) });
        at += 8 + length.next_multiple_of(8);
    }
    Ok((list, bitmaps, format))
}

fn read_bitmaps(data: &[u8], at: usize, shape: &Shape) -> Result<Bitmaps, Unsupported> {
    let found =
        Bitmaps { count: be32(data, 0), directory_bytes: be64(data, 8), directory_offset: be64(data, 16) };
    let bad = data.len() != 24
        || found.count == 0
        || found.count > BITMAPS_MAX
        || found.directory_bytes == 0
        || found.directory_bytes > BITMAP_DIRECTORY_BYTES_MAX
        || found.directory_offset == 0
        || !found.directory_offset.is_multiple_of(shape.cluster_bytes());
    if bad { Err(wrong("bitmaps extension", at)) } else { Ok(found) }
}

fn read_backing(
    bytes: &[u8],
    header_bytes: u32,
    shape: &Shape,
    format: Option<String>,
) -> Result<Option<Backing>, Unsupported> {
    let (at, length) = (be64(bytes, 8), be32(bytes, 16));
    if at == 0 {
        return Ok(None);
    }
    let end = at.saturating_add(u64::from(length));
    if length > 1023 || at < u64::from(header_bytes) || end > shape.cluster_bytes() {
        return Err(wrong("backing file name", 8));
    }
    if length == 0 {
        return Ok(None);
    }
    let name = bytes.get(index(at)..index(end)).unwrap_or_default();
    let name = core::str::from_utf8(name).map_err(|_| wrong("backing file name", 8))?;
    if name.contains('\0') {
        return Err(wrong("backing file name", 8));
    }
    refuse_name(name)?;
    Ok(Some(Backing { name: String::from(name), format }))
}

/// Refuses a parent's name that qemu would not take for a path.
pub(crate) fn refuse_name(name: &str) -> Result<(), Unsupported> {
    let scheme = name.split(['/', '.']).next().unwrap_or_default();
    if scheme.contains(':') {
        return Err(Unsupported::Refused(
            "its backing file is named by protocol or json: and not by path, which is refused",
        ));
    }
    Ok(())
}

/// The bitmap directory's entries, checked: where each begins within it, and its bytes.
///
/// # Errors
/// [`Failure::Corrupt`] where an entry does not fit.
pub(crate) fn bitmap_entries(
    directory: &[u8],
    count: u32,
    at_bytes: u64,
) -> Result<Vec<(usize, usize)>, Failure> {
    let (mut at, mut out) = (0_usize, Vec::new());
    for _ in 0..count {
        let length = 24 + usize::from(be16(directory, at + 18)) + be32(directory, at + 20) as usize;
        let end = at.saturating_add(length.next_multiple_of(8));
        if at + 24 > directory.len() || end > directory.len() {
            return Err(Failure::Corrupt(Corruption { what: "bitmap directory entry", at_bytes }));
        }
        out.push((at, length));
        at = end;
    }
    Ok(out)
}
