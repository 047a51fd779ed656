//! A ring page of any bytes, rewritten while it is read: the backend's end must stay within the ring's arithmetic.
#![no_main]

#[path = "../bodies/ring.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| body::play(data));
