//! One virtual block device, backend side: the xenbus handshake as a pure state machine.
//!
//! [`Vbd::step`] takes an event and appends actions: no clock, no I/O, no logging, the same answer to the same history.
//! Its rule is *read, then decide*: an event only updates what we hold (image, ring, publication in flight) and asks for a
//! read of both directories; all that is decided is decided on such a read, from both states and what we hold, never from
//! the event. So events may be lost in each other, come twice or late, and a restarted process decides like an old one.
//! `docs/design/vbd.md` has the reasons and the invariants that `tests/vbd_explore.rs` checks on every reachable state.

mod action;
mod address;
mod decide;
mod features;
mod publish;
mod view;
mod world;

pub use action::{
    Action, Actions, Config, ConnectError, ConnectPlan, Disconnect, ERROR_TEXT_MAX_BYTES, Event, Geometry,
    Guard, Misdeed, Notice, OpenRequest, Place, Publication, QueuePlan, RingPlan, Script, Timer,
};
pub use address::{Address, Kind};
pub use features::{Discard, Features, Terms};
pub use world::{FURTHER_KEYS_MAX, Key, Node, Side, World, further_keys, keys};

use action::bounded;

/// The read of both directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Reading {
    Idle,
    /// Asked for. `stale`: something changed since, so read once more after it.
    Asked {
        stale: bool,
    },
}

/// The image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Image {
    Closed,
    Opening(OpenRequest),
    Open(OpenRequest, Geometry),
    Closing,
}

/// A ring that is mapped and served.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Serving {
    /// As [`ConnectPlan::rings`].
    rings: Vec<RingPlan>,
    /// Which of them it is.
    which: usize,
    /// What it was connected with.
    terms: Terms,
    /// State 4 was published for this ring.
    announced: bool,
    /// A predecessor served it.
    inherited: bool,
    /// The frontend was seen in state 4 with this ring: another 3 is another handshake.
    seen_connected: bool,
    /// The frontend was seen in state 5 with this ring: 1, 3 or 4 after that is another handshake.
    seen_closing: bool,
    /// What the frontend did to it; it is not served any more.
    broken: Option<String>,
}

/// The ring.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Ring {
    Down,
    Connecting(Serving),
    Up(Serving),
    Disconnecting(Disconnect),
}

/// A publication in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum InFlight {
    /// This state; with the timer that it has to stay for when the directory was new.
    State { state: u8, settle: Option<Timer> },
    /// A text, and no change of state.
    Note,
    /// The removal of the directory.
    Removal,
}

/// The medium of a drive that a guest uses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Medium {
    /// What the toolstack wants in it is in it.
    Settled,
    /// The ring was handed over to ourselves, to be served from another image.
    Changing,
    /// This could not be put in, and why: the drive counts as empty.
    Bad(OpenRequest, String),
}

/// What was tried.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Attempt {
    Understand,
    Open(OpenRequest),
    Connect(Vec<RingPlan>),
}

/// The memory of a failed attempt: the same one is not made again without a reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Setback {
    what: Attempt,
    text: String,
    /// Whose fault, for the log.
    misdeed: Option<Misdeed>,
    /// It may pass: worth a few more attempts.
    may_pass: bool,
    attempts: u8,
    /// The retry timer ran out since.
    ready: bool,
}

/// A timer as we know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Alarm {
    Off,
    Armed,
    Fired,
}

/// One virtual block device. Plain data: to be cloned, compared, hashed, stored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vbd {
    address: Address,
    config: Config,
    reading: Reading,
    publishing: Option<InFlight>,
    image: Image,
    ring: Ring,
    /// The last ring of several queues or pages that was given up: if its nodes still stand beside a plain ring, they
    /// are leftovers.
    given_up: Option<RingPlan>,
    medium: Medium,
    setback: Option<Setback>,
    alarms: [Alarm; Timer::ALL.len()],
    /// A first read was decided on.
    seen: bool,
    /// This directory was seen beyond state 1: if it is 1 again it is another one.
    advanced: bool,
    /// We published state 2 or 4, with all properties, in this directory.
    prepared: bool,
    /// A predecessor served this directory and its frontend may still rely on that.
    heir: bool,
    stopping: bool,
    /// Forgotten or stopped: nothing follows any more.
    finished: bool,
}

impl Vbd {
    /// A vbd that nothing is known of but its place. Its first event is [`Event::Changed`].
    #[must_use]
    pub fn new(address: Address, config: Config) -> Vbd {
        Vbd {
            address,
            config,
            reading: Reading::Idle,
            publishing: None,
            image: Image::Closed,
            ring: Ring::Down,
            given_up: None,
            medium: Medium::Settled,
            setback: None,
            alarms: [Alarm::Off; Timer::ALL.len()],
            seen: false,
            advanced: false,
            prepared: false,
            heir: false,
            stopping: false,
            finished: false,
        }
    }

    /// Where it lives.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }

    /// The image that is open, if one is, and whether the guest may only read it: for `status` and the sharing check.
    #[must_use]
    pub fn open_image(&self) -> Option<(&OpenRequest, Geometry)> {
        match &self.image {
            Image::Open(request, geometry) => Some((request, *geometry)),
            _ => None,
        }
    }

    /// Whether a ring is mapped and served.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(&self.ring, Ring::Up(serving) if serving.broken.is_none())
    }

    /// Whether nothing is held: no ring, no image, nothing outstanding with either.
    #[must_use]
    pub fn holds_nothing(&self) -> bool {
        self.ring == Ring::Down && self.image == Image::Closed
    }

    /// Takes an event, appends what is to be done.
    pub fn step(&mut self, event: Event<'_>, actions: &mut Actions) {
        if self.finished {
            return;
        }
        match event {
            Event::Changed => self.changed(),
            Event::World(world) => return self.world(world, actions),
            Event::Published | Event::Superseded | Event::PublishFailed(_) => {
                self.publication_ended(event, actions)
            }
            Event::Opened(result) => self.opened(result),
            Event::ImageClosed => {
                if self.image == Image::Closing {
                    self.image = Image::Closed;
                }
            }
            Event::Resized(geometry) => {
                if let Image::Open(_, known) = &mut self.image {
                    *known = geometry;
                }
            }
            Event::Connected(which) => self.connected(which),
            Event::ConnectFailed(error) => self.connect_failed(error),
            Event::Disconnected => {
                if matches!(self.ring, Ring::Disconnecting(_)) {
                    self.ring = Ring::Down;
                }
            }
            Event::RingBroken(misdeed) => self.ring_broken(misdeed, actions),
            Event::TimerFired(timer) => self.timer_fired(timer),
            Event::Stop => self.stopping = true,
        }
        if self.stopping {
            self.stop(actions);
        } else {
            self.want_read(actions);
        }
    }

    fn changed(&mut self) {
        if let Reading::Asked { stale } = &mut self.reading {
            *stale = true;
        }
    }

    /// A read is asked for unless one is under way. While a publication is, the read waits for its end, so that no read
    /// can be older than what we wrote.
    fn want_read(&mut self, actions: &mut Actions) {
        if self.reading == Reading::Idle && self.publishing.is_none() {
            self.reading = Reading::Asked { stale: false };
            actions.push(Action::ReadWorld);
        }
    }

    fn world(&mut self, world: &World, actions: &mut Actions) {
        let Reading::Asked { stale } = self.reading else {
            return;
        };
        self.reading = Reading::Idle;
        if self.stopping {
            return self.stop(actions);
        }
        if self.publishing.is_some() {
            return;
        }
        self.decide(world, stale, actions);
        if stale && !self.finished {
            self.want_read(actions);
        }
    }

    fn publication_ended(&mut self, event: Event<'_>, actions: &mut Actions) {
        let Some(in_flight) = self.publishing.take() else {
            return;
        };
        match event {
            Event::Published => self.published(in_flight, actions),
            Event::PublishFailed(text) if !self.stopping => {
                actions.push(Action::Report(Notice::PublishFailed(bounded(&text))));
                self.arm(Timer::Republish, actions);
            }
            _ => {}
        }
    }

    fn published(&mut self, in_flight: InFlight, actions: &mut Actions) {
        let InFlight::State { state, settle } = in_flight else {
            return;
        };
        self.advanced = true;
        if state == view::INIT_WAIT || state == view::CONNECTED {
            self.prepared = true;
            self.heir = false;
        }
        if state == view::CONNECTED
            && let Ring::Up(serving) = &mut self.ring
        {
            serving.announced = true;
        }
        if let (view::INIT_WAIT, Some(settle), false) = (state, settle, self.stopping) {
            self.arm(settle, actions);
        }
    }

    fn opened(&mut self, result: Result<Geometry, String>) {
        let Image::Opening(request) = std::mem::replace(&mut self.image, Image::Closed) else {
            return;
        };
        match result {
            Ok(geometry) => {
                if self.setback.as_ref().is_some_and(|it| matches!(it.what, Attempt::Open(_))) {
                    self.setback = None;
                }
                self.image = Image::Open(request, geometry);
            }
            // A medium that cannot be put in must not hold up a guest's requests.
            Err(text) if self.medium == Medium::Changing => {
                self.medium = Medium::Bad(request, bounded(&text))
            }
            Err(text) => self.failed(Attempt::Open(request), bounded(&text), None, true),
        }
    }

    fn connected(&mut self, which: usize) {
        let Ring::Connecting(mut serving) = std::mem::replace(&mut self.ring, Ring::Down) else {
            return;
        };
        serving.which = which;
        if self.medium == Medium::Changing {
            self.medium = Medium::Settled;
        }
        self.heir = self.heir && !serving.inherited;
        self.ring = Ring::Up(serving);
        self.setback = None;
    }

    fn connect_failed(&mut self, error: ConnectError) {
        let Ring::Connecting(serving) = std::mem::replace(&mut self.ring, Ring::Down) else {
            return;
        };
        let what = Attempt::Connect(serving.rings);
        match error {
            // A ring that a predecessor served was good: what is wrong with it may pass.
            ConnectError::Misbehaved(misdeed) => {
                self.failed(what, bounded(&misdeed.to_string()), Some(misdeed), serving.inherited);
            }
            ConnectError::Failed(text) => self.failed(what, bounded(&text), None, true),
        }
    }

    fn failed(&mut self, what: Attempt, text: String, misdeed: Option<Misdeed>, may_pass: bool) {
        let before =
            self.setback.take().filter(|setback| setback.what == what).map_or(0, |setback| setback.attempts);
        let attempts = before.saturating_add(1).min(self.config.attempts);
        self.setback = Some(Setback { what, text, misdeed, may_pass, attempts, ready: false });
    }

    fn ring_broken(&mut self, misdeed: Misdeed, actions: &mut Actions) {
        if let Ring::Up(serving) = &mut self.ring
            && serving.broken.is_none()
        {
            serving.broken = Some(bounded(&misdeed.to_string()));
            actions.push(Action::Report(Notice::Misbehaved(misdeed)));
        }
    }

    fn timer_fired(&mut self, timer: Timer) {
        if self.alarm(timer) != Alarm::Armed {
            return;
        }
        let fired = match timer {
            Timer::Linger | Timer::LingerForScript => Alarm::Fired,
            Timer::SettleForScript | Timer::Settle | Timer::Retry | Timer::Republish => Alarm::Off,
        };
        self.alarms[timer as usize] = fired;
        if timer == Timer::Retry
            && let Some(setback) = &mut self.setback
        {
            setback.ready = true;
        }
    }

    fn alarm(&self, timer: Timer) -> Alarm {
        self.alarms[timer as usize]
    }

    fn arm(&mut self, timer: Timer, actions: &mut Actions) {
        if self.alarm(timer) == Alarm::Off {
            self.alarms[timer as usize] = Alarm::Armed;
            actions.push(Action::ArmTimer(timer));
        }
    }

    fn disarm(&mut self, timer: Timer, actions: &mut Actions) {
        if self.alarm(timer) == Alarm::Armed {
            actions.push(Action::CancelTimer(timer));
        }
        self.alarms[timer as usize] = Alarm::Off;
    }

    /// Gives everything up, ring first. True when nothing is held any more.
    fn release(&mut self, how: Disconnect, actions: &mut Actions) -> bool {
        match &mut self.ring {
            Ring::Up(_) => {
                self.give_up_ring(how, actions);
                return false;
            }
            Ring::Disconnecting(under_way) => {
                if how == Disconnect::Abort && *under_way != Disconnect::Abort {
                    *under_way = how;
                    actions.push(Action::Disconnect(how));
                }
                return false;
            }
            Ring::Connecting(_) => return false,
            Ring::Down => {}
        }
        match self.image {
            Image::Open(..) => {
                self.image = Image::Closing;
                actions.push(Action::CloseImage);
                false
            }
            Image::Opening(_) | Image::Closing => false,
            Image::Closed => true,
        }
    }

    fn give_up_ring(&mut self, how: Disconnect, actions: &mut Actions) {
        if let Ring::Up(serving) = std::mem::replace(&mut self.ring, Ring::Disconnecting(how)) {
            let mut rings = serving.rings;
            if how != Disconnect::HandOver && serving.which < rings.len() {
                let ring = rings.swap_remove(serving.which);
                self.given_up = Some(ring).filter(|ring| !ring.is_plain());
            }
        }
        actions.push(Action::Disconnect(how));
    }

    /// On the way out for [`Event::Stop`]: nothing is written to xenstore, the ring is left to the successor.
    fn stop(&mut self, actions: &mut Actions) {
        for timer in Timer::ALL {
            self.disarm(timer, actions);
        }
        if self.publishing.is_some() {
            return;
        }
        if self.release(Disconnect::HandOver, actions) {
            self.finished = true;
            actions.push(Action::Stopped);
        }
    }
}
