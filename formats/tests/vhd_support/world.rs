//! A chain of VHDs with random requests on it, crashes, and the oracle that knows what reads may find.

use std::collections::{BTreeSet, HashMap};

use formats::vhd::create::{Create, Parent, create};
use formats::vhd::{Kind, Planted, Vhd};
use formats::{Disk, Extent, Format, Limits, Medium, Op, Pages, Raw};

use super::model::{Found, Model};
use super::sparse::{Crash, Sparse};
use crate::support::driver::Driver;
use crate::support::oracle::{Oracle, sector_of, value_of};
use crate::support::requests::{Mortal, Requests};
use crate::support::rng::Rng;

pub const BLOCK: u64 = 4096;

#[derive(Clone, Debug)]
pub struct Setup {
    pub blocks: u64,
    /// Parents: the last is raw, the others are VHDs.
    pub parents: usize,
    pub raw_base: bool,
    pub device: bool,
    pub dirty_file: bool,
    pub room: u64,
    pub pages: usize,
    pub depth: u64,
    pub save_after: u32,
    /// With a batmap, as blktap and we make images; without, as all others do.
    pub batmap: bool,
}

impl Setup {
    pub fn random(rng: &mut Rng) -> Setup {
        let device = rng.one_in(6);
        Setup {
            blocks: 1 + rng.below(5),
            parents: if rng.one_in(2) { 0 } else { 1 + rng.below(3) as usize },
            raw_base: rng.one_in(2),
            device,
            dirty_file: !device && rng.one_in(6),
            room: rng.below(40),
            pages: 10 + rng.below(24) as usize,
            depth: 1 + rng.below(12),
            save_after: 1 + rng.below(3) as u32,
            batmap: !rng.one_in(4),
        }
    }

    pub fn sectors(&self) -> u64 {
        self.blocks * BLOCK
    }

    pub fn kind(&self) -> Kind {
        if self.parents > 0 { Kind::Differencing } else { Kind::Dynamic }
    }

    /// New blocks are full of zeroes, so that who ignores bitmaps reads the same.
    pub fn eager(&self) -> bool {
        self.parents == 0 && !self.device && !self.dirty_file
    }

    fn windows(&self) -> Vec<u64> {
        (0..self.blocks)
            .flat_map(|block| [block * BLOCK, block * BLOCK + 1000, (block + 1) * BLOCK - 20])
            .collect()
    }
}

fn parent_value(layer: u64, sector: u64) -> u64 {
    0xaaaa_0000_0000_0000 | (layer << 32) | sector
}

pub struct World {
    pub setup: Setup,
    pub all: Requests<Sparse>,
    pub touched: BTreeSet<u64>,
    pub planted: Planted,
    pub parents: Vec<(u32, Sparse)>,
    below: HashMap<u64, u64>,
    pub crashes: u64,
}

pub fn blank(
    kind: Kind,
    blocks: u64,
    room: u64,
    device: Option<u64>,
    dirty: bool,
    parent: Option<Parent>,
) -> Sparse {
    let mut medium = match device {
        Some(length) => Sparse::device(length),
        None if dirty => Sparse::dirty_file(),
        None => Sparse::file(),
    };
    let what = Create {
        kind,
        disk_bytes: blocks * BLOCK * 512,
        room_bytes: (blocks + room) * BLOCK * 512,
        uuid: [9; 16],
        seconds: 1_000_000_000,
        parent,
    };
    create(&mut medium, &what).unwrap();
    medium
}

/// A parent with random holes, and what it holds.
fn parent(setup: &Setup, layer: usize, rng: &mut Rng, below: &mut HashMap<u64, u64>) -> Sparse {
    let raw = layer + 1 == setup.parents && setup.raw_base;
    let sectors = setup.sectors();
    let mut medium = match raw {
        true => Sparse::file(),
        false => blank(Kind::Dynamic, setup.blocks, 0, None, false, None),
    };
    if raw {
        medium.set_length(sectors * 512).unwrap();
    }
    let number = layer as u64 + 1;
    let image: Box<dyn Format> = match raw {
        true => Box::new(Raw::of_sectors(sectors)),
        false => {
            let facts = medium.facts();
            Box::new(Vhd::open_to_write(&mut medium, facts).unwrap())
        }
    };
    let disk = Disk::new(9, vec![(0, image)], false, Limits::default());
    let mut driver = Driver::new(disk, Pages::of_pages(64), HashMap::from([(0, medium)]), 1);
    for window in setup.windows() {
        for first in (window..window + 20).step_by(4).filter(|_| rng.one_in(2)) {
            let data =
                (first..first + 4).flat_map(|sector| sector_of(parent_value(number, sector))).collect();
            driver.run(Op::Write, Extent { sector: first, sectors: 4 }, data).0.unwrap();
            below.extend((first..first + 4).map(|sector| (sector, parent_value(number, sector))));
        }
    }
    driver.close().unwrap();
    driver.media.remove(&0).unwrap()
}

impl World {
    pub fn new(seed: u64, setup: Setup, planted: Planted) -> World {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let mut below = HashMap::new();
        let mut parents = Vec::new();
        if setup.parents > 0 {
            // A full block in a dynamic image hides all below, so only the lowest is dynamic; what lies between is differencing.
            let layer = setup.parents - 1;
            parents.push((setup.parents as u32, parent(&setup, layer, &mut rng, &mut below)));
            for layer in (0..layer).rev() {
                let medium = between(&setup, layer, &parents, &mut rng, &mut below);
                parents.insert(0, (layer as u32 + 1, medium));
            }
        }
        let named =
            (setup.parents > 0).then(|| Parent { uuid: Some([9; 16]), timestamp: 0, path: "./p.vhd".into() });
        let device = setup.device.then_some((setup.blocks + 3) * (BLOCK + 8) * 512 + (64 << 10));
        let mut leaf = blank(setup.kind(), setup.blocks, setup.room, device, setup.dirty_file, named);
        if !setup.batmap {
            let table_bytes = ((setup.blocks + setup.room) * 4).next_multiple_of(512);
            leaf.write(1536 + table_bytes, &[0; 512]).unwrap();
            leaf.sync().unwrap();
        }
        let initial = |sector: u64| below.get(&sector).copied().unwrap_or(0);
        let oracle = Oracle::new((0..setup.sectors()).map(initial));
        let driver = open(&setup, leaf, &parents, seed, planted);
        let touched = setup.windows().iter().flat_map(|&first| first..first + 20).collect();
        let all = Requests::new(driver, oracle);
        World { setup, all, touched, planted, parents, below, crashes: 0 }
    }

    pub fn leaf(&self) -> &Sparse {
        &self.all.driver.media[&0]
    }

    fn random_extent(&mut self) -> Extent {
        let windows = self.setup.windows();
        let rng = &mut self.all.driver.rng;
        if rng.one_in(24) {
            let block = rng.below(self.setup.blocks);
            return Extent { sector: block * BLOCK, sectors: BLOCK };
        }
        let sector = rng.pick(&windows) + rng.below(20);
        // Windows at the end of a block go on into the next.
        let most = if rng.one_in(4) { 30 } else { 8 };
        Extent { sector, sectors: (1 + rng.below(most)).min(self.setup.sectors() - sector) }
    }

    /// Submits a random request.
    pub fn ask(&mut self) {
        let extent = self.random_extent();
        let whole = extent.sectors == BLOCK;
        let op = match self.all.driver.rng.below(20) {
            0..9 => Op::Write,
            9..12 => Op::Read,
            12..14 => Op::Discard,
            14..16 => Op::WriteZeroes,
            _ => Op::Flush,
        };
        let op = if whole && op != Op::Write { Op::Discard } else { op };
        if !whole && op != Op::Flush {
            self.touched.extend(extent.sector..extent.end());
        }
        self.all.begin(op, extent);
    }

    fn look(&self, model: &Model<'_>) {
        model.check(self.setup.batmap);
        for &sector in &self.touched {
            let bytes = match model.sector(sector) {
                Found::Here(bytes) => bytes,
                Found::Parent => sector_of(self.below.get(&sector).copied().unwrap_or(0)),
            };
            let value = value_of(&bytes).unwrap_or_else(|| panic!("sector {sector} is torn"));
            let fine = self.all.oracle.allows(sector, value);
            assert!(fine, "sector {sector} holds {value:x}, of {}", self.all.oracle.describe(sector));
            if self.setup.eager() {
                assert_eq!(
                    model.sector_by_qemu(sector),
                    bytes,
                    "sector {sector} is another to who ignores bitmaps"
                );
            }
        }
    }

    fn crash(&mut self, deep: bool) {
        self.crashes += 1;
        let half_done = self.all.half_done();
        let mut rng = self.all.driver.rng.clone();
        self.all.driver.rng.next();
        let crash: Crash<'_> = self.leaf().crash(&mut rng, &half_done);
        self.look(&Model::new(&crash));
        if deep {
            self.reopen(crash.medium());
        }
    }

    /// Opens what is left, reads it, goes on with it, and closes it.
    fn reopen(&self, medium: Sparse) {
        let mut driver = open(&self.setup, medium, &self.parents, 5, self.planted);
        let all = Extent { sector: 0, sectors: self.setup.sectors() };
        let (result, memory) = driver.run(Op::Read, all, vec![0x11; all.sectors as usize * 512]);
        result.unwrap();
        for (sector, bytes) in (0..).zip(memory.chunks(512)) {
            let value = value_of(bytes).unwrap_or_else(|| panic!("sector {sector} is torn"));
            let fine = self.all.oracle.allows(sector, value);
            assert!(
                fine,
                "sector {sector} reads {value:x} after reopening, of {}",
                self.all.oracle.describe(sector)
            );
        }
        for first in self.setup.windows() {
            let extent = Extent { sector: first, sectors: 3 };
            driver.run(Op::Write, extent, vec![7; 3 * 512]).0.unwrap();
        }
        driver.close().unwrap();
        let model = Model::new(&driver.media[&0]);
        model.check(self.setup.batmap);
        model.check_closed();
        for first in self.setup.windows() {
            assert_eq!(model.sector(first + 2), Found::Here([7; 512]));
            assert!(
                !self.setup.eager() || model.sector_by_qemu(first + 10)[8] != 0xad,
                "stale bytes for qemu"
            );
        }
    }
}

impl Mortal for World {
    type Medium = Sparse;

    fn requests(&mut self) -> &mut Requests<Sparse> {
        &mut self.all
    }

    fn depth(&self) -> u64 {
        self.setup.depth
    }

    fn ask(&mut self) {
        World::ask(self);
    }

    fn crash_and_look(&mut self, deep: bool) {
        self.crash(deep);
    }

    /// Discards whole blocks, without a flush.
    fn before_closing(&mut self) {
        for block in 0..self.setup.blocks {
            if self.all.driver.rng.one_in(2) {
                let extent = Extent { sector: block * BLOCK, sectors: BLOCK };
                let begun = self.all.oracle.begins(extent, Op::Discard, |_| 0);
                let ok = self.all.driver.run(Op::Discard, extent, Vec::new()).0.is_ok();
                self.all.oracle.ends(extent, begun, ok);
            }
        }
    }

    fn look_closed(&mut self) {
        let model = Model::new(self.leaf());
        self.look(&model);
        model.check_closed();
    }
}

/// A differencing image in the middle of a chain.
fn between(
    setup: &Setup,
    layer: usize,
    parents: &[(u32, Sparse)],
    rng: &mut Rng,
    below: &mut HashMap<u64, u64>,
) -> Sparse {
    let named = Parent { uuid: Some([9; 16]), timestamp: 0, path: "./p.vhd".into() };
    let medium = blank(Kind::Differencing, setup.blocks, 0, None, false, Some(named));
    let mut driver = open(setup, medium, parents, 3, Planted::default());
    let number = layer as u64 + 1;
    for window in setup.windows() {
        for first in (window..window + 20).step_by(3).filter(|_| rng.one_in(3)) {
            let data = sector_of(parent_value(number, first)).to_vec();
            driver.run(Op::Write, Extent { sector: first, sectors: 1 }, data).0.unwrap();
            below.insert(first, parent_value(number, first));
        }
    }
    driver.close().unwrap();
    driver.media.remove(&0).unwrap()
}

/// Opens a chain: the leaf is image 0.
pub fn open(
    setup: &Setup,
    mut leaf: Sparse,
    parents: &[(u32, Sparse)],
    seed: u64,
    planted: Planted,
) -> Driver<Sparse> {
    let facts = leaf.facts();
    let mut image = Vhd::open_to_write(&mut leaf, facts).unwrap();
    image.plant(planted);
    image.save_batmap_after(setup.save_after);
    let mut media = HashMap::from([(0, leaf)]);
    let mut images: Vec<(u32, Box<dyn Format>)> = vec![(0, Box::new(image))];
    for (number, medium) in parents {
        let mut medium = medium.clone();
        if *number as usize == setup.parents && setup.raw_base {
            images.push((*number, Box::new(Raw::open(medium.length_bytes()).unwrap())));
        } else {
            images.push((*number, Box::new(Vhd::open(&mut medium).unwrap())));
        }
        media.insert(*number, medium);
    }
    let limits = Limits { requests: 64, payouts: 8, work: 64, bounces: 2, dirty_pages: setup.pages / 2 };
    let disk = Disk::new(1, images, false, limits);
    Driver::new(disk, Pages::of_pages(setup.pages), media, seed)
}
