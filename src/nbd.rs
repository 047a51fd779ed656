//! The network block device protocol: what lies on the wire, the server, and the client. `docs/design/nbd.md` is the map.

pub mod client;
pub mod process;
pub mod server;
pub mod wire;
