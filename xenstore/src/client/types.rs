//! What goes into the client and what comes out of it: plain data.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::path::Path;
use crate::permissions::Permission;
use crate::wire::{ErrorCode, MessageType, PAYLOAD_BYTES_MAX};

/// How a client is to behave.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Longest payload sent: [`PAYLOAD_BYTES_MAX`] on a socket, [`crate::wire::DEVICE_PAYLOAD_BYTES_MAX`] on
    /// `/dev/xen/xenbus`.
    pub payload_bytes_max: usize,
    /// Requests outstanding at once, at most [`super::limits::REQUESTS_OUTSTANDING_MAX`].
    pub requests_max: usize,
    /// Seed of the random waiting times.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            requests_max: super::limits::REQUESTS_OUTSTANDING_MAX,
            seed: 0,
        }
    }
}

/// The client's name for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub(super) u64);

/// The owner's name for a watch; comes back with each of its events. Several watches may share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchToken(pub u64);

/// Something to be done, with exactly one completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// Reads nodes. The requests go out in the order given, so whoever reads a `state` first sees, in the nodes after
    /// it, at least what was written before that state. Completes with [`Outcome::Read`].
    Read(Vec<Path>),
    /// Names of the children of a node, however many. Completes with [`Outcome::Listed`].
    List(Path),
    /// Permissions of a node. Completes with [`Outcome::Permissions`].
    Permissions(Path),
    /// One change on its own. Completes with [`Outcome::Done`].
    Edit(Edit),
    /// If all guards hold: all edits, at one instant, or none. Redone as long as it clashes with others. Completes with
    /// [`Outcome::Committed`] or [`Outcome::GuardFailed`].
    Transaction {
        /// What must be so. Read inside the transaction.
        guards: Vec<(Path, Guard)>,
        /// What is then done, in this order.
        edits: Vec<Edit>,
    },
}

/// A condition on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// The node exists.
    Exists,
    /// There is no such node.
    Absent,
    /// The node exists and has this value.
    Equals(Vec<u8>),
}

/// A change of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Sets the value; makes the node and its parents where they are missing.
    Write(Path, Vec<u8>),
    /// Makes the node and its parents where they are missing.
    Mkdir(Path),
    /// Removes the node and all below it. A node that is not there is no error.
    Remove(Path),
    /// Sets the permissions; the first entry names the owner.
    SetPermissions(Path, Vec<Permission>),
}

impl Edit {
    /// The node that is changed.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Edit::Write(path, _) | Edit::Mkdir(path) | Edit::Remove(path) | Edit::SetPermissions(path, _) => {
                path
            }
        }
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The values, one result per path, in the order of the paths.
    Read(Vec<Result<Vec<u8>, ErrorCode>>),
    /// The names.
    Listed(Vec<String>),
    /// The permissions; the first entry names the owner.
    Permissions(Vec<Permission>),
    /// The edit was made.
    Done,
    /// All edits were made at once.
    Committed {
        /// How often it was tried, this time included.
        attempts: u32,
    },
    /// Nothing was changed, because this guard did not hold.
    GuardFailed {
        /// The node of the guard.
        path: Path,
        /// What was there.
        found: Result<Vec<u8>, ErrorCode>,
    },
    /// Nothing was changed, unless the failure says otherwise.
    Failed(Failure),
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The server refused.
    Refused {
        /// The node that it was about; `None` for the start or end of a transaction.
        path: Option<Path>,
        /// Its reason.
        code: ErrorCode,
    },
    /// The connection ended first.
    ConnectionLost {
        /// Whether the change may nevertheless have been made: the request that makes it was on its way.
        maybe_applied: bool,
    },
    /// The transaction clashed with others each time, for too long.
    Conflict {
        /// How often it was tried.
        attempts: u32,
    },
    /// The list of children is longer than [`super::limits::LIST_BYTES_MAX`].
    ListTooLong,
    /// The list of children changed each time while it was read in parts.
    ListKeepsChanging,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Refused { path: Some(path), code } => write!(f, "xenstored refused {path}: {code}"),
            Failure::Refused { path: None, code } => write!(f, "xenstored refused a transaction: {code}"),
            Failure::ConnectionLost { maybe_applied: false } => {
                f.write_str("the connection to xenstored was lost")
            }
            Failure::ConnectionLost { maybe_applied: true } => {
                f.write_str("the connection to xenstored was lost; the change may or may not have been made")
            }
            Failure::Conflict { attempts } => {
                write!(f, "the transaction clashed with other changes {attempts} times and was given up")
            }
            Failure::ListTooLong => f.write_str("the directory has too many children to list"),
            Failure::ListKeepsChanging => f.write_str("the directory changed each time while it was listed"),
        }
    }
}

impl core::error::Error for Failure {}

/// What the client has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A connection was made, the first or another: whatever was known may be outdated. All watches fire again too.
    Reset,
    /// A job ended.
    Job {
        /// Which.
        id: JobId,
        /// How.
        outcome: Outcome,
    },
    /// Something happened at `path` or below it: look. May be spurious, and may stand for several changes.
    Watch {
        /// The watch's token.
        token: WatchToken,
        /// The node that changed, or the watched path itself for a removal from above, or for more changes than were
        /// remembered one by one.
        path: Path,
    },
    /// The server does not take this watch, which is now forgotten.
    WatchFailed {
        /// The watch's token.
        token: WatchToken,
        /// The watched path.
        path: Path,
        /// The server's reason.
        code: ErrorCode,
    },
}

/// Why a job or a watch was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SubmitError {
    /// Too many of them: take events first.
    Full,
    /// A request of it would not fit a message.
    TooBig(Path),
    /// Names more nodes than [`super::limits::NODES_PER_JOB_MAX`].
    TooManyNodes,
    /// A special name where a node's path is needed.
    NotANode(Path),
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubmitError::Full => f.write_str("too many xenstore jobs or watches"),
            SubmitError::TooBig(path) => write!(f, "{path}: does not fit a xenstore message of 4 KiB"),
            SubmitError::TooManyNodes => f.write_str("too many nodes in one xenstore job"),
            SubmitError::NotANode(path) => write!(f, "{path} names a special watch, not a node"),
        }
    }
}

impl core::error::Error for SubmitError {}

/// How the server broke the protocol. The connection cannot be used any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// A payload of this length was announced.
    PayloadTooLong(u32),
    /// A message of a type that does not exist.
    UnknownType(u32),
    /// A reply to a request that was not made, or not sent yet, or answered before.
    UnknownRequest(u32),
    /// A reply of another type than the request.
    WrongType {
        /// Type of the request.
        asked: MessageType,
        /// Type of the reply.
        answered: MessageType,
    },
    /// A payload that does not follow the rules of its type.
    Malformed(MessageType),
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::PayloadTooLong(bytes) => {
                write!(f, "xenstored announced a payload of {bytes} bytes")
            }
            ProtocolError::UnknownType(number) => {
                write!(f, "xenstored sent a message of unknown type {number}")
            }
            ProtocolError::UnknownRequest(number) => {
                write!(f, "xenstored answered request {number}, which does not wait for an answer")
            }
            ProtocolError::WrongType { asked, answered } => {
                write!(f, "xenstored answered a {asked:?} with a {answered:?}")
            }
            ProtocolError::Malformed(kind) => write!(f, "xenstored sent a malformed {kind:?}"),
        }
    }
}

impl core::error::Error for ProtocolError {}

/// Counters of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests sent.
    pub requests: u64,
    /// Attempts of finished transactions that were in vain.
    pub transactions_redone: u64,
    /// Watch events that were merged into one not yet taken.
    pub events_coalesced: u64,
    /// Watch events of watches that nobody has.
    pub events_ignored: u64,
}
