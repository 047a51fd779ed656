//! What follows from a read of both directories and from what we hold.

use super::action::{
    Action, Actions, ConnectPlan, Disconnect, Misdeed, Notice, OpenRequest, Place, RingPlan, Timer,
};
use super::publish::{self, Wording};
use super::view::{CLOSED, CLOSING, CONNECTED, Front, INIT_WAIT, INITIALISING, Read, View};
use super::{Alarm, Attempt, Image, InFlight, Medium, Ring, Serving, Setback, Vbd, World};

/// What a step towards a goal came to.
enum Way {
    /// There already.
    Clear,
    /// An answer or a timer must come first.
    Wait,
    /// No way: say so and close.
    Refuse(String, Option<Misdeed>),
}

impl Vbd {
    /// One decision. `stale`: a newer read will follow.
    pub(super) fn decide(&mut self, world: &World, stale: bool, actions: &mut Actions) {
        let told = match &self.ring {
            Ring::Up(serving) | Ring::Connecting(serving) => Some(&serving.terms),
            Ring::Down | Ring::Disconnecting(_) => None,
        };
        // Whether it is an heir is known from the first read on.
        let trusting =
            !self.seen || self.heir || matches!(&self.ring, Ring::Up(serving) if serving.inherited);
        let mut view = match Read::of(&self.address, &self.config, told, trusting, world) {
            Read::Gone | Read::NotOurs => return self.leave(stale, actions),
            Read::Here(view) => *view,
        };
        if let Ok(rings) = &mut view.rings
            && rings.len() > 1
            && rings.first() == self.given_up.as_ref()
        {
            rings.rotate_left(1);
        }
        self.settle_medium(&mut view);
        self.observe(&view, actions);
        if view.be == INITIALISING && self.advanced {
            if !self.release(Disconnect::Abort, actions) {
                return;
            }
            self.renew(actions);
        }
        if view.online {
            self.decide_online(&view, world, actions)
        } else {
            self.decide_offline(&view, world, actions)
        }
    }

    /// A medium that could not be put into a drive counts as none, until another is named or the guest makes another ring.
    fn settle_medium(&mut self, view: &mut View) {
        let Medium::Bad(request, _) = &self.medium else { return };
        let in_use = matches!(view.be, CONNECTED | CLOSING);
        match &mut view.device {
            Ok(device) if in_use && device.request == *request => {
                device.request = OpenRequest::empty(true);
            }
            _ => self.medium = Medium::Settled,
        }
    }

    /// The directory is gone, or is not for us: let go of everything and be forgotten.
    fn leave(&mut self, stale: bool, actions: &mut Actions) {
        for timer in Timer::ALL {
            self.disarm(timer, actions);
        }
        if self.release(Disconnect::Abort, actions) && !stale {
            self.finished = true;
            actions.push(Action::Forget);
        }
    }

    /// Another device stands where the old one was.
    fn renew(&mut self, actions: &mut Actions) {
        for timer in Timer::ALL {
            self.disarm(timer, actions);
        }
        self.setback = None;
        self.given_up = None;
        self.medium = Medium::Settled;
        self.advanced = false;
        self.prepared = false;
        self.heir = false;
    }

    /// Notes what this read tells beyond the moment.
    fn observe(&mut self, view: &View, actions: &mut Actions) {
        if !self.seen {
            self.seen = true;
            self.heir = matches!(view.be, INIT_WAIT | CONNECTED | CLOSING);
        }
        self.advanced |= view.be != INITIALISING;
        if view.be == INIT_WAIT && view.fe == Front::Closing {
            // It closes a ring that was never connected.
            self.heir = false;
        }
        if let Ring::Up(serving) | Ring::Connecting(serving) = &mut self.ring {
            serving.seen_connected |= view.fe == Front::Connected;
            serving.seen_closing |= view.fe == Front::Closing;
        }
        if matches!(view.fe, Front::Closed | Front::Gone) {
            self.heir = false;
            if view.be == CLOSED {
                // The next handshake deserves a fresh attempt. Not before our 6: it may be the failure that leads there.
                self.setback = None;
                self.disarm(Timer::Retry, actions);
            }
        }
        if view.online || view.be != CLOSED {
            self.disarm(Timer::Linger, actions);
            self.disarm(Timer::LingerForScript, actions);
        }
    }

    fn decide_offline(&mut self, view: &View, world: &World, actions: &mut Actions) {
        if view.be == CLOSED {
            // Whatever the frontend does now, the device is over.
            if self.release(Disconnect::Drain, actions) && self.config.place == Place::DriverDomain {
                self.remove_backend(view, world, actions);
            }
            return;
        }
        match view.fe {
            Front::Initialised | Front::Connected | Front::Closing => {
                if view.be != CLOSING {
                    self.publish_state(CLOSING, view, world, actions);
                } else if matches!(view.fe, Front::Connected | Front::Closing) {
                    self.take_over(view, actions);
                }
            }
            Front::Gone => self.close(Disconnect::Abort, view, world, actions),
            Front::Initialising | Front::Closed | Front::Other => {
                self.close(Disconnect::Drain, view, world, actions);
            }
        }
    }

    fn remove_backend(&mut self, view: &View, world: &World, actions: &mut Actions) {
        let linger = if view.has_loop_device { Timer::LingerForScript } else { Timer::Linger };
        match self.alarm(linger) {
            Alarm::Off => self.arm(linger, actions),
            Alarm::Armed => {}
            Alarm::Fired => {
                if self.may_publish(view) {
                    self.publishing = Some(InFlight::Removal);
                    actions.push(Action::RemoveBackend(publish::guards(world, false, false)));
                }
            }
        }
    }

    fn decide_online(&mut self, view: &View, world: &World, actions: &mut Actions) {
        if view.be == INITIALISING {
            // Whatever the frontend does, the toolstack must get to see 2.
            if view.fe == Front::Gone {
                self.release(Disconnect::Abort, actions);
            } else {
                self.prepare(view, world, actions);
            }
            return;
        }
        match view.fe {
            Front::Initialising => self.prepare(view, world, actions),
            Front::Initialised | Front::Connected => self.serve(view, world, actions),
            Front::Closing => match view.be {
                CLOSING => self.take_over(view, actions),
                CLOSED => {
                    self.release(Disconnect::Drain, actions);
                }
                _ => self.publish_state(CLOSING, view, world, actions),
            },
            Front::Closed => self.close(Disconnect::Drain, view, world, actions),
            Front::Gone => self.close(Disconnect::Abort, view, world, actions),
            Front::Other => match view.be {
                CLOSED => {
                    self.release(Disconnect::Drain, actions);
                }
                CONNECTED | CLOSING => {}
                INIT_WAIT if self.prepared => {}
                _ => self.prepare(view, world, actions),
            },
        }
    }

    /// Towards 6: ring down, image closed, and only then the state, because the storage may be taken away at once.
    fn close(&mut self, how: Disconnect, view: &View, world: &World, actions: &mut Actions) {
        if self.release(how, actions) && view.be != CLOSED {
            self.publish_state(CLOSED, view, world, actions);
        }
    }

    /// Towards 2: no ring, and the image open if we play the script.
    fn prepare(&mut self, view: &View, world: &World, actions: &mut Actions) {
        if self.ring != Ring::Down {
            if matches!(self.ring, Ring::Up(_)) {
                self.drop_ring(actions);
            }
            return;
        }
        let way = match &view.device {
            Err(text) => self.puzzled(text, actions),
            Ok(device) if view.plays_script => self.open(&device.request, view, actions),
            Ok(_) => Way::Clear,
        };
        match way {
            Way::Clear if view.be == INIT_WAIT && self.prepared => {}
            Way::Clear => self.publish_state(INIT_WAIT, view, world, actions),
            Way::Wait => {}
            Way::Refuse(text, misdeed) => self.refuse(&text, misdeed, view, world, actions),
        }
    }

    /// Towards 4: the announced ring mapped and served.
    fn serve(&mut self, view: &View, world: &World, actions: &mut Actions) {
        if let Ring::Up(serving) = &self.ring {
            if serving.is_another(view) {
                return self.drop_ring(actions);
            }
            return self.keep_serving(view, world, actions);
        }
        if self.ring != Ring::Down {
            return;
        }
        let way = match (&view.rings, &view.device) {
            (Err(misdeed), _) => Way::Refuse(misdeed.to_string(), Some(misdeed.clone())),
            (Ok(_), Err(text)) => self.puzzled(text, actions),
            (Ok(plans), Ok(device)) => self.open_and_connect(&device.request, plans, view, actions),
        };
        if let Way::Refuse(text, misdeed) = way {
            self.refuse(&text, misdeed, view, world, actions);
        }
    }

    /// The ring is up and is the frontend's present one: make our state say so, and the sizes be true.
    fn keep_serving(&mut self, view: &View, world: &World, actions: &mut Actions) {
        let (Ring::Up(serving), Image::Open(open, geometry)) = (&self.ring, &self.image) else {
            return;
        };
        if let Ok(device) = &view.device
            && (view.be, device.cdrom, open.cdrom) == (CONNECTED, true, true)
            && device.request != *open
            && serving.announced
        {
            return self.change_medium(actions);
        }
        // A 5 that is not ours asks the frontend to close; it will, or it will not.
        let said = serving.announced && matches!(view.be, CONNECTED | CLOSING);
        let resized = view.be == CONNECTED && !publish::says_size(world, *geometry);
        if !said || resized {
            return self.publish_state(CONNECTED, view, world, actions);
        }
        let told = match (&serving.broken, &self.medium) {
            (Some(text), _) | (None, Medium::Bad(_, text)) => Some(text),
            _ => None,
        };
        if let Some(text) = told
            && !publish::says_error(world, text)
            && self.may_publish(view)
        {
            let note = publish::note(world, text);
            self.publishing = Some(InFlight::Note);
            actions.push(Action::Publish(note));
        }
    }

    /// The guest's requests wait while the ring is taken down, the drive gets its other medium, and the ring is taken over as
    /// from a predecessor. The frontend is told by the new sizes.
    fn change_medium(&mut self, actions: &mut Actions) {
        self.medium = Medium::Changing;
        self.heir = true;
        self.give_up_ring(Disconnect::HandOver, actions);
    }

    /// A frontend that is told to close, or wants to, may go on using the ring that our predecessor served.
    fn take_over(&mut self, view: &View, actions: &mut Actions) {
        if !self.heir || self.ring != Ring::Down {
            return;
        }
        if let (Ok(plans), Ok(device)) = (&view.rings, &view.device) {
            self.open_and_connect(&device.request, plans, view, actions);
        }
    }

    /// Towards a ring. One that is known to be hopeless is refused before the image is opened for it.
    fn open_and_connect(
        &mut self,
        request: &OpenRequest,
        plans: &[RingPlan],
        view: &View,
        actions: &mut Actions,
    ) -> Way {
        let attempt = Attempt::Connect(plans.to_vec());
        if let Some(setback) = self.hopeless(&attempt, true) {
            return Way::Refuse(setback.text.clone(), setback.misdeed.clone());
        }
        match self.open(request, view, actions) {
            Way::Clear => self.connect(plans, view, actions),
            other => other,
        }
    }

    /// Towards an open image.
    fn open(&mut self, request: &OpenRequest, view: &View, actions: &mut Actions) -> Way {
        match &self.image {
            Image::Open(open, _) if open == request => return Way::Clear,
            Image::Open(..) => {
                self.shut(actions);
                return Way::Wait;
            }
            Image::Opening(_) | Image::Closing => return Way::Wait,
            Image::Closed => {}
        }
        let attempt = Attempt::Open(request.clone());
        match self.again(&attempt, view.script_pending, actions) {
            Way::Clear => {
                self.image = Image::Opening(request.clone());
                actions.push(Action::Open(request.clone()));
                Way::Wait
            }
            other => other,
        }
    }

    /// Towards a closed image.
    fn shut(&mut self, actions: &mut Actions) -> Way {
        match self.image {
            Image::Open(..) => {
                self.image = Image::Closing;
                actions.push(Action::CloseImage);
                Way::Wait
            }
            Image::Opening(_) | Image::Closing => Way::Wait,
            Image::Closed => Way::Clear,
        }
    }

    fn connect(&mut self, plans: &[RingPlan], view: &View, actions: &mut Actions) -> Way {
        let attempt = Attempt::Connect(plans.to_vec());
        match self.again(&attempt, true, actions) {
            Way::Clear => {
                let resume = self.heir && matches!(view.be, CONNECTED | CLOSING);
                self.ring = Ring::Connecting(Serving {
                    rings: plans.to_vec(),
                    which: 0,
                    terms: view.terms,
                    announced: resume && view.be == CONNECTED && self.medium == Medium::Settled,
                    inherited: resume,
                    seen_connected: view.fe == Front::Connected,
                    seen_closing: view.fe == Front::Closing,
                    broken: None,
                });
                let (domain, rings, terms) = (self.address.frontend, plans.to_vec(), view.terms);
                actions.push(Action::Connect(ConnectPlan { domain, rings, terms, resume }));
                Way::Wait
            }
            other => other,
        }
    }

    /// Whether an attempt may be made, now, later, or not any more.
    fn again(&mut self, attempt: &Attempt, may_pass: bool, actions: &mut Actions) -> Way {
        if let Some(setback) = self.hopeless(attempt, may_pass) {
            return Way::Refuse(setback.text.clone(), setback.misdeed.clone());
        }
        let Some(setback) = self.setback.as_mut().filter(|setback| setback.what == *attempt) else {
            return Way::Clear;
        };
        if setback.ready {
            setback.ready = false;
            return Way::Clear;
        }
        let text = setback.text.clone();
        if self.alarm(Timer::Retry) == Alarm::Off {
            actions.push(Action::Report(Notice::WillRetry(text)));
            self.arm(Timer::Retry, actions);
        }
        Way::Wait
    }

    /// The setback that forbids an attempt, if one does. A disk that a guest relies on is not given up for an image that
    /// is missing at the moment: its I/O waits.
    fn hopeless(&self, attempt: &Attempt, may_pass: bool) -> Option<&Setback> {
        let setback = self.setback.as_ref().filter(|setback| setback.what == *attempt)?;
        let relied_on = self.heir && matches!(attempt, Attempt::Open(_));
        let patient = may_pass && setback.may_pass && setback.attempts < self.config.attempts;
        (!setback.ready && !relied_on && !patient).then_some(setback)
    }

    /// The toolstack's nodes make no sense. That closes a new device, and not one that a guest relies on.
    fn puzzled(&mut self, text: &str, actions: &mut Actions) -> Way {
        if !self.heir {
            return Way::Refuse(text.to_owned(), None);
        }
        let what = Attempt::Understand;
        if !self.setback.as_ref().is_some_and(|setback| setback.what == what && setback.text == text) {
            actions.push(Action::Report(Notice::Refused(text.to_owned())));
            let text = text.to_owned();
            self.setback =
                Some(Setback { what, text, misdeed: None, may_pass: false, attempts: 0, ready: false });
        }
        Way::Wait
    }

    /// Says why and closes. The frontend may try anew once it has gone through 6.
    fn refuse(
        &mut self,
        text: &str,
        misdeed: Option<Misdeed>,
        view: &View,
        world: &World,
        actions: &mut Actions,
    ) {
        if !self.release(Disconnect::Drain, actions) {
            return;
        }
        let text = super::bounded(text);
        // What a guest does to a device that is refused already does not replace the reason.
        let said = publish::says_error(world, &text) || (misdeed.is_some() && publish::has_error(world));
        if (view.be == CLOSED && said) || !self.may_publish(view) {
            return;
        }
        actions.push(Action::Report(match misdeed {
            Some(misdeed) => Notice::Misbehaved(misdeed),
            None => Notice::Refused(text.clone()),
        }));
        self.publish(CLOSED, Wording::Refusal(text), view, world, actions);
    }

    fn drop_ring(&mut self, actions: &mut Actions) {
        self.give_up_ring(Disconnect::Drain, actions);
    }

    /// Not while a publication failed a moment ago, nor while a toolstack has yet to see our 2.
    fn may_publish(&self, view: &View) -> bool {
        // A script that has done its work was started by a toolstack that has seen 2.
        let seen = view.hotplug_connected && !view.plays_script;
        let settling = (self.alarm(Timer::SettleForScript) == Alarm::Armed && !seen)
            || self.alarm(Timer::Settle) == Alarm::Armed;
        self.publishing.is_none()
            && self.alarm(Timer::Republish) == Alarm::Off
            && !(settling && view.online && view.be == INIT_WAIT)
    }

    fn publish_state(&mut self, state: u8, view: &View, world: &World, actions: &mut Actions) {
        if self.may_publish(view) {
            self.publish(state, Wording::Plain, view, world, actions);
        }
    }

    fn publish(&mut self, state: u8, wording: Wording, view: &View, world: &World, actions: &mut Actions) {
        let geometry = match &self.image {
            Image::Open(_, geometry) => Some(*geometry),
            _ => None,
        };
        let publication = publish::state(state, wording, view, geometry, &self.image, world);
        let settle = (view.be == INITIALISING).then_some(if view.has_script {
            Timer::SettleForScript
        } else {
            Timer::Settle
        });
        self.publishing = Some(InFlight::State { state, settle });
        actions.push(Action::Publish(publication));
    }
}

impl Serving {
    /// Whether the frontend means another ring than this one. Nodes that make no sense mean nothing while it is in use.
    fn is_another(&self, view: &View) -> bool {
        let rewritten = view.rings.as_ref().is_ok_and(|rings| *rings != self.rings);
        rewritten || self.seen_closing || (self.seen_connected && view.fe == Front::Initialised)
    }
}
