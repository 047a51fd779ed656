//! Images that qemu made, read and written here; and what qemu says of them afterwards.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::collections::HashMap;

use formats::qcow2::{Options, Qcow2};
use formats::{Disk, Format, Limits, Medium, Pages, Raw};
use support::driver::Driver;
use support::file::{FileMedium, Scratch, has_qemu, run, tool};
use support::rng::{Rng, seeds};
use support::shadow::{Habits, read_all, same, shadow_run};

/// A chain of files, leaf first: `raw` by their name, else QCOW2.
fn open(dir: &Scratch, names: &[&str], writable: bool) -> Driver<FileMedium> {
    let (mut images, mut media): (Vec<(u32, Box<dyn Format>)>, _) = (Vec::new(), HashMap::new());
    for (number, name) in (0..).zip(names) {
        let writes = writable && number == 0;
        let mut medium = FileMedium::open(&dir.path(name), writes);
        if name.ends_with(".raw") {
            images.push((number, Box::new(Raw::open(medium.length_bytes()).unwrap())));
        } else {
            let options = Options { writable: writes, ..Options::default() };
            let (image, header) = Qcow2::open(&mut medium, options).unwrap();
            assert_eq!(
                header.backing.map(|backing| backing.name).as_deref(),
                names.get(number as usize + 1).copied()
            );
            images.push((number, Box::new(image)));
        }
        media.insert(number, medium);
    }
    let disk = Disk::new(1, images, !writable, Limits::default());
    Driver::new(disk, Pages::of_pages(64), media, 1)
}

const HABITS: Habits = Habits { unit: 1, most: 200, far: 200 };

/// Fills an image by qemu-io with random writes, zeroes and discards.
fn fill(dir: &Scratch, name: &str, size: u64, rng: &mut Rng, compressed: bool) {
    let mut arguments = vec!["-f".to_owned(), "qcow2".to_owned()];
    for number in 0..12 {
        let at = rng.below(size / 512) * 512;
        let length = (1 + rng.below(150)) * 512;
        let length = length.min(size - at);
        let command = match rng.below(6) {
            0 => format!("write -z {at} {length}"),
            1 => format!("write -z -u {at} {length}"),
            2 => format!("discard {at} {length}"),
            _ => format!("write -P {} {at} {length}", 1 + number),
        };
        arguments.extend(["-c".to_owned(), command]);
    }
    arguments.push(name.to_owned());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    // v2 with a parent refuses discards; what else fails is noticed when the contents are compared.
    let _ = tool(dir, "qemu-io", &arguments);
    if compressed {
        run(dir, "qemu-img", &["convert", "-c", "-O", "qcow2", name, "packed.qcow2"]);
    }
}

/// Where there is nothing, by qemu and by us. Holes of raw parents qemu sees, and we do not.
fn same_map(dir: &Scratch, names: &[&str], driver: &mut Driver<FileMedium>, what: &str) {
    let text = run(dir, "qemu-img", &["map", "--output=json", "-f", "qcow2", names[0]]);
    let ours = driver.status();
    let field = |line: &str, name: &str| {
        let rest = line.split_once(&format!("\"{name}\": ")).unwrap().1;
        rest.split([',', '}']).next().unwrap().to_owned()
    };
    let raw = names.iter().any(|name| name.ends_with(".raw"));
    let mut nothing = 0;
    for line in text.lines().filter(|line| line.contains("start")) {
        let (start, length) = (field(line, "start"), field(line, "length"));
        let (start, length): (usize, usize) = (start.parse().unwrap(), length.parse().unwrap());
        let zero = field(line, "data") == "false";
        for (sector, &here) in ours.iter().enumerate().take((start + length) / 512).skip(start / 512) {
            nothing += usize::from(zero);
            assert!(here == zero || raw && zero, "{what}: sector {sector}: {here} here, {line}");
        }
    }
    assert!(nothing > 0 || !what.starts_with("cluster 4k compat 1.1 extended off base"), "{what}: no hole");
}

/// Reads a leaf through qemu and through us; writes it through us; asks qemu again.
fn round(dir: &Scratch, names: &[&str], what: &str, rng: &mut Rng) -> u64 {
    let leaf = names[0];
    run(dir, "qemu-img", &["convert", "-O", "raw", leaf, "before.raw"]);
    let mut shadow = std::fs::read(dir.path("before.raw")).unwrap();
    let length = shadow.len() / 512 * 512;
    shadow.truncate(length);
    let mut driver = open(dir, names, true);
    same(&read_all(&mut driver), &shadow, what);
    same_map(dir, names, &mut driver, what);
    shadow_run(&mut driver, &mut shadow, rng, 60, HABITS);
    same(&read_all(&mut driver), &shadow, what);
    driver.close().unwrap();
    drop(driver);
    let (code, text) = tool(dir, "qemu-img", &["check", "-f", "qcow2", leaf]);
    assert_eq!(code, 0, "{what}: {text}");
    std::fs::write(dir.path("shadow.raw"), &shadow).unwrap();
    run(dir, "qemu-img", &["convert", "-O", "raw", leaf, "after.raw"]);
    let after = std::fs::read(dir.path("after.raw")).unwrap();
    same(&shadow, &after, what);
    // And back: qemu writes, we read.
    let _ = tool(
        dir,
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 0x5a 1536 70k", "-c", "write -z 200k 33k", leaf],
    );
    run(dir, "qemu-img", &["convert", "-O", "raw", leaf, "again.raw"]);
    let again = std::fs::read(dir.path("again.raw")).unwrap();
    same(&read_all(&mut open(dir, names, false)), &again, what);
    60
}

#[test]
fn images_of_qemu_are_read_and_written() {
    if !has_qemu() {
        return;
    }
    let (mut combinations, mut operations) = (0, 0);
    for seed in seeds(1) {
        for cluster in ["512", "4k", "64k", "2M"] {
            for (compat, bits) in
                [("0.10", "16"), ("1.1", "1"), ("1.1", "2"), ("1.1", "8"), ("1.1", "16"), ("1.1", "64")]
            {
                for extended in ["off", "on"] {
                    if extended == "on" && (compat != "1.1" || cluster == "512" || cluster == "4k") {
                        continue;
                    }
                    for preallocation in ["off", "metadata", "falloc", "full"] {
                        let mut rng = Rng::new(seed + combinations);
                        let size = (2 << 20) + rng.below(2000) * 512;
                        let what = format!(
                            "cluster {cluster} compat {compat} bits {bits} extended {extended} preallocation {preallocation} size {size} seed {seed}"
                        );
                        let dir = Scratch::new("matrix");
                        let mut options =
                            format!("cluster_size={cluster},compat={compat},preallocation={preallocation}");
                        if compat == "1.1" {
                            options += &format!(",refcount_bits={bits},extended_l2={extended}");
                        }
                        run(
                            &dir,
                            "qemu-img",
                            &["create", "-q", "-f", "qcow2", "-o", &options, "leaf.qcow2", &size.to_string()],
                        );
                        fill(&dir, "leaf.qcow2", size, &mut rng, false);
                        operations += round(&dir, &["leaf.qcow2"], &what, &mut rng);
                        combinations += 1;
                    }
                }
            }
        }
    }
    println!("{combinations} combinations, {operations} operations");
}

#[test]
fn chains_of_qemu_are_read_and_written() {
    if !has_qemu() {
        return;
    }
    let (mut combinations, mut operations) = (0, 0);
    for cluster in ["512", "4k", "64k", "2M"] {
        for (compat, extended) in [("0.10", "off"), ("1.1", "off"), ("1.1", "on")] {
            if extended == "on" && (cluster == "512" || cluster == "4k") {
                continue;
            }
            for base in ["raw", "qcow2", "zlib", "zstd", "two"] {
                for longer in [false, true] {
                    let mut rng = Rng::new(combinations);
                    let size = (2 << 20) + rng.below(2000) * 512;
                    let below = if longer { size * 2 } else { size / 2 + 512 * 3 } / 512 * 512;
                    let what = format!(
                        "cluster {cluster} compat {compat} extended {extended} base {base} {below} below {size}"
                    );
                    let dir = Scratch::new("chains");
                    run(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", &below.to_string()]);
                    fill(&dir, "base.qcow2", below, &mut rng, false);
                    let name = match base {
                        "raw" => {
                            run(&dir, "qemu-img", &["convert", "-O", "raw", "base.qcow2", "base.raw"]);
                            "base.raw"
                        }
                        "zlib" | "zstd" => {
                            let kind = format!("compression_type={base}");
                            run(
                                &dir,
                                "qemu-img",
                                &["convert", "-c", "-O", "qcow2", "-o", &kind, "base.qcow2", "packed.qcow2"],
                            );
                            "packed.qcow2"
                        }
                        "two" => {
                            run(
                                &dir,
                                "qemu-img",
                                &[
                                    "create",
                                    "-q",
                                    "-f",
                                    "qcow2",
                                    "-F",
                                    "qcow2",
                                    "-b",
                                    "base.qcow2",
                                    "-o",
                                    "cluster_size=4k",
                                    "middle.qcow2",
                                ],
                            );
                            fill(&dir, "middle.qcow2", below, &mut rng, false);
                            "middle.qcow2"
                        }
                        _ => "base.qcow2",
                    };
                    let format = if name.ends_with("raw") { "raw" } else { "qcow2" };
                    let options = format!("cluster_size={cluster},compat={compat}")
                        + if compat == "1.1" { ",extended_l2=" } else { "" }
                        + if compat == "1.1" { extended } else { "" };
                    run(
                        &dir,
                        "qemu-img",
                        &[
                            "create",
                            "-q",
                            "-f",
                            "qcow2",
                            "-F",
                            format,
                            "-b",
                            name,
                            "-o",
                            &options,
                            "leaf.qcow2",
                            &size.to_string(),
                        ],
                    );
                    fill(&dir, "leaf.qcow2", size, &mut rng, false);
                    let names: &[&str] = if base == "two" {
                        &["leaf.qcow2", name, "base.qcow2"]
                    } else {
                        &["leaf.qcow2", name]
                    };
                    operations += round(&dir, names, &what, &mut rng);
                    combinations += 1;
                }
            }
        }
    }
    println!("{combinations} chains, {operations} operations");
}

/// Creates an image by qemu-img, over a parent if there is one.
fn made(dir: &Scratch, name: &str, options: &str, parent: Option<(&str, &str)>, size: u64) {
    let size = size.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some((parent, format)) = parent {
        arguments.extend(["-b", parent, "-F", format]);
    }
    arguments.extend([name, &size]);
    run(dir, "qemu-img", &arguments);
}

/// What is left of the options: every cluster size, the widths of refcounts that the matrix leaves out, refcounts written late.
#[test]
fn every_cluster_size_of_qemu_is_read_and_written() {
    if !has_qemu() {
        return;
    }
    let (mut combinations, mut operations) = (0, 0);
    for bits in 9..=21 {
        for (refcount, lazy) in [(4, "off"), (16, "on"), (32, "on")] {
            for kind in ["zlib", "zstd"] {
                let mut rng = Rng::new(3000 + combinations);
                let size = (2 << 20) + rng.below(2000) * 512;
                let options = format!(
                    "cluster_size={},compat=1.1,refcount_bits={refcount},lazy_refcounts={lazy},compression_type={kind}",
                    1 << bits
                );
                let dir = Scratch::new("clusters");
                made(&dir, "leaf.qcow2", &options, None, size);
                fill(&dir, "leaf.qcow2", size, &mut rng, false);
                operations += round(&dir, &["leaf.qcow2"], &options, &mut rng);
                combinations += 1;
            }
        }
    }
    println!("{combinations} combinations, {operations} operations");
}

/// Images as distributions made and make them, each with a guest's overlay of one kind or another.
#[test]
fn images_of_distributions_are_read_below_overlays() {
    if !has_qemu() {
        return;
    }
    let templates = [
        ("before qemu 1.7", "compat=0.10", true),
        ("before qemu 1.7, not packed", "compat=0.10", false),
        ("since qemu 1.7", "compat=1.1,lazy_refcounts=off", true),
        ("for old readers", "compat=0.10,cluster_size=64k", true),
        ("with refcounts written late", "compat=1.1,lazy_refcounts=on", false),
        ("packed by zstd", "compat=1.1,compression_type=zstd", true),
        ("in large clusters", "compat=1.1,cluster_size=2M", true),
    ];
    let overlays = [
        ("plain", "compat=1.1"),
        ("old", "compat=0.10"),
        ("small clusters", "compat=1.1,cluster_size=4k"),
        ("large clusters", "compat=1.1,cluster_size=1M"),
        ("subclusters", "compat=1.1,extended_l2=on,cluster_size=128k"),
        ("tables made ahead", "compat=1.1,extended_l2=on,preallocation=metadata"),
        ("space made ahead", "compat=1.1,extended_l2=on,preallocation=falloc"),
    ];
    let (mut combinations, mut operations) = (0, 0);
    for (template, options, packed) in templates {
        for (overlay, further) in overlays {
            let mut rng = Rng::new(5000 + combinations);
            let below = (3 << 20) + rng.below(3000) * 512;
            // As long, longer, or shorter than the template.
            let size = [below, below * 2, below / 2 / 512 * 512][combinations as usize % 3];
            let dir = Scratch::new("distributions");
            made(&dir, "plain.qcow2", options, None, below);
            fill(&dir, "plain.qcow2", below, &mut rng, false);
            let mut base = "plain.qcow2";
            if packed {
                base = "base.qcow2";
                run(&dir, "qemu-img", &["convert", "-c", "-O", "qcow2", "-o", options, "plain.qcow2", base]);
            }
            made(&dir, "leaf.qcow2", further, Some((base, "qcow2")), size);
            fill(&dir, "leaf.qcow2", size, &mut rng, false);
            let what = format!("{overlay} over {template}");
            operations += round(&dir, &["leaf.qcow2", base], &what, &mut rng);
            combinations += 1;
        }
    }
    println!("{combinations} combinations, {operations} operations");
}

#[test]
fn compressed_leaves_are_written() {
    if !has_qemu() {
        return;
    }
    for kind in ["zlib", "zstd"] {
        for cluster in ["4k", "64k", "2M"] {
            let mut rng = Rng::new(7);
            let dir = Scratch::new("packed");
            let size = 5 << 20;
            run(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "plain.qcow2", &size.to_string()]);
            fill(&dir, "plain.qcow2", size, &mut rng, false);
            let options = format!("compression_type={kind},cluster_size={cluster}");
            run(
                &dir,
                "qemu-img",
                &["convert", "-c", "-O", "qcow2", "-o", &options, "plain.qcow2", "leaf.qcow2"],
            );
            round(&dir, &["leaf.qcow2"], &format!("{kind} {cluster}"), &mut rng);
        }
    }
}

#[test]
fn snapshots_keep_what_they_hold() {
    if !has_qemu() {
        return;
    }
    for cluster in ["512", "4k", "64k"] {
        for extended in ["off", "on"] {
            if extended == "on" && cluster != "64k" {
                continue;
            }
            let mut rng = Rng::new(11);
            let dir = Scratch::new("snapshots");
            let size = 3 << 20;
            let options = format!("cluster_size={cluster},extended_l2={extended}");
            run(
                &dir,
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-o", &options, "leaf.qcow2", &size.to_string()],
            );
            fill(&dir, "leaf.qcow2", size, &mut rng, false);
            run(&dir, "qemu-img", &["snapshot", "-c", "one", "leaf.qcow2"]);
            run(&dir, "qemu-img", &["convert", "-l", "one", "-O", "raw", "leaf.qcow2", "one.raw"]);
            round(&dir, &["leaf.qcow2"], &format!("snapshot {cluster} {extended}"), &mut rng);
            run(&dir, "qemu-img", &["convert", "-l", "one", "-O", "raw", "leaf.qcow2", "still.raw"]);
            let (one, still) =
                (std::fs::read(dir.path("one.raw")).unwrap(), std::fs::read(dir.path("still.raw")).unwrap());
            same(&one, &still, "snapshot");
        }
    }
}

#[test]
fn bitmaps_are_kept_and_marked() {
    if !has_qemu() {
        return;
    }
    let mut rng = Rng::new(13);
    let dir = Scratch::new("bitmaps");
    run(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", "leaf.qcow2", "4M"]);
    run(&dir, "qemu-img", &["bitmap", "--add", "leaf.qcow2", "changes"]);
    fill(&dir, "leaf.qcow2", 4 << 20, &mut rng, false);
    round(&dir, &["leaf.qcow2"], "bitmaps", &mut rng);
    let info = run(&dir, "qemu-img", &["info", "leaf.qcow2"]);
    assert!(info.contains("in-use"), "{info}");
}
