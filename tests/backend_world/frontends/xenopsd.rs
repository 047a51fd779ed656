//! xenopsd: kind vbd3, no `script`, keys of its own; waits for `hotplug-status`, not for 2; goes by FE 6 or the end of
//! `hotplug-status` at an unplug, removes FE first; changes media by `params`.

use std::time::Duration;

use rings::Abi;

use super::{GUEST, Machine};
use crate::host::{Host, RESTLESS};
use crate::world::guest::Habits;
use crate::{habits, neighbour_is_well, with_neighbour};

const KEYS: [(&str, &str); 7] = [
    ("physical-device", "fd:3"),
    ("physical-device-path", "/dev/sm/backend/sr/vdi"),
    ("sm-data/vdi-uuid", "d0a5cd3c-8f4b-4a10-9d4c-0f0a2f1c7d11"),
    ("sm-data/storage-type", "ext"),
    ("sm-data/scsi/0x12/0x80", "AIAAAA=="),
    ("polling-duration", "1000"),
    ("polling-idle-threshold", "50"),
];

/// Plugged, and the storage attached as xenopsd waits for it.
fn plugged(seed: u64, abi: Abi, changes: &[(&str, Option<&str>)]) -> Machine {
    let mut host = with_neighbour(seed, 0);
    let (disk, path) = host.add_image(300);
    host.kind = "vbd3";
    let mut all: Vec<(&str, Option<&str>)> = KEYS.iter().map(|(name, value)| (*name, Some(*value))).collect();
    all.extend([("bootable", None), ("vdi", Some("vdi"))]);
    all.extend_from_slice(changes);
    host.attach(GUEST, &path, &all);
    host.run_until("hotplug-status", |host| host.be_node(GUEST, "hotplug-status").is_some());
    assert_eq!(host.be_node(GUEST, "hotplug-status").as_deref(), Some("connected"));
    Machine { host, abi, disk, path }
}

fn scripts(changes: &[(&str, Option<&str>)], script: impl Fn(&mut Machine)) {
    for abi in [Abi::X86_64, Abi::X86_32] {
        for seed in [0, 1, RESTLESS] {
            let mut machine = plugged(seed, abi, changes);
            script(&mut machine);
            machine.host.kind = "vbd";
            neighbour_is_well(&mut machine.host);
        }
    }
}

fn connect(machine: &mut Machine, requests: u32) {
    let shape = Habits { queues: 2, abi: machine.abi, ..habits(GUEST, machine.disk, requests) };
    machine.host.connect_guest(shape);
}

/// xenopsd removes both directories, FE first.
fn removed(machine: &mut Machine) {
    let _ = machine.host.store.remove(0, &Host::fe(GUEST));
    let be = machine.host.be(GUEST);
    machine.host.store.remove(0, &be).unwrap();
    machine.host.run_for(Duration::from_secs(2));
    assert_eq!(machine.host.shared.xen.borrow().maps_of(GUEST), 0);
    assert_eq!(machine.host.backend.as_ref().unwrap().totals().disks, 1);
    assert_eq!(machine.be("state"), None, "nothing is made anew");
}

#[test]
fn a_clean_unplug_goes_by_hotplug_status() {
    scripts(&[], |machine| {
        connect(machine, 60);
        machine.served();
        assert_eq!(machine.be("physical-device").as_deref(), Some("fd:3"), "its own nodes are left alone");
        machine.ask_back();
        machine.state("5");
        machine.host.run_for(Duration::from_millis(10));
        machine.state("6");
        machine.host.run_until("released", |host| host.be_node(GUEST, "hotplug-status").is_none());
        removed(machine);
    });
}

/// The storage may be taken away as soon as 6 stands or `hotplug-status` is gone: nothing may be open then.
#[test]
fn a_forced_unplug_lets_go_of_the_storage_first() {
    scripts(&[], |machine| {
        connect(machine, 3000);
        machine.host.set_be(GUEST, &[("online", "0")]);
        machine.host.store.remove(0, &Host::fe(GUEST)).unwrap();
        machine.host.run_until("released", |host| {
            host.be_node(GUEST, "state").as_deref() == Some("6")
                || host.be_node(GUEST, "hotplug-status").is_none()
        });
        let open = machine.host.backend.as_mut().unwrap().pump().storage.open_files();
        assert_eq!(open, 1, "the neighbour's");
        machine.host.destroy_domain(GUEST);
        removed(machine);
    });
}

#[test]
fn discs_come_and_go() {
    scripts(&[("device-type", Some("cdrom")), ("mode", Some("r")), ("removable", Some("1"))], |machine| {
        let reads = Habits { reads: 15, flushes: 1, ..habits(GUEST, machine.disk, 40) };
        let reads = Habits { flushes_with_data: 0, discards: 0, barriers: 0, odd: 0, ..reads };
        machine.host.connect_guest(Habits { abi: machine.abi, ..reads });
        machine.served();
        assert_eq!(machine.be("info").as_deref(), Some("7"));
        for _ in 0..2 {
            // Eject.
            machine.host.set_be(GUEST, &[("params", "")]);
            let be = machine.host.be(GUEST);
            let _ = machine.host.store.remove(0, &format!("{be}/sm-data"));
            machine.host.run_until("ejected", |host| host.be_node(GUEST, "sectors").as_deref() == Some("0"));
            // Insert; the same disc again is written with one more slash, so that a watch fires.
            for path in [machine.path.clone(), format!("/{}", machine.path)] {
                machine.host.set_be(GUEST, &[("params", &path)]);
                machine
                    .host
                    .run_until("inserted", |host| host.be_node(GUEST, "sectors").as_deref() == Some("300"));
                machine.host.run_for(Duration::from_millis(50));
                assert_eq!(machine.be("state").as_deref(), Some("4"));
            }
        }
        machine.ask_back();
        machine.state("6");
        machine.host.run_until("released", |host| host.be_node(GUEST, "hotplug-status").is_none());
        removed(machine);
    });
}

#[test]
fn a_disk_that_cannot_be_attached_is_an_error_and_not_a_wait() {
    for params in ["/images/none", "nbd:unix:/run/nbd:exportname=qemu_node", "vhd:/images/1"] {
        let mut host = with_neighbour(0, 0);
        host.kind = "vbd3";
        host.attach(GUEST, params, &[]);
        host.run_until("hotplug-error", |host| host.be_node(GUEST, "hotplug-error").is_some());
        assert_eq!(host.be_node(GUEST, "hotplug-status").as_deref(), Some("error"));
        host.kind = "vbd";
        neighbour_is_well(&mut host);
    }
}
