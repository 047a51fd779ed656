//! What goes into [`Vbd::step`](super::Vbd::step) and what comes out of it.

use std::borrow::Cow;

use rings::Abi;

use super::features::{Discard, Features, Terms};
use super::world::{Key, Node, World};
use crate::hypervisor::{DomainId, GrantRef};
use crate::params::{Format, Image};

/// Longest text, in bytes, that is written for an operator into `error` or `hotplug-error`. The guest can read those.
pub const ERROR_TEXT_MAX_BYTES: usize = 250;

/// Whether this domain shares its xenstore directories with the toolstack that made them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The toolstack's own domain: it removes the backend directory, we never do.
    Dom0,
    /// A storage driver domain: the toolstack waits for us to remove the backend directory after an unplug.
    DriverDomain,
}

/// Who does what a hotplug script does: make the image available and write `hotplug-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Script {
    /// We do: the image is opened before state 2, and `hotplug-status` is written together with it.
    Ours,
    /// The toolstack does, and may do it after state 2: the image is opened when the frontend connects.
    Toolstacks,
    /// The toolstack does for a device with a `script` node, we do for others (libxl and xenopsd in one dom0).
    AsTheNodeSays,
}

/// What is the same for every vbd of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The domain that we run in.
    pub own_domain: DomainId,
    /// Who removes directories.
    pub place: Place,
    /// Who plays the hotplug script.
    pub script: Script,
    /// What a disk is served with whose backend directory says nothing of it.
    pub terms: Terms,
    /// How often an attempt is made, a [`Timer::Retry`] apart, that may fail for a passing reason: an open while the
    /// toolstack's script may still run, a connect without fault of the frontend. libxl gives a script 40 s.
    pub attempts: u8,
}

impl Config {
    /// The usual settings of that place.
    #[must_use]
    pub fn new(own_domain: DomainId, place: Place) -> Config {
        let script = match place {
            Place::Dom0 => Script::AsTheNodeSays,
            Place::DriverDomain => Script::Ours,
        };
        let default_abi = if cfg!(target_arch = "aarch64") { Abi::Arm } else { Abi::X86_64 };
        let terms =
            Terms { offered: Features::default(), in_order: false, detect_zeroes: false, default_abi };
        Config { own_domain, place, script, terms, attempts: 40 }
    }
}

/// An image to open, and what for. The sharing check is the opener's: only it knows which file a path really is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OpenRequest {
    /// Format and path. An empty path is an empty drive: a disk without sectors.
    pub image: Image,
    /// `mode` does not begin with `w`, or it is a cdrom.
    pub read_only: bool,
    /// `mode` has a `!`: the administrator vouches for a second writer, so the sharing check is to be skipped.
    pub forced: bool,
    /// Its medium may be changed while the guest uses the drive.
    pub cdrom: bool,
}

impl OpenRequest {
    /// A drive with nothing in it.
    #[must_use]
    pub fn empty(cdrom: bool) -> OpenRequest {
        let image = Image { format: Format::Raw, path: String::new() };
        OpenRequest { image, read_only: true, forced: false, cdrom }
    }

    /// Whether there is no medium.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.image.path.is_empty()
    }
}

/// What an open image looks like to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// `physical-sector-size`, in bytes.
    pub physical_sector_bytes: u32,
    /// How space can be given back, if it can.
    pub discard: Option<Discard>,
}

/// One queue of a ring, as the frontend described it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct QueuePlan {
    /// The ring's pages, in order.
    pub ring_refs: Vec<GrantRef>,
    /// The frontend's event channel.
    pub event_channel: u32,
}

/// A ring as the frontend described it. Another description is another ring.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RingPlan {
    /// The layout of its entries.
    pub abi: Abi,
    /// Its queues; at least one.
    pub queues: Vec<QueuePlan>,
    /// Both sides have said `feature-persistent`.
    pub persistent: bool,
}

impl RingPlan {
    /// One queue of one page: what every frontend can do.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        matches!(self.queues.as_slice(), [queue] if queue.ring_refs.len() == 1)
    }
}

/// A ring to map and bind.
///
/// Consumption always starts at the shared response index, which is 0 in a fresh ring: a frontend that did not wait for
/// state 4 may already have been served by a predecessor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConnectPlan {
    /// Whose grants and event channels these are.
    pub domain: DomainId,
    /// The ring. Where nodes of an earlier frontend lie beside those of the present one there are two ways to read them:
    /// the first of these that can be mapped and bound counts.
    pub rings: Vec<RingPlan>,
    /// What the disk is served with.
    pub terms: Terms,
    /// Taken over from a predecessor that had published state 4: requests may be owed, see the journal.
    pub resume: bool,
}

/// How a ring is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Disconnect {
    /// Take no more requests, answer those that were taken, flush, unmap, unbind.
    Drain,
    /// The guest is gone or does not matter any more: answer nothing, copy nothing to it; wait only for what storage
    /// already holds. May follow a [`Disconnect::Drain`] that is still under way; there is one answer to both.
    Abort,
    /// As `Drain`, but nothing tells the frontend: the successor finds the ring as it is and goes on. Also while the medium of
    /// a drive is changed.
    HandOver,
}

/// A value that a transaction must find unchanged, or else write nothing and answer [`Event::Superseded`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Guard {
    /// The node.
    pub key: Key,
    /// Its value as it was read, down to ENOENT and EACCES.
    pub expected: Node,
}

/// One transaction on the backend directory: compare, then write and remove, then commit; again from the start on EAGAIN.
/// The guards always include the backend's `state`, so that a directory that was removed is never made anew.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Publication {
    /// What must be unchanged.
    pub guards: Vec<Guard>,
    /// Nodes below the backend directory to write, in order; `state` is the last.
    pub writes: Vec<(&'static str, String)>,
    /// Nodes below the backend directory to remove. One that is missing already is no failure.
    pub removals: Vec<&'static str>,
}

impl Publication {
    /// The value that it writes to a node, if it does.
    #[must_use]
    pub fn written(&self, name: &str) -> Option<&str> {
        self.writes.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str())
    }
}

/// Delays that a vbd asks for. At most one of each is armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Timer {
    /// State 2 of a new device with a `script` node stays at least that long: such a device is libxl's, which waits 10 s for
    /// exactly 2 and must get to see it even on a busy host.
    SettleForScript,
    /// The same for other devices, whose toolstacks wait for nothing or for `hotplug-status`.
    Settle,
    /// State 6 stays at least that long before the directory is removed: a toolstack that misses it cleans nothing.
    Linger,
    /// The same where a hotplug script has made a loop device for the image: `xl devd` runs it once more to take that away,
    /// and it reads the directory for that. libxl waits 10 s for the removal.
    LingerForScript,
    /// Until an open or connect is tried again.
    Retry,
    /// Until a publication that failed (a quota, say) is tried again.
    Republish,
}

impl Timer {
    /// Every timer.
    pub const ALL: [Timer; 6] = [
        Timer::SettleForScript,
        Timer::Settle,
        Timer::Linger,
        Timer::LingerForScript,
        Timer::Retry,
        Timer::Republish,
    ];

    /// How long, in milliseconds.
    #[must_use]
    pub fn delay_ms(self) -> u64 {
        match self {
            Timer::Settle => 100,
            Timer::Linger | Timer::Retry => 1000,
            Timer::SettleForScript => 500,
            Timer::Republish => 2000,
            Timer::LingerForScript => 5000,
        }
    }
}

/// What a frontend did in the handshake that a frontend must not do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Misdeed {
    /// It announced a ring without that node.
    Missing(Cow<'static, str>),
    /// It hid that node from us.
    Unreadable(Cow<'static, str>),
    /// That node is no number that can be meant.
    BadNumber(Cow<'static, str>),
    /// Its `protocol` names no ABI.
    UnknownProtocol,
    /// It asks for that many queues: none, or more than were offered.
    Queues(u32),
    /// It asks for that many ring pages: none, more than were offered, or no power of two.
    RingPages(u32),
    /// It did not grant that page of the ring.
    BadGrant(GrantRef),
    /// It did not offer that event channel to us.
    BadPort(u32),
    /// It broke the ring's rules; the text names which.
    Ring(String),
}

impl std::fmt::Display for Misdeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Misdeed::Missing(node) => write!(f, "the frontend announced a ring without writing {node}"),
            Misdeed::Unreadable(node) => write!(f, "the frontend does not let the backend read {node}"),
            Misdeed::BadNumber(node) => write!(f, "the frontend wrote no usable number to {node}"),
            Misdeed::UnknownProtocol => f.write_str("the frontend's protocol is not a known blkif ABI"),
            Misdeed::Queues(n) => write!(f, "the frontend asks for {n} queues, which was not offered"),
            Misdeed::RingPages(n) => write!(f, "the frontend asks for {n} ring pages, which was not offered"),
            Misdeed::BadGrant(grant) => write!(f, "the frontend's grant reference {grant} cannot be mapped"),
            Misdeed::BadPort(port) => write!(f, "the frontend's event channel {port} cannot be bound"),
            Misdeed::Ring(text) => f.write_str(text),
        }
    }
}

/// Why a ring was not connected.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ConnectError {
    /// The frontend's fault.
    Misbehaved(Misdeed),
    /// Ours, or the host's: may pass.
    Failed(String),
}

/// What happened. Every answer refers to the one action of its sort that is outstanding; an answer that nobody asked for
/// is ignored.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// A watch fired for a node of this device, the connection to xenstore was made anew, or the vbd is new.
    Changed,
    /// Answers [`Action::ReadWorld`]: a read that began after the action was given.
    World(&'a World),
    /// Answers [`Action::Publish`] and [`Action::RemoveBackend`]: committed.
    Published,
    /// Likewise: a guard did not hold, or it is not known whether the commit went through.
    Superseded,
    /// Likewise: xenstore refused, and trying again at once will not help.
    PublishFailed(String),
    /// Answers [`Action::Open`]. The text may be shown to the guest.
    Opened(Result<Geometry, String>),
    /// Answers [`Action::CloseImage`].
    ImageClosed,
    /// The open image has another size now, or another way to give space back.
    Resized(Geometry),
    /// Answers [`Action::Connect`]: that one of [`ConnectPlan::rings`] is mapped and bound, all of it.
    Connected(usize),
    /// Answers [`Action::Connect`]: nothing is mapped or bound.
    ConnectFailed(ConnectError),
    /// Answers [`Action::Disconnect`]: nothing is mapped, bound or in flight any more.
    Disconnected,
    /// The frontend broke the rules of a connected ring, which is not looked at any more; it stays mapped.
    RingBroken(Misdeed),
    /// An armed timer ran out.
    TimerFired(Timer),
    /// The process is to end: drain, flush, and leave everything for the successor.
    Stop,
}

/// Something for the log. The daemon bounds the rate per guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Notice {
    /// The frontend's fault.
    Misbehaved(Misdeed),
    /// The device cannot be served; the text says why and what to do.
    Refused(String),
    /// An attempt failed and will be repeated.
    WillRetry(String),
    /// xenstore refused a publication; it will be repeated.
    PublishFailed(String),
}

/// What is to be done. An action that has an answer is outstanding until that answer; at most one of each sort is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Read all [`keys`](super::keys) in their order, then the [`further_keys`](super::further_keys) that follow from them;
    /// answer [`Event::World`]. Every decision follows one of these, so
    /// delaying the answer is the way to slow down a guest that changes its mind too often.
    ReadWorld,
    /// Open an image; answer [`Event::Opened`].
    Open(OpenRequest),
    /// Flush and close the image; answer [`Event::ImageClosed`].
    CloseImage,
    /// Map and bind a ring and serve it from the open image; answer [`Event::Connected`] or [`Event::ConnectFailed`].
    Connect(ConnectPlan),
    /// Give the ring up; answer [`Event::Disconnected`].
    Disconnect(Disconnect),
    /// Write to the backend directory; answer [`Event::Published`], [`Event::Superseded`] or [`Event::PublishFailed`].
    Publish(Publication),
    /// Remove the backend directory, and never its parents, in a transaction with these guards; answers as for `Publish`.
    RemoveBackend(Vec<Guard>),
    /// Send [`Event::TimerFired`] after [`Timer::delay_ms`].
    ArmTimer(Timer),
    /// Do not. An event that is already under way does no harm.
    CancelTimer(Timer),
    /// Tell the log.
    Report(Notice),
    /// The device is gone and nothing of it is held: drop the vbd, its watch and its place in the tables.
    Forget,
    /// Answers [`Event::Stop`]: nothing is held any more.
    Stopped,
}

/// The actions of one step, in the order to take them.
pub type Actions = Vec<Action>;

/// A text for `error` and the like: bounded, one line, printable.
pub(super) fn bounded(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if out.len() + c.len_utf8() > ERROR_TEXT_MAX_BYTES {
            break;
        }
        out.push(c);
    }
    out
}
