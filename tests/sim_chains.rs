//! Guests on images with formats, in the simulated world: every answer right, whatever the timing; a process that dies at any
//! call has a successor; what was flushed survives power loss.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use rings::request::operation;
use rings::{Abi, FrontRing, Offers, Segment, SharedPages};
use vbdd::params::Format;
use vbdd::pump::{DiskId, DiskPlan, Pump, RingPlan};
use vbdd::storage::{Access, Storage as _};
use world::chains;
use world::hypervisor::SimXen;
use world::journals::SimJournals;
use world::run::{World, sane_world_on};
use world::storage::SimStorage;
use world::{Faults, Plant, for_seeds};

fn world(seed: u64, requests: u32) -> World {
    let world = sane_world_on(seed, requests, true);
    world.shared.faults.set(Faults { latency_us_max: 500, slow: 50, ..Faults::default() });
    world
}

fn ends_well(world: &mut World) -> Result<(), String> {
    world.run()?;
    world.close()?;
    world.check_media()
}

#[test]
fn guests_are_served() {
    for_seeds(20, |seed| ends_well(&mut world(seed, 60)));
}

/// A world whose process dies again and again.
fn dies(seed: u64, plant: Plant) -> Result<u64, String> {
    let mut world = world(seed, 60);
    world.shared.plant.set(plant);
    for _ in 0..6 {
        let lifetime = world.shared.below([50, 500, 2000][world.shared.index(3)]);
        world.shared.countdown.set(Some(lifetime));
        let before = world.backend.deaths;
        world.run_until(|world| world.backend.deaths > before || world.finished())?;
    }
    world.shared.countdown.set(None);
    ends_well(&mut world)?;
    Ok(world.backend.deaths)
}

#[test]
fn successors_of_processes_that_die_repair_and_go_on() {
    let deaths = std::cell::Cell::new(0);
    for_seeds(20, |seed| {
        deaths.set(deaths.get() + dies(seed, Plant::None)?);
        Ok(())
    });
    assert!(deaths.get() > 50, "{} deaths are too few to show anything", deaths.get());
}

/// Metadata that a process had changed in memory only are missed when nobody puts them back.
#[test]
fn what_is_not_put_back_is_missed() {
    let found = (0..20).filter(|seed| dies(*seed, Plant::NothingLeft).is_err()).count();
    assert!(found > 0, "a planted bug is not found");
}

#[test]
fn what_an_acknowledged_flush_covers_survives_power_loss_at_any_moment() {
    for_seeds(60, |seed| {
        let mut world = world(seed, 60);
        let end = 1 + world.shared.below(6000);
        world.run_until(|world| world.steps > end || world.finished())?;
        world.lose_power(false)
    });
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..3 {
        let traces: Vec<u64> = (0..2)
            .map(|_| {
                let mut world = world(seed, 40);
                ends_well(&mut world).unwrap();
                world.shared.trace()
            })
            .collect();
        assert_eq!(traces[0], traces[1], "seed {seed}");
    }
}

/// A guest with one page of memory, whose disk is an image over a raw parent.
struct Lone {
    shared: std::rc::Rc<world::Shared>,
    pump: Pump<SimXen, SimStorage>,
    front: FrontRing,
    page: u32,
    port: u32,
    disk: DiskId,
    image: usize,
    _memory: std::rc::Rc<world::memory::GuestMemory>,
}

impl Lone {
    fn new(detect_zeroes: bool) -> Lone {
        let shared = world::Shared::new(1);
        shared.preempt.set(false);
        let memory = shared.xen.borrow_mut().create_domain(7, 4);
        let (ring, page, port) = {
            let mut xen = shared.xen.borrow_mut();
            (xen.grant(7, 0, false), xen.grant(7, 1, false), xen.offer_port(7))
        };
        // SAFETY: the guest's own mapping of its frame 0, which `memory` keeps.
        let pages = unsafe { SharedPages::new(memory.page(0), 1) };
        let front = FrontRing::create(pages, Abi::X86_64);
        let image = chains::create(&shared, "/images/0", 400, Format::Qcow2);
        let named = shared.media.borrow().image(image);
        let storage = SimStorage::new(shared.clone(), 1 << 20);
        let mut pump = Pump::new(SimXen(shared.clone()), storage, Box::new(SimJournals(shared.clone())));
        pump.storage.open_image(1, &named, Access::ReadWrite);
        let opened = pump.storage.opened().unwrap().1.unwrap();
        let layers = pump.storage.layers(opened.file).unwrap();
        let disk = pump.add_chain(&DiskPlan::new(opened.file, 400, false), layers);
        pump.set_terms(disk, Offers::NONE, false, detect_zeroes);
        let (grants, journal) = (vec![ring], "7-0".to_owned());
        let plan =
            RingPlan { domain: 7, grants, remote_port: port, abi: Abi::X86_64, resume: false, journal };
        pump.attach(disk, &plan).unwrap();
        Lone { shared, pump, front, page, port, disk, image, _memory: memory }
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            while self.pump.turn(self.shared.clock.now()) {}
            match self.shared.media.borrow().next_due() {
                Some(due) => self.shared.clock.advance_to(due.max(self.shared.clock.now_us() + 1)),
                None => return,
            }
        }
        panic!("it never ends");
    }

    /// Writes the page, which is zero, to every 4 KiB from `sector` on.
    fn write_zeroes(&mut self, sector: u64, pages: u64) {
        let segment = Segment { grant: self.page, first: 0, last: 7 };
        for page in 0..pages {
            self.front.write(operation::WRITE, page, sector + page * 8, &[segment], 1);
            let _ = self.front.publish();
            self.shared.xen.borrow_mut().guest_notify(7, self.port);
            self.pump.take_events();
            self.settle();
            let answer = self.front.take().unwrap();
            assert_eq!((answer.id, answer.status), (page, 0));
        }
    }

    /// Sectors of the image file when everything is closed, and of the disk those that read as zero.
    fn close(mut self) -> (usize, usize) {
        self.pump.close_disk(self.disk);
        self.settle();
        let content = chains::contents(&self.shared, self.image).unwrap();
        let zeroes = content.iter().filter(|sector| sector.iter().all(|byte| *byte == 0)).count();
        (self.shared.media.borrow().sectors(self.image), zeroes)
    }
}

#[test]
fn writes_of_zeroes_take_no_space_where_a_disk_asks_for_it() {
    let mut sizes = Vec::new();
    for detect in [false, true] {
        let mut lone = Lone::new(detect);
        lone.write_zeroes(0, 40);
        let (sectors, zeroes) = lone.close();
        assert_eq!(zeroes, 320, "what was written reads as zero, and the parent's sectors do not");
        sizes.push(sectors);
    }
    assert!(sizes[1] + 300 < sizes[0], "{sizes:?}");
}
