//! `vbdd image snapshot, rebase, scan, hide` beside qemu-img.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod image_support;

use std::collections::HashMap;

use image_support::{MIB, Rng, Scratch, field, same, vhd_chain};

/// Snapshots are made, applied and deleted by us and by qemu in turn; the disk and every snapshot hold what they should.
#[test]
fn internal_snapshots_are_qemus() {
    let dir = Scratch::new("snapshots");
    let size = 5 * MIB;
    let kinds = [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "refcount_bits=4",
    ];
    for (seed, options) in (0..).zip(kinds) {
        let mut rng = Rng(seed);
        dir.ok(&format!("qemu-img create -q -f qcow2 -o {options} a.qcow2 {size}"));
        let mut kept: HashMap<String, Vec<u8>> = HashMap::new();
        for round in 0..8 {
            dir.fill("qcow2", "a.qcow2", size, &mut rng);
            if rng.below(4) == 0 {
                // Compressed clusters are shared by parts.
                let mut command = dir.command("qemu-io");
                let at = rng.below(size / 65536) * 65536;
                dir.said(command.args(["-f", "qcow2", "-c", &format!("write -c -P 3 {at} 64k"), "a.qcow2"]));
            }
            let tool = *rng.pick(&["vbdd image", "vbdd image", "qemu-img"]);
            let mut names: Vec<&String> = kept.keys().collect();
            names.sort();
            let some = (!names.is_empty()).then(|| (*rng.pick(&names)).clone());
            let what = match (rng.below(5), some) {
                (0..=2, _) | (_, None) if kept.len() < 6 => {
                    let name = format!("s{round}");
                    kept.insert(name.clone(), dir.by_qemu("qcow2", "a.qcow2"));
                    format!("-c {name}")
                }
                (3, Some(name)) => {
                    kept.remove(&name);
                    format!("-d {name}")
                }
                (_, Some(name)) => format!("-a {name}"),
                _ => continue,
            };
            let format = if tool == "qemu-img" { "" } else { "-f qcow2 " };
            let before = dir.by_qemu("qcow2", "a.qcow2");
            dir.ok(&format!("{tool} snapshot {what} {format}a.qcow2"));
            let wanted = what.strip_prefix("-a ").map_or(&before, |name| &kept[name]);
            let what = format!("{options}: {tool} snapshot {what}");
            assert!(dir.ok("qemu-img check -f qcow2 a.qcow2").contains("No errors"), "{what}");
            assert_eq!(dir.run("vbdd image check qcow2:a.qcow2").code, 0, "{what}");
            same(&dir.by_qemu("qcow2", "a.qcow2"), wanted, &what);
            same(&dir.by_us("qcow2", "a.qcow2"), wanted, &what);
            let list = dir.image("snapshot -l --json qcow2:a.qcow2");
            assert_eq!(list.matches("\"name\"").count(), kept.len(), "{what}: {list}");
            for (name, wanted) in &kept {
                assert!(dir.ok("qemu-img snapshot -l a.qcow2").contains(&format!(" {name} ")), "{what}");
                dir.image(&format!("convert -l {name} qcow2:a.qcow2 raw:kept.raw"));
                same(&std::fs::read(dir.path("kept.raw")).unwrap(), wanted, &format!("{what}: {name} by us"));
                dir.ok(&format!("qemu-img convert -f qcow2 -l snapshot.name={name} -O raw a.qcow2 kept.raw"));
                same(
                    &std::fs::read(dir.path("kept.raw")).unwrap(),
                    wanted,
                    &format!("{what}: {name} by qemu"),
                );
            }
        }
        assert!(dir.image("info qcow2:a.qcow2").contains("Snapshot list") || kept.is_empty());
    }
}

#[test]
fn refcounts_without_room_refuse_a_snapshot_and_nothing_changes() {
    let dir = Scratch::new("narrow");
    dir.ok("qemu-img create -q -f qcow2 -o refcount_bits=1 a.qcow2 4M");
    dir.fill("qcow2", "a.qcow2", 4 * MIB, &mut Rng(3));
    let before = dir.by_qemu("qcow2", "a.qcow2");
    assert!(dir.refused("snapshot -c x qcow2:a.qcow2").1.contains("too narrow"));
    assert!(dir.ok("qemu-img check -f qcow2 a.qcow2").contains("No errors"));
    same(&dir.by_qemu("qcow2", "a.qcow2"), &before, "refused");
}

#[test]
fn a_snapshot_may_be_of_another_size() {
    let dir = Scratch::new("snapshot-size");
    dir.image("create qcow2:a.qcow2 4M");
    dir.fill("qcow2", "a.qcow2", 4 * MIB, &mut Rng(5));
    let small = dir.by_qemu("qcow2", "a.qcow2");
    dir.image("snapshot -c small qcow2:a.qcow2");
    dir.image("resize qcow2:a.qcow2 3G");
    dir.image("snapshot -c large qcow2:a.qcow2");
    dir.image("snapshot -a small qcow2:a.qcow2");
    same(&dir.by_qemu("qcow2", "a.qcow2"), &small, "applied");
    dir.image("snapshot -a large qcow2:a.qcow2");
    assert_eq!(field(&dir.image("info --json qcow2:a.qcow2"), "virtual-size"), Some("3221225472"));
    assert!(dir.ok("qemu-img check -f qcow2 a.qcow2").contains("No errors"));
    dir.image("snapshot -d 1 qcow2:a.qcow2");
    dir.image("snapshot -d large qcow2:a.qcow2");
    assert!(dir.ok("qemu-img check -f qcow2 a.qcow2").contains("No errors"));
}

#[test]
fn a_leaf_over_each_format_reads_like_its_parent() {
    let dir = Scratch::new("leaves");
    std::fs::create_dir(dir.path("sub")).unwrap();
    for (format, qemu, leaf) in [
        ("raw", "raw", "qcow2"),
        ("raw", "raw", "vhd"),
        ("qcow2", "qcow2", "qcow2"),
        ("vhd", "vpc", "vhd"),
        ("vhd", "vpc", "qcow2"),
    ] {
        let base = format!("base.{format}");
        dir.image(&format!("create {format}:{base} 6M"));
        dir.fill(qemu, &base, 6 * MIB, &mut Rng(2));
        let wanted = dir.by_qemu(qemu, &base);
        let _ = std::fs::remove_file(dir.path("sub/leaf"));
        let _ = std::fs::remove_file(dir.path("leaf2"));
        dir.image(&format!("snapshot -O {leaf} {format}:{base} sub/leaf"));
        same(&dir.by_us(leaf, "sub/leaf"), &wanted, leaf);
        dir.image(&format!("snapshot {leaf}:sub/leaf leaf2"));
        same(&dir.by_us(leaf, "leaf2"), &wanted, leaf);
        if leaf == "vhd" {
            // A dynamic VHD that qemu wrote, or that we wrote, has its bitmaps.
            same(&vhd_chain(&dir, &["leaf2", "sub/leaf", &base]), &wanted, "by the model");
        } else {
            same(&dir.by_qemu("qcow2", "leaf2"), &wanted, "by qemu");
            let said = dir.ok("qemu-img info -f qcow2 --output=json sub/leaf");
            assert_eq!(field(&said, "backing-filename"), Some(format!("\"../{base}\"").as_str()), "{said}");
        }
        // The whole directory may move.
        std::fs::rename(dir.path("sub/leaf"), dir.path("sub/x")).unwrap();
        std::fs::rename(dir.path("sub/x"), dir.path("sub/leaf")).unwrap();
        assert!(
            dir.refused(&format!("snapshot -O {leaf} {format}:{base} leaf2")).1.contains("is there already")
        );
    }
}

/// What is shown stays the same, whatever the old and the new parent hold.
#[test]
fn a_safe_rebase_changes_nothing_that_is_shown() {
    let dir = Scratch::new("rebase");
    for seed in 0..10 {
        let mut rng = Rng(seed + 100);
        let (leaf, leaf_qemu) = if seed % 3 == 2 { ("vhd", None) } else { ("qcow2", Some("qcow2")) };
        let sizes = [4 * MIB, 6 * MIB, 8 * MIB];
        let (old_size, new_size, size) = (*rng.pick(&sizes), *rng.pick(&sizes), *rng.pick(&sizes));
        for (name, size) in [("old", old_size), ("new", new_size)] {
            let format = if leaf == "vhd" { "vhd" } else { "qcow2" };
            dir.image(&format!("create {format}:{name} {size}"));
            dir.fill(if format == "vhd" { "vpc" } else { format }, name, size, &mut rng);
        }
        dir.image(&format!("create -b old -F {leaf} {leaf}:leaf {size}"));
        match leaf_qemu {
            Some(qemu) => dir.fill(qemu, "leaf", size, &mut rng),
            // qemu writes no differencing VHD: its own part comes from another image.
            None => {
                dir.image(&format!("create qcow2:own {size}"));
                dir.fill("qcow2", "own", size, &mut rng);
                dir.image("convert -B old -F vhd qcow2:own vhd:leaf");
            }
        }
        let wanted = dir.by_us(leaf, "leaf");
        dir.image(&format!("rebase -b new -F {leaf} {leaf}:leaf"));
        same(&dir.by_us(leaf, "leaf"), &wanted, "by us");
        let info = dir.image(&format!("info --json {leaf}:leaf"));
        assert_eq!(field(&info, "backing-filename"), Some("\"new\""), "{info}");
        assert_eq!(dir.run(&format!("vbdd image check {leaf}:leaf")).code, 0);
        if leaf_qemu.is_none() {
            same(&vhd_chain(&dir, &["leaf", "new"]), &wanted, "by the model");
        } else {
            same(&dir.by_qemu("qcow2", "leaf"), &wanted, "by qemu");
            dir.image("rebase -b= qcow2:leaf");
            same(&dir.by_qemu("qcow2", "leaf"), &wanted, "without a parent");
            assert!(dir.ok("qemu-img check -f qcow2 leaf").contains("No errors"));
            assert!(!dir.ok("qemu-img info -f qcow2 leaf").contains("backing"));
        }
    }
}

#[test]
fn an_unsafe_rebase_only_changes_the_name() {
    let dir = Scratch::new("rebase-u");
    for options in ["cluster_size=64k", "cluster_size=512", "compat=0.10", "cluster_size=1k"] {
        dir.image("create raw:one 1M");
        dir.image("create raw:two 1M");
        dir.ok(&format!("qemu-img create -q -f qcow2 -o {options} -b one -F raw leaf.qcow2"));
        if options == "cluster_size=64k" {
            dir.ok("qemu-img bitmap --add leaf.qcow2 b0");
        }
        for name in ["two", "./one", "a/rather/long/name/that/is/nowhere/to/be/found", "two"] {
            dir.image(&format!("rebase -u -b {name} -F raw qcow2:leaf.qcow2"));
            let said = dir.image("info --json qcow2:leaf.qcow2");
            assert_eq!(field(&said, "backing-filename"), Some(format!("\"{name}\"").as_str()), "{said}");
        }
        dir.ok("qemu-img rebase -u -f qcow2 -b one -F raw leaf.qcow2");
        dir.image("hide qcow2:leaf.qcow2");
        assert!(dir.image("info qcow2:leaf.qcow2").contains("hidden: true"));
        let theirs = dir.ok("qemu-img info -f qcow2 --output=json leaf.qcow2");
        assert_eq!(field(&theirs, "backing-filename"), Some("\"one\""), "{theirs}");
        assert_eq!(field(&theirs, "backing-filename-format"), Some("\"raw\""), "{theirs}");
        dir.image("hide --off qcow2:leaf.qcow2");
        assert!(dir.image("info qcow2:leaf.qcow2").contains("hidden: false"));
        dir.image("rebase -u -b= qcow2:leaf.qcow2");
        assert!(!dir.ok("qemu-img info -f qcow2 leaf.qcow2").contains("backing"));
        assert!(dir.ok("qemu-img check -f qcow2 leaf.qcow2").contains("No errors"));
    }
    dir.image("create vhd:base.vhd 2M");
    dir.image("snapshot vhd:base.vhd leaf.vhd");
    std::fs::rename(dir.path("base.vhd"), dir.path("moved.vhd")).unwrap();
    assert!(dir.refused("map vhd:leaf.vhd").1.contains("base.vhd: does not exist"));
    dir.image("rebase -u -b moved.vhd -F vhd vhd:leaf.vhd");
    dir.image("map vhd:leaf.vhd");
    assert!(dir.refused("rebase -b leaf.vhd -F vhd vhd:leaf.vhd").1.contains("its own parent"));
}

#[test]
fn a_directory_is_shown_as_a_tree() {
    let dir = Scratch::new("scan");
    dir.image("create vhd:base.vhd 2M");
    dir.image("snapshot vhd:base.vhd a-leaf.vhd");
    dir.image("snapshot vhd:a-leaf.vhd z.vhd");
    dir.image("snapshot vhd:base.vhd b.vhd");
    dir.image("create raw:c.raw 1M");
    dir.image("snapshot -O qcow2 raw:c.raw d.qcow2");
    dir.image("hide vhd:base.vhd");
    std::fs::write(dir.path("notes.txt"), "no image").unwrap();
    let text = dir.image("scan .");
    let lines: Vec<&str> = text.lines().map(|line| line.split("  vhd").next().unwrap()).collect();
    assert_eq!(lines[..4], ["base.vhd", "  a-leaf.vhd", "    z.vhd", "  b.vhd"], "{text}");
    assert!(text.contains("base.vhd  vhd 2 MiB, takes ") && text.contains("  hidden\n"), "{text}");
    assert!(text.contains("c.raw  raw 1 MiB") && text.contains("\n  d.qcow2  qcow2 1 MiB"), "{text}");
    assert!(!text.contains("notes"));
    let json = dir.image("scan --json .");
    assert_eq!(json.matches("\"filename\"").count(), 6);
    let leaf = json.lines().find(|line| line.contains("\"z.vhd\"")).unwrap();
    assert_eq!((field(leaf, "depth"), field(leaf, "parent")), (Some("2"), Some("\"a-leaf.vhd\"")));
    assert_eq!((field(leaf, "hidden"), field(leaf, "marker")), (Some("false"), Some("0")));
    std::fs::remove_file(dir.path("base.vhd")).unwrap();
    std::fs::write(dir.path("bad.vhd"), [1; 4096]).unwrap();
    let said = dir.run("vbdd image scan .");
    assert_eq!(said.code, 3);
    assert!(
        said.out.contains("parent not here: base.vhd") && said.out.contains("bad.vhd  error: "),
        "{said:?}"
    );
    // Built on itself, by way of another.
    dir.image("create qcow2:x.qcow2 1M");
    dir.image("create -b x.qcow2 -F qcow2 qcow2:y.qcow2 1M");
    dir.image("rebase -u -b y.qcow2 -F qcow2 qcow2:x.qcow2");
    assert!(dir.run("vbdd image scan .").out.contains("x.qcow2"));
    assert!(dir.refused("map qcow2:x.qcow2").1.contains("loop"));
}
