//! Images that lie: named errors, no panic, no hang, no huge allocation, and no write after a contradiction was found.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::collections::HashMap;

use formats::qcow2::check::{Fix, check};
use formats::qcow2::create::{Create, create};
use formats::qcow2::header::Header;
use formats::qcow2::map::map;
use formats::qcow2::{Options, Qcow2};
use formats::{Disk, Extent, Failure, Format, Limits, Op, Pages, Unsupported};
use support::driver::Driver;
use support::medium::SimMedium;
use support::rng::{Rng, seeds};

fn writable() -> Options {
    Options { writable: true, reserve_bytes: 16384, ..Options::default() }
}

fn image(bits: u32, version: u32) -> Vec<u8> {
    let mut medium = SimMedium::file();
    let mut what = Create::new(200 * 512);
    what.shape.cluster_bits = bits;
    what.shape.version = version;
    create(&mut medium, &what).unwrap();
    let mut driver = open(medium.clone()).unwrap();
    for sector in [0, 40, 90, 150] {
        let extent = Extent { sector, sectors: 20 };
        driver.run(Op::Write, extent, vec![5; 20 * 512]).0.unwrap();
    }
    driver.close().unwrap();
    driver.media.remove(&0).unwrap().now
}

fn open(mut medium: SimMedium) -> Result<Driver<SimMedium>, Unsupported> {
    let (image, _) = Qcow2::open(&mut medium, writable())?;
    let disk = Disk::new(1, vec![(0, Box::new(image) as Box<dyn Format>)], false, Limits::default());
    Ok(Driver::new(disk, Pages::of_pages(32), HashMap::from([(0, medium)]), 1))
}

fn medium(bytes: Vec<u8>) -> SimMedium {
    SimMedium::file().with_bytes(bytes)
}

#[test]
fn every_field_of_a_header_is_checked() {
    let sound = image(12, 3);
    let cases: [(&str, usize, &[u8]); 24] = [
        ("magic", 0, &[0]),
        ("version 1", 4, &[0, 0, 0, 1]),
        ("version 4", 4, &[0, 0, 0, 4]),
        ("cluster_bits 8", 20, &[0, 0, 0, 8]),
        ("cluster_bits 22", 20, &[0, 0, 0, 22]),
        ("cluster_bits huge", 20, &[0xff; 4]),
        ("size", 24, &[0x7f; 8]),
        ("AES", 32, &[0, 0, 0, 1]),
        ("LUKS", 32, &[0, 0, 0, 2]),
        ("L1 entries", 36, &[0xff; 4]),
        ("no L1 entries", 36, &[0; 4]),
        ("L1 unaligned", 40, &[0, 0, 0, 0, 0, 0, 0x30, 1]),
        ("L1 beyond the end", 40, &[0, 1, 0, 0, 0, 0, 0, 0]),
        ("refcount table at 0", 48, &[0; 8]),
        ("refcount table unaligned", 48, &[0, 0, 0, 0, 0, 0, 0x10, 8]),
        ("refcount table length 0", 56, &[0; 4]),
        ("refcount table length", 56, &[0xff; 4]),
        ("snapshots", 60, &[0, 2, 0, 0]),
        ("external data", 72, &[0, 0, 0, 0, 0, 0, 0, 4]),
        ("unknown feature", 72, &[0x80, 0, 0, 0, 0, 0, 0, 0]),
        ("extended L2 with small clusters", 72, &[0, 0, 0, 0, 0, 0, 0, 16]),
        ("refcount order", 96, &[0, 0, 0, 7]),
        ("header length", 100, &[0, 0, 0, 105]),
        ("compression without its bit", 104, &[1]),
    ];
    for (name, at, bytes) in cases {
        let mut bad = sound.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        let result = Qcow2::open(&mut medium(bad), writable());
        println!("{name}: {}", result.as_ref().err().map_or("accepted".to_owned(), ToString::to_string));
        assert!(result.is_err(), "{name} was accepted");
    }
    for length in [0, 1, 511, 512, 4096, 8192] {
        assert!(Qcow2::open(&mut medium(sound[..length].to_vec()), writable()).is_err(), "{length} bytes");
    }
}

#[test]
fn parents_named_by_protocol_are_refused() {
    for name in ["json:{}", "nbd://host/x", "file:/etc/passwd", "ssh:x"] {
        let mut medium = SimMedium::file();
        let backing = Some((name.to_owned(), "raw".to_owned()));
        create(&mut medium, &Create { backing, ..Create::new(1 << 20) }).unwrap();
        assert!(matches!(Qcow2::open(&mut medium, writable()), Err(Unsupported::Refused(_))), "{name}");
    }
    for name in ["/a/b:c", "./x:y", "plain.qcow2"] {
        let mut medium = SimMedium::file();
        let backing = Some((name.to_owned(), "raw".to_owned()));
        create(&mut medium, &Create { backing, ..Create::new(1 << 20) }).unwrap();
        assert_eq!(Qcow2::open(&mut medium, writable()).unwrap().1.backing.unwrap().name, name);
    }
}

/// The offset of the L2 entry for a sector.
fn entry_of(bytes: &[u8], sector: u64) -> usize {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let bits = u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let number = ((sector * 512) >> bits) as usize;
    let per_table = (1 << bits) / 8;
    let l2 = (word(word(40) as usize + number / per_table * 8) & 0x00ff_ffff_ffff_fe00) as usize;
    l2 + number % per_table * 8
}

#[test]
fn a_contradiction_fails_what_hits_it_marks_the_image_and_stops_writes() {
    let sound = image(9, 3);
    let entry = entry_of(&sound, 40);
    let word = u64::from_be_bytes(sound[entry..entry + 8].try_into().unwrap());
    let l1 = u64::from_be_bytes(sound[40..48].try_into().unwrap());
    let bad_words = [
        ("beyond the end", (1 << 63) | (1 << 40)),
        ("within the header", 1 << 63),
        ("within L1", (1 << 63) | l1),
        ("reserved bits", word | 0x10),
        ("reserved bits above", word | (1 << 57)),
        ("compressed and the only one", word | (1 << 62)),
        ("compressed beyond the end", (1 << 62) | 0xff_ffff_f000),
    ];
    for (name, bad) in bad_words {
        let mut bytes = sound.clone();
        bytes[entry..entry + 8].copy_from_slice(&u64::to_be_bytes(bad));
        let mut driver = open(medium(bytes)).unwrap();
        let here = Extent { sector: 40, sectors: 1 };
        let there = Extent { sector: 0, sectors: 4 };
        let (read, _) = driver.run(Op::Read, here, vec![0; 512]);
        assert!(matches!(read, Err(Failure::Corrupt(_))), "{name}: {read:?}");
        let (write, _) = driver.run(Op::Write, here, vec![1; 512]);
        assert!(matches!(write, Err(Failure::Corrupt(_))), "{name}: {write:?}");
        assert!(driver.disk.corruption().is_some(), "{name}");
        driver.run(Op::Read, there, vec![0; 2048]).0.unwrap();
        let before = driver.media[&0].now.clone();
        assert!(driver.run(Op::Write, there, vec![9; 2048]).0.is_err(), "{name}: still written");
        driver.settle();
        assert!(before == driver.media[&0].now, "{name}: changed");
        assert_eq!(before[79] & 2, 2, "{name}: not marked");
        driver.close().unwrap();
        // The mark keeps writers away.
        assert!(Qcow2::open(&mut driver.media.remove(&0).unwrap(), writable()).is_err());
    }
}

/// Puts a directory of one bitmap at `at` into an image's header.
fn name_bitmaps(bytes: &mut [u8], at: u64) {
    let word = |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let mut end = word(bytes, 100);
    while word(bytes, end) != 0 {
        end += 8 + word(bytes, end + 4).next_multiple_of(8);
    }
    let head = [0x2385_2875_u32, 24, 1, 0].map(u32::to_be_bytes).concat();
    bytes[end..end + 32].copy_from_slice(&[head, [32, at].map(u64::to_be_bytes).concat()].concat());
    bytes[95] |= 1;
}

/// Opening for writing changes the directory: nothing else may lie there.
#[test]
fn a_bitmap_directory_lies_within_the_file_and_over_nothing_else() {
    let sound = image(12, 3);
    let number = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let end = (sound.len() as u64).next_multiple_of(4096);
    for (name, at, refused) in [
        ("behind the end", end, true),
        ("where no file can be", 1 << 63, true),
        ("over the L1 table", number(40), true),
        ("over the refcount table", number(48), true),
        ("over the last cluster", end - 4096, false),
    ] {
        let mut bytes = sound.clone();
        name_bitmaps(&mut bytes, at);
        let result = Qcow2::open(&mut medium(bytes.clone()), writable());
        assert_eq!(result.is_err(), refused, "{name}");
        // Whoever does not know bitmaps has cleared the bit: then nobody looks at the directory.
        bytes[95] = 0;
        assert!(Qcow2::open(&mut medium(bytes), writable()).is_ok(), "{name}, not trusted");
    }
}

#[test]
fn a_packed_cluster_that_names_a_table_is_not_given_back() {
    let sound = image(12, 3);
    let (l1, entry) = (u64::from_be_bytes(sound[40..48].try_into().unwrap()), entry_of(&sound, 40));
    for named in [l1, u64::from_be_bytes(sound[48..56].try_into().unwrap())] {
        let mut bytes = sound.clone();
        bytes[entry..entry + 8].copy_from_slice(&((1 << 62) | named).to_be_bytes());
        let mut driver = open(medium(bytes)).unwrap();
        let cluster = Extent { sector: 40, sectors: 8 };
        let _ = driver.run(Op::Write, cluster, vec![1; 4096]);
        let _ = driver.run(Op::Flush, cluster, Vec::new());
        driver.settle();
        assert!(driver.disk.corruption().is_some(), "nobody noticed");
        let at = named as usize;
        assert_eq!(driver.media[&0].now[at..at + 8], sound[at..at + 8], "a table is gone");
    }
}

/// Images of both versions: one that is opened for writing and not written is not even made longer.
#[test]
fn an_image_that_is_only_read_stays_as_it_is() {
    for version in [2, 3] {
        let sound = image(12, version);
        let mut driver = open(medium(sound.clone())).unwrap();
        let extent = Extent { sector: 40, sectors: 8 };
        driver.run(Op::Read, extent, vec![0; 4096]).0.unwrap();
        driver.run(Op::Flush, extent, Vec::new()).0.unwrap();
        driver.close().unwrap();
        assert!(driver.media[&0].now == sound, "version {version} was changed");
    }
}

#[test]
fn mutated_images_never_panic_nor_hang() {
    let (mut opened, mut failed) = (0, 0);
    for seed in seeds(3000) {
        let mut rng = Rng::new(seed);
        let mut bytes = image(*rng.pick(&[9, 9, 10, 12]), 2 + (seed % 2) as u32);
        for _ in 0..=rng.below(4) {
            // Metadata lie at the front; whole words make offsets that are almost right.
            let at = rng.below((bytes.len() as u64).min(6000) / 8) as usize * 8;
            let at = if rng.one_in(3) { rng.below(112) as usize / 8 * 8 } else { at };
            match rng.below(4) {
                0 => bytes[at] ^= 1 << rng.below(8),
                1 => bytes[at..at + 8].copy_from_slice(&rng.next().to_be_bytes()),
                2 => {
                    let value = (rng.below(40) * 512) | (rng.below(2) << 63);
                    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
                }
                _ => bytes[at + 7] ^= 1 << rng.below(8),
            }
        }
        if std::env::var("VBDD_SEED").is_ok() {
            println!("VBDD_SEED={seed}");
        }
        let result = support::sweep::failure_of(|| {
            let mut medium = medium(bytes);
            let _ = check(&mut medium.clone(), Fix::All);
            if let Ok(header) = Header::read(&mut medium)
                && header.size_bytes < 1 << 30
            {
                let _ = map(&mut medium, &header, &mut |_, _| {});
            }
            let Ok(mut driver) = open(medium) else { return };
            opened += 1;
            let sectors = driver.disk.geometry().sectors.min(220);
            for _ in 0..30 {
                let sector = driver.rng.below(sectors);
                let extent = Extent {
                    sector,
                    sectors: (1 + driver.rng.below(30)).min(sectors.saturating_sub(sector)),
                };
                let op =
                    *driver.rng.clone().pick(&[Op::Read, Op::Write, Op::Discard, Op::WriteZeroes, Op::Flush]);
                driver.rng.next();
                failed += u64::from(driver.run(op, extent, vec![0; 30 * 512]).0.is_err());
                // An image that grows without end is a hang of another kind.
                assert!(driver.media[&0].now.len() < 64 << 20);
            }
            let _ = driver.close();
        });
        assert!(result.is_none(), "VBDD_SEED={seed}: {}", result.unwrap());
    }
    println!("{opened} opened, {failed} requests failed");
}
