//! OpenBSD xbf: several ring pages, 10 s for each wait, and answers taken by position: needs the disk's option `in-order`.

use std::time::Duration;

use super::{Machine, everywhere};
use crate::world::guest::Habits;

fn init(machine: &mut Machine) {
    let began = machine.host.shared.clock.now();
    machine.state("1");
    machine.wait("2");
    for name in ["type", "dev"] {
        assert!(machine.be(name).is_some(), "{name}");
    }
    let habits = machine.habits(1, 4);
    let rings = machine.rings(Habits { in_order: true, indirect: 0, barriers: 0, ..habits });
    let names: Vec<String> = (0..4).map(|page| format!("ring-ref{page}")).collect();
    let grants: Vec<String> = rings[0].grants.iter().map(ToString::to_string).collect();
    let port = rings[0].remote_port.to_string();
    let protocol = machine.abi.protocol();
    let mut nodes = vec![("ring-page-order", "2"), ("event-channel", port.as_str()), ("protocol", protocol)];
    nodes.extend(names.iter().zip(&grants).map(|(name, grant)| (name.as_str(), grant.as_str())));
    nodes.push(("state", "3"));
    machine.write_apart(&nodes);
    machine.wait("4");
    assert!(machine.host.shared.clock.now() - began < Duration::from_secs(10));
    machine.sizes();
    machine.state("4");
    machine.served();
}

#[test]
fn from_attach_to_detach_with_answers_in_order() {
    everywhere(&[("vbdd", Some("in-order"))], |machine| {
        init(machine);
        machine.dance();
        init(machine);
        machine.ask_back();
        machine.state("5");
        machine.state("6");
        machine.gone();
    });
}
