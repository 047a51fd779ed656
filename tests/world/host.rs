//! A whole host: the real core of the daemon over simulated xenstored, hypervisor and storage, with a toolstack that plugs
//! disks and guests that connect, work, leave, or die.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::time::Duration;

use ::xenstore::{Access, Permission};
use vbdd::backend::{Backend, Options};
use vbdd::vbd::{Config, Kind, Place};
use vbdd::xenbus::Session;

use super::guest::{Habits, SaneGuest};
use super::hypervisor::SimXen;
use super::journals::SimJournals;
use super::model::DiskModel;
use super::storage::SimStorage;
use super::xenstore::{ConnectionId, XenstoreServer};
use super::{Actor, Death, Shared};

const DEVICE: &str = "51712";
const STEPS_MAX: u64 = 3_000_000;

/// The process.
struct Daemon {
    core: Backend<SimXen, SimStorage>,
    session: Session,
    connection: ConnectionId,
    again: bool,
}

/// A guest, from plugging its disk to the end.
struct Tenant {
    domain: u16,
    image: String,
    /// The state that its frontend has written.
    state: u8,
    guest: Option<SaneGuest>,
    rings: Vec<vbdd::pump::RingPlan>,
    abi: rings::Abi,
    /// Its domain dies as soon as it is connected and the dice say so.
    doomed: bool,
    dead: bool,
    /// What went wrong on its way is of no interest any more.
    gone: bool,
}

/// The host.
pub struct Host {
    pub shared: Rc<Shared>,
    pub store: XenstoreServer,
    daemon: Option<Daemon>,
    tenants: Vec<Tenant>,
    pub steps: u64,
    pub deaths: u64,
    pub handovers: u64,
    pub reconnects: u64,
    stopping: bool,
}

impl Host {
    pub fn new(seed: u64) -> Host {
        Host {
            shared: Shared::new(seed),
            store: XenstoreServer::new(seed),
            daemon: None,
            tenants: Vec::new(),
            steps: 0,
            deaths: 0,
            handovers: 0,
            reconnects: 0,
            stopping: false,
        }
    }

    /// A new domain with a disk, as libxl makes them.
    pub fn plug(&mut self, habits: Habits, doomed: bool) {
        let domain = habits.domain;
        let image = format!("/images/{domain}");
        let number = self.shared.media.borrow_mut().create(&image, 300, false);
        let disk = self.shared.models.borrow().len();
        self.shared.models.borrow_mut().push(DiskModel::new(number, 300, false));
        let abi = habits.abi;
        let guest = SaneGuest::new(&self.shared, Habits { disk, ..habits });
        let rings = guest.rings();
        self.store.introduce_domain(domain);
        let (front, back) = (front(domain), back(domain));
        let id = domain.to_string();
        let nodes = [
            (back.as_str(), "frontend", front.as_str()),
            (&back, "frontend-id", &id),
            (&back, "params", &image),
            (&back, "type", "phy"),
            (&back, "mode", "w"),
            (&back, "device-type", "disk"),
            (&back, "removable", "0"),
            (&back, "online", "1"),
            (&back, "state", "1"),
            (&front, "backend", &back),
            (&front, "backend-id", "0"),
            (&front, "virtual-device", DEVICE),
            (&front, "state", "1"),
        ];
        let nodes: Vec<(String, &str)> =
            nodes.iter().map(|(dir, name, value)| (format!("{dir}/{name}"), *value)).collect();
        let pairs: Vec<(&str, &str)> = nodes.iter().map(|(path, value)| (path.as_str(), *value)).collect();
        self.store.write_all(0, &pairs).unwrap();
        for (path, value) in &nodes {
            let owner = if path.starts_with("/local/domain/0/") { 0 } else { domain };
            let reader = if owner == 0 { domain } else { 0 };
            let own = Permission { domain: owner, access: Access::None };
            let other = Permission { domain: reader, access: Access::Read };
            self.store.set_permissions(0, path, &[own, other]).unwrap();
            let _ = value;
        }
        for dir in [&front, &back] {
            let owner = if *dir == back { 0 } else { domain };
            let reader = if owner == 0 { domain } else { 0 };
            let own = Permission { domain: owner, access: Access::None };
            let other = Permission { domain: reader, access: Access::Read };
            self.store.set_permissions(0, dir, &[own, other]).unwrap();
        }
        self.tenants.push(Tenant {
            domain,
            image,
            state: 1,
            guest: Some(guest),
            rings,
            abi,
            doomed,
            dead: false,
            gone: false,
        });
    }

    fn number(&mut self, path: &str) -> Option<u8> {
        let value = self.store.read(0, path).ok()?;
        std::str::from_utf8(&value).ok()?.parse().ok()
    }

    /// One tenant's frontend looks at its backend, and the toolstack at both. True if something was done.
    fn tend(&mut self, at: usize) -> bool {
        let (domain, state) = (self.tenants[at].domain, self.tenants[at].state);
        let (front, back) = (front(domain), back(domain));
        let backend = self.number(&format!("{back}/state"));
        if self.tenants[at].dead {
            // The toolstack cleans up after a domain: it asks, and removes what a dead backend leaves.
            if !self.tenants[at].gone && (backend.is_none() || backend == Some(6)) {
                let _ = self.store.remove(0, &back);
                self.tenants[at].gone = true;
                return true;
            }
            return false;
        }
        let write = |host: &mut Host, state: u8| {
            host.tenants[at].state = state;
            host.store.write(domain, &format!("{front}/state"), state.to_string().as_bytes()).unwrap();
            true
        };
        match (state, backend) {
            (1, Some(2)) => {
                let plan = self.tenants[at].rings[0].clone();
                let protocol = self.tenants[at].abi.protocol();
                let nodes = [
                    (format!("{front}/ring-ref"), plan.grants[0].to_string()),
                    (format!("{front}/event-channel"), plan.remote_port.to_string()),
                    (format!("{front}/protocol"), protocol.to_owned()),
                ];
                let pairs: Vec<(&str, &str)> =
                    nodes.iter().map(|(path, value)| (path.as_str(), value.as_str())).collect();
                self.store.write_all(domain, &pairs).unwrap();
                write(self, 3)
            }
            (3, Some(4)) => {
                let sectors = self.store.read(domain, &format!("{back}/sectors"));
                if sectors.as_deref() != Ok(b"300") {
                    self.shared.fail(format!("guest {domain} is told of {sectors:?} sectors"));
                }
                let guest = self.tenants[at].guest.take().unwrap();
                self.shared.guests.borrow_mut().push(Box::new(guest));
                write(self, 4)
            }
            (4, Some(4)) if self.tenants[at].doomed && self.shared.chance(1, 400) => {
                self.kill(at);
                true
            }
            (4, Some(4)) if self.works_no_more(domain) => write(self, 5),
            (4, Some(4)) => false,
            (4, other) if !self.tenants[at].doomed => {
                self.shared.fail(format!("guest {domain} works, and its backend goes to {other:?}"));
                false
            }
            (5, Some(5 | 6)) => {
                let _ = self.store.write(0, &format!("{back}/online"), b"0");
                write(self, 6)
            }
            (6, None | Some(6)) if !self.tenants[at].gone => {
                let _ = self.store.remove(0, &back);
                let _ = self.store.remove(0, &front);
                self.tenants[at].gone = true;
                true
            }
            _ => false,
        }
    }

    fn works_no_more(&self, domain: u16) -> bool {
        self.shared.guests.borrow().iter().all(|guest| guest.domain() != domain || guest.finished())
    }

    /// The domain dies: its nodes go, its memory stays for whoever has it mapped.
    fn kill(&mut self, at: usize) {
        let domain = self.tenants[at].domain;
        self.shared.note("domain died", domain.into(), 0);
        self.shared.guests.borrow_mut().retain(|guest| guest.domain() != domain);
        self.shared.xen.borrow_mut().destroy_domain(domain);
        self.tenants[at].dead = true;
        let _ = self.store.write(0, &format!("{}/online", back(domain)), b"0");
        let _ = self.store.write(0, &format!("{}/state", back(domain)), b"5");
        self.store.remove(0, &format!("/local/domain/{domain}")).unwrap();
        self.store.release_domain(domain);
    }

    /// The process ends without a word, or is gone after a clean stop.
    fn bury(&mut self) {
        let Some(daemon) = self.daemon.take() else { return };
        self.store.disconnect(daemon.connection);
        drop(daemon);
        self.stopping = false;
        let shared = self.shared.clone();
        shared.countdown.set(None);
        shared.note("process ended", shared.calls.get(), 0);
        shared.xen.borrow_mut().process_died();
        shared.media.borrow_mut().process_died(&mut || shared.chance(1, 2));
        shared.vault.borrow_mut().process_died();
    }

    fn start(&mut self) {
        let shared = self.shared.clone();
        let vbd = Config::new(0, Place::Dom0);
        let options = Options { kinds: vec![Kind::Vbd], vbd };
        let storage = SimStorage::new(shared.clone(), 1 << 20);
        let journals = Box::new(SimJournals(shared.clone()));
        let core = Backend::new(options, SimXen(shared.clone()), storage, journals, shared.clock.now());
        let mut session =
            Session::new(::xenstore::Config { seed: shared.below(1 << 30), ..Default::default() });
        let connection = self.store.connect(0);
        session.connected();
        self.daemon = Some(Daemon { core, session, connection, again: true });
    }

    /// Moves bytes between the process and xenstored, some of them. True if any moved, or xenstored did something.
    fn carry(&mut self) -> bool {
        let Some(daemon) = &mut self.daemon else { return false };
        let now_ms = self.shared.clock.now_us() / 1000;
        daemon.session.handle_time(now_ms);
        let mut moved = false;
        while let Some(bytes) = daemon.session.transmit() {
            let length = bytes.len();
            self.store.receive(daemon.connection, bytes);
            daemon.session.transmitted(length);
            moved = true;
        }
        for _ in 0..=self.shared.below(4) {
            moved |= self.store.step();
        }
        let bytes = self.store.transmit(daemon.connection, 1 + self.shared.index(300));
        if !bytes.is_empty() {
            moved = true;
            daemon.again = true;
            if let Err(error) = daemon.session.receive(&bytes) {
                self.shared.fail(format!("xenstore client: {error:?}"));
            }
        }
        moved
    }

    fn wants_turn(&self) -> bool {
        let Some(daemon) = &self.daemon else { return false };
        let now = self.shared.clock.now_us();
        daemon.again
            || self.shared.xen.borrow().readable()
            || self.shared.media.borrow().next_due().is_some_and(|due| due <= now)
            || daemon.core.deadline().is_some_and(|deadline| deadline <= self.shared.clock.now())
    }

    fn turn(&mut self) {
        let shared = self.shared.clone();
        let Some(daemon) = &mut self.daemon else { return };
        let lived = catch_unwind(AssertUnwindSafe(|| {
            if shared.xen.borrow().readable() {
                daemon.core.pump().take_events();
            }
            daemon.again = daemon.core.turn(&mut daemon.session, shared.clock.now());
        }));
        match lived {
            Ok(()) => {}
            Err(payload) if payload.is::<Death>() => {
                self.deaths += 1;
                self.bury();
            }
            Err(payload) => resume_unwind(payload),
        }
    }

    /// SIGTERM: the rings stay as they are for a successor.
    pub fn stop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.core.stop();
            daemon.again = true;
            self.stopping = true;
        }
    }

    /// The connection to xenstored breaks, and is made again at once.
    pub fn reconnect(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        self.store.disconnect(daemon.connection);
        daemon.session.disconnected();
        daemon.connection = self.store.connect(0);
        daemon.session.connected();
        daemon.again = true;
        self.reconnects += 1;
    }

    /// Lets somebody act; `false` when nothing is to come.
    pub fn step(&mut self) -> Result<bool, String> {
        self.steps += 1;
        self.shared.check()?;
        if self.steps > STEPS_MAX {
            return Err(format!("the host goes on and on: {}", self.describe()));
        }
        if self.daemon.is_none() {
            self.start();
        }
        if self.stopping && self.daemon.as_ref().is_some_and(|daemon| daemon.core.stopped()) {
            self.handovers += 1;
            self.bury();
            return Ok(true);
        }
        let now = self.shared.clock.now_us();
        if self.shared.chance(1, 8) {
            self.shared.clock.advance_to(now + self.shared.below(50));
        }
        let first = self.shared.index(self.tenants.len());
        let busy = match self.shared.below(4) {
            0 => self.carry(),
            1 => self.tend(first),
            2 if self.wants_turn() => {
                self.turn();
                true
            }
            _ => self.shared.let_one_act(),
        };
        let count = self.tenants.len();
        if busy || self.carry() || (0..count).any(|n| self.tend((first + n) % count)) {
            return Ok(true);
        }
        if self.wants_turn() {
            self.turn();
            return Ok(true);
        }
        if self.shared.guests.borrow_mut().iter_mut().any(|guest| guest.act(&self.shared)) {
            return Ok(true);
        }
        // An event that xenstored holds back comes in the end, before any time passes.
        self.store.settle();
        Ok(self.carry() || self.sleep())
    }

    fn sleep(&self) -> bool {
        let now = self.shared.clock.now_us();
        let daemon = self.daemon.as_ref();
        let deadline = daemon.and_then(|daemon| daemon.core.deadline()).map(round_up_us);
        let store = daemon.and_then(|daemon| daemon.session.timeout()).map(|at_ms| at_ms * 1000);
        let guests = self.shared.guests.borrow();
        let times = guests.iter().filter_map(|guest| guest.wakes_at());
        let media = self.shared.media.borrow().next_due();
        match times.chain(deadline).chain(store).chain(media).filter(|at| *at > now).min() {
            Some(at) => self.shared.clock.advance_to(at),
            None => return false,
        }
        true
    }

    /// Runs until every tenant has gone. `trouble` may do something to the host before each step.
    pub fn run(&mut self, mut trouble: impl FnMut(&mut Host)) -> Result<(), String> {
        while self.tenants.iter().any(|tenant| !tenant.gone) {
            trouble(self);
            if !self.step()? {
                return Err(format!("stuck: {}", self.describe()));
            }
        }
        self.settle()
    }

    /// Lets the process come to rest, and checks that it holds nothing.
    fn settle(&mut self) -> Result<(), String> {
        self.shared.countdown.set(None);
        let end = self.shared.clock.now_us() + 120_000_000;
        while self.shared.clock.now_us() < end && self.step()? {}
        let held = self.shared.xen.borrow().held();
        let journals = self.shared.vault.borrow().open;
        let daemon = self.daemon.as_mut().unwrap();
        let storage = &mut daemon.core.pump().storage;
        let (used, files) = (storage.pool_used_bytes(), storage.open_files());
        if (held, journals, used, files) != ((0, 0), 0, 0, 0) {
            return Err(format!("held: {held:?}, {journals} journals, {used} bytes, {files} files"));
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let tenants = self.tenants.iter().map(|tenant| {
            let (domain, state, image) = (tenant.domain, tenant.state, &tenant.image);
            format!("guest {domain} ({image}): state {state}, dead {}, gone {}", tenant.dead, tenant.gone)
        });
        let guests = self.shared.guests.borrow();
        let guests = guests.iter().map(|guest| guest.describe());
        let status = self.daemon.as_ref().map(|daemon| daemon.core.status_text()).unwrap_or_default();
        let lines: Vec<String> = tenants.chain(guests).collect();
        format!("at {} us\n{}\n{status}", self.shared.clock.now_us(), lines.join("\n"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.daemon = None;
        self.shared.guests.borrow_mut().clear();
        self.shared.xen.borrow_mut().process_died();
    }
}

fn round_up_us(at: Duration) -> u64 {
    at.as_nanos().div_ceil(1000) as u64
}

fn front(domain: u16) -> String {
    format!("/local/domain/{domain}/device/vbd/{DEVICE}")
}

fn back(domain: u16) -> String {
    format!("/local/domain/0/backend/vbd/{domain}/{DEVICE}")
}
