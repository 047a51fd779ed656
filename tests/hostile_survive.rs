//! What a backend must survive, against the whole backend in the simulated world. The list, and which tests elsewhere show
//! its other lines: `docs/design/hostile.md`.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

#[path = "backend_world/host.rs"]
mod host;
mod hostile_support;
mod world;

use std::time::Duration;

use ::xenstore::{Access, Permission};
use host::Host;
use hostile_support::neighbour::{ABIS, NEIGHBOUR, comes_back, ends_well, host, puppet};
use hostile_support::puppet::{DATA_FRAMES, DOMAIN, Puppet};
use rings::request::operation::{BARRIER, DISCARD, FLUSH, INDIRECT, READ, WRITE};
use rings::{Abi, Segment};
use vbdd::storage::Storage as _;
use world::Faults;
use world::guest::Habits;
use world::model::sector_bytes;
use world::rng::Rng;

#[test]
fn wild_and_backward_request_indices_end_the_ring_and_not_the_device() {
    for abi in ABIS {
        for consumed in [0_u32, 5] {
            for jump in [33, 1000, 1 << 31, u32::MAX, u32::MAX - 4, u32::MAX - 31] {
                let (mut host, mut puppet) = puppet(abi, "w");
                let whole = puppet.whole(0);
                for _ in 0..consumed {
                    assert_eq!(puppet.ask(&mut host, READ, 0, &[whole], 1), 0);
                }
                puppet.front.force_request_producer(consumed.wrapping_add(jump));
                puppet.kick(&host);
                host.run_until("error", |host| host.be_node(DOMAIN, "error").is_some());
                assert_eq!(host.be_node(DOMAIN, "state").as_deref(), Some("4"));
                // What looks right again is not looked at.
                puppet.front.force_request_producer(consumed + 1);
                puppet.kick(&host);
                host.run_for(Duration::from_secs(1));
                assert!(puppet.front.take().is_none());
                comes_back(&mut host, &mut puppet);
                assert_eq!(host.be_node(DOMAIN, "error"), None);
                ends_well(host);
            }
        }
    }
}

#[test]
fn every_operation_number_is_answered_once_under_its_name() {
    for abi in ABIS {
        let (mut host, mut puppet) = puppet(abi, "w");
        let whole = puppet.whole(0);
        for op in 0..=255_u8 {
            puppet.front.write(op, u64::from(op) << 40, 0, &[whole], 1);
            let answer = puppet.answers(&mut host, 1)[0];
            assert_eq!(answer.id, u64::from(op) << 40);
            let known = [READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT].contains(&op);
            assert!(known || answer.status == -2, "{op}: {}", answer.status);
            // An indirect request is answered under its inner operation: here the segment count.
            assert_eq!(answer.operation, if op == INDIRECT { 1 } else { op });
            assert!(puppet.front.take().is_none());
        }
        ends_well(host);
    }
}

#[test]
fn segment_counts_of_any_size() {
    for abi in ABIS {
        let (mut host, mut puppet) = puppet(abi, "w");
        let segments: Vec<Segment> = (0..11).map(|n| puppet.whole(n % DATA_FRAMES)).collect();
        for op in [READ, WRITE, FLUSH] {
            for count in [0, 12, 100, 128, 254, 255] {
                let expected = if op == FLUSH && count == 0 { 0 } else { -1 };
                assert_eq!(puppet.ask(&mut host, op, 0, &segments, count), expected, "{op} {count}");
            }
        }
        for count in [0, 257, 512, 513, 4096, 32_768, 65_535] {
            puppet.front.write_indirect(WRITE, 1, 0, count, &puppet.pages[..8]);
            assert!(puppet.answers(&mut host, 1)[0].status < 0, "{count} indirect segments");
        }
        for n in 0..64 {
            assert_eq!(*host.shared.media.borrow().visible(1, n), sector_bytes(0, n as u64));
        }
        ends_well(host);
    }
}

#[test]
fn sectors_that_wrap_and_discards_of_everything() {
    for abi in ABIS {
        let (mut host, mut puppet) = puppet(abi, "w");
        let whole = puppet.whole(0);
        for sector in [57, 64, u64::MAX, u64::MAX - 7, u64::MAX / 512, 1 << 55, 1 << 63, (1 << 63) - 1] {
            for op in [READ, WRITE, FLUSH, BARRIER] {
                assert!(puppet.ask(&mut host, op, sector, &[whole], 1) < 0, "{op} at {sector}");
            }
            for count in [0, 1, 64, 65, u64::MAX, u64::MAX - sector, u64::MAX / 512, 1 << 55] {
                for flag in [0, 1, 255] {
                    puppet.front.write_discard(1, sector, count, flag);
                    let status = puppet.answers(&mut host, 1)[0].status;
                    let fits = sector.checked_add(count).is_some_and(|end| end <= 64) && count > 0;
                    assert!(
                        status < 0 || (fits && flag == 0),
                        "{count} from {sector}, flag {flag}: {status}"
                    );
                }
            }
        }
        for count in [65, u64::MAX, u64::MAX / 512 + 1, 1 << 55] {
            puppet.front.write_discard(1, 0, count, 0);
            assert!(puppet.answers(&mut host, 1)[0].status < 0);
        }
        for n in 0..57 {
            assert_eq!(*host.shared.media.borrow().visible(1, n), sector_bytes(0, n as u64), "sector {n}");
        }
        ends_well(host);
    }
}

#[test]
fn grants_revoked_in_mid_flight_and_used_twice() {
    let (mut host, mut puppet) = puppet(Abi::X86_64, "w");
    host.shared.faults.set(Faults { latency_us_max: 5000, ..Faults::default() });
    for n in 0..60_usize {
        let page = n % DATA_FRAMES;
        // The same page in every segment, of two requests.
        let segments = [puppet.whole(page); 8];
        for id in 0..2 {
            puppet.front.write([READ, WRITE][n % 2], id, 0, &segments, 8);
        }
        let _ = puppet.front.publish();
        puppet.kick(&host);
        for _ in 0..n {
            host.round();
        }
        let frame = puppet.frame(page);
        {
            let mut xen = host.shared.xen.borrow_mut();
            xen.revoke(DOMAIN, puppet.pages[page]);
        }
        let mut ids: Vec<u64> = puppet.answers(&mut host, 2).iter().map(|answer| answer.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1]);
        puppet.pages[page] = host.shared.xen.borrow_mut().grant(DOMAIN, frame, false);
    }
    ends_well(host);
}

#[test]
fn a_ring_full_of_one_id_is_answered_slot_by_slot() {
    let (mut host, mut puppet) = puppet(Abi::X86_64, "w");
    for round in 0..20 {
        for n in 0..32 {
            let whole = puppet.whole(n % DATA_FRAMES);
            puppet.front.write([READ, WRITE, FLUSH][n % 3], 42, 8, &[whole], 1);
        }
        let answers = puppet.answers(&mut host, 32);
        assert!(answers.iter().all(|answer| answer.id == 42 && answer.status == 0), "{round}");
        assert!(puppet.front.take().is_none());
    }
    ends_well(host);
}

#[test]
fn nodes_of_any_length_and_kind() {
    const KEYS: [&str; 12] = [
        "ring-ref",
        "ring-ref0",
        "ring-page-order",
        "num-ring-pages",
        "event-channel",
        "protocol",
        "multi-queue-num-queues",
        "queue-0/ring-ref",
        "queue-0/event-channel",
        "queue-7/ring-ref0",
        "feature-persistent",
        "state",
    ];
    let long = "1".repeat(4000);
    let values = ["", "-1", "-0", "0x8", " 8", "8 ", "eight", "8\n", "1e3", "٣", "4294967296", &long];
    for key in KEYS {
        for value in values {
            let (mut host, path) = host();
            host.store.quotas.node_bytes = 5000;
            host.attach(DOMAIN, &path, &[]);
            host.wait_be(DOMAIN, "2");
            let mut puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
            for (name, node) in puppet.nodes() {
                host.set_fe(DOMAIN, &[(&name, &node)]);
            }
            host.set_fe(DOMAIN, &[(key, value)]);
            host.set_fe(DOMAIN, &[("state", "3")]);
            if key == "state" {
                host.set_fe(DOMAIN, &[(key, value)]);
            }
            host.run_for(Duration::from_secs(3));
            let state = host.be_node(DOMAIN, "state").unwrap();
            assert!(["2", "4", "6"].contains(&state.as_str()), "{key} {value:?}: {state}");
            if state == "4" {
                let whole = puppet.whole(0);
                assert_eq!(puppet.ask(&mut host, READ, 0, &[whole], 1), 0, "{key} {value:?}");
            }
            ends_well(host);
        }
    }
}

#[test]
fn the_largest_ring_that_is_offered_is_served_and_costs_no_more_reads() {
    let (mut host, _) = host();
    let (disk, path) = host.add_image(300);
    host.attach(DOMAIN, &path, &[]);
    let habits = Habits { queues: 4, ring_pages: 16, requests: 10, ..Habits::new(DOMAIN, disk) };
    host.connect_guest(habits);
    host.wait_served(DOMAIN);
    host.wait_served(NEIGHBOUR);
    // A state that is written again and again has all its nodes read: not more of them for so many queues.
    let before = host.session.statistics().requests;
    for _ in 0..2000 {
        host.set_fe(DOMAIN, &[("state", "4")]);
        host.run_for(Duration::from_millis(10));
    }
    let rate = (host.session.statistics().requests - before) / 20;
    assert!(rate < 700, "{rate} xenstore requests a second");
    ends_well(host);
}

#[test]
fn ports_that_are_not_ours_to_bind() {
    let (mut host, path) = host();
    host.attach(DOMAIN, &path, &[]);
    host.wait_be(DOMAIN, "2");
    let mut puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
    let own = puppet.port;
    // Of nobody, of the neighbour's number space, and what no port can be.
    for port in [0, 2, 77, 4096, u32::MAX] {
        puppet.port = port;
        puppet.announce(&mut host, "3");
        host.wait_be(DOMAIN, "6");
        assert_eq!(host.shared.xen.borrow().maps_of(DOMAIN), 0);
        host.set_fe(DOMAIN, &[("state", "6")]);
        host.run_for(Duration::from_secs(1));
        host.set_fe(DOMAIN, &[("state", "1")]);
        host.wait_be(DOMAIN, "2");
    }
    puppet.port = own;
    puppet.announce(&mut host, "3");
    host.wait_be(DOMAIN, "4");
    ends_well(host);
}

#[test]
fn a_state_that_flaps_at_any_rate() {
    for pause_us in [1, 50, 1000, 20_000, 500_000] {
        let (mut host, path) = host();
        host.attach(DOMAIN, &path, &[]);
        host.wait_be(DOMAIN, "2");
        let mut puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
        for (name, node) in puppet.nodes() {
            host.set_fe(DOMAIN, &[(&name, &node)]);
        }
        let mut rng = Rng::new(pause_us);
        for _ in 0..300 {
            let state = ["1", "2", "3", "4", "5", "6", "7", "8", "0", "9", ""][rng.below(11)];
            host.set_fe(DOMAIN, &[("state", state)]);
            if rng.chance(1, 4) {
                let whole = puppet.whole(0);
                if puppet.front.free() > 0 {
                    puppet.front.write(WRITE, 1, 0, &[whole], 1);
                }
                let _ = puppet.front.publish();
                puppet.kick(&host);
            }
            host.run_for(Duration::from_micros(pause_us));
            assert!(host.shared.xen.borrow().maps_of(DOMAIN) <= 1);
        }
        // It comes to its senses, and is served.
        host.set_fe(DOMAIN, &[("state", "6")]);
        host.run_for(Duration::from_secs(5));
        comes_back(&mut host, &mut puppet);
        ends_well(host);
    }
}

#[test]
fn a_domain_that_dies_at_any_step() {
    for own in [0, 3] {
        for rounds in 0..60 {
            let mut host = Host::new(rounds, own);
            let (disk, path) = host.add_image(300);
            host.attach(NEIGHBOUR, &path, &[]);
            host.connect_guest(Habits { requests: 40, depth: 8, ..Habits::new(NEIGHBOUR, disk) });
            let (_, path) = host.add_image(64);
            host.attach(DOMAIN, &path, &[]);
            let mut puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
            puppet.announce(&mut host, "3");
            for n in 0..8 {
                let whole = puppet.whole(n);
                puppet.front.write([READ, WRITE][n % 2], n as u64, 0, &[whole], 1);
            }
            let _ = puppet.front.publish();
            for _ in 0..rounds * 3 {
                host.round();
            }
            host.destroy_domain(DOMAIN);
            if rounds % 2 == 0 {
                host.store.release_domain(DOMAIN);
            }
            host.run_for(Duration::from_millis(rounds));
            ends_well(host);
        }
    }
}

#[test]
fn answers_that_nobody_reads_take_no_memory() {
    let (mut host, mut puppet) = puppet(Abi::X86_64, "w");
    let whole = puppet.whole(0);
    for n in 0..32 {
        puppet.front.write(READ, n, 0, &[whole], 1);
    }
    let _ = puppet.front.publish();
    puppet.kick(&host);
    host.run_for(Duration::from_millis(100));
    // The ring is full of answers, and more requests are claimed all the time.
    for n in 0..200 {
        puppet.front.force_response_event(n);
        puppet.kick(&host);
        host.run_for(Duration::from_millis(1));
    }
    host.wait_served(NEIGHBOUR);
    let backend = host.backend.as_mut().unwrap();
    assert_eq!(backend.pump().storage.buffers().used_bytes(), 0);
    let answers = std::iter::from_fn(|| puppet.front.take()).count();
    assert_eq!(answers, 32);
    ends_well(host);
}

#[test]
fn a_directory_that_is_hidden_and_shown_again() {
    for access in [Access::None, Access::Write] {
        let (mut host, mut puppet) = puppet(Abi::X86_64, "w");
        let fe = Host::fe(DOMAIN);
        let list =
            |access| [Permission { domain: DOMAIN, access: Access::None }, Permission { domain: 3, access }];
        for name in ["", "/state", "/ring-ref", "/event-channel"] {
            let path = format!("{fe}{name}");
            host.store.set_permissions(DOMAIN, &path, &list(access)).unwrap();
            host.set_fe(DOMAIN, &[("state", "4")]);
            host.run_for(Duration::from_secs(2));
            host.store.set_permissions(DOMAIN, &path, &list(Access::Read)).unwrap();
            host.set_fe(DOMAIN, &[("state", "6")]);
            host.run_for(Duration::from_secs(2));
            comes_back(&mut host, &mut puppet);
        }
        ends_well(host);
    }
}
