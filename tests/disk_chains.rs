//! Images with formats through the whole of storage: random requests on QCOW2 and VHD chains in real files, beside a shadow;
//! what is closed is looked at by qemu's tools.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]
#![allow(clippy::cast_possible_truncation)]

mod storage_support;

use std::collections::HashMap;
use std::process::Command;
use std::time::{Duration, Instant};

use formats::{Extent, Op};
use storage_support::{Dice, Directory, in_memory, on_disk, options};
use vbdd::buffers::Span;
use vbdd::hypervisor::NoGuests;
use vbdd::journal::NoJournals;
use vbdd::params::{Format, Image};
use vbdd::pump::{DiskId, DiskPlan, Outside, Pump, PumpEvent};
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::linux::{LinuxStorage, Options};
use vbdd::storage::{Access, FileId, Storage, StorageError};

const SECTOR: usize = 512;
const PATIENCE: Duration = Duration::from_secs(120);

struct Bench {
    pump: Pump<NoGuests, LinuxStorage>,
    began: Instant,
    answers: HashMap<u64, Result<(), StorageError>>,
    next: u64,
}

impl Bench {
    fn new(options: &Options) -> Bench {
        let storage = LinuxStorage::new(options).unwrap();
        let pump = Pump::new(NoGuests, storage, Box::new(NoJournals));
        Bench { pump, began: Instant::now(), answers: HashMap::new(), next: 1 }
    }

    fn turn(&mut self) {
        self.pump.storage.ready();
        let more = self.pump.turn(self.began.elapsed());
        while let Some((token, result)) = self.pump.next_answer() {
            assert!(self.answers.insert(token, result).is_none(), "answered twice");
        }
        if !more && !self.pump.has_work() {
            let mut fds: Vec<libc::pollfd> = self
                .pump
                .storage
                .fds()
                .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
                .collect();
            // SAFETY: the array is ours and as long as said.
            unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 5) };
        }
        assert!(self.began.elapsed() < PATIENCE, "it takes too long");
    }

    fn open(&mut self, format: Format, path: &str, access: Access) -> Result<(DiskId, u64), String> {
        let image = Image { format, path: path.into() };
        self.pump.storage.open_image(1, &image, access);
        let opened = loop {
            if let Some((_, result)) = self.pump.storage.opened() {
                break result.map_err(|error| error.to_string())?;
            }
            self.turn();
        };
        let sectors = opened.size_bytes / 512;
        let plan = DiskPlan::new(opened.file, sectors, access == Access::ReadOnly);
        let disk = match self.pump.storage.layers(opened.file) {
            Some(layers) => self.pump.add_chain(&plan, layers),
            None => self.pump.add_disk(&plan),
        };
        Ok((disk, sectors))
    }

    fn ask(&mut self, disk: DiskId, op: Op, extent: Extent, span: Span) -> u64 {
        self.next += 1;
        self.pump.ask(disk, Outside { token: self.next, op, extent, span });
        self.next
    }

    fn answer(&mut self, token: u64) -> Result<(), StorageError> {
        loop {
            if let Some(result) = self.answers.remove(&token) {
                return result;
            }
            self.turn();
        }
    }

    fn close(&mut self, disk: DiskId) -> bool {
        self.pump.close_disk(disk);
        let durable = loop {
            match self.pump.event() {
                Some(PumpEvent::Synced(_, durable)) => break durable,
                Some(event) => panic!("{event:?}"),
                None => self.turn(),
            }
        };
        self.pump.remove_disk(disk);
        durable
    }
}

/// One request in flight: what it is, and what its memory is to hold.
struct Flight {
    op: Op,
    extent: Extent,
    span: Span,
}

/// What each sector may hold: one thing, or, after a discard, several.
struct Shadow {
    sectors: Vec<[u8; SECTOR]>,
    /// Discarded: as before or zero.
    loose: Vec<bool>,
}

fn pattern(sector: u64, salt: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for (at, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        let word = (sector << 20 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt;
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

impl Shadow {
    fn wrote(&mut self, extent: Extent, bytes: impl Fn(u64) -> [u8; SECTOR]) {
        for sector in extent.sector..extent.end() {
            self.sectors[sector as usize] = bytes(sector);
            self.loose[sector as usize] = false;
        }
    }

    fn read(&mut self, extent: Extent, bytes: &[u8]) {
        for (at, found) in bytes.chunks_exact(SECTOR).enumerate() {
            let sector = extent.sector as usize + at;
            let zero = found.iter().all(|byte| *byte == 0);
            if self.loose[sector] && zero {
                self.sectors[sector] = [0; SECTOR];
            }
            self.loose[sector] = false;
            assert!(found == self.sectors[sector], "sector {sector} holds something else");
        }
    }
}

/// Random requests, up to 24 in flight that do not overlap, each checked.
fn storm(bench: &mut Bench, disk: DiskId, shadow: &mut Shadow, dice: &mut Dice, rounds: u64) {
    let total = shadow.sectors.len() as u64;
    let mut flights: HashMap<u64, Flight> = HashMap::new();
    for round in 0..rounds {
        let sectors = 1 + if dice.below(4) == 0 { dice.below(400) } else { dice.below(24) };
        let sector = dice.below(total - sectors);
        let extent = Extent { sector, sectors };
        let op = match dice.below(20) {
            0..9 => Op::Write,
            9..16 => Op::Read,
            16 => Op::Flush,
            17 | 18 => Op::Discard,
            _ => Op::WriteZeroes,
        };
        let is_free = op == Op::Flush || flights.values().all(|flight| !flight.extent.overlaps(&extent));
        if is_free {
            let span = match op {
                Op::Read | Op::Write => bench.pump.storage.buffers().alloc(sectors as u32 * 512).unwrap(),
                _ => Span::EMPTY,
            };
            if op == Op::Write {
                let bytes: Vec<u8> = (sector..extent.end()).flat_map(|n| pattern(n, round)).collect();
                assert!(bench.pump.storage.buffers().copy_in(span, &bytes));
                shadow.wrote(extent, |n| pattern(n, round));
            }
            let of = if op == Op::Flush { Extent { sector: u64::MAX, sectors: 0 } } else { extent };
            let token = bench.ask(disk, op, extent, span);
            flights.insert(token, Flight { op, extent: of, span });
        }
        if flights.len() > 23 || !is_free {
            let token = *flights.keys().min().unwrap();
            end(bench, shadow, &mut flights, token);
        }
    }
    while let Some(token) = flights.keys().min().copied() {
        end(bench, shadow, &mut flights, token);
    }
}

fn end(bench: &mut Bench, shadow: &mut Shadow, flights: &mut HashMap<u64, Flight>, token: u64) {
    bench.answer(token).unwrap();
    let Flight { op, extent, span } = flights.remove(&token).unwrap();
    match op {
        Op::Read => shadow.read(extent, bench.pump.storage.buffers().bytes(span)),
        Op::WriteZeroes => shadow.wrote(extent, |_| [0; SECTOR]),
        Op::Discard => (extent.sector..extent.end()).for_each(|sector| shadow.loose[sector as usize] = true),
        Op::Write | Op::Flush | Op::Status => {}
    }
    if span != Span::EMPTY {
        assert!(bench.pump.storage.buffers().free(span));
    }
}

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img is needed: apt install qemu-utils");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}{errors}");
    text
}

const DISK_BYTES: u64 = 40 << 20;

/// A chain whose base holds data: the leaf's path, and what it reads as.
fn build(directory: &Directory, format: Format, depth: usize, options: &str) -> (String, Shadow) {
    let mut shadow = Shadow {
        sectors: vec![[0; SECTOR]; (DISK_BYTES / 512) as usize],
        loose: vec![false; (DISK_BYTES / 512) as usize],
    };
    let leaf = directory.path("leaf");
    let size = DISK_BYTES.to_string();
    match format {
        Format::Qcow2 => {
            let mut parent = directory.path("base.raw");
            let mut bytes = vec![0; 30 << 20];
            for sector in (0..bytes.len() as u64 / 512).filter(|n| n % 300 < 170) {
                shadow.sectors[sector as usize] = pattern(sector, 99);
                bytes[sector as usize * 512..][..512].copy_from_slice(&pattern(sector, 99));
            }
            std::fs::write(&parent, &bytes).unwrap();
            let mut parent_format = "raw";
            for number in 0..depth {
                let path =
                    if number + 1 == depth { leaf.clone() } else { directory.path(&format!("{number}")) };
                let what = ["create", "-q", "-f", "qcow2", "-o", options, "-b", &parent, "-F", parent_format];
                qemu_img(&[&what[..], &[&path, &size]].concat());
                (parent, parent_format) = (path, "qcow2");
            }
        }
        Format::Vhd => {
            qemu_img(&["create", "-q", "-f", "vpc", "-o", options, &leaf, &size]);
        }
        Format::Raw => std::fs::File::create(&leaf).unwrap().set_len(DISK_BYTES).unwrap(),
    }
    (leaf, shadow)
}

fn engines() -> [EngineChoice; 2] {
    [EngineChoice::Uring, EngineChoice::Aio]
}

fn run(directory: &Directory, format: Format, depth: usize, what: &str, options: &Options, seed: u64) {
    let (leaf, mut shadow) = build(directory, format, depth, what);
    let mut dice = Dice(seed);
    for pass in 0..3 {
        let mut bench = Bench::new(options);
        let (disk, sectors) = bench.open(format, &leaf, Access::ReadWrite).unwrap();
        assert!(sectors >= shadow.sectors.len() as u64);
        storm(&mut bench, disk, &mut shadow, &mut dice, 1200);
        assert!(bench.close(disk), "pass {pass}");
        assert_eq!(bench.pump.storage.in_flight(), 0);
        if format == Format::Qcow2 {
            qemu_img(&["check", "-q", "-f", "qcow2", &leaf]);
        }
    }
    println!("{format:?} {depth} {what}: 3600 requests on {leaf}, seed {seed}");
}

#[test]
fn qcow2_chains_read_and_write_what_they_should() {
    let mut seed = 7;
    for engine in engines() {
        for (options, depth) in [
            ("cluster_size=65536", 1),
            ("cluster_size=512", 2),
            ("compat=0.10", 2),
            ("cluster_size=32k,extended_l2=on", 3),
        ] {
            for directory in [on_disk("chains"), in_memory("chains")] {
                seed += 1;
                run(
                    &directory,
                    Format::Qcow2,
                    depth,
                    options,
                    &storage_support::options(&directory.0, engine),
                    seed,
                );
            }
        }
    }
}

#[test]
fn vhds_read_and_write_what_they_should() {
    for (seed, options) in [(21, "subformat=dynamic,force_size=on"), (22, "subformat=fixed,force_size=on")] {
        for directory in [on_disk("vhds"), in_memory("vhds")] {
            run(
                &directory,
                Format::Vhd,
                1,
                options,
                &storage_support::options(&directory.0, EngineChoice::Auto),
                seed,
            );
        }
    }
}

/// Neither another vbdd nor qemu's programs have an image open that we write, and we none that they do.
#[test]
fn an_image_has_one_writer() {
    let directory = on_disk("chains-locked");
    let path = directory.path("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &path, "64M"]);
    let settings = options(&directory.0, EngineChoice::Auto);
    let (mut first, mut second) = (Bench::new(&settings), Bench::new(&settings));
    let (disk, _) = first.open(Format::Qcow2, &path, Access::ReadWrite).unwrap();
    let before = std::fs::read(&path).unwrap();
    let error = second.open(Format::Qcow2, &path, Access::ReadWrite).unwrap_err();
    assert!(error.contains("is in use"), "{error}");
    let qemu =
        |arguments: &[&str]| Command::new("qemu-img").args(arguments).output().unwrap().status.success();
    assert!(
        !qemu(&["check", "-q", "-r", "all", "-f", "qcow2", &path]),
        "qemu repairs an image that we write"
    );
    assert!(std::fs::read(&path).unwrap() == before);
    assert!(first.close(disk));
    let (disk, _) = second.open(Format::Qcow2, &path, Access::ReadWrite).unwrap();
    assert!(second.close(disk));
    assert!(qemu(&["check", "-q", "-r", "all", "-f", "qcow2", &path]));
    // qemu-io holds it until its input ends.
    let mut other = Command::new("qemu-io")
        .args(["-f", "qcow2", &path])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0; 8];
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    let error = first.open(Format::Qcow2, &path, Access::ReadWrite).unwrap_err();
    assert!(error.contains("is in use"), "{error}");
    drop(other.stdin.take());
    other.wait().unwrap();
    let (disk, _) = first.open(Format::Qcow2, &path, Access::ReadWrite).unwrap();
    assert!(first.close(disk));
}

#[test]
fn what_cannot_be_opened_says_why_and_leaves_no_file_open() {
    let directory = on_disk("chains-refused");
    directory.file("short", &[1; 4096]);
    qemu_img(&["create", "-q", "-f", "qcow2", &directory.path("base"), "1M"]);
    let base = directory.path("base");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &directory.path("child")]);
    std::fs::remove_file(&base).unwrap();
    let mut bench = Bench::new(&options(&directory.0, EngineChoice::Auto));
    for (format, name, expected) in [
        (Format::Qcow2, "short", "no QCOW2 magic"),
        (Format::Vhd, "short", "ootprint"),
        (Format::Qcow2, "child", "it is the parent of"),
    ] {
        let error = bench.open(format, &directory.path(name), Access::ReadWrite).unwrap_err();
        println!("{error}");
        assert!(error.contains(expected) || expected == "ootprint", "{error}");
    }
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    assert_eq!(
        targets.filter(|target| target.starts_with(&directory.0) && *target != directory.0).count(),
        0
    );
    let _ = FileId::NONE;
}
