//! A host with a whole backend in it: simulated xenstored, hypervisor, storage and clock, and frontends by script.

// Not every test uses all of it.
#![allow(dead_code)]

use std::rc::Rc;
use std::time::Duration;

use ::xenstore::{Access, Config as StoreConfig, Permission};
use vbdd::backend::{Backend, Options};
use vbdd::pump::RingPlan;
use vbdd::storage::Storage as _;
use vbdd::vbd::{Config, Kind, Place};
use vbdd::xenbus::Session;

use crate::world::Shared;
use crate::world::guest::{Habits, SaneGuest};
use crate::world::hypervisor::SimXen;
use crate::world::journals::SimJournals;
use crate::world::model::DiskModel;
use crate::world::storage::SimStorage;
use crate::world::xenstore::{ConnectionId, Faults, XenstoreServer};

/// Rounds after which a run is taken to go nowhere.
const ROUNDS_MAX: u64 = 300_000;

pub const DEVID: u32 = 51712;

/// From this seed on, the connection to xenstored flaps, commits clash, and events come late, twice and for nothing.
pub const RESTLESS: u64 = 1000;

type SimBackend = Backend<SimXen, SimStorage>;

pub struct Host {
    pub shared: Rc<Shared>,
    pub store: XenstoreServer,
    pub own: u16,
    place: Place,
    /// The directory that devices are made in.
    pub kind: &'static str,
    connection: Option<ConnectionId>,
    pub session: Session,
    pub backend: Option<SimBackend>,
    again: bool,
    pool_bytes: usize,
    /// The most turns in a row that asked to be called again while nothing else happened.
    pub busy_max: u64,
    busy: u64,
    pub turns: u64,
    /// The connection to xenstored is lost and made anew all the time.
    pub flaps: bool,
    pub flapped: u64,
    /// Time does not go beyond this by itself.
    time_max_us: u64,
}

impl Host {
    pub fn new(seed: u64, own: u16) -> Host {
        let shared = Shared::new(seed);
        let mut store = XenstoreServer::new(seed);
        if own != 0 {
            store.introduce_domain(own);
        }
        let place = if own == 0 { Place::Dom0 } else { Place::DriverDomain };
        let mut host = Host {
            shared,
            store,
            own,
            place,
            kind: "vbd",
            connection: None,
            session: Session::new(StoreConfig::default()),
            backend: None,
            again: false,
            pool_bytes: 1 << 20,
            busy_max: 0,
            busy: 0,
            turns: 0,
            flaps: false,
            flapped: 0,
            time_max_us: u64::MAX,
        };
        if seed >= RESTLESS {
            host.flaps = true;
            host.store.faults = Faults::MANY;
        }
        host.start();
        host
    }

    /// Starts a process.
    pub fn start(&mut self) {
        let options = Options { kinds: Kind::ALL.to_vec(), vbd: Config::new(self.own, self.place) };
        let storage = SimStorage::new(self.shared.clone(), self.pool_bytes);
        let journals = Box::new(SimJournals(self.shared.clone()));
        let now = self.shared.clock.now();
        self.backend = Some(Backend::new(options, SimXen(self.shared.clone()), storage, journals, now));
        self.session = Session::new(StoreConfig::default());
        self.connect();
    }

    pub fn connect(&mut self) {
        self.connection = Some(self.store.connect(self.own));
        self.session.connected();
        self.again = true;
    }

    /// The most requests that this connection had outstanding at once.
    pub fn outstanding_max(&self) -> usize {
        self.connection.map_or(0, |id| self.store.outstanding_max_seen(id))
    }

    pub fn lose_store(&mut self) {
        if let Some(id) = self.connection.take() {
            self.store.disconnect(id);
        }
        self.session.disconnected();
        self.again = true;
    }

    /// Paths that the process watches.
    pub fn watches(&self) -> Vec<String> {
        let id = self.connection.unwrap();
        self.store.watches_of(id).into_iter().map(|(path, _)| path).collect()
    }

    /// The backend was asked for something beside its turns.
    pub fn wake(&mut self) {
        self.again = true;
    }

    /// The process ends at once.
    pub fn kill(&mut self) {
        self.backend = None;
        self.lose_store();
        let shared = &self.shared;
        shared.xen.borrow_mut().process_died();
        shared.media.borrow_mut().process_died(&mut || shared.chance(1, 2));
        shared.vault.borrow_mut().process_died();
    }

    /// SIGTERM: drained, and nothing held.
    pub fn stop(&mut self) {
        self.backend.as_mut().unwrap().stop();
        self.again = true;
        self.run_until("stopped", |host| host.backend.as_ref().unwrap().stopped());
        self.check_nothing_held();
        self.backend = None;
        self.lose_store();
    }

    pub fn check_nothing_held(&mut self) {
        assert_eq!(self.shared.xen.borrow().held(), (0, 0), "rings and ports");
        assert_eq!(self.shared.media.borrow().in_flight(), 0);
        let pump = self.backend.as_mut().unwrap().pump();
        let (used, refused) = (pump.storage.buffers().used_bytes(), pump.storage.buffers().refused_frees());
        assert_eq!((used, refused, pump.storage.open_files()), (0, 0, 0), "memory and files");
        assert_eq!(self.shared.vault.borrow().open, 0, "journals");
    }

    pub fn add_image(&self, sectors: usize) -> (usize, String) {
        let mut models = self.shared.models.borrow_mut();
        let path = format!("/images/{}", models.len());
        let image = self.shared.media.borrow_mut().create(&path, sectors, false);
        models.push(DiskModel::new(image, sectors, false));
        (models.len() - 1, path)
    }

    pub fn be(&self, guest: u16) -> String {
        format!("/local/domain/{}/backend/{}/{guest}/{DEVID}", self.own, self.kind)
    }

    pub fn fe(guest: u16) -> String {
        format!("/local/domain/{guest}/device/vbd/{DEVID}")
    }

    pub fn node(&mut self, path: &str) -> Option<String> {
        self.store.read(0, path).ok().map(|value| String::from_utf8(value).unwrap())
    }

    pub fn be_node(&mut self, guest: u16, name: &str) -> Option<String> {
        let path = format!("{}/{name}", self.be(guest));
        self.node(&path)
    }

    pub fn set_fe(&mut self, guest: u16, pairs: &[(&str, &str)]) {
        let paths: Vec<(String, &str)> =
            pairs.iter().map(|(name, value)| (format!("{}/{name}", Host::fe(guest)), *value)).collect();
        let pairs: Vec<(&str, &str)> = paths.iter().map(|(path, value)| (path.as_str(), *value)).collect();
        self.store.write_all(guest, &pairs).unwrap();
    }

    pub fn set_be(&mut self, guest: u16, pairs: &[(&str, &str)]) {
        let paths: Vec<(String, &str)> =
            pairs.iter().map(|(name, value)| (format!("{}/{name}", self.be(guest)), *value)).collect();
        let pairs: Vec<(&str, &str)> = paths.iter().map(|(path, value)| (path.as_str(), *value)).collect();
        self.store.write_all(0, &pairs).unwrap();
    }

    /// What a toolstack writes to attach a disk; `changes` replace nodes of the backend directory, or remove them.
    pub fn attach(&mut self, guest: u16, params: &str, changes: &[(&str, Option<&str>)]) {
        if self.node(&format!("/local/domain/{guest}/domid")).is_none() {
            self.store.introduce_domain(guest);
        }
        let (be, fe) = (self.be(guest), Host::fe(guest));
        self.store.mkdir(0, &be).unwrap();
        self.store.mkdir(0, &fe).unwrap();
        let list = |owner, reader| {
            [
                Permission { domain: owner, access: Access::None },
                Permission { domain: reader, access: Access::Read },
            ]
        };
        self.store.set_permissions(0, &be, &list(self.own, guest)).unwrap();
        self.store.set_permissions(0, &fe, &list(guest, self.own)).unwrap();
        let (id, own) = (guest.to_string(), self.own.to_string());
        let mut pairs = vec![
            ("frontend", fe.as_str()),
            ("frontend-id", id.as_str()),
            ("online", "1"),
            ("removable", "0"),
            ("bootable", "1"),
            ("dev", "xvda"),
            ("type", "phy"),
            ("mode", "w"),
            ("device-type", "disk"),
            ("params", params),
        ];
        for (name, value) in changes {
            pairs.retain(|(known, _)| known != name);
            pairs.extend(value.map(|value| (*name, value)));
        }
        pairs.push(("state", "1"));
        let front = [("backend", be.as_str()), ("backend-id", own.as_str()), ("state", "1")];
        let mut all: Vec<(String, &str)> =
            pairs.iter().map(|(name, value)| (format!("{be}/{name}"), *value)).collect();
        all.extend(front.iter().map(|(name, value)| (format!("{fe}/{name}"), *value)));
        let all: Vec<(&str, &str)> = all.iter().map(|(path, value)| (path.as_str(), *value)).collect();
        self.store.write_all(0, &all).unwrap();
    }

    /// The guest makes its rings, and begins to put requests on them.
    pub fn make_rings(&mut self, habits: Habits) -> Vec<RingPlan> {
        let actor = SaneGuest::new(&self.shared, habits);
        let rings = actor.rings();
        self.shared.guests.borrow_mut().push(Box::new(actor));
        rings
    }

    /// The guest makes a ring and announces it, in the words of Linux.
    pub fn announce(&mut self, habits: Habits, state: &str) {
        let guest = habits.domain;
        let rings = self.make_rings(habits);
        let nodes = ring_nodes(&rings);
        let mut nodes: Vec<(&str, &str)> =
            nodes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        nodes.push(("state", state));
        self.set_fe(guest, &nodes);
    }

    /// The whole first connect, as Linux does it.
    pub fn connect_guest(&mut self, habits: Habits) {
        let guest = habits.domain;
        self.wait_be(guest, "2");
        self.announce(habits, "3");
        self.wait_be(guest, "4");
        self.set_fe(guest, &[("state", "4")]);
    }

    pub fn wait_be(&mut self, guest: u16, state: &str) {
        self.run_until(&format!("backend of {guest} in state {state}"), |host| {
            host.be_node(guest, "state").as_deref() == Some(state)
        });
    }

    pub fn guest_finished(&self, guest: u16) -> bool {
        let guests = self.shared.guests.borrow();
        guests.iter().filter(|actor| actor.domain() == guest).all(|actor| actor.finished())
    }

    /// The guest has sent all and has all its answers.
    pub fn wait_served(&mut self, guest: u16) {
        self.run_until(&format!("guest {guest} served"), |host| host.guest_finished(guest));
    }

    /// The guest's memory, grants and ports go, and so does whoever uses them.
    pub fn destroy_domain(&mut self, guest: u16) {
        self.shared.guests.borrow_mut().retain(|actor| actor.domain() != guest);
        self.shared.xen.borrow_mut().destroy_domain(guest);
    }

    pub fn run_until(&mut self, what: &str, end: impl Fn(&mut Host) -> bool) {
        for _ in 0..ROUNDS_MAX {
            if end(self) {
                return self.shared.check().unwrap();
            }
            if !self.round() {
                self.shared.check().unwrap();
                assert!(end(self), "stuck, waiting for: {what}\n{}", self.describe());
            }
        }
        panic!("on and on, waiting for: {what}\n{}", self.describe());
    }

    /// Runs until nobody has anything to do any more.
    pub fn settle(&mut self) {
        self.flaps = false;
        self.store.faults = Faults::NONE;
        for _ in 0..ROUNDS_MAX {
            if !self.round() {
                return self.shared.check().unwrap();
            }
        }
        panic!("never comes to rest\n{}", self.describe());
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.shared.clock.now() + time;
        self.time_max_us = end.as_micros() as u64;
        for _ in 0..ROUNDS_MAX {
            if self.shared.clock.now() >= end {
                self.time_max_us = u64::MAX;
                return;
            }
            if !self.round() {
                self.shared.clock.advance_to(end.as_micros() as u64);
            }
        }
        panic!("on and on\n{}", self.describe());
    }

    fn describe(&mut self) -> String {
        let paths: Vec<String> = self
            .store
            .store()
            .nodes()
            .filter(|(path, node)| path.contains("vbd/") && !node.value.is_empty())
            .map(|(path, node)| format!("{path} = {}", String::from_utf8_lossy(&node.value)))
            .collect();
        let guests: Vec<String> = self.shared.guests.borrow().iter().map(|guest| guest.describe()).collect();
        let status = self.backend.as_ref().map_or_else(String::new, Backend::status_text);
        format!("{}\n{}\n{status}\n{:?}", paths.join("\n"), guests.join("\n"), self.shared.clock.now())
    }

    /// Everybody acts once. When nobody can, time goes on. False when nothing is to come.
    pub fn round(&mut self) -> bool {
        self.shared.check().unwrap();
        if self.flaps && self.connection.is_some() && self.shared.chance(1, 600) {
            self.flapped += 1;
            self.lose_store();
            self.connect();
        }
        let mut any = false;
        for _ in 0..2 {
            any |= self.shared.let_one_act();
        }
        any |= self.shuttle();
        if self.turn_if_due() {
            return true;
        }
        if any {
            self.busy = 0;
            return true;
        }
        // A pick at random may have met one who only waits.
        let mut guests = self.shared.guests.borrow_mut();
        if guests.iter_mut().any(|guest| guest.act(&self.shared)) {
            self.busy = 0;
            return true;
        }
        drop(guests);
        self.busy = 0;
        // An event that is held back comes at last.
        self.store.settle();
        self.shuttle() || self.sleep()
    }

    /// Moves bytes between the backend and xenstored. True if any moved.
    fn shuttle(&mut self) -> bool {
        let Some(id) = self.connection else { return false };
        let now_ms = self.shared.clock.now_us() / 1000;
        self.session.handle_time(now_ms);
        let mut any = false;
        while let Some(bytes) = self.session.transmit() {
            let bytes = bytes.to_vec();
            self.store.receive(id, &bytes);
            self.session.transmitted(bytes.len());
            any = true;
        }
        for _ in 0..=self.shared.below(6) {
            any |= self.store.step();
        }
        let bytes = self.store.transmit(id, 1 + self.shared.below(4000) as usize);
        if !bytes.is_empty() {
            self.session.receive(&bytes).unwrap();
            (any, self.again) = (true, true);
        }
        any
    }

    /// Calls the backend if a reactor would.
    pub fn turn_if_due(&mut self) -> bool {
        let now = self.shared.clock.now();
        let Some(backend) = &mut self.backend else { return false };
        let readable = self.shared.xen.borrow().readable();
        let landed =
            self.shared.media.borrow().next_due().is_some_and(|due| due <= self.shared.clock.now_us());
        let due = backend.deadline().is_some_and(|at| at <= now);
        if !(self.again || readable || landed || due) {
            return false;
        }
        if readable {
            backend.pump().take_events();
        }
        self.turns += 1;
        self.again = backend.turn(&mut self.session, now);
        self.busy = if self.again { self.busy + 1 } else { 0 };
        self.busy_max = self.busy_max.max(self.busy);
        true
    }

    fn sleep(&self) -> bool {
        let now = self.shared.clock.now_us();
        let guests = self.shared.guests.borrow();
        let backend = self.backend.as_ref().and_then(Backend::deadline).map(|at| at.as_micros() as u64 + 1);
        let store = self.connection.and(self.session.timeout()).map(|ms| ms * 1000);
        let media = self.shared.media.borrow().next_due();
        let times =
            guests.iter().filter_map(|guest| guest.wakes_at()).chain(backend).chain(store).chain(media);
        match times.filter(|at| *at > now).min() {
            Some(at) => self.shared.clock.advance_to(at.min(self.time_max_us)),
            None => return false,
        }
        true
    }
}

/// What Linux writes about its rings.
pub fn ring_nodes(rings: &[RingPlan]) -> Vec<(String, String)> {
    let mut nodes = vec![("protocol".to_owned(), rings[0].abi.protocol().to_owned())];
    if rings.len() > 1 {
        nodes.push(("multi-queue-num-queues".to_owned(), rings.len().to_string()));
    }
    let pages = rings[0].grants.len();
    if pages > 1 {
        nodes.push(("ring-page-order".to_owned(), pages.ilog2().to_string()));
    }
    for (queue, ring) in rings.iter().enumerate() {
        let place = if rings.len() > 1 { format!("queue-{queue}/") } else { String::new() };
        nodes.push((format!("{place}event-channel"), ring.remote_port.to_string()));
        for (page, grant) in ring.grants.iter().enumerate() {
            let number = if pages > 1 { page.to_string() } else { String::new() };
            nodes.push((format!("{place}ring-ref{number}"), grant.to_string()));
        }
    }
    nodes
}

impl Drop for Host {
    fn drop(&mut self) {
        self.backend = None;
        self.shared.guests.borrow_mut().clear();
        self.shared.xen.borrow_mut().process_died();
    }
}
