//! A VHD, alone or with a parent, whose metadata contradict themselves: looked at, repaired, mapped, grown, given a parent, opened and used.
use formats::vhd::change::{grow, set_hidden, set_parent};
use formats::vhd::check::{check, check_parent, enable, info};
use formats::vhd::create::{Create, Parent, create};
use formats::vhd::map::map;
use formats::vhd::{BLOCK_BYTES, Kind, Vhd, read_headers};
use formats::{Disk, Extent, Facts, Format, Limits, Medium, Op, Raw};

use crate::image::{Input, Sparse, User, built, edge};

const LIMITS: Limits = Limits { requests: 64, payouts: 8, work: 64, bounces: 2, dirty_pages: 12 };
/// Sectors of a block's data.
const BLOCK: u64 = 4096;
/// Blocks of the disk.
const BLOCKS: u64 = 4;

/// What lies behind the end of a file may be written up to here: the block that lies there.
const SLACK: u64 = (BLOCK + 1) * 512;

/// What an image is made as.
#[derive(Clone, Copy)]
struct Setup {
    kind: Kind,
    room: bool,
    raw_parent: bool,
    /// Bitmaps as others write them: of the sectors that were written and no other.
    exact: bool,
}

impl Setup {
    fn of(byte: u8) -> Setup {
        let kind = [Kind::Dynamic, Kind::Differencing, Kind::Dynamic, Kind::Fixed][usize::from(byte & 3)];
        Setup { kind, room: byte & 4 != 0, raw_parent: byte & 8 != 0, exact: byte & 16 != 0 }
    }
}

fn parent(raw: bool) -> Parent {
    Parent { uuid: Some([5; 16]).filter(|_| !raw), timestamp: 0, path: "dir/base.vhd".into() }
}

fn facts(medium: &Sparse, new_space_is_zero: bool) -> Facts {
    Facts { length_bytes: medium.length, grows: !medium.device, new_space_is_zero }
}

/// What no data may lie over: every part of the metadata.
fn guarded(medium: &Sparse) -> Vec<(u64, u64)> {
    let header = medium.number(16, 8);
    if medium.number(60, 4) == 2 || medium.number(header, 8) != u64::from_be_bytes(*b"cxsparse") {
        return Vec::new();
    }
    let (table, entries) = (medium.number(header + 16, 8), medium.number(header + 28, 4));
    vec![(0, 512), (header, header + 1024), (table, table + entries * 4)]
}

/// A sound image with data in three blocks, of which one was given back.
fn build(byte: u8, uuid: u8) -> Sparse {
    let setup = Setup::of(byte);
    let differencing = setup.kind == Kind::Differencing;
    let what = Create {
        kind: setup.kind,
        disk_bytes: BLOCKS * BLOCK_BYTES,
        room_bytes: if setup.room { 300 << 20 } else { 0 },
        uuid: [uuid; 16],
        seconds: 1_000_000_000,
        parent: differencing.then(|| parent(setup.raw_parent)),
    };
    let mut medium = Sparse::default();
    create(&mut medium, &what).unwrap();
    let known = facts(&medium, !setup.exact);
    let image = Vhd::open_to_write(&mut medium, known).unwrap();
    let mut chain: Vec<(u32, Box<dyn Format>)> = vec![(0, Box::new(image))];
    if differencing {
        chain.push((1, Box::new(Raw::of_sectors(BLOCKS * BLOCK))));
    }
    let disk = Disk::new(1, chain, false, LIMITS);
    let mut user = User::new(disk, vec![medium, Sparse::default()], guarded, SLACK);
    for (op, block, sectors) in
        [(Op::Write, 2, 9), (Op::Write, 0, 40), (Op::Write, 1, 3), (Op::Discard, 1, BLOCK)]
    {
        user.run(op, Extent { sector: block * BLOCK, sectors }).0.unwrap();
    }
    user.play(&mut Input(&[]), 64);
    let mut medium = user.media.swap_remove(0);
    assert_eq!(check(&mut medium, true, false).unwrap().flaws, 0, "{byte}");
    medium
}

/// Puts a checksum right.
fn sum_up(medium: &mut Sparse, at: u64, length: usize, place: usize) {
    let mut bytes = vec![0; length];
    medium.peek(at, &mut bytes);
    bytes[place..place + 4].fill(0);
    let sum = bytes.iter().fold(0_u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
    medium.patch(at + place as u64, &(!sum).to_be_bytes());
}

/// Where things are.
struct Places {
    header: u64,
    table: u64,
    batmap: u64,
    end: u64,
}

impl Places {
    fn of(medium: &Sparse) -> Places {
        let header = medium.number(16, 8).min(1 << 20);
        let table = medium.number(header + 16, 8).min(1 << 20);
        let length = (medium.number(header + 28, 4) * 4).next_multiple_of(512).min(1 << 20);
        Places { header, table, batmap: table + length, end: medium.length.saturating_sub(512) }
    }
}

const FOOTER_FIELDS: [u64; 16] = [0, 8, 12, 16, 24, 28, 32, 40, 44, 48, 52, 56, 60, 64, 68, 84];
const HEADER_FIELDS: [u64; 16] = [0, 8, 16, 20, 24, 28, 32, 36, 40, 56, 64, 576, 580, 584, 588, 592];

/// A number that a field may hold.
fn field(input: &mut Input<'_>) -> [u8; 8] {
    match input.byte() {
        0..=127 => u64::from(input.byte()) << input.pick(&[0, 8, 9, 16, 21, 24, 32, 40]),
        128..=191 => input.number(8),
        _ => edge(input),
    }
    .to_be_bytes()
}

/// Changes one thing of an image.
fn patch(medium: &mut Sparse, input: &mut Input<'_>) {
    let (kind, place) = (input.byte(), input.byte());
    let which = u64::from(place);
    let places = Places::of(medium);
    let block = medium.number(places.table + which % BLOCKS * 4, 4) * 512;
    match kind & 15 {
        // The last bytes of a number, or the first.
        0 | 1 => {
            let word = field(input);
            let at = if kind & 1 == 0 { 0 } else { places.end };
            medium.patch(at + FOOTER_FIELDS[usize::from(place & 15)], &word[usize::from(place >> 4 & 4)..]);
        }
        2 | 3 => {
            let word = field(input);
            let at = HEADER_FIELDS[usize::from(place & 15)]
                + if place & 8 != 0 { u64::from(kind >> 5) * 24 } else { 0 };
            medium.patch(places.header + at, &word[usize::from(place >> 4 & 4)..]);
        }
        4..=6 => {
            let first = medium.number(places.table + which % BLOCKS * 4, 4);
            let step = u64::from(input.byte());
            let start = match kind >> 4 & 7 {
                0 => step,
                1 => first.wrapping_add(step),
                2 => first.wrapping_sub(step),
                3 => u64::from(u32::MAX),
                4 => medium.number(places.table + step % BLOCKS * 4, 4),
                5 => (medium.length / 512 + step).saturating_sub(8),
                _ => input.number(4),
            };
            medium.patch(places.table + which % 8 * 4, &(start as u32).to_be_bytes());
        }
        7 => medium.patch(block + u64::from(input.byte()), &[input.byte()]),
        8 => {
            let word = field(input);
            medium.patch(
                places.batmap + [0, 8, 16, 20, 24, 28][usize::from(place) % 6],
                &word[usize::from(kind >> 4 & 4)..],
            );
        }
        9 => medium.patch(places.batmap + 512 + which % 4, &[input.byte()]),
        10 => {
            let text = medium.number(places.header + 592 + which % 3 * 24, 8);
            medium.patch(text + u64::from(input.byte()), &[input.byte()]);
        }
        11 => medium.patch(input.number(2), &[place]),
        12 => {
            // The footer at the end: gone, old, a byte short, somebody else's.
            let mut copy = [0; 512];
            medium.peek(0, &mut copy);
            match place & 7 {
                0 => medium.patch(places.end, &[0; 512]),
                1 => medium.patch(places.end, &copy),
                2 => {
                    medium.patch(places.end, &[0; 512]);
                    medium.patch(places.end + 1, &copy[..511]);
                }
                3 => drop(medium.set_length(places.end)),
                4 => drop(medium.write(medium.length, &copy)),
                5 => medium.patch(0, &[0; 512]),
                6 => medium.patch(places.end, b"v_poison"),
                _ => medium.patch(0, b"v_poison"),
            }
        }
        13 => {
            let change = [1, 511, 512, 4096, (BLOCK + 1) * 512, 5 << 20][usize::from(place) % 6];
            let length =
                if kind & 16 == 0 { medium.length + change } else { medium.length.saturating_sub(change) };
            let _ = medium.set_length(length.min(48 << 20));
        }
        _ => {
            let mut sector = [0; 512];
            medium.peek(u64::from(input.byte()) * 512, &mut sector);
            medium.patch(which * 512, &sector);
        }
    }
}

/// Puts checksums right, but for those that are to be wrong.
fn seal(medium: &mut Sparse, wrong: u8) {
    let places = Places::of(medium);
    if wrong & 1 == 0 {
        sum_up(medium, places.header, 1024, 36);
    }
    if wrong & 2 == 0 {
        let (map, used) = (medium.number(places.batmap + 8, 8), medium.number(48, 8) / BLOCK_BYTES / 8);
        let used = used.div_ceil(512).clamp(1, 64) * 512;
        let mut bytes = vec![0; used as usize];
        medium.peek(map, &mut bytes);
        let sum = bytes.iter().fold(0_u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
        if medium.number(places.batmap, 8) == u64::from_be_bytes(*b"tdbatmap") {
            medium.patch(places.batmap + 24, &(!sum).to_be_bytes());
        }
    }
    for (bit, at) in [(4, 0), (8, places.end)] {
        let cookie = medium.number(at, 8).to_be_bytes();
        if wrong & bit == 0 && (&cookie == b"conectix" || &cookie == b"v_poison") {
            sum_up(medium, at, 512, 64);
        }
    }
}

/// What tools do, each with a copy.
fn tools(medium: &Sparse, which: u8) {
    let mut copy = medium.clone();
    let grows = which & 128 == 0;
    match which & 7 {
        0 => drop(info(&mut copy)),
        1 => drop(enable(&mut copy)),
        2 => drop(set_hidden(&mut copy, true)),
        3 => drop(set_parent(&mut copy, grows, &parent(which & 16 != 0))),
        4 => {
            // The metadata may be grown where they lie, or the blocks that are in the way move.
            let size = if which & 16 == 0 { 16 << 20 } else { 3 << 40 >> 4 };
            if grow(&mut copy, grows, size).is_ok()
                && check(&mut medium.clone(), grows, false).is_ok_and(|old| old.corruptions + old.flaws == 0)
            {
                let report = check(&mut copy, grows, false).expect("it has grown");
                assert_eq!((report.corruptions, report.flaws), (0, 0), "grown: {report:?}");
            }
        }
        5 | 6 => {
            if let Ok(report) = check(&mut copy, grows, true)
                && report.corruptions == 0
                && report.flaws == report.repaired
            {
                let again = check(&mut copy, grows, false).expect("repaired");
                assert_eq!((again.corruptions, again.flaws), (0, 0), "{report:?}, then {again:?}");
            }
        }
        _ => {
            if let Ok(headers) = read_headers(&mut copy)
                && headers.disk_bytes < 1 << 30
            {
                let mut next = 0;
                let _ = map(&mut copy, &headers, &mut |sector, run| {
                    assert_eq!(sector, next, "a run that does not follow");
                    next = sector + run.sectors;
                });
                let _ = check_parent(&headers, Some(&headers));
            }
        }
    }
}

/// Plays one input.
pub fn play(data: &[u8]) {
    let mut input = Input(data);
    let (byte, flags) = (input.byte(), input.byte());
    let setup = Setup::of(byte);
    let mut leaf = built((2, [byte & 31, 0]), || build(byte & 31, 9));
    let below = input.byte() & 0b10100;
    let mut base = match setup.raw_parent {
        true => Sparse::of_length(BLOCKS * BLOCK * 512),
        false => built((3, [below, 0]), || build(below, 5)),
    };
    for _ in 0..input.byte() & 15 {
        let medium = if !setup.raw_parent && input.byte() & 7 == 7 { &mut base } else { &mut leaf };
        patch(medium, &mut input);
    }
    let wrong = input.byte();
    seal(&mut leaf, if wrong & 0x70 == 0x70 { wrong } else { 0 });
    if !setup.raw_parent {
        seal(&mut base, 0);
    }
    tools(&leaf, input.byte());
    leaf.device = flags & 1 != 0;
    let facts = facts(&leaf, flags & 2 == 0);
    let (image, read_only) = match Vhd::open_to_write(&mut leaf, facts) {
        Ok(image) => (image, false),
        Err(_) => match Vhd::open(&mut leaf) {
            Ok(image) => (image, true),
            Err(_) => return,
        },
    };
    let differencing = image.kind() == Kind::Differencing;
    let mut chain: Vec<(u32, Box<dyn Format>)> = vec![(0, Box::new(image))];
    if differencing && setup.raw_parent {
        chain.push((1, Box::new(Raw::of_sectors(base.length / 512))));
    } else if differencing && let Ok(image) = Vhd::open(&mut base) {
        chain.push((1, Box::new(image)));
    }
    let disk = Disk::new(1, chain, read_only, LIMITS);
    let mut user = User::new(disk, vec![leaf, base], guarded, SLACK);
    // Opening to write looks at every block, so from then on nothing may be lost.
    user.trusted = !read_only;
    user.fail_after = match input.byte() {
        late @ 1..=63 => u32::from(late) * 3,
        _ => u32::MAX,
    };
    user.play(&mut input, [64, 257, BLOCK / 2, BLOCK][usize::from(flags >> 2 & 3)]);
    let healthy = user.disk.corruption().is_none() && user.disk.closed() == Some(Ok(()));
    if healthy && !read_only {
        let report = check(&mut user.media[0], facts.grows, false).expect("opened before");
        assert_eq!(report.corruptions, 0, "a sound image is left with {report:?}");
    }
}
