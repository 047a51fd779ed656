//! The backend: all vbds of this domain, tied to xenstore on one side and to the data path on the other.
//!
//! No I/O of its own: the daemon feeds it xenstore events and wakes it when rings or storage have something; the
//! simulated world does the same with its own xenstored, hypervisor and storage. Each vbd's decisions are those of its
//! state machine (`vbd`); this module carries out the actions and brings back the answers.

mod actions;
mod exports;
mod media;
mod notices;
mod offers;
mod queues;
mod quotas;
mod scan;
mod sharing;
mod status;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use formats::Raw;
use formats::raw::TooSmall;
use xenstore::{JobId, Outcome, Path, WatchToken};

use crate::hypervisor::{DomainId, Hypervisor};
use crate::journal::JournalStore;
use crate::limits::{SIZES_INTERVAL, WORLD_READ_INTERVAL, WORLD_READ_NODES, WORLD_READS_BURST};
use crate::pump::{DiskId, DiskPlan, Pump, PumpEvent, QueueId};
use crate::queue::FrontendMisbehaved;
use crate::storage::{Identity, OpenError, Opened, Storage};
use crate::vbd::{
    self, Address, Config, ConnectError, ConnectPlan, Disconnect, Key, Kind, Misdeed, OpenRequest, Timer,
    Vbd, World,
};
use crate::xenbus::Session;
pub use exports::OpenDisk;
pub use media::Measured;
use notices::Bucket;
pub use quotas::disks_that_fit;
pub use status::{DeviceStatus, Totals};

/// What the backend was told to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The kinds that it claims.
    pub kinds: Vec<Kind>,
    /// How each vbd behaves.
    pub vbd: Config,
}

// One job reads the nodes of the largest ring.
const _: () = assert!(vbd::FURTHER_KEYS_MAX <= xenstore::limits::NODES_PER_JOB_MAX);

/// What a xenstore job was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    ReadWorld(Address),
    /// What follows from the first read: nodes of further queues and pages.
    ReadFurther(Address),
    /// Whether the first's guest and the second's are one virtual machine.
    Kinship(Address, Address),
    Publish(Address),
    ListGuests(Kind),
    ListDevices(Kind, DomainId),
}

/// An image that is open for a device.
#[derive(Clone, Debug)]
struct OpenImage {
    opened: Opened,
    /// Which files the images below it are.
    parents: Vec<Identity>,
    disk: DiskId,
    request: OpenRequest,
}

/// A ring that is being given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    No,
    /// Some queues of a ring could be connected and others not. The former answer what they had inherited.
    Undoing,
    /// The pump answers what is in flight.
    Draining(Disconnect),
    /// Everything is answered; the disk is being flushed.
    Syncing(Disconnect),
}

/// One vbd with all that is held for it.
struct Device {
    vbd: Vbd,
    /// Its watch, its opens.
    token: u64,
    image: Option<OpenImage>,
    opening: Option<OpenRequest>,
    /// Another domain of the same virtual machine, with which it may share its image.
    kin: Option<DomainId>,
    closing_image: bool,
    /// The queues of its ring, each with whether it is drained.
    queues: Vec<(QueueId, bool)>,
    plan: Option<ConnectPlan>,
    /// Why the ring that is being undone could not be connected.
    undone: Option<ConnectError>,
    ending: Ending,
    /// The first part of a read of the world, and what is still asked for.
    partial: Option<(Box<World>, Vec<Key>)>,
    timers: BTreeMap<Timer, Duration>,
    reads: Bucket,
    /// When the read of the world may start that the bucket held back.
    read_at: Option<Duration>,
    notices: Bucket,
    notices_dropped: u64,
    stopped: bool,
}

/// An event on its way to a vbd's state machine.
enum Pending {
    Step(vbd::Event<'static>),
    World(Box<World>),
}

/// All vbds of this domain.
pub struct Backend<H, S> {
    options: Options,
    pump: Pump<H, S>,
    now: Duration,
    devices: BTreeMap<Address, Device>,
    by_token: BTreeMap<u64, Address>,
    next_token: u64,
    jobs: BTreeMap<JobId, Purpose>,
    pending: VecDeque<(Address, Pending)>,
    /// Device whose read of the world found the client full.
    crowded: Vec<Address>,
    /// Directories whose listing did: at most one for each guest and kind.
    unlisted: Vec<Purpose>,
    /// No timer of a device is due before this: the loop passes here with every batch of requests, and must not look at
    /// every device. May be too early, as timers are cancelled.
    timers_due: Option<Duration>,
    /// Watches that xenstored refused, to be asked for again.
    unwatched: Vec<(Duration, WatchToken, Path)>,
    /// When the sizes of the images were looked at.
    sizes_at: Duration,
    /// Disks were opened, closed or resized since somebody asked.
    disks_changed: bool,
    stopping: bool,
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    /// A backend that serves nothing yet. `now` is the caller's clock, which never goes back.
    #[must_use]
    pub fn new(
        options: Options,
        hypervisor: H,
        storage: S,
        journals: Box<dyn JournalStore>,
        now: Duration,
    ) -> Backend<H, S> {
        let mut options = options;
        options.vbd.terms.offered = options.vbd.terms.offered.limited_to(offers::SERVED);
        Backend {
            options,
            pump: Pump::new(hypervisor, storage, journals),
            now,
            devices: BTreeMap::new(),
            by_token: BTreeMap::new(),
            // 0 is the watches of the kinds' directories, numbered by kind; devices follow.
            next_token: scan::FIRST_DEVICE_TOKEN,
            jobs: BTreeMap::new(),
            pending: VecDeque::new(),
            crowded: Vec::new(),
            unlisted: Vec::new(),
            timers_due: None,
            unwatched: Vec::new(),
            sizes_at: now,
            disks_changed: false,
            stopping: false,
        }
    }

    /// The data path, for whoever polls its descriptors.
    pub fn pump(&mut self) -> &mut Pump<H, S> {
        &mut self.pump
    }

    /// Begins the end: every ring is drained and left to a successor. See [`Backend::stopped`].
    pub fn stop(&mut self) {
        self.stopping = true;
        // There may be no xenstore to tell.
        let asked: Vec<(Address, Address)> = self
            .jobs
            .values()
            .filter_map(|purpose| match purpose {
                Purpose::Kinship(address, other) => Some((*address, *other)),
                _ => None,
            })
            .collect();
        for (address, other) in asked {
            self.kinship_known(address, other, false);
        }
        for address in self.devices.keys() {
            self.pending.push_back((*address, Pending::Step(vbd::Event::Stop)));
        }
    }

    /// True when nothing is held any more.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopping && self.devices.values().all(|device| device.stopped)
    }

    /// Does all that can be done without waiting: takes what xenstore, storage and the rings brought, and starts what
    /// follows from it. True when there is more to do at once.
    pub fn turn(&mut self, session: &mut Session, now: Duration) -> bool {
        self.now = now;
        self.fire_timers();
        if now >= self.sizes_at + SIZES_INTERVAL {
            self.sizes_at = now;
            self.look_at_sizes();
        }
        self.watch_again(session);
        while let Some(event) = session.event() {
            self.store_event(session, event);
        }
        self.run_pending(session);
        let mut more = self.pump.turn(now);
        more |= self.storage_answers();
        while let Some(event) = self.pump.event() {
            self.pump_event(event);
        }
        self.run_pending(session);
        more || self.pump.has_work()
    }

    /// When [`Backend::turn`] is due though nothing happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let watches = self.unwatched.iter().map(|(at, ..)| *at);
        self.timers_due.into_iter().chain(watches).chain(self.pump.deadline()).min()
    }

    /// Something of a device is due at `at`.
    fn due_at(&mut self, at: Duration) {
        self.timers_due = Some(self.timers_due.map_or(at, |due| due.min(at)));
    }

    fn fire_timers(&mut self) {
        let now = self.now;
        if self.timers_due.is_none_or(|due| due > now) {
            return;
        }
        for (address, device) in &mut self.devices {
            if device.timers.is_empty() && device.read_at.is_none() {
                continue;
            }
            let due: Vec<Timer> =
                device.timers.iter().filter(|(_, at)| **at <= now).map(|(timer, _)| *timer).collect();
            for timer in due {
                device.timers.remove(&timer);
                self.pending.push_back((*address, Pending::Step(vbd::Event::TimerFired(timer))));
            }
            if device.read_at.is_some_and(|at| at <= now) {
                device.read_at = None;
                self.crowded.push(*address);
            }
        }
        let left =
            self.devices.values().flat_map(|device| device.timers.values().copied().chain(device.read_at));
        self.timers_due = left.min();
    }

    /// Takes an event of xenstore that somebody else has fetched.
    pub fn deliver(&mut self, session: &mut Session, event: xenstore::Event) {
        self.store_event(session, event);
    }

    fn store_event(&mut self, session: &mut Session, event: xenstore::Event) {
        match event {
            xenstore::Event::Reset => self.connection_made(session),
            xenstore::Event::Watch { token, path } => self.watch_fired(session, token, &path),
            xenstore::Event::WatchFailed { token, path, code } => self.watch_refused(token, path, code),
            xenstore::Event::Job { id, outcome } => {
                if let Some(purpose) = self.jobs.remove(&id) {
                    self.job_done(session, purpose, outcome);
                }
            }
        }
    }

    fn job_done(&mut self, session: &mut Session, purpose: Purpose, outcome: Outcome) {
        match purpose {
            Purpose::ReadWorld(address) => self.world_read(session, address, outcome),
            Purpose::ReadFurther(address) => self.further_read(address, outcome),
            Purpose::Kinship(address, other) => self.kinship_read(address, other, outcome),
            Purpose::Publish(address) => {
                let event = actions::publication_outcome(outcome);
                self.pending.push_back((address, Pending::Step(event)));
            }
            Purpose::ListGuests(kind) => self.guests_listed(session, kind, outcome),
            Purpose::ListDevices(kind, guest) => self.devices_listed(session, kind, guest, &outcome),
        }
    }

    /// Feeds the state machines until none has anything left to say.
    fn run_pending(&mut self, session: &mut Session) {
        for address in std::mem::take(&mut self.crowded) {
            self.read_world(session, address);
        }
        for purpose in std::mem::take(&mut self.unlisted) {
            self.list(session, purpose);
        }
        let mut actions = Vec::new();
        while let Some((address, pending)) = self.pending.pop_front() {
            let Some(device) = self.devices.get_mut(&address) else { continue };
            match &pending {
                Pending::Step(event) => device.vbd.step(event.clone(), &mut actions),
                Pending::World(world) => device.vbd.step(vbd::Event::World(world), &mut actions),
            }
            for action in actions.drain(..) {
                self.act(session, address, action);
            }
        }
    }

    fn pump_event(&mut self, event: PumpEvent) {
        match event {
            PumpEvent::Drained(queue) => self.queue_drained(queue),
            PumpEvent::Synced(disk, durable) => self.disk_synced(disk, durable),
            PumpEvent::Misbehaved(queue, misdeed) => {
                let Some(address) = self.device_of(queue) else { return };
                self.notice(address, log::Level::Warn, &misdeed.to_string());
                if matches!(misdeed, FrontendMisbehaved::RingOverrun(_)) {
                    let misdeed = Misdeed::Ring(misdeed.to_string());
                    self.pending.push_back((address, Pending::Step(vbd::Event::RingBroken(misdeed))));
                }
            }
            PumpEvent::StorageFailed(queue, failure) => {
                let Some(address) = self.device_of(queue) else { return };
                let path = self.image_path(address);
                let text =
                    format!("{} of {path} failed at byte {}: {}", failure.what, failure.offset_bytes, {
                        actions::storage_error_text(&failure.error)
                    });
                self.notice(address, log::Level::Error, &text);
            }
            PumpEvent::Corrupt(disk, corruption) => {
                let holds = |device: &Device| device.image.as_ref().is_some_and(|image| image.disk == disk);
                let found = self.devices.iter().find(|(_, device)| holds(device));
                let Some(address) = found.map(|(address, _)| *address) else { return };
                let text = format!(
                    "{} is damaged ({corruption}): it is not written any more, and what is damaged cannot be read; \
                     detach it and run vbdd image check",
                    self.image_path(address)
                );
                self.notice(address, log::Level::Error, &text);
            }
        }
    }

    fn storage_answers(&mut self) -> bool {
        let mut any = false;
        while let Some((token, result)) = self.pump.storage.opened() {
            any = true;
            self.image_opened(token, result);
        }
        any
    }

    fn device_of(&self, queue: QueueId) -> Option<Address> {
        let has = |device: &Device| device.queues.iter().any(|(known, _)| *known == queue);
        self.devices.iter().find(|(_, device)| has(device)).map(|(address, _)| *address)
    }

    fn image_path(&self, address: Address) -> String {
        let image = self.devices.get(&address).and_then(|device| device.image.as_ref());
        image.map_or_else(String::new, |image| image.request.image.path.clone())
    }

    fn image_opened(&mut self, token: u64, result: Result<Opened, OpenError>) {
        let address = self.by_token.get(&token).copied();
        let request = address
            .and_then(|address| self.devices.get_mut(&address))
            .and_then(|device| device.opening.take());
        let (Some(address), Some(request)) = (address, request) else {
            // The device went away meanwhile; nobody else will close the file.
            if let Ok(opened) = result {
                self.pump.storage.close(opened.file);
            }
            return;
        };
        let event = match result {
            Ok(opened) => self.accept_image(address, request, opened),
            Err(error) => Err(error.to_string()),
        };
        self.pending.push_back((address, Pending::Step(vbd::Event::Opened(event))));
    }

    fn accept_image(
        &mut self,
        address: Address,
        request: OpenRequest,
        opened: Opened,
    ) -> Result<vbd::Geometry, String> {
        let path = &request.image.path;
        let layers = self.pump.storage.layers(opened.file);
        let parents: Vec<Identity> = layers.iter().flatten().skip(1).map(|layer| layer.identity).collect();
        let raw = if let Some(other) = self.sharer(address, opened.identity, &parents, &request) {
            Err(sharing::refusal(&request.image, other))
        } else if !opened.locked {
            Err(format!(
                "{path} is locked: another program writes it, or the last writes of an earlier vbdd are not over; wait, or \
                 use mode w! to share it"
            ))
        } else {
            Raw::open(opened.size_bytes)
                .map_err(|TooSmall| format!("{path} is smaller than one sector of 512 bytes"))
        };
        let raw = match raw {
            Ok(raw) => raw,
            Err(refusal) => {
                let parents = layers.into_iter().flatten().skip(1).map(|layer| layer.file);
                parents.chain([opened.file]).for_each(|file| self.pump.storage.close(file));
                return Err(refusal);
            }
        };
        if raw.ragged_bytes() > 0 {
            let rest = raw.ragged_bytes();
            let text =
                format!("{path}: the last {rest} bytes are no whole sector; the guest does not see them");
            self.notice(address, log::Level::Warn, &text);
        }
        let sectors = raw.geometry().sectors;
        let device = opened.identity.device();
        let plan = DiskPlan { device, ..DiskPlan::new(opened.file, sectors, request.read_only) };
        let disk = match layers {
            Some(layers) => self.pump.add_chain(&plan, layers),
            None => self.pump.add_disk(&plan),
        };
        if let Some(device) = self.devices.get_mut(&address) {
            device.image = Some(OpenImage { opened, parents, disk, request });
        }
        self.disks_changed = true;
        Ok(media::geometry_of(&opened))
    }

    /// A read of a device's nodes is due, unless the guest has caused too many of late.
    fn read_world(&mut self, session: &mut Session, address: Address) {
        let now = self.now;
        let Some(device) = self.devices.get_mut(&address) else { return };
        if let Err(at) = device.reads.take(now, WORLD_READS_BURST, WORLD_READ_INTERVAL) {
            device.read_at = Some(at);
            self.due_at(at);
            return;
        }
        let own = self.options.vbd.own_domain;
        let paths: Vec<Path> = vbd::keys().filter_map(|key| actions::path_of(&address, own, &key)).collect();
        match session.submit(xenstore::Job::Read(paths)) {
            Ok(id) => {
                self.jobs.insert(id, Purpose::ReadWorld(address));
            }
            Err(_) => self.crowded.push(address),
        }
    }

    fn world_read(&mut self, session: &mut Session, address: Address, outcome: Outcome) {
        let Outcome::Read(values) = outcome else {
            // The connection went; after the next one everything is read again. The read that was asked for is still
            // owed.
            self.crowded.push(address);
            return;
        };
        let mut world = Box::new(World::new());
        for (key, value) in vbd::keys().zip(values) {
            world.put(key, actions::node_of(value));
        }
        let further = vbd::further_keys(&world);
        if further.is_empty() {
            self.pending.push_back((address, Pending::World(world)));
            return;
        }
        let own = self.options.vbd.own_domain;
        let paths: Vec<Path> =
            further.iter().filter_map(|key| actions::path_of(&address, own, key)).collect();
        let Some(device) = self.devices.get_mut(&address) else { return };
        // Many queues are many nodes: they count as more reads.
        let more = u32::try_from(paths.len()).unwrap_or(u32::MAX) / WORLD_READ_NODES;
        device.reads.charge(self.now, more, WORLD_READ_INTERVAL);
        match session.submit(xenstore::Job::Read(paths)) {
            Ok(id) => {
                device.partial = Some((world, further));
                self.jobs.insert(id, Purpose::ReadFurther(address));
            }
            Err(_) => self.crowded.push(address),
        }
    }

    fn further_read(&mut self, address: Address, outcome: Outcome) {
        let Some((mut world, keys)) = self.devices.get_mut(&address).and_then(|device| device.partial.take())
        else {
            return;
        };
        let Outcome::Read(values) = outcome else {
            self.crowded.push(address);
            return;
        };
        for (key, value) in keys.into_iter().zip(values) {
            world.put(key, actions::node_of(value));
        }
        self.pending.push_back((address, Pending::World(world)));
    }

    fn watch_fired(&mut self, session: &mut Session, token: WatchToken, path: &Path) {
        if let Some(address) = self.by_token.get(&token.0).copied() {
            self.pending.push_back((address, Pending::Step(vbd::Event::Changed)));
        } else if let Some(kind) = scan::kind_of(token) {
            self.backend_changed(session, kind, path);
        }
    }
}
