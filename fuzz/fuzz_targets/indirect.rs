//! Descriptors of indirect requests, rewritten while they are read: nothing of anybody else's memory comes to light.
#![no_main]

#[path = "../../tests/hostile_support/mod.rs"]
mod hostile_support;
#[path = "../../tests/backend_world/host.rs"]
mod host;
#[path = "../../tests/world/mod.rs"]
mod world;

libfuzzer_sys::fuzz_target!(|data: &[u8]| hostile_support::indirect::play(data));
