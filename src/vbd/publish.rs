//! What is written to the backend directory.

use std::borrow::Cow;

use super::Image;
use super::action::{Geometry, Guard, Publication};
use super::features::{Discard, Features};
use super::view::{CLOSED, CONNECTED, INIT_WAIT, INITIALISING, View};
use super::world::{Key, Side, World};

/// `info` bits of the blkif protocol.
const INFO_CDROM: u32 = 1;
const INFO_REMOVABLE: u32 = 2;
const INFO_READ_ONLY: u32 = 4;

/// What is said besides the state.
pub(super) enum Wording {
    Plain,
    /// Why the device is closed.
    Refusal(String),
}

/// The backend's `state` and `online` as read; with `frontend` also the frontend's `state`; with `image` also what names
/// the image.
pub(super) fn guards(world: &World, frontend: bool, image: bool) -> Vec<Guard> {
    let mut wanted = vec![(Side::Backend, "state"), (Side::Backend, "online")];
    if frontend {
        wanted.push((Side::Frontend, "state"));
    }
    if image {
        wanted.push((Side::Backend, "params"));
    }
    let guard = |(side, name): (Side, &'static str)| Guard {
        key: Key { side, name: Cow::Borrowed(name) },
        expected: world.node(side, name).clone(),
    };
    wanted.into_iter().map(guard).collect()
}

/// Whether the sizes that stand there are those of the open image.
pub(super) fn says_size(world: &World, geometry: Geometry) -> bool {
    world.node(Side::Backend, "sectors").text() == Some(geometry.sectors.to_string().as_str())
}

/// Whether `error` says that already.
pub(super) fn says_error(world: &World, text: &str) -> bool {
    world.node(Side::Backend, "error").text() == Some(text)
}

/// Whether `error` says anything.
pub(super) fn has_error(world: &World) -> bool {
    world.node(Side::Backend, "error").is_present()
}

/// A text in `error`, and no change of state.
pub(super) fn note(world: &World, text: &str) -> Publication {
    Publication {
        guards: guards(world, false, false),
        writes: vec![("error", text.to_owned())],
        removals: Vec::new(),
    }
}

/// A change of state with all that belongs to it.
///
/// The frontend's state is a guard as long as the device is online: 6 that answers an older state would be taken for an
/// unplug by a frontend that has gone on to 1. Offline it is not, so that no guest can hold up an unplug.
pub(super) fn state(
    state: u8,
    wording: Wording,
    view: &View,
    geometry: Option<Geometry>,
    image: &Image,
    world: &World,
) -> Publication {
    let serving = state == INIT_WAIT || state == CONNECTED;
    let mut nodes = Nodes { writes: Vec::new(), removals: Vec::new(), world, new: view.be == INITIALISING };
    if serving {
        if state == INIT_WAIT {
            nodes.offer(&view.terms.offered);
        }
        if let Some(geometry) = geometry {
            nodes.offer_discard(geometry.discard.filter(|_| view.terms.offered.discard && !read_only(image)));
            nodes.write("sectors", geometry.sectors);
            nodes.write("sector-size", 512);
            nodes.write("physical-sector-size", geometry.physical_sector_bytes);
            nodes.write("info", info(view, image));
        }
        nodes.remove("error");
    }
    if view.plays_script {
        if state == INIT_WAIT {
            nodes.remove("hotplug-error");
            if !view.hotplug_connected {
                nodes.write("hotplug-status", "connected");
            }
        }
        if state == CLOSED && !view.online {
            nodes.remove("hotplug-status");
        }
    }
    if let Wording::Refusal(text) = wording {
        // Once it was "connected" the hotplug handshake is over: what goes wrong later is not its business.
        if view.plays_script && !view.hotplug_connected {
            nodes.write("hotplug-error", &text);
            nodes.write("hotplug-status", "error");
        }
        nodes.write("error", text);
    }
    nodes.write("state", state);
    let Nodes { writes, removals, .. } = nodes;
    Publication { guards: guards(world, view.online, serving), writes, removals }
}

/// Nodes of our directory that are to change.
struct Nodes<'a> {
    writes: Vec<(&'static str, String)>,
    removals: Vec<&'static str>,
    world: &'a World,
    /// A new directory has none of the nodes of an offer yet.
    new: bool,
}

impl Nodes<'_> {
    fn write(&mut self, name: &'static str, value: impl ToString) {
        self.writes.push((name, value.to_string()));
    }

    /// Removes what is there.
    fn remove(&mut self, name: &'static str) {
        if self.world.node(Side::Backend, name).is_present() {
            self.removals.push(name);
        }
    }

    /// One node of an offer: what says no more than its absence is not written, as nodes are scarce in a driver domain; and
    /// removed, unless the directory is new.
    fn offer_one(&mut self, name: &'static str, value: u32, nothing: u32) {
        if value != nothing {
            self.write(name, value);
        } else if !self.new {
            self.removals.push(name);
        }
    }

    /// What Linux reads while our state is 2, and all else that does not depend on the image.
    fn offer(&mut self, offered: &Features) {
        self.offer_one("max-ring-page-order", offered.ring_page_order_max.into(), 0);
        // FreeBSD's and the older spelling.
        self.offer_one("max-ring-pages", 1 << offered.ring_page_order_max, 1);
        self.offer_one("multi-queue-max-queues", offered.queues_max.into(), 1);
        self.offer_one("feature-max-indirect-segments", offered.indirect_segments_max.into(), 0);
        self.offer_one("feature-persistent", offered.persistent.into(), 0);
        self.offer_one("feature-flush-cache", offered.flush.into(), 0);
        self.offer_one("feature-barrier", offered.barrier.into(), 0);
    }

    /// Linux before 5.11 takes granularity and alignment only if both are there. Secure discard is never offered.
    fn offer_discard(&mut self, discard: Option<Discard>) {
        const NAMES: [&str; 3] = ["feature-discard", "discard-granularity", "discard-alignment"];
        match discard {
            Some(Discard { granularity_bytes, alignment_bytes }) => {
                let values = [1, granularity_bytes, alignment_bytes].map(|value| value.to_string());
                self.writes.extend(NAMES.into_iter().zip(values));
            }
            None if self.new => {}
            None => self.removals.extend(NAMES),
        }
    }
}

fn read_only(image: &Image) -> bool {
    matches!(image, Image::Open(request, _) if request.read_only)
}

fn info(view: &View, image: &Image) -> u32 {
    let mut bits = 0;
    if let Ok(device) = &view.device {
        bits |= if device.cdrom { INFO_CDROM } else { 0 };
        bits |= if device.removable { INFO_REMOVABLE } else { 0 };
    }
    bits |= if read_only(image) { INFO_READ_ONLY } else { 0 };
    bits
}
