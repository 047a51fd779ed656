//! A VHD whose metadata contradict themselves: looked at, repaired, mapped, grown, given a parent, opened and used.
#![no_main]

#[path = "../bodies/vhd.rs"]
mod body;
#[path = "../bodies/image.rs"]
mod image;

libfuzzer_sys::fuzz_target!(|data: &[u8]| body::play(data));
