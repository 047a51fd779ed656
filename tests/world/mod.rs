//! The simulated world: everything around vbdd, in one process, replayable from a seed.
// Every test binary includes all of the world and uses a part of it.
#![allow(dead_code)]

pub mod rng;
pub mod xenstore;
