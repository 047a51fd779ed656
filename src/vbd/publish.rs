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
    let mut writes = Vec::new();
    let mut removals = Vec::new();
    let remove = |name: &'static str, removals: &mut Vec<&'static str>| {
        if world.node(Side::Backend, name).is_present() {
            removals.push(name);
        }
    };
    if serving {
        if state == INIT_WAIT {
            // A new directory has none of these yet.
            offer(&view.terms.offered, view.be == INITIALISING, &mut writes, &mut removals);
        }
        if let Some(geometry) = geometry {
            let discard = geometry.discard.filter(|_| view.terms.offered.discard && !read_only(image));
            offer_discard(discard, view.be == INITIALISING, &mut writes, &mut removals);
            writes.push(("sectors", geometry.sectors.to_string()));
            writes.push(("sector-size", "512".to_owned()));
            writes.push(("physical-sector-size", geometry.physical_sector_bytes.to_string()));
            writes.push(("info", info(view, image).to_string()));
        }
        remove("error", &mut removals);
    }
    if view.plays_script {
        if state == INIT_WAIT {
            remove("hotplug-error", &mut removals);
            if !view.hotplug_connected {
                writes.push(("hotplug-status", "connected".to_owned()));
            }
        }
        if state == CLOSED && !view.online {
            remove("hotplug-status", &mut removals);
        }
    }
    if let Wording::Refusal(text) = wording {
        // Once it was "connected" the hotplug handshake is over: what goes wrong later is not its business.
        if view.plays_script && !view.hotplug_connected {
            writes.push(("hotplug-error", text.clone()));
            writes.push(("hotplug-status", "error".to_owned()));
        }
        writes.push(("error", text));
    }
    writes.push(("state", state.to_string()));
    Publication { guards: guards(world, view.online, serving), writes, removals }
}

/// One node of an offer: what says no more than its absence is not written, as nodes are scarce in a driver domain; and
/// removed, unless the directory is `new`.
fn one_offer(
    name: &'static str,
    value: u32,
    nothing: u32,
    new: bool,
    writes: &mut Vec<(&'static str, String)>,
    removals: &mut Vec<&'static str>,
) {
    if value != nothing {
        writes.push((name, value.to_string()));
    } else if !new {
        removals.push(name);
    }
}

/// What Linux reads while our state is 2, and all else that does not depend on the image.
fn offer(
    offered: &Features,
    new: bool,
    writes: &mut Vec<(&'static str, String)>,
    removals: &mut Vec<&'static str>,
) {
    let mut one = |name, value, nothing| one_offer(name, value, nothing, new, writes, removals);
    one("max-ring-page-order", offered.ring_page_order_max.into(), 0);
    // FreeBSD's and the older spelling.
    one("max-ring-pages", 1 << offered.ring_page_order_max, 1);
    one("multi-queue-max-queues", offered.queues_max.into(), 1);
    one("feature-max-indirect-segments", offered.indirect_segments_max.into(), 0);
    one("feature-persistent", offered.persistent.into(), 0);
    one("feature-flush-cache", offered.flush.into(), 0);
    one("feature-barrier", offered.barrier.into(), 0);
}

/// Linux before 5.11 takes granularity and alignment only if both are there. Secure discard is never offered.
fn offer_discard(
    discard: Option<Discard>,
    new: bool,
    writes: &mut Vec<(&'static str, String)>,
    removals: &mut Vec<&'static str>,
) {
    const NAMES: [&str; 3] = ["feature-discard", "discard-granularity", "discard-alignment"];
    match discard {
        Some(Discard { granularity_bytes, alignment_bytes }) => {
            let values = [1, granularity_bytes, alignment_bytes].map(|value| value.to_string());
            writes.extend(NAMES.into_iter().zip(values));
        }
        None if new => {}
        None => removals.extend(NAMES),
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
