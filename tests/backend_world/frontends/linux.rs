//! Linux xen-blkfront: several queues and pages, 3 after our 2; never waits on resume; a crash kernel clears up after the last
//! one and leaves its nodes where they are; old ones answer an unplug with 5 and go on.

use std::time::Duration;

use super::{GUEST, Machine, everywhere};
use crate::host::{Host, ring_nodes};
use crate::world::guest::Habits;

/// What `blkfront_probe` and `talk_to_blkback` write: all but the state in one transaction with it.
fn talk(machine: &mut Machine, habits: Habits) {
    let rings = machine.rings(habits);
    let mut nodes = ring_nodes(&rings);
    nodes.push(("feature-persistent".to_owned(), "1".to_owned()));
    nodes.push(("state".to_owned(), "3".to_owned()));
    let nodes: Vec<(&str, &str)> =
        nodes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    machine.write(&nodes);
}

fn start(machine: &mut Machine, queues: usize, pages: usize) {
    machine.wait("2");
    let habits = machine.habits(queues, pages);
    talk(machine, Habits { indirect: 4, ..habits });
    machine.wait("4");
    machine.sizes();
    machine.state("4");
    machine.served();
}

#[test]
fn from_probe_over_module_reload_to_unplug() {
    everywhere(&[], |machine| {
        start(machine, 4, 2);
        assert_eq!(machine.be("feature-flush-cache").as_deref(), Some("1"));
        // The module is unloaded and loaded.
        machine.dance();
        start(machine, 1, 1);
        machine.ask_back();
        machine.host.run_for(Duration::from_millis(20));
        machine.state("5");
        machine.host.run_for(Duration::from_millis(20));
        machine.state("6");
        machine.gone();
    });
}

/// After a restore the frontend writes its ring and 3 at once, into directories that are new.
#[test]
fn resumed_without_a_look_at_2() {
    everywhere(&[], |machine| {
        let habits = machine.habits(1, 1);
        talk(machine, habits);
        machine.wait("4");
        machine.state("4");
        machine.served();
        machine.ask_back();
        machine.state("6");
        machine.gone();
    });
}

/// A crash kernel with one processor finds 4, goes through 5, 6 and 1 with 5 s for each, and writes a plain ring beside the
/// nodes of four queues.
#[test]
fn a_crash_kernel_after_four_queues() {
    everywhere(&[], |machine| {
        start(machine, 4, 2);
        let began = machine.host.shared.clock.now();
        machine.dance();
        let took = machine.host.shared.clock.now() - began;
        assert!(took < Duration::from_secs(5), "{took:?}");
        start(machine, 1, 1);
        machine.ask_back();
        machine.state("6");
        machine.gone();
    });
}

/// Before 5.14: a disk that is mounted is not given back, and written to until it is.
#[test]
fn an_old_one_that_refuses_to_close() {
    everywhere(&[], |machine| {
        machine.wait("2");
        machine.host.run_for(Duration::from_millis(200));
        let habits = machine.habits(1, 1);
        talk(machine, Habits { requests: 400, ..habits });
        machine.wait("4");
        machine.state("4");
        machine.ask_back();
        machine.state("5");
        machine.served();
        machine.host.run_for(Duration::from_secs(30));
        assert_eq!(machine.host.shared.xen.borrow().maps_of(GUEST), 1, "served until it lets go");
        machine.state("6");
        machine.gone();
    });
}

#[test]
fn destroyed_in_the_middle() {
    everywhere(&[], |machine| {
        machine.wait("2");
        machine.host.run_for(Duration::from_millis(200));
        let habits = machine.habits(2, 4);
        talk(machine, Habits { requests: 5000, ..habits });
        machine.wait("4");
        machine.host.destroy_domain(GUEST);
        machine.ask_back();
        let fe = Host::fe(GUEST);
        machine.host.store.remove(0, &fe).unwrap();
        machine.host.run_until("6, or removed", |host| {
            matches!(host.be_node(GUEST, "state").as_deref(), Some("6") | None)
        });
        assert_eq!(machine.host.shared.xen.borrow().maps_of(GUEST), 0);
    });
}
