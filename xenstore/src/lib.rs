//! The xenstore protocol without I/O: paths, wire format, and a client with watches and transactions.
//!
//! Nothing here opens a socket, reads a clock or draws a random number of its own: bytes, milliseconds and a seed come
//! from the caller. The protocol is the one of `docs/misc/xenstore.txt` and `public/io/xs_wire.h` of Xen; where a
//! real xenstored is stricter or odder than those, the place says so.
#![no_std]

extern crate alloc;

mod client;
mod path;
mod permissions;
pub mod wire;

pub use client::{
    Client, Config, Edit, Event, Failure, Guard, Job, JobId, Outcome, ProtocolError, Statistics, SubmitError,
    WatchToken, limits,
};
pub use path::{PATH_BYTES_MAX, Path, PathError};
pub use permissions::{Access, Permission};
pub use wire::ErrorCode;
