//! Rings of several pages and queues, from connect to take-over.

use std::time::Duration;

use rings::Abi;

use crate::host::{Host, RESTLESS};
use crate::world::guest::Habits;
use crate::{
    attached, both_places, habits, neighbour_is_well, pauses, three_are_well, unplug_cleanly, with_neighbour,
};

fn shaped(guest: u16, disk: usize, queues: usize, ring_pages: usize, abi: Abi) -> Habits {
    Habits { queues, ring_pages, abi, ..habits(guest, disk, 60) }
}

#[test]
fn rings_of_every_shape_are_served_on_every_abi() {
    for (n, abi) in [Abi::X86_64, Abi::X86_32, Abi::Arm].into_iter().enumerate() {
        for (queues, pages) in [(1, 2), (1, 16), (2, 1), (3, 8), (4, 4)] {
            let mut host = Host::new(n as u64, 3);
            let (disk, path) = host.add_image(300);
            host.attach(7, &path, &[]);
            host.connect_guest(shaped(7, disk, queues, pages, abi));
            let status: Vec<usize> =
                host.backend.as_ref().unwrap().status().map(|disk| disk.queues).collect();
            assert_eq!(status, [queues]);
            assert_eq!(host.shared.xen.borrow().held(), (queues, queues));
            host.wait_served(7);
            unplug_cleanly(&mut host, 7);
            host.run_for(Duration::from_secs(5));
            host.check_nothing_held();
            assert!(host.shared.vault.borrow().names().is_empty());
        }
    }
}

#[test]
fn several_queues_and_pages_are_taken_over_after_stops_and_deaths() {
    for seed in (0..3).chain(RESTLESS..RESTLESS + 2) {
        let mut host = Host::new(seed, if seed % 2 == 0 { 0 } else { 3 });
        for (guest, queues, pages) in [(1, 2, 1), (2, 1, 16), (3, 4, 2)] {
            let (disk, path) = host.add_image(300);
            host.attach(guest, &path, &[]);
            let habits = shaped(guest, disk, queues, pages, Abi::X86_64);
            host.connect_guest(Habits { requests: 600, ..habits });
        }
        pauses(&mut host, 16, 4);
        three_are_well(&mut host);
    }
}

#[test]
fn all_queues_are_connected_or_none() {
    both_places(|seed, own| {
        for bad in ["queue-0/ring-ref", "queue-1/ring-ref", "queue-2/event-channel"] {
            let mut host = with_neighbour(seed, own);
            let (disk, path) = host.add_image(100);
            host.attach(7, &path, &[]);
            host.wait_be(7, "2");
            // This guest never gets to its disk; the model of the other one must not wait for its writes.
            let (unused, _) = host.add_image(100);
            host.announce(shaped(7, unused, 3, 1, Abi::X86_64), "1");
            host.set_fe(7, &[(bad, "77777")]);
            host.set_fe(7, &[("state", "3")]);
            host.wait_be(7, "6");
            assert!(host.be_node(7, "error").is_some_and(|text| text.contains("77777")));
            assert_eq!(host.shared.xen.borrow().maps_of(7), 0);
            host.destroy_domain(7);
            host.set_fe(7, &[("state", "6")]);
            host.set_fe(7, &[("state", "1")]);
            host.wait_be(7, "2");
            host.announce(shaped(7, disk, 3, 1, Abi::X86_64), "3");
            host.wait_be(7, "4");
            host.wait_served(7);
            neighbour_is_well(&mut host);
        }
    });
}

/// The successor has taken requests over on the first queues when the last one cannot be mapped: what was taken is
/// answered, the rest waits for the next attempt, and nothing is done twice or lost.
#[test]
fn a_take_over_that_fails_half_way_is_tried_again() {
    for seed in 0..4 {
        for mapped in 0..3 {
            let mut host = Host::new(seed, 3);
            let (disk, path) = host.add_image(300);
            host.attach(7, &path, &[]);
            let habits = shaped(7, disk, 3, 1, Abi::X86_64);
            host.wait_be(7, "2");
            host.run_for(Duration::from_millis(200));
            host.connect_guest(Habits { requests: 800, depth: 32, ..habits });
            for _ in 0..seed * 50 {
                host.round();
            }
            assert!(!host.guest_finished(7));
            host.kill();
            host.shared.xen.borrow_mut().fail_map_after = Some(mapped);
            host.start();
            host.wait_served(7);
            assert_eq!(host.be_node(7, "state").as_deref(), Some("4"));
            assert_eq!(host.shared.xen.borrow().fail_map_after, None, "the planted failure came");
            unplug_cleanly(&mut host, 7);
            host.run_for(Duration::from_secs(5));
            host.check_nothing_held();
            let media = host.shared.media.borrow();
            let models = host.shared.models.borrow();
            for sector in 0..models[0].size() {
                models[0].check_now(sector, media.visible(models[0].image, sector as usize)).unwrap();
            }
        }
    }
}

/// The nodes of an earlier frontend's queues beside a plain ring, and the other way round.
#[test]
fn leftovers_of_an_earlier_frontend_do_not_matter() {
    for plain_is_stale in [true, false] {
        both_places(|seed, own| {
            let mut host = with_neighbour(seed, own);
            let (disk, path) = host.add_image(300);
            host.attach(7, &path, &[]);
            let shapes = if plain_is_stale { [(1, 1), (3, 2)] } else { [(3, 2), (1, 1)] };
            for (queues, pages) in shapes {
                host.connect_guest(shaped(7, disk, queues, pages, Abi::X86_64));
                host.wait_served(7);
                for state in ["5", "6"] {
                    host.set_fe(7, &[("state", state)]);
                    host.wait_be(7, state);
                }
                host.destroy_domain(7);
                host.set_fe(7, &[("state", "1")]);
            }
            neighbour_is_well(&mut host);
        });
    }
}

#[test]
fn a_guest_that_dies_with_several_queues_leaves_nothing_behind() {
    both_places(|seed, own| {
        let mut host = with_neighbour(seed, own);
        let (disk, path) = host.add_image(300);
        host.attach(7, &path, &[]);
        host.connect_guest(Habits { requests: 5000, ..shaped(7, disk, 4, 4, Abi::X86_64) });
        host.run_for(Duration::from_millis(20 + seed % 100 * 7));
        host.destroy_domain(7);
        let (be, home) = (host.be(7), "/local/domain/7");
        host.store.remove(0, &be).unwrap();
        let _ = host.store.remove(0, home);
        host.run_until("forgotten", |host| host.backend.as_ref().unwrap().totals().disks == 1);
        assert_eq!(host.shared.xen.borrow().maps_of(7), 0);
        assert_eq!(host.shared.vault.borrow().names(), ["vbd-100-51712-0"]);
        neighbour_is_well(&mut host);
    });
}

#[test]
fn more_queues_than_offered_are_refused_and_a_neighbour_connects() {
    let mut host = Host::new(1, 3);
    attached(&mut host, 100, 50);
    let (_, path) = host.add_image(100);
    host.attach(7, &path, &[]);
    host.wait_be(7, "2");
    assert_eq!(host.be_node(7, "multi-queue-max-queues").as_deref(), Some("4"));
    assert_eq!(host.be_node(7, "max-ring-page-order").as_deref(), Some("4"));
    assert_eq!(host.be_node(7, "max-ring-pages").as_deref(), Some("16"));
    host.set_fe(7, &[("multi-queue-num-queues", "9"), ("state", "3")]);
    host.wait_be(7, "6");
    assert!(host.be_node(7, "error").is_some_and(|text| text.contains("9 queues")));
    neighbour_is_well(&mut host);
}
