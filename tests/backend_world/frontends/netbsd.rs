//! NetBSD xbd: one page, 3 without a wait for 2, a panic if a size is missing at 4.

use super::{Machine, everywhere, plain, texts};
use crate::world::guest::Habits;

fn resume(machine: &mut Machine) {
    let habits = machine.habits(1, 1);
    let rings = machine.rings(Habits { indirect: 0, ..habits });
    let nodes = plain(&rings);
    machine.write(&texts(&nodes));
    machine.state("3");
    machine.wait("4");
    machine.sizes();
    machine.state("4");
    machine.served();
}

#[test]
fn from_attach_over_suspend_to_detach() {
    everywhere(&[], |machine| {
        resume(machine);
        machine.state("5");
        machine.wait("5");
        machine.state("6");
        machine.wait("6");
        machine.drop_rings();
        machine.state("1");
        resume(machine);
        machine.ask_back();
        machine.state("5");
        machine.state("6");
        machine.gone();
    });
}
