//! Random reads, writes, ranges of zeroes and flushes, many at a time, against a shadow in memory. What a sector holds is unknown after two
//! writes of it at a time (a disk promises nothing then), but the other sectors of their blocks are known: so a lost
//! update of a read-modify-write shows.
#![allow(missing_docs, clippy::unwrap_used)]

mod storage_support;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use storage_support::faulty::{Faulty, Plan};
use storage_support::{Dice, Rig, in_memory, on_disk, options};
use vbdd::buffers::Span;
use vbdd::storage::aio::Aio;
use vbdd::storage::engine::{Engine, EngineChoice};
use vbdd::storage::linux::{Alignment, Options};
use vbdd::storage::uring::Uring;
use vbdd::storage::{Access, FileId, IoKind, Storage, StorageError};

/// A request in flight, and what it was to do.
struct Flight {
    token: u64,
    kind: IoKind,
    from: usize,
    sectors: usize,
    whole: Span,
    part: Span,
    bytes: Vec<u8>,
    /// Sectors that another write in flight writes too.
    shared: Vec<usize>,
}

struct World {
    rig: Rig,
    file: FileId,
    dice: Dice,
    /// What each sector must hold; `None` after a failed write.
    shadow: Vec<Option<[u8; 512]>>,
    flights: Vec<Flight>,
    /// What the last request was, and the sector where it ended, if that was a whole page's end.
    last: Option<(IoKind, usize)>,
    errno: Option<i32>,
    finished: u64,
    failed: u64,
}

impl World {
    fn new(rig: Rig, file: FileId, seed: u64, image: &[u8]) -> World {
        let mut shadow = Vec::new();
        for sector in image.chunks(512) {
            let mut bytes = [0; 512];
            bytes[..sector.len()].copy_from_slice(sector);
            shadow.push(Some(bytes));
        }
        let dice = Dice(seed);
        World {
            rig,
            file,
            dice,
            shadow,
            flights: Vec::new(),
            last: None,
            errno: None,
            finished: 0,
            failed: 0,
        }
    }

    fn roll(&mut self, below: usize) -> usize {
        usize::try_from(self.dice.below(below as u64)).unwrap()
    }

    fn start(&mut self) -> bool {
        if self.roll(40) == 0 {
            let token = self.rig.queue(self.file, IoKind::Flush, 0, Span::EMPTY);
            let (whole, part) = (Span::EMPTY, Span::EMPTY);
            let bytes = Vec::new();
            let (kind, from, sectors, shared) = (IoKind::Flush, 0, 0, Vec::new());
            self.flights.push(Flight { token, kind, from, sectors, whole, part, bytes, shared });
            return true;
        }
        let sectors = match self.roll(8) {
            0 => 8,
            1 => 1 + self.roll(160),
            2 => 8 * (1 + self.roll(6)),
            _ => 1 + self.roll(12),
        };
        let mut from = self.roll(self.shadow.len());
        if self.roll(4) == 0 {
            from &= !7;
        }
        let mut kind = if self.roll(3) == 0 { IoKind::Read } else { IoKind::Write };
        // As often as not whole pages that go on where the last ones ended.
        let pages = self.roll(2) == 0;
        let sectors = if pages { 8 * (1 + self.roll(3)) } else { sectors };
        if pages {
            (kind, from) = self.last.filter(|_| self.roll(8) > 0).unwrap_or((kind, from & !7));
            from = if from < self.shadow.len() { from } else { 0 };
        }
        let sectors = sectors.min(self.shadow.len() - from);
        let meddle = self.roll(3) == 0;
        let overlaps = |other: &Flight| from < other.from + other.sectors && other.from < from + sectors;
        let clash = self.flights.iter().any(|other| match (kind, other.kind) {
            (IoKind::Read, IoKind::Read) => false,
            (IoKind::Write, IoKind::Write) => overlaps(other) && !meddle,
            _ => overlaps(other),
        });
        if clash {
            return false;
        }
        let mut shared = Vec::new();
        for other in self.flights.iter_mut().filter(|other| overlaps(other) && kind == IoKind::Write) {
            let common = from.max(other.from)..(from + sectors).min(other.from + other.sectors);
            other.shared.extend(common.clone());
            shared.extend(common);
        }
        self.last = pages.then_some((kind, from + sectors));
        let skip = if pages || self.roll(2) == 0 { 0 } else { 512 * self.roll(8) };
        let whole = self.rig.alloc(sectors * 512 + skip);
        let part = whole.part(u32::try_from(skip).unwrap(), u32::try_from(sectors * 512).unwrap()).unwrap();
        let mut bytes = vec![0xcc; sectors * 512];
        let zeroes = kind == IoKind::Write && !pages && self.roll(5) == 0;
        if zeroes {
            bytes.fill(0);
        } else if kind == IoKind::Write {
            for chunk in bytes.chunks_mut(8) {
                chunk.copy_from_slice(&self.dice.next().to_le_bytes());
            }
        }
        self.rig.storage.buffers().copy_in(part, &bytes);
        let offset = from as u64 * 512;
        let token = if zeroes {
            let kind = IoKind::Zero { length_bytes: sectors as u64 * 512 };
            self.rig.queue(self.file, kind, offset, Span::EMPTY)
        } else {
            self.rig.queue(self.file, kind, offset, part)
        };
        self.flights.push(Flight { token, kind, from, sectors, whole, part, bytes, shared });
        true
    }

    fn end(&mut self, flight: Flight, result: &Result<(), StorageError>) {
        self.finished += 1;
        if let Err(error) = result {
            assert_eq!(Some(error), self.errno.map(StorageError::Os).as_ref(), "an error out of nowhere");
            self.failed += 1;
        }
        let got = self.rig.storage.buffers().bytes(flight.part).to_vec();
        match (flight.kind, result) {
            (IoKind::Read, Ok(())) => {
                for (at, sector) in got.chunks(512).enumerate() {
                    if let Some(expected) = &self.shadow[flight.from + at] {
                        assert!(sector == expected, "sector {} of {}", flight.from + at, self.shadow.len());
                    }
                }
            }
            (IoKind::Write, _) => {
                assert!(got == flight.bytes, "a write must leave the caller's memory alone");
                for (at, sector) in got.chunks(512).enumerate() {
                    let known = result.is_ok() && !flight.shared.contains(&(flight.from + at));
                    self.shadow[flight.from + at] = known.then(|| sector.try_into().unwrap());
                }
            }
            _ => {}
        }
        if flight.kind != IoKind::Flush {
            assert!(self.rig.storage.buffers().free(flight.whole));
        }
    }

    fn run(&mut self, requests: u64, depth: usize) {
        let mut started = 0;
        let begin = Instant::now();
        while started < requests || !self.flights.is_empty() {
            if started < requests {
                for _ in 0..=self.roll(depth) {
                    if self.flights.len() < depth {
                        started += u64::from(self.start());
                    }
                }
            }
            let done = self.rig.pump();
            for token in &done {
                let place = self.flights.iter().position(|flight| flight.token == *token).unwrap();
                let flight = self.flights.swap_remove(place);
                let result = self.rig.forget(*token).unwrap();
                self.end(flight, &result);
            }
            assert!(begin.elapsed() < Duration::from_secs(100), "stuck: {} in flight", self.flights.len());
            if done.is_empty() && (self.flights.len() == depth || started >= requests) {
                self.rig.wait(Duration::from_secs(1));
            }
        }
        assert_eq!(self.rig.storage.in_flight(), 0);
        assert_eq!(self.rig.storage.buffers().used_bytes(), 0);
    }

    fn compare(&self, path: &str) {
        let image = std::fs::read(path).unwrap();
        for (at, expected) in self.shadow.iter().enumerate() {
            let Some(expected) = expected else { continue };
            let end = image.len().min(at * 512 + 512);
            assert!(image[at * 512..end] == expected[..end - at * 512], "sector {at} on disk");
        }
    }
}

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut dice = Dice(seed);
    (0..length).map(|_| u8::try_from(dice.below(256)).unwrap()).collect()
}

fn seed() -> u64 {
    std::env::var("VBDD_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x5eed_0001)
}

const STRICT: Alignment = Alignment { block_bytes: 4096, memory_bytes: 4096 };
const LOOSE: Alignment = Alignment { block_bytes: 4096, memory_bytes: 512 };

fn inner(choice: EngineChoice) -> Box<dyn Engine> {
    match choice {
        EngineChoice::Aio => Box::new(Aio::new().unwrap()),
        _ => Box::new(Uring::new().unwrap()),
    }
}

/// A run over an engine that delays, reorders and cuts short; answers with what it did.
fn run(
    choice: EngineChoice,
    least: Option<Alignment>,
    size: usize,
    plan: Plan,
    requests: u64,
) -> (World, Plan) {
    let seed = seed();
    let name =
        format!("shadow-{choice:?}-{least:?}-{size}-{}", plan.errno).replace([' ', ':', '{', '}', ','], "");
    let directory = on_disk(&name);
    let image = noise(size, seed ^ 1);
    let path = directory.file("image", &image);
    let errno = (plan.fail > 0).then_some(plan.errno);
    let plan = Rc::new(RefCell::new(plan));
    let engine = Faulty::new(inner(choice), &plan, (seed ^ 2).max(1));
    let options = Options { alignment: least, ..options(&directory.0, choice) };
    let mut rig = Rig::with_engine(&options, Box::new(engine));
    let opened = rig.open(&path, Access::ReadWrite).unwrap();
    assert!(opened.direct, "these tests need O_DIRECT below the build directory");
    let mut world = World::new(rig, opened.file, seed, &image);
    world.errno = errno;
    world.run(requests, 24);
    world.compare(&path);
    let plan = plan.take();
    let merged = world.rig.storage.merged();
    assert!(merged > 50 || plan.room > 0, "only {merged} transfers were merged");
    assert_eq!(plan.misaligned, 0, "a transfer that such a medium refuses (seed {seed:#x})");
    (world, plan)
}

#[test]
fn blocks_of_4096_late_and_short() {
    for choice in [EngineChoice::Uring, EngineChoice::Aio] {
        for least in [STRICT, LOOSE] {
            let memory = least.memory_bytes as usize;
            let plan = Plan { again: 3, short: 30, late: 40, block: 4096, memory, ..Plan::default() };
            let (world, plan) = run(choice, Some(least), 128 * 1024, plan, 2500);
            assert!(plan.shortened > 10 && world.finished >= 2500, "{plan:?}");
        }
    }
}

#[test]
fn blocks_of_4096_with_a_ragged_end() {
    for choice in [EngineChoice::Uring, EngineChoice::Aio] {
        let plan = Plan { again: 2, late: 40, ..Plan::default() };
        run(choice, Some(LOOSE), 40 * 1024 + 1000, plan, 3000);
    }
}

#[test]
fn blocks_of_512_late_and_short() {
    for choice in [EngineChoice::Uring, EngineChoice::Aio] {
        let plan = Plan { again: 3, short: 10, late: 30, block: 512, memory: 512, ..Plan::default() };
        run(choice, Some(Alignment { block_bytes: 512, memory_bytes: 512 }), 300 * 1024, plan, 3000);
    }
}

#[test]
fn errors_are_told_and_nothing_else_is_harmed() {
    for errno in [libc::EIO, libc::ENOSPC] {
        for least in [STRICT, LOOSE] {
            let plan = Plan { fail: 4, errno, late: 30, short: 3, ..Plan::default() };
            let (world, plan) = run(EngineChoice::Uring, Some(least), 128 * 1024, plan, 3000);
            assert!(world.failed > 30 && plan.refused >= world.failed, "{} {plan:?}", world.failed);
        }
    }
}

#[test]
fn little_room_in_the_engine() {
    let plan = Plan { room: 3, late: 30, stalls: 20, ..Plan::default() };
    let (world, plan) = run(EngineChoice::Uring, Some(LOOSE), 128 * 1024, plan, 2000);
    assert!(world.finished >= 2000);
    assert_eq!((plan.in_flight_max, plan.stalls), (3, 0));
}

#[test]
fn plain_engines_everywhere() {
    for choice in [EngineChoice::Uring, EngineChoice::Aio] {
        for (place, direct) in [("disk", true), ("disk", false), ("memory", true)] {
            let name = format!("plain-{choice:?}-{place}-{direct}");
            let directory = if place == "disk" { on_disk(&name) } else { in_memory(&name) };
            let image = noise(200 * 1024 + 700, 5);
            let path = directory.file("image", &image);
            let mut rig = Rig::new(&Options { direct, ..options(&directory.0, choice) });
            let opened = rig.open(&path, Access::ReadWrite).unwrap();
            assert_eq!(opened.direct, direct && place == "disk");
            let mut world = World::new(rig, opened.file, seed(), &image);
            world.run(3000, 24);
            world.compare(&path);
        }
    }
}
