//! The client's side: images whose bytes lie on an NBD server.
//!
//! Nothing here does I/O. [`greeting`] agrees with a server over whatever reads and writes, [`session`] says what is to be
//! sent and takes what was received, [`unflushed`] keeps what a server may yet lose. `storage::remote` has the sockets.

pub mod address;
pub mod greeting;
pub mod session;
pub mod unflushed;

mod coverage;
mod receiver;

pub use address::{Address, Allowed, Place};
pub use greeting::{Export, greet};
pub use session::{Command, Memory, Misbehaved, Purpose, Request, Session};
