//! New images.

use alloc::string::String;
use alloc::vec::Vec;

use crate::bytes::{index, narrow, put};
use crate::error::Failure;
use crate::medium::Medium;
use crate::qcow2::header::{COMPRESSION, Compression, EXTENDED_L2, MAGIC};
use crate::qcow2::shape::{Shape, refcount_bytes};

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    /// Version and sizes.
    pub shape: Shape,
    /// Virtual size in bytes; a multiple of 512.
    pub size_bytes: u64,
    /// The parent's name and format.
    pub backing: Option<(String, String)>,
    /// How clusters that others compress are packed.
    pub compression: Compression,
}

impl Create {
    /// Version 3, clusters of 64 KiB, refcounts of 16 bits.
    #[must_use]
    pub fn new(size_bytes: u64) -> Create {
        let shape = Shape { version: 3, cluster_bits: 16, extended: false, refcount_order: 4 };
        Create { shape, size_bytes, backing: None, compression: Compression::Zlib }
    }
}

/// Where the parts of a new image lie, in clusters.
struct Layout {
    reftable: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
}

impl Layout {
    fn of(create: &Create) -> Layout {
        let shape = &create.shape;
        let l1_entries = create.size_bytes.div_ceil(shape.l2_covers_bytes()).max(1);
        let l1 = (l1_entries * 8).div_ceil(shape.cluster_bytes());
        let (mut reftable, mut blocks) = (1, 1);
        loop {
            let total = 1 + reftable + blocks + l1;
            let more = total.div_ceil(shape.refcounts_per_block());
            if more <= blocks {
                return Layout { reftable, blocks, l1, l1_entries };
            }
            blocks = more;
            reftable = (blocks * 8).div_ceil(shape.cluster_bytes());
        }
    }
}

/// Makes an image in an empty file, or on a device whose content is given up. The header is written last: what is interrupted is
/// no image.
///
/// # Errors
/// [`Failure::Unsupported`] for sizes that the format does not have, and what the medium says.
pub fn create(medium: &mut dyn Medium, create: &Create) -> Result<(), Failure> {
    let shape = create.shape;
    let sane = (9..=21).contains(&shape.cluster_bits)
        && (2..=3).contains(&shape.version)
        && shape.refcount_order <= 6
        && (shape.version == 3 || (shape.refcount_order == 4 && !shape.extended))
        && (!shape.extended || shape.cluster_bits >= 14)
        && (create.compression == Compression::Zlib || shape.version == 3)
        && create.size_bytes.is_multiple_of(512)
        && create.size_bytes <= 1 << 62;
    if !sane {
        return Err(Failure::Unsupported);
    }
    let layout = Layout::of(create);
    if layout.l1_entries * 8 > 32 << 20 {
        return Err(Failure::Unsupported);
    }
    let cluster = shape.cluster_bytes();
    let total = 1 + layout.reftable + layout.blocks + layout.l1;
    medium.zero(0, 512)?;
    medium.set_length(0)?;
    medium.set_length(total * cluster)?;
    medium.zero(0, total * cluster)?;
    let mut table = Vec::new();
    for block in 0..layout.blocks {
        table.extend_from_slice(&((1 + layout.reftable + block) * cluster).to_be_bytes());
    }
    table.resize(index(layout.reftable * cluster), 0);
    medium.write(cluster, &table)?;
    write_counts(medium, &shape, &layout, total)?;
    medium.sync()?;
    medium.write(0, &header_cluster(create, &layout)?)?;
    medium.sync()
}

fn write_counts(medium: &mut dyn Medium, shape: &Shape, layout: &Layout, total: u64) -> Result<(), Failure> {
    let per_block = shape.refcounts_per_block();
    for number in 0..layout.blocks {
        let mut block = alloc::vec![0; index(shape.cluster_bytes())];
        for cluster in number * per_block..((number + 1) * per_block).min(total) {
            let (at, bytes, length) = refcount_bytes(&block, shape.refcount_order, cluster % per_block, 1);
            put(&mut block, at, bytes.get(..length).unwrap_or_default());
        }
        medium.write((1 + layout.reftable + number) * shape.cluster_bytes(), &block)?;
    }
    Ok(())
}

/// The names by which other programs can tell what they do not know.
const FEATURES: [(u8, u8, &[u8]); 7] = [
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
];

fn header_cluster(create: &Create, layout: &Layout) -> Result<Vec<u8>, Failure> {
    let shape = create.shape;
    let mut out = alloc::vec![0; index(shape.cluster_bytes())];
    let mut word = |at: usize, value: u32| put(&mut out, at, &value.to_be_bytes());
    word(0, MAGIC);
    word(4, shape.version);
    word(20, shape.cluster_bits);
    word(36, narrow(layout.l1_entries));
    word(56, narrow(layout.reftable));
    let mut long = |at: usize, value: u64| put(&mut out, at, &value.to_be_bytes());
    long(24, create.size_bytes);
    long(40, (1 + layout.reftable + layout.blocks) * shape.cluster_bytes());
    long(48, shape.cluster_bytes());
    let zstd = create.compression == Compression::Zstd;
    let mut at = 72;
    if shape.version == 3 {
        let bits = if zstd { COMPRESSION } else { 0 } | if shape.extended { EXTENDED_L2 } else { 0 };
        long(72, bits);
        put(&mut out, 96, &shape.refcount_order.to_be_bytes());
        put(&mut out, 100, &112_u32.to_be_bytes());
        put(&mut out, 104, &[u8::from(zstd)]);
        at = 112;
    }
    if let Some((_, format)) = &create.backing {
        at = put_extension(&mut out, at, 0xe279_2aca, format.as_bytes())?;
    }
    if shape.version == 3 {
        let mut names = Vec::new();
        for (kind, bit, name) in FEATURES {
            let mut entry = [0; 48];
            put(&mut entry, 0, &[kind, bit]);
            put(&mut entry, 2, name);
            names.extend_from_slice(&entry);
        }
        // The smallest clusters have no room for names beside a parent's.
        let name = create.backing.as_ref().map_or(0, |(name, _)| name.len());
        if at + 16 + names.len() + name <= out.len() {
            at = put_extension(&mut out, at, 0x6803_f857, &names)?;
        }
    }
    at += 8;
    if let Some((name, _)) = &create.backing {
        if name.len() > 1023 || at + name.len() > out.len() {
            return Err(Failure::Unsupported);
        }
        put(&mut out, at, name.as_bytes());
        put(&mut out, 8, &(at as u64).to_be_bytes());
        put(&mut out, 16, &narrow(name.len() as u64).to_be_bytes());
    }
    Ok(out)
}

fn put_extension(out: &mut [u8], at: usize, kind: u32, data: &[u8]) -> Result<usize, Failure> {
    let end = at + 8 + data.len().next_multiple_of(8);
    if end + 8 > out.len() {
        return Err(Failure::Unsupported);
    }
    put(out, at, &kind.to_be_bytes());
    put(out, at + 4, &narrow(data.len() as u64).to_be_bytes());
    put(out, at + 8, data);
    Ok(end)
}
