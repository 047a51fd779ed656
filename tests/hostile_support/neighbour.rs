//! What tests of hostile guests begin and end with: a host with a sane guest beside the hostile one.

use rings::Abi;
use rings::request::operation::READ;

use super::puppet::{DOMAIN, Puppet};
use crate::host::Host;
use crate::world::guest::Habits;

/// Every layout of a ring.
pub const ABIS: [Abi; 3] = [Abi::X86_64, Abi::X86_32, Abi::Arm];
/// The sane guest.
pub const NEIGHBOUR: u16 = 100;

/// A host with a sane guest that does I/O, and an image of 64 sectors for a hostile one.
pub fn host() -> (Host, String) {
    let mut host = Host::new(1, 3);
    let (disk, path) = host.add_image(300);
    host.attach(NEIGHBOUR, &path, &[]);
    host.connect_guest(Habits { requests: 200, depth: 8, ..Habits::new(NEIGHBOUR, disk) });
    let (_, path) = host.add_image(64);
    (host, path)
}

/// The same, with the hostile one connected.
pub fn puppet(abi: Abi, mode: &str) -> (Host, Puppet) {
    let (mut host, path) = host();
    let puppet = Puppet::connected(&mut host, DOMAIN, abi, &path, mode);
    (host, puppet)
}

/// The guest goes; nothing of it is held, and the neighbour was served.
pub fn ends_well(mut host: Host) {
    if host.shared.xen.borrow().is_alive(DOMAIN) {
        host.destroy_domain(DOMAIN);
    }
    let (be, fe) = (host.be(DOMAIN), Host::fe(DOMAIN));
    let _ = host.store.remove(0, &fe);
    let _ = host.store.remove(0, &be);
    host.run_until("forgotten", |host| host.backend.as_ref().unwrap().totals().disks == 1);
    assert_eq!(host.shared.xen.borrow().maps_of(DOMAIN), 0);
    host.wait_served(NEIGHBOUR);
    assert_eq!(host.be_node(NEIGHBOUR, "error"), None);
    assert_eq!(host.shared.xen.borrow().held(), (1, 1));
    host.stop();
}

/// The frontend goes through 6 and 1, and is served again.
pub fn comes_back(host: &mut Host, puppet: &mut Puppet) {
    host.set_fe(DOMAIN, &[("state", "6")]);
    host.wait_be(DOMAIN, "6");
    assert_eq!(host.shared.xen.borrow().maps_of(DOMAIN), 0);
    host.set_fe(DOMAIN, &[("state", "1")]);
    host.wait_be(DOMAIN, "2");
    puppet.renew();
    puppet.announce(host, "3");
    host.wait_be(DOMAIN, "4");
    host.set_fe(DOMAIN, &[("state", "4")]);
    let whole = puppet.whole(0);
    assert_eq!(puppet.ask(host, READ, 0, &[whole], 1), 0);
}
