//! `vbdd nbd` and clients that nobody here wrote: libnbd's tools, qemu's, fio.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod nbd_support;

use std::process::Command;

use nbd_support::{Scratch, Served, run};

/// How images of each format are made, and named: by qemu, and by us.
const FORMATS: [(&str, &[&str], &str); 3] = [
    ("raw", &[], "raw:i"),
    ("qcow2", &[], "qcow2:i"),
    ("vpc", &["-o", "subformat=dynamic,force_size=on"], "vhd:i"),
];

fn create(dir: &Scratch, format: &str, more: &[&str], name: &str, size: &str) {
    let mut arguments = vec!["create", "-q", "-f", format];
    arguments.extend(more);
    arguments.extend([name, size]);
    run(dir, "qemu-img", &arguments);
}

/// A raw image with data and holes.
fn patchwork(dir: &Scratch, name: &str) {
    let bytes: Vec<u8> = (0..48_u32 << 20)
        .map(|at| if at >> 17 & 3 == 1 { (at.wrapping_mul(2_654_435_761) >> 24) as u8 | 1 } else { 0 })
        .collect();
    std::fs::write(dir.path(name), bytes).unwrap();
}

#[test]
fn nbdinfo_sees_what_there_is() {
    let dir = Scratch::new("nbdinfo");
    create(&dir, "qcow2", &[], "i", "48M");
    run(&dir, "qemu-io", &["-f", "qcow2", "-c", "write 1M 2M", "-c", "write 40M 64k", "i"]);
    let served = Served::new(&dir, "qcow2:i", &["--export", "one", "--read-only"]);
    let told = run(&dir, "nbdinfo", &[&served.uri()]);
    for expected in [
        "is_read_only: true",
        "export-size: 50331648",
        "can_multi_conn: true",
        "base:allocation",
        "block_size_minimum: 512",
    ] {
        assert!(told.contains(expected), "{expected}: {told}");
    }
    let map = run(&dir, "nbdinfo", &["--map", &served.uri()]);
    let map: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let expected = [
        ["0", "1048576", "3", "hole,zero"],
        ["1048576", "2097152", "0", "data"],
        ["3145728", "38797312", "3", "hole,zero"],
        ["41943040", "65536", "0", "data"],
        ["42008576", "8323072", "3", "hole,zero"],
    ];
    assert_eq!(map, expected);
    let list = run(&dir, "nbdinfo", &["--list", &served.uri()]);
    assert!(list.contains("export=\"one\""), "{list}");
    assert!(run(&dir, "nbdinfo", &["--size", &served.uri()]).starts_with("50331648"));
    served.stop();
}

#[test]
fn disks_are_copied_there_and_back() {
    for (format, more, image) in FORMATS {
        let dir = Scratch::new("copies");
        patchwork(&dir, "from");
        create(&dir, format, more, "i", "48M");
        let served = Served::new(&dir, image, &[]);
        let uri = served.uri();
        for arguments in [&["--flush"][..], &["--connections=4", "--requests=64", "--destination-is-zero"]] {
            run(&dir, "nbdcopy", &[arguments, &["from", &uri]].concat());
            run(&dir, "nbdcopy", &[&uri, "to"]);
            assert!(
                std::fs::read(dir.path("from")).unwrap() == std::fs::read(dir.path("to")).unwrap(),
                "{image}"
            );
        }
        // qemu leaves out what is zero already, and asks for what is a hole.
        run(&dir, "qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", "from", &uri]);
        run(&dir, "qemu-img", &["compare", "-f", "raw", "-F", "raw", "from", &uri]);
        run(&dir, "qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, "back"]);
        run(&dir, "qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "from", "back"]);
        served.stop();
        run(&dir, "qemu-img", &["compare", "-f", "raw", "-F", format, "from", "i"]);
        if format == "qcow2" {
            run(&dir, "qemu-img", &["check", "-f", "qcow2", "i"]);
        }
    }
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    for (format, more, image) in FORMATS {
        let dir = Scratch::new("qemu-io");
        create(&dir, format, more, "i", "48M");
        let served = Served::new(&dir, image, &[]);
        let commands = [
            "write -P 1 0 1M",
            "write -f -P 2 512 1536",
            "write -z 4k 8k",
            "write -z -u 1M 3M",
            "write -P 3 10000000 1000000",
            "discard 2M 5M",
            "flush",
            "read -P 1 0 512",
            "read -P 2 512 1536",
            "read -P 0 4k 8k",
            "read -P 1 12k 64k",
            "read -P 0 1M 3M",
            "read -P 3 10000000 1000000",
            "aio_write -P 5 20M 64k",
            "aio_write -P 6 21M 2M",
            "aio_flush",
            "read -P 5 20M 64k",
            "read -P 6 21M 2M",
        ];
        let mut arguments = vec!["-f", "raw"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        let uri = served.uri();
        arguments.push(&uri);
        let text = run(&dir, "qemu-io", &arguments);
        assert!(!text.contains("Pattern verification failed"), "{image}: {text}");
        served.stop();
        let text =
            run(&dir, "qemu-io", &["-f", format, "-c", "read -P 6 21M 2M", "-c", "read -P 0 4k 8k", "i"]);
        assert!(!text.contains("Pattern verification failed"), "{image}: {text}");
    }
}

#[test]
fn fio_verifies_what_it_wrote_while_others_copy() {
    for (format, more, image) in FORMATS {
        let dir = Scratch::new("fio");
        create(&dir, format, more, "i", "48M");
        let served = Served::new(&dir, image, &[]);
        let uri = served.uri();
        let copies: Vec<_> = (0..3)
            .map(|at| {
                let arguments = ["nbdcopy", &uri, &dir.path(&format!("copy{at}"))].map(str::to_owned);
                Command::new("timeout").arg("60").args(arguments).spawn().unwrap()
            })
            .collect();
        let target = format!("--uri={uri}");
        // Two processes with a half of the disk each, sizes mixed, a flush now and then.
        let arguments = [
            "--name=x",
            "--ioengine=nbd",
            &target,
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--iodepth=32",
            "--size=24M",
            "--numjobs=2",
            "--offset_increment=24M",
            "--fsync=50",
            "--verify=crc32c",
            "--verify_backlog=200",
            "--minimal",
        ];
        let text = run(&dir, "fio", &arguments);
        assert!(!text.contains("verify:"), "{image}: {text}");
        for mut copy in copies {
            assert!(copy.wait().unwrap().success());
        }
        served.stop();
        if format == "qcow2" {
            run(&dir, "qemu-img", &["check", "-f", "qcow2", "i"]);
        }
    }
}

#[test]
fn a_chain_over_a_raw_template_by_tcp() {
    let dir = Scratch::new("tcp");
    patchwork(&dir, "template");
    let chain = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "template", "i"];
    run(&dir, "qemu-img", &chain);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let served = Served::new(&dir, "qcow2:i", &["--listen", &address]);
    let uri = format!("nbd://{address}/");
    run(&dir, "qemu-io", &["-f", "raw", "-c", "write -P 9 100k 1000k", &uri]);
    run(&dir, "qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &served.uri()]);
    served.stop();
    run(&dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "i", "all"]);
    let (all, template) =
        (std::fs::read(dir.path("all")).unwrap(), std::fs::read(dir.path("template")).unwrap());
    assert!(all[100 << 10..1100 << 10].iter().all(|byte| *byte == 9));
    assert!(all[..100 << 10] == template[..100 << 10] && all[1100 << 10..] == template[1100 << 10..]);
}
