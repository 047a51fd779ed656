//! Any bytes from xenstored, in any pieces, while the client works: it takes them or says which rule was broken.
#![no_main]

#[path = "../bodies/xenstore_replies.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| body::play(data));
