//! A ring that a predecessor left, and no journal that tells of it.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use rings::{Abi, FrontRing, SharedPages};
use vbdd::journal::{JournalStore, Memory};
use vbdd::pump::{AttachError, DiskPlan, Pump, RingPlan};
use vbdd::storage::{Access, Storage};
use world::Shared;
use world::hypervisor::SimXen;
use world::storage::SimStorage;

/// A state directory without room.
struct NoRoom;

impl JournalStore for NoRoom {
    fn open(&mut self, _: &str, _: usize) -> Option<Memory> {
        None
    }
    fn close(&mut self, _: &str, _: Memory, _: bool) {}
}

/// Attaches a left ring on which `waiting` requests are not answered.
fn attach(waiting: u64, assume_clean: bool) -> Result<(), AttachError> {
    let shared = Shared::new(1);
    shared.preempt.set(false);
    shared.media.borrow_mut().create("/image", 64, false);
    let (memory, ring, port) = {
        let mut xen = shared.xen.borrow_mut();
        let memory = xen.create_domain(1, 1);
        let ring = xen.grant(1, 0, false);
        (memory, ring, xen.offer_port(1))
    };
    // SAFETY: `memory` lives until the end of this function.
    let mut front = FrontRing::create(unsafe { SharedPages::new(memory.page(0), 1) }, Abi::X86_64);
    (0..waiting).for_each(|id| front.write_flush(id));
    let _ = front.publish();
    let mut storage = SimStorage::new(shared.clone(), 1 << 20);
    storage.open(1, "/image", Access::ReadWrite);
    let opened = storage.opened().unwrap().1.unwrap();
    let mut pump = Pump::new(SimXen(shared.clone()), storage, Box::new(NoRoom));
    if assume_clean {
        pump.assume_clean();
    }
    let disk = pump.add_disk(&DiskPlan::new(opened.file, 64, false));
    let grants = vec![ring];
    let journal = "1".to_owned();
    let plan = RingPlan { domain: 1, grants, remote_port: port, abi: Abi::X86_64, resume: true, journal };
    let result = pump.attach(disk, &plan).map(|_| ());
    if result.is_err() {
        let xen = shared.xen.borrow();
        assert_eq!(xen.held(), (0, 0), "nothing is left behind");
    }
    result
}

#[test]
fn an_unrecorded_ring_is_taken_over_only_when_nothing_on_it_is_in_doubt() {
    assert_eq!(attach(0, false), Ok(()));
    assert_eq!(attach(3, false), Err(AttachError::Unrecorded));
    assert_eq!(attach(3, true), Ok(()));
}
