//! FreeBSD xbd: ring nodes one by one outside a transaction, pages by both schemes, `max-ring-pages` read after
//! `max-ring-page-order`; 5 and 6 in one go when the backend closes.

use super::{Machine, everywhere};
use crate::world::guest::Habits;

fn initialize(machine: &mut Machine) {
    machine.wait("2");
    let order: u32 = machine.be("max-ring-page-order").map_or(0, |text| text.parse().unwrap());
    let pages: u32 = machine.be("max-ring-pages").map_or(1 << order, |text| text.parse().unwrap());
    assert_eq!((order, pages), (4, 16));
    let habits = machine.habits(1, 16);
    let rings = machine.rings(Habits { indirect: 0, ..habits });
    let mut nodes: Vec<(String, String)> = Vec::new();
    for (page, grant) in rings[0].grants.iter().enumerate() {
        nodes.push((format!("ring-ref{page}"), grant.to_string()));
    }
    for (name, value) in [
        ("num-ring-pages", "16".to_owned()),
        ("ring-page-order", "4".to_owned()),
        ("max-requests", "256".to_owned()),
        ("max-request-segments", "11".to_owned()),
        ("max-request-size", "40960".to_owned()),
        ("event-channel", rings[0].remote_port.to_string()),
        ("protocol", machine.abi.protocol().to_owned()),
        ("state", "3".to_owned()),
    ] {
        nodes.push((name.to_owned(), value));
    }
    let nodes: Vec<(&str, &str)> =
        nodes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    machine.write_apart(&nodes);
    machine.wait("4");
    machine.sizes();
    machine.state("4");
    machine.served();
}

#[test]
fn from_attach_over_a_reboot_to_unplug() {
    everywhere(&[], |machine| {
        initialize(machine);
        // Told to close while nothing is mounted: 5 and 6 without a look at us.
        machine.write_apart(&[("state", "5"), ("state", "6")]);
        machine.wait("6");
        machine.drop_rings();
        machine.write_apart(&[("state", "1")]);
        initialize(machine);
        machine.ask_back();
        machine.write_apart(&[("state", "5"), ("state", "6")]);
        machine.gone();
    });
}
