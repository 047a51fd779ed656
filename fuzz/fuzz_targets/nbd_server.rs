//! An NBD client that sends anything, against the server with a disk in memory.
#![no_main]

#[path = "../bodies/nbd_server.rs"]
mod nbd_server;

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_server::play(data));
