//! The vbd's side of every handshake that frontends and toolstacks are known to make, and of some that they should not.

// A test that meets the unexpected must stop, also in its helpers; clippy knows only #[test] functions.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "vbd_sequences/connecting.rs"]
mod connecting;
#[path = "vbd_sequences/host.rs"]
mod host;
#[path = "vbd_sequences/media.rs"]
mod media;
#[path = "vbd_sequences/misdeeds.rs"]
mod misdeeds;
#[path = "vbd_sequences/mistakes.rs"]
mod mistakes;
#[path = "vbd_sequences/restarts.rs"]
mod restarts;
#[path = "vbd_sequences/returning.rs"]
mod returning;
#[path = "vbd_sequences/shapes.rs"]
mod shapes;
#[path = "vbd_sequences/unplugging.rs"]
mod unplugging;
