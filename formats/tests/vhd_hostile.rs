//! Images that contradict themselves, dialects, and rubbish: refused by name, or read as their makers meant; never a panic.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod support;
mod vhd_support;

use std::collections::HashMap;

use formats::vhd::check::{check, info};
use formats::vhd::create::{Create, Parent, create};
use formats::vhd::map::map;
use formats::vhd::{Kind, Vhd, read_headers};
use formats::{Disk, Extent, Failure, Format, Limits, Medium, Op, Pages, Place};
use support::driver::Driver;
use support::rng::{Rng, seeds};
use vhd_support::model::Model;
use vhd_support::sparse::Sparse;
use vhd_support::world::{BLOCK, blank};

const MIB: u64 = 1 << 20;

fn driver(mut medium: Sparse, writable: bool) -> Driver<Sparse> {
    let facts = medium.facts();
    let image = if writable { Vhd::open_to_write(&mut medium, facts) } else { Vhd::open(&mut medium) };
    let images: Vec<(u32, Box<dyn Format>)> = vec![(0, Box::new(image.unwrap()))];
    let disk = Disk::new(1, images, !writable, Limits::default());
    Driver::new(disk, Pages::of_pages(64), HashMap::from([(0, medium)]), 1)
}

/// An image with a sector in each of some blocks.
fn filled(kind: Kind, blocks: u64, full: &[u64]) -> Sparse {
    let parent =
        (kind == Kind::Differencing).then(|| Parent { uuid: None, timestamp: 0, path: "p.raw".into() });
    let mut driver = driver(blank(kind, blocks, 0, None, false, parent), true);
    for &block in full {
        let extent = Extent { sector: block * BLOCK + 7, sectors: 1 };
        driver.run(Op::Write, extent, vec![block as u8 + 1; 512]).0.unwrap();
    }
    driver.close().unwrap();
    driver.media.remove(&0).unwrap()
}

/// Changes bytes, and puts a checksum right.
fn poke(medium: &mut Sparse, sector: u64, at: usize, value: &[u8]) {
    let mut bytes = medium.sector(sector);
    bytes[at..at + value.len()].copy_from_slice(value);
    medium.write(sector * 512, &bytes).unwrap();
}

fn sum_up(medium: &mut Sparse, sector: u64, sectors: u64, at: usize) {
    poke(medium, sector, at, &[0; 4]);
    let total: u32 = (sector..sector + sectors).flat_map(|sector| medium.sector(sector)).map(u32::from).sum();
    poke(medium, sector, at, &(!total).to_be_bytes());
}

fn poke_header(medium: &mut Sparse, at: usize, value: &[u8]) {
    poke(medium, 1, at, value);
    sum_up(medium, 1, 2, 36);
}

fn poke_footers(medium: &mut Sparse, at: usize, value: &[u8]) {
    for sector in [0, medium.length() / 512 - 1] {
        poke(medium, sector, at, value);
        sum_up(medium, sector, 1, 64);
    }
}

fn refusal(mut medium: Sparse) -> String {
    let facts = medium.facts();
    Vhd::open_to_write(&mut medium, facts).unwrap_err().to_string()
}

#[test]
fn contradictions_in_the_bat_are_refused_by_name() {
    let good = filled(Kind::Dynamic, 4, &[0, 1, 2]);
    let first = Model::new(&good).bat[0] as u32;
    for (entry, why) in [
        (0, "inside metadata"),
        (3, "inside metadata"),
        (first, "two blocks in one place"),
        (first + 8, "overlap"),
        (first - 8, "overlap"),
        (0xffff_fffe, "past the end"),
        (u32::try_from(good.length() / 512).unwrap(), "past the end"),
    ] {
        let mut bad = good.clone();
        poke(&mut bad, 3, 4, &entry.to_be_bytes());
        assert!(refusal(bad.clone()).contains(why), "{entry:x}: {}", refusal(bad));
        assert_eq!(check(&mut bad, true, true).unwrap().repaired, 0);
        assert!(check(&mut bad, true, false).unwrap().corruptions > 0);
        // Read only, what is sound is read.
        let mut driver = driver(bad, false);
        let extent = Extent { sector: 2 * BLOCK + 7, sectors: 1 };
        assert_eq!(driver.run(Op::Read, extent, vec![9; 512]), (Ok(()), vec![3; 512]));
        let extent = Extent { sector: BLOCK + 7, sectors: 1 };
        if why != "two blocks in one place" && why != "overlap" {
            assert!(matches!(driver.run(Op::Read, extent, vec![9; 512]).0, Err(Failure::Corrupt(_))));
        }
    }
}

#[test]
fn contradictions_in_headers_are_refused_by_name() {
    let good = filled(Kind::Differencing, 3, &[1]);
    type Harm = fn(&mut Sparse);
    let harms: [(&str, Harm); 12] = [
        ("block size", |medium| poke_header(medium, 32, &0u32.to_be_bytes())),
        ("block size", |medium| poke_header(medium, 32, &0x80u32.to_be_bytes())),
        ("block size", |medium| poke_header(medium, 32, &(3u32 << 20).to_be_bytes())),
        ("BAT past the end", |medium| poke_header(medium, 28, &u32::MAX.to_be_bytes())),
        ("smaller than the disk", |medium| poke_header(medium, 28, &2u32.to_be_bytes())),
        ("begin at a sector", |medium| poke_header(medium, 16, &1537u64.to_be_bytes())),
        ("overlap", |medium| poke_header(medium, 16, &512u64.to_be_bytes())),
        ("past the end", |medium| poke_header(medium, 16, &(1u64 << 63).to_be_bytes())),
        ("checksum", |medium| poke(medium, 1, 40, &[1])),
        ("version", |medium| poke_header(medium, 24, &[9])),
        ("header past the end", |medium| poke_footers(medium, 16, &(1u64 << 62).to_be_bytes())),
        ("2040 GiB", |medium| poke_footers(medium, 48, &(1u64 << 50).to_be_bytes())),
    ];
    for (why, harm) in harms {
        let mut bad = good.clone();
        harm(&mut bad);
        let found = refusal(bad);
        assert!(found.contains(why), "{why}: {found}");
    }
    for (at, value, why) in [(8, u32::MAX, "longer than any path"), (16, u32::MAX, "past the end")] {
        let mut bad = good.clone();
        poke(&mut bad, 2, 576 - 512 + at, &value.to_be_bytes());
        sum_up(&mut bad, 1, 2, 36);
        assert!(refusal(bad.clone()).contains(why), "{}", refusal(bad));
    }
}

#[test]
fn a_guests_footer_is_never_taken_for_the_images() {
    let mut forged = filled(Kind::Dynamic, 3, &[1]);
    poke_footers(&mut forged, 68, &[0xab; 16]);
    // A guest of a fixed image writes a dynamic image's first sectors to its disk.
    let mut fixed = Sparse::file();
    let what =
        Create { kind: Kind::Fixed, disk_bytes: MIB, room_bytes: 0, uuid: [1; 16], seconds: 1, parent: None };
    create(&mut fixed, &what).unwrap();
    for sector in 0..6 {
        fixed.write(sector * 512, &forged.sector(sector)).unwrap();
    }
    assert!(read_headers(&mut fixed).unwrap_err().to_string().contains("contradict"));
    // A guest of a dynamic image writes a footer to what happens to be the last sector after a crash.
    let mut dynamic = filled(Kind::Dynamic, 3, &[1]);
    let end = dynamic.length() - 512;
    let footer = fixed.sector(fixed.length() / 512 - 1);
    dynamic.write(end, &footer).unwrap();
    assert!(read_headers(&mut dynamic).unwrap_err().to_string().contains("contradict"));
    // Without the true footer at the end, a fixed image is no image, whatever its disk begins with.
    let mut lost = Sparse::file();
    create(&mut lost, &what).unwrap();
    let own = lost.sector(lost.length() / 512 - 1);
    lost.write(0, &own).unwrap();
    lost.write(MIB, &[0; 512]).unwrap();
    read_headers(&mut lost).unwrap_err();
}

#[test]
fn footers_that_are_short_stale_or_missing() {
    let good = filled(Kind::Dynamic, 3, &[0, 2]);
    let end = good.length() - 512;
    let mut short = good.clone();
    short.set_length(end + 511).unwrap();
    assert!(read_headers(&mut short).unwrap().footers.short);
    let mut stale = good.clone();
    poke(&mut stale, end / 512, 48, &(2 * MIB).to_be_bytes());
    sum_up(&mut stale, end / 512, 1, 64);
    let mut missing = good.clone();
    missing.write(end, &[0xc7; 512]).unwrap();
    let mut no_copy = good.clone();
    no_copy.write(0, &[0; 512]).unwrap();
    for image in [short, stale, missing, no_copy] {
        assert_eq!(info(&mut image.clone()).unwrap().disk_bytes, 6 * MIB);
        let mut driver = driver(image, true);
        let extent = Extent { sector: 2 * BLOCK + 7, sectors: 1 };
        assert_eq!(driver.run(Op::Read, extent, vec![9; 512]), (Ok(()), vec![3; 512]));
        driver.close().unwrap();
        Model::new(&driver.media[&0]).check_closed();
    }
    let mut fixed = Sparse::file();
    let what =
        Create { kind: Kind::Fixed, disk_bytes: MIB, room_bytes: 0, uuid: [1; 16], seconds: 1, parent: None };
    create(&mut fixed, &what).unwrap();
    fixed.set_length(MIB + 511).unwrap();
    assert_eq!(info(&mut fixed).unwrap().disk_bytes, MIB);
}

/// An image by hand, with blocks of 512 KiB: read, and not written.
#[test]
fn other_block_sizes_are_read_only() {
    let mut image = filled(Kind::Dynamic, 1, &[]);
    let start = image.length() / 512 + 7;
    image.set_length((start + 2000) * 512).unwrap();
    poke(&mut image, 0, 28, b"win ");
    sum_up(&mut image, 0, 1, 64);
    image.write(3 * 512, &[0xff; 512]).unwrap();
    poke(&mut image, 3, 4, &u32::try_from(start).unwrap().to_be_bytes());
    poke_header(&mut image, 32, &(512u32 << 10).to_be_bytes());
    poke_header(&mut image, 28, &4u32.to_be_bytes());
    image.write(start * 512, &[0x80; 512]).unwrap();
    image.write((start + 1) * 512, &[5; 512]).unwrap();
    assert!(refusal(image.clone()).contains("2 MiB"));
    let mut driver = driver(image, false);
    let extent = Extent { sector: 1023, sectors: 3 };
    let (result, memory) = driver.run(Op::Read, extent, vec![9; 3 * 512]);
    result.unwrap();
    assert_eq!((memory[0], memory[512], memory[1024]), (0, 5, 0));
}

#[test]
fn the_map_says_what_is_where() {
    let mut medium = filled(Kind::Dynamic, 5, &[1, 2]);
    let headers = read_headers(&mut medium).unwrap();
    let mut runs = Vec::new();
    map(&mut medium, &headers, &mut |first, run| runs.push((first, run))).unwrap();
    let places: Vec<_> =
        runs.iter().map(|(first, run)| (*first, run.sectors, run.place == Place::Zero)).collect();
    assert_eq!(
        places,
        [(0, BLOCK, true), (BLOCK, BLOCK, false), (2 * BLOCK, BLOCK, false), (3 * BLOCK, 2 * BLOCK, true)]
    );
    let mut medium = filled(Kind::Differencing, 3, &[1]);
    let headers = read_headers(&mut medium).unwrap();
    let mut runs = Vec::new();
    map(&mut medium, &headers, &mut |first, run| runs.push((first, run.sectors, run.place == Place::Parent)))
        .unwrap();
    assert_eq!(runs, [(0, BLOCK + 7, true), (BLOCK + 7, 1, false), (BLOCK + 8, 2 * BLOCK - 8, true)]);
}

/// Random bytes in the metadata, checksums put right or not: opening, checking, mapping, reading and writing never panic.
#[test]
fn rubbish_is_refused_or_read_and_never_a_panic() {
    let (mut opened, mut refused) = (0, 0);
    for seed in seeds(3000) {
        let mut rng = Rng::new(seed);
        let kind = if rng.one_in(2) { Kind::Dynamic } else { Kind::Differencing };
        let mut image = filled(kind, 3, &[0, 2]);
        let starts = Model::new(&image).bat.clone();
        for _ in 0..1 + rng.below(4) {
            let sector = match rng.below(8) {
                0 => 0,
                1 => image.length() / 512 - 1,
                2..4 => 1 + rng.below(2),
                4 => 3,
                5 => 4 + rng.below(8),
                6 => starts[0],
                _ => rng.below(image.length() / 512),
            };
            let values = [0, 1, 0xff, 0x7f, 0x80, rng.next() as u8];
            let value = vec![*rng.pick(&values); 1 << rng.below(4)];
            let at = rng.below(505) as usize;
            poke(&mut image, sector, at, &value);
        }
        if rng.one_in(8) {
            image.set_length(rng.below(image.length())).unwrap();
        }
        if !rng.one_in(4) && image.length() > 2048 {
            let end = image.length() / 512 - 1;
            sum_up(&mut image, 0, 1, 64);
            sum_up(&mut image, end, 1, 64);
            sum_up(&mut image, 1, 2, 36);
        }
        let _ = info(&mut image.clone());
        let _ = check(&mut image.clone(), true, rng.one_in(2));
        let _ = formats::vhd::change::grow(&mut image.clone(), true, 8 * MIB);
        if let Ok(headers) = read_headers(&mut image) {
            let _ = map(&mut image.clone(), &headers, &mut |_, _| ());
        }
        let facts = image.facts();
        let writable = Vhd::open_to_write(&mut image, facts).is_ok();
        if !writable && Vhd::open(&mut image).is_err() {
            refused += 1;
            continue;
        }
        opened += 1;
        let mut driver = driver(image, writable);
        let sectors = driver.disk.geometry().sectors;
        for _ in 0..6 {
            let sector = rng.below(sectors.min(1 << 20));
            let extent = Extent { sector, sectors: (1 + rng.below(50)).min(sectors - sector) };
            let op = *rng.pick(&[Op::Read, Op::Write, Op::Discard, Op::Flush]);
            let _ = driver.run(op, extent, vec![1; extent.sectors as usize * 512]);
        }
        let _ = driver.close();
    }
    println!("{opened} opened, {refused} refused");
}

/// A BAT that changes behind an open image's back: nothing more is written, the footer included.
#[test]
fn after_a_contradiction_nothing_is_written() {
    let mut driver = driver(filled(Kind::Dynamic, 8, &[1, 5]), true);
    let write = |driver: &mut Driver<Sparse>, block: u64| {
        driver.run(Op::Write, Extent { sector: block * BLOCK, sectors: 1 }, vec![9; 512]).0
    };
    write(&mut driver, 1).unwrap();
    write(&mut driver, 3).unwrap();
    driver.pages.forget_disk(1);
    poke(driver.media.get_mut(&0).unwrap(), 3, 20, &[0, 0, 0, 1]);
    assert!(matches!(write(&mut driver, 5), Err(Failure::Corrupt(_))));
    driver.settle();
    let before = driver.media[&0].bytes();
    assert!(write(&mut driver, 1).is_err());
    let _ = driver.close();
    assert!(before == driver.media[&0].bytes(), "a corrupt image was changed");
}

/// A sparse file of any length with blocks of one sector could have any number of them.
#[test]
fn a_check_takes_no_memory_for_what_is_not_there() {
    let mut medium = filled(Kind::Dynamic, 8, &[1]);
    poke_header(&mut medium, 32, &512_u32.to_be_bytes());
    poke(&mut medium, 0, 48, &(8_u64 * 512).to_be_bytes());
    sum_up(&mut medium, 0, 1, 64);
    assert!(check(&mut medium, true, false).is_ok());
    medium.set_length(1 << 40).unwrap();
    assert!(matches!(check(&mut medium, true, false), Err(formats::Unsupported::Refused(_))));
}
