//! A host of one vbd: a real key-value xenstore, and a daemon that answers everything at once unless told to hold back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use vbdd::vbd::{
    Action, Actions, Address, Config, ConnectError, ConnectPlan, Event, Geometry, Guard, Kind, Misdeed, Node,
    Notice, Place, Publication, RingPlan, Side, Timer, Vbd, World, further_keys, keys,
};

pub(crate) struct Host {
    pub(crate) vbd: Option<Vbd>,
    pub(crate) config: Config,
    nodes: BTreeMap<(Side, String), Vec<u8>>,
    denied: BTreeSet<Side>,
    queue: VecDeque<Action>,
    pub(crate) changed: bool,
    /// What happened that matters, a word each.
    pub(crate) log: Vec<String>,
    pub(crate) notices: Vec<Notice>,
    pub(crate) last: Option<Publication>,
    pub(crate) connected: Option<ConnectPlan>,
    /// `Some` makes the next opens fail with that text.
    pub(crate) open_error: Option<String>,
    pub(crate) connect_error: Option<ConnectError>,
    /// Which of two rings can be mapped.
    pub(crate) which: usize,
    pub(crate) publish_error: Option<String>,
    pub(crate) geometry: Geometry,
    /// Actions whose debug text begins with one of these stay in the queue.
    pub(crate) hold: Vec<&'static str>,
    pub(crate) timers: BTreeSet<Timer>,
}

pub(crate) const FE: Side = Side::Frontend;
pub(crate) const BE: Side = Side::Backend;

impl Host {
    /// A device as libxl makes it, with `script` where the place is dom0.
    pub(crate) fn new(place: Place) -> Host {
        let mut host = Host::empty(place);
        host.plug();
        host
    }

    pub(crate) fn empty(place: Place) -> Host {
        Host {
            vbd: None,
            config: Config::new(if place == Place::Dom0 { 0 } else { 3 }, place),
            nodes: BTreeMap::new(),
            denied: BTreeSet::new(),
            queue: VecDeque::new(),
            changed: false,
            log: Vec::new(),
            notices: Vec::new(),
            last: None,
            connected: None,
            open_error: None,
            connect_error: None,
            which: 0,
            publish_error: None,
            geometry: Geometry { sectors: 2048, physical_sector_bytes: 4096, discard: None },
            hold: Vec::new(),
            timers: BTreeSet::new(),
        }
    }

    /// What the toolstack writes, in one transaction.
    pub(crate) fn plug(&mut self) {
        for (name, value) in [
            ("frontend", "/local/domain/7/device/vbd/51712"),
            ("frontend-id", "7"),
            ("params", "/dev/vg/a"),
            ("type", "phy"),
            ("mode", "w"),
            ("device-type", "disk"),
            ("removable", "0"),
            ("online", "1"),
            ("specification", "xen"),
            ("state", "1"),
        ] {
            self.put(BE, name, value);
        }
        if self.config.place == Place::Dom0 {
            self.put(BE, "script", "block");
        }
        self.put(FE, "state", "1");
    }

    /// The daemon ends without a word; another takes its place.
    pub(crate) fn killed(&mut self) {
        self.vbd = None;
        self.queue.clear();
        self.timers.clear();
        self.connected = None;
        self.changed = true;
    }

    pub(crate) fn put(&mut self, side: Side, name: &str, value: &str) {
        self.put_bytes(side, name, value.as_bytes());
    }

    pub(crate) fn put_bytes(&mut self, side: Side, name: &str, value: &[u8]) {
        self.nodes.insert((side, name.to_owned()), value.to_vec());
        self.changed = true;
    }

    pub(crate) fn remove(&mut self, side: Side, name: &str) {
        self.nodes.remove(&(side, name.to_owned()));
        self.changed = true;
    }

    pub(crate) fn remove_all(&mut self, side: Side) {
        self.nodes.retain(|(of, _), _| *of != side);
        self.changed = true;
    }

    pub(crate) fn deny(&mut self, side: Side) {
        self.denied.insert(side);
        self.changed = true;
    }

    pub(crate) fn node(&self, side: Side, name: &str) -> Option<&str> {
        self.nodes.get(&(side, name.to_owned())).map(|value| std::str::from_utf8(value).unwrap())
    }

    pub(crate) fn be(&self, name: &str) -> Option<&str> {
        self.node(BE, name)
    }

    /// The backend's state; 0 without one.
    pub(crate) fn state(&self) -> u8 {
        self.be("state").map_or(0, |text| text.parse().unwrap())
    }

    /// The frontend writes its state and everybody reacts.
    pub(crate) fn fe(&mut self, state: u8) -> &mut Host {
        self.put(FE, "state", &state.to_string());
        self.run()
    }

    /// The frontend's ring nodes, without a state.
    pub(crate) fn ring(&mut self, ring_ref: u32, port: u32) -> &mut Host {
        self.put(FE, "ring-ref", &ring_ref.to_string());
        self.put(FE, "event-channel", &port.to_string());
        self.put(FE, "protocol", "x86_64-abi");
        self
    }

    pub(crate) fn unplug(&mut self) -> &mut Host {
        self.put(BE, "online", "0");
        self.put(BE, "state", "5");
        self.run()
    }

    pub(crate) fn fire(&mut self, timer: Timer) -> &mut Host {
        assert!(self.timers.remove(&timer), "{timer:?} is not armed");
        self.give(Event::TimerFired(timer));
        self.run()
    }

    /// Lets the time of a new device's 2 pass, however long it is.
    pub(crate) fn settle(&mut self) -> &mut Host {
        for timer in [Timer::Settle, Timer::SettleForScript] {
            if self.timers.contains(&timer) {
                self.fire(timer);
            }
        }
        self
    }

    /// The log since the last call.
    pub(crate) fn took(&mut self) -> String {
        std::mem::take(&mut self.log).join(", ")
    }

    /// A device that is connected with ring 8/9.
    pub(crate) fn connected(place: Place) -> Host {
        let mut host = Host::new(place);
        host.run();
        host.settle();
        host.ring(8, 9).fe(3).fe(4);
        assert_eq!(host.state(), 4, "{:?}", host.log);
        host.log.clear();
        host
    }

    pub(crate) fn give(&mut self, event: Event<'_>) {
        let mut actions = Actions::new();
        if let Some(vbd) = &mut self.vbd {
            vbd.step(event, &mut actions);
        }
        self.queue.extend(actions);
    }

    /// Until nothing moves.
    pub(crate) fn run(&mut self) -> &mut Host {
        for _ in 0..1000 {
            if std::mem::take(&mut self.changed) {
                self.notice_change();
                continue;
            }
            let held = |action: &Action| self.hold.iter().any(|held| format!("{action:?}").starts_with(held));
            let Some(at) = self.queue.iter().position(|action| !held(action)) else {
                return self;
            };
            let action = self.queue.remove(at).unwrap();
            self.perform(action);
        }
        panic!("no rest: {:?}", self.log);
    }

    fn notice_change(&mut self) {
        if self.vbd.is_none() && self.nodes.contains_key(&(BE, "state".to_owned())) {
            let address = Address { kind: Kind::Vbd, frontend: 7, devid: 51712 };
            self.vbd = Some(Vbd::new(address, self.config));
        }
        self.give(Event::Changed);
    }

    pub(crate) fn world(&self) -> World {
        let mut world = World::new();
        for key in keys() {
            let node = self.read(key.side, &key.name);
            world.put(key, node);
        }
        for key in further_keys(&world) {
            let node = self.read(key.side, &key.name);
            world.put(key, node);
        }
        world
    }

    fn read(&self, side: Side, name: &str) -> Node {
        if self.denied.contains(&side) {
            return Node::Denied;
        }
        self.nodes.get(&(side, name.to_owned())).map_or(Node::Missing, |value| Node::Present(value.clone()))
    }

    fn hold(&self, guards: &[Guard]) -> bool {
        guards.iter().all(|guard| self.read(guard.key.side, &guard.key.name) == guard.expected)
    }

    fn say(&mut self, word: impl Into<String>) {
        self.log.push(word.into());
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::ReadWorld => {
                let world = self.world();
                self.give(Event::World(&world));
            }
            Action::Open(request) => {
                self.say(format!(
                    "open {}{}",
                    request.image.path,
                    if request.read_only { " ro" } else { "" }
                ));
                let result = self.open_error.clone().map_or(Ok(self.geometry), Err);
                self.give(Event::Opened(result));
            }
            Action::CloseImage => {
                self.say("close");
                self.give(Event::ImageClosed);
            }
            Action::Connect(plan) => {
                let resume = if plan.resume { " resume" } else { "" };
                let rings: Vec<String> = plan.rings.iter().map(shown).collect();
                self.say(format!("connect {}{resume}", rings.join(" or ")));
                match self.connect_error.clone() {
                    Some(error) => self.give(Event::ConnectFailed(error)),
                    None => {
                        self.connected = Some(plan);
                        self.give(Event::Connected(self.which));
                    }
                }
            }
            Action::Disconnect(how) => {
                self.say(format!("{how:?}").to_lowercase());
                self.connected = None;
                self.give(Event::Disconnected);
            }
            Action::Publish(publication) => self.publish(publication),
            Action::RemoveBackend(guards) => {
                self.say("remove");
                let holds = self.hold(&guards);
                if holds {
                    self.remove_all(BE);
                }
                self.give(if holds { Event::Published } else { Event::Superseded });
            }
            Action::ArmTimer(timer) => assert!(self.timers.insert(timer)),
            Action::CancelTimer(timer) => assert!(self.timers.remove(&timer)),
            Action::Report(notice) => self.notices.push(notice),
            Action::Forget => {
                self.say("forget");
                self.vbd = None;
            }
            Action::Stopped => self.say("stopped"),
        }
    }

    fn publish(&mut self, publication: Publication) {
        if let Some(text) = self.publish_error.clone() {
            self.say("publish fails");
            return self.give(Event::PublishFailed(text));
        }
        if !self.hold(&publication.guards) {
            self.say("superseded");
            return self.give(Event::Superseded);
        }
        assert!(self.nodes.contains_key(&(BE, "state".to_owned())), "a removed directory is made anew");
        self.say(publication.written("state").unwrap_or("note").to_owned());
        for name in &publication.removals {
            self.remove(BE, name);
        }
        for (name, value) in &publication.writes {
            self.put(BE, name, value);
        }
        self.last = Some(publication);
        self.give(Event::Published);
    }
}

/// A ring, as `[REFERENCES]/PORT` for each queue.
fn shown(ring: &RingPlan) -> String {
    let queues = ring.queues.iter().map(|queue| format!("{:?}/{}", queue.ring_refs, queue.event_channel));
    queues.collect::<Vec<_>>().join("+")
}

/// A refusal of the hypervisor.
pub(crate) fn bad_grant() -> ConnectError {
    ConnectError::Misbehaved(Misdeed::BadGrant(8))
}

pub(crate) const DRIVER: Place = Place::DriverDomain;

/// A driver domain's device that has shown its 2 long enough.
pub(crate) fn ready() -> Host {
    let mut host = Host::new(DRIVER);
    host.run().fire(Timer::Settle);
    assert_eq!(host.took(), "open /dev/vg/a, 2");
    host
}
