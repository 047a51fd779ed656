//! Windows xenvbd: at each start 5, 6, 1, each until the backend has answered exactly, without a timeout, also on a device that
//! was never connected; always says how many queues it uses; reads `removable` and `sm-data`.

use super::{Machine, everywhere};
use crate::host::ring_nodes;
use crate::world::guest::Habits;

fn start(machine: &mut Machine, queues: usize, pages: usize) {
    machine.host.run_until("not 1", |host| host.be_node(super::GUEST, "state").as_deref() != Some("1"));
    machine.state("5");
    machine.host.run_until("5 or 6", |host| {
        matches!(host.be_node(super::GUEST, "state").as_deref(), Some("5" | "6"))
    });
    machine.state("6");
    machine.wait("6");
    machine.drop_rings();
    machine.state("1");
    machine.wait("2");
    assert!(machine.be("removable").is_some());
    assert_eq!(machine.be("sm-data/scsi/0x12/0x83").as_deref(), Some("AIMAMQIBAC0="), "is left alone");
    let habits = machine.habits(queues, pages);
    let rings = machine.rings(Habits { indirect: 3, ..habits });
    let mut nodes = ring_nodes(&rings);
    nodes.retain(|(name, _)| name != "multi-queue-num-queues");
    nodes.push(("multi-queue-num-queues".to_owned(), queues.to_string()));
    nodes.push(("state".to_owned(), "3".to_owned()));
    let nodes: Vec<(&str, &str)> =
        nodes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    machine.write(&nodes);
    machine.wait("4");
    machine.sizes();
    machine.state("4");
    machine.served();
}

#[test]
fn the_dance_at_every_start() {
    everywhere(&[("sm-data/scsi/0x12/0x83", Some("AIMAMQIBAC0="))], |machine| {
        start(machine, 2, 4);
        start(machine, 1, 1);
        start(machine, 4, 1);
        machine.ask_back();
        machine.state("5");
        machine.state("6");
        machine.gone();
    });
}
