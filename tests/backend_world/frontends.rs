//! The frontends that exist, each by its script: what it writes, in which order, and what it waits for, from its first start to
//! the unplug. Where a real one would hang or panic, the script is stuck and the test fails.

#[path = "frontends/freebsd.rs"]
mod freebsd;
#[path = "frontends/grub.rs"]
mod grub;
#[path = "frontends/linux.rs"]
mod linux;
#[path = "frontends/minios.rs"]
mod minios;
#[path = "frontends/netbsd.rs"]
mod netbsd;
#[path = "frontends/openbsd.rs"]
mod openbsd;
#[path = "frontends/ovmf.rs"]
mod ovmf;
#[path = "frontends/windows.rs"]
mod windows;
#[path = "frontends/xenopsd.rs"]
mod xenopsd;

use std::time::Duration;

use rings::Abi;
use vbdd::pump::RingPlan;

use crate::host::{Host, RESTLESS};
use crate::world::guest::Habits;
use crate::{habits, neighbour_is_well, with_neighbour};

/// The guest of every script.
const GUEST: u16 = 7;

/// A guest with a disk, in some host.
struct Machine {
    host: Host,
    abi: Abi,
    disk: usize,
    path: String,
}

/// Runs a script with both layouts of the ring, in dom0 and in a driver domain, with xenstored calm and restless.
fn everywhere(changes: &[(&str, Option<&str>)], script: impl Fn(&mut Machine)) {
    for abi in [Abi::X86_64, Abi::X86_32] {
        for (seed, own) in [(0, 0), (1, 3), (RESTLESS, 0), (RESTLESS + 1, 3)] {
            let mut host = with_neighbour(seed, own);
            let (disk, path) = host.add_image(300);
            host.attach(GUEST, &path, changes);
            let mut machine = Machine { host, abi, disk, path };
            script(&mut machine);
            neighbour_is_well(&mut machine.host);
        }
    }
}

impl Machine {
    fn habits(&self, queues: usize, ring_pages: usize) -> Habits {
        Habits { queues, ring_pages, abi: self.abi, ..habits(GUEST, self.disk, 60) }
    }

    /// New rings; the requests come as fast as the backend takes them.
    fn rings(&mut self, habits: Habits) -> Vec<RingPlan> {
        self.host.make_rings(habits)
    }

    /// The frontend writes nodes in one transaction.
    fn write(&mut self, nodes: &[(&str, &str)]) {
        self.host.set_fe(GUEST, nodes);
    }

    /// The frontend writes nodes one by one, and everybody else goes on in between.
    fn write_apart(&mut self, nodes: &[(&str, &str)]) {
        for node in nodes {
            self.write(&[*node]);
            for _ in 0..self.host.shared.below(40) {
                self.host.round();
            }
        }
    }

    fn remove(&mut self, names: &[&str]) {
        for name in names {
            let _ = self.host.store.remove(GUEST, &format!("{}/{name}", Host::fe(GUEST)));
        }
    }

    fn state(&mut self, state: &str) {
        self.write(&[("state", state)]);
    }

    fn wait(&mut self, state: &str) {
        self.host.wait_be(GUEST, state);
    }

    fn be(&mut self, name: &str) -> Option<String> {
        self.host.be_node(GUEST, name)
    }

    /// What it asked for is answered.
    fn served(&mut self) {
        self.host.wait_served(GUEST);
    }

    /// The ring's pages and ports are given back to the guest's kernel; whoever used them is gone.
    fn drop_rings(&mut self) {
        assert_eq!(self.host.shared.xen.borrow().maps_of(GUEST), 0, "still mapped");
        self.host.destroy_domain(GUEST);
    }

    /// 5, 6 and 1, each until the backend has answered it.
    fn dance(&mut self) {
        for (state, answer) in [("5", "5"), ("6", "6")] {
            self.state(state);
            self.wait(answer);
        }
        self.drop_rings();
        self.state("1");
        self.wait("2");
    }

    /// A frontend that writes 4 itself, with its ring: in one transaction, or node by node.
    fn connect_at_once(&mut self, habits: Habits, further: &[(&'static str, &'static str)], apart: bool) {
        let rings = self.rings(Habits { indirect: 0, ..habits });
        let nodes = plain(&rings);
        let mut nodes = texts(&nodes);
        nodes.extend(further);
        nodes.push(("state", "4"));
        if apart {
            self.write_apart(&nodes);
        } else {
            self.write(&nodes);
        }
        self.wait("4");
    }

    /// The toolstack asks for the disk back, and a frontend lets go of it.
    fn unplugged(&mut self) {
        self.ask_back();
        self.state("5");
        self.wait("5");
        self.state("6");
        self.gone();
    }

    /// The toolstack asks for the disk back.
    fn ask_back(&mut self) {
        self.host.set_be(GUEST, &[("online", "0"), ("state", "5")]);
    }

    /// The toolstack's end of an unplug: 6, and then whoever has to removes the directory.
    fn gone(&mut self) {
        self.host.run_until("6, or removed", |host| {
            matches!(host.be_node(GUEST, "state").as_deref(), Some("6") | None)
        });
        if self.host.own == 0 {
            assert_eq!(self.be("state").as_deref(), Some("6"));
            for path in [self.host.be(GUEST), Host::fe(GUEST)] {
                self.host.store.remove(0, &path).unwrap();
            }
        }
        self.host.run_until("removed", |host| host.be_node(GUEST, "state").is_none());
        self.host.run_for(Duration::from_secs(3));
        assert_eq!(self.host.shared.xen.borrow().maps_of(GUEST), 0);
        assert_eq!(self.host.backend.as_ref().unwrap().totals().disks, 1);
    }

    /// The nodes that every driver wants to see at 4.
    fn sizes(&mut self) {
        for (name, value) in [("sectors", "300"), ("sector-size", "512"), ("info", "0")] {
            assert_eq!(self.be(name).as_deref(), Some(value), "{name}");
        }
        assert!(self.be("physical-sector-size").is_some());
    }
}

/// The nodes of a ring of one page.
fn plain(rings: &[RingPlan]) -> [(&'static str, String); 3] {
    [
        ("ring-ref", rings[0].grants[0].to_string()),
        ("event-channel", rings[0].remote_port.to_string()),
        ("protocol", rings[0].abi.protocol().to_owned()),
    ]
}

/// As pairs of texts.
fn texts<'a>(nodes: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    nodes.iter().map(|(name, value)| (*name, value.as_str())).collect()
}
