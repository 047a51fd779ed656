//! A vbd, the daemon around it, and an abstract xenstore: every step that any of them can take, and the rules that no
//! step may break.

use std::collections::HashMap;
use std::rc::Rc;

use vbdd::hypervisor::DomainId;
use vbdd::vbd::{
    Action, Actions, Address, Config, ConnectError, Disconnect, Event, Geometry, Kind, Misdeed, Place,
    Publication, Script, Timer, Vbd,
};

use crate::faults::{Fault, plant};
use crate::rules::rule;
use crate::store::{
    Backend, Frontend, HOTPLUG_CONNECTED, Medium, NEW_BACKEND, Numbered, RingNodes, SIZES, Store, Texts,
};

const GUEST: DomainId = 7;

/// The daemon's image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Image {
    Closed,
    Opening(Medium),
    Open(Medium),
    Closing,
}

/// The daemon's ring.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Ring {
    Down,
    Connecting(RingNodes),
    Up(RingNodes),
    Broken(RingNodes),
    Disconnecting(Disconnect),
}

/// Everything. `vbd`, `publication`: 0 for none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct State {
    pub(crate) vbd: u32,
    pub(crate) store: Store,
    /// A watch event that the daemon has not taken yet.
    pub(crate) changed: bool,
    pub(crate) reading: bool,
    /// A read that is half done: the states are from then.
    pub(crate) states: Option<Store>,
    pub(crate) image: Image,
    pub(crate) ring: Ring,
    /// The image is longer than at first.
    pub(crate) grown: bool,
    pub(crate) publication: u32,
    pub(crate) timers: u8,
    pub(crate) stopping: bool,
    /// The linger timer ran out while 6 was visible.
    pub(crate) lingered: bool,
    /// This life of the daemon published 2 or 4 here, connected a ring, or saw the frontend without one: no ring is a predecessor's.
    pub(crate) spoke: bool,
}

/// A step's name, for traces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Label {
    Start,
    Deliver,
    ReadStates,
    World,
    Commit,
    CommitUnknown,
    PublishFails,
    OpenOk,
    OpenFails,
    ImageClosed,
    Connected,
    ConnectedSecond,
    ConnectBad,
    ConnectFails,
    Disconnected,
    RingBreaks,
    Fire(Timer),
    Stop,
    Kill,
    Plug,
    Unplug,
    ForceUnplug,
    RemoveBackend,
    RemoveFrontend,
    RemoveBoth,
    ScriptDone,
    Params(Medium),
    Grows,
    FrontendState(u8),
    FrontendRing(RingNodes),
}

/// What the environment may do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Freedom {
    /// A hotplug script of the toolstack's exists.
    pub(crate) script: bool,
    /// Reads take their states before the rest.
    pub(crate) torn_reads: bool,
    /// The daemon is stopped and killed.
    pub(crate) restarts: bool,
    /// What of the host fails: opens, connects, publications.
    pub(crate) failures: bool,
    /// The media that the toolstack puts into the drive, if it is one.
    pub(crate) media: &'static [Medium],
    /// The image grows.
    pub(crate) grows: bool,
    /// The states that the frontend writes.
    pub(crate) frontend_states: &'static [u8],
    /// The rings that it describes.
    pub(crate) rings: &'static [RingNodes],
}

/// An event, as small as it can be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Happening {
    Changed,
    World(Store, Option<Store>),
    Published,
    Superseded,
    PublishFailed,
    /// With which size.
    Opened(Option<u8>),
    Resized(u8),
    ImageClosed,
    /// Which way to read the nodes held.
    Connected(usize),
    ConnectBad,
    ConnectFailed,
    Disconnected,
    RingBroken,
    TimerFired(Timer),
    Stop,
}

/// An action with the publication numbered.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Act {
    Plain(Action),
    Publish(u32),
}

/// A publication or the removal of the directory, as handed to the daemon.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Writing {
    Nodes(Publication),
    Removal(Vec<vbdd::vbd::Guard>),
}

pub(crate) struct Model {
    pub(crate) config: Config,
    pub(crate) freedom: Freedom,
    pub(crate) texts: Texts,
    fault: Fault,
    vbds: Numbered<Vbd>,
    pub(crate) writings: Numbered<Writing>,
    memo: HashMap<(u32, Happening), Answer>,
}

/// The state after a step, or the rule that it broke.
pub(crate) type Outcome = Result<State, String>;

/// The vbd after an event, and what it wants done.
type Answer = (u32, Rc<Vec<Act>>);

impl Model {
    pub(crate) fn new(place: Place, script: Script, freedom: Freedom, fault: Fault) -> Model {
        let mut config = Config::new(3, place);
        config.script = script;
        config.attempts = 2;
        Model {
            config,
            freedom,
            texts: Texts::new(!freedom.media.is_empty()),
            fault,
            vbds: Numbered::new(),
            writings: Numbered::new(),
            memo: HashMap::new(),
        }
    }

    pub(crate) fn start(&self) -> State {
        State {
            vbd: 0,
            store: Store { backend: None, frontend: None },
            changed: false,
            reading: false,
            states: None,
            image: Image::Closed,
            ring: Ring::Down,
            grown: false,
            publication: 0,
            timers: 0,
            stopping: false,
            lingered: false,
            spoke: false,
        }
    }

    pub(crate) fn vbd(&self, state: &State) -> Option<&Vbd> {
        state.vbd.checked_sub(1).map(|at| &self.vbds.values[at as usize])
    }

    pub(crate) fn distinct_vbds(&self) -> usize {
        self.vbds.values.len()
    }

    /// Every step from here.
    pub(crate) fn steps(&mut self, state: &State, out: &mut Vec<(Label, Outcome)>) {
        out.clear();
        self.answers(state, true, out);
        self.toolstack(state, out);
        self.frontend(state, out);
        self.images(state, out);
        if self.freedom.restarts && state.vbd != 0 {
            if !state.stopping {
                out.push((Label::Stop, self.deliver(State { stopping: true, ..*state }, Happening::Stop)));
            }
            out.push((Label::Kill, Ok(Self::reborn(state))));
        }
    }

    /// The one step that a world takes which leaves the vbd alone: what is outstanding is answered, and well.
    pub(crate) fn quiet_step(&mut self, state: &State) -> Option<(Label, Outcome)> {
        let mut out = Vec::new();
        self.answers(state, false, &mut out);
        out.into_iter().next()
    }

    /// The same of a world in which every open and every connect fails for good, and no retry is due yet.
    pub(crate) fn failing_step(&mut self, state: &State) -> Option<(Label, Outcome)> {
        let mut out = Vec::new();
        self.answers(state, true, &mut out);
        let failing = out.iter().position(|(label, _)| matches!(label, Label::OpenFails | Label::ConnectBad));
        let honest = |label: &Label| {
            !matches!(
                label,
                Label::CommitUnknown
                    | Label::PublishFails
                    | Label::RingBreaks
                    | Label::OpenOk
                    | Label::Connected
                    | Label::ConnectedSecond
                    | Label::ConnectFails
                    | Label::Fire(Timer::Retry | Timer::Republish)
            )
        };
        let at = failing.or_else(|| out.iter().position(|(label, _)| honest(label)))?;
        Some(out.swap_remove(at))
    }

    pub(crate) fn reborn(state: &State) -> State {
        State {
            vbd: 0,
            changed: true,
            reading: false,
            states: None,
            image: Image::Closed,
            ring: Ring::Down,
            publication: 0,
            timers: 0,
            stopping: false,
            lingered: false,
            spoke: false,
            ..*state
        }
    }

    /// The daemon's answers, good ones first; with `bad`, also those that fail.
    fn answers(&mut self, state: &State, all: bool, out: &mut Vec<(Label, Outcome)>) {
        let s = *state;
        let bad = all && self.freedom.failures;
        let enough = |out: &Vec<_>| !all && !out.is_empty();
        if s.changed {
            let taken = State { changed: false, ..s };
            if s.vbd != 0 {
                out.push((Label::Deliver, self.deliver(taken, Happening::Changed)));
            } else if s.store.backend.is_some() {
                let address = Address { kind: Kind::Vbd, frontend: GUEST, devid: 51712 };
                let vbd = self.vbds.number(Vbd::new(address, self.config)) + 1;
                out.push((Label::Deliver, self.deliver(State { vbd, ..taken }, Happening::Changed)));
            } else {
                out.push((Label::Deliver, Ok(taken)));
            }
        }
        if enough(out) {
            return;
        }
        if s.reading {
            if self.freedom.torn_reads && s.states.is_none() {
                out.push((Label::ReadStates, Ok(State { states: Some(s.store), ..s })));
            } else {
                let read = State { reading: false, states: None, ..s };
                out.push((Label::World, self.deliver(read, Happening::World(s.store, s.states))));
            }
        }
        if enough(out) {
            return;
        }
        if s.publication != 0 {
            out.push((Label::Commit, self.commit(s, true)));
            if bad {
                out.push((Label::CommitUnknown, self.commit(s, false)));
                let failed = State { publication: 0, ..s };
                out.push((Label::PublishFails, self.deliver(failed, Happening::PublishFailed)));
            }
        }
        if enough(out) {
            return;
        }
        match s.image {
            Image::Opening(medium) => {
                let open = State { image: Image::Open(medium), ..s };
                let size = medium.size(s.grown);
                out.push((Label::OpenOk, self.deliver(open, Happening::Opened(Some(size)))));
                // There is nothing to open in an empty drive.
                if bad && medium != Medium::Empty {
                    let closed = State { image: Image::Closed, ..s };
                    out.push((Label::OpenFails, self.deliver(closed, Happening::Opened(None))));
                }
            }
            Image::Closing => {
                let closed = State { image: Image::Closed, ..s };
                out.push((Label::ImageClosed, self.deliver(closed, Happening::ImageClosed)));
            }
            Image::Open(_) | Image::Closed => {}
        }
        if enough(out) {
            return;
        }
        match s.ring {
            Ring::Connecting(nodes) => {
                let up = State { ring: Ring::Up(nodes), ..s };
                out.push((Label::Connected, self.deliver(up, Happening::Connected(0))));
                if all && nodes == RingNodes::TwoAndA {
                    out.push((Label::ConnectedSecond, self.deliver(up, Happening::Connected(1))));
                }
                if bad {
                    let down = State { ring: Ring::Down, ..s };
                    out.push((Label::ConnectBad, self.deliver(down, Happening::ConnectBad)));
                    out.push((Label::ConnectFails, self.deliver(down, Happening::ConnectFailed)));
                }
            }
            Ring::Disconnecting(_) => {
                let down = State { ring: Ring::Down, ..s };
                out.push((Label::Disconnected, self.deliver(down, Happening::Disconnected)));
            }
            Ring::Up(nodes) if bad => {
                let broken = State { ring: Ring::Broken(nodes), ..s };
                out.push((Label::RingBreaks, self.deliver(broken, Happening::RingBroken)));
            }
            _ => {}
        }
        if enough(out) {
            return;
        }
        for timer in Timer::ALL {
            let bit = 1 << timer as u8;
            if s.timers & bit != 0 {
                let visible = s.store.backend.is_some_and(|it| it.state == 6 && !it.online);
                let lingered = s.lingered || (timer == Timer::Linger && visible);
                let fired = State { timers: s.timers & !bit, lingered, ..s };
                out.push((Label::Fire(timer), self.deliver(fired, Happening::TimerFired(timer))));
            }
        }
    }

    fn toolstack(&mut self, state: &State, out: &mut Vec<(Label, Outcome)>) {
        let s = *state;
        let mut change = |label, store| {
            let lingered = s.lingered && s.store.backend == Store::backend_of(&store);
            out.push((label, Ok(State { store, changed: true, lingered, ..s })));
        };
        let Some(backend) = s.store.backend else {
            let ring = s.store.frontend.map_or(RingNodes::None, |it| it.ring);
            let frontend = Some(Frontend { state: 1, ring });
            change(Label::Plug, Store { backend: Some(NEW_BACKEND), frontend });
            if s.store.frontend.is_some() {
                change(Label::RemoveFrontend, Store { backend: None, frontend: None });
            }
            return;
        };
        if backend.online {
            let mut closing = backend;
            closing.online = false;
            closing.state = 5;
            change(Label::Unplug, Store { backend: Some(closing), ..s.store });
            change(Label::ForceUnplug, Store { backend: Some(closing), frontend: None });
        }
        change(Label::RemoveBackend, Store { backend: None, ..s.store });
        if s.store.frontend.is_some() {
            change(Label::RemoveFrontend, Store { frontend: None, ..s.store });
            change(Label::RemoveBoth, Store { backend: None, frontend: None });
        }
        if self.freedom.script && backend.hotplug == 0 && backend.state == 2 {
            let mut done = backend;
            done.hotplug = HOTPLUG_CONNECTED;
            change(Label::ScriptDone, Store { backend: Some(done), ..s.store });
        }
    }

    /// The image grows, and the toolstack changes the medium.
    fn images(&mut self, state: &State, out: &mut Vec<(Label, Outcome)>) {
        let s = *state;
        if self.freedom.grows && !s.grown {
            let grown = State { grown: true, ..s };
            let told = match s.image {
                Image::Open(medium) => self.deliver(grown, Happening::Resized(medium.size(true))),
                _ => Ok(grown),
            };
            out.push((Label::Grows, told));
        }
        let Some(backend) = s.store.backend else { return };
        for medium in self.freedom.media {
            if *medium != backend.medium {
                let backend = Some(Backend { medium: *medium, ..backend });
                let store = Store { backend, ..s.store };
                out.push((Label::Params(*medium), Ok(State { store, changed: true, ..s })));
            }
        }
    }

    fn frontend(&mut self, state: &State, out: &mut Vec<(Label, Outcome)>) {
        let s = *state;
        let now = s.store.frontend.unwrap_or(Frontend { state: 0, ring: RingNodes::None });
        for to in self.freedom.frontend_states {
            let store = Store { frontend: Some(Frontend { state: *to, ..now }), ..s.store };
            out.push((Label::FrontendState(*to), Ok(State { store, changed: true, ..s })));
        }
        for ring in self.freedom.rings {
            if *ring != now.ring {
                let store = Store { frontend: Some(Frontend { ring: *ring, ..now }), ..s.store };
                out.push((Label::FrontendRing(*ring), Ok(State { store, changed: true, ..s })));
            }
        }
    }

    /// The transaction: compare, write, commit. `known`: the answer gets through.
    fn commit(&mut self, s: State, known: bool) -> Outcome {
        let writing = self.writings.values[s.publication as usize - 1].clone();
        let (Writing::Nodes(Publication { guards, .. }) | Writing::Removal(guards)) = &writing;
        let superseded = State { publication: 0, ..s };
        if !s.store.holds(guards, self.freedom.script, &self.texts) {
            return self.deliver(superseded, Happening::Superseded);
        }
        rule(s.store.backend.is_some(), "a directory that was removed is made anew")?;
        let backend = match &writing {
            Writing::Nodes(publication) => {
                let after = s.store.apply(publication, &mut self.texts);
                self.check_publication(&s, publication, after)?;
                Some(after)
            }
            Writing::Removal(_) => {
                self.check_removal(&s)?;
                None
            }
        };
        let spoke = s.spoke || backend.is_some_and(|it| it.state == 4 || it.state == 2);
        let lingered = s.lingered && backend == s.store.backend;
        let store = Store { backend, ..s.store };
        let after = State { store, changed: true, spoke, lingered, ..superseded };
        self.deliver(after, if known { Happening::Published } else { Happening::Superseded })
    }

    /// Gives the vbd an event and performs its actions.
    fn deliver(&mut self, s: State, happening: Happening) -> Outcome {
        if s.vbd == 0 {
            return Ok(s);
        }
        let mut s = s;
        if let Happening::World(store, states) = happening {
            s.spoke |= !states.unwrap_or(store).frontend.is_some_and(|it| (3..=5).contains(&it.state));
        }
        let key = (s.vbd, happening);
        s.spoke |= matches!(happening, Happening::Connected(_));
        let (after, acts) = match self.memo.get(&key) {
            Some((after, acts)) => (*after, acts.clone()),
            None => {
                let mut vbd = self.vbds.values[s.vbd as usize - 1].clone();
                let mut actions = Actions::new();
                self.step(&mut vbd, happening, &mut actions);
                plant(self.fault, &mut vbd, happening, &mut actions);
                let acts: Vec<Act> = actions.into_iter().map(|action| self.numbered(action)).collect();
                let after = self.vbds.number(vbd) + 1;
                let acts = Rc::new(acts);
                self.memo.insert(key, (after, acts.clone()));
                (after, acts)
            }
        };
        let mut s = State { vbd: after, ..s };
        for act in acts.iter() {
            s = self.perform(s, act, happening)?;
        }
        Ok(s)
    }

    fn numbered(&mut self, action: Action) -> Act {
        match action {
            Action::Publish(publication) => {
                Act::Publish(self.writings.number(Writing::Nodes(publication)) + 1)
            }
            Action::RemoveBackend(guards) => Act::Publish(self.writings.number(Writing::Removal(guards)) + 1),
            other => Act::Plain(other),
        }
    }

    fn step(&mut self, vbd: &mut Vbd, happening: Happening, actions: &mut Actions) {
        let script = self.freedom.script;
        let event = match happening {
            Happening::World(store, states) => {
                let world = match states {
                    Some(states) => store.torn_world(&states, script, &self.texts),
                    None => store.world(script, &self.texts),
                };
                return vbd.step(Event::World(&world), actions);
            }
            Happening::Changed => Event::Changed,
            Happening::Published => Event::Published,
            Happening::Superseded => Event::Superseded,
            Happening::PublishFailed => Event::PublishFailed("quota".to_owned()),
            Happening::Opened(Some(size)) => Event::Opened(Ok(geometry(size))),
            Happening::Resized(size) => Event::Resized(geometry(size)),
            Happening::Opened(None) => Event::Opened(Err("no such file".to_owned())),
            Happening::ImageClosed => Event::ImageClosed,
            Happening::Connected(which) => Event::Connected(which),
            Happening::ConnectBad => Event::ConnectFailed(ConnectError::Misbehaved(Misdeed::BadGrant(8))),
            Happening::ConnectFailed => Event::ConnectFailed(ConnectError::Failed("no memory".to_owned())),
            Happening::Disconnected => Event::Disconnected,
            Happening::RingBroken => Event::RingBroken(Misdeed::Ring("overrun".to_owned())),
            Happening::TimerFired(timer) => Event::TimerFired(timer),
            Happening::Stop => Event::Stop,
        };
        vbd.step(event, actions);
    }
}

fn geometry(size: u8) -> Geometry {
    let sectors = SIZES[usize::from(size)].parse().unwrap();
    Geometry { sectors, physical_sector_bytes: 512, discard: None }
}
