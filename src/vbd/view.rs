//! What a [`World`] means. All of the frontend's nodes are hostile; the backend's are the toolstack's, which errs.

use std::borrow::Cow;

use rings::Abi;

use super::action::{Config, Misdeed, OpenRequest, QueuePlan, RingPlan, Script, bounded};
use super::address::Address;
use super::features::Terms;
use super::world::{Node, Side, World};
use crate::limits::{QUEUES_MAX, RING_PAGE_ORDER_MAX, RING_PAGES_MAX};
use crate::params::{self, ParamsError};

/// xenbus states. Anything else is [`UNKNOWN`].
pub(super) const UNKNOWN: u8 = 0;
pub(super) const INITIALISING: u8 = 1;
pub(super) const INIT_WAIT: u8 = 2;
pub(super) const CONNECTED: u8 = 4;
pub(super) const CLOSING: u8 = 5;
pub(super) const CLOSED: u8 = 6;

/// What the frontend's state says to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Front {
    /// The node is missing or hidden: the guest or its device is gone.
    Gone,
    /// 1: it has no ring and waits for our 2.
    Initialising,
    /// 3: its ring is ready and it waits for our 4.
    Initialised,
    /// 4: it uses its ring, or wants to.
    Connected,
    /// 5: it was told to close, or wants to; it may still use its ring.
    Closing,
    /// 6: it has given up its ring.
    Closed,
    /// 2, 7, 8 and junk: nothing follows from it.
    Other,
}

/// What the toolstack wants served.
#[derive(Clone, Debug)]
pub(super) struct Device {
    pub(super) request: OpenRequest,
    pub(super) cdrom: bool,
    pub(super) removable: bool,
}

/// The backend directory as it was read, understood.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) be: u8,
    pub(super) online: bool,
    pub(super) fe: Front,
    pub(super) device: Result<Device, String>,
    /// What a ring would be, were one announced: see [`ConnectPlan::rings`](super::ConnectPlan).
    pub(super) rings: Result<Vec<RingPlan>, Misdeed>,
    /// What the disk is to be served with.
    pub(super) terms: Terms,
    pub(super) has_script: bool,
    /// A hotplug script has made a loop device for this disk.
    pub(super) has_loop_device: bool,
    pub(super) plays_script: bool,
    /// The toolstack's script may still be at work.
    pub(super) script_pending: bool,
    pub(super) hotplug_connected: bool,
}

/// Whether there is anything to serve.
pub(super) enum Read {
    /// The directory is gone.
    Gone,
    /// Somebody else's device: `specification` is not `xen`.
    NotOurs,
    /// Here it is.
    Here(Box<View>),
}

impl Read {
    /// `told` is what the frontend was told, where it has a ring by now: what the options say today counts from the next ring on. With
    /// `trusting` it may use whatever could ever be offered, as a predecessor may have offered more.
    pub(super) fn of(
        address: &Address,
        config: &Config,
        told: Option<&Terms>,
        trusting: bool,
        world: &World,
    ) -> Read {
        let backend = |name| world.node(Side::Backend, name);
        if !backend("state").is_present() {
            return Read::Gone;
        }
        if backend("specification").text().is_some_and(|text| text != "xen") {
            return Read::NotOurs;
        }
        let has_script = backend("script").is_present();
        let plays_script = match config.script {
            Script::Ours => true,
            Script::Toolstacks => false,
            Script::AsTheNodeSays => !has_script,
        };
        let hotplug_connected = backend("hotplug-status").text() == Some("connected");
        let options = Terms::of(config.terms, world);
        let terms = told.copied().unwrap_or(*options.as_ref().unwrap_or(&config.terms));
        let device = match (device(address, world), options) {
            (Ok(_), Err(text)) if told.is_none() => Err(bounded(&text)),
            (device, _) => device,
        };
        Read::Here(Box::new(View {
            be: state(backend("state")),
            online: backend("online").text() != Some("0"),
            fe: front(world.node(Side::Frontend, "state")),
            device,
            rings: rings(&terms, trusting, world),
            terms,
            has_script,
            has_loop_device: backend("node").is_present(),
            plays_script,
            script_pending: !plays_script && has_script && !hotplug_connected,
            hotplug_connected,
        }))
    }
}

/// Exactly one digit. Junk counts as no state at all.
fn state(node: &Node) -> u8 {
    match node {
        Node::Present(bytes) => match bytes.as_slice() {
            [digit @ b'1'..=b'8'] => digit - b'0',
            _ => UNKNOWN,
        },
        Node::Missing | Node::Denied => UNKNOWN,
    }
}

fn front(node: &Node) -> Front {
    if !node.is_present() {
        return Front::Gone;
    }
    match state(node) {
        1 => Front::Initialising,
        3 => Front::Initialised,
        4 => Front::Connected,
        5 => Front::Closing,
        6 => Front::Closed,
        _ => Front::Other,
    }
}

/// Reads what is to be served; the error says what the toolstack should have written.
fn device(address: &Address, world: &World) -> Result<Device, String> {
    let text = |name| world.node(Side::Backend, name).text();
    if text("frontend") != Some(address.frontend_path().as_str()) {
        return Err(format!("the node frontend is not {}: the device was not set up for this guest", {
            address.frontend_path()
        }));
    }
    if text("frontend-id") != Some(address.frontend.to_string().as_str()) {
        return Err(format!("the node frontend-id is not {}, as the path says", address.frontend));
    }
    let drive = matches!(text("device-type"), Some("cdrom" | "floppy"));
    let cdrom = text("device-type") == Some("cdrom");
    let removable = text("removable") == Some("1");
    let Some(params) = text("params") else {
        return Err("the node params is missing or is not text: write raw:PATH".to_owned());
    };
    // libxl and xenopsd change a medium by writing a bare path, whatever the type: CDs have no format but raw.
    let kind = if cdrom && params.starts_with('/') { "file" } else { text("type").unwrap_or("") };
    let image = match params::parse(kind, params) {
        Ok(image) => image,
        Err(ParamsError::Empty) if drive => {
            return Ok(Device { request: OpenRequest::empty(cdrom), cdrom, removable });
        }
        Err(error) => return Err(bounded(&error.to_string())),
    };
    let mode = text("mode").unwrap_or("");
    let read_only = match mode.trim_matches('!') {
        "w" | "rw" => false,
        "r" | "ro" => true,
        _ => return Err("the node mode is neither r, w nor w!: write one of them".to_owned()),
    };
    let request = OpenRequest { image, read_only: read_only || cdrom, forced: mode.contains('!'), cdrom };
    Ok(Device { request, cdrom, removable })
}

/// How a frontend has declared its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scheme {
    /// `multi-queue-num-queues`; 1 without it.
    queues: u32,
    /// Pages of each queue; 1 if it says nothing.
    pages: u32,
    counted: Counted,
}

/// Whether a frontend has said how many pages it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    No,
    /// Then even a single one may be called `ring-ref0`.
    Yes,
    /// Another one has.
    Stale,
}

impl Scheme {
    /// As declared, whatever the numbers.
    fn declared(world: &World) -> Result<Scheme, Misdeed> {
        let queues = number(world, "multi-queue-num-queues")?.unwrap_or(1);
        let counted = match number(world, "ring-page-order")? {
            Some(order) => Some(1u32.checked_shl(order).unwrap_or(u32::MAX)),
            None => number(world, "num-ring-pages")?,
        };
        let pages = counted.unwrap_or(1);
        let counted = if counted.is_some() { Counted::Yes } else { Counted::No };
        Ok(Scheme { queues, pages, counted })
    }

    /// Whether it can be meant at all.
    fn check(self, queues_max: u8, order_max: u8) -> Result<(), Misdeed> {
        if self.queues == 0 || self.queues > u32::from(queues_max) {
            return Err(Misdeed::Queues(self.queues));
        }
        if !self.pages.is_power_of_two() || self.pages > 1 << order_max {
            return Err(Misdeed::RingPages(self.pages));
        }
        Ok(())
    }

    /// Where a queue's nodes are: one queue alone has them at the top level.
    fn place(self, queue: u32) -> String {
        if self.queues == 1 { String::new() } else { format!("queue-{queue}/") }
    }

    /// The names of a queue's references, each with its other spelling if it has one.
    fn references(self, queue: u32) -> Vec<(String, Option<String>)> {
        let place = self.place(queue);
        if self.pages > 1 {
            return (0..self.pages).map(|page| (format!("{place}ring-ref{page}"), None)).collect();
        }
        let (plain, numbered) = (format!("{place}ring-ref"), format!("{place}ring-ref0"));
        match self.counted {
            Counted::No => vec![(plain, Some(numbered))],
            Counted::Yes => vec![(numbered, Some(plain))],
            Counted::Stale => vec![(plain, None)],
        }
    }

    /// The other ways to read the same nodes, were the number of queues or pages an earlier frontend's. Its nodes of one page are
    /// then those that cannot be part of a larger ring.
    fn others(self) -> impl Iterator<Item = Scheme> {
        let one_page = Scheme { pages: 1, counted: Counted::Stale, ..self };
        let one_queue = Scheme { queues: 1, ..self };
        let plain = Scheme { queues: 1, ..one_page };
        let (queues, pages) = (self.queues > 1, self.pages > 1);
        [(queues && pages, one_page), (queues && pages, one_queue), (queues || pages, plain)]
            .into_iter()
            .filter_map(|(differs, scheme)| differs.then_some(scheme))
    }

    fn queue(self, queue: u32, world: &World) -> Result<QueuePlan, Misdeed> {
        let mut ring_refs = Vec::with_capacity(RING_PAGES_MAX);
        for (name, other) in self.references(queue) {
            let mut grant = number(world, &name)?;
            if let (None, Some(other)) = (grant, &other) {
                grant = number(world, other)?;
            }
            let shown = if self.pages > 1 { name } else { format!("{}ring-ref", self.place(queue)) };
            ring_refs.push(grant.ok_or(Misdeed::Missing(Cow::Owned(shown)))?);
        }
        let name = format!("{}event-channel", self.place(queue));
        match number(world, &name)? {
            None => Err(Misdeed::Missing(Cow::Owned(name))),
            Some(0) => Err(Misdeed::BadNumber(Cow::Owned(name))),
            Some(event_channel) => Ok(QueuePlan { ring_refs, event_channel }),
        }
    }

    fn queues(self, world: &World) -> Result<Vec<QueuePlan>, Misdeed> {
        (0..self.queues).map(|queue| self.queue(queue, world)).collect()
    }
}

/// The names of the nodes that a declared scheme needs beyond those that are always read.
pub(super) fn further_names(world: &World) -> Vec<String> {
    let Ok(scheme) = Scheme::declared(world) else { return Vec::new() };
    if scheme.check(QUEUES_MAX, RING_PAGE_ORDER_MAX).is_err() || (scheme.queues, scheme.pages) == (1, 1) {
        return Vec::new();
    }
    let mut names = Vec::new();
    for queue in 0..scheme.queues {
        names.extend(
            scheme.references(queue).into_iter().flat_map(|(name, other)| [Some(name), other]).flatten(),
        );
        if scheme.pages > 1 && scheme.queues > 1 {
            names.push(format!("{}ring-ref", scheme.place(queue)));
        }
        names.push(format!("{}event-channel", scheme.place(queue)));
    }
    if scheme.pages > 1 && scheme.queues > 1 {
        let one_queue = Scheme { queues: 1, ..scheme };
        names.extend(one_queue.references(0).into_iter().map(|(name, _)| name));
    }
    names
}

/// Reads the frontend's description of its ring.
///
/// What an earlier frontend of the same guest left behind can contradict it: Linux writes no number of queues or pages
/// where it uses one, and does not remove the one that it finds. So where several are declared, nodes of one may be
/// meant: each way to read them that makes a whole ring is a candidate, what is declared first.
fn rings(terms: &Terms, trusting: bool, world: &World) -> Result<Vec<RingPlan>, Misdeed> {
    let abi = match world.node(Side::Frontend, "protocol") {
        Node::Missing => terms.default_abi,
        Node::Denied => return Err(Misdeed::Unreadable(Cow::Borrowed("protocol"))),
        node => node.text().and_then(Abi::from_protocol).ok_or(Misdeed::UnknownProtocol)?,
    };
    let said = world.node(Side::Frontend, "feature-persistent").text();
    let persistent = terms.offered.persistent && said == Some("1");
    let scheme = Scheme::declared(world)?;
    if scheme.queues == 0 {
        return Err(Misdeed::Queues(0));
    }
    if scheme.pages == 0 {
        return Err(Misdeed::RingPages(0));
    }
    let (queues_max, order_max) = if trusting {
        (QUEUES_MAX, RING_PAGE_ORDER_MAX)
    } else {
        (terms.offered.queues_max, terms.offered.ring_page_order_max)
    };
    let declared = scheme.check(queues_max, order_max).and_then(|()| scheme.queues(world));
    let mut rings = Vec::new();
    let refusal = match declared {
        Ok(queues) => {
            rings.push(queues);
            None
        }
        Err(misdeed) => Some(misdeed),
    };
    for other in scheme.others() {
        let possible = other.check(queues_max, order_max).and_then(|()| other.queues(world));
        rings.extend(possible.ok().filter(|queues| !rings.contains(queues)));
    }
    match refusal {
        Some(misdeed) if rings.is_empty() => Err(misdeed),
        _ => Ok(rings.into_iter().map(|queues| RingPlan { abi, queues, persistent }).collect()),
    }
}

/// A frontend's number: decimal digits alone, within 32 bits.
fn number(world: &World, name: &str) -> Result<Option<u32>, Misdeed> {
    let node = world.node(Side::Frontend, name);
    match node {
        Node::Missing => Ok(None),
        Node::Denied => Err(Misdeed::Unreadable(Cow::Owned(name.to_owned()))),
        Node::Present(bytes) => {
            let digits = !bytes.is_empty() && bytes.len() <= 10 && bytes.iter().all(u8::is_ascii_digit);
            let value = if digits { node.text().and_then(|text| text.parse().ok()) } else { None };
            value.map(Some).ok_or_else(|| Misdeed::BadNumber(Cow::Owned(name.to_owned())))
        }
    }
}
