//! A chain of QCOW2 images in memory with random requests on it, and the oracle that knows what reads may find.

use std::collections::HashMap;

use formats::qcow2::create::{Create, create};
use formats::qcow2::{Compression, Options, Planted, Qcow2, Shape};
use formats::{Disk, Extent, Format, Limits, Medium, Op, Pages, Raw};

use super::driver::Driver;
use super::medium::SimMedium;
use super::oracle::{Oracle, sector_of};
use super::requests::Requests;
use super::rng::Rng;

#[derive(Clone, Debug)]
pub struct Setup {
    pub shape: Shape,
    pub sectors: u64,
    /// Sectors of the parents, nearest first; the last is raw if `raw_base`.
    pub parents: Vec<u64>,
    pub raw_base: bool,
    pub device: bool,
    pub new_space_is_zero: bool,
    pub pages: usize,
    pub depth: u64,
    pub reserve_bytes: u64,
    /// The file is so long from the start that refcount blocks and a longer refcount table are needed soon.
    pub far: bool,
}

impl Setup {
    pub fn random(rng: &mut Rng) -> Setup {
        let far = rng.one_in(6);
        let version = if rng.one_in(4) { 2 } else { 3 };
        let extended = version == 3 && rng.one_in(4);
        let cluster_bits = if extended { 14 } else { *rng.pick(&[9, 9, 9, 10, 12]) };
        let refcount_order = if version == 2 { 4 } else { *rng.pick(&[0, 1, 2, 3, 4, 4, 5, 6]) };
        let mut shape = Shape { version, cluster_bits, extended, refcount_order };
        if far {
            shape = Shape { version: 3, cluster_bits: 9, extended: false, refcount_order: 6 };
        }
        let sectors = match shape.cluster_bits {
            9 => 60 + rng.below(140),
            14 => 128 + rng.below(128),
            _ => 64 + rng.below(200),
        };
        let parents = (0..rng.below(3)).map(|_| sectors / 2 + rng.below(sectors)).collect();
        let device = !far && rng.one_in(5);
        Setup {
            shape,
            sectors,
            parents,
            raw_base: rng.one_in(2),
            device,
            new_space_is_zero: !device && !rng.one_in(3),
            pages: 8 + rng.below(24) as usize,
            depth: 1 + rng.below(12),
            reserve_bytes: 4096 << rng.below(4),
            far,
        }
    }

    pub fn options(&self, writable: bool) -> Options {
        Options {
            writable,
            reserve_bytes: self.reserve_bytes,
            grows: !self.device,
            new_space_is_zero: self.new_space_is_zero,
        }
    }
}

/// What a parent holds in a sector: never zero, except where it is.
fn parent_value(layer: u64, sector: u64) -> u64 {
    0xaaaa_0000_0000_0000 | (layer << 32) | sector
}

pub struct World {
    pub setup: Setup,
    pub all: Requests<SimMedium>,
    pub planted: Planted,
    pub parents: Vec<(u32, SimMedium)>,
    initial: Vec<u64>,
    pub crashes: u64,
}

/// A parent image with random holes.
fn parent(setup: &Setup, layer: usize, rng: &mut Rng) -> (SimMedium, Vec<Option<u64>>) {
    let sectors = setup.parents[layer];
    let last = layer + 1 == setup.parents.len();
    let mut medium = SimMedium::file();
    let mut values = vec![None; sectors as usize];
    if last && setup.raw_base {
        for sector in 0..sectors {
            let value = if rng.one_in(4) { 0 } else { parent_value(layer as u64 + 1, sector) };
            medium.write(sector * 512, &sector_of(value)).unwrap();
            values[sector as usize] = Some(value);
        }
        medium.sync().unwrap();
        return (medium, values);
    }
    let bits = *rng.pick(&[9, 9, 10, 12]);
    let shape = Shape { version: 3, cluster_bits: bits, extended: false, refcount_order: 4 };
    let backing = (!last).then(|| ("parent".to_owned(), "qcow2".to_owned()));
    let what = Create { shape, size_bytes: sectors * 512, backing, compression: Compression::Zlib };
    create(&mut medium, &what).unwrap();
    let (image, _) = Qcow2::open(&mut medium, Options { writable: true, ..Options::default() }).unwrap();
    let disk = Disk::new(9, vec![(0, Box::new(image) as Box<dyn Format>)], false, Limits::default());
    let mut driver = Driver::new(disk, Pages::of_pages(64), HashMap::from([(0, medium)]), 1);
    let unit = 1 << (bits - 9);
    for first in (0..sectors).step_by(unit) {
        let count = (unit as u64).min(sectors - first);
        let extent = Extent { sector: first, sectors: count };
        match rng.below(3) {
            0 => {
                let value = |sector| parent_value(layer as u64 + 1, sector);
                let data = (first..first + count).flat_map(|sector| sector_of(value(sector))).collect();
                driver.run(Op::Write, extent, data).0.unwrap();
                (first..first + count).for_each(|sector| values[sector as usize] = Some(value(sector)));
            }
            1 => {
                driver.run(Op::WriteZeroes, extent, Vec::new()).0.unwrap();
                // Without a parent to hide, zeroes and nothing are the same.
                (first..first + count).for_each(|sector| values[sector as usize] = Some(0));
            }
            _ => {}
        }
    }
    driver.close().unwrap();
    (driver.media.remove(&0).unwrap(), values)
}

impl World {
    pub fn new(seed: u64, setup: Setup, planted: Planted) -> World {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let parents: Vec<_> = (0..setup.parents.len()).map(|layer| parent(&setup, layer, &mut rng)).collect();
        let initial = |sector: u64| {
            for (_, values) in &parents {
                match values.get(sector as usize) {
                    None => return 0,
                    Some(Some(value)) => return *value,
                    Some(None) => {}
                }
            }
            0
        };
        let initial: Vec<u64> = (0..setup.sectors).map(initial).collect();
        let oracle = Oracle::new(initial.iter().copied());
        let mut leaf = if setup.device { SimMedium::device(1 << 20) } else { SimMedium::file() };
        leaf.new_space_is_zero = setup.new_space_is_zero;
        let backing = (!parents.is_empty()).then(|| ("parent".to_owned(), "raw".to_owned()));
        let size_bytes = setup.sectors * 512;
        let what = Create { shape: setup.shape, size_bytes, backing, compression: Compression::Zlib };
        create(&mut leaf, &what).unwrap();
        if setup.far {
            let entries_times_counts = 64 * 64;
            leaf.set_length((entries_times_counts - rng.below(40)) * 512).unwrap();
            leaf.sync().unwrap();
        }
        let parents: Vec<_> =
            parents.into_iter().zip(1..).map(|((medium, _), number)| (number, medium)).collect();
        let mut driver = open(&setup, leaf, &parents, seed, planted);
        driver.lazy = rng.one_in(3);
        World { setup, all: Requests::new(driver, oracle), planted, parents, initial, crashes: 0 }
    }

    /// Submits a random request.
    pub fn ask(&mut self) {
        let rng = &mut self.all.driver.rng;
        let op = match rng.below(20) {
            0..8 => Op::Write,
            8..12 => Op::Read,
            12..14 => Op::Discard,
            14..16 => Op::WriteZeroes,
            _ => Op::Flush,
        };
        let sectors = self.setup.sectors;
        let sector = rng.below(sectors);
        let most = if rng.one_in(4) { 40 } else { 9 };
        let extent = Extent { sector, sectors: (1 + rng.below(most)).min(sectors - sector) };
        self.all.begin(op, extent);
    }

    /// What the parents hold.
    pub fn below(&self, sector: u64) -> u64 {
        self.initial[sector as usize]
    }

    pub fn leaf(&self) -> &SimMedium {
        &self.all.driver.media[&0]
    }
}

/// Opens a chain.
pub fn open(
    setup: &Setup,
    mut leaf: SimMedium,
    parents: &[(u32, SimMedium)],
    seed: u64,
    planted: Planted,
) -> Driver<SimMedium> {
    let (mut image, _) = Qcow2::open(&mut leaf, setup.options(true)).unwrap();
    image.plant(planted);
    let mut media = HashMap::from([(0, leaf)]);
    let mut images: Vec<(u32, Box<dyn Format>)> = vec![(0, Box::new(image))];
    for (number, medium) in parents {
        let mut medium = medium.clone();
        let last = *number as usize == parents.len();
        if last && setup.raw_base {
            images.push((*number, Box::new(Raw::open(medium.length_bytes()).unwrap())));
        } else {
            let (image, _) = Qcow2::open(&mut medium, Options::default()).unwrap();
            images.push((*number, Box::new(image)));
        }
        media.insert(*number, medium);
    }
    let limits = Limits { requests: 64, payouts: 8, work: 64, bounces: 2, dirty_pages: setup.pages / 2 };
    let disk = Disk::new(1, images, false, limits);
    Driver::new(disk, Pages::of_pages(setup.pages), media, seed)
}
