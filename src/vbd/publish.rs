//! What is written to the backend directory.

use std::borrow::Cow;

use super::Image;
use super::action::{Geometry, Guard, Offered, Publication};
use super::view::{CLOSED, CONNECTED, INIT_WAIT, View};
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
    offered: &Offered,
    view: &View,
    geometry: Option<Geometry>,
    image: &Image,
    world: &World,
) -> Publication {
    let serving = state == INIT_WAIT || state == CONNECTED;
    let mut writes = Vec::new();
    let mut removals = Vec::new();
    let mut remove = |name: &'static str| {
        if world.node(Side::Backend, name).is_present() {
            removals.push(name);
        }
    };
    if serving {
        writes.push(("feature-flush-cache", u32::from(offered.flush).to_string()));
        if let Some(geometry) = geometry {
            writes.push(("sectors", geometry.sectors.to_string()));
            writes.push(("sector-size", "512".to_owned()));
            writes.push(("physical-sector-size", geometry.physical_sector_bytes.to_string()));
            writes.push(("info", info(view, image).to_string()));
        }
        remove("error");
    }
    if view.plays_script {
        if state == INIT_WAIT {
            remove("hotplug-error");
            if !view.hotplug_connected {
                writes.push(("hotplug-status", "connected".to_owned()));
            }
        }
        if state == CLOSED && !view.online {
            remove("hotplug-status");
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

fn info(view: &View, image: &Image) -> u32 {
    let mut bits = 0;
    if let Ok(device) = &view.device {
        bits |= if device.cdrom { INFO_CDROM } else { 0 };
        bits |= if device.removable { INFO_REMOVABLE } else { 0 };
    }
    if let Image::Open(request, _) = image {
        bits |= if request.read_only { INFO_READ_ONLY } else { 0 };
    }
    bits
}
