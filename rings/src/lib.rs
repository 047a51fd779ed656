//! The blkif shared-memory ring, without I/O: ABIs, request parsing, responses, and both ends of the ring.
//!
//! * [`abi`]: the byte layouts of the three dialects (x86_64, x86_32, arm).
//! * [`request`]: a slot that was copied out of the ring once, and what it says after checking.
//! * [`segment`]: where a request's data is in the guest's memory.
//! * [`shared`]: the only unsafe code; volatile access to the shared pages.
//! * [`back`]: the backend's end: consume, respond, notify.
//! * [`front`]: the frontend's end, for simulated guests; it can also be made to misbehave.
//!
//! Source of layouts and rules: Xen's public headers `io/ring.h` and `io/blkif.h`.
#![no_std]

pub mod abi;
pub mod back;
pub mod front;
pub mod request;
pub mod segment;
pub mod shared;

pub use abi::{Abi, LARGEST_STRIDE, RING_PAGE_BYTES};
pub use back::{BackRing, Overrun};
pub use front::FrontRing;
pub use request::{Offers, Operation, Refusal, Request, SECTOR_BYTES, Slot, Status};
pub use segment::{DIRECT_SEGMENTS, INDIRECT_SEGMENTS_MAX, Indirect, Segment, Segments};
pub use shared::SharedPages;
