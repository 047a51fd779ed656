//! What requests on VHDs cost, and what happens when there is no room.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod support;
mod vhd_support;

use std::collections::HashMap;

use formats::pages::Key;
use formats::vhd::change::set_hidden;
use formats::vhd::check::{check, info};
use formats::vhd::create::{Create, Parent, create};
use formats::vhd::{Kind, Vhd};
use formats::{
    Disk, Extent, Failure, Format, Limits, Medium, Op, Outcome, Pages, Payload, Raw, Request, Work, WorkKind,
};
use support::driver::{Driver, Faults, NoFaults};
use support::rng::Rng;
use vhd_support::model::Model;
use vhd_support::sparse::Sparse;
use vhd_support::world::{BLOCK, blank};

const GIB: u64 = 1 << 30;

fn driver(mut medium: Sparse) -> Driver<Sparse> {
    let facts = medium.facts();
    let image = Vhd::open_to_write(&mut medium, facts).unwrap();
    let differencing = image.kind() == Kind::Differencing;
    let mut images: Vec<(u32, Box<dyn Format>)> = vec![(0, Box::new(image))];
    let mut media = HashMap::from([(0, medium)]);
    if differencing {
        images.push((1, Box::new(Raw::of_sectors(1 << 30))));
        media.insert(1, Sparse::file());
    }
    let disk = Disk::new(1, images, false, Limits::default());
    Driver::new(disk, Pages::of_pages(2048), media, 1)
}

fn raw_parent() -> Option<Parent> {
    Some(Parent { uuid: None, timestamp: 0, path: "p.raw".into() })
}

fn write(driver: &mut Driver<Sparse>, sector: u64) -> Result<(), Failure> {
    driver.run(Op::Write, Extent { sector, sectors: 8 }, vec![3; 4096]).0
}

/// Syncs and writes for random writes of 4 KiB with a flush after each, one at a time.
fn cost(driver: &mut Driver<Sparse>, sectors: &[u64]) -> (u64, u64) {
    let before = (driver.media[&0].syncs, driver.media[&0].writes);
    for &sector in sectors {
        write(driver, sector).unwrap();
        driver.run(Op::Flush, Extent { sector: 0, sectors: 1 }, Vec::new()).0.unwrap();
    }
    (driver.media[&0].syncs - before.0, driver.media[&0].writes - before.1)
}

#[test]
fn flushed_writes_cost_few_syncs() {
    let blocks = 500;
    let mut rng = Rng::new(1);
    let fresh: Vec<u64> = (0..blocks).map(|block| block * BLOCK + rng.below(500) * 8).collect();
    let again: Vec<u64> = (0..blocks).map(|block| block * BLOCK + 4000).collect();
    let mut dynamic = driver(blank(Kind::Dynamic, blocks, 0, None, false, None));
    let (syncs, writes) = cost(&mut dynamic, &fresh);
    println!("dynamic, a new block each: {syncs} syncs, {writes} writes for {blocks}");
    assert!(syncs <= blocks + 30, "{syncs}");
    let (syncs, writes) = cost(&mut dynamic, &again);
    println!("dynamic, in blocks that are there: {syncs} syncs, {writes} writes");
    assert_eq!((syncs, writes), (blocks, blocks));
    let mut differencing = driver(blank(Kind::Differencing, blocks, 0, None, false, raw_parent()));
    let (syncs, writes) = cost(&mut differencing, &fresh);
    println!("differencing, a new block each: {syncs} syncs, {writes} writes");
    assert!(syncs <= 2 * blocks + 30, "{syncs}");
    let (syncs, writes) = cost(&mut differencing, &fresh);
    println!("differencing, sectors that are there: {syncs} syncs, {writes} writes");
    assert_eq!((syncs, writes), (blocks, blocks));
}

#[test]
fn many_writers_share_syncs() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let blocks = 400;
        let parent = if kind == Kind::Differencing { raw_parent() } else { None };
        let mut driver = driver(blank(kind, blocks, 0, None, false, parent));
        let (mut next, mut ended) = (0, 0);
        let submit = |driver: &mut Driver<Sparse>, block: u64| {
            let extent = Extent { sector: block * BLOCK + 8, sectors: 8 };
            assert!(driver.submit(Request { token: block * 2, op: Op::Write, extent }, vec![1; 4096]));
        };
        for _ in 0..32 {
            submit(&mut driver, next);
            next += 1;
        }
        while ended < blocks {
            assert!(driver.step(&mut NoFaults));
            for Outcome { token, result } in std::mem::take(&mut driver.outcomes) {
                result.unwrap();
                if token % 2 == 0 {
                    let flush =
                        Request { token: token + 1, op: Op::Flush, extent: Extent { sector: 0, sectors: 1 } };
                    assert!(driver.submit(flush, Vec::new()));
                } else {
                    ended += 1;
                    if next < blocks {
                        submit(&mut driver, next);
                        next += 1;
                    }
                }
            }
        }
        let syncs = driver.media[&0].syncs;
        println!("{}, 32 at a time: {syncs} syncs for {blocks} writes with a flush each", kind.name());
        assert!(syncs < blocks, "{syncs}");
        driver.close().unwrap();
        Model::new(&driver.media[&0]).check_closed();
    }
}

#[test]
fn a_full_device_fails_writes_and_nothing_else() {
    let room = 3 * (BLOCK + 8) * 512;
    let mut driver = driver(blank(Kind::Dynamic, 8, 0, Some(room + (40 << 10)), false, None));
    for block in 0..3 {
        write(&mut driver, block * BLOCK).unwrap();
    }
    assert_eq!(write(&mut driver, 5 * BLOCK), Err(Failure::NoSpace));
    write(&mut driver, 2 * BLOCK + 64).unwrap();
    assert_eq!(
        driver.run(Op::Read, Extent { sector: 0, sectors: 8 }, vec![0; 4096]),
        (Ok(()), vec![3; 4096])
    );
    driver.close().unwrap();
    Model::new(&driver.media[&0]).check_closed();
}

#[test]
fn a_full_file_system_recovers() {
    let mut medium = blank(Kind::Dynamic, 300, 0, None, false, None);
    medium.full_at = 30 << 20;
    let mut driver = driver(medium);
    let failed = (0..300).find(|block| write(&mut driver, block * BLOCK).is_err()).unwrap();
    assert!((4..15).contains(&failed), "{failed}");
    assert_eq!(write(&mut driver, 299 * BLOCK), Err(Failure::NoSpace));
    driver.media.get_mut(&0).unwrap().full_at = u64::MAX;
    for block in failed..300 {
        write(&mut driver, block * BLOCK).unwrap();
    }
    driver.close().unwrap();
    Model::new(&driver.media[&0]).check_closed();
}

#[test]
fn discarded_blocks_are_used_again() {
    let mut driver = driver(blank(Kind::Dynamic, 64, 0, None, false, None));
    let mut longest = 0;
    for round in 0..10 {
        for block in 0..32 {
            write(&mut driver, (block * 2 + round % 2) * BLOCK).unwrap();
        }
        driver.run(Op::Flush, Extent { sector: 0, sectors: 1 }, Vec::new()).0.unwrap();
        let all = Extent { sector: 0, sectors: 64 * BLOCK };
        driver.run(Op::Discard, all, Vec::new()).0.unwrap();
        driver.run(Op::Flush, all, Vec::new()).0.unwrap();
        longest = driver.media[&0].length();
    }
    assert!(longest < 160 * (BLOCK + 8) * 512, "the file grew to {longest}");
    driver.close().unwrap();
    let mut medium = driver.media.remove(&0).unwrap();
    assert_eq!(info(&mut medium).unwrap().allocated_blocks, 0);
    assert!(medium.length() < 1 << 20, "closing cuts what is free at the end: {}", medium.length());
    Model::new(&medium).check_closed();
}

#[test]
fn opening_and_closing_without_a_change_writes_nothing() {
    let mut first = driver(blank(Kind::Dynamic, 8, 0, None, false, None));
    write(&mut first, 5 * BLOCK).unwrap();
    first.close().unwrap();
    let medium = first.media.remove(&0).unwrap();
    let (writes, length) = (medium.writes, medium.length());
    let mut second = driver(medium);
    second.run(Op::Read, Extent { sector: 0, sectors: 8 }, vec![0; 4096]).0.unwrap();
    second.close().unwrap();
    assert_eq!((second.media[&0].writes, second.media[&0].length()), (writes, length));
    // Blocks that were made ready and not used leave no trace, however often.
    let mut medium = second.media.remove(&0).unwrap();
    for round in 0..20 {
        let mut again = driver(medium);
        write(&mut again, 5 * BLOCK + round * 8).unwrap();
        write(&mut again, 6 * BLOCK + round * 8).unwrap();
        again.run(Op::Discard, Extent { sector: 6 * BLOCK, sectors: BLOCK }, Vec::new()).0.unwrap();
        again.close().unwrap();
        medium = again.media.remove(&0).unwrap();
        assert!(medium.length() <= length + 8 * 512, "round {round}: {} was {length}", medium.length());
    }
}

#[test]
fn a_flag_that_a_tool_sets_meanwhile_survives_closing() {
    let mut driver = driver(blank(Kind::Dynamic, 8, 0, None, false, None));
    write(&mut driver, 5 * BLOCK).unwrap();
    set_hidden(driver.media.get_mut(&0).unwrap(), true).unwrap();
    driver.close().unwrap();
    let mut medium = driver.media.remove(&0).unwrap();
    assert!(info(&mut medium).unwrap().hidden);
    assert_eq!(check(&mut medium, true, false).unwrap().flaws, 0);
}

#[test]
fn the_largest_image_is_opened_with_little() {
    let mut medium = Sparse::file();
    let disk_bytes = 2040 * GIB;
    let what =
        Create { kind: Kind::Dynamic, disk_bytes, room_bytes: 0, uuid: [1; 16], seconds: 1, parent: None };
    create(&mut medium, &what).unwrap();
    let mut driver = driver(medium);
    write(&mut driver, disk_bytes / 512 - 8).unwrap();
    driver.close().unwrap();
    let mut medium = driver.media.remove(&0).unwrap();
    assert_eq!(info(&mut medium).unwrap().allocated_blocks, 1);
    assert_eq!(check(&mut medium, true, false).unwrap().flaws, 0);
}

/// Counts what is read.
struct Counting(Sparse, u64);

impl Medium for Counting {
    fn length_bytes(&mut self) -> u64 {
        self.0.length_bytes()
    }
    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        self.1 += bytes.len() as u64;
        self.0.read(offset_bytes, bytes)
    }
    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), Failure> {
        Err(Failure::ReadOnly)
    }
    fn zero(&mut self, _: u64, _: u64) -> Result<(), Failure> {
        Err(Failure::ReadOnly)
    }
    fn set_length(&mut self, _: u64) -> Result<(), Failure> {
        Err(Failure::ReadOnly)
    }
    fn sync(&mut self) -> Result<(), Failure> {
        Err(Failure::ReadOnly)
    }
}

#[test]
fn a_parent_of_2_tib_costs_140_kib_to_open_and_a_leaf_its_bat() {
    let mut medium = Sparse::file();
    let disk_bytes = 2040 * GIB;
    let what =
        Create { kind: Kind::Dynamic, disk_bytes, room_bytes: 0, uuid: [1; 16], seconds: 1, parent: None };
    create(&mut medium, &what).unwrap();
    let facts = medium.facts();
    let mut counting = Counting(medium, 0);
    Vhd::open(&mut counting).unwrap();
    assert!(counting.1 < 140 << 10, "{}", counting.1);
    counting.1 = 0;
    Vhd::open_to_write(&mut counting, facts).unwrap();
    assert!(counting.1 < (4 << 20) + (140 << 10), "{}", counting.1);
}

/// No page can be written.
struct PagesFail;

impl Faults for PagesFail {
    fn strike(&mut self, work: &Work, _: &mut Rng) -> Option<Failure> {
        (work.kind == WorkKind::Write && work.payload == Payload::Own).then_some(Failure::Io(5))
    }
}

/// The cache is everybody's: a disk whose pages cannot be written must not fill it with them.
#[test]
fn pages_that_cannot_be_written_do_not_fill_the_cache() {
    let mut medium = blank(Kind::Differencing, 200, 0, None, false, raw_parent());
    let facts = medium.facts();
    let image = Vhd::open_to_write(&mut medium, facts).unwrap();
    let images: Vec<(u32, Box<dyn Format>)> =
        vec![(0, Box::new(image)), (1, Box::new(Raw::of_sectors(1 << 30)))];
    let limits = Limits { dirty_pages: 16, ..Limits::default() };
    let disk = Disk::new(1, images, false, limits);
    let media = HashMap::from([(0, medium), (1, Sparse::file())]);
    let mut driver = Driver::new(disk, Pages::of_pages(128), media, 1);
    let mut failed = 0;
    for block in 0..200 {
        let request =
            Request { token: block, op: Op::Write, extent: Extent { sector: block * BLOCK, sectors: 8 } };
        assert!(driver.submit(request, vec![3; 4096]));
        while driver.step(&mut PagesFail) {}
        failed += u64::from(driver.outcomes.pop().unwrap().result.is_err());
    }
    assert!(failed > 100, "{failed} failed");
    let other = |block: u64| Key { disk: 9, image: 0, offset_bytes: block * 512 };
    let taken: Vec<_> =
        (0..64).map(|block| driver.pages.claim(other(block)).expect("no page for others")).collect();
    taken.into_iter().for_each(|page| driver.pages.abandon(page));
    // It recovers without a request of the guest's.
    driver.disk.write_back(&mut driver.pages);
    driver.take();
    driver.settle();
    write(&mut driver, 150 * BLOCK).unwrap();
    driver.close().unwrap();
    Model::new(&driver.media[&0]).check_closed();
}
