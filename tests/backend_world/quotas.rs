//! A driver domain's quotas in xenstore, and many disks in one process.

use std::time::Duration;

use xenstore::{Access, Permission};

use crate::host::Host;
use crate::world::guest::Habits;
use crate::{habits, unplug_cleanly};

#[test]
fn a_disk_whose_watch_is_refused_is_served_once_another_has_gone() {
    let mut host = Host::new(1, 3);
    // One for each of three kinds, and four disks.
    host.store.quotas.watches = 7;
    for guest in 1..=6 {
        let (disk, path) = host.add_image(100);
        host.attach(guest, &path, &[]);
        host.wait_be(guest, "2");
        host.announce(habits(guest, disk, 20), "3");
    }
    for guest in 1..=4 {
        host.wait_be(guest, "4");
        host.set_fe(guest, &[("state", "4")]);
        host.wait_served(guest);
    }
    host.run_for(Duration::from_secs(20));
    let waiting: Vec<u16> =
        (1..=6).filter(|guest| host.be_node(*guest, "state").as_deref() == Some("2")).collect();
    assert!(waiting.len() <= 2, "{waiting:?}");
    for guest in 1..=2 {
        unplug_cleanly(&mut host, guest);
    }
    for guest in 5..=6 {
        host.wait_be(guest, "4");
        host.set_fe(guest, &[("state", "4")]);
        host.wait_served(guest);
    }
    host.stop();
}

#[test]
fn a_disk_that_finds_no_room_for_its_nodes_waits_for_some() {
    let mut host = Host::new(2, 3);
    let (_, path) = host.add_image(100);
    for guest in 1..=3 {
        host.attach(guest, &path, &[("mode", Some("r"))]);
        host.wait_be(guest, "2");
    }
    host.settle();
    // What the toolstack makes counts too, and is made by domain 0, which no quota holds back.
    host.store.quotas.nodes = host.store.store().owned_by(3) + 12;
    host.attach(4, &path, &[("mode", Some("r"))]);
    host.run_for(Duration::from_secs(30));
    assert_eq!(host.be_node(4, "state").as_deref(), Some("1"), "no room, and nothing half written");
    assert_eq!(host.be_node(4, "sectors"), None);
    host.set_be(1, &[("online", "0"), ("state", "5")]);
    host.set_fe(1, &[("state", "6")]);
    host.wait_be(4, "2");
    host.stop();
}

/// One of several disks of a guest, as libxl makes it.
fn plug(host: &mut Host, guest: u16, devid: u32, path: &str) {
    let own = host.own;
    let be = format!("/local/domain/{own}/backend/vbd/{guest}/{devid}");
    let fe = format!("/local/domain/{guest}/device/vbd/{devid}");
    for (directory, owner, reader) in [(&be, own, guest), (&fe, guest, own)] {
        host.store.mkdir(0, directory).unwrap();
        let list = [(owner, Access::None), (reader, Access::Read)];
        let list = list.map(|(domain, access)| Permission { domain, access });
        host.store.set_permissions(0, directory, &list).unwrap();
    }
    let id = guest.to_string();
    let backend = [
        ("frontend", fe.as_str()),
        ("frontend-id", &id),
        ("online", "1"),
        ("removable", "0"),
        ("bootable", "1"),
        ("dev", "xvda"),
        ("type", "phy"),
        ("mode", "w!"),
        ("device-type", "disk"),
        ("discard-enable", "1"),
        ("specification", "xen"),
        ("script", "block"),
        ("params", path),
        ("state", "1"),
    ];
    let frontend = [("backend", be.as_str()), ("backend-id", "3"), ("state", "1")];
    let at = |directory: &str, name: &str| format!("{directory}/{name}");
    let all: Vec<(String, &str)> = backend
        .iter()
        .map(|(name, value)| (at(&be, name), *value))
        .chain(frontend.iter().map(|(name, value)| (at(&fe, name), *value)))
        .collect();
    let all: Vec<(&str, &str)> = all.iter().map(|(path, value)| (path.as_str(), *value)).collect();
    host.store.write_all(0, &all).unwrap();
}

/// 200 disks of 50 guests in one process, all with a ring: plugged, connected, used, taken over, unplugged.
#[test]
fn two_hundred_disks_of_fifty_guests() {
    const DEVIDS: [u32; 4] = [51712, 51728, 51744, 51760];
    let mut host = Host::new(1, 3);
    host.store.quotas.nodes = 20_000;
    host.store.quotas.watches = 1000;
    let mut nodes_before = host.store.store().owned_by(3);
    for guest in 1..=50 {
        host.store.introduce_domain(guest);
        let (disk, path) = host.add_image(200);
        for devid in DEVIDS {
            plug(&mut host, guest, devid, &path);
        }
        // Each of the guest's rings is one disk's; they all share an image.
        let shape = Habits { queues: 4, requests: 15, ..habits(guest, disk, 15) };
        let rings = host.make_rings(shape);
        for (devid, ring) in DEVIDS.into_iter().zip(&rings) {
            let fe = format!("/local/domain/{guest}/device/vbd/{devid}");
            let (grant, port) = (ring.grants[0].to_string(), ring.remote_port.to_string());
            let nodes = [
                ("ring-ref", grant.as_str()),
                ("event-channel", &port),
                ("protocol", "x86_64-abi"),
                ("state", "3"),
            ];
            for (name, value) in nodes {
                host.store.write(guest, &format!("{fe}/{name}"), value.as_bytes()).unwrap();
            }
        }
    }
    host.run_until("200 disks connected", |host| host.backend.as_ref().unwrap().totals().connected == 200);
    for guest in 1..=50 {
        host.wait_served(guest);
    }
    let owned = host.store.store().owned_by(3) - std::mem::take(&mut nodes_before);
    assert!(owned / 200 <= 36, "{owned} nodes for 200 disks");
    assert!(host.outstanding_max() < 20, "{} requests outstanding", host.outstanding_max());
    assert!(host.backend.as_ref().unwrap().status_json().matches("\"phase\":\"connected\"").count() == 200);
    host.settle();
    host.stop();
    host.start();
    host.run_until("taken over", |host| host.backend.as_ref().unwrap().totals().connected == 200);
    for guest in 1..=50 {
        host.destroy_domain(guest);
        for devid in DEVIDS {
            host.store.remove(0, &format!("/local/domain/3/backend/vbd/{guest}/{devid}")).unwrap();
        }
    }
    host.run_until("forgotten", |host| host.backend.as_ref().unwrap().totals().disks == 0);
    host.check_nothing_held();
}
