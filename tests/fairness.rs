//! One guest that floods its ring beside one that sends a request at a time: in virtual time, on devices of limited speed.
//!
//! The model is in `tests/world/device.rs` and in `docs/design/hostile.md`: flash that works on 32 commands at once behind a
//! bus of 2 GB/s, or a spinning disk that does one thing after the other; the processor is as slow as [`Cost`] says.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation
)]

mod world;

use std::cell::RefCell;
use std::rc::Rc;

use rings::request::operation::{READ, WRITE};
use rings::{Abi, FrontRing, Offers, Segment, SharedPages};
use vbdd::hypervisor::GrantRef;
use vbdd::pump::RingPlan;
use world::backend::{Backend, Vbd};
use world::device::{Device, Speed};
use world::memory::GuestMemory;
use world::{Actor, Shared};

/// Sectors of every image: 4 MiB.
const SECTORS: u64 = 8192;

/// What comes before is not counted.
const WARM_UP_US: u64 = 500_000;

/// What the processor needs, in nanoseconds.
struct Cost;

impl Cost {
    /// A wake-up of the process, with its system calls.
    const TURN: u64 = 5_000;
    /// A grant copy of a page, in a batch.
    const COPY: u64 = 400;
}

/// What a guest sends.
#[derive(Clone, Copy, Debug)]
struct Load {
    op: u8,
    /// Pages of each request; more than 11 make it an indirect one.
    pages: usize,
    depth: usize,
    ring_pages: usize,
    queues: usize,
    device: usize,
}

const VICTIM: Load = Load { op: READ, pages: 1, depth: 1, ring_pages: 1, queues: 1, device: 0 };
const FLOOD: Load = Load { op: READ, pages: 256, depth: 256, ring_pages: 16, queues: 1, device: 0 };

struct Queue {
    front: FrontRing,
    grants: Vec<GrantRef>,
    port: u32,
    sent_us: Vec<Option<u64>>,
    in_flight: usize,
}

/// A guest that keeps so many requests in flight, and notes how long each took.
struct Sender {
    domain: u16,
    load: Load,
    queues: Vec<Queue>,
    pages: Vec<Segment>,
    descriptors: GrantRef,
    place: u64,
    latencies_us: Rc<RefCell<Vec<u64>>>,
    _memory: Rc<GuestMemory>,
}

impl Sender {
    fn new(shared: &Shared, domain: u16, load: Load) -> Sender {
        let mut xen = shared.xen.borrow_mut();
        let rings = load.queues * load.ring_pages;
        let memory = xen.create_domain(domain, rings + 1 + load.pages);
        let queues = (0..load.queues).map(|n| {
            let base = n * load.ring_pages;
            let grants = (0..load.ring_pages).map(|page| xen.grant(domain, base + page, false)).collect();
            // SAFETY: the frames lie one behind the other in the guest's mapping, which this value keeps.
            let pages = unsafe { SharedPages::new(memory.page(base), load.ring_pages) };
            Queue {
                front: FrontRing::create(pages, Abi::X86_64),
                grants,
                port: xen.offer_port(domain),
                sent_us: vec![None; load.depth],
                in_flight: 0,
            }
        });
        let queues = queues.collect();
        let descriptors = xen.grant(domain, rings, true);
        let pages: Vec<Segment> = (0..load.pages)
            .map(|n| Segment { grant: xen.grant(domain, rings + 1 + n, false), first: 0, last: 7 })
            .collect();
        for (n, segment) in pages.iter().enumerate() {
            memory.write(rings, n * 8, &segment.to_bytes());
        }
        let latencies_us = Rc::default();
        Sender { domain, load, queues, pages, descriptors, place: 0, latencies_us, _memory: memory }
    }

    fn rings(&self) -> Vec<RingPlan> {
        let plan = |(n, queue): (usize, &Queue)| RingPlan {
            domain: self.domain,
            grants: queue.grants.clone(),
            remote_port: queue.port,
            abi: Abi::X86_64,
            resume: false,
            journal: format!("{}-{n}", self.domain),
        };
        self.queues.iter().enumerate().map(plan).collect()
    }
}

impl Actor for Sender {
    fn act(&mut self, shared: &Shared) -> bool {
        let now = shared.clock.now_us();
        let mut any = false;
        for queue in &mut self.queues {
            let _ = shared.xen.borrow_mut().guest_event(self.domain, queue.port);
            while let Some(response) = queue.front.take() {
                assert_eq!(response.status, 0, "guest {}", self.domain);
                let sent = queue.sent_us[response.id as usize].take().unwrap();
                // At first the device is being measured.
                if now > WARM_UP_US {
                    self.latencies_us.borrow_mut().push(now - sent);
                }
                queue.in_flight -= 1;
                any = true;
            }
            let mut sent = false;
            if queue.in_flight == self.load.depth {
                continue;
            }
            for id in 0..self.load.depth {
                if queue.sent_us[id].is_some() || queue.front.free() == 0 {
                    continue;
                }
                let sectors = self.load.pages as u64 * 8;
                self.place = (self.place + sectors) % (SECTORS - sectors);
                if self.load.pages > 11 {
                    let count = self.load.pages as u16;
                    let pages = [self.descriptors];
                    queue.front.write_indirect(self.load.op, id as u64, self.place, count, &pages);
                } else {
                    queue.front.write(
                        self.load.op,
                        id as u64,
                        self.place,
                        &self.pages,
                        self.load.pages as u8,
                    );
                }
                queue.sent_us[id] = Some(now);
                queue.in_flight += 1;
                sent = true;
            }
            if sent && queue.front.publish() {
                shared.xen.borrow_mut().guest_notify(self.domain, queue.port);
            }
            any |= sent;
        }
        any
    }

    fn finished(&self) -> bool {
        true
    }

    fn domain(&self) -> u16 {
        self.domain
    }

    fn describe(&self) -> String {
        format!("sender {}", self.domain)
    }
}

/// What came of a run.
struct Outcome {
    /// 99 of 100 requests of the victim took no longer, in microseconds.
    p99_us: u64,
    /// Bytes that each guest moved, the victim's first.
    moved: Vec<u64>,
    seconds: f64,
}

/// Runs guests, the first of them the victim, until it has sent `count` requests.
fn run(speeds: &[Speed], loads: &[Load], count: usize) -> Outcome {
    let shared = Shared::new(1);
    shared.preempt.set(false);
    let mut backend = Backend::new(&shared, 64 << 20);
    backend.offers = Offers { indirect_segments: 256, ..Offers::NONE };
    shared.media.borrow_mut().devices = speeds.iter().map(|speed| Device::new(*speed)).collect();
    let mut latencies = Vec::new();
    for (n, load) in loads.iter().enumerate() {
        let image = shared.media.borrow_mut().create(&format!("/{n}"), SECTORS as usize, false);
        shared.media.borrow_mut().device_of.insert(image, load.device);
        let guest = Sender::new(&shared, n as u16 + 1, *load);
        latencies.push(guest.latencies_us.clone());
        backend.add(Vbd { image, sectors: SECTORS, read_only: false, rings: guest.rings() });
        shared.guests.borrow_mut().push(Box::new(guest));
    }
    assert!(backend.start());
    // Guests run all the time, also while the process copies.
    shared.eager.set(true);
    shared.xen.borrow_mut().copy_ns = Cost::COPY;
    while latencies[0].borrow().len() < count {
        let acted = shared.guests.borrow_mut().iter_mut().fold(false, |any, guest| guest.act(&shared) | any);
        if backend.wants_turn() {
            shared.clock.advance_to(shared.clock.now_us() + Cost::TURN / 1000);
            assert!(backend.turn());
        } else if !acted {
            let next = backend.wakes_at().expect("the world stands still");
            shared.clock.advance_to(next);
        }
    }
    shared.check().unwrap();
    let mut all = latencies[0].borrow().clone();
    all.sort_unstable();
    let p99_us = all[all.len() * 99 / 100];
    let bytes = |(n, load): (usize, &Load)| latencies[n].borrow().len() as u64 * load.pages as u64 * 4096;
    let moved = loads.iter().enumerate().map(bytes).collect();
    let seconds = (shared.clock.now_us() - WARM_UP_US) as f64 / 1e6;
    shared.guests.borrow_mut().clear();
    backend.pump = None;
    shared.xen.borrow_mut().process_died();
    Outcome { p99_us, moved, seconds }
}

/// The victim among others has a p99 of at most three times its own alone.
fn is_fair(name: &str, speeds: &[Speed], victim: Load, others: &[Load]) -> Outcome {
    let alone = run(speeds, &[victim], 500);
    let mut loads = vec![victim];
    loads.extend(others);
    let among = run(speeds, &loads, 1000);
    let rates: Vec<String> =
        among.moved.iter().map(|moved| format!("{:.0}", *moved as f64 / among.seconds / 1e6)).collect();
    println!("{name}: alone {} us, among others {} us; MB/s {}", alone.p99_us, among.p99_us, rates.join(" "));
    assert!(
        among.p99_us <= 3 * alone.p99_us,
        "{name}: {} us alone, {} us among others",
        alone.p99_us,
        among.p99_us
    );
    among
}

#[test]
fn a_victim_beside_one_flood() {
    for pages in [1, 11, 256] {
        for op in [READ, WRITE] {
            for victim in [Load { op: READ + WRITE - op, ..VICTIM }, Load { pages: 11, ..VICTIM }] {
                let name = format!("{victim:?} beside {pages} pages, operation {op}");
                is_fair(&name, &[Speed::FLASH], victim, &[Load { op, pages, ..FLOOD }]);
            }
        }
    }
}

#[test]
fn a_victim_beside_several_floods() {
    for count in [2, 8] {
        for pages in [1, 11, 256] {
            let floods = vec![Load { pages, ..FLOOD }; count];
            let among =
                is_fair(&format!("{count} floods of {pages} pages"), &[Speed::FLASH], VICTIM, &floods);
            let (least, most) = (among.moved[1..].iter().min(), among.moved[1..].iter().max());
            assert!(
                most.unwrap() * 4 <= least.unwrap() * 5,
                "floods are not served alike: {:?}",
                among.moved
            );
        }
    }
}

#[test]
fn floods_of_small_and_of_large_requests_get_the_same_share() {
    // A small transfer counts 16 KiB more than its bytes, so 4 KiB of 1 MiB requests go with 4 KiB of 20.
    let floods = [Load { pages: 256, ..FLOOD }, Load { pages: 11, ..FLOOD }];
    let among = is_fair("large and small", &[Speed::FLASH], VICTIM, &floods);
    let (large, small) = (among.moved[1] * 144 / 128, among.moved[2] * 60 / 44);
    assert!(large * 4 <= small * 5 && small * 4 <= large * 5, "{large} {small}");
}

#[test]
fn queues_give_a_guest_no_more() {
    let floods =
        [Load { queues: 8, pages: 11, ring_pages: 1, depth: 32, ..FLOOD }, Load { pages: 11, ..FLOOD }];
    let among = is_fair("eight queues and one", &[Speed::FLASH], VICTIM, &floods);
    let (many, one) = (among.moved[1], among.moved[2]);
    assert!(many * 4 <= one * 5, "{many} {one}");
}

#[test]
fn a_slow_device_is_given_little_at_once() {
    for count in [1, 3] {
        for pages in [1, 11, 256] {
            let floods = vec![Load { pages, ..FLOOD }; count];
            is_fair(
                &format!("{count} floods of {pages} pages, spinning"),
                &[Speed::SPINNING],
                VICTIM,
                &floods,
            );
        }
    }
}

#[test]
fn disks_on_different_devices_do_not_wait_for_each_other() {
    let other = Load { device: 1, ..FLOOD };
    let speeds = [Speed::FLASH, Speed::SPINNING];
    is_fair("a flood on another device", &speeds, VICTIM, &[other, other]);
    is_fair("floods on both", &speeds, VICTIM, &[other, FLOOD]);
    let victim = Load { device: 1, ..VICTIM };
    is_fair("a victim on the slow one", &speeds, victim, &[FLOOD, FLOOD]);
}

#[test]
fn a_guest_alone_gets_what_the_device_can_do() {
    for (pages, least) in [(1, 1000), (11, 1800), (256, 1900)] {
        let alone = run(&[Speed::FLASH], &[Load { pages, ..FLOOD }], 4000);
        let rate = alone.moved[0] as f64 / alone.seconds / 1e6;
        println!("alone, {pages} pages: {rate:.0} MB/s");
        assert!(rate > f64::from(least), "{pages} pages: {rate:.0} MB/s");
    }
}
