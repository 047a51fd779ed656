//! The network block device protocol: what lies on the wire, and the server. `docs/design/nbd.md` is the map.

pub mod process;
pub mod server;
pub mod wire;
