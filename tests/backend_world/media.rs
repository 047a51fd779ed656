//! Images that grow or shrink, and media that are changed, under guests that use them.

use std::time::Duration;

use vbdd::vbd::{Address, Kind};

use crate::host::{DEVID, Host};
use crate::world::guest::Habits;
use crate::{attached, both_places, habits, neighbour_is_well, with_neighbour};

fn address(guest: u16) -> Address {
    Address { kind: Kind::Vbd, frontend: guest, devid: DEVID }
}

#[test]
fn a_disk_that_grows_is_seen_by_command_or_within_ten_seconds_of_use() {
    for by_command in [true, false] {
        both_places(|seed, own| {
            let mut host = with_neighbour(seed, own);
            let (disk, path) = host.add_image(300);
            host.attach(7, &path, &[]);
            host.connect_guest(habits(7, disk, 200));
            host.shared.media.borrow_mut().resize(disk, 500);
            if by_command {
                let measured = host.backend.as_mut().unwrap().measure(address(7)).unwrap();
                assert_eq!((measured.before, measured.sectors), (300, 500));
                host.wake();
            } else {
                host.run_for(Duration::from_secs(11));
                // Somebody writes a sector, anywhere.
                attached(&mut host, 8, 1);
            }
            host.run_until("told", |host| host.be_node(7, "sectors").as_deref() == Some("500"));
            assert_eq!(host.be_node(7, "state").as_deref(), Some("4"));
            host.wait_served(7);
            neighbour_is_well(&mut host);
        });
    }
}

#[test]
fn past_the_end_of_a_disk_that_shrank_nothing_is_read_or_written() {
    both_places(|seed, own| {
        let mut host = with_neighbour(seed, own);
        let (disk, path) = host.add_image(300);
        host.attach(7, &path, &[]);
        host.wait_be(7, "2");
        host.run_for(Duration::from_millis(200));
        host.connect_guest(Habits { odd: 0, ..habits(7, disk, 30) });
        host.wait_served(7);
        host.shared.media.borrow_mut().resize(disk, 10);
        host.backend.as_mut().unwrap().measure(address(7)).unwrap();
        host.wake();
        host.run_until("told", |host| host.be_node(7, "sectors").as_deref() == Some("10"));
        // The same guest does not believe it: the simulated storage would fail on a transfer outside the image.
        for state in ["6", "1"] {
            host.set_fe(7, &[("state", state)]);
            host.wait_be(7, if state == "6" { "6" } else { "2" });
        }
        host.destroy_domain(7);
        host.announce(Habits { end: Some(10), odd: 0, ..habits(7, disk, 60) }, "3");
        host.wait_be(7, "4");
        host.wait_served(7);
        let refused: u64 = host
            .backend
            .as_ref()
            .unwrap()
            .status()
            .filter(|status| status.address == address(7))
            .map(|status| status.counters.refused)
            .sum();
        assert!(refused > 20, "{refused} refused");
        neighbour_is_well(&mut host);
    });
}

#[test]
fn a_medium_is_changed_under_a_guest_that_reads() {
    both_places(|seed, own| {
        let mut host = with_neighbour(seed, own);
        let (disk, path) = host.add_image(300);
        let cdrom = [("device-type", Some("cdrom")), ("mode", Some("r"))];
        host.attach(7, &path, &cdrom);
        host.wait_be(7, "2");
        host.run_for(Duration::from_millis(200));
        let reads = Habits { reads: 15, flushes: 1, flushes_with_data: 0, odd: 0, ..habits(7, disk, 3000) };
        host.connect_guest(Habits { queues: 2, ring_pages: 2, ..reads });
        // Another disc of the same content: what is read stays right.
        for n in 0..4 {
            host.run_for(Duration::from_millis(3));
            let slash = "/".repeat(n % 2 + 1);
            host.set_be(7, &[("params", &format!("{slash}{}", path.trim_start_matches('/')))]);
            host.run_for(Duration::from_millis(3));
            assert_eq!(host.be_node(7, "state").as_deref(), Some("4"));
        }
        host.wait_served(7);
        assert_eq!(host.shared.xen.borrow().maps_of(7), 2);
        neighbour_is_well(&mut host);
        host.stop();
    });
}

#[test]
fn an_ejected_drive_answers_with_errors_and_takes_another_disc() {
    both_places(|seed, own| {
        let mut host = with_neighbour(seed, own);
        let (disk, path) = host.add_image(300);
        let cdrom = [("device-type", Some("cdrom")), ("mode", Some("r"))];
        host.attach(7, &path, &cdrom);
        let reads = Habits { reads: 15, flushes: 1, flushes_with_data: 0, odd: 0, ..habits(7, disk, 30) };
        host.connect_guest(reads.clone());
        host.wait_served(7);
        host.set_be(7, &[("params", "")]);
        host.run_until("ejected", |host| host.be_node(7, "sectors").as_deref() == Some("0"));
        assert_eq!(host.be_node(7, "state").as_deref(), Some("4"));
        let open = host.backend.as_mut().unwrap().pump().storage.open_files();
        assert_eq!(open, 1, "only the neighbour's image is open");
        assert!(host.backend.as_mut().unwrap().measure(address(7)).is_err());
        // A disc that is not there.
        host.set_be(7, &[("params", "/images/none")]);
        host.run_until("said", |host| host.be_node(7, "error").is_some());
        assert_eq!(host.be_node(7, "state").as_deref(), Some("4"));
        host.set_be(7, &[("params", &path)]);
        host.run_until("inserted", |host| host.be_node(7, "sectors").as_deref() == Some("300"));
        assert_eq!(host.be_node(7, "error"), None);
        // The next guest reads from a drive that is empty when it comes.
        for (state, expected) in [("6", "6"), ("1", "2")] {
            host.set_fe(7, &[("state", state)]);
            host.wait_be(7, expected);
        }
        host.destroy_domain(7);
        host.set_be(7, &[("params", "")]);
        host.announce(Habits { end: Some(0), ..reads }, "3");
        host.wait_be(7, "4");
        host.wait_served(7);
        neighbour_is_well(&mut host);
        host.stop();
    });
}

#[test]
fn a_process_that_dies_in_the_middle_of_a_change_loses_nothing() {
    for seed in 0..30 {
        let mut host = Host::new(seed, 3);
        let (disk, path) = host.add_image(300);
        let cdrom = [("device-type", Some("cdrom")), ("mode", Some("r"))];
        host.attach(7, &path, &cdrom);
        host.wait_be(7, "2");
        host.run_for(Duration::from_millis(200));
        let reads = Habits { reads: 15, flushes: 1, flushes_with_data: 0, odd: 0, ..habits(7, disk, 800) };
        host.connect_guest(Habits { queues: 2, ..reads });
        host.set_be(7, &[("params", &format!("/{path}"))]);
        for _ in 0..seed * 4 {
            host.round();
        }
        host.kill();
        host.start();
        host.wait_served(7);
        assert_eq!(host.be_node(7, "state").as_deref(), Some("4"));
        host.stop();
    }
}
