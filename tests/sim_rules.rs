//! Rules of the ring that one hand-made request can show: what is refused, and what must not be read twice.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use std::rc::Rc;

use rings::request::operation::{BARRIER, DISCARD, FLUSH, INDIRECT, READ, WRITE};
use rings::{Abi, FrontRing, Offers, Segment, SharedPages};
use vbdd::hypervisor::GrantRef;
use vbdd::pump::RingPlan;
use vbdd::storage::IoKind;
use world::Shared;
use world::backend::{Backend, Vbd};
use world::memory::GuestMemory;
use world::model::{sector_bytes, stamp_of};

const SECTORS: u64 = 64;
/// Pages of the guest: its ring, three of any use, and one for each segment of the largest request.
const PAGES: usize = 4 + 256;
const INDIRECT_OFFERED: Offers = Offers { indirect_segments: 256, ..Offers::NONE };
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
        Puppet::of(abi, read_only, SECTORS, Offers::NONE)
    }

    fn of(abi: Abi, read_only: bool, sectors: u64, offers: Offers) -> Puppet {
        Puppet::seeded(1, abi, read_only, sectors, offers)
    }

    fn seeded(seed: u64, abi: Abi, read_only: bool, sectors: u64, offers: Offers) -> Puppet {
        let shared = Shared::new(seed);
        shared.preempt.set(false);
        let image = shared.media.borrow_mut().create("/image", sectors as usize, read_only);
        let mut backend = Backend::new(&shared, 4 << 20);
        backend.offers = offers;
        let (memory, ring, page, constant, port) = {
            let mut xen = shared.xen.borrow_mut();
            let memory = xen.create_domain(1, PAGES);
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
        backend.add(Vbd { image, sectors, read_only, rings: vec![plan] });
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
        // The second byte of an indirect request is its inner operation.
        self.answer(if op == INDIRECT { count } else { op })
    }

    /// Sends an indirect request of `count` segments, described in the page `grant`; its status.
    fn ask_indirect(&mut self, op: u8, sector: u64, count: u16, grant: GrantRef) -> i16 {
        self.front.write_indirect(op, 0xABCD, sector, count, &[grant]);
        self.run();
        self.answer(op)
    }

    /// The status of the one answer that must be there.
    fn answer(&mut self, op: u8) -> i16 {
        let response = self.front.take().unwrap();
        assert_eq!((response.id, response.operation, self.front.take()), (0xABCD, op, None));
        response.status
    }

    /// Grants a frame, to be read only or also written.
    fn grant(&self, frame: usize, read_only: bool) -> GrantRef {
        self.shared.xen.borrow_mut().grant(1, frame, read_only)
    }

    /// Writes descriptors into `frame`, granted to be read, as Linux does; the page's reference.
    fn describe(&self, frame: usize, segments: &[Segment]) -> GrantRef {
        for (n, segment) in segments.iter().enumerate() {
            self.memory.write(frame, n * 8, &segment.to_bytes());
        }
        self.grant(frame, true)
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

#[test]
fn an_indirect_request_moves_a_megabyte_in_every_abi() {
    for abi in ABIS {
        let mut guest = Puppet::of(abi, false, 4096, INDIRECT_OFFERED);
        let segments: Vec<Segment> = (0..256).map(|n| whole(guest.grant(4 + n, false))).collect();
        let page = guest.describe(3, &segments);
        for n in 0..2048 {
            guest.memory.write(4 + n / 8, n % 8 * 512, &sector_bytes(7, 100 + n as u64));
        }
        assert_eq!(guest.ask_indirect(WRITE, 100, 256, page), 0);
        (0..256).for_each(|n| guest.memory.write(4 + n, 0, &[0; 4096]));
        assert_eq!(guest.ask_indirect(READ, 98, 256, page), 0);
        for n in 0..2048 {
            let mut bytes = [0; 512];
            guest.memory.read(4 + n / 8, n % 8 * 512, &mut bytes);
            let stamp = if n < 2 { 0 } else { 7 };
            assert_eq!(bytes, sector_bytes(stamp, 98 + n as u64), "{abi:?} {n}");
        }
        assert_eq!(guest.misdeeds(), 0);
        assert_eq!(guest.backend.pump.as_ref().unwrap().storage.pool_used_bytes(), 0);
    }
}

#[test]
fn odd_segments_lie_across_the_pieces_of_their_memory() {
    let mut guest = Puppet::of(Abi::X86_64, false, 4096, INDIRECT_OFFERED);
    // Seven sectors each: 128 KiB end within a segment.
    let segments: Vec<Segment> =
        (0..256).map(|n| Segment { grant: guest.grant(4 + n, false), first: 1, last: 7 }).collect();
    let page = guest.describe(3, &segments);
    for n in 0..256 * 7 {
        guest.memory.write(4 + n / 7, (1 + n % 7) * 512, &sector_bytes(9, n as u64));
    }
    assert_eq!(guest.ask_indirect(WRITE, 0, 256, page), 0);
    (0..256).for_each(|n| guest.memory.write(4 + n, 0, &[0xEE; 4096]));
    assert_eq!(guest.ask_indirect(READ, 0, 256, page), 0);
    for n in 0..256 * 7 {
        let mut bytes = [0; 512];
        guest.memory.read(4 + n / 7, (1 + n % 7) * 512, &mut bytes);
        assert_eq!(bytes, sector_bytes(9, n as u64), "{n}");
        guest.memory.read(4 + n / 7, 0, &mut bytes);
        assert_eq!(bytes, [0xEE; 512], "beside the segment of {n}");
    }
}

#[test]
fn malformed_indirect_requests_are_errors_and_reach_no_disk() {
    for abi in ABIS {
        let mut guest = Puppet::of(abi, false, SECTORS, INDIRECT_OFFERED);
        let fine = whole(guest.page);
        let page = guest.describe(3, &[fine; 300]);
        for count in [0, 257, 300, 512, u16::MAX] {
            assert_eq!(guest.ask_indirect(READ, 0, count, page), -1, "{count} segments");
        }
        for inner in [2, 3, 4, 5, 6, 7, 255] {
            assert_eq!(guest.ask_indirect(inner, 0, 1, page), -1, "inner operation {inner}");
        }
        for sector in [SECTORS - 15, SECTORS, u64::MAX, u64::MAX - 15, 1 << 55] {
            assert_eq!(guest.ask_indirect(WRITE, sector, 2, page), -1, "at {sector}");
        }
        assert_eq!(guest.ask_indirect(READ, 0, 2, 4711), -1, "descriptors that were not granted");
        for at in [0, 1, 7] {
            let mut segments = [fine; 8];
            segments[at] = Segment { grant: guest.page, first: 3, last: 2 };
            let page = guest.describe(3, &segments);
            assert_eq!(guest.ask_indirect(READ, 0, 8, page), -1, "segment {at}");
            segments[at] = whole(4711);
            let page = guest.describe(3, &segments);
            assert_eq!(guest.ask_indirect(WRITE, 0, 8, page), -1, "grant of segment {at}");
        }
        assert_eq!(guest.transfers(), 0);
        assert_eq!(guest.ask_indirect(READ, SECTORS - 16, 2, guest.page), -1, "descriptors that say 0xEE");
        let page = guest.describe(3, &[fine; 2]);
        assert_eq!(guest.ask_indirect(WRITE, SECTORS - 16, 2, page), 0);
        assert_eq!(guest.backend.pump.as_ref().unwrap().storage.pool_used_bytes(), 0);
    }
}

#[test]
fn a_read_only_disk_takes_no_indirect_write() {
    let mut guest = Puppet::of(Abi::X86_32, true, SECTORS, INDIRECT_OFFERED);
    let page = guest.describe(3, &[whole(guest.page)]);
    assert_eq!((guest.ask_indirect(WRITE, 0, 1, page), guest.transfers()), (-1, 0));
    assert_eq!(guest.ask_indirect(READ, 0, 1, page), 0);
}

#[test]
fn xsa_155_descriptors_rewritten_after_they_were_copied_change_nothing() {
    for abi in ABIS {
        let mut guest = Puppet::of(abi, false, SECTORS, INDIRECT_OFFERED);
        let (target, other) = (guest.grant(4, false), guest.grant(5, false));
        guest.memory.write(4, 0, &[0; 4096]);
        guest.memory.write(5, 0, &[0xEE; 4096]);
        let page = guest.describe(3, &[whole(target)]);
        guest.front.write_indirect(READ, 5, 8, 1, &[page]);
        let _ = guest.front.publish();
        guest.shared.xen.borrow_mut().guest_notify(1, guest.port);
        while guest.backend.wants_turn() {
            assert!(guest.backend.turn());
        }
        assert_eq!(guest.transfers(), 1);
        // The data is on its way: now the descriptors name another page, and sectors that no page has.
        guest.memory.write(3, 0, &Segment { grant: other, first: 0, last: 255 }.to_bytes());
        guest.run();
        assert_eq!(guest.front.take().unwrap().status, 0);
        let mut bytes = [0; 512];
        guest.memory.read(4, 7 * 512, &mut bytes);
        assert_eq!(bytes, sector_bytes(0, 15));
        guest.memory.read(5, 0, &mut bytes);
        assert_eq!(bytes, [0xEE; 512], "the other page is untouched");
    }
}

/// The first sector of the disk's eight that a write of one page with `stamp` in it covers.
const PLACE: u64 = 8;

/// Sends five writes of one place at once, with a barrier or a read between any two; what the disk holds then, and what
/// the read saw.
fn overlapping(seed: u64, death: Option<u64>) -> (u64, u64) {
    let offers = Offers { barrier: true, ..INDIRECT_OFFERED };
    let mut guest = Puppet::seeded(seed, ABIS[seed as usize % 3], false, SECTORS, offers);
    let pages: Vec<Segment> = (0..5).map(|n| whole(guest.grant(4 + n, false))).collect();
    for (n, stamp) in [11, 12, 13, 0, 15].into_iter().enumerate() {
        for sector in 0..8 {
            guest.memory.write(4 + n, sector * 512, &sector_bytes(stamp, PLACE + sector as u64));
        }
    }
    guest.front.write(WRITE, 1, PLACE, &pages[..1], 1);
    guest.front.write(BARRIER, 2, PLACE, &pages[1..2], 1);
    guest.front.write(WRITE, 3, PLACE, &pages[2..3], 1);
    guest.front.write(BARRIER, 4, 0, &[], 0);
    guest.front.write(READ, 5, PLACE, &pages[3..4], 1);
    guest.front.write(BARRIER, 6, 0, &[], 0);
    guest.front.write(WRITE, 7, PLACE, &pages[4..5], 1);
    guest.shared.faults.set(world::Faults { latency_us_max: 1000, slow: 200, ..Default::default() });
    guest.shared.countdown.set(death);
    let _ = guest.front.publish();
    guest.shared.xen.borrow_mut().guest_notify(1, guest.port);
    while guest.backend.pump.is_none() || guest.front.unanswered() > 0 {
        if guest.backend.pump.is_none() {
            guest.backend.start();
        } else if guest.backend.wants_turn() {
            guest.backend.turn();
        } else {
            guest.shared.clock.advance_to(guest.backend.wakes_at().unwrap());
        }
        while let Some(response) = guest.front.take() {
            assert_eq!(response.status, 0, "seed {seed}");
        }
    }
    guest.shared.check().unwrap();
    let mut bytes = [0; 512];
    guest.memory.read(7, 0, &mut bytes);
    let seen = stamp_of(&bytes, PLACE).unwrap();
    let media = guest.shared.media.borrow();
    (stamp_of(media.visible(0, PLACE as usize), PLACE).unwrap(), seen)
}

#[test]
fn a_barrier_orders_what_overlaps_it_on_both_sides() {
    for seed in 0..40 {
        assert_eq!(overlapping(seed, None), (15, 13), "seed {seed}");
    }
}

#[test]
fn a_barrier_orders_them_also_for_a_successor() {
    for seed in 0..6 {
        for death in 0..60 {
            assert_eq!(overlapping(seed, Some(death)), (15, 13), "seed {seed}, dead at call {death}");
        }
    }
}

#[test]
fn a_barrier_waits_for_a_hung_write_and_holds_everything_back() {
    let offers = Offers { barrier: true, ..Offers::NONE };
    let mut guest = Puppet::of(Abi::X86_64, false, SECTORS, offers);
    let page = whole(guest.page);
    guest.shared.media.borrow_mut().hang_next = Some(IoKind::Write);
    guest.front.write(WRITE, 1, 0, &[page], 1);
    guest.front.write(BARRIER, 2, 16, &[page], 1);
    guest.front.write(READ, 3, 32, &[page], 1);
    guest.front.write_flush(4);
    guest.run();
    assert_eq!((guest.transfers(), guest.front.take()), (1, None), "nothing but the write was started");
    guest.shared.media.borrow_mut().unhang();
    guest.settle();
    let order: Vec<u64> = std::iter::from_fn(|| guest.front.take()).map(|response| response.id).collect();
    assert_eq!((order[..2].to_vec(), order.len()), (vec![1, 2], 4));
}

#[test]
fn discards_are_refused_where_they_must_be() {
    let offers = Offers { discard: true, ..Offers::NONE };
    for abi in ABIS {
        let mut guest = Puppet::of(abi, false, SECTORS, offers);
        let ask = |guest: &mut Puppet, sector, count, flag| {
            guest.front.write_discard(0xABCD, sector, count, flag);
            guest.run();
            guest.answer(DISCARD)
        };
        for (sector, count) in
            [(0, 0), (SECTORS, 1), (1, SECTORS), (u64::MAX, 2), (2, u64::MAX), (0, 1 << 60)]
        {
            assert_eq!(ask(&mut guest, sector, count, 0), -1, "{sector} {count}");
        }
        assert_eq!(ask(&mut guest, 0, 8, 1), -2, "a secure one");
        assert_eq!(guest.transfers(), 0);
        assert_eq!(ask(&mut guest, 0, SECTORS, 0), 0);
        assert_eq!(ask(&mut guest, 5, 1, 0), 0, "less than a unit");
        guest.shared.media.borrow_mut().no_discard = true;
        assert_eq!(ask(&mut guest, 0, SECTORS, 0), -2, "the medium knows none after all");
        guest.shared.media.borrow_mut().no_discard = false;
        let before = guest.transfers();
        assert_eq!(
            (ask(&mut guest, 0, SECTORS, 0), guest.transfers()),
            (-2, before),
            "and is not asked again"
        );
        let mut guest = Puppet::of(abi, true, SECTORS, offers);
        assert_eq!((ask(&mut guest, 0, 8, 0), guest.transfers(), guest.misdeeds()), (-1, 0, 1), "read-only");
    }
}

#[test]
fn a_flush_waits_for_the_discards_before_it() {
    let offers = Offers { discard: true, ..Offers::NONE };
    let mut guest = Puppet::of(Abi::X86_64, false, SECTORS, offers);
    guest.shared.media.borrow_mut().hang_next = Some(IoKind::Discard { length_bytes: 4096 });
    guest.front.write_discard(1, 8, 8, 0);
    guest.front.write_flush(2);
    guest.run();
    assert_eq!((guest.transfers(), guest.front.take()), (1, None));
    guest.shared.media.borrow_mut().unhang();
    guest.settle();
    assert_eq!(guest.front.take().map(|response| response.id), Some(1));
    assert_eq!(guest.front.take().map(|response| response.id), Some(2));
}

#[test]
fn answers_come_in_the_order_of_taking_where_a_disk_asks_for_it() {
    for abi in ABIS {
        let mut guest = Puppet::of(abi, false, SECTORS, Offers::NONE);
        guest.backend.die();
        guest.backend.in_order = true;
        assert!(guest.backend.start());
        let page = whole(guest.page);
        guest.shared.media.borrow_mut().hang_next = Some(IoKind::Write);
        guest.front.write(WRITE, 1, 0, &[page], 1);
        guest.front.write(READ, 2, 16, &[page], 1);
        guest.front.write(READ, 3, SECTORS, &[page], 1);
        guest.front.write(BARRIER, 4, 0, &[], 0);
        guest.run();
        assert_eq!(guest.front.take(), None, "the first one hangs");
        guest.shared.media.borrow_mut().unhang();
        guest.settle();
        let answers: Vec<(u64, i16)> = std::iter::from_fn(|| guest.front.take())
            .map(|response| (response.id, response.status))
            .collect();
        assert_eq!(answers, [(1, 0), (2, 0), (3, -1), (4, -2)]);
    }
}
