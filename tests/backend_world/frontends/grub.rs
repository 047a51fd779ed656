//! GRUB (pv and pvh): 3 at once, so 2 must stand before the guest runs; one request of one segment at a time; at its end
//! 6, the nodes cleared, 1, and no wait: the kernel comes next.

use super::{GUEST, Machine, everywhere, plain, texts};
use crate::world::guest::Habits;

fn boot(machine: &mut Machine) {
    let habits = machine.habits(1, 1);
    let one =
        Habits { depth: 1, segments_max: 1, indirect: 0, discards: 0, barriers: 0, requests: 30, ..habits };
    let rings = machine.rings(one);
    let nodes = plain(&rings);
    let mut nodes = texts(&nodes);
    nodes.push(("state", "3"));
    machine.write(&nodes);
    machine.wait("4");
    assert!(machine.be("dev").is_some());
    machine.sizes();
    machine.state("4");
    machine.served();
}

fn finish(machine: &mut Machine) {
    machine.state("6");
    machine.wait("6");
    machine.drop_rings();
    machine.remove(&["ring-ref", "event-channel"]);
    machine.state("1");
}

#[test]
fn boots_a_kernel_from_its_disk() {
    everywhere(&[], |machine| {
        machine.wait("2");
        boot(machine);
        finish(machine);
        // The kernel has more queues than the loader, and waits for 2.
        machine.host.connect_guest(machine.habits(2, 2));
        machine.served();
        machine.ask_back();
        machine.state("5");
        machine.state("6");
        machine.gone();
    });
}

/// A chain of loaders, none of which waits for anything but 4 and 6.
#[test]
fn chained_without_a_wait_for_2() {
    everywhere(&[], |machine| {
        machine.wait("2");
        for _ in 0..3 {
            boot(machine);
            finish(machine);
        }
        machine.host.destroy_domain(GUEST);
        boot(machine);
        machine.ask_back();
        machine.state("6");
        machine.gone();
    });
}
