//! OVMF XenPvBlkDxe: waits for exactly 2, writes 4 itself, sends flush and barrier if both are offered, hangs if 2 or 6 is
//! skipped; the operating system comes after it.

use super::{Machine, everywhere};
use crate::world::guest::Habits;

fn init(machine: &mut Machine) {
    machine.wait("2");
    let barriers = u64::from(machine.be("feature-barrier").as_deref() == Some("1"));
    let habits = machine.habits(1, 1);
    machine.connect_at_once(Habits { depth: 1, barriers, ..habits }, &[], true);
    machine.sizes();
    machine.served();
}

#[test]
fn firmware_then_an_operating_system_then_firmware() {
    everywhere(&[], |machine| {
        for _ in 0..2 {
            init(machine);
            machine.dance();
            machine.remove(&["ring-ref", "event-channel", "protocol"]);
            machine.host.connect_guest(machine.habits(4, 1));
            machine.served();
            machine.dance();
            machine.remove(&["multi-queue-num-queues"]);
        }
        init(machine);
        machine.unplugged();
    });
}
