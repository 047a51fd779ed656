//! One whole connection: a hostile guest's ring, nodes and timing, through the real backend in the simulated world.
#![no_main]

#[path = "../../tests/hostile_support/mod.rs"]
mod hostile_support;
#[path = "../../tests/backend_world/host.rs"]
mod host;
#[path = "../../tests/world/mod.rs"]
mod world;

libfuzzer_sys::fuzz_target!(|data: &[u8]| hostile_support::script::play(data));
