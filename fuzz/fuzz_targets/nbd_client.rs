//! An NBD server that says anything, against the client.
#![no_main]

#[path = "../bodies/nbd_client.rs"]
mod nbd_client;

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_client::play(data));
