//! Any nodes in both directories, in any order of events: the state machine answers, and never panics.
#![no_main]

#[path = "../bodies/handshake.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| body::play(data));
