//! Creating, checking, repairing, resizing and mapping images, with qemu as the judge.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use formats::qcow2::check::{Fix, check};
use formats::qcow2::create::{Create, create};
use formats::qcow2::header::{DIRTY, Header};
use formats::qcow2::map::{map, usage};
use formats::qcow2::resize::{grow, trim};
use formats::qcow2::{Compression, Shape};
use formats::{Medium, Place};
use support::file::{FileMedium, Scratch, has_qemu, run, tool};
use support::medium::SimMedium;

fn shapes() -> Vec<Shape> {
    let mut out = Vec::new();
    for cluster_bits in [9, 10, 12, 14, 16, 21] {
        out.push(Shape { version: 2, cluster_bits, extended: false, refcount_order: 4 });
        for refcount_order in 0..=6 {
            for extended in [false, true] {
                if !extended || cluster_bits >= 14 {
                    out.push(Shape { version: 3, cluster_bits, extended, refcount_order });
                }
            }
        }
    }
    out
}

#[test]
fn qemu_accepts_what_is_created_and_what_has_grown() {
    if !has_qemu() {
        return;
    }
    let dir = Scratch::new("created");
    let mut count = 0;
    for shape in shapes() {
        for compression in [Compression::Zlib, Compression::Zstd] {
            if compression == Compression::Zstd && shape.version < 3 {
                continue;
            }
            let mut medium = FileMedium::create(&dir.path("leaf.qcow2"));
            let what = Create { shape, compression, ..Create::new(1_000_448) };
            create(&mut medium, &what).unwrap();
            let text = run(&dir, "qemu-img", &["check", "-f", "qcow2", "leaf.qcow2"]);
            assert!(text.contains("No errors"), "{shape:?}: {text}");
            run(&dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 3 4k 300k", "leaf.qcow2"]);
            for size in [1_000_448, 1_500_160, 40 << 20, 3 << 30] {
                if size / (shape.l2_covers_bytes()) * 8 > 32 << 20 {
                    continue;
                }
                if let Err(why) = grow(&mut medium, size) {
                    assert!(shape.cluster_bits <= 10, "{shape:?}: {why}");
                    continue;
                }
                let (code, text) = tool(&dir, "qemu-img", &["check", "-f", "qcow2", "leaf.qcow2"]);
                assert_eq!(code, 0, "{shape:?} grown to {size}: {text}");
                let report = check(&mut medium, Fix::Nothing).unwrap();
                assert!(report.is_clean() && report.leaks == 0, "{report:?}");
            }
            let text = run(&dir, "qemu-io", &["-f", "qcow2", "-c", "read -P 3 4k 300k", "leaf.qcow2"]);
            assert!(!text.contains("failed"), "{shape:?}: {text}");
            count += 1;
        }
    }
    println!("{count} kinds of images");
    let backing = Some(("other.raw".to_owned(), "raw".to_owned()));
    run(&dir, "qemu-img", &["create", "-q", "-f", "raw", "other.raw", "1M"]);
    create(&mut FileMedium::create(&dir.path("leaf.qcow2")), &Create { backing, ..Create::new(1 << 20) })
        .unwrap();
    let text = run(&dir, "qemu-img", &["info", "leaf.qcow2"]);
    assert!(text.contains("backing file: other.raw") && text.contains("backing file format: raw"), "{text}");
}

#[test]
fn checking_agrees_with_qemu_on_damaged_images() {
    if !has_qemu() {
        return;
    }
    let dir = Scratch::new("damaged");
    run(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "sound.qcow2", "8M"]);
    run(
        &dir,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 3 64k 300k", "-c", "write -P 4 4M 100k", "sound.qcow2"],
    );
    let sound = std::fs::read(dir.path("sound.qcow2")).unwrap();
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let l1 = word(40) as usize;
    let l2 = (word(l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let block = word(word(48) as usize) as usize;
    let used = (0..512).map(|n| l2 + n * 8).find(|at| word(*at) != 0).unwrap();
    let cluster = ((word(used) & 0x00ff_ffff_ffff_fe00) / 4096) as usize;
    let no_entry = |bytes: &mut Vec<u8>| bytes[used..used + 8].fill(0);
    let no_count = |bytes: &mut Vec<u8>| bytes[block + cluster * 2..][..2].fill(0);
    let more = |bytes: &mut Vec<u8>| bytes[block + cluster * 2 + 1] = 3;
    let unmarked = |bytes: &mut Vec<u8>| bytes[used] &= 0x7f;
    type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
    let damages: [(&str, Damage<'_>, bool, i32); 4] = [
        ("leak", &no_entry, true, 3),
        ("no count", &no_count, false, 2),
        // Counted too often, and yet marked as the only one.
        ("too high", &more, true, 2),
        ("mark", &unmarked, false, 2),
    ];
    for (name, damage, leak, code) in damages {
        let mut bytes = sound.clone();
        damage(&mut bytes);
        std::fs::write(dir.path("bad.qcow2"), &bytes).unwrap();
        let (theirs, text) = tool(&dir, "qemu-img", &["check", "-f", "qcow2", "bad.qcow2"]);
        let mut medium = FileMedium::open(&dir.path("bad.qcow2"), true);
        let report = check(&mut medium, Fix::Nothing).unwrap();
        assert_eq!(theirs, code, "{name}: {text}");
        assert_eq!(report.leaks > 0, leak, "{name}: {report:?}");
        assert_eq!(report.corruptions > 0, theirs == 2, "{name}: {report:?}");
        let report = check(&mut medium, Fix::All).unwrap();
        assert!(report.is_clean(), "{name}: {report:?}");
        let (code, text) = tool(&dir, "qemu-img", &["check", "-f", "qcow2", "bad.qcow2"]);
        assert_eq!(code, 0, "{name} after the repair: {text}");
    }
}

#[test]
fn a_dirty_image_is_refused_and_opens_after_the_repair() {
    let mut medium = SimMedium::file();
    create(&mut medium, &Create::new(1 << 20)).unwrap();
    let options = formats::qcow2::Options { writable: true, ..Default::default() };
    let mut byte = [0; 512];
    medium.read(0, &mut byte).unwrap();
    byte[79] |= DIRTY as u8;
    medium.write(0, &byte).unwrap();
    assert!(formats::Qcow2::open(&mut medium, options).is_err());
    assert!(
        formats::Qcow2::open(&mut medium, formats::qcow2::Options::default()).is_ok(),
        "reading is harmless"
    );
    check(&mut medium, Fix::Leaks).unwrap();
    assert!(formats::Qcow2::open(&mut medium, options).is_ok());
}

#[test]
fn an_image_with_lazy_refcounts_whose_writer_died_is_repaired() {
    if !has_qemu() {
        return;
    }
    let dir = Scratch::new("lazy");
    for cluster in ["512", "4k", "64k"] {
        let options = format!("lazy_refcounts=on,cluster_size={cluster}");
        run(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, "leaf.qcow2", "20M"]);
        let writes = ["-c", "write -P 7 1M 2M", "-c", "write -P 8 9M 1M", "-c", "flush", "-c", "abort"];
        let _ = tool(&dir, "qemu-io", &[&["-f", "qcow2"], &writes[..], &["leaf.qcow2"]].concat());
        let mut medium = FileMedium::open(&dir.path("leaf.qcow2"), true);
        assert!(Header::read(&mut medium).unwrap().incompatible & DIRTY != 0);
        let report = check(&mut medium, Fix::All).unwrap();
        assert!(report.corruptions > 0 && report.is_clean(), "{cluster}: {report:?}");
        let (code, text) = tool(&dir, "qemu-img", &["check", "-f", "qcow2", "leaf.qcow2"]);
        assert_eq!(code, 0, "{cluster}: {text}");
        let text = run(
            &dir,
            "qemu-io",
            &["-f", "qcow2", "-c", "read -P 7 1M 2M", "-c", "read -P 8 9M 1M", "leaf.qcow2"],
        );
        assert!(!text.contains("failed"), "{cluster}: {text}");
    }
}

#[test]
fn the_map_says_what_qemu_says() {
    if !has_qemu() {
        return;
    }
    let dir = Scratch::new("mapped");
    for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=64k,extended_l2=on"] {
        run(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "leaf.qcow2", "300M"]);
        let commands = ["write -P 1 1M 3M", "write -z 10M 1M", "write -P 2 299M 1M", "write -P 5 120k 4k"];
        let mut arguments = vec!["-f", "qcow2"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        arguments.push("leaf.qcow2");
        run(&dir, "qemu-io", &arguments);
        let theirs = run(&dir, "qemu-img", &["map", "--output=json", "-f", "qcow2", "leaf.qcow2"]);
        // `"start": N, "length": N, … "data": true, "offset": N`
        let number = |line: &str, name: &str| -> Option<u64> {
            let rest = line.split(&format!("\"{name}\": ")).nth(1)?;
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        let theirs: Vec<_> = theirs
            .lines()
            .filter(|line| line.contains("\"data\": true"))
            .map(|line| {
                (
                    number(line, "start").unwrap(),
                    number(line, "length").unwrap(),
                    number(line, "offset").unwrap(),
                )
            })
            .collect();
        let mut medium = FileMedium::open(&dir.path("leaf.qcow2"), false);
        let header = Header::read(&mut medium).unwrap();
        let (mut ours, mut end) = (Vec::new(), 0);
        map(&mut medium, &header, &mut |sector, run| {
            assert_eq!(sector, end, "runs adjoin");
            end = sector + run.sectors;
            if let Place::Data { offset_bytes } = run.place {
                ours.push((sector * 512, run.sectors * 512, offset_bytes));
            }
        })
        .unwrap();
        assert_eq!((&ours, end * 512), (&theirs, 300 << 20), "{options}");
        let usage = usage(&mut medium, &header).unwrap();
        assert_eq!(usage.data_bytes, theirs.iter().map(|run| run.1).sum::<u64>());
    }
}

/// XCP-ng's storage manager edits the header of an image that is in use: what it writes stays, fields of ours change singly.
#[test]
fn what_others_write_into_the_header_meanwhile_stays() {
    use formats::{Disk, Extent, Limits, Op, Pages};
    use support::driver::Driver;
    let mut medium = SimMedium::file();
    create(&mut medium, &Create::new(1 << 20)).unwrap();
    let edit = |medium: &mut SimMedium, at: usize, bytes: &[u8]| {
        let mut sector = [0; 512];
        medium.read(0, &mut sector).unwrap();
        sector[at..at + bytes.len()].copy_from_slice(bytes);
        medium.write(0, &sector).unwrap();
    };
    // An autoclear bit that nobody knows, and an extension before the feature names.
    edit(&mut medium, 88, &[0x40, 0, 0, 0, 0, 0, 0, 0]);
    let options = formats::qcow2::Options { writable: true, ..Default::default() };
    let (image, _) = formats::Qcow2::open(&mut medium, options).unwrap();
    let disk = Disk::new(1, vec![(0, Box::new(image))], false, Limits::default());
    let mut driver = Driver::new(disk, Pages::of_pages(32), [(0, medium)].into(), 1);
    driver.run(Op::Write, Extent { sector: 3, sectors: 9 }, vec![4; 9 * 512]).0.unwrap();
    edit(driver.media.get_mut(&0).unwrap(), 112, b"vate\0\0\0\x08\x01\0\0\0\0\0\0\0");
    let header = Header::read(driver.media.get_mut(&0).unwrap()).unwrap();
    assert_eq!((header.incompatible & DIRTY, header.autoclear), (DIRTY, 0), "marked as open");
    driver.close().unwrap();
    let header = Header::read(driver.media.get_mut(&0).unwrap()).unwrap();
    assert_eq!((header.incompatible, header.extensions[0].kind), (0, 0x7661_7465), "{header:?}");
}

#[test]
fn trimming_cuts_what_nobody_uses() {
    let mut medium = SimMedium::file();
    create(&mut medium, &Create::new(1 << 20)).unwrap();
    let length = medium.length_bytes();
    medium.set_length(length + (10 << 20)).unwrap();
    assert_eq!(trim(&mut medium).unwrap(), length);
    assert_eq!(medium.length_bytes(), length);
}

/// A bitmap that is shorter than its disk makes qemu refuse an image; one that is marked as being in use does not.
#[test]
fn an_image_with_bitmaps_grows_and_qemu_takes_it() {
    if !has_qemu() {
        return;
    }
    let dir = Scratch::new("grown-bitmaps");
    run(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "leaf.qcow2", "4M"]);
    run(&dir, "qemu-img", &["bitmap", "--add", "-g", "512", "leaf.qcow2", "changes"]);
    grow(&mut FileMedium::open(&dir.path("leaf.qcow2"), true), 8 << 30).unwrap();
    run(&dir, "qemu-io", &["-f", "qcow2", "-c", "write -P 3 7G 64k", "leaf.qcow2"]);
    run(&dir, "qemu-img", &["check", "-f", "qcow2", "leaf.qcow2"]);
    let info = run(&dir, "qemu-img", &["info", "leaf.qcow2"]);
    assert!(info.contains("in-use"), "{info}");
}
