//! The network block device protocol: what lies on the wire, the server, and the client. `docs/design/nbd.md` is the map.

pub mod client;
pub mod guests;
pub mod process;
pub mod server;
pub mod wire;

/// What a request should be a multiple of, at least: the page cache's and most devices' block.
const PREFERRED_BYTES: u32 = 4096;
