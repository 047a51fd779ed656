//! Every bound of the process, with its sum.

/// Pages of the largest ring that is mapped: order 4. One mapping request names them all.
pub const RING_PAGES_MAX: usize = 16;
