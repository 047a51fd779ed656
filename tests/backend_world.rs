//! The whole backend in the simulated world: xenstored, hypervisor, storage, guests. Scripts of what toolstacks, guests
//! and operators do, each with disks of other guests beside it that must not notice.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

#[path = "backend_world/formats.rs"]
mod disk_formats;
#[path = "backend_world/frontends.rs"]
mod frontends;
#[path = "backend_world/host.rs"]
mod host;
#[path = "backend_world/media.rs"]
mod media;
#[path = "backend_world/quotas.rs"]
mod quotas;
#[path = "backend_world/shapes.rs"]
mod shapes;
mod world;

use std::time::Duration;

use host::{Host, RESTLESS};
use vbdd::storage::Storage as _;
use world::guest::Habits;
use world::storage::SECTOR;

fn habits(guest: u16, disk: usize, requests: u32) -> Habits {
    Habits { requests, depth: 8, ..Habits::new(guest, disk) }
}

fn attached(host: &mut Host, guest: u16, requests: u32) {
    let (disk, path) = host.add_image(300);
    host.attach(guest, &path, &[]);
    host.connect_guest(habits(guest, disk, requests));
}

/// A host with one guest that does I/O all the time.
fn with_neighbour(seed: u64, own: u16) -> Host {
    let mut host = Host::new(seed, own);
    attached(&mut host, 100, 600);
    host
}

/// The neighbour was served throughout, and still is.
fn neighbour_is_well(host: &mut Host) {
    assert_eq!(host.be_node(100, "state").as_deref(), Some("4"));
    assert_eq!(host.be_node(100, "error"), None);
    host.wait_served(100);
}

/// The backend stops and dies in turns, and starts again.
fn pauses(host: &mut Host, count: u64, first_ms: u64) {
    for n in 0..count {
        host.run_for(Duration::from_millis(first_ms + n));
        if n % 2 == 0 {
            host.stop();
        } else {
            host.kill();
        }
        host.start();
    }
}

/// Guests 1 to 3 were served all along; when they are gone nothing is held, and their disks hold what they wrote.
fn three_are_well(host: &mut Host) {
    for guest in 1..=3 {
        host.wait_served(guest);
        assert_eq!(host.be_node(guest, "state").as_deref(), Some("4"));
        unplug_cleanly(host, guest);
    }
    host.run_for(Duration::from_secs(5));
    host.check_nothing_held();
    assert!(host.shared.vault.borrow().names().is_empty());
    let media = host.shared.media.borrow();
    for model in host.shared.models.borrow().iter() {
        for sector in 0..model.size() {
            model.check_now(sector, media.visible(model.image, sector as usize)).unwrap();
        }
    }
}

fn both_places(run: impl Fn(u64, u16)) {
    for seed in (0..2).chain(RESTLESS..RESTLESS + 2) {
        run(seed, 0);
        run(seed, 3);
    }
}

#[test]
fn first_connect_and_io() {
    both_places(|seed, own| {
        let mut host = Host::new(seed, own);
        attached(&mut host, 7, 300);
        host.wait_served(7);
        assert_eq!(host.be_node(7, "sectors").as_deref(), Some("300"));
        assert_eq!(host.be_node(7, "sector-size").as_deref(), Some("512"));
        assert_eq!(host.be_node(7, "info").as_deref(), Some("0"));
        assert_eq!(host.be_node(7, "feature-flush-cache").as_deref(), Some("1"));
        assert_eq!(host.be_node(7, "hotplug-status").as_deref(), Some("connected"));
    });
}

#[test]
fn a_host_at_rest_is_not_woken() {
    both_places(|seed, own| {
        let mut host = Host::new(seed, own);
        for guest in 1..=8 {
            attached(&mut host, guest, 50);
        }
        (1..=8).for_each(|guest| host.wait_served(guest));
        host.settle();
        assert_eq!(host.backend.as_ref().unwrap().deadline(), None);
        let turns = host.turns;
        host.run_for(Duration::from_secs(3600));
        assert_eq!(host.turns, turns, "no turn without a cause");
        assert!(host.busy_max < 100, "{} turns in a row", host.busy_max);
    });
}

fn unplug_cleanly(host: &mut Host, guest: u16) {
    host.wait_served(guest);
    host.set_be(guest, &[("online", "0"), ("state", "5")]);
    host.run_for(Duration::from_millis(50));
    host.set_fe(guest, &[("state", "5")]);
    host.run_for(Duration::from_millis(50));
    host.set_fe(guest, &[("state", "6")]);
    host.wait_be(guest, "6");
}

#[test]
fn a_clean_unplug_in_dom0_leaves_the_directory() {
    for seed in (0..2).chain(RESTLESS..RESTLESS + 2) {
        let mut host = with_neighbour(seed, 0);
        attached(&mut host, 7, 100);
        unplug_cleanly(&mut host, 7);
        host.run_for(Duration::from_secs(20));
        assert_eq!(host.be_node(7, "state").as_deref(), Some("6"));
        assert_eq!(host.be_node(7, "hotplug-status"), None);
        assert_eq!(host.shared.xen.borrow().maps_of(7), 0);
        let (be, fe) = (host.be(7), Host::fe(7));
        host.store.remove(0, &be).unwrap();
        host.store.remove(0, &fe).unwrap();
        host.run_for(Duration::from_secs(5));
        assert_eq!(host.backend.as_ref().unwrap().totals().disks, 1);
        assert_eq!(host.be_node(7, "state"), None, "the directory was not made anew");
        neighbour_is_well(&mut host);
    }
}

#[test]
fn a_clean_unplug_in_a_driver_domain_removes_the_directory_after_a_while() {
    for seed in (0..2).chain(RESTLESS..RESTLESS + 2) {
        let mut host = with_neighbour(seed, 3);
        attached(&mut host, 7, 100);
        unplug_cleanly(&mut host, 7);
        let seen = host.shared.clock.now();
        host.run_until("directory removed", |host| host.be_node(7, "state").is_none());
        let lingered = host.shared.clock.now() - seen;
        assert!(lingered >= Duration::from_millis(500), "6 was visible for {lingered:?}");
        assert!(lingered <= Duration::from_secs(5), "6 was visible for {lingered:?}");
        assert!(host.node("/local/domain/3/backend/vbd/7").is_some(), "the parents are the toolstack's");
        host.run_for(Duration::from_secs(5));
        assert_eq!(host.backend.as_ref().unwrap().totals().disks, 1);
        neighbour_is_well(&mut host);
    }
}

#[test]
fn a_forced_unplug_lets_go_at_once() {
    both_places(|seed, own| {
        let mut host = with_neighbour(seed, own);
        attached(&mut host, 7, 5000);
        host.run_for(Duration::from_millis(20));
        assert!(!host.guest_finished(7));
        host.set_be(7, &[("online", "0"), ("state", "5")]);
        let fe = Host::fe(7);
        host.store.remove(0, &fe).unwrap();
        host.run_until("6, or removed", |host| {
            matches!(host.be_node(7, "state").as_deref(), Some("6") | None)
        });
        assert_eq!(host.shared.xen.borrow().maps_of(7), 0);
        host.destroy_domain(7);
        host.run_for(Duration::from_secs(10));
        neighbour_is_well(&mut host);
        assert_eq!(host.be_node(7, "state").is_some(), own == 0);
        host.stop();
    });
}

#[test]
fn a_guest_that_dies_in_the_middle_of_its_io_leaves_nothing_behind() {
    for gone in [true, false] {
        both_places(|seed, own| {
            let mut host = with_neighbour(seed, own);
            attached(&mut host, 7, 5000);
            host.run_for(Duration::from_millis(20 + seed * 7));
            host.destroy_domain(7);
            if gone {
                // xenstored drops what the domain owned, without an event; the toolstack removes the rest.
                host.store.release_domain(7);
            }
            host.run_for(Duration::from_millis(30));
            let (be, home) = (host.be(7), "/local/domain/7");
            host.store.remove(0, &be).unwrap();
            let _ = host.store.remove(0, home);
            host.run_until("forgotten", |host| host.backend.as_ref().unwrap().totals().disks == 1);
            assert_eq!(host.shared.xen.borrow().maps_of(7), 0);
            assert_eq!(host.shared.vault.borrow().names(), ["vbd-100-51712-0"]);
            neighbour_is_well(&mut host);
            assert_eq!(host.be_node(7, "state"), None);
        });
    }
}

#[test]
fn a_boot_loader_hands_its_disk_to_a_kernel() {
    both_places(|seed, own| {
        let mut host = with_neighbour(seed, own);
        let (disk, path) = host.add_image(300);
        host.attach(7, &path, &[]);
        host.wait_be(7, "2");
        for _ in 0..3 {
            // The loader: one request at a time, 3 without waiting.
            host.announce(Habits { depth: 1, segments_max: 1, ..habits(7, disk, 40) }, "3");
            host.wait_be(7, "4");
            host.set_fe(7, &[("state", "4")]);
            host.wait_served(7);
            host.set_fe(7, &[("state", "6")]);
            host.wait_be(7, "6");
            assert_eq!(host.shared.xen.borrow().maps_of(7), 0);
            host.destroy_domain(7);
            host.set_fe(7, &[("ring-ref", "0"), ("event-channel", "0"), ("state", "1")]);
            // The kernel: grants and port have the same numbers as before.
            host.connect_guest(habits(7, disk, 100));
            host.wait_served(7);
            host.set_fe(7, &[("state", "5")]);
            host.wait_be(7, "5");
            host.set_fe(7, &[("state", "6")]);
            host.wait_be(7, "6");
            host.destroy_domain(7);
            host.set_fe(7, &[("state", "1")]);
            host.wait_be(7, "2");
        }
        neighbour_is_well(&mut host);
    });
}

#[test]
fn ten_stops_and_ten_deaths_under_io_are_only_pauses() {
    for seed in (0..1).chain(RESTLESS..RESTLESS + 1) {
        for own in [0, 3] {
            let mut host = Host::new(seed, own);
            for guest in 1..=3 {
                attached(&mut host, guest, 1500);
            }
            pauses(&mut host, 20, 5);
            three_are_well(&mut host);
        }
    }
}

#[test]
fn what_cannot_be_served_says_why_and_harms_nobody() {
    type Changes = &'static [(&'static str, Option<&'static str>)];
    let table: [(&str, Changes, &str); 11] = [
        ("/images/none", &[], "does not exist"),
        ("", &[], "params is empty"),
        ("qcow2:/images/1", &[], "no QCOW2 magic"),
        ("qcow:/images/1", &[], "qcow is not supported"),
        ("cow:/images/1", &[], "unknown format"),
        ("images/1", &[], "not an absolute path"),
        ("/images/../etc/shadow", &[], "has a \"..\""),
        ("/images/1", &[("mode", Some("q"))], "the node mode"),
        ("/images/1", &[("params", None)], "the node params"),
        ("/images/1", &[("frontend-id", Some("8"))], "the node frontend-id"),
        ("/images/1", &[("frontend", Some("/local/domain/8/device/vbd/51712"))], "the node frontend"),
    ];
    for own in [0, 3] {
        let mut host = with_neighbour(1, own);
        host.add_image(100);
        for (n, (params, changes, expected)) in table.iter().enumerate() {
            let guest = n as u16 + 7;
            host.attach(guest, params, changes);
            host.wait_be(guest, "6");
            let error = host.be_node(guest, "error").unwrap();
            assert!(error.contains(expected), "{params} {changes:?}: {error}");
            let hotplug = host.be_node(guest, "hotplug-error").unwrap();
            assert!(hotplug.contains(expected), "{params} {changes:?}: {hotplug}");
            assert_eq!(host.be_node(guest, "hotplug-status").as_deref(), Some("error"));
            assert_eq!(host.be_node(guest, "error").unwrap().len().min(250), error.len());
        }
        neighbour_is_well(&mut host);
        host.settle();
    }
}

#[test]
fn what_a_frontend_writes_wrongly_closes_its_own_disk_only() {
    type Nodes = &'static [(&'static str, &'static str)];
    let table: [Nodes; 8] = [
        &[("event-channel", "5")],
        &[("ring-ref", "8")],
        &[("ring-ref", "8"), ("event-channel", "banana")],
        &[("ring-ref", "-1"), ("event-channel", "5")],
        &[("ring-ref", "4294967296"), ("event-channel", "5")],
        &[("ring-ref", "8"), ("event-channel", "5"), ("protocol", "ppc-abi")],
        &[("ring-ref", "999"), ("event-channel", "5")],
        &[("ring-ref", "8"), ("event-channel", "5"), ("multi-queue-num-queues", "0")],
    ];
    let mut host = with_neighbour(2, 3);
    let (_, path) = host.add_image(100);
    for (n, nodes) in table.iter().enumerate() {
        let guest = n as u16 + 7;
        host.attach(guest, &path, &[("mode", Some("r"))]);
        host.wait_be(guest, "2");
        host.set_fe(guest, nodes);
        host.set_fe(guest, &[("state", "3")]);
        host.wait_be(guest, "6");
        assert!(host.be_node(guest, "error").is_some_and(|text| text.contains("frontend")), "{nodes:?}");
    }
    neighbour_is_well(&mut host);
    host.settle();
}

#[test]
fn two_writers_of_one_image_are_refused() {
    // Modes of the first and the second, and whether the second is served.
    for (first, second, served) in [
        ("w", "w", false),
        ("w", "r", false),
        ("r", "w", false),
        ("r", "r", true),
        ("w", "w!", true),
        ("w!", "w!", true),
        ("w!", "w", false),
        ("w!", "r", true),
    ] {
        let mut host = with_neighbour(3, 3);
        let (_, path) = host.add_image(100);
        host.attach(7, &path, &[("mode", Some(first))]);
        host.wait_be(7, "2");
        host.attach(8, &path, &[("mode", Some(second))]);
        host.wait_be(8, if served { "2" } else { "6" });
        if !served {
            let error = host.be_node(8, "error").unwrap();
            assert!(error.contains("in use"), "{first} {second}: {error}");
        }
        assert_eq!(host.be_node(7, "state").as_deref(), Some("2"));
        neighbour_is_well(&mut host);
    }
}

/// A guest and its stub domain, or both ends of a migration within the host, are one virtual machine.
#[test]
fn domains_of_one_virtual_machine_share_an_image() {
    let table: [(&[(&str, &str)], bool); 5] = [
        (&[("/local/domain/7/vm", "/vm/a"), ("/local/domain/8/vm", "/vm/a")], true),
        (&[("/local/domain/7/vm", "/vm/a"), ("/local/domain/8/vm", "/vm/b")], false),
        (&[("/local/domain/7/vm", ""), ("/local/domain/8/vm", "")], false),
        (&[("/local/domain/8/target", "7")], true),
        (&[("/local/domain/8/target", "9")], false),
    ];
    for (nodes, served) in table {
        for mode in ["w", "r"] {
            let mut host = with_neighbour(3, 0);
            let (_, path) = host.add_image(100);
            host.attach(7, &path, &[]);
            host.wait_be(7, "2");
            host.store.introduce_domain(8);
            host.store.write_all(0, nodes).unwrap();
            host.attach(8, &path, &[("mode", Some(mode))]);
            host.wait_be(8, if served { "2" } else { "6" });
            assert_eq!(
                host.be_node(8, "error").is_some_and(|text| text.contains("in use by guest 7")),
                !served
            );
            // A third, of another machine, is refused beside both.
            host.attach(9, &path, &[]);
            host.wait_be(9, "6");
            neighbour_is_well(&mut host);
        }
    }
}

#[test]
fn disks_that_exist_at_start_are_found() {
    // 1000 nodes are a driver domain's quota, and a disk that can be punched takes 26 or 27 of them.
    const COUNT: u16 = 36;
    both_places(|seed, own| {
        let mut host = Host::new(seed, own);
        host.store.quotas.nodes = 2000;
        host.stop();
        let disks: Vec<(usize, String)> = (1..=COUNT).map(|_| host.add_image(100)).collect();
        for (n, (_, path)) in disks.iter().enumerate() {
            host.attach(n as u16 + 1, path, &[]);
        }
        host.start();
        for (n, (disk, _)) in disks.iter().enumerate() {
            host.connect_guest(habits(n as u16 + 1, *disk, 10));
        }
        for guest in 1..=COUNT {
            host.wait_served(guest);
        }
    });
}

/// Every script again, on a connection that is lost and made anew all the time, with commits that clash.
#[test]
fn a_flapping_connection_and_clashes_change_nothing() {
    for seed in 0..2 {
        for own in [0, 3] {
            let mut host = Host::new(seed, own);
            host.store.faults = world::xenstore::Faults::MANY;
            let (disk, path) = host.add_image(300);
            host.attach(7, &path, &[]);
            flap(&mut host);
            host.wait_be(7, "2");
            flap(&mut host);
            host.announce(habits(7, disk, 400), "3");
            flap(&mut host);
            host.wait_be(7, "4");
            host.set_fe(7, &[("state", "4")]);
            flap(&mut host);
            // Guests go on while there is no connection at all.
            host.lose_store();
            host.wait_served(7);
            host.set_be(7, &[("online", "0"), ("state", "5")]);
            host.set_fe(7, &[("state", "6")]);
            host.run_for(Duration::from_secs(300));
            host.connect();
            flap(&mut host);
            let gone = own != 0;
            host.run_until("closed", |host| match host.be_node(7, "state") {
                Some(state) => state == "6" && !gone,
                None => gone,
            });
            host.store.faults = world::xenstore::Faults::NONE;
            host.run_for(Duration::from_secs(10));
            assert_eq!(host.shared.xen.borrow().held(), (0, 0));
            host.stop();
        }
    }
}

fn flap(host: &mut Host) {
    for n in 0..6 {
        host.run_for(Duration::from_micros(300 * n));
        host.lose_store();
        host.run_for(Duration::from_millis(n));
        host.connect();
    }
}

#[test]
fn a_flush_that_hangs_does_not_keep_the_pages_of_a_guest_that_is_gone() {
    both_places(|seed, own| {
        let mut host = with_neighbour(seed, own);
        attached(&mut host, 7, 50);
        host.wait_served(7);
        host.wait_served(100);
        host.shared.media.borrow_mut().hang_next = Some(vbdd::storage::IoKind::Flush);
        host.set_be(7, &[("online", "0"), ("state", "5")]);
        host.set_fe(7, &[("state", "6")]);
        host.run_until("the flush at the end of the drain hangs", |host| {
            host.shared.media.borrow().hang_next.is_none()
        });
        assert_eq!(host.shared.xen.borrow().maps_of(7), 1);
        host.destroy_domain(7);
        let fe = Host::fe(7);
        host.store.remove(0, &fe).unwrap();
        host.run_until("unmapped", |host| host.shared.xen.borrow().maps_of(7) == 0);
        host.shared.media.borrow_mut().unhang();
        host.run_until("6, or removed", |host| {
            matches!(host.be_node(7, "state").as_deref(), Some("6") | None)
        });
        host.run_for(Duration::from_secs(5));
        host.stop();
    });
}

#[test]
fn sectors_are_those_of_the_image() {
    let mut host = Host::new(1, 3);
    let (_, path) = host.add_image(12345);
    host.attach(7, &path, &[]);
    host.wait_be(7, "2");
    assert_eq!(host.be_node(7, "sectors").as_deref(), Some("12345"));
    assert_eq!(SECTOR, 512);
}

#[test]
fn a_ring_that_closes_while_memory_is_short_does_not_keep_the_process_busy() {
    for seed in 0..4 {
        let mut host = Host::new(seed, 3);
        host.shared.faults.set(world::Faults { latency_us_max: 20_000_000, ..world::Faults::default() });
        let large = |guest, disk| Habits {
            depth: 32,
            frames: 360,
            reads: 16,
            segments_max: 11,
            ..habits(guest, disk, 500)
        };
        for guest in [7, 8] {
            let (disk, path) = host.add_image(600);
            host.attach(guest, &path, &[]);
            host.connect_guest(large(guest, disk));
        }
        host.run_for(Duration::from_secs(2));
        let used = host.backend.as_mut().unwrap().pump().storage.buffers().used_bytes();
        // Two guests may hold two thirds of the arena's 1 MiB.
        assert!(used > 600 << 10, "{used} bytes: nobody waits for memory");
        for guest in [7, 8] {
            host.set_fe(guest, &[("state", "6")]);
        }
        host.run_for(Duration::from_secs(1));
        assert!(host.busy_max < 200, "{} turns in a row", host.busy_max);
        host.run_for(Duration::from_secs(300));
        assert_eq!(host.be_node(7, "state").as_deref(), Some("6"));
    }
}

/// More listings and reads at once than the client takes: 530 guests that are known to a process
/// which loses its connection while more come.
#[test]
fn no_disk_goes_unseen_on_a_crowded_host() {
    let mut host = Host::new(1, 0);
    let (_, path) = host.add_image(16);
    for guest in 1..=530 {
        host.attach(guest, &path, &[("mode", Some("r"))]);
    }
    host.run_until("530 disks", |host| host.backend.as_ref().unwrap().totals().disks == 530);
    host.settle();
    host.lose_store();
    for guest in 531..=550 {
        host.attach(guest, &path, &[("mode", Some("r"))]);
    }
    host.connect();
    host.run_until("550 disks", |host| host.backend.as_ref().unwrap().totals().disks == 550);
}

#[test]
fn a_batch_that_the_kernel_cannot_copy_at_once_fails_nobodys_requests() {
    for seed in 0..3 {
        let mut host = Host::new(seed, 3);
        host.shared.xen.borrow_mut().copies_max = Some(11);
        for guest in 1..=3 {
            let (disk, path) = host.add_image(300);
            host.attach(guest, &path, &[]);
            host.connect_guest(Habits { odd: 0, indirect: 0, ..habits(guest, disk, 300) });
        }
        for guest in 1..=3 {
            host.wait_served(guest);
        }
        let refused: u64 =
            host.backend.as_ref().unwrap().status().map(|status| status.counters.refused).sum();
        assert_eq!(refused, 0);
    }
}

#[test]
fn a_stop_needs_no_xenstore() {
    both_places(|seed, own| {
        let mut host = with_neighbour(seed, own);
        let (disk, path) = host.add_image(100);
        host.attach(7, &path, &[]);
        host.wait_be(7, "2");
        host.announce(habits(7, disk, 100), "3");
        for _ in 0..seed % 100 * 3 {
            host.round();
        }
        host.flaps = false;
        host.lose_store();
        host.stop();
        host.start();
        host.wait_be(7, "4");
        host.wait_served(7);
        neighbour_is_well(&mut host);
    });
}
