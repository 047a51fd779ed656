//! `vbdd image create, info, map, check, resize` beside qemu-img.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod image_support;

use image_support::{MIB, Rng, Scratch, field, same, stretches};

const QCOW2: [&str; 9] = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=2M",
    "compat=0.10",
    "compat=0.10,cluster_size=4k",
    "refcount_bits=1",
    "refcount_bits=64,cluster_size=1k",
    "extended_l2=on,cluster_size=128k",
    "compression_type=zstd",
];

#[test]
fn qemu_takes_what_is_created() {
    let dir = Scratch::new("create");
    for options in QCOW2 {
        dir.image(&format!("create -f qcow2 -o {options} a.qcow2 40M"));
        assert!(dir.ok("qemu-img check -f qcow2 a.qcow2").contains("No errors"), "{options}");
        let theirs = dir.ok("qemu-img info -f qcow2 --output=json a.qcow2");
        let ours = dir.image("info --json qcow2:a.qcow2");
        for key in [
            "virtual-size",
            "cluster-size",
            "compat",
            "refcount-bits",
            "extended-l2",
            "compression-type",
            "corrupt",
        ] {
            // Version 2 has none of some.
            if let Some(value) = field(&theirs, key) {
                assert_eq!(field(&ours, key), Some(value), "{options}: {key}: {theirs} {ours}");
            }
        }
        assert_eq!(field(&ours, "virtual-size"), Some("41943040"));
    }
    dir.image("create raw:a.raw 10M");
    assert_eq!(std::fs::metadata(dir.path("a.raw")).unwrap().len(), 10 * MIB);
    dir.image("create -f raw -o preallocation=full a.raw 1M");
    assert_eq!(std::fs::read(dir.path("a.raw")).unwrap(), vec![0; MIB as usize]);
    for (options, size) in [("subformat=dynamic", "12582912"), ("subformat=fixed", "11534848")] {
        dir.image(&format!("create -f vhd -o {options} a.vhd 11534848"));
        let theirs = dir.ok("qemu-img info -f vpc --output=json a.vhd");
        assert_eq!(field(&theirs, "virtual-size"), Some(size), "{theirs}");
        assert_eq!(field(&dir.image("info --json vhd:a.vhd"), "virtual-size"), Some(size));
        assert_eq!(dir.run("vbdd image check vhd:a.vhd").code, 0);
    }
    dir.image("create -f qcow2 -b a.vhd -F vhd over.qcow2");
    let theirs = dir.ok("qemu-img info -f qcow2 --output=json over.qcow2");
    assert_eq!(field(&theirs, "backing-filename-format"), Some("\"vpc\""), "{theirs}");
    assert_eq!(field(&theirs, "virtual-size"), Some("11534848"), "{theirs}");
    assert_eq!(dir.names(), ["a.qcow2", "a.raw", "a.vhd", "over.qcow2"], "something temporary is left");
}

#[test]
fn info_says_what_qemu_says() {
    let dir = Scratch::new("info");
    dir.ok("qemu-img create -q -f raw base.raw 5M");
    dir.ok("qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2 6M");
    dir.ok("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 7M");
    dir.ok("qemu-img snapshot -c one top.qcow2");
    dir.ok("qemu-img snapshot -c two top.qcow2");
    dir.ok("qemu-img bitmap --add -g 128k top.qcow2 dirty");
    let (ours, theirs) = (
        dir.image("info --json -f qcow2 top.qcow2"),
        dir.ok("qemu-img info -f qcow2 --output=json top.qcow2"),
    );
    for key in [
        "virtual-size",
        "cluster-size",
        "actual-size",
        "backing-filename",
        "backing-filename-format",
        "dirty-flag",
        "id",
        "vm-state-size",
        "date-sec",
        "date-nsec",
        "vm-clock-sec",
        "granularity",
    ] {
        assert!(field(&theirs, key).is_some(), "{key}: {theirs}");
        assert_eq!(field(&ours, key), field(&theirs, key), "{key}: {ours}");
    }
    assert!(ours.contains("\"name\": \"two\"") && ours.contains("\"name\": \"dirty\""), "{ours}");
    assert_eq!(field(&ours, "depth"), Some("3"));
    let chain = dir.image("info --json --backing-chain qcow2:top.qcow2");
    assert!(
        chain.matches("\"filename\"").count() == 3 && chain.contains("base.raw\", \"format\": \"raw\""),
        "{chain}"
    );
    let text = dir.image("info qcow2:top.qcow2");
    assert!(text.contains("backing file: mid.qcow2 (actual path: ") && text.contains("two "), "{text}");
    std::fs::remove_file(dir.path("base.raw")).unwrap();
    let alone = dir.image("info --json qcow2:top.qcow2");
    assert!(alone.contains("chain-error") && alone.contains("base.raw"), "{alone}");
    assert_eq!(dir.refused("info --backing-chain qcow2:top.qcow2").0, 1);
}

#[test]
fn maps_are_those_of_qemu() {
    let dir = Scratch::new("map");
    let mut stored = 0;
    for (number, options) in (0..).zip(QCOW2) {
        let mut rng = Rng(number);
        let size = 5 * MIB + rng.below(900) * 512;
        dir.ok(&format!("qemu-img create -q -f raw base.raw {}", size - MIB));
        dir.fill("raw", "base.raw", size - MIB, &mut rng);
        dir.ok(&format!("qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2 {size}"));
        dir.fill("qcow2", "mid.qcow2", size, &mut rng);
        dir.ok(&format!("qemu-img create -q -f qcow2 -o {options} -b mid.qcow2 -F qcow2 top.qcow2 {size}"));
        dir.fill("qcow2", "top.qcow2", size, &mut rng);
        dir.ok("qemu-img convert -c -f qcow2 -O qcow2 mid.qcow2 packed.qcow2");
        dir.ok(&format!("qemu-img create -q -f vpc -o force_size=on some.vhd {size}"));
        let size = size.next_multiple_of(512);
        dir.fill("vpc", "some.vhd", size, &mut rng);
        for (format, name) in [
            ("raw", "base.raw"),
            ("qcow2", "mid.qcow2"),
            ("qcow2", "top.qcow2"),
            ("qcow2", "packed.qcow2"),
            ("vpc", "some.vhd"),
        ] {
            let theirs = stretches(&dir.ok(&format!("qemu-img map -f {format} --output=json {name}")));
            let ours = stretches(&dir.image(&format!("map -f {format} --json {name}")));
            assert_eq!(ours, theirs, "{options}: {name}");
            stored += ours.iter().filter(|stretch| stretch.data).count();
        }
        let part = stretches(&dir.image("map --json --start-offset 1M --max-length 512k qcow2:top.qcow2"));
        let length: u64 = part.iter().map(|stretch| stretch.length).sum();
        assert_eq!((part[0].start, length), (MIB, MIB / 2));
        let ours = dir.image("map qcow2:top.qcow2");
        let theirs = dir.run("qemu-img map -f qcow2 top.qcow2");
        if theirs.code == 0 {
            let lines = |text: &str| text.lines().count();
            assert_eq!(lines(&ours), lines(&theirs.out), "{ours}{theirs:?}");
        }
    }
    assert!(stored > 200, "{stored} stretches");
}

#[test]
fn disks_grow_and_shrink() {
    let dir = Scratch::new("resize");
    dir.ok("qemu-img create -q -f raw below.raw 8M");
    let mut full = dir.command("qemu-io");
    dir.said(full.args(["-f", "raw", "-c", "write -P 7 0 8M", "below.raw"]));
    for (format, size) in [("raw", 6), ("qcow2", 6), ("vhd", 6)] {
        let name = format!("a.{format}");
        let qemu = if format == "vhd" { "vpc" } else { format };
        dir.image(&format!("create -f {format} {name} 4M"));
        dir.fill(qemu, &name, 4 * MIB, &mut Rng(7));
        let before = dir.by_qemu(qemu, &name);
        dir.image(&format!("resize -f {format} {name} +2M"));
        let mut after = before.clone();
        after.resize((size * MIB) as usize, 0);
        same(&dir.by_qemu(qemu, &name), &after, &name);
        same(&dir.by_us(format, &name), &after, &name);
        let (code, text) = dir.refused(&format!("resize {format}:{name} 2M"));
        assert!(code == 1 && text.contains("--shrink"), "{text}");
        if format == "vhd" {
            assert!(dir.refused("resize --shrink vhd:a.vhd 2M").1.contains("cannot become smaller"));
            continue;
        }
        dir.image(&format!("resize --shrink {format}:{name} -3M"));
        after.truncate(3 * MIB as usize);
        same(&dir.by_qemu(qemu, &name), &after, &name);
        dir.image(&format!("resize {format}:{name} 5M"));
        after.resize(5 * MIB as usize, 0);
        same(&dir.by_qemu(qemu, &name), &after, &name);
    }
    assert!(dir.ok("qemu-img check -f qcow2 a.qcow2").contains("No errors"));
    // What a longer parent holds does not come to light.
    for (format, options) in [("qcow2", "compat=1.1"), ("qcow2", "compat=0.10"), ("vhd", "subformat=dynamic")]
    {
        dir.image(&format!("create -f {format} -o {options} -b below.raw -F raw leaf 4M"));
        dir.image(&format!("resize -f {format} leaf 10M"));
        let mut wanted = vec![7; 4 * MIB as usize];
        wanted.resize(10 * MIB as usize, 0);
        same(&dir.by_us(format, "leaf"), &wanted, options);
    }
    dir.image("create qcow2:s.qcow2 4M");
    dir.image("snapshot -c kept qcow2:s.qcow2");
    assert!(dir.refused("resize --shrink qcow2:s.qcow2 2M").1.contains("internal snapshots"));
}

#[test]
fn check_finds_and_mends_what_qemu_finds() {
    let dir = Scratch::new("check");
    dir.ok("qemu-img create -q -f qcow2 -o cluster_size=4k sound.qcow2 8M");
    let mut command = dir.command("qemu-io");
    dir.said(command.args(["-f", "qcow2", "-c", "write -P 3 64k 300k", "sound.qcow2"]));
    let sound = std::fs::read(dir.path("sound.qcow2")).unwrap();
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let block = word(word(48) as usize) as usize;
    let l1 = word(40) as usize;
    let table = (0..4).map(|n| word(l1 + n * 8)).find(|entry| *entry != 0).unwrap();
    let l2 = (table & 0x00ff_ffff_ffff_fe00) as usize;
    let used = (0..512).map(|n| l2 + n * 8).find(|at| word(*at) >> 63 == 1).unwrap();
    let cluster = ((word(used) & 0x00ff_ffff_ffff_fe00) / 4096) as usize;
    type Damage<'a> = (&'a str, Box<dyn Fn(&mut Vec<u8>)>, i32);
    let damages: [Damage<'_>; 4] = [
        ("nothing", Box::new(|_| {}), 0),
        ("leak", Box::new(move |bytes| bytes[used..used + 8].fill(0)), 3),
        ("refcount", Box::new(move |bytes| bytes[block + cluster * 2..][..2].fill(0)), 2),
        ("mark", Box::new(move |bytes| bytes[used] &= 0x7f), 2),
    ];
    for (name, damage, code) in damages {
        let mut bytes = sound.clone();
        damage(&mut bytes);
        std::fs::write(dir.path("bad.qcow2"), &bytes).unwrap();
        assert_eq!(dir.run("qemu-img check -q -f qcow2 bad.qcow2").code, code, "{name}");
        let said = dir.run("vbdd image check --json qcow2:bad.qcow2");
        assert_eq!(said.code, code, "{name}: {said:?}");
        assert_eq!(field(&said.out, "leaks") == Some("0"), code != 3, "{said:?}");
        let mended = dir.run("vbdd image check --repair leaks qcow2:bad.qcow2");
        assert_eq!(mended.code, if name == "refcount" { 2 } else { 0 }, "{name}: {mended:?}");
        assert_eq!(dir.run("vbdd image check --repair=all -f qcow2 bad.qcow2").code, 0, "{name}");
        assert!(dir.ok("qemu-img check -f qcow2 bad.qcow2").contains("No errors"), "{name}");
    }
    dir.image("create -f vhd a.vhd 8M");
    dir.fill("vpc", "a.vhd", 8 * MIB, &mut Rng(4));
    let mut bytes = std::fs::read(dir.path("a.vhd")).unwrap();
    bytes.truncate(bytes.len() - 512);
    std::fs::write(dir.path("a.vhd"), bytes).unwrap();
    assert_eq!(dir.run("vbdd image check vhd:a.vhd").code, 3);
    assert_eq!(dir.run("vbdd image check --repair vhd:a.vhd").code, 0);
    assert_eq!(dir.run("vbdd image check vhd:a.vhd").code, 0);
    std::fs::write(dir.path("a.raw"), [0; 512]).unwrap();
    assert_eq!(dir.refused("check raw:a.raw").0, 63);
}

#[test]
fn mistakes_are_one_line_that_says_what_to_do() {
    let dir = Scratch::new("mistakes");
    dir.image("create qcow2:a.qcow2 1M");
    dir.image("create vhd:a.vhd 2M");
    std::fs::create_dir(dir.path("d")).unwrap();
    for (words, what) in [
        ("info a.qcow2", "looks like qcow2: if you know that it is, say -f qcow2"),
        ("info -f vhd a.qcow2", "looks like qcow2 and not like vhd"),
        ("info -f qcow2 a.vhd", "looks like vhd and not like qcow2"),
        ("info qcow2:none", "does not exist"),
        ("info raw:d", "neither a regular file nor a block device"),
        ("info", "PATH is missing (see vbdd image info --help)"),
        ("info qcow2:a.qcow2 more", "more is one argument too many"),
        ("frob", "there is no command image frob"),
        ("create qcow2:b.qcow2", "SIZE is missing"),
        ("create qcow2:b.qcow2 1X", "1X is no size"),
        ("create qcow2:b.qcow2 0", "at least one sector"),
        ("create -o frob=1 qcow2:b.qcow2 1M", "-o frob: qcow2 images have no such setting"),
        ("create -o cluster_size=3k qcow2:b.qcow2 1M", "a power of two"),
        ("create -b a.qcow2 qcow2:b.qcow2", "backing format is not named"),
        ("create -b a.qcow2 -F qcow2 vhd:b.vhd", "a VHD cannot say that its parent is QCOW2"),
        ("create -b none -F qcow2 qcow2:b.qcow2 1M", "none: does not exist"),
        ("create -f vhd b.vhd 3T", "larger than 2040 GiB"),
        ("create qcow2:none/b.qcow2 1M", "cannot create"),
        ("create -f frob b 1M", "frob is no format"),
        ("map --start-offset 5M qcow2:a.qcow2", "not within the disk"),
        ("rebase -b x -F raw raw:a.qcow2", "has no parent"),
        ("snapshot -c x vhd:a.vhd", "only QCOW2 has internal snapshots"),
        ("snapshot -d x qcow2:a.qcow2", "no snapshot of that name"),
        ("convert qcow2:a.qcow2 qcow2:a.qcow2", "source and target are one file"),
        ("bench -s 100 qcow2:a.qcow2", "do not fit"),
        ("scan none", "No such file"),
        ("hide raw:a.qcow2", "cannot be hidden"),
    ] {
        let (code, text) = dir.refused(words);
        assert!(code == 1 && text.contains(what), "{words}: {text}");
        let (_, json) = dir.refused(&format!("{words} --json"));
        assert!(json.starts_with("{\"error\":\"") && json.contains("\"hint\":"), "{words}: {json}");
    }
    assert_eq!(dir.names(), ["a.qcow2", "a.vhd", "d"]);
    assert!(dir.image("--help").contains("vbdd image COMMAND"));
    assert!(dir.image("convert --help").contains("--target-is-zero"));
    assert!(dir.ok("vbdd help image map").starts_with("vbdd image map"));
}

#[test]
fn hostile_images_are_errors() {
    let dir = Scratch::new("hostile");
    dir.ok("qemu-img create -q -f qcow2 -o cluster_size=512 sound.qcow2 256k");
    dir.fill("qcow2", "sound.qcow2", 256 << 10, &mut Rng(1));
    dir.ok("qemu-img snapshot -c s sound.qcow2");
    dir.image("create -f vhd sound.vhd 2M");
    dir.fill("vpc", "sound.vhd", 2 * MIB, &mut Rng(2));
    let mut rng = Rng(5);
    let mut refused = 0;
    for round in 0..60 {
        let (format, name) = *rng.pick(&[("qcow2", "sound.qcow2"), ("vhd", "sound.vhd")]);
        let mut bytes = std::fs::read(dir.path(name)).unwrap();
        for _ in 0..=rng.below(3) {
            let end = bytes.len().min(if round % 2 == 0 { 600 } else { 20_000 }) as u64;
            let at = rng.below(end) as usize;
            bytes[at] = *rng.pick(&[0, 1, 0x7f, 0x80, 0xff, rng.0 as u8]);
        }
        std::fs::write(dir.path("bad"), &bytes).unwrap();
        for command in [
            "info",
            "map",
            "check",
            "check --repair=all",
            "snapshot -c x",
            "snapshot -a s",
            "snapshot -d s",
            "resize",
            "compare",
            "convert",
        ] {
            let more = match command {
                "resize" => " +1M".to_owned(),
                "compare" => format!(" -F {format} {name}"),
                "convert" => " raw:out".into(),
                _ => String::new(),
            };
            let said = dir.run(&format!(
                "timeout 60 {} image {command} -f {format} bad{more}",
                env!("CARGO_BIN_EXE_vbdd")
            ));
            assert!((0..=3).contains(&said.code), "{command} of {bytes:02x?}: {said:?}");
            refused += usize::from(said.code == 1);
        }
        dir.run("vbdd image scan .");
    }
    assert!(refused > 60, "{refused} refused");
}

/// A loop device, released at the end.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).output();
    }
}

#[test]
fn devices_are_images_too() {
    let dir = Scratch::new("devices");
    dir.image("create raw:device.img 64M");
    let said = dir.run("losetup -f --show device.img");
    if said.code != 0 {
        println!("SKIPPED: no loop device can be made here (root and losetup are needed)");
        return;
    }
    let device = Loop(said.out.trim().to_owned());
    let device = &device.0;
    dir.image("create raw:source.raw 20M");
    dir.fill("raw", "source.raw", 20 * MIB, &mut Rng(8));
    for format in ["qcow2", "vhd", "raw"] {
        if format != "raw" {
            let said = dir.run(&format!("vbdd image create {format}:{device} 32M"));
            assert!(said.code == 0 && said.err.contains("a device"), "{said:?}");
        }
        dir.image(&format!("convert -n raw:source.raw {format}:{device}"));
        if format == "raw" {
            // Behind it is what the VHD has left.
            let wanted = std::fs::read(dir.path("source.raw")).unwrap();
            same(&std::fs::read(device).unwrap()[..wanted.len()], &wanted, "raw device");
            assert!(dir.refused(&format!("resize raw:{device} 80M")).1.contains("a device has the size"));
            continue;
        }
        dir.image(&format!("compare raw:source.raw {format}:{device}"));
        assert_eq!(dir.run(&format!("vbdd image check {format}:{device}")).code, 0);
        dir.image(&format!("resize {format}:{device} 40M"));
        assert_eq!(dir.run(&format!("vbdd image check {format}:{device}")).code, 0);
        dir.image(&format!("compare raw:source.raw {format}:{device}"));
    }
    // One that somebody else has claimed, as a mount does.
    let claimed =
        std::os::unix::fs::OpenOptionsExt::custom_flags(std::fs::File::options().read(true), libc::O_EXCL)
            .open(device);
    assert!(dir.refused(&format!("create qcow2:{device} 8M")).1.contains("in use on this host"));
    drop(claimed.unwrap());
}
