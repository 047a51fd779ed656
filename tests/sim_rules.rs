//! Rules of the ring that one hand-made request can show: what is refused, and what must not be read twice.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use std::rc::Rc;

use rings::request::operation::{BARRIER, DISCARD, FLUSH, INDIRECT, READ, WRITE};
use rings::{Abi, FrontRing, Segment, SharedPages};
use vbdd::hypervisor::GrantRef;
use vbdd::pump::RingPlan;
use world::Shared;
use world::backend::{Backend, Vbd};
use world::memory::GuestMemory;
use world::model::sector_bytes;

const SECTORS: u64 = 64;
const ABIS: [Abi; 3] = [Abi::X86_64, Abi::X86_32, Abi::Arm];

/// A guest whose every byte the test decides.
struct Puppet {
    shared: Rc<Shared>,
    backend: Backend,
    memory: Rc<GuestMemory>,
    front: FrontRing,
    /// One writable page and one that may only be read.
    page: GrantRef,
    constant: GrantRef,
    port: u32,
}

impl Puppet {
    fn new(abi: Abi, read_only: bool) -> Puppet {
        let shared = Shared::new(1);
        shared.preempt.set(false);
        let image = shared.media.borrow_mut().create("/image", SECTORS as usize, read_only);
        let mut backend = Backend::new(&shared, 1 << 20);
        let (memory, ring, page, constant, port) = {
            let mut xen = shared.xen.borrow_mut();
            let memory = xen.create_domain(1, 3);
            let ring = xen.grant(1, 0, false);
            (memory, ring, xen.grant(1, 1, false), xen.grant(1, 2, true), xen.offer_port(1))
        };
        // SAFETY: `memory` lives as long as the puppet.
        let front = FrontRing::create(unsafe { SharedPages::new(memory.page(0), 1) }, abi);
        let plan = RingPlan {
            domain: 1,
            grants: vec![ring],
            remote_port: port,
            abi,
            resume: false,
            journal: "1".to_owned(),
        };
        backend.add(Vbd { image, sectors: SECTORS, read_only, rings: vec![plan] });
        assert!(backend.start());
        Puppet { shared, backend, memory, front, page, constant, port }
    }

    /// Publishes what was written, and runs the backend until it rests.
    fn run(&mut self) {
        let _ = self.front.publish();
        self.settle();
    }

    /// Sends an event, and runs the backend until it rests.
    fn settle(&mut self) {
        self.shared.xen.borrow_mut().guest_notify(1, self.port);
        loop {
            while self.backend.wants_turn() {
                assert!(self.backend.turn());
            }
            let Some(at) = self.backend.wakes_at() else { break };
            self.shared.clock.advance_to(at);
        }
        self.shared.check().unwrap();
    }

    /// Sends one request; its status.
    fn ask(&mut self, op: u8, sector: u64, segments: &[Segment], count: u8) -> i16 {
        self.front.write(op, 0xABCD, sector, segments, count);
        self.run();
        let response = self.front.take().unwrap();
        assert_eq!((response.id, self.front.take()), (0xABCD, None));
        response.status
    }

    fn misdeeds(&self) -> u64 {
        self.backend.lines[0].misdeeds
    }

    fn transfers(&self) -> u64 {
        self.shared.media.borrow().transfers
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        self.backend.pump = None;
        self.shared.xen.borrow_mut().process_died();
    }
}

fn whole(grant: GrantRef) -> Segment {
    Segment { grant, first: 0, last: 7 }
}

#[test]
fn a_read_only_disk_takes_no_write_in_any_form() {
    for abi in ABIS {
        let mut guest = Puppet::new(abi, true);
        let page = whole(guest.page);
        assert_eq!(guest.ask(WRITE, 0, &[page], 1), -1);
        assert_eq!(guest.ask(FLUSH, 0, &[page], 1), -1);
        assert_eq!((guest.transfers(), guest.misdeeds()), (0, 2));
        assert_eq!(guest.ask(FLUSH, 0, &[], 0), 0);
        assert_eq!(guest.ask(READ, 0, &[page], 1), 0);
    }
}

#[test]
fn ranges_end_with_the_disk() {
    for abi in ABIS {
        let mut guest = Puppet::new(abi, false);
        let page = whole(guest.page);
        for op in [READ, WRITE, FLUSH] {
            for sector in [SECTORS - 7, SECTORS, u64::MAX, u64::MAX - 7, u64::MAX / 512, (1 << 55) - 1] {
                assert_eq!(guest.ask(op, sector, &[page], 1), -1, "{abi:?} {op} {sector}");
            }
        }
        assert_eq!(guest.transfers(), 0);
        assert_eq!(guest.ask(READ, SECTORS - 8, &[page], 1), 0);
        assert_eq!(guest.ask(WRITE, SECTORS - 8, &[page], 1), 0);
    }
}

#[test]
fn what_is_not_offered_is_unsupported_and_what_is_malformed_an_error() {
    for abi in ABIS {
        let mut guest = Puppet::new(abi, false);
        let page = whole(guest.page);
        for op in [BARRIER, 4, DISCARD, INDIRECT, 7, 255] {
            assert_eq!(guest.ask(op, 0, &[page], 1), -2, "{op}");
        }
        for count in [0, 12, 255] {
            assert_eq!(guest.ask(READ, 0, &[page; 11], count), -1, "{count} segments");
        }
        for (first, last) in [(1, 0), (0, 8), (255, 255)] {
            let segment = Segment { grant: guest.page, first, last };
            assert_eq!(guest.ask(WRITE, 0, &[segment], 1), -1);
        }
        assert_eq!((guest.transfers(), guest.misdeeds()), (0, 12));
    }
}

#[test]
fn grants_decide_what_is_copied() {
    let mut guest = Puppet::new(Abi::X86_64, false);
    let (page, constant) = (whole(guest.page), whole(guest.constant));
    assert_eq!(
        guest.ask(WRITE, 0, &[constant], 1),
        0,
        "a page granted to be read can be written to the disk"
    );
    assert_eq!(guest.ask(READ, 0, &[constant], 1), -1, "and not be read into");
    assert_eq!(guest.ask(READ, 0, &[page, whole(4711)], 2), -1);
    let before = guest.transfers();
    assert_eq!(guest.ask(WRITE, 0, &[page, whole(4711)], 2), -1);
    assert_eq!(guest.transfers(), before, "a write of which a part is missing does not reach the disk");
    assert_eq!(guest.misdeeds(), 3);
}

#[test]
fn a_slot_rewritten_after_it_was_taken_changes_nothing() {
    for abi in ABIS {
        let mut guest = Puppet::new(abi, false);
        let page = whole(guest.page);
        guest.front.write(READ, 5, 8, &[page], 1);
        let _ = guest.front.publish();
        guest.shared.xen.borrow_mut().guest_notify(1, guest.port);
        // The backend takes it, and storage has it; then the whole ring but its indices becomes junk.
        while guest.backend.wants_turn() {
            assert!(guest.backend.turn());
        }
        assert_eq!(guest.transfers(), 1);
        guest.memory.write(0, 64, &[0xFF; 4032]);
        guest.run();
        let response = guest.front.take().unwrap();
        assert_eq!((response.id, response.operation, response.status), (5, READ, 0));
        let mut bytes = [0; 512];
        guest.memory.read(1, 7 * 512, &mut bytes);
        assert_eq!(bytes, sector_bytes(0, 15));
    }
}

#[test]
fn responses_carry_nothing_but_what_they_say() {
    for abi in ABIS {
        let mut guest = Puppet::new(abi, false);
        let stride = if abi == Abi::X86_32 { 108 } else { 112 };
        let length = if abi == Abi::X86_32 { 12 } else { 16 };
        for n in 0..40 {
            let entry = 64 + (n % 32) * stride;
            let page = whole(guest.page);
            guest.front.write(if n % 2 == 0 { READ } else { DISCARD }, n as u64, 0, &[page], 1);
            guest.run();
            assert_eq!(guest.front.take().unwrap().id, n as u64);
            let mut bytes = [0; 16];
            guest.memory.read(0, entry, &mut bytes);
            assert_eq!(bytes[9], 0, "the byte between operation and status");
            assert!(bytes[12..length].iter().all(|byte| *byte == 0), "{abi:?} {bytes:?}");
        }
    }
}

#[test]
fn an_overrun_ends_the_ring_and_is_told_once() {
    let mut guest = Puppet::new(Abi::X86_64, false);
    assert_eq!(guest.ask(FLUSH, 0, &[], 0), 0);
    for producer in [1000, 2, 33] {
        guest.front.force_request_producer(producer);
        guest.settle();
    }
    assert_eq!((guest.misdeeds(), guest.front.take()), (1, None), "not even what looks right is taken again");
    let queue = guest.backend.lines[0].queue.unwrap();
    guest.backend.with(|pump| pump.close(queue));
    guest.settle();
    assert!(guest.backend.lines[0].drained);
}
