//! `vbdd image convert` and `compare` beside qemu-img: every pair of formats, chains, compressed and old images, interruptions.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod image_support;

use std::time::Duration;

use image_support::{MIB, Rng, Scratch, field, same, vhd_chain};

/// Format, qemu's name of it, settings.
const FORMATS: [(&str, &str, &str); 10] = [
    ("raw", "raw", "preallocation=off"),
    ("qcow2", "qcow2", "cluster_size=64k"),
    ("qcow2", "qcow2", "cluster_size=512"),
    ("qcow2", "qcow2", "cluster_size=2M,refcount_bits=1"),
    ("qcow2", "qcow2", "compat=0.10"),
    ("qcow2", "qcow2", "extended_l2=on"),
    ("qcow2", "qcow2", "compression_type=zstd,refcount_bits=64"),
    ("vhd", "vpc", "subformat=dynamic"),
    ("vhd", "vpc", "subformat=fixed"),
    ("vhd", "vpc", "metadata_size=1T"),
];

fn same_or_longer(found: &[u8], wanted: &[u8], what: &str) {
    same(&found[..wanted.len()], wanted, what);
    assert!(found[wanted.len()..].iter().all(|byte| *byte == 0), "{what}: something behind the end");
}

#[test]
fn every_format_becomes_every_other() {
    let dir = Scratch::new("pairs");
    let size = 6 * MIB;
    let mut pairs = 0;
    for (number, (format, qemu, options)) in (0..).zip(FORMATS) {
        dir.image(&format!("create -f {format} -o {options} source {size}"));
        dir.fill(qemu, "source", size, &mut Rng(number));
        let wanted = dir.by_qemu(qemu, "source");
        for (target, qemu_target, target_options) in FORMATS {
            let what = format!("{format} {options} to {target} {target_options}");
            dir.image(&format!("convert -f {format} -O {target} -o {target_options} source target"));
            same_or_longer(&dir.by_qemu(qemu_target, "target"), &wanted, &what);
            if target == "qcow2" {
                assert!(dir.ok("qemu-img check -f qcow2 target").contains("No errors"), "{what}");
            } else if target == "vhd" {
                assert_eq!(dir.run("vbdd image check vhd:target").code, 0, "{what}");
            }
            assert_eq!(
                dir.run(&format!("vbdd image compare {format}:source {target}:target")).code,
                0,
                "{what}"
            );
            assert_eq!(
                dir.run(&format!("qemu-img compare -f {qemu} -F {qemu_target} source target")).code,
                0,
                "{what}"
            );
            // And back, from what qemu wrote.
            dir.ok(&format!("qemu-img convert -f {qemu} -O {qemu_target} source theirs"));
            same_or_longer(&dir.by_us(target, "theirs"), &wanted, &what);
            pairs += 1;
        }
    }
    assert_eq!(dir.names(), ["source", "target", "theirs"]);
    println!("{pairs} pairs");
}

#[test]
fn chains_compressed_images_and_snapshots_are_read() {
    let dir = Scratch::new("chains");
    for seed in 0..6 {
        let mut rng = Rng(seed + 40);
        let size = 5 * MIB + rng.below(100) * 512;
        let old = if seed % 2 == 0 { "compat=0.10" } else { "compat=1.1" };
        let packing = if seed % 3 == 0 { "zstd" } else { "zlib" };
        dir.ok(&format!("qemu-img create -q -f raw base.raw {}", size / 2));
        dir.fill("raw", "base.raw", size / 2 / 512 * 512, &mut rng);
        dir.ok(&format!(
            "qemu-img convert -c -f raw -O qcow2 -o compression_type={packing} base.raw packed.qcow2"
        ));
        dir.ok(&format!(
            "qemu-img create -q -f qcow2 -o {old},cluster_size=4k -b packed.qcow2 -F qcow2 mid.qcow2 {size}"
        ));
        dir.fill("qcow2", "mid.qcow2", size, &mut rng);
        dir.ok("qemu-img snapshot -c first mid.qcow2");
        let first = dir.by_qemu("qcow2", "mid.qcow2");
        dir.fill("qcow2", "mid.qcow2", size, &mut rng);
        dir.ok(&format!("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 {size}"));
        dir.fill("qcow2", "top.qcow2", size, &mut rng);
        let wanted = dir.by_qemu("qcow2", "top.qcow2");
        same(&dir.by_us("qcow2", "top.qcow2"), &wanted, "chain");
        same(&dir.by_us("qcow2", "packed.qcow2"), &dir.by_qemu("qcow2", "packed.qcow2"), "compressed");
        dir.image("convert -l first qcow2:mid.qcow2 raw:first.raw");
        same(&std::fs::read(dir.path("first.raw")).unwrap(), &first, "snapshot");
        // Only the leaf's own, over the same parent and over a copy of it in another format.
        dir.image("convert -B mid.qcow2 -F qcow2 qcow2:top.qcow2 qcow2:leaf.qcow2");
        same(&dir.by_qemu("qcow2", "leaf.qcow2"), &wanted, "leaf");
        dir.image("convert qcow2:mid.qcow2 vhd:mid.vhd");
        dir.image("convert -B mid.vhd -F vhd qcow2:top.qcow2 vhd:leaf.vhd");
        same_or_longer(&dir.by_us("vhd", "leaf.vhd"), &wanted, "leaf as VHD");
        assert_eq!(dir.run("vbdd image compare vhd:leaf.vhd qcow2:top.qcow2").code, 0);
        assert!(dir.image("info vhd:leaf.vhd").contains("subformat: differencing"));
        same_or_longer(&vhd_chain(&dir, &["leaf.vhd", "mid.vhd"]), &wanted, "leaf as VHD, by the model");
    }
}

#[test]
fn differences_are_found_and_told() {
    let dir = Scratch::new("compare");
    dir.image("create qcow2:a.qcow2 40M");
    dir.fill("qcow2", "a.qcow2", 40 * MIB, &mut Rng(9));
    dir.image("convert qcow2:a.qcow2 raw:b.raw");
    assert!(dir.image("compare qcow2:a.qcow2 raw:b.raw").contains("identical"));
    let file = std::fs::File::options().write(true).open(dir.path("b.raw")).unwrap();
    file.set_len(41 * MIB).unwrap();
    assert!(dir.image("compare qcow2:a.qcow2 raw:b.raw").contains("identical"));
    assert_eq!(dir.run("vbdd image compare -s qcow2:a.qcow2 raw:b.raw").code, 1);
    std::os::unix::fs::FileExt::write_at(&file, b"x", 41 * MIB - 5).unwrap();
    let said = dir.run("vbdd image compare --json raw:b.raw qcow2:a.qcow2");
    assert_eq!((said.code, field(&said.out, "offset")), (1, Some("42991611")), "{said:?}");
    let mut bytes = std::fs::read(dir.path("b.raw")).unwrap();
    bytes[12_345_678] ^= 1;
    std::fs::write(dir.path("b.raw"), bytes).unwrap();
    let said = dir.run("vbdd image compare qcow2:a.qcow2 raw:b.raw");
    assert!(said.code == 1 && said.out.contains("offset 12345678!"), "{said:?}");
    assert_eq!(dir.refused("compare qcow2:a.qcow2 raw:none").0, 2);
}

#[test]
fn targets_that_are_there_are_written_in_place() {
    let dir = Scratch::new("in-place");
    dir.image("create raw:source.raw 5M");
    dir.fill("raw", "source.raw", 5 * MIB, &mut Rng(11));
    let wanted = std::fs::read(dir.path("source.raw")).unwrap();
    for (format, qemu) in [("raw", "raw"), ("qcow2", "qcow2"), ("vhd", "vpc")] {
        dir.image(&format!("create -f {format} target 8M"));
        dir.fill(qemu, "target", 8 * MIB, &mut Rng(12));
        let mut after = dir.by_qemu(qemu, "target");
        let said = dir.run(&format!("vbdd image convert -n raw:source.raw {format}:target"));
        assert!(said.code == 0 && said.err.contains("in place"), "{said:?}");
        after[..wanted.len()].copy_from_slice(&wanted);
        same(&dir.by_qemu(qemu, "target"), &after, format);
        dir.image(&format!("create -f {format} target 2M"));
        assert!(dir.refused(&format!("convert -n raw:source.raw {format}:target")).1.contains("too small"));
    }
}

#[test]
fn zeroes_take_no_space() {
    let dir = Scratch::new("sparse");
    let mut bytes = vec![0; 16 * MIB as usize];
    bytes[5 << 20] = 1;
    std::fs::write(dir.path("full.raw"), &bytes).unwrap();
    for format in ["raw", "qcow2", "vhd"] {
        let made = dir.image(&format!("convert --json raw:full.raw {format}:target"));
        let takes: u64 = field(&made, "actual-size").unwrap().parse().unwrap();
        assert!(takes < MIB, "{made}");
        same(&dir.by_us(format, "target"), &bytes, format);
    }
    let made = dir.image("convert --json -S 0 raw:full.raw raw:target");
    assert!(field(&made, "actual-size").unwrap().parse::<u64>().unwrap() >= 16 * MIB, "{made}");
}

/// Interrupts a conversion after a while, many times; the target is the old file or the new one, and nothing else is left.
#[test]
fn an_interrupted_conversion_leaves_the_old_file_or_the_new() {
    let dir = Scratch::new("interrupted");
    dir.ok("qemu-img create -q -f qcow2 -o preallocation=full source.qcow2 120M");
    let mut command = dir.command("qemu-io");
    dir.said(command.args(["-f", "qcow2", "-c", "write -P 9 0 120M", "source.qcow2"]));
    let new = dir.by_qemu("qcow2", "source.qcow2");
    let old = b"what was there before".to_vec();
    let (mut finished, mut stopped) = (0, 0);
    for round in 0..24_u64 {
        std::fs::write(dir.path("target"), &old).unwrap();
        let mut child = dir.command("vbdd image convert -q qcow2:source.qcow2 raw:target");
        let mut child = child.stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(5 + round * 12));
        let signal = ["INT", "TERM", "KILL"][(round % 3) as usize];
        dir.run(&format!("kill -{signal} {}", child.id()));
        let code = child.wait().unwrap().code();
        let bytes = std::fs::read(dir.path("target")).unwrap();
        if bytes == old {
            stopped += 1;
            assert_ne!(code, Some(0));
        } else {
            finished += 1;
            same(&bytes, &new, "new file");
        }
        if signal == "KILL" {
            // Nobody could remove it.
            for name in dir.names().iter().filter(|name| name.starts_with(".target.vbdd-")) {
                std::fs::remove_file(dir.path(name)).unwrap();
            }
        }
        assert_eq!(dir.names(), ["source.qcow2", "target"], "after {signal}");
    }
    assert!(stopped > 0, "{finished} finished, {stopped} stopped");
}

#[test]
fn images_in_use_are_left_alone() {
    let dir = Scratch::new("locked");
    dir.image("create qcow2:a.qcow2 1M");
    dir.image("create qcow2:b.qcow2 1M");
    let file = std::fs::File::options().read(true).write(true).open(dir.path("a.qcow2")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for words in [
        "check qcow2:a.qcow2",
        "check --repair qcow2:a.qcow2",
        "resize qcow2:a.qcow2 2M",
        "snapshot -c x qcow2:a.qcow2",
        "rebase -u -b b.qcow2 -F qcow2 qcow2:a.qcow2",
        "convert qcow2:a.qcow2 raw:out",
        "convert qcow2:b.qcow2 qcow2:a.qcow2",
        "create qcow2:a.qcow2 1M",
        "compare qcow2:a.qcow2 qcow2:b.qcow2",
        "bench -w -c 1 qcow2:a.qcow2",
        "hide qcow2:a.qcow2",
    ] {
        let (_, text) = dir.refused(words);
        assert!(text.contains("in use by another process"), "{words}: {text}");
    }
    for words in [
        "info qcow2:a.qcow2",
        "map qcow2:a.qcow2",
        "check -U qcow2:a.qcow2",
        "compare -U qcow2:a.qcow2 qcow2:b.qcow2",
    ] {
        dir.image(words);
    }
    drop(file);
    dir.image("check qcow2:a.qcow2");
    // And by qemu, which holds it until it has no more commands to read.
    let mut qemu = dir.command("qemu-io -f qcow2 a.qcow2");
    let mut qemu =
        qemu.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(qemu.stdout.as_mut().unwrap(), &mut byte).unwrap();
    for words in ["resize qcow2:a.qcow2 2M", "snapshot -c x qcow2:a.qcow2", "create qcow2:a.qcow2 1M"] {
        let (_, text) = dir.refused(words);
        assert!(text.contains("or qemu"), "{words}: {text}");
    }
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    dir.image("resize qcow2:a.qcow2 2M");
}

#[test]
fn a_bench_reads_and_writes() {
    let dir = Scratch::new("bench");
    for (format, qemu) in [("raw", "raw"), ("qcow2", "qcow2"), ("vhd", "vpc")] {
        dir.image(&format!("create -f {format} a 4M"));
        let said = dir.image(&format!("bench -w --pattern 5 -c 1100 -d 16 --flush-interval 100 {format}:a"));
        assert!(said.contains("Sent 1100 write requests of 4096 bytes"), "{said}");
        same(&dir.by_qemu(qemu, "a"), &vec![5; 4 << 20], format);
        assert_eq!(
            field(&dir.image(&format!("bench --json -c 50 -s 64k -S 1M {format}:a")), "requests"),
            Some("50")
        );
    }
}

#[test]
fn a_raw_image_keeps_its_last_bytes_whatever_its_length() {
    let dir = Scratch::new("ragged");
    let bytes: Vec<u8> = (0..70_001_u32).map(|n| (n % 251) as u8 + 1).collect();
    std::fs::write(dir.path("a.raw"), &bytes).unwrap();
    let mut wanted = bytes;
    wanted.resize(70_144, 0);
    for (format, qemu) in [("raw", "raw"), ("qcow2", "qcow2"), ("vhd", "vpc")] {
        dir.image(&format!("convert raw:a.raw {format}:target"));
        same_or_longer(&dir.by_qemu(qemu, "target"), &wanted, format);
        assert_eq!(dir.run(&format!("vbdd image compare raw:a.raw {format}:target")).code, 0);
    }
    assert_eq!(field(&dir.image("info --json raw:a.raw"), "virtual-size"), Some("70144"));
}
