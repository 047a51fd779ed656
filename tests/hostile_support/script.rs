//! One whole connection played from bytes: a hostile guest's ring, nodes and timing, a toolstack, a failing machine, and a
//! sane neighbour. Fuzzing finds the bytes; the committed ones are played by `cargo test`.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use ::xenstore::{Access, Permission};
use rings::{Abi, LARGEST_STRIDE, Segment};

use super::lines;
use super::puppet::{DATA_FRAMES, DOMAIN, Meddler, Puppet, Writes};
use crate::host::{DEVID, Host};
use crate::world::guest::Habits;
use crate::world::{Faults, xenstore};

const NEIGHBOUR: u16 = 100;

/// Steps of one script at most.
const STEPS_MAX: usize = 400;

/// Frontend nodes that a script may write.
const KEYS: [&str; 24] = [
    "state",
    "ring-ref",
    "event-channel",
    "protocol",
    "ring-page-order",
    "num-ring-pages",
    "ring-ref0",
    "ring-ref1",
    "ring-ref2",
    "ring-ref3",
    "multi-queue-num-queues",
    "queue-0/ring-ref",
    "queue-0/event-channel",
    "queue-1/ring-ref",
    "queue-1/event-channel",
    "queue-0/ring-ref0",
    "queue-0/ring-ref1",
    "feature-persistent",
    "feature-persistent-grants",
    "device-type",
    "virtual-device",
    "state/x",
    "trusted",
    "backend",
];

/// Values that decide something.
const VALUES: [&str; 24] = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
    "10",
    "16",
    "-1",
    "256",
    "65535",
    "65536",
    "4294967295",
    "4294967296",
    "18446744073709551616",
    "x86_64-abi",
    "x86_32-abi",
    "arm-abi",
    "",
    " 4",
];

pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    pub fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub fn some(&mut self, most: usize) -> Vec<u8> {
        let length = usize::from(self.byte()) % (most + 1);
        (0..length).map(|_| self.byte()).collect()
    }
}

struct Play {
    host: Host,
    puppet: Puppet,
    writes: Writes,
    alive: bool,
    plugged: bool,
    /// The process has had a successor, which does not clear up journals of rings that it never served.
    succeeded: bool,
}

/// Plays a script, then lets all end, and looks for what is left over. Panics are what fuzzing is looking for.
pub fn play(data: &[u8]) {
    lines::keep();
    let mut bytes = Bytes(data);
    let setting = bytes.byte();
    let mut play = Play::new(setting);
    for _ in 0..STEPS_MAX {
        let Some(op) = bytes.next() else { break };
        play.step(op, &mut bytes);
        play.host.shared.check().unwrap();
    }
    play.end();
}

impl Play {
    fn new(setting: u8) -> Play {
        let own = if setting & 1 == 0 { 3 } else { 0 };
        let abi = [Abi::X86_64, Abi::X86_32, Abi::Arm, Abi::X86_64][usize::from(setting >> 1) % 4];
        let ring_pages = 1 << ((setting >> 3) % 3);
        let mut host = Host::new(1, own);
        if setting & 0x20 != 0 {
            host.store.faults = xenstore::Faults::MANY;
        }
        let (disk, path) = host.add_image(300);
        host.attach(NEIGHBOUR, &path, &[]);
        host.connect_guest(Habits { requests: 20, depth: 4, ..Habits::new(NEIGHBOUR, disk) });
        let (_, path) = host.add_image(64);
        let mode = if setting & 0x40 == 0 { "w" } else { "r" };
        host.attach(DOMAIN, &path, &[("mode", Some(mode))]);
        let puppet = Puppet::new(&host.shared, DOMAIN, abi, ring_pages);
        let writes: Rc<RefCell<VecDeque<_>>> = Rc::default();
        let meddler = Meddler { domain: DOMAIN, memory: puppet.memory.clone(), writes: writes.clone() };
        host.shared.guests.borrow_mut().push(Box::new(meddler));
        if setting & 0x80 == 0 {
            // Most scripts begin where a ring is served.
            host.wait_be(DOMAIN, "2");
            puppet.announce(&mut host, "3");
            host.run_for(Duration::from_millis(200));
        }
        Play { host, puppet, writes, alive: true, plugged: true, succeeded: false }
    }

    fn step(&mut self, op: u8, bytes: &mut Bytes<'_>) {
        match op % 28 {
            0 => self.host.run_for(Duration::from_micros(1 << (bytes.byte() % 22))),
            1 => (0..bytes.byte() % 64).for_each(|_| self.round()),
            2 | 3 => self.write_node(bytes),
            4 => self.set_state(VALUES[usize::from(bytes.byte() % 9)]),
            5 => self.set_permissions(bytes.byte()),
            6 => {
                let (at, value) = (bytes.word(), bytes.some(63));
                self.write_memory(0, at, &value);
            }
            7 => {
                let frame = usize::from(bytes.byte());
                let (at, value) = (bytes.word(), bytes.some(63));
                self.write_memory(frame, at, &value);
            }
            8 => self.write_index(bytes),
            9..=11 => self.request(bytes),
            12 => self.raw_request(bytes),
            13 | 14 => {
                let _ = self.puppet.front.publish();
                self.notify(1);
            }
            15 => self.notify(bytes.byte()),
            16 => (0..bytes.byte()).for_each(|_| self.take()),
            17 => self.regrant(bytes.byte()),
            18 => self.toolstack(bytes.byte()),
            19 => self.frontend_directory(bytes.byte()),
            20 => self.faults(bytes.byte()),
            21 => self.machine(bytes.byte()),
            22 => {
                self.puppet.renew();
                self.announce(VALUES[usize::from(bytes.byte() % 9)]);
            }
            23 => self.process(bytes.byte()),
            24 => {
                let frame = usize::from(bytes.byte());
                let (at, value) = (usize::from(bytes.word()), bytes.some(31));
                if self.in_memory(frame, at, value.len()) {
                    self.writes.borrow_mut().push_back((frame, at, value));
                }
            }
            25 => self.writes.borrow_mut().clear(),
            26 => self.host.shared.eager.set(bytes.byte().is_multiple_of(2)),
            _ => self.domain_dies(bytes.byte()),
        }
    }

    fn round(&mut self) {
        let _ = self.host.round();
    }

    fn take(&mut self) {
        let _ = self.puppet.front.take();
    }

    fn guest_writes(&mut self, name: &str, value: &[u8]) {
        if self.alive {
            // What the guest may not do is refused, as in life.
            let _ = self.host.store.write(DOMAIN, &format!("{}/{name}", Host::fe(DOMAIN)), value);
        }
    }

    fn set_state(&mut self, state: &str) {
        self.guest_writes("state", state.as_bytes());
    }

    fn announce(&mut self, state: &str) {
        for (name, value) in self.puppet.nodes() {
            self.guest_writes(&name, value.as_bytes());
        }
        self.set_state(state);
    }

    fn write_node(&mut self, bytes: &mut Bytes<'_>) {
        let key = KEYS[usize::from(bytes.byte()) % KEYS.len()];
        let kind = bytes.byte();
        let value = match kind {
            0..=99 => VALUES[usize::from(kind) % VALUES.len()].as_bytes().to_vec(),
            100..=149 => {
                let all = [&self.puppet.ring, &self.puppet.pages].map(|grants| grants.as_slice()).concat();
                all[usize::from(kind) % all.len()].to_string().into_bytes()
            }
            150..=159 => self.puppet.port.to_string().into_bytes(),
            160..=169 => vec![b'1'; 4000],
            170..=179 => {
                let _ = self.host.store.remove(DOMAIN, &format!("{}/{key}", Host::fe(DOMAIN)));
                return;
            }
            _ => bytes.some(40),
        };
        self.guest_writes(key, &value);
    }

    fn set_permissions(&mut self, choice: u8) {
        let own = self.host.own;
        let access = [Access::None, Access::Read, Access::Write, Access::Both][usize::from(choice % 4)];
        let list = [Permission { domain: DOMAIN, access: Access::None }, Permission { domain: own, access }];
        let fe = Host::fe(DOMAIN);
        let path = if choice & 4 == 0 {
            fe
        } else {
            format!("{fe}/{}", KEYS[usize::from(choice >> 3) % KEYS.len()])
        };
        if self.alive {
            let _ = self.host.store.set_permissions(DOMAIN, &path, &list);
        }
    }

    fn in_memory(&self, frame: usize, at: usize, length: usize) -> bool {
        frame < self.puppet.ring.len() + DATA_FRAMES + 1 && at + length <= 4096
    }

    fn write_memory(&mut self, frame: usize, at: u16, value: &[u8]) {
        if self.in_memory(frame, at.into(), value.len()) {
            self.puppet.memory.write(frame, at.into(), value);
        }
    }

    /// One of the four indices: near what it was, or anything.
    fn write_index(&mut self, bytes: &mut Bytes<'_>) {
        let (which, how) = (usize::from(bytes.byte() % 4) * 4, bytes.byte());
        let mut old = [0; 4];
        self.puppet.memory.read(0, which, &mut old);
        let old = u32::from_le_bytes(old);
        let new = match how % 4 {
            0 => old.wrapping_add(u32::from(bytes.byte())),
            1 => old.wrapping_sub(u32::from(bytes.byte())),
            2 => u32::from_le_bytes([bytes.byte(), bytes.byte(), bytes.byte(), bytes.byte()]),
            _ => 0,
        };
        self.puppet.memory.write(0, which, &new.to_le_bytes());
    }

    fn grant(&self, choice: u8) -> u32 {
        match choice {
            0..=199 => self.puppet.pages[usize::from(choice) % DATA_FRAMES],
            200..=219 => self.puppet.constant,
            220..=239 => self.puppet.ring[usize::from(choice) % self.puppet.ring.len()],
            240..=249 => u32::from(choice),
            _ => u32::MAX - u32::from(choice),
        }
    }

    /// A request that looks like one.
    fn request(&mut self, bytes: &mut Bytes<'_>) {
        let (op, count) = (bytes.byte(), bytes.byte());
        let op = if op < 200 { op % 7 } else { op };
        let count = if count < 200 { count % 13 } else { count };
        let sector = match bytes.byte() {
            near @ 0..=199 => u64::from(near % 72),
            far => u64::MAX >> (far % 64),
        };
        let segments: Vec<Segment> = (0..count.min(11))
            .map(|_| {
                let (choice, shape) = (bytes.byte(), bytes.byte());
                let (first, last) = if shape < 128 { (0, 7) } else { (shape & 7, (shape >> 3) & 15) };
                Segment { grant: self.grant(choice), first, last }
            })
            .collect();
        self.puppet.front.write(op, u64::from(bytes.byte() % 4), sector, &segments, count);
    }

    /// A request of which each byte is given.
    fn raw_request(&mut self, bytes: &mut Bytes<'_>) {
        let mut slot = [0; LARGEST_STRIDE];
        let segments_at = if self.puppet.abi == Abi::X86_32 { 20 } else { 24 };
        for byte in slot.iter_mut().take(segments_at + 8) {
            *byte = bytes.byte();
        }
        let grant = self.grant(slot[segments_at]);
        slot[segments_at..segments_at + 4].copy_from_slice(&grant.to_le_bytes());
        self.puppet.front.write_raw(&slot);
    }

    fn notify(&mut self, times: u8) {
        for _ in 0..times {
            self.puppet.kick(&self.host);
            self.host.round();
        }
    }

    fn regrant(&mut self, choice: u8) {
        if !self.alive {
            return;
        }
        let page = usize::from(choice) % DATA_FRAMES;
        let frame = self.puppet.frame(page);
        let mut xen = self.host.shared.xen.borrow_mut();
        xen.revoke(DOMAIN, self.puppet.pages[page]);
        if choice & 0x80 == 0 {
            self.puppet.pages[page] = xen.grant(DOMAIN, frame, choice & 0x40 != 0);
        }
    }

    fn toolstack(&mut self, choice: u8) {
        let be = self.host.be(DOMAIN);
        let (name, value) = match choice % 12 {
            0 => ("online", "0"),
            1 => ("online", "1"),
            2 => ("state", "5"),
            3 => ("state", "1"),
            4 => ("params", "/images/none"),
            5 => ("params", "/images/1"),
            6 => ("mode", "r"),
            7 => ("mode", "w"),
            8 => ("params", ""),
            9 => {
                let _ = self.host.store.remove(0, &be);
                self.plugged = false;
                return;
            }
            10 => ("params", "/images/0"),
            _ => {
                self.host.attach(DOMAIN, "/images/1", &[]);
                self.plugged = true;
                return;
            }
        };
        if self.plugged && self.host.be_node(DOMAIN, "state").is_some() {
            let _ = self.host.store.write(0, &format!("{be}/{name}"), value.as_bytes());
        }
    }

    fn frontend_directory(&mut self, choice: u8) {
        let fe = Host::fe(DOMAIN);
        match choice % 3 {
            0 => drop(self.host.store.remove(DOMAIN, &fe)),
            1 => drop(self.host.store.remove(0, &fe)),
            _ => drop(self.host.store.remove(DOMAIN, &format!("{fe}/state"))),
        }
    }

    fn faults(&mut self, choice: u8) {
        let rate = |bit: u8| if choice & bit != 0 { 60 } else { 0 };
        self.host.shared.faults.set(Faults {
            read_error: rate(1),
            write_error: rate(2),
            flush_error: rate(4),
            copy_batch: rate(8),
            overflow: rate(16),
            spurious: rate(32),
            slow: rate(64),
            latency_us_max: if choice & 128 != 0 { 50_000 } else { 500 },
            torn: false,
        });
    }

    fn machine(&mut self, choice: u8) {
        let mut xen = self.host.shared.xen.borrow_mut();
        match choice % 4 {
            0 => xen.fail_map = u32::from(choice >> 6),
            1 => xen.fail_bind = u32::from(choice >> 6),
            2 => xen.copies_max = Some(11 + usize::from(choice)),
            _ => xen.copies_max = None,
        }
    }

    fn process(&mut self, choice: u8) {
        self.succeeded |= matches!(choice % 4, 0 | 3);
        match choice % 4 {
            0 => {
                self.host.kill();
                self.host.start();
            }
            1 => {
                self.host.lose_store();
                self.host.connect();
            }
            2 => {
                self.host.lose_store();
                self.host.run_for(Duration::from_millis(u64::from(choice)));
                self.host.connect();
            }
            _ => {
                self.host.stop();
                self.host.start();
            }
        }
    }

    fn domain_dies(&mut self, choice: u8) {
        if !self.alive || !choice.is_multiple_of(4) {
            return;
        }
        self.alive = false;
        self.host.destroy_domain(DOMAIN);
        if choice & 4 != 0 {
            self.host.store.release_domain(DOMAIN);
        }
    }

    /// The guest goes, the toolstack cleans up; the neighbour was served, and nothing is held.
    fn end(mut self) {
        let shared = self.host.shared.clone();
        shared.faults.set(Faults { latency_us_max: 500, ..Faults::default() });
        shared.eager.set(false);
        {
            let mut xen = shared.xen.borrow_mut();
            (xen.fail_map, xen.fail_bind, xen.copies_max) = (0, 0, None);
        }
        self.host.store.faults = xenstore::Faults::NONE;
        if self.alive {
            self.host.destroy_domain(DOMAIN);
        }
        let (be, fe) = (self.host.be(DOMAIN), Host::fe(DOMAIN));
        let _ = self.host.store.remove(0, &fe);
        let _ = self.host.store.remove(0, &be);
        self.host.run_until("forgotten", |host| host.backend.as_ref().unwrap().totals().disks == 1);
        assert_eq!(shared.xen.borrow().maps_of(DOMAIN), 0, "the guest's pages are mapped");
        self.host.wait_served(NEIGHBOUR);
        assert_eq!(self.host.be_node(NEIGHBOUR, "state").as_deref(), Some("4"));
        self.host.settle();
        assert_eq!(shared.xen.borrow().held(), (1, 1), "the neighbour's ring and port");
        if !self.succeeded {
            assert_eq!(shared.vault.borrow().names(), [format!("vbd-{NEIGHBOUR}-{DEVID}-0")]);
        }
        assert!(self.host.busy_max < 4000, "{} turns in a row", self.host.busy_max);
        self.bounded_lines();
        self.host.stop();
    }

    /// 10 lines at once and one each 10 seconds; a new directory, or a new process, starts anew. Each step can be one.
    fn bounded_lines(&self) {
        let own = lines::kept(&format!("/{DOMAIN}/")).len() as u64;
        let starts = 2 + STEPS_MAX as u64;
        let bound = starts * 12 + self.host.shared.clock.now().as_secs() / 10;
        assert!(own <= bound, "{own} lines about the guest");
        let odd = lines::kept("").into_iter().find(|line| line.chars().any(char::is_control));
        assert_eq!(odd, None, "a line with control characters");
    }
}
