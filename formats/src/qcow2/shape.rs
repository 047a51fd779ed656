//! Sizes of a QCOW2 image, and the meaning of its entries.

use crate::SECTOR_BYTES;
use crate::error::Corruption;

/// Bit 63 of L1 and L2 entries: the refcount of what it points to is exactly 1.
pub const COPIED: u64 = 1 << 63;
const PACKED: u64 = 1 << 62;
/// Bits 9–55.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 0 of a standard L2 entry.
pub const READS_ZERO: u64 = 1;

/// Version and sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// 2 or 3.
    pub version: u32,
    /// 9..=21.
    pub cluster_bits: u32,
    /// L2 entries of 16 bytes, with 32 subclusters.
    pub extended: bool,
    /// Refcounts of 2^this bits: 0..=6.
    pub refcount_order: u32,
}

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Space of its own, or none (host 0). Of its subclusters (one, without extended L2), `data` are stored and `zero` read as
    /// zero; the others are the parent's.
    Plain {
        /// Offset in the file; 0 for none.
        host: u64,
        /// Refcount exactly 1.
        copied: bool,
        /// A bit per subcluster.
        data: u32,
        /// A bit per subcluster.
        zero: u32,
    },
    /// Packed.
    Packed {
        /// Offset in the file.
        offset_bytes: u64,
        /// Length at most.
        bytes: u32,
    },
}

impl Shape {
    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The part of an offset that lies within its cluster, in bytes.
    #[must_use]
    pub fn within(&self, offset_bytes: u64) -> u64 {
        // Sizes are powers of two, and this is asked several times for each request: shifts, not divisions.
        offset_bytes & (self.cluster_bytes() - 1)
    }

    /// Log2 of the bytes of an L2 entry.
    #[must_use]
    pub fn entry_bits(&self) -> u32 {
        if self.extended { 4 } else { 3 }
    }

    /// Bytes of an L2 entry.
    #[must_use]
    pub fn entry_bytes(&self) -> u64 {
        1 << self.entry_bits()
    }

    /// Entries of an L2 table.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        1 << (self.cluster_bits - self.entry_bits())
    }

    /// Log2 of [`Shape::l2_covers_bytes`].
    #[must_use]
    pub fn l2_covers_bits(&self) -> u32 {
        2 * self.cluster_bits - self.entry_bits()
    }

    /// Bytes of the disk that an L2 table maps.
    #[must_use]
    pub fn l2_covers_bytes(&self) -> u64 {
        1 << self.l2_covers_bits()
    }

    /// Subclusters of a cluster.
    #[must_use]
    pub fn subclusters(&self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    /// Log2 of the bytes of a subcluster.
    #[must_use]
    pub fn subcluster_bits(&self) -> u32 {
        if self.extended { self.cluster_bits - 5 } else { self.cluster_bits }
    }

    /// Bytes of a subcluster.
    #[must_use]
    pub fn subcluster_bytes(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// All subclusters.
    #[must_use]
    pub fn all(&self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// Subclusters `from..to`.
    #[must_use]
    pub fn mask(&self, from: u64, to: u64) -> u32 {
        let below = |bit: u64| if bit >= 32 { u32::MAX } else { (1_u32 << bit) - 1 };
        below(to) & !below(from)
    }

    /// Refcounts of a refcount block.
    #[must_use]
    pub fn refcounts_per_block(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The largest refcount.
    #[must_use]
    pub fn refcount_max(&self) -> u64 {
        let bits = 1_u32 << self.refcount_order;
        if bits == 64 { u64::MAX } else { (1 << bits) - 1 }
    }

    /// Metadata pages: none holds both metadata and data.
    #[must_use]
    pub fn page_bytes(&self) -> u32 {
        if self.cluster_bits < 12 { 1 << self.cluster_bits } else { 4096 }
    }

    /// Sectors of a cluster.
    #[must_use]
    pub fn cluster_sectors(&self) -> u64 {
        self.cluster_bytes() / SECTOR_BYTES
    }

    /// What an L2 entry means; `bitmap` is its second word with extended L2. `at_bytes` is where it lies.
    ///
    /// # Errors
    /// What is wrong with it. That it lies within the file is not checked here.
    pub fn cluster(&self, entry: u64, bitmap: u64, at_bytes: u64) -> Result<Cluster, Corruption> {
        let wrong = |what| Corruption { what, at_bytes };
        if entry & PACKED != 0 {
            if entry & COPIED != 0 || bitmap != 0 {
                return Err(wrong("compressed L2 entry with other marks"));
            }
            let split = 62 - (self.cluster_bits - 8);
            let offset_bytes = entry & ((1 << split) - 1);
            let extra = (entry & !PACKED) >> split;
            let bytes = (extra + 1) * SECTOR_BYTES - offset_bytes % SECTOR_BYTES;
            return Ok(Cluster::Packed { offset_bytes, bytes: crate::bytes::narrow(bytes) });
        }
        let host = entry & OFFSET;
        let zero_flag = entry & READS_ZERO != 0;
        if entry & !(OFFSET | COPIED | READS_ZERO) != 0 || (zero_flag && (self.version < 3 || self.extended))
        {
            return Err(wrong("reserved bits of an L2 entry"));
        }
        if !host.is_multiple_of(self.cluster_bytes()) {
            return Err(wrong("L2 entry not aligned to a cluster"));
        }
        let copied = entry & COPIED != 0;
        if host == 0 && copied {
            return Err(wrong("L2 entry without offset, marked as the only one"));
        }
        let (data, zero) = if self.extended {
            (crate::bytes::narrow(bitmap & 0xffff_ffff), crate::bytes::narrow(bitmap >> 32))
        } else if zero_flag {
            (0, 1)
        } else {
            (u32::from(host != 0), 0)
        };
        if data & zero != 0 || (data != 0 && host == 0) {
            return Err(wrong("subclusters of an L2 entry"));
        }
        Ok(Cluster::Plain { host, copied, data, zero })
    }

    /// The words of an L2 entry.
    #[must_use]
    pub fn entry(&self, host: u64, data: u32, zero: u32) -> (u64, u64) {
        let copied = if host == 0 { 0 } else { COPIED };
        if self.extended {
            return (host | copied, u64::from(data) | u64::from(zero) << 32);
        }
        (host | copied | if zero != 0 { READS_ZERO } else { 0 }, 0)
    }
}

/// The refcount number `at` of a block, or of a part of one that begins with a whole byte.
#[must_use]
pub fn refcount(bytes: &[u8], order: u32, at: u64) -> u64 {
    if order < 3 {
        let per_byte = 8 >> order;
        let byte = bytes.get(crate::bytes::index(at / per_byte)).copied().unwrap_or(0);
        let shift = (at % per_byte) << order;
        return u64::from(byte) >> shift & ((1 << (1 << order)) - 1);
    }
    let width = 1_usize << (order - 3);
    let from = crate::bytes::index(at).saturating_mul(width);
    let found = bytes.get(from..from.saturating_add(width)).unwrap_or_default();
    found.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The byte offset and the bytes that set a refcount.
#[must_use]
pub fn refcount_bytes(bytes: &[u8], order: u32, at: u64, value: u64) -> (usize, [u8; 8], usize) {
    let mut out = [0; 8];
    if order < 3 {
        let per_byte = 8 >> order;
        let from = crate::bytes::index(at / per_byte);
        let old = bytes.get(from).copied().unwrap_or(0);
        let shift = (at % per_byte) << order;
        let mask = ((1_u64 << (1 << order)) - 1) << shift;
        let new = u64::from(old) & !mask | (value << shift) & mask;
        crate::bytes::put(&mut out, 0, &[u8::try_from(new & 0xff).unwrap_or(0)]);
        return (from, out, 1);
    }
    let width = 1_usize << (order - 3);
    let all = value.to_be_bytes();
    crate::bytes::put(&mut out, 0, all.get(8 - width..).unwrap_or_default());
    (crate::bytes::index(at).saturating_mul(width), out, width)
}
