//! The abstract xenstore: as many values of each node as make a difference.

use std::borrow::Cow;
use std::collections::HashMap;

use vbdd::vbd::{Guard, Key, Node, Publication, Side, World, further_keys, keys};

/// The backend directory. `error` and `hotplug` are 0 for a missing node, else an index of a text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Backend {
    pub(crate) state: u8,
    pub(crate) online: bool,
    /// Which size stands there, by [`SIZES`]; 0 for none.
    pub(crate) sized: u8,
    pub(crate) medium: Medium,
    pub(crate) error: u8,
    pub(crate) hotplug: u8,
    pub(crate) hotplug_error: u8,
}

/// Sizes by number: none, the image, the same after it has grown, the other medium, an empty drive.
pub(crate) const SIZES: [&str; 5] = ["", "2048", "4096", "1024", "0"];

/// What `params` names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Medium {
    A,
    B,
    Empty,
}

impl Medium {
    pub(crate) fn path(self) -> &'static str {
        match self {
            Medium::A => "/a",
            Medium::B => "/b",
            Medium::Empty => "",
        }
    }

    pub(crate) fn size(self, grown: bool) -> u8 {
        match (self, grown) {
            (Medium::A, false) => 1,
            (Medium::A, true) => 2,
            (Medium::B, _) => 3,
            (Medium::Empty, _) => 4,
        }
    }
}

/// What the guest's ring nodes say.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum RingNodes {
    None,
    A,
    B,
    /// Two queues of one page.
    Two,
    /// The same, and A beside it: one of them is an earlier frontend's.
    TwoAndA,
    Malformed,
}

/// The frontend directory. State 0 is junk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Frontend {
    pub(crate) state: u8,
    pub(crate) ring: RingNodes,
}

/// A moment of both.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Store {
    pub(crate) backend: Option<Backend>,
    pub(crate) frontend: Option<Frontend>,
}

pub(crate) const NEW_BACKEND: Backend =
    Backend { state: 1, online: true, sized: 0, medium: Medium::A, error: 0, hotplug: 0, hotplug_error: 0 };

/// Index of the text "connected" in [`Texts`].
pub(crate) const HOTPLUG_CONNECTED: u8 = 1;

/// Texts that were written, by number.
pub(crate) struct Texts {
    texts: Vec<String>,
    /// The device is a drive.
    pub(crate) drive: bool,
}

impl Texts {
    pub(crate) fn new(drive: bool) -> Texts {
        Texts { texts: vec![String::new(), "connected".to_owned()], drive }
    }

    fn number(&mut self, text: &str) -> u8 {
        let at = self.texts.iter().position(|known| known == text).unwrap_or_else(|| {
            self.texts.push(text.to_owned());
            self.texts.len() - 1
        });
        u8::try_from(at).unwrap()
    }

    fn node(&self, number: u8) -> Node {
        if number == 0 { Node::Missing } else { present(&self.texts[usize::from(number)]) }
    }
}

fn present(text: &str) -> Node {
    Node::Present(text.as_bytes().to_vec())
}

impl Store {
    /// A node as a read of this moment would find it. `script`: the toolstack named one.
    pub(crate) fn node(&self, key: &Key, script: bool, texts: &Texts) -> Node {
        match key.side {
            Side::Backend => self.backend.map_or(Node::Missing, |it| it.node(&key.name, script, texts)),
            Side::Frontend => self.frontend.map_or(Node::Missing, |it| it.node(&key.name)),
        }
    }

    pub(crate) fn world(&self, script: bool, texts: &Texts) -> World {
        let mut world = World::new();
        for key in keys() {
            let node = self.node(&key, script, texts);
            world.put(key, node);
        }
        self.put_further(&mut world, script, texts);
        world
    }

    /// What a read finds that took the states from `states`, and the other nodes from `self`.
    pub(crate) fn torn_world(&self, states: &Store, script: bool, texts: &Texts) -> World {
        let mut world = self.world(script, texts);
        for side in [Side::Frontend, Side::Backend] {
            let key = Key { side, name: Cow::Borrowed("state") };
            let node = states.node(&key, script, texts);
            world.put(key, node);
        }
        self.put_further(&mut world, script, texts);
        world
    }

    fn put_further(&self, world: &mut World, script: bool, texts: &Texts) {
        for key in further_keys(world) {
            let node = self.node(&key, script, texts);
            world.put(key, node);
        }
    }

    pub(crate) fn holds(&self, guards: &[Guard], script: bool, texts: &Texts) -> bool {
        guards.iter().all(|guard| self.node(&guard.key, script, texts) == guard.expected)
    }

    /// The backend directory after a publication. Writes make a directory that is missing, as xenstore does.
    pub(crate) fn apply(&self, publication: &Publication, texts: &mut Texts) -> Backend {
        let lost = Backend {
            state: 0,
            online: true,
            sized: 0,
            medium: Medium::A,
            error: 0,
            hotplug: 0,
            hotplug_error: 0,
        };
        let mut it = self.backend.unwrap_or(lost);
        for name in &publication.removals {
            it.set(name, None, texts);
        }
        for (name, value) in &publication.writes {
            it.set(name, Some(value), texts);
        }
        it
    }
}

impl Backend {
    fn node(&self, name: &str, script: bool, texts: &Texts) -> Node {
        match name {
            "state" => present(&self.state.to_string()),
            "online" => present(if self.online { "1" } else { "0" }),
            "frontend" => present("/local/domain/7/device/vbd/51712"),
            "frontend-id" => present("7"),
            "params" => present(self.medium.path()),
            "mode" => present("w"),
            "type" => present("phy"),
            "script" if script => present("block"),
            "device-type" if texts.drive => present("cdrom"),
            "sectors" if self.sized > 0 => present(SIZES[usize::from(self.sized)]),
            "error" => texts.node(self.error),
            "hotplug-status" => texts.node(self.hotplug),
            "hotplug-error" => texts.node(self.hotplug_error),
            _ => Node::Missing,
        }
    }

    fn set(&mut self, name: &str, value: Option<&String>, texts: &mut Texts) {
        let number = value.map_or(0, |text| texts.number(text));
        match name {
            "state" => self.state = value.unwrap().parse().unwrap(),
            "sectors" => {
                let at = SIZES.iter().position(|size| value.is_some_and(|value| value == size));
                self.sized = u8::try_from(at.unwrap()).unwrap();
            }
            "error" => self.error = number,
            "hotplug-status" => self.hotplug = number,
            "hotplug-error" => self.hotplug_error = number,
            "sector-size"
            | "physical-sector-size"
            | "info"
            | "feature-flush-cache"
            | "max-ring-page-order"
            | "max-ring-pages"
            | "multi-queue-max-queues"
            | "feature-max-indirect-segments"
            | "feature-persistent"
            | "feature-barrier"
            | "feature-discard"
            | "discard-granularity"
            | "discard-alignment" => {}
            other => panic!("the vbd wrote {other}, which is not the backend's"),
        }
    }
}

impl Frontend {
    fn node(&self, name: &str) -> Node {
        let two = matches!(self.ring, RingNodes::Two | RingNodes::TwoAndA);
        let plain = match self.ring {
            RingNodes::None | RingNodes::Two => None,
            RingNodes::A | RingNodes::TwoAndA => Some(("8", "9")),
            RingNodes::B => Some(("10", "11")),
            RingNodes::Malformed => Some(("-1", "9")),
        };
        match (name, plain) {
            ("state", _) => self.state_node(),
            ("ring-ref", Some((ring_ref, _))) => present(ring_ref),
            ("event-channel", Some((_, port))) => present(port),
            ("protocol", _) if self.ring != RingNodes::None => present("x86_64-abi"),
            ("multi-queue-num-queues", _) if two => present("2"),
            ("queue-0/ring-ref", _) if two => present("20"),
            ("queue-0/event-channel", _) if two => present("21"),
            ("queue-1/ring-ref", _) if two => present("22"),
            ("queue-1/event-channel", _) if two => present("23"),
            _ => Node::Missing,
        }
    }

    fn state_node(&self) -> Node {
        if self.state == 0 { present("\u{1}junk") } else { present(&self.state.to_string()) }
    }
}

/// Gives small numbers to values.
pub(crate) struct Numbered<T> {
    pub(crate) values: Vec<T>,
    numbers: HashMap<T, u32>,
}

impl<T: Clone + Eq + std::hash::Hash> Numbered<T> {
    pub(crate) fn new() -> Numbered<T> {
        Numbered { values: Vec::new(), numbers: HashMap::new() }
    }

    pub(crate) fn number(&mut self, value: T) -> u32 {
        if let Some(number) = self.numbers.get(&value) {
            return *number;
        }
        let number = u32::try_from(self.values.len()).unwrap();
        self.values.push(value.clone());
        self.numbers.insert(value, number);
        number
    }
}

impl Store {
    pub(crate) fn backend_of(store: &Store) -> Option<Backend> {
        store.backend
    }
}
