//! Which event channels are slowed down: those of guests that send events without work, and no others.
#![allow(missing_docs, clippy::unwrap_used)]

mod world;

use std::time::Duration;

use rings::request::operation;
use rings::{Abi, FrontRing, Segment, SharedPages};
use vbdd::pump::{DiskPlan, Pump, RingPlan};
use world::Shared;
use world::hypervisor::SimXen;
use world::journals::SimJournals;
use world::storage::SimStorage;

/// A guest with several requests in flight often has the next one on the ring just when an answer makes us look: its
/// event then finds nothing left to do. However often that happens in a row, it is no storm.
#[test]
fn events_that_come_behind_their_request_delay_nothing() {
    let shared = Shared::new(1);
    shared.preempt.set(false);
    let memory = shared.xen.borrow_mut().create_domain(7, 4);
    let (ring, page, port) = {
        let mut xen = shared.xen.borrow_mut();
        (xen.grant(7, 0, false), xen.grant(7, 1, false), xen.offer_port(7))
    };
    // SAFETY: the guest's own mapping of its frame 0, which `memory` keeps.
    let pages = unsafe { SharedPages::new(memory.page(0), 1) };
    let mut front = FrontRing::create(pages, Abi::X86_64);
    let image = shared.media.borrow_mut().create("/images/0", 100, false);
    let mut storage = SimStorage::new(shared.clone(), 1 << 20);
    let file = storage.open_number(image);
    let mut pump = Pump::new(SimXen(shared.clone()), storage, Box::new(SimJournals(shared.clone())));
    let disk = pump.add_disk(&DiskPlan::new(file, 100, false));
    let plan = RingPlan {
        domain: 7,
        grants: vec![ring],
        remote_port: port,
        abi: Abi::X86_64,
        resume: false,
        journal: "7-0".to_owned(),
    };
    pump.attach(disk, &plan).unwrap();
    let segment = Segment { grant: page, first: 0, last: 7 };
    let mut answers = 0;
    for n in 0..50 {
        front.write(operation::READ, n, 0, &[segment], 1);
        let wanted = front.publish();
        // An answer to an earlier request, or the first look, finds the request; its event comes after.
        while pump.turn(shared.clock.now()) {}
        if wanted {
            shared.xen.borrow_mut().guest_notify(7, port);
        }
        if shared.xen.borrow().readable() {
            pump.take_events();
        }
        while pump.turn(shared.clock.now()) {}
        assert_eq!(pump.deadline(), None, "the port of an honest guest is masked after request {n}");
        while front.take().is_some() {
            answers += 1;
        }
        // The next request is on the ring when this one's answer is published.
        let due = shared.media.borrow().next_due();
        shared.clock.advance_to(due.unwrap_or(0));
    }
    assert!(answers >= 48, "{answers}");
    // Events with nothing behind them are another matter.
    while pump.turn(shared.clock.now() + Duration::from_secs(1)) {}
    for _ in 0..10 {
        shared.xen.borrow_mut().guest_notify(7, port);
        if shared.xen.borrow().readable() {
            pump.take_events();
        }
        while pump.turn(shared.clock.now()) {}
    }
    assert!(pump.deadline().is_some(), "a storm is slowed down");
}
