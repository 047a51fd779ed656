//! Bugs planted on purpose: the exploration must find each, or it would not find a real one.

use vbdd::vbd::{Action, Actions, Disconnect, Event, Publication, Side, Timer, Vbd};

use crate::model::Happening;

/// What is wrong with the vbd under test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// Publications do not compare the backend's state.
    NoStateGuard,
    /// Publications do not compare the frontend's state.
    NoFrontendGuard,
    /// 4 is published where 2 should be.
    SkipsTwo,
    /// The image stays open although it is believed closed.
    KeepsImageOpen,
    /// The ring stays mapped although it is believed gone.
    KeepsRingMapped,
    /// A change during a read is lost.
    LosesChange,
    /// What was published is not followed by a read.
    NoReadAfterPublishing,
    /// The directory is removed at once.
    DoesNotLinger,
    /// Stopping closes the device in xenstore, as for an unplug.
    StopCloses,
    /// A predecessor's ring is taken for a new one.
    ForgetsPredecessor,
    /// A ring that the frontend gave up stays connected.
    IgnoresClosed,
    /// Sizes are left out.
    NoSizes,
}

impl Fault {
    pub(crate) const ALL: [Fault; 12] = [
        Fault::NoStateGuard,
        Fault::NoFrontendGuard,
        Fault::SkipsTwo,
        Fault::KeepsImageOpen,
        Fault::KeepsRingMapped,
        Fault::LosesChange,
        Fault::NoReadAfterPublishing,
        Fault::DoesNotLinger,
        Fault::StopCloses,
        Fault::ForgetsPredecessor,
        Fault::IgnoresClosed,
        Fault::NoSizes,
    ];
}

/// Bends what the vbd has answered to `happening`.
pub(crate) fn plant(fault: Fault, vbd: &mut Vbd, happening: Happening, actions: &mut Actions) {
    match fault {
        Fault::None => {}
        Fault::NoStateGuard => each_publication(actions, |it| {
            it.guards.retain(|guard| !(guard.key.side == Side::Backend && guard.key.name == "state"));
        }),
        Fault::NoFrontendGuard => {
            each_publication(actions, |it| it.guards.retain(|guard| guard.key.side == Side::Backend));
        }
        Fault::SkipsTwo => each_publication(actions, |it| {
            for (name, value) in &mut it.writes {
                if *name == "state" && value == "2" {
                    "4".clone_into(value);
                }
            }
        }),
        Fault::NoSizes => each_publication(actions, |it| it.writes.retain(|(name, _)| *name != "sectors")),
        Fault::KeepsImageOpen => {
            answer_instead(vbd, actions, |action| *action == Action::CloseImage, || Event::ImageClosed);
        }
        Fault::KeepsRingMapped => answer_instead(
            vbd,
            actions,
            |action| *action == Action::Disconnect(Disconnect::Drain),
            || Event::Disconnected,
        ),
        Fault::LosesChange => {
            if matches!(happening, Happening::World(..)) && actions.last() == Some(&Action::ReadWorld) {
                actions.pop();
            }
        }
        Fault::NoReadAfterPublishing => {
            if happening == Happening::Published {
                actions.retain(|action| *action != Action::ReadWorld);
            }
        }
        Fault::DoesNotLinger => answer_instead(
            vbd,
            actions,
            |action| *action == Action::ArmTimer(Timer::Linger),
            || Event::TimerFired(Timer::Linger),
        ),
        Fault::StopCloses => {
            if happening == Happening::Stop {
                let writes = vec![("state", "6".to_owned())];
                actions.push(Action::Publish(Publication { guards: vec![], writes, removals: vec![] }));
            }
        }
        Fault::ForgetsPredecessor => {
            for action in actions {
                if let Action::Connect(plan) = action {
                    plan.resume = false;
                }
            }
        }
        Fault::IgnoresClosed => {
            if matches!(happening, Happening::World(store, _) if store.frontend.is_some_and(|it| it.state == 6))
            {
                actions.retain(|action| !matches!(action, Action::Disconnect(_)));
            }
        }
    }
}

fn each_publication(actions: &mut Actions, bend: impl Fn(&mut Publication)) {
    for action in actions {
        if let Action::Publish(publication) = action {
            bend(publication);
        }
    }
}

/// Takes an action away and answers it at once.
fn answer_instead(
    vbd: &mut Vbd,
    actions: &mut Actions,
    which: fn(&Action) -> bool,
    event: fn() -> Event<'static>,
) {
    if actions.iter().any(which) {
        actions.retain(|action| !which(action));
        vbd.step(event(), actions);
    }
}
