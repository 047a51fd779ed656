//! What was read of a vbd's two directories.
//!
//! The daemon reads the nodes of [`keys`] in that order, one by one or pipelined, outside a transaction. The two `state`
//! nodes come first. That is enough, because each side writes what it has to say before the state that announces it: ring
//! nodes that are read after a state 3 or 4 was seen are at least as new as that state. Should they be newer, a later
//! state is on its way, its watch event leads to another read, and what was decided meanwhile is decided again. What we
//! write is guarded: a publication compares, in its transaction, the states that the decision rests on.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::features::OPTIONS_NODE;
use super::view;
use crate::limits::{QUEUES_MAX, RING_PAGES_MAX};

/// Which of the two directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// `/local/domain/OWN/backend/KIND/FRONTEND/DEVID`
    Backend,
    /// `/local/domain/FRONTEND/device/vbd/DEVID`: all of it is the guest's to write, remove or hide.
    Frontend,
}

/// A node's name below its directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The directory.
    pub side: Side,
    /// The name; may contain a `/`.
    pub name: Cow<'static, str>,
}

/// A node as xenstore answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// Its value: any bytes, up to the store's own bound.
    Present(Vec<u8>),
    /// ENOENT.
    Missing,
    /// EACCES.
    Denied,
}

impl Node {
    /// The value, where there is one and it is text.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match self {
            Node::Present(bytes) => std::str::from_utf8(bytes).ok(),
            Node::Missing | Node::Denied => None,
        }
    }

    /// Whether it exists and can be read.
    #[must_use]
    pub fn is_present(&self) -> bool {
        matches!(self, Node::Present(_))
    }
}

/// One read of both directories. A key that was not put counts as missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    backend: BTreeMap<Cow<'static, str>, Node>,
    frontend: BTreeMap<Cow<'static, str>, Node>,
}

impl World {
    /// Nothing read yet.
    #[must_use]
    pub fn new() -> World {
        World::default()
    }

    /// Notes the answer for one key.
    pub fn put(&mut self, key: Key, node: Node) {
        match key.side {
            Side::Backend => self.backend.insert(key.name, node),
            Side::Frontend => self.frontend.insert(key.name, node),
        };
    }

    /// The answer for one key.
    #[must_use]
    pub fn node(&self, side: Side, name: &str) -> &Node {
        let nodes = match side {
            Side::Backend => &self.backend,
            Side::Frontend => &self.frontend,
        };
        nodes.get(name).unwrap_or(&Node::Missing)
    }
}

/// Backend nodes that are read, `state` apart.
const BACKEND: [&str; 19] = [
    "online",
    "frontend",
    "frontend-id",
    "params",
    "type",
    "mode",
    "device-type",
    "removable",
    "specification",
    "script",
    "hotplug-status",
    "hotplug-error",
    "error",
    "sectors",
    "sector-size",
    "info",
    "discard-enable",
    "node",
    OPTIONS_NODE,
];

/// Frontend nodes that are read, `state` apart.
const FRONTEND: [&str; 8] = [
    "ring-ref",
    "ring-ref0",
    "ring-page-order",
    "num-ring-pages",
    "multi-queue-num-queues",
    "event-channel",
    "protocol",
    "feature-persistent",
];

/// The nodes to read, in the order to read them.
pub fn keys() -> impl Iterator<Item = Key> {
    let states = [(Side::Frontend, "state"), (Side::Backend, "state")];
    let backend = BACKEND.iter().map(|name| (Side::Backend, *name));
    let frontend = FRONTEND.iter().map(|name| (Side::Frontend, *name));
    states
        .into_iter()
        .chain(backend)
        .chain(frontend)
        .map(|(side, name)| Key { side, name: Cow::Borrowed(name) })
}

/// The nodes of further queues and ring pages that the frontend has announced by what was read so far: to be read after
/// [`keys`], before anything is decided. Most frontends have none. At most [`FURTHER_KEYS_MAX`].
#[must_use]
pub fn further_keys(world: &World) -> Vec<Key> {
    let announced = matches!(world.node(Side::Frontend, "state").text(), Some("3" | "4" | "5"));
    if !announced {
        return Vec::new();
    }
    let names = view::further_names(world);
    names.into_iter().map(|name| Key { side: Side::Frontend, name: Cow::Owned(name) }).collect()
}

/// The most [`further_keys`] that there are: 18 nodes for each of 8 queues, and 16 for a ring without queues.
pub const FURTHER_KEYS_MAX: usize = QUEUES_MAX as usize * (RING_PAGES_MAX + 2) + RING_PAGES_MAX;

const _: () = assert!(FURTHER_KEYS_MAX <= xenstore::limits::NODES_PER_JOB_MAX);
