//! The security advisories about rings, grants and event channels, each against the whole backend in the simulated world.
//! What each is about, and the rows that need no code: `docs/design/hostile.md`.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

#[path = "backend_world/host.rs"]
mod host;
mod hostile_support;
mod world;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use host::Host;
use hostile_support::lines;
use hostile_support::neighbour::{ABIS, NEIGHBOUR, ends_well, host, puppet};
use hostile_support::puppet::{DOMAIN, Meddler, Puppet};
use rings::request::operation::{BARRIER, DISCARD, FLUSH, INDIRECT, READ, WRITE};
use rings::{Abi, BackRing, FrontRing, LARGEST_STRIDE, Offers, Segment, SharedPages};
use vbdd::storage::Storage as _;
use world::Faults;
use world::model::sector_bytes;

/// A sector of the hostile guest's image as a reader would find it.
fn sector(host: &Host, sector: usize) -> [u8; 512] {
    *host.shared.media.borrow().visible(1, sector)
}

/// A slot of the ring page as the frontend wrote it.
fn slot_bytes(puppet: &Puppet, n: usize) -> Vec<u8> {
    let stride = if puppet.abi == Abi::X86_32 { 108 } else { 112 };
    let mut bytes = vec![0; stride];
    puppet.memory.read(0, 64 + n * stride, &mut bytes);
    bytes
}

#[test]
fn xsa_155_a_slot_rewritten_at_every_call_of_the_backend_is_one_request_or_the_other() {
    let mut seen = [0_u32; 2];
    for abi in ABIS {
        let (mut host, mut puppet) = puppet(abi, "w");
        let meddler =
            Meddler { domain: DOMAIN, memory: puppet.memory.clone(), writes: std::rc::Rc::default() };
        let writes = meddler.writes.clone();
        host.shared.guests.borrow_mut().push(Box::new(meddler));
        host.shared.eager.set(true);
        for n in 0..200_u8 {
            let (frame, other) = (puppet.frame(0), puppet.frame(1));
            puppet.memory.write(frame, 0, &[n, 1].repeat(2048));
            puppet.memory.write(other, 0, &[n, 2].repeat(2048));
            let before = [sector(&host, 8), sector(&host, 16)];
            let slot = usize::from(n) % 32;
            let stride = if abi == Abi::X86_32 { 108 } else { 112 };
            let first = puppet.whole(0);
            puppet.front.write(WRITE, 1, 8, &[first], 1);
            let honest = slot_bytes(&puppet, slot);
            // The same slot with another page, another place, another name; and one that makes no sense at all.
            let mut changed = honest.clone();
            let (id, at, grant) = if abi == Abi::X86_32 { (4, 12, 20) } else { (8, 16, 24) };
            changed[id] = 2;
            changed[at] = 16;
            changed[grant..grant + 4].copy_from_slice(&puppet.pages[1].to_le_bytes());
            writes.borrow_mut().clear();
            for _ in 0..=n % 3 {
                writes.borrow_mut().push_back((0, 64 + slot * stride, changed.clone()));
            }
            writes.borrow_mut().push_back((0, 64 + slot * stride, honest));
            let _ = puppet.front.publish();
            puppet.kick(&host);
            // Until the response is there: then its slot is no request any more.
            let answered = |puppet: &Puppet| {
                let mut produced = [0; 4];
                puppet.memory.read(0, 8, &mut produced);
                u32::from_le_bytes(produced) == u32::from(n) + 1
            };
            let mut rounds = 0;
            while !answered(&puppet) {
                host.round();
                rounds += 1;
                assert!(rounds < 10_000);
            }
            writes.borrow_mut().clear();
            let after = [sector(&host, 8), sector(&host, 16)];
            if after[0] == before[0] {
                assert_eq!(after[1][..2], [n, 2], "refused, or mixed of two: {n}");
                seen[1] += 1;
            } else {
                assert_eq!((&after[0][..2], after[1]), (&[n, 1][..], before[1]), "mixed of two: {n}");
                seen[0] += 1;
            }
            while puppet.front.take().is_some() {}
        }
        host.shared.eager.set(false);
        ends_well(host);
    }
    assert!(seen.iter().all(|count| *count > 60), "{seen:?}: the rewriting was never in time, or always");
}

#[test]
fn xsa_155_a_slot_rewritten_by_another_processor_is_parsed_from_one_copy() {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    for abi in ABIS {
        let page = Box::leak(Box::new(Page([0; 4096])));
        let base = page.0.as_mut_ptr();
        // SAFETY: the page is never freed; both ends and the thread below access it as shared memory is.
        let pages = || unsafe { SharedPages::new(base, 1) };
        let mut front = FrontRing::create(pages(), abi);
        let mut back = BackRing::attach(pages(), abi);
        let stop = AtomicBool::new(false);
        let address = base as usize;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut n = 0_u8;
                while !stop.load(Ordering::Relaxed) {
                    n = n.wrapping_add(1);
                    for at in 64..4096 {
                        let value = if at % 7 == 0 { n } else { n & 7 };
                        // SAFETY: within the page; a volatile write to memory that is shared by design.
                        unsafe { (address as *mut u8).add(at).write_volatile(value) };
                    }
                }
            });
            let mut parsed = 0_u32;
            for _ in 0..20_000 {
                front.write(READ, 7, 3, &[Segment { grant: 9, first: 0, last: 7 }], 1);
                let _ = front.publish();
                back.look().unwrap();
                let slot = back.take().unwrap();
                let (one, two) = (slot.parse(&Offers::NONE), slot.parse(&Offers::NONE));
                assert_eq!(one, two, "two readings of one slot differ");
                if let Ok(request) = one {
                    parsed += 1;
                    assert!(request.segments.iter(&[]).all(|it| it.first <= it.last && it.last <= 7));
                    assert_eq!(request.id, slot.id());
                }
                assert!(back.respond(slot.id(), slot.response_operation(), rings::Status::Error));
                let _ = back.publish();
                let _ = front.take();
            }
            stop.store(true, Ordering::Relaxed);
            assert!(parsed > 0);
        });
    }
}

#[test]
fn xsa_216_every_kind_of_response_is_zero_where_it_says_nothing() {
    for abi in ABIS {
        let (mut host, mut puppet) = puppet(abi, "w");
        let (stride, length) = if abi == Abi::X86_32 { (108, 12) } else { (112, 16) };
        let whole = puppet.whole(0);
        let bad = Segment { grant: 0xFFFF, ..whole };
        let kinds: [(u8, &[Segment], u8); 7] = [
            (READ, &[whole], 1),
            (WRITE, &[bad], 1),
            (WRITE, &[whole], 1),
            (FLUSH, &[], 0),
            (99, &[], 0),
            (READ, &[], 200),
            (DISCARD, &[], 0),
        ];
        for n in 0..70 {
            let (op, segments, count) = kinds[n % 7];
            puppet.front.write(op, u64::MAX, 0, segments, count);
            // Whatever else the slot holds would be seen again if it were copied back.
            let place = 64 + (n % 32) * stride;
            puppet.memory.write(0, place + stride - 8, &[0xEE; 8]);
            let answer = puppet.answers(&mut host, 1)[0];
            assert_eq!(answer.id, u64::MAX);
            let mut bytes = [0; 16];
            puppet.memory.read(0, place, &mut bytes);
            assert_eq!(bytes[9], 0);
            assert!(bytes[12..length].iter().all(|byte| *byte == 0), "{abi:?} {op}: {bytes:?}");
        }
        ends_well(host);
    }
}

#[test]
fn xsa_142_a_disk_in_mode_r_takes_nothing_that_changes_it() {
    for abi in ABIS {
        let (mut host, mut puppet) = puppet(abi, "r");
        assert_eq!(host.be_node(DOMAIN, "info").as_deref(), Some("4"));
        let whole = puppet.whole(0);
        for op in [WRITE, FLUSH, BARRIER, DISCARD, INDIRECT] {
            let status = puppet.ask(&mut host, op, 0, &[whole], 1);
            assert!(status < 0, "{op} was answered {status}");
        }
        // An indirect write and a discard as they really look: the second byte is the inner operation, or a flag.
        for op in [INDIRECT, DISCARD] {
            let mut slot = [0; LARGEST_STRIDE];
            slot[..4].copy_from_slice(&[op, WRITE, 1, 0]);
            let (at, grants) = if abi == Abi::X86_32 { (20, 24) } else { (24, 28) };
            slot[at] = 8;
            slot[grants..grants + 4].copy_from_slice(&puppet.pages[1].to_le_bytes());
            puppet.front.write_raw(&slot);
            assert!(puppet.answers(&mut host, 1)[0].status < 0);
        }
        for n in 0..64 {
            assert_eq!(sector(&host, n), sector_bytes(0, n as u64), "sector {n} has changed");
        }
        assert_eq!(puppet.ask(&mut host, FLUSH, 0, &[], 0), 0);
        assert_eq!(puppet.ask(&mut host, READ, 0, &[whole], 1), 0);
        // Nor does the guest's own word open it.
        host.set_fe(DOMAIN, &[("mode", "w"), ("state", "4")]);
        host.run_for(Duration::from_secs(1));
        assert_eq!(puppet.ask(&mut host, WRITE, 0, &[whole], 1), -1);
        ends_well(host);
    }
}

#[test]
fn xsa_332_a_storm_of_events_is_let_through_less_and_less() {
    let (mut host, puppet) = puppet(Abi::X86_64, "w");
    host.wait_served(NEIGHBOUR);
    host.settle();
    let before = host.turns;
    // An event each 50 us for 10 s: 200 000.
    for _ in 0..200_000 {
        puppet.kick(&host);
        let _ = host.turn_if_due();
        host.shared.clock.advance_to(host.shared.clock.now_us() + 50);
    }
    let turns = host.turns - before;
    assert!((60..300).contains(&turns), "{turns} turns");
    ends_well(host);
}

#[test]
fn xsa_361_362_365_one_bad_page_of_a_ring_means_no_ring() {
    for bad in 0..4 {
        let (mut host, path) = host();
        host.attach(DOMAIN, &path, &[]);
        host.wait_be(DOMAIN, "2");
        let mut puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 4);
        match bad {
            // Never granted; granted and taken back; to be read only; somebody else's number.
            0 => puppet.ring[3] = 4711,
            1 => host.shared.xen.borrow_mut().revoke(DOMAIN, puppet.ring[2]),
            2 => puppet.ring[1] = puppet.constant,
            _ => puppet.ring[0] = u32::MAX,
        }
        puppet.announce(&mut host, "3");
        host.wait_be(DOMAIN, "6");
        assert_eq!(host.shared.xen.borrow().maps_of(DOMAIN), 0);
        assert!(host.be_node(DOMAIN, "error").is_some());
        ends_well(host);
    }
}

#[test]
fn xsa_361_362_365_the_status_of_every_copied_segment_counts() {
    let (mut host, mut puppet) = puppet(Abi::X86_64, "w");
    for bad in 0..11 {
        for op in [WRITE, READ] {
            let mut segments: Vec<Segment> =
                (0..11).map(|n| puppet.whole(n)).map(|it| Segment { last: 0, ..it }).collect();
            segments[bad].grant = if op == WRITE { 60_000 } else { puppet.constant };
            let before: Vec<[u8; 512]> = (0..11).map(|n| sector(&host, n)).collect();
            assert_eq!(puppet.ask(&mut host, op, 0, &segments, 11), -1, "segment {bad}");
            let after: Vec<[u8; 512]> = (0..11).map(|n| sector(&host, n)).collect();
            assert_eq!(before, after, "a write of which a part is missing reached the disk");
        }
    }
    ends_well(host);
}

#[test]
fn xsa_316_318_failing_calls_leave_nothing_mapped_or_half_done() {
    for (map, bind) in [(1, 0), (0, 1), (3, 0), (0, 3), (2, 2)] {
        let (mut host, path) = host();
        host.attach(DOMAIN, &path, &[]);
        host.wait_be(DOMAIN, "2");
        let mut puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
        {
            let mut xen = host.shared.xen.borrow_mut();
            (xen.fail_map, xen.fail_bind) = (map, bind);
        }
        puppet.announce(&mut host, "3");
        host.run_for(Duration::from_millis(1));
        host.run_until("the failure was met", |host| {
            let xen = host.shared.xen.borrow();
            assert!(xen.maps_of(DOMAIN) <= 1);
            xen.fail_map + xen.fail_bind < map + bind
        });
        // What failed for the machine's own reason is tried again, and is served in the end.
        host.wait_be(DOMAIN, "4");
        let whole = puppet.whole(0);
        let faults = host.shared.faults.get();
        host.shared.faults.set(Faults { copy_batch: 1024, ..faults });
        assert_eq!(puppet.ask(&mut host, WRITE, 0, &[whole], 1), -1);
        assert_eq!(sector(&host, 0), sector_bytes(0, 0));
        host.shared.faults.set(faults);
        assert_eq!(puppet.ask(&mut host, WRITE, 0, &[whole], 1), 0);
        // The neighbour may have met failed copies: it knows.
        host.run_until("neighbour served", |host| host.guest_finished(NEIGHBOUR));
        ends_well(host);
    }
}

#[test]
fn xsa_371_xsa_71_no_way_to_end_leaves_a_grant_mapped() {
    for way in 0..7 {
        for after_us in [0, 30, 200, 700] {
            let (mut host, mut puppet) = puppet(Abi::X86_64, "w");
            host.shared.faults.set(Faults { latency_us_max: 3000, ..Faults::default() });
            for n in 0..30 {
                let whole = puppet.whole(n % 16);
                puppet.front.write([READ, WRITE, FLUSH][n % 3], n as u64, 0, &[whole], 1);
            }
            let _ = puppet.front.publish();
            puppet.kick(&host);
            host.run_for(Duration::from_micros(after_us));
            let (be, fe) = (host.be(DOMAIN), Host::fe(DOMAIN));
            match way {
                0 => host.set_fe(DOMAIN, &[("state", "6")]),
                1 => host.set_be(DOMAIN, &[("online", "0"), ("state", "5")]),
                2 => host.store.remove(0, &fe).unwrap(),
                3 => host.store.remove(0, &be).unwrap(),
                4 => host.destroy_domain(DOMAIN),
                5 => puppet.front.force_request_producer(77_777),
                _ => {
                    host.kill();
                    host.start();
                }
            }
            if way == 1 || way == 5 {
                puppet.kick(&host);
                host.run_for(Duration::from_millis(20));
                host.set_fe(DOMAIN, &[("state", "6")]);
            }
            if way == 4 {
                let _ = host.store.remove(0, &fe);
            }
            if way == 6 {
                host.run_for(Duration::from_millis(20));
                host.set_fe(DOMAIN, &[("state", "6")]);
            }
            host.run_until("unmapped", |host| host.shared.xen.borrow().maps_of(DOMAIN) == 0);
            host.shared.faults.set(Faults { latency_us_max: 300, ..Faults::default() });
            ends_well(host);
        }
    }
}

#[test]
fn xsa_229_218_xsa_376_391_396_403_nothing_but_rings_is_mapped_when_an_answer_is_seen() {
    let (mut host, mut puppet) = puppet(Abi::X86_64, "w");
    // What a frontend that distrusts us says about itself changes nothing.
    for trusted in ["0", "1"] {
        host.set_fe(DOMAIN, &[("trusted", trusted)]);
        for n in 0..64 {
            let whole = puppet.whole(n % 16);
            assert_eq!(puppet.ask(&mut host, [READ, WRITE][n % 2], 8, &[whole], 1), 0);
            // Linux looks whether the page is still mapped, and gives the disk up if it is.
            assert_eq!(host.shared.xen.borrow().maps_of(DOMAIN), 1, "the ring");
        }
    }
    ends_well(host);
}

#[test]
fn xsa_300_mappings_are_bounded_for_a_guest_and_in_all() {
    use vbdd::limits::{DEVICES_MAX, RING_PAGES_MAX};
    // gntdev's default limit for one mapping call, and the hypervisor's default of 1 024 maptrack frames.
    const _: () = assert!(RING_PAGES_MAX <= 64 << 10 && DEVICES_MAX * RING_PAGES_MAX <= 1024 * 256);
    let numbers = ["5", "9", "31", "32", "63", "64", "255", "4294967295", "18446744073709551615"];
    for order in numbers {
        let (mut host, path) = host();
        host.attach(DOMAIN, &path, &[]);
        host.wait_be(DOMAIN, "2");
        let puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
        host.set_fe(
            DOMAIN,
            &[
                ("ring-page-order", order),
                ("num-ring-pages", order),
                ("multi-queue-num-queues", order),
                ("event-channel", &puppet.port.to_string()),
                ("ring-ref0", &puppet.ring[0].to_string()),
                ("state", "3"),
            ],
        );
        host.wait_be(DOMAIN, "6");
        assert_eq!(host.shared.xen.borrow().maps_of(DOMAIN), 0);
        ends_well(host);
    }
}

#[test]
fn xsa_180_what_a_guest_can_repeat_fills_no_log() {
    let (mut host, mut puppet) = puppet(Abi::X86_64, "w");
    lines::keep();
    let start = host.shared.clock.now();
    let junk = Segment { grant: 9999, first: 0, last: 7 };
    for n in 0..2000_u32 {
        let op = [WRITE, 99, READ][n as usize % 3];
        let sector = if n % 2 == 0 { u64::MAX } else { 0 };
        puppet.front.write(op, 1, sector, &[junk], if n % 5 == 0 { 255 } else { 1 });
        assert!(puppet.answers(&mut host, 1)[0].status < 0);
        if n % 100 == 0 {
            host.run_for(Duration::from_millis(300));
        }
    }
    let seconds = (host.shared.clock.now() - start).as_secs();
    let count = lines::kept("").len() as u64;
    assert!((5..=11 + seconds / 10).contains(&count), "{count} lines in {seconds} s");
    let used = host.backend.as_mut().unwrap().pump().storage.buffers().used_bytes();
    assert!(used < 1 << 20);
    ends_well(host);
}
