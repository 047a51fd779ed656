//! 200 idle disks of 50 guests in one process, in the simulated world: how long attaching takes, and what each disk holds.
//!
//! `cargo run --release --example many_disks`. The time includes the simulated xenstored, which moves a few bytes at a time; the
//! memory is what the backend gives back when it ends, without its arena for data, the rings' pages, and the journals.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    unreachable_pub,
    dead_code
)]

#[path = "../../tests/backend_world/host.rs"]
mod host;
#[path = "../../tests/world/mod.rs"]
mod world;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering};
use std::time::{Duration, Instant};

use host::Host;
use world::guest::Habits;

struct Counting;

static LIVE_BYTES: AtomicIsize = AtomicIsize::new(0);

fn count(bytes: usize, sign: isize) {
    LIVE_BYTES.fetch_add(sign * isize::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const GUESTS: u16 = 200;

/// What each disk of a backend with these rings holds at rest, in bytes, and how long each took to attach.
fn measured(queues: usize, ring_pages: usize, requests: u32) -> (isize, Duration) {
    let mut host = Host::new(1, 3);
    host.store.quotas.nodes = 20_000;
    host.store.quotas.watches = 1000;
    host.settle();
    let mut disks = Vec::new();
    for guest in 1..=GUESTS {
        let (disk, path) = host.add_image(200);
        host.attach(guest, &path, &[]);
        disks.push(disk);
    }
    let began = Instant::now();
    host.run_until("2", |host| {
        (1..=GUESTS).rev().all(|guest| host.be_node(guest, "state").as_deref() == Some("2"))
    });
    for (guest, disk) in (1..).zip(disks) {
        let habits =
            Habits { queues, ring_pages, requests, depth: 8, indirect: 0, ..Habits::new(guest, disk) };
        host.announce(habits, "3");
    }
    host.run_until("connected", |host| {
        host.backend.as_ref().is_some_and(|backend| backend.totals().connected == usize::from(GUESTS))
    });
    let took = began.elapsed() / u32::from(GUESTS);
    for guest in 1..=GUESTS {
        host.wait_served(guest);
    }
    host.settle();
    host.run_for(Duration::from_secs(60));
    let before = LIVE_BYTES.load(Ordering::Relaxed);
    host.backend = None;
    let freed = before - LIVE_BYTES.load(Ordering::Relaxed);
    (freed / isize::try_from(GUESTS).unwrap_or(1), took)
}

fn main() {
    let threads = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        status.lines().find_map(|line| line.strip_prefix("Threads:").map(|n| n.trim().to_owned()))
    };
    println!("{GUESTS} disks, each used and then at rest");
    for (queues, ring_pages) in [(1, 1), (4, 1), (1, 16), (4, 16)] {
        let (bytes, took) = measured(queues, ring_pages, 16);
        println!(
            "{queues} queues of {ring_pages} pages: {bytes} bytes a disk, attached in {took:?} each, {} threads",
            threads().unwrap_or_default()
        );
    }
}
