//! MiniOS (and pv-grub on it): writes 4 itself, with its ring; reads `mode`; goes through 5, 6, 1 at its end.

use super::{Machine, everywhere, plain, texts};
use crate::world::guest::Habits;

fn init(machine: &mut Machine) {
    let habits = machine.habits(1, 1);
    let rings = machine.rings(Habits { indirect: 0, ..habits });
    let nodes = plain(&rings);
    let mut nodes = texts(&nodes);
    nodes.extend([("feature-persistent", "0"), ("state", "4")]);
    machine.write(&nodes);
    machine.wait("4");
    assert_eq!(machine.be("mode").as_deref(), Some("w"));
    machine.sizes();
    machine.served();
}

#[test]
fn from_init_to_shutdown_and_again() {
    everywhere(&[], |machine| {
        for _ in 0..3 {
            init(machine);
            machine.dance();
        }
        init(machine);
        machine.ask_back();
        machine.state("5");
        machine.wait("5");
        machine.state("6");
        machine.gone();
    });
}
