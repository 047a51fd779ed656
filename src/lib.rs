//! vbdd: one small process that serves every virtual disk of a Xen host.
//!
//! The binary in `main.rs` is thin; everything is here so that tests can build whole worlds out of it. `docs/design.md`
//! is the map of the house.

pub mod backend;
pub mod buffers;
pub mod chains;
pub mod cli;
mod clock;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod error;
pub(crate) mod grants;
pub mod hypervisor;
pub mod images;
pub mod journal;
pub mod keep;
pub mod limits;
pub mod nbd;
pub mod owners;
pub mod params;
pub mod pump;
pub mod queue;
pub mod reactor;
pub mod signals;
pub mod storage;
pub mod tool;
pub mod vbd;
pub mod xenbus;
