//! MiniOS (and pv-grub on it): writes 4 itself, with its ring; reads `mode`; goes through 5, 6, 1 at its end.

use super::{Machine, everywhere};

fn init(machine: &mut Machine) {
    let habits = machine.habits(1, 1);
    machine.connect_at_once(habits, &[("feature-persistent", "0")], false);
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
        machine.unplugged();
    });
}
