//! The rules that no step may break.

use vbdd::vbd::{Action, ConnectPlan, Disconnect, Place, Publication, Script, Side};

use crate::model::{Act, Happening, Image, Model, Outcome, Ring, State, Writing};
use crate::store::{HOTPLUG_CONNECTED, Medium, RingNodes};

pub(crate) fn rule(holds: bool, text: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text.to_owned()) }
}

impl Model {
    pub(crate) fn check_removal(&self, s: &State) -> Result<(), String> {
        let before = s.store.backend.ok_or("nothing to remove")?;
        rule(self.config.place == Place::DriverDomain, "the directory is removed in dom0")?;
        rule(before.state == 6 && !before.online, "a directory is removed that is not unplugged")?;
        rule(s.lingered, "a directory is removed before 6 could be seen")
    }

    pub(crate) fn check_publication(
        &self,
        s: &State,
        publication: &Publication,
        after: crate::store::Backend,
    ) -> Result<(), String> {
        let before = s.store.backend.ok_or("nothing to write to")?;
        rule(after.online == before.online, "online is the toolstack's")?;
        if publication.written("state").is_none() {
            return rule(after.state == before.state, "a note changes the state");
        }
        let refusal = publication.written("error").is_some();
        let idle = s.image == Image::Closed && s.ring == Ring::Down;
        rule(before.online || before.state != 6, "6 of an unplugged device is final")?;
        let front = s.store.frontend.map_or(0, |it| it.state);
        match after.state {
            2 => {
                rule(before.online, "2 is published offline")?;
                rule(s.ring == Ring::Down, "2 is published with a ring")?;
                let ours = self.config.script == Script::Ours;
                rule(!ours || matches!(s.image, Image::Open(_)), "2 is published without an image")?;
                rule(!ours || after.hotplug == HOTPLUG_CONNECTED, "2 without hotplug-status")
            }
            4 => {
                rule(before.online, "4 is published offline")?;
                rule(before.state != 1, "2 is skipped")?;
                rule(matches!(s.image, Image::Open(_)), "4 is published without an image")?;
                rule(matches!(s.ring, Ring::Up(_) | Ring::Broken(_)), "4 is published without a ring")?;
                rule(after.sized > 0, "4 is published without sizes")
            }
            5 => {
                rule(!before.online || front == 5, "5 is published to a frontend that does not close")?;
                rule(before.state != 1 || !before.online, "2 is skipped")
            }
            6 => {
                rule(idle, "6 is published while something is held")?;
                let gone = s.store.frontend.is_none() || front == 6;
                rule(refusal || !before.online || gone, "6 is published to a frontend that is there")?;
                rule(refusal || !before.online || before.state != 1, "2 is skipped")
            }
            other => Err(format!("state {other} is published")),
        }
    }

    /// What an action does to the daemon, if it may be taken now.
    pub(crate) fn perform(&self, mut s: State, act: &Act, happening: Happening) -> Outcome {
        let idle = s.ring == Ring::Down && s.image == Image::Closed;
        match act {
            Act::Publish(number) => {
                rule(s.publication == 0, "two publications are in flight")?;
                rule(!s.reading, "a read and a publication are in flight together")?;
                rule(!s.stopping, "something is published after Stop")?;
                let (Writing::Nodes(Publication { guards, .. }) | Writing::Removal(guards)) =
                    &self.writings.values[*number as usize - 1];
                let guard =
                    |name: &str| guards.iter().find(|it| it.key.side == Side::Backend && it.key.name == name);
                let state = guard("state").is_some_and(|it| it.expected.is_present());
                rule(state && guard("online").is_some(), "a publication without its guards")?;
                s.publication = *number;
            }
            Act::Plain(action) => match action {
                Action::ReadWorld => {
                    rule(!s.reading, "two reads are in flight")?;
                    rule(s.publication == 0, "a read and a publication are in flight together")?;
                    s.reading = true;
                }
                Action::Open(request) => {
                    rule(s.image == Image::Closed, "an image is opened over another")?;
                    rule(!s.stopping, "an image is opened after Stop")?;
                    let media = [Medium::A, Medium::B, Medium::Empty];
                    let named = media.into_iter().find(|medium| medium.path() == request.image.path);
                    s.image = Image::Opening(named.ok_or("an image is opened that nobody named")?);
                }
                Action::CloseImage => {
                    rule(matches!(s.image, Image::Open(_)), "an image is closed that is not open")?;
                    rule(s.ring == Ring::Down, "an image is closed under a ring")?;
                    s.image = Image::Closing;
                }
                Action::Connect(plan) => {
                    rule(s.ring == Ring::Down, "a ring is connected over another")?;
                    rule(matches!(s.image, Image::Open(_)), "a ring is connected without an image")?;
                    rule(!s.stopping, "a ring is connected after Stop")?;
                    let Happening::World(store, states) = happening else {
                        return Err("a ring is connected without a read".to_owned());
                    };
                    let read = states.unwrap_or(store).backend.map_or(0, |it| it.state);
                    rule(
                        plan.resume || s.spoke || read != 4,
                        "a predecessor's ring is connected as a new one",
                    )?;
                    s.ring = Ring::Connecting(nodes_of(plan));
                }
                Action::Disconnect(how) => {
                    let escalates = *how == Disconnect::Abort
                        && matches!(s.ring, Ring::Disconnecting(h) if h != Disconnect::Abort);
                    let up = matches!(s.ring, Ring::Up(_) | Ring::Broken(_));
                    rule(up || escalates, "a ring is disconnected that is not there")?;
                    // A ring is handed over to the next process, or to ourselves with another medium.
                    let another = s.image != Image::Open(s.store.backend.map_or(Medium::A, |it| it.medium));
                    let changes = !self.freedom.media.is_empty()
                        && (another || matches!(happening, Happening::World(..)));
                    let handed_over = *how == Disconnect::HandOver;
                    rule(
                        handed_over == s.stopping || escalates || (handed_over && changes),
                        "a ring is left or drained wrongly",
                    )?;
                    s.ring = Ring::Disconnecting(*how);
                }
                Action::ArmTimer(timer) => {
                    rule(s.timers & (1 << *timer as u8) == 0, "a timer is armed twice")?;
                    rule(!s.stopping, "a timer is armed after Stop")?;
                    s.timers |= 1 << *timer as u8;
                }
                Action::CancelTimer(timer) => s.timers &= !(1 << *timer as u8),
                Action::Report(_) => {}
                Action::Forget => {
                    rule(
                        idle && s.publication == 0 && s.timers == 0,
                        "a vbd is forgotten that holds something",
                    )?;
                    rule(!s.reading, "a vbd is forgotten while it is read")?;
                    s.vbd = 0;
                    s.spoke = false;
                    s.lingered = false;
                }
                Action::Stopped => {
                    rule(s.stopping && idle && s.publication == 0, "a vbd stops that holds something")?;
                    return Ok(Self::reborn(&s));
                }
                Action::Publish(_) | Action::RemoveBackend(_) => return Err("not numbered".to_owned()),
            },
        }
        Ok(s)
    }
}

fn nodes_of(plan: &ConnectPlan) -> RingNodes {
    let first = |at: usize| plan.rings[at].queues[0].ring_refs[0];
    match (plan.rings.len(), first(0)) {
        (1, 8) => RingNodes::A,
        (1, 10) => RingNodes::B,
        (1, 20) if plan.rings[0].queues.len() == 2 => RingNodes::Two,
        (2, 8 | 20) => RingNodes::TwoAndA,
        _ => panic!("a ring that nobody described: {plan:?}"),
    }
}
