//! What a [`World`] means. All of the frontend's nodes are hostile; the backend's are the toolstack's, which errs.

use rings::Abi;

use super::action::{Config, Misdeed, OpenRequest, QueuePlan, RingPlan, Script, bounded};
use super::address::Address;
use super::world::{Node, Side, World};
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
    /// Nothing for an empty drive.
    pub(super) request: Option<OpenRequest>,
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
    /// What a ring would be, were one announced.
    pub(super) ring: Result<RingPlan, Misdeed>,
    pub(super) has_script: bool,
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
    pub(super) fn of(address: &Address, config: &Config, world: &World) -> Read {
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
        Read::Here(Box::new(View {
            be: state(backend("state")),
            online: backend("online").text() != Some("0"),
            fe: front(world.node(Side::Frontend, "state")),
            device: device(address, world),
            ring: ring(config, world),
            has_script,
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
    let image = match params::parse(text("type").unwrap_or(""), params) {
        Ok(image) => image,
        Err(ParamsError::Empty) if drive => return Ok(Device { request: None, cdrom, removable }),
        Err(error) => return Err(bounded(&error.to_string())),
    };
    let mode = text("mode").unwrap_or("");
    let read_only = match mode.trim_matches('!') {
        "w" | "rw" => false,
        "r" | "ro" => true,
        _ => return Err("the node mode is neither r, w nor w!: write one of them".to_owned()),
    };
    let request = OpenRequest { image, read_only, forced: mode.contains('!') };
    Ok(Device { request: Some(request), cdrom, removable })
}

/// Reads the frontend's description of its ring: one queue of one page.
///
/// What another frontend of the same guest left behind can contradict it: more pages or queues than were ever offered
/// next to a plain `ring-ref` are such a leftover.
fn ring(config: &Config, world: &World) -> Result<RingPlan, Misdeed> {
    let front = |name| world.node(Side::Frontend, name);
    let abi = match front("protocol") {
        Node::Missing => config.default_abi,
        Node::Denied => return Err(Misdeed::Unreadable("protocol")),
        node => node.text().and_then(Abi::from_protocol).ok_or(Misdeed::UnknownProtocol)?,
    };
    let plain = front("ring-ref").is_present();
    let queues = number(world, "multi-queue-num-queues")?.unwrap_or(1);
    if queues == 0 || (queues > 1 && !plain) {
        return Err(Misdeed::Queues(queues));
    }
    let order = number(world, "ring-page-order")?;
    let declared = match order {
        Some(order) => Some(1u32.checked_shl(order).unwrap_or(u32::MAX)),
        None => number(world, "num-ring-pages")?,
    };
    let pages = declared.unwrap_or(1);
    if pages == 0 || (pages > 1 && !plain) {
        return Err(Misdeed::RingPages(pages));
    }
    let names = if declared == Some(1) { ["ring-ref0", "ring-ref"] } else { ["ring-ref", "ring-ref0"] };
    let mut grant = None;
    for name in names {
        if grant.is_none() {
            grant = number(world, name)?;
        }
    }
    let grant = grant.ok_or(Misdeed::Missing("ring-ref"))?;
    let event_channel = number(world, "event-channel")?.ok_or(Misdeed::Missing("event-channel"))?;
    if event_channel == 0 {
        return Err(Misdeed::BadNumber("event-channel"));
    }
    Ok(RingPlan { abi, queues: vec![QueuePlan { ring_refs: vec![grant], event_channel }] })
}

/// A frontend's number: decimal digits alone, within 32 bits.
fn number(world: &World, name: &'static str) -> Result<Option<u32>, Misdeed> {
    let node = world.node(Side::Frontend, name);
    match node {
        Node::Missing => Ok(None),
        Node::Denied => Err(Misdeed::Unreadable(name)),
        Node::Present(bytes) => {
            let digits = !bytes.is_empty() && bytes.len() <= 10 && bytes.iter().all(u8::is_ascii_digit);
            let value = if digits { node.text().and_then(|text| text.parse().ok()) } else { None };
            value.map(Some).ok_or(Misdeed::BadNumber(name))
        }
    }
}
