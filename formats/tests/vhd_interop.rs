//! VHDs that qemu made, read and written here, and ours read and written by qemu; chains read by libvhdi (PyPI, libvhdi-python).
//! qemu is no judge of differencing images: it opens them as dynamic ones and reads holes as zero.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod support;
mod vhd_support;

use std::collections::HashMap;
use std::process::Command;

use formats::vhd::check::{check, check_parent, info};
use formats::vhd::create::{Create, Parent, create};
use formats::vhd::{Kind, Vhd, read_headers};
use formats::{Disk, Extent, Facts, Format, Limits, Medium, Op, Pages, Raw};
use support::driver::Driver;
use support::file::{FileMedium, Scratch, has_qemu, run};
use support::rng::{Rng, seeds};
use support::shadow::{Habits, read_all, same, shadow_run};

const MIB: u64 = 1 << 20;

/// A chain of files, leaf first: `raw` by their name, else VHD.
fn open(dir: &Scratch, names: &[&str], writable: bool) -> Driver<FileMedium> {
    let (mut images, mut media): (Vec<(u32, Box<dyn Format>)>, _) = (Vec::new(), HashMap::new());
    for (number, name) in (0..).zip(names) {
        let writes = writable && number == 0;
        let mut medium = FileMedium::open(&dir.path(name), writes);
        let length_bytes = medium.length_bytes();
        if name.ends_with(".raw") {
            images.push((number, Box::new(Raw::open(length_bytes).unwrap())));
        } else if writes {
            let facts = Facts { length_bytes, grows: true, new_space_is_zero: true };
            images.push((number, Box::new(Vhd::open_to_write(&mut medium, facts).unwrap())));
        } else {
            images.push((number, Box::new(Vhd::open(&mut medium).unwrap())));
        }
        media.insert(number, medium);
    }
    let disk = Disk::new(1, images, !writable, Limits::default());
    Driver::new(disk, Pages::of_pages(96), media, 1)
}

/// Of any sectors.
const HABITS: Habits = Habits { unit: 1, most: 200, far: 9000 };
/// libvhdi takes the last byte of a bitmap that is not zero for full, so sectors come by eights where it reads.
const EIGHTS: Habits = Habits { unit: 8, ..HABITS };

fn is_clean(dir: &Scratch, name: &str) {
    let mut medium = FileMedium::open(&dir.path(name), false);
    let report = check(&mut medium, true, false).unwrap();
    assert_eq!((report.corruptions, report.flaws), (0, 0), "{name}: {report:?}");
}

/// What qemu reads.
fn by_qemu(dir: &Scratch, name: &str) -> Vec<u8> {
    run(dir, "qemu-img", &["convert", "-f", "vpc", "-O", "raw", name, "theirs.raw"]);
    std::fs::read(dir.path("theirs.raw")).unwrap()
}

fn qemu_writes(dir: &Scratch, name: &str, size: u64, rng: &mut Rng) {
    let mut arguments = vec!["-f".to_owned(), "vpc".to_owned()];
    for number in 0..10 {
        let at = rng.below(size / 512) * 512;
        let length = ((1 + rng.below(300)) * 512).min(size - at);
        arguments.extend(["-c".to_owned(), format!("write -P {} {at} {length}", 100 + number)]);
    }
    arguments.push(name.to_owned());
    run(dir, "qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn images_of_qemu_are_read_and_written() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(12) {
        println!("VBDD_SEED={seed}");
        let mut rng = Rng::new(seed);
        let dir = Scratch::new("vhd-qemu");
        let kind = *rng.pick(&["dynamic", "fixed"]);
        let force = if rng.one_in(2) { "on" } else { "off" };
        let size = (3 * MIB + rng.below(9000) * 512).to_string();
        let options = format!("subformat={kind},force_size={force}");
        run(&dir, "qemu-img", &["create", "-q", "-f", "vpc", "-o", &options, "a.vhd", &size]);
        let mut medium = FileMedium::open(&dir.path("a.vhd"), false);
        let size = info(&mut medium).unwrap().disk_bytes;
        qemu_writes(&dir, "a.vhd", size, &mut rng);
        let mut shadow = by_qemu(&dir, "a.vhd");
        let mut driver = open(&dir, &["a.vhd"], true);
        same(&read_all(&mut driver), &shadow, &options);
        shadow_run(&mut driver, &mut shadow, &mut rng, 40, HABITS);
        driver.close().unwrap();
        is_clean(&dir, "a.vhd");
        same(&by_qemu(&dir, "a.vhd"), &shadow, &options);
    }
}

#[test]
fn our_images_are_read_and_written_by_qemu() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(12) {
        println!("VBDD_SEED={seed}");
        let mut rng = Rng::new(seed + 500);
        let dir = Scratch::new("vhd-ours");
        let kind = *rng.pick(&[Kind::Dynamic, Kind::Dynamic, Kind::Fixed]);
        let mut medium = FileMedium::create(&dir.path("a.vhd"));
        let room_bytes = rng.below(1000) * MIB;
        let disk_bytes = (3 + rng.below(8)) * MIB;
        let what =
            Create { kind, disk_bytes, room_bytes, uuid: [1; 16], seconds: 1_700_000_000, parent: None };
        let size = create(&mut medium, &what).unwrap();
        let mut shadow = vec![0; size as usize];
        for _ in 0..3 {
            let mut driver = open(&dir, &["a.vhd"], true);
            same(&read_all(&mut driver), &shadow, "opened");
            shadow_run(&mut driver, &mut shadow, &mut rng, 30, HABITS);
            driver.close().unwrap();
            is_clean(&dir, "a.vhd");
            same(&by_qemu(&dir, "a.vhd"), &shadow, "closed");
            qemu_writes(&dir, "a.vhd", size, &mut rng);
            shadow = by_qemu(&dir, "a.vhd");
        }
    }
}

/// A Python that has libvhdi.
fn python() -> Option<String> {
    let named = std::env::var("VBDD_VHDI_PYTHON").ok();
    let mut candidates = named.into_iter().chain(["python3".to_owned(), "/tmp/vhdi/bin/python".to_owned()]);
    let found = candidates.find(|python| {
        Command::new(python)
            .args(["-c", "import pyvhdi"])
            .output()
            .is_ok_and(|result| result.status.success())
    });
    if found.is_none() {
        println!("libvhdi-python is missing (pip install libvhdi-python): skipped");
    }
    found
}

const READ_CHAIN: &str = "
import pyvhdi, sys
images = []
for name in sys.argv[2:]:
    image = pyvhdi.file()
    image.open(name)
    images.append(image)
for child, parent in zip(images, images[1:]):
    child.set_parent(parent)
with open(sys.argv[1], 'wb') as out:
    leaf = images[0]
    left = leaf.get_media_size()
    while left > 0:
        part = leaf.read_buffer(min(left, 1 << 20))
        out.write(part)
        left -= len(part)
";

#[test]
fn chains_are_read_by_libvhdi() {
    let Some(python) = python() else { return };
    for seed in seeds(8) {
        println!("VBDD_SEED={seed}");
        let mut rng = Rng::new(seed + 900);
        let dir = Scratch::new("vhd-chain");
        let depth = 1 + rng.below(5) as usize;
        let names: Vec<String> = (0..depth).map(|level| format!("{level}.vhd")).collect();
        let mut shadow = vec![0; 6 * MIB as usize];
        for level in 0..depth {
            let mut medium = FileMedium::create(&dir.path(&names[level]));
            let parent = (level > 0).then(|| {
                let below = read_headers(&mut FileMedium::open(&dir.path(&names[level - 1]), false)).unwrap();
                Parent::of(&below, names[level - 1].clone())
            });
            let kind = if level > 0 { Kind::Differencing } else { Kind::Dynamic };
            let uuid = [level as u8 + 1; 16];
            let what =
                Create { kind, disk_bytes: 6 * MIB, room_bytes: 0, uuid, seconds: 1_700_000_000, parent };
            create(&mut medium, &what).unwrap();
            let chain: Vec<&str> = names[..=level].iter().rev().map(String::as_str).collect();
            for pair in chain.windows(2) {
                let child = read_headers(&mut FileMedium::open(&dir.path(pair[0]), false)).unwrap();
                let below = read_headers(&mut FileMedium::open(&dir.path(pair[1]), false)).unwrap();
                check_parent(&child, Some(&below)).unwrap();
            }
            let mut driver = open(&dir, &chain, true);
            shadow_run(&mut driver, &mut shadow, &mut rng, 20, EIGHTS);
            driver.close().unwrap();
            is_clean(&dir, chain[0]);
            same(&read_all(&mut open(&dir, &chain, false)), &shadow, "our own reading");
            let mut reader = Command::new(&python);
            reader.args(["-c", READ_CHAIN, "theirs.raw"]).args(&chain).current_dir(&dir.0);
            let result = reader.output().unwrap();
            assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
            same(&std::fs::read(dir.path("theirs.raw")).unwrap(), &shadow, "libvhdi");
        }
    }
}

#[test]
fn a_chain_of_64_over_raw_reads_like_its_parts() {
    let dir = Scratch::new("vhd-deep");
    let mut rng = Rng::new(64);
    let mut shadow: Vec<u8> = (0..4 * MIB).map(|at| (at / 512 % 251) as u8).collect();
    std::fs::write(dir.path("base.raw"), &shadow).unwrap();
    let mut chain = vec!["base.raw".to_owned()];
    for level in 0..63 {
        let name = format!("{level}.vhd");
        let mut medium = FileMedium::create(&dir.path(&name));
        let parent = match level {
            0 => Parent { uuid: None, timestamp: 0, path: "base.raw".into() },
            _ => Parent { uuid: Some([level; 16]), timestamp: 0, path: chain[0].clone() },
        };
        let uuid = [level + 1; 16];
        let kind = Kind::Differencing;
        let what =
            Create { kind, disk_bytes: 4 * MIB, room_bytes: 0, uuid, seconds: 1, parent: Some(parent) };
        create(&mut medium, &what).unwrap();
        chain.insert(0, name);
        let names: Vec<&str> = chain.iter().map(String::as_str).collect();
        let mut driver = open(&dir, &names, true);
        shadow_run(&mut driver, &mut shadow, &mut rng, 4, HABITS);
        driver.close().unwrap();
    }
    let names: Vec<&str> = chain.iter().map(String::as_str).collect();
    let mut driver = open(&dir, &names, true);
    same(&read_all(&mut driver), &shadow, "64 images");
    shadow_run(&mut driver, &mut shadow, &mut rng, 60, HABITS);
    driver.close().unwrap();
    same(&read_all(&mut open(&dir, &names, false)), &shadow, "64 images, again");
}

#[test]
fn a_qcow2_image_over_a_vhd_reads_as_qemu_reads_it() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(6) {
        println!("VBDD_SEED={seed}");
        let mut rng = Rng::new(seed + 1300);
        let dir = Scratch::new("vhd-below");
        let (kind, disk_bytes) = (*rng.pick(&[Kind::Dynamic, Kind::Fixed]), (2 + rng.below(6)) * MIB);
        let mut medium = FileMedium::create(&dir.path("base.vhd"));
        let what = Create { kind, disk_bytes, room_bytes: 0, uuid: [1; 16], seconds: 1, parent: None };
        let below = create(&mut medium, &what).unwrap();
        let mut shadow = vec![0; below as usize];
        let mut base = open(&dir, &["base.vhd"], true);
        shadow_run(&mut base, &mut shadow, &mut rng, 20, HABITS);
        base.close().unwrap();
        // The leaf is longer than its parent: what lies behind the parent's end is zero.
        shadow.resize(below as usize + 3 * MIB as usize, 0);
        let size = shadow.len().to_string();
        run(
            &dir,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-b", "base.vhd", "-F", "vpc", "a.qcow2", &size],
        );
        let mut leaf = FileMedium::open(&dir.path("a.qcow2"), true);
        let options = formats::qcow2::Options { writable: true, ..formats::qcow2::Options::default() };
        let (image, _) = formats::Qcow2::open(&mut leaf, options).unwrap();
        let mut base = FileMedium::open(&dir.path("base.vhd"), false);
        let parent = Vhd::open(&mut base).unwrap();
        assert!(parent.may_be_below_qcow2());
        let images: Vec<(u32, Box<dyn Format>)> = vec![(0, Box::new(image)), (1, Box::new(parent))];
        let disk = Disk::new(1, images, false, Limits::default());
        let mut driver = Driver::new(disk, Pages::of_pages(96), HashMap::from([(0, leaf), (1, base)]), 1);
        same(&read_all(&mut driver), &shadow, "before");
        shadow_run(&mut driver, &mut shadow, &mut rng, 40, HABITS);
        driver.close().unwrap();
        run(&dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "theirs.raw"]);
        same(&std::fs::read(dir.path("theirs.raw")).unwrap(), &shadow, "after");
        run(&dir, "qemu-img", &["check", "-q", "a.qcow2"]);
    }
}

#[test]
fn a_child_that_is_longer_than_its_parent_reads_zero_behind_it() {
    let dir = Scratch::new("vhd-longer");
    let mut rng = Rng::new(77);
    let kind = Kind::Dynamic;
    let what = Create { kind, disk_bytes: 4 * MIB, room_bytes: 0, uuid: [1; 16], seconds: 1, parent: None };
    create(&mut FileMedium::create(&dir.path("p.vhd")), &what).unwrap();
    let mut shadow = vec![0; 4 * MIB as usize];
    let mut driver = open(&dir, &["p.vhd"], true);
    shadow_run(&mut driver, &mut shadow, &mut rng, 20, HABITS);
    driver.close().unwrap();
    let below = read_headers(&mut FileMedium::open(&dir.path("p.vhd"), false)).unwrap();
    let snapshot = Create::snapshot(&below, "p.vhd".into(), [2; 16], 1);
    let mut child = FileMedium::create(&dir.path("c.vhd"));
    create(&mut child, &snapshot).unwrap();
    let mut driver = open(&dir, &["c.vhd", "p.vhd"], true);
    shadow_run(&mut driver, &mut shadow, &mut rng, 20, HABITS);
    driver.close().unwrap();
    // Beyond the room of its BAT, with blocks in the way.
    let size = formats::vhd::change::grow(&mut child, true, 900 * MIB).unwrap();
    assert_eq!(size, 900 * MIB);
    is_clean(&dir, "c.vhd");
    let mut driver = open(&dir, &["c.vhd", "p.vhd"], true);
    shadow.resize(12 * MIB as usize, 0);
    let extent = Extent { sector: 0, sectors: 12 * 2048 };
    let (result, memory) = driver.run(Op::Read, extent, vec![7; shadow.len()]);
    result.unwrap();
    same(&memory, &shadow, "grown");
    shadow_run(&mut driver, &mut shadow, &mut rng, 20, HABITS);
    driver.close().unwrap();
    is_clean(&dir, "c.vhd");
}
