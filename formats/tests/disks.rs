//! Disks as such: raw images, a cache that several share, and what follows a failed sync.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod support;

use std::collections::HashMap;

use formats::pages::Key;
use formats::qcow2::Planted;
use formats::qcow2::create::{Create, create};
use formats::qcow2::{Options, Qcow2};
use formats::{Disk, Extent, Failure, Format, Limits, Medium, Op, Pages, Raw, Request, Work, WorkKind};
use support::driver::{Driver, Faults, NoFaults};
use support::medium::SimMedium;
use support::oracle::sector_of;
use support::requests::Mortal as _;
use support::rng::{Rng, seeds};
use support::witness::Witness;
use support::world::{Setup, World};

#[test]
fn a_raw_image_is_a_disk() {
    let mut medium = SimMedium::file();
    medium.set_length(100 * 512).unwrap();
    let disk = Disk::new(1, vec![(7, Box::new(Raw::of_sectors(100)))], false, Limits::default());
    let mut driver = Driver::new(disk, Pages::of_pages(8), HashMap::from([(7, medium)]), 1);
    let extent = Extent { sector: 10, sectors: 4 };
    let data: Vec<u8> = (10..14).flat_map(sector_of).collect();
    driver.run(Op::Write, extent, data.clone()).0.unwrap();
    assert_eq!(driver.run(Op::Read, extent, vec![0; 2048]), (Ok(()), data));
    driver.run(Op::WriteZeroes, Extent { sector: 11, sectors: 2 }, Vec::new()).0.unwrap();
    driver.run(Op::Flush, extent, Vec::new()).0.unwrap();
    let (_, memory) = driver.run(Op::Read, extent, vec![9; 2048]);
    assert!(memory[512..1536].iter().all(|byte| *byte == 0) && memory[..512] == sector_of(10));
    driver.run(Op::Discard, Extent { sector: 50, sectors: 10 }, Vec::new()).0.unwrap();
    for (sector, sectors) in [(100, 1), (99, 2), (u64::MAX, 1), (0, 0)] {
        let result = driver.run(Op::Read, Extent { sector, sectors }, Vec::new()).0;
        assert_eq!(result, Err(Failure::OutOfRange));
    }
    driver.close().unwrap();
}

fn qcow2(disk: u32, pages: Pages, reserve_bytes: u64) -> Driver<SimMedium> {
    let mut medium = SimMedium::file();
    let mut what = Create::new(400 * 512);
    what.shape.cluster_bits = 9;
    create(&mut medium, &what).unwrap();
    let options = Options { writable: true, reserve_bytes, ..Options::default() };
    let (image, _) = Qcow2::open(&mut medium, options).unwrap();
    let disk = Disk::new(disk, vec![(0, Box::new(image) as Box<dyn Format>)], false, Limits::default());
    Driver::new(disk, pages, HashMap::from([(0, medium)]), 1)
}

/// Two disks take turns with one small cache; neither ever flushes.
#[test]
fn disks_share_a_cache_without_standing_in_each_others_way() {
    let mut disks = [qcow2(1, Pages::of_pages(16), 1 << 17), qcow2(2, Pages::of_pages(1), 1 << 17)];
    for turn in 0..200 {
        let (now, next) = ((turn % 2) as usize, ((turn + 1) % 2) as usize);
        let sector = turn * 37 % 396;
        let extent = Extent { sector, sectors: 3 };
        let data: Vec<u8> = (sector..sector + 3).flat_map(|n| sector_of(n + turn)).collect();
        disks[now].run(Op::Write, extent, data.clone()).0.unwrap();
        assert_eq!(disks[now].run(Op::Read, extent, vec![0; 1536]), (Ok(()), data));
        let pages = std::mem::replace(&mut disks[now].pages, Pages::of_pages(1));
        disks[next].pages = pages;
    }
    for disk in 0..2 {
        disks[disk].close().unwrap();
        let pages = std::mem::replace(&mut disks[disk].pages, Pages::of_pages(1));
        disks[1 - disk].pages = pages;
    }
}

/// A cache that others fill makes a request wait; it neither fails nor spins inside.
#[test]
fn a_request_waits_while_others_have_the_whole_cache() {
    let mut driver = qcow2(1, Pages::of_pages(16), 1 << 17);
    let key = |offset_bytes| Key { disk: 9, image: 0, offset_bytes };
    let taken: Vec<_> = (0..16).map(|n| driver.pages.claim(key(n * 4096)).unwrap()).collect();
    let extent = Extent { sector: 5, sectors: 1 };
    assert!(driver.submit(Request { token: 1, op: Op::Read, extent }, vec![9; 512]));
    for _ in 0..100 {
        assert!(driver.step(&mut NoFaults));
    }
    assert!(driver.outcomes.is_empty());
    taken.into_iter().for_each(|page| driver.pages.abandon(page));
    driver.settle();
    assert_eq!(driver.outcomes.pop().unwrap().result, Ok(()));
}

/// A discard of everything is done in turns: others are served meanwhile.
#[test]
fn a_discard_of_a_whole_disk_lets_others_have_their_turn() {
    let mut medium = SimMedium::file();
    let mut what = Create::new(64 << 20);
    what.shape.cluster_bits = 9;
    create(&mut medium, &what).unwrap();
    let (image, _) = Qcow2::open(&mut medium, Options { writable: true, ..Options::default() }).unwrap();
    let disk = Disk::new(1, vec![(0, Box::new(image) as Box<dyn Format>)], false, Limits::default());
    let mut driver = Driver::new(disk, Pages::of_pages(4096), HashMap::from([(0, medium)]), 1);
    let all = Extent { sector: 0, sectors: (64 << 20) / 512 };
    driver.run(Op::Write, Extent { sector: 77, sectors: 1 }, vec![1; 512]).0.unwrap();
    for _ in 0..2 {
        // The second time every table's L1 page is in the cache.
        assert!(driver.submit(Request { token: 1, op: Op::Discard, extent: all }, Vec::new()));
        let mut turns = 0;
        while driver.step(&mut NoFaults) {
            turns += u64::from(driver.in_flight.iter().any(|(work, _)| work.kind == WorkKind::Yield));
        }
        assert_eq!(driver.outcomes.pop().unwrap().result, Ok(()));
        assert!(turns >= 16, "{turns} turns");
    }
    let (_, memory) = driver.run(Op::Read, Extent { sector: 77, sectors: 1 }, vec![9; 512]);
    assert!(memory.iter().all(|byte| *byte == 0));
}

struct SyncFails(u64);

impl Faults for SyncFails {
    fn strike(&mut self, work: &Work, _: &mut Rng) -> Option<Failure> {
        if work.kind != WorkKind::Sync {
            return None;
        }
        self.0 = self.0.saturating_sub(1);
        (self.0 == 0).then_some(Failure::Io(5))
    }
}

/// After a failed sync no flush succeeds, no page is written, and what was flushed before survives.
#[test]
fn after_a_failed_sync_nothing_is_promised() {
    for seed in seeds(60) {
        println!("VBDD_SEED={seed}");
        let mut rng = Rng::new(seed);
        let mut world = World::new(seed, Setup::random(&mut rng), Planted::default());
        let mut faults = SyncFails(1 + rng.below(6));
        for step in 0..120 {
            while (world.all.requests.len() as u64) < world.setup.depth {
                world.ask();
            }
            world.all.step(&mut faults);
            if step % 4 == 0 {
                world.crash_and_look(false);
            }
        }
        world.all.drain();
        if faults.0 > 0 {
            continue;
        }
        let extent = Extent { sector: 0, sectors: 1 };
        for (op, memory) in [(Op::Flush, Vec::new()), (Op::Write, vec![1; 512])] {
            let token = u64::MAX;
            assert!(world.all.driver.submit(Request { token, op, extent }, memory));
            while world.all.driver.step(&mut NoFaults) {}
            let outcome = world.all.driver.outcomes.pop().unwrap();
            assert_eq!(outcome.result, Err(Failure::SyncFailed), "{op:?}");
        }
        world.all.driver.disk.close(&mut world.all.driver.pages);
        assert!(
            matches!(world.all.driver.disk.closed(), Some(Err(_))),
            "{:?}",
            world.all.driver.disk.closed()
        );
    }
}

/// What was reserved for writes that no longer come may fail to be there: that is no reason not to close.
#[test]
fn a_full_medium_is_closed_clean_whatever_is_under_way() {
    for writes in 1..40 {
        let mut driver = qcow2(1, Pages::of_pages(64), 4096);
        for write in 0..writes {
            let extent = Extent { sector: write * 7 % 399, sectors: 1 };
            assert!(driver.submit(Request { token: write, op: Op::Write, extent }, vec![1; 512]));
            while driver.outcomes.pop().is_none() {
                assert!(driver.step(&mut NoFaults));
            }
        }
        let medium = driver.media.get_mut(&0).unwrap();
        medium.full_at = medium.now.len() as u64;
        assert_eq!(driver.close(), Ok(()), "after {writes} writes");
        let witness = Witness::new(&driver.media[&0].now);
        assert_eq!((witness.leaks(), witness.dirty), (0, false), "after {writes} writes");
    }
}
