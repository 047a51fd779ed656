//! Internal snapshots and new parents, interrupted at every write: the image is the old one or the new one, with leaks at worst.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::collections::HashMap;

use formats::qcow2::check::{Fix, check};
use formats::qcow2::create::{Create, create};
use formats::qcow2::header::Header;
use formats::qcow2::map::Tree;
use formats::qcow2::parent::{set_backing, set_hidden};
use formats::qcow2::{Options, Qcow2, Shape, snapshots};
use formats::{Disk, Extent, Failure, Format, Limits, Medium, Op, Pages, Place};
use support::driver::{Driver, SlowSync};
use support::rng::{Rng, seeds};

/// A file in memory that remembers what was written since the last sync, sector by sector.
#[derive(Clone, Default)]
struct Log {
    bytes: Vec<u8>,
    /// Before each write or sync: what a crash there could leave of the sectors that were not synced.
    steps: Vec<Step>,
    recording: bool,
}

#[derive(Clone)]
enum Step {
    Write(usize, Vec<u8>),
    Length(usize),
    Sync,
}

impl Log {
    fn apply(bytes: &mut Vec<u8>, step: &Step) {
        match step {
            Step::Write(at, data) => {
                if bytes.len() < at + data.len() {
                    bytes.resize(at + data.len(), 0);
                }
                bytes[*at..at + data.len()].copy_from_slice(data);
            }
            Step::Length(length) => bytes.resize(*length, 0),
            Step::Sync => {}
        }
    }

    fn step(&mut self, step: Step) {
        Log::apply(&mut self.bytes, &step);
        if self.recording {
            self.steps.push(step);
        }
    }
}

impl Medium for Log {
    fn length_bytes(&mut self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        bytes.fill(0);
        let from = (at as usize).min(self.bytes.len());
        let count = bytes.len().min(self.bytes.len() - from);
        bytes[..count].copy_from_slice(&self.bytes[from..from + count]);
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        // Sectors reach the medium one by one.
        for (number, part) in bytes.chunks(512).enumerate() {
            self.step(Step::Write(at as usize + number * 512, part.to_vec()));
        }
        Ok(())
    }

    fn zero(&mut self, at: u64, length: u64) -> Result<(), Failure> {
        let end = (at + length).min(self.bytes.len() as u64);
        if end > at { self.write(at, &vec![0; (end - at) as usize]) } else { Ok(()) }
    }

    fn set_length(&mut self, length: u64) -> Result<(), Failure> {
        self.step(Step::Length(length as usize));
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        self.step(Step::Sync);
        Ok(())
    }
}

impl SlowSync for Log {}

fn write(medium: Log, extents: &[(u64, u64, u8)]) -> Log {
    let mut medium = medium;
    let (image, _) =
        Qcow2::open(&mut medium, Options { writable: true, reserve_bytes: 1 << 16, ..Options::default() })
            .unwrap();
    let disk = Disk::new(1, vec![(0, Box::new(image) as Box<dyn Format>)], false, Limits::default());
    let mut driver = Driver::new(disk, Pages::of_pages(64), HashMap::from([(0, medium)]), 1);
    for &(sector, sectors, value) in extents {
        driver.run(Op::Write, Extent { sector, sectors }, vec![value; (sectors * 512) as usize]).0.unwrap();
    }
    driver.close().unwrap();
    driver.media.remove(&0).unwrap()
}

/// What a tree of an image without a parent shows.
fn content(medium: &mut Log, mut tree: Tree, sectors: u64) -> Vec<u8> {
    let mut out = Vec::new();
    formats::map::for_each_run(&mut tree, &mut medium.clone(), sectors, &mut |_, run| {
        let from = out.len();
        out.resize(from + (run.sectors * 512) as usize, 0);
        if let Place::Data { offset_bytes } = run.place {
            medium.read(offset_bytes, &mut out[from..]).unwrap();
        }
    })
    .unwrap();
    out
}

type Shown = (Vec<u8>, Vec<(String, Vec<u8>)>);

/// The disk, and all its snapshots.
fn shown(medium: &mut Log) -> Shown {
    let header = Header::read(medium).unwrap();
    let tree = Tree::active(medium, &header).unwrap();
    let disk = content(medium, tree, header.size_bytes / 512);
    let list = snapshots::list(medium, &header).unwrap();
    let of = |snapshot: &snapshots::Snapshot| {
        let l1 = (snapshot.l1_offset, snapshot.l1_entries);
        let tree = Tree::of(&mut medium.clone(), header.shape, l1, snapshot.disk_bytes).unwrap();
        (snapshot.name.clone(), content(&mut medium.clone(), tree, snapshot.disk_bytes / 512))
    };
    (disk, list.iter().map(of).collect())
}

fn shapes() -> Vec<Shape> {
    let shape = |version, cluster_bits, extended, refcount_order| Shape {
        version,
        cluster_bits,
        extended,
        refcount_order,
    };
    vec![
        shape(3, 9, false, 4),
        shape(3, 9, false, 1),
        shape(3, 12, false, 3),
        shape(2, 10, false, 4),
        shape(3, 14, true, 4),
    ]
}

/// Crashes in every step of a change: all that was synced is there, and any subset of the sectors that were not.
fn sweep(before: &Log, change: &dyn Fn(&mut Log), rng: &mut Rng, look: &dyn Fn(&mut Log, bool)) -> u64 {
    let mut after = Log { recording: true, ..before.clone() };
    change(&mut after);
    let mut crashes = 0;
    for end in 0..=after.steps.len() {
        let synced =
            after.steps[..end].iter().rposition(|step| matches!(step, Step::Sync)).map_or(0, |at| at + 1);
        for _ in 0..2 {
            let mut bytes = before.bytes.clone();
            for (number, step) in after.steps[..end].iter().enumerate() {
                if number < synced || matches!(step, Step::Length(_)) || rng.one_in(2) {
                    Log::apply(&mut bytes, step);
                }
            }
            look(&mut Log { bytes, ..Log::default() }, end == after.steps.len() && synced == end);
            crashes += 1;
        }
    }
    crashes
}

#[test]
fn an_interrupted_snapshot_is_there_or_not() {
    let mut crashes = 0;
    for seed in seeds(3) {
        let mut rng = Rng::new(seed);
        for shape in shapes() {
            let mut medium = Log::default();
            create(&mut medium, &Create { shape, ..Create::new(300 << 10) }).unwrap();
            medium = write(medium, &[(0, 40, 1), (200, 60, 2), (rng.below(500), 30, 3)]);
            for round in 0..5_u64 {
                let list: Vec<String> = shown(&mut medium).1.into_iter().map(|(name, _)| name).collect();
                // Refcounts of two bits have room for two snapshots.
                let what =
                    if list.is_empty() || (round < 3 && list.len() < 2) { 0 } else { 1 + rng.below(2) };
                let name = if what == 0 {
                    format!("s{round}")
                } else {
                    list[rng.below(list.len() as u64) as usize].clone()
                };
                let change = |medium: &mut Log| match what {
                    0 => snapshots::create(medium, &name, (1, 2)).unwrap(),
                    1 => snapshots::apply(medium, &name).unwrap(),
                    _ => snapshots::delete(medium, &name).unwrap(),
                };
                let (old, mut changed) = (shown(&mut medium), medium.clone());
                change(&mut changed);
                let new = shown(&mut changed);
                assert_ne!((what, &old), (0, &new));
                crashes += sweep(&medium, &change, &mut rng, &|crashed, finished| {
                    let report = check(crashed, Fix::Leaks).unwrap();
                    assert!(report.is_clean(), "{shape:?} {what} {name}: {report:?}");
                    let found = shown(crashed);
                    assert!(
                        found == new || (!finished && found == old),
                        "{shape:?} {what} {name}: something else is shown"
                    );
                    let report = check(crashed, Fix::Nothing).unwrap();
                    assert!(report.is_clean() && report.leaks == 0, "{report:?}");
                });
                medium = write(changed, &[(rng.below(500), 60, 10 + round as u8), (rng.below(550), 5, 77)]);
            }
        }
    }
    println!("{crashes} crashes");
}

#[test]
fn an_interrupted_rebase_names_one_of_both_parents() {
    let mut rng = Rng::new(7);
    let mut crashes = 0;
    let names = ["base.raw", "a/longer/name/of/a/parent.qcow2", "b", "", "another.raw"];
    for shape in shapes() {
        let mut medium = Log::default();
        let backing = Some(("first.raw".to_owned(), "raw".to_owned()));
        create(&mut medium, &Create { shape, backing, ..Create::new(300 << 10) }).unwrap();
        for round in 0..12 {
            let name = names[rng.below(names.len() as u64) as usize];
            let format = if name.ends_with("qcow2") { "qcow2" } else { "raw" };
            let hide = rng.one_in(3);
            let change = |medium: &mut Log| {
                if hide {
                    set_hidden(medium, round % 2 == 0).unwrap();
                } else {
                    set_backing(medium, (!name.is_empty()).then_some((name, format))).unwrap();
                }
            };
            let old = Header::read(&mut medium).unwrap();
            let mut changed = medium.clone();
            change(&mut changed);
            let new = Header::read(&mut changed).unwrap();
            if !hide {
                let found = new.backing.clone().map(|backing| (backing.name, backing.format.unwrap()));
                assert_eq!(found, (!name.is_empty()).then(|| (name.to_owned(), format.to_owned())));
            }
            // What extensions there are besides stays, names of features where there is room.
            assert!(new.extensions.len() + 1 >= old.extensions.len());
            crashes += sweep(&medium, &change, &mut rng, &|crashed, finished| {
                let found = Header::read(crashed).unwrap();
                assert!(found == new || (!finished && found == old), "{shape:?} {name}: {found:?}");
            });
            medium = changed;
        }
    }
    println!("{crashes} crashes");
}
