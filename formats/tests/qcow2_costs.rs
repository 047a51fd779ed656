//! What requests cost: allocations, syncs, metadata writes, look-ups in deep chains.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

#[path = "../../tests/counting/mod.rs"]
mod counting;

use std::collections::VecDeque;

use counting::allocations_here as allocations;
use formats::qcow2::create::{Create, create};
use formats::qcow2::{Options, Qcow2};
use formats::{Disk, Extent, Failure, Format, Limits, Medium, Op, Pages, Payload, Request, Work, WorkKind};

/// Metadata in memory; guests' data are nobody's.
struct Bare(Vec<u8>);

impl Medium for Bare {
    fn length_bytes(&mut self) -> u64 {
        self.0.len() as u64
    }
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        bytes.fill(0);
        let from = (at as usize).min(self.0.len());
        let length = bytes.len().min(self.0.len() - from);
        bytes[..length].copy_from_slice(&self.0[from..from + length]);
        Ok(())
    }
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        let end = at as usize + bytes.len();
        if end > self.0.len() {
            self.0.resize(end, 0);
        }
        self.0[at as usize..end].copy_from_slice(bytes);
        Ok(())
    }
    fn zero(&mut self, _: u64, _: u64) -> Result<(), Failure> {
        Ok(())
    }
    fn set_length(&mut self, length: u64) -> Result<(), Failure> {
        self.0.resize(length as usize, 0);
        Ok(())
    }
    fn sync(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

#[derive(Default, Debug, Clone, Copy, PartialEq)]
struct Counts {
    syncs: u64,
    own_writes: u64,
    guest: u64,
    other: u64,
}

struct Bench {
    disk: Disk,
    pages: Pages,
    media: Vec<Bare>,
    scratch: Vec<u8>,
    work: VecDeque<Work>,
    counts: Counts,
    ended: u64,
}

impl Bench {
    fn new(mut media: Vec<Bare>, pages: usize) -> Bench {
        let images = (0..media.len())
            .map(|number| {
                let options = Options { writable: number == 0, ..Options::default() };
                let image = Qcow2::open(&mut media[number], options).unwrap().0;
                (number as u32, Box::new(image) as Box<dyn Format>)
            })
            .collect();
        let disk = Disk::new(1, images, false, Limits::default());
        let (scratch, work) = (vec![0; 1 << 16], VecDeque::with_capacity(1024));
        Bench {
            disk,
            pages: Pages::of_pages(pages),
            media,
            scratch,
            work,
            counts: Counts::default(),
            ended: 0,
        }
    }

    fn take(&mut self) {
        while let Some(work) = self.disk.next_work() {
            self.work.push_back(work);
        }
        while let Some(outcome) = self.disk.next_outcome() {
            outcome.result.unwrap();
            self.ended += 1;
        }
    }

    fn submit(&mut self, op: Op, sector: u64) {
        let extent = Extent { sector, sectors: 8 };
        assert!(self.disk.submit(&mut self.pages, Request { token: sector, op, extent }));
        self.take();
    }

    fn step(&mut self) -> bool {
        let Some(work) = self.work.pop_front() else { return false };
        let (image, length) = (work.image as usize, work.length_bytes as usize);
        let mut read = 0;
        match (work.kind, work.payload) {
            (WorkKind::Sync, _) => self.counts.syncs += 1,
            (_, Payload::Guest { .. }) => self.counts.guest += 1,
            (WorkKind::Read, _) => {
                read = length;
                self.media[image].read(work.offset_bytes, &mut self.scratch[..length]).unwrap();
            }
            (WorkKind::Write, _) => {
                self.counts.own_writes += 1;
                self.media[image].write(work.offset_bytes, self.disk.bytes(work.id)).unwrap();
            }
            (WorkKind::SetLength, _) => self.media[image].set_length(work.offset_bytes).unwrap(),
            _ => self.counts.other += 1,
        }
        self.disk.done(&mut self.pages, work.id, Ok(()), &self.scratch[..read]);
        self.take();
        true
    }

    fn settle(&mut self) {
        while self.step() {}
        assert_eq!((self.disk.in_flight(), self.disk.stalls), (0, 0));
    }
}

fn image(size_bytes: u64, parent: bool) -> Bare {
    let mut medium = Bare(Vec::new());
    let backing = parent.then(|| ("parent".to_owned(), "qcow2".to_owned()));
    create(&mut medium, &Create { backing, ..Create::new(size_bytes) }).unwrap();
    medium
}

/// Sectors at random, each multiple of 8 at most once.
fn random_sectors(count: u64, sectors: u64) -> impl Iterator<Item = u64> {
    (0..count).map(move |n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (sectors / 8) * 8)
}

#[test]
fn a_thousand_allocating_writes_with_a_flush_after_each_cost_a_thousand_syncs() {
    let sectors = (1 << 30) / 512;
    for (parent, at_most) in [(false, 1_010), (true, 2_010)] {
        let media = if parent {
            vec![image(1 << 30, true), image(1 << 30, false)]
        } else {
            vec![image(1 << 30, false)]
        };
        let mut bench = Bench::new(media, 1024);
        for sector in random_sectors(1000, sectors) {
            bench.submit(Op::Write, sector);
            bench.settle();
            bench.submit(Op::Flush, 0);
            bench.settle();
        }
        println!("alone, parent {parent}: {:?}", bench.counts);
        assert!(bench.counts.syncs <= at_most, "{:?}", bench.counts);
    }
    let mut bench = Bench::new(vec![image(1 << 30, true), image(1 << 30, false)], 1024);
    let mut all = random_sectors(1000, sectors).peekable();
    while all.peek().is_some() {
        for sector in all.by_ref().take(32) {
            bench.submit(Op::Write, sector);
            bench.submit(Op::Flush, 0);
        }
        bench.settle();
    }
    println!("32 at once, over a parent: {:?}", bench.counts);
    assert!(bench.counts.syncs <= 150, "{:?}", bench.counts);
}

#[test]
fn requests_allocate_no_memory_once_tables_have_their_size() {
    let mut bench = Bench::new(vec![image(64 << 20, true), image(64 << 20, false)], 1024);
    let sectors = (64 << 20) / 512;
    let all = |bench: &mut Bench, op: Op| {
        for sector in random_sectors(2000, sectors) {
            bench.submit(op, sector);
            while bench.disk.in_flight() >= 32 {
                assert!(bench.step());
            }
        }
        bench.settle();
    };
    for op in [Op::Write, Op::Read, Op::Write] {
        all(&mut bench, op);
    }
    bench.submit(Op::Flush, 0);
    bench.settle();
    let before = allocations();
    all(&mut bench, Op::Write);
    bench.submit(Op::Flush, 0);
    bench.settle();
    all(&mut bench, Op::Read);
    assert_eq!(allocations(), before, "allocations of 4001 requests");
    // New clusters too, as long as their table is there.
    let before = allocations();
    for sector in (8..sectors).step_by(1024) {
        bench.submit(Op::Write, sector);
        bench.settle();
    }
    println!("{} allocations of {} allocating writes", allocations() - before, sectors / 1024);
    assert!(allocations() - before < 10);
}

#[test]
fn a_read_looks_at_as_few_pages_in_a_chain_of_thirty_as_in_one_image() {
    let size = 64 << 20;
    let sectors = size / 512;
    let mut looked = Vec::new();
    for depth in [1, 30] {
        let mut media: Vec<Bare> = (0..depth).map(|n| image(size, n + 1 < depth)).collect();
        // The last image has everything.
        let base = media.pop().unwrap();
        let mut bench = Bench::new(vec![base], 4096);
        for sector in (0..sectors).step_by(8) {
            bench.submit(Op::Write, sector);
            bench.settle();
        }
        bench.disk.close(&mut bench.pages);
        bench.take();
        bench.settle();
        assert_eq!(bench.disk.closed(), Some(Ok(())));
        media.push(bench.media.pop().unwrap());
        let mut bench = Bench::new(media, 4096);
        for _ in 0..2 {
            bench.pages.counters = Default::default();
            for sector in (0..sectors).step_by(8) {
                bench.submit(Op::Read, sector);
                bench.settle();
            }
        }
        let per_read = bench.pages.counters.hits as f64 / (sectors / 8) as f64;
        println!("depth {depth}: {per_read} pages a read, {} misses", bench.pages.counters.misses);
        looked.push(per_read);
    }
    assert!(looked[1] <= looked[0], "{looked:?}");
}
