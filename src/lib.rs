//! vbdd: one small process that serves every virtual disk of a Xen host.
//!
//! The binary in `main.rs` is thin; everything is here so that tests can build whole worlds out of it. `docs/design.md`
//! is the map of the house.

pub mod buffers;
pub mod hypervisor;
pub mod images;
pub mod storage;
