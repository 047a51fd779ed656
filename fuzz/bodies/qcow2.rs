//! A QCOW2 image, alone or with a parent, whose metadata contradict themselves: checked, repaired, mapped, grown, opened and used.
use formats::qcow2::check::{Fix, check};
use formats::qcow2::create::{Create, create};
use formats::qcow2::header::Header;
use formats::qcow2::map::{map, usage};
use formats::qcow2::resize::{grow, trim};
use formats::qcow2::shape::{COPIED, OFFSET, refcount, refcount_bytes};
use formats::qcow2::{Compression, Options, Qcow2, Shape};
use formats::{Disk, Extent, Format, Limits, Medium, Op, Raw};

use crate::image::{Input, Sparse, User, built, edge};

const PACKED: u64 = 1 << 62;
const LIMITS: Limits = Limits { requests: 64, payouts: 8, work: 64, bounces: 2, dirty_pages: 12 };

/// What an image is made as.
#[derive(Clone, Copy)]
struct Setup {
    shape: Shape,
    zstd: bool,
    packed: bool,
    snapshot: bool,
    bitmap: bool,
    backing: Option<&'static str>,
}

impl Setup {
    fn of(bytes: [u8; 2]) -> Setup {
        let version = if bytes[0] & 8 == 0 { 3 } else { 2 };
        let cluster_bits = [9, 10, 12, 14, 9, 14, 16, 12][usize::from(bytes[0] & 7)];
        let extended = version == 3 && cluster_bits >= 14 && bytes[0] & 16 != 0;
        let refcount_order =
            if version == 3 { [4, 0, 1, 2, 3, 5, 6, 4][usize::from(bytes[0] >> 5)] } else { 4 };
        Setup {
            shape: Shape { version, cluster_bits, extended, refcount_order },
            zstd: version == 3 && bytes[1] & 1 != 0,
            packed: bytes[1] & 2 != 0,
            snapshot: bytes[1] & 4 != 0 && refcount_order > 0,
            bitmap: bytes[1] & 8 != 0 && version == 3,
            backing: [None, None, Some("raw"), Some("qcow2")][usize::from(bytes[1] >> 4 & 3)],
        }
    }

    fn sectors(&self) -> u64 {
        (self.shape.cluster_sectors() * 5 + 3).max(150)
    }
}

fn open(medium: &mut Sparse, options: Options) -> Option<Box<dyn Format>> {
    Qcow2::open(medium, options).ok().map(|(image, _)| Box::new(image) as Box<dyn Format>)
}

fn writable(device: bool) -> Options {
    Options { writable: true, reserve_bytes: 8192, grows: !device, new_space_is_zero: !device }
}

/// What no data may lie over: header, L1 table, refcount table.
fn guarded(medium: &Sparse) -> Vec<(u64, u64)> {
    let cluster = 1 << medium.number(20, 4);
    let l1 = (medium.number(40, 8), (medium.number(36, 4) * 8_u64).next_multiple_of(cluster));
    let counts = (medium.number(48, 8), medium.number(56, 4) * cluster);
    vec![(0, cluster), (l1.0, l1.0.saturating_add(l1.1)), (counts.0, counts.0.saturating_add(counts.1))]
}

/// A sound image with data in it.
fn build(bytes: [u8; 2], layer: u8) -> Sparse {
    let setup = Setup::of(bytes);
    let mut what = Create::new(setup.sectors() * 512 - u64::from(layer) * 512 * 7);
    what.shape = setup.shape;
    what.compression = if setup.zstd { Compression::Zstd } else { Compression::Zlib };
    what.backing = setup.backing.filter(|_| layer == 0).map(|format| ("p".to_owned(), format.to_owned()));
    let mut medium = Sparse::default();
    create(&mut medium, &what).unwrap();
    let mut chain: Vec<(u32, Box<dyn Format>)> = vec![(0, open(&mut medium, writable(false)).unwrap())];
    if what.backing.is_some() {
        chain.push((1, Box::new(Raw::of_sectors(setup.sectors()))));
    }
    let disk = Disk::new(1, chain, false, LIMITS);
    let mut user = User::new(disk, vec![medium, Sparse::default()], guarded, setup.shape.cluster_bytes());
    let unit = setup.shape.cluster_sectors();
    for (op, sector, sectors) in [
        (Op::Write, 0, unit + 1),
        (Op::Write, unit * 3, 5),
        (Op::Write, setup.sectors() / 2, 9),
        (Op::WriteZeroes, unit * 2, unit),
    ] {
        user.run(op, Extent { sector, sectors }).0.unwrap();
    }
    user.play(&mut Input(&[]), unit);
    let mut medium = user.media.swap_remove(0);
    if setup.packed {
        pack(&mut medium, &setup);
    }
    if setup.bitmap {
        add_bitmap(&mut medium, &setup);
    }
    if setup.snapshot {
        snapshot(&mut medium, &setup);
    }
    let report = check(&mut medium, Fix::Nothing).unwrap();
    assert!(report.is_clean(), "{bytes:?}: {report:?}");
    medium
}

/// Where the refcount block for a cluster lies; 0 for nowhere.
fn block_of(medium: &Sparse, shape: &Shape, cluster: u64) -> u64 {
    let at = (cluster / shape.refcounts_per_block()).saturating_mul(8);
    let inside = at < medium.number(56, 4) << shape.cluster_bits;
    if inside { medium.number(medium.number(48, 8).saturating_add(at), 8) } else { 0 }
}

fn count(medium: &mut Sparse, shape: &Shape, cluster: u64, change: impl FnOnce(u64) -> u64) {
    let block = block_of(medium, shape, cluster);
    let mut bytes = vec![0; shape.cluster_bytes() as usize];
    medium.peek(block, &mut bytes);
    let at = cluster % shape.refcounts_per_block();
    let value = change(refcount(&bytes, shape.refcount_order, at));
    let (at, value, length) = refcount_bytes(&bytes, shape.refcount_order, at, value);
    if block != 0 {
        medium.patch(block.saturating_add(at as u64), &value[..length]);
    }
}

/// So many new clusters at the end of the file, counted once.
fn extend(medium: &mut Sparse, shape: &Shape, clusters: u64) -> Option<u64> {
    let first = medium.length.div_ceil(shape.cluster_bytes());
    if (first..first + clusters).any(|cluster| block_of(medium, shape, cluster) == 0) {
        return None;
    }
    medium.set_length((first + clusters) << shape.cluster_bits).unwrap();
    (first..first + clusters).for_each(|cluster| count(medium, shape, cluster, |_| 1));
    Some(first << shape.cluster_bits)
}

fn l2_tables(medium: &Sparse) -> Vec<(u64, u64)> {
    let (at, entries) = (medium.number(40, 8), medium.number(36, 4).min(4096));
    let places = (0..entries).map(|number| at.saturating_add(number * 8));
    let all = places.map(|at| (at, medium.number(at, 8) & OFFSET));
    all.filter(|(_, table)| *table != 0).collect()
}

/// Puts the disk's first cluster in again, packed: deflate's stored blocks, or a zstd block of one repeated byte.
fn pack(medium: &mut Sparse, setup: &Setup) {
    let shape = &setup.shape;
    let length = shape.cluster_bytes() as usize;
    let mut packed = Vec::new();
    if setup.zstd {
        packed.extend_from_slice(&[0x28, 0xb5, 0x2f, 0xfd, 0xa0]);
        packed.extend_from_slice(&(length as u32).to_le_bytes());
        packed.extend_from_slice(&(length as u32 * 8 + 3).to_le_bytes()[..3]);
        packed.push(0x5a);
    } else {
        for (number, part) in (1..).zip(vec![0x5a; length].chunks(32 << 10)) {
            let size = part.len() as u16;
            packed.push(u8::from(number * (32 << 10) >= length));
            packed.extend_from_slice(&size.to_le_bytes());
            packed.extend_from_slice(&(!size).to_le_bytes());
            packed.extend_from_slice(part);
        }
    }
    let (Some(&(_, table)), clusters) = (l2_tables(medium).first(), packed.len().div_ceil(length) as u64)
    else {
        return;
    };
    let Some(at) = extend(medium, shape, clusters) else { return };
    medium.patch(at, &packed);
    let old = medium.number(table, 8) & OFFSET;
    let sectors = (packed.len() as u64).div_ceil(512) - 1;
    let entry = PACKED | sectors << (62 - (shape.cluster_bits - 8)) | at;
    medium.patch(table, &entry.to_be_bytes());
    if shape.extended {
        medium.patch(table + 8, &[0; 8]);
    }
    count(medium, shape, old >> shape.cluster_bits, |_| 0);
}

/// A bitmap of one table entry.
fn add_bitmap(medium: &mut Sparse, setup: &Setup) {
    let shape = &setup.shape;
    let mut at = medium.number(100, 4);
    while medium.number(at, 4) != 0 {
        at += 8 + medium.number(at + 4, 4).next_multiple_of(8);
    }
    let end = match medium.number(8, 8) {
        0 => shape.cluster_bytes(),
        name => name,
    };
    // A parent's name follows the mark of the end at once.
    if setup.backing.is_some() || at + 40 > end {
        return;
    }
    let Some(first) = extend(medium, shape, 3) else { return };
    let (table, data) = (first + shape.cluster_bytes(), first + 2 * shape.cluster_bytes());
    let entry = [
        &table.to_be_bytes()[..],
        &1_u32.to_be_bytes(),
        &2_u32.to_be_bytes(),
        &[1, 16, 0, 1, 0, 0, 0, 0],
        b"b\0\0\0\0\0\0\0",
    ];
    medium.patch(first, &entry.concat());
    medium.patch(table, &data.to_be_bytes());
    let extension = [
        &0x2385_2875_u32.to_be_bytes()[..],
        &24_u32.to_be_bytes(),
        &1_u32.to_be_bytes(),
        &[0; 4],
        &32_u64.to_be_bytes(),
    ];
    medium.patch(at, &extension.concat());
    medium.patch(at + 24, &first.to_be_bytes());
    medium.patch(95, &[1]);
}

/// A snapshot of what is there: from then on every table and cluster is shared.
fn snapshot(medium: &mut Sparse, setup: &Setup) {
    let shape = &setup.shape;
    let (l1, entries) = (medium.number(40, 8), medium.number(36, 4));
    let clusters = (entries * 8).div_ceil(shape.cluster_bytes());
    let Some(copy) = extend(medium, shape, clusters + 1) else { return };
    for (entry_at, table) in l2_tables(medium) {
        for number in 0..shape.l2_entries() {
            let at = table + number * shape.entry_bytes();
            let word = medium.number(at, 8);
            if word & PACKED != 0 {
                let split = 62 - (shape.cluster_bits - 8);
                let (from, sectors) = (word & ((1 << split) - 1), (word & !PACKED) >> split);
                let last = (from + (sectors + 1) * 512 - from % 512 - 1) >> shape.cluster_bits;
                (from >> shape.cluster_bits..=last)
                    .for_each(|cluster| count(medium, shape, cluster, |old| old + 1));
            } else if word & OFFSET != 0 {
                count(medium, shape, (word & OFFSET) >> shape.cluster_bits, |old| old + 1);
                medium.patch(at, &(word & !COPIED).to_be_bytes());
            }
        }
        count(medium, shape, table >> shape.cluster_bits, |old| old + 1);
        medium.patch(entry_at, &table.to_be_bytes());
    }
    for number in 0..entries {
        let entry = medium.number(l1 + number * 8, 8);
        medium.patch(copy + number * 8, &entry.to_be_bytes());
    }
    let table = copy + (clusters << shape.cluster_bits);
    let mut entry = vec![0; 40 + 16 + 2];
    entry[..8].copy_from_slice(&copy.to_be_bytes());
    entry[8..12].copy_from_slice(&(entries as u32).to_be_bytes());
    entry[12..16].copy_from_slice(&[0, 1, 0, 1]);
    entry[39] = 16;
    entry[48..56].copy_from_slice(&(setup.sectors() * 512).to_be_bytes());
    entry[56..].copy_from_slice(b"1s");
    medium.patch(table, &entry);
    medium.patch(60, &1_u32.to_be_bytes());
    medium.patch(64, &table.to_be_bytes());
}

/// What an entry may say: a cluster of the file with marks, or anything.
fn entry(input: &mut Input<'_>, bits: u64) -> u64 {
    match input.byte() {
        kind @ 0..=159 => {
            let marks = [0, COPIED, 1, COPIED | 1, PACKED, COPIED | PACKED, 2, 1 << 56];
            marks[usize::from(kind % 8)] | u64::from(input.byte()) << bits
        }
        160..=191 => PACKED | input.number(2) << (62 - (bits - 8)) | input.number(3),
        192..=223 => input.number(8),
        _ => edge(input),
    }
}

/// Changes one thing of an image.
fn patch(medium: &mut Sparse, input: &mut Input<'_>) {
    let bits = medium.number(20, 4).clamp(9, 21);
    let tables = l2_tables(medium);
    let kind = input.byte();
    let (place, which) = (u64::from(input.byte()), usize::from(kind >> 4));
    let value = entry(input, bits);
    let word = value.to_be_bytes();
    match kind & 15 {
        0 => {
            let fields =
                [(24, 8), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8), (72, 8), (80, 8), (88, 8)];
            let (at, length) = fields[place as usize % fields.len()];
            medium.patch(at, &word[8 - length..]);
        }
        1 => {
            let at = [4, 8, 16, 20, 32, 96, 100, 104][place as usize % 8];
            medium.patch(at, &word[4..]);
        }
        2 => medium.patch(place * 2 + which as u64 % 2, &word[7..]),
        3 => medium.patch(medium.number(40, 8).saturating_add(place % 16 * 8), &word),
        4..=7 if !tables.is_empty() => {
            let (_, table) = tables[which % tables.len()];
            medium.patch(table + place % 72 * 8, &word);
        }
        8 => medium.patch(medium.number(48, 8).saturating_add(place % 8 * 8), &word),
        9 | 10 => {
            let shape = Shape {
                version: 3,
                cluster_bits: bits as u32,
                extended: false,
                refcount_order: if medium.number(4, 4) == 2 { 4 } else { medium.number(96, 4).min(6) as u32 },
            };
            count(medium, &shape, place, |_| value & 3);
        }
        11 => medium.patch(medium.number(64, 8).saturating_add(place % 64), &word[which % 8..]),
        12 => {
            let mut at = medium.number(100, 4).clamp(72, 512);
            while at < 4096 && !matches!(medium.number(at, 4), 0 | 0x2385_2875) {
                at += 8 + medium.number(at + 4, 4).next_multiple_of(8);
            }
            let directory = medium.number(at + 24, 8).min(1 << 60);
            let places =
                [at + 4, at + 8, at + 16, at + 24, directory, directory + 8, directory + 16, directory + 20];
            medium.patch(places[place as usize % 8], &word[which % 8..]);
        }
        13 => medium.patch((place << 9 | value & 511) % medium.length.max(1), &word[..1]),
        14 => {
            let mut sector = [0; 512];
            medium.peek((value & 0xff) << 9, &mut sector);
            medium.patch(place << 9, &sector);
        }
        _ => {
            let change = [512, 1 << bits, 5 << bits, 1 << 20][place as usize % 4];
            let length =
                if kind & 16 == 0 { medium.length + change } else { medium.length.saturating_sub(change) };
            let _ = medium.set_length(length.min(32 << 20));
        }
    }
}

/// What tools do, each with a copy.
fn tools(medium: &Sparse, which: u8) {
    if which & 1 != 0 {
        let mut all = medium.clone();
        if let Ok(report) = check(&mut all, Fix::All)
            && report.is_clean()
        {
            let again = check(&mut all, Fix::Nothing).expect("opened before");
            assert_eq!((again.leaks, again.corruptions), (0, 0), "{report:?}, then {again:?}");
        }
    }
    let mut copy = medium.clone();
    match which >> 1 & 3 {
        0 => drop(trim(&mut copy)),
        1 => drop(grow(&mut copy, medium.number(24, 8).saturating_add(1 << 20))),
        _ => {
            if let Ok(header) = Header::read(&mut copy)
                && header.size_bytes < 1 << 28
            {
                let mut next = 0;
                let _ = map(&mut copy, &header, &mut |sector, run| {
                    assert_eq!(sector, next, "a run that does not follow");
                    next = sector + run.sectors;
                });
                let _ = usage(&mut copy, &header);
            }
        }
    }
}

/// Plays one input.
pub fn play(data: &[u8]) {
    let mut input = Input(data);
    let bytes = [input.byte(), input.byte()];
    let (setup, flags) = (Setup::of(bytes), input.byte());
    let mut leaf = built((0, bytes), || build(bytes, 0));
    let below = [input.byte(), input.byte() & 0b1111];
    let mut parent = match setup.backing {
        Some("qcow2") => built((1, below), || build(below, 1)),
        _ => Sparse::of_length((setup.sectors() - u64::from(flags & 3) * 11) * 512),
    };
    for _ in 0..input.byte() & 15 {
        let medium =
            if input.byte() & 7 == 7 && setup.backing == Some("qcow2") { &mut parent } else { &mut leaf };
        patch(medium, &mut input);
    }
    tools(&leaf, input.byte());
    let mut sound = false;
    if flags & 4 == 0 {
        // As an image is opened: what a crash leaves is repaired.
        sound = check(&mut leaf, Fix::Leaks).is_ok_and(|report| report.is_clean());
    }
    leaf.device = flags & 8 != 0;
    if leaf.device {
        leaf.length += 64 << setup.shape.cluster_bits;
    }
    let options = writable(leaf.device);
    let (image, read_only) = match open(&mut leaf, options) {
        Some(image) => (image, false),
        None => match open(&mut leaf, Options::default()) {
            Some(image) => (image, true),
            None => return,
        },
    };
    let named = leaf.number(8, 8) != 0;
    let mut chain: Vec<(u32, Box<dyn Format>)> = vec![(0, image)];
    match setup.backing.filter(|_| named) {
        Some("qcow2") => chain.extend(open(&mut parent, Options::default()).map(|image| (1, image))),
        Some(_) => chain.push((1, Box::new(Raw::of_sectors(parent.length / 512)))),
        None => {}
    }
    let disk = Disk::new(1, chain, read_only, LIMITS);
    let slack = 1 << leaf.number(20, 4);
    let mut user = User::new(disk, vec![leaf, parent], guarded, slack);
    user.trusted = sound;
    user.fail_after = match input.byte() {
        late @ 1..=63 => u32::from(late) * 3,
        _ => u32::MAX,
    };
    let spread = setup.shape.cluster_sectors() / [1, 2, 8, 1][usize::from(flags >> 4 & 3)];
    user.play(&mut input, spread.max(1));
    let healthy = user.disk.corruption().is_none() && user.disk.closed() == Some(Ok(()));
    if sound && healthy && !read_only && !user.media[0].device {
        let report = check(&mut user.media[0], Fix::Nothing).expect("opened before");
        assert!(report.is_clean(), "a sound image is left with {report:?}");
    }
}
