//! A QCOW2 image whose metadata contradict themselves: checked, repaired, mapped, grown, opened and used.
#![no_main]

#[path = "../bodies/image.rs"]
mod image;
#[path = "../bodies/qcow2.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| body::play(data));
