//! The inputs that fuzzing has found (`fuzz/corpus`), and some drawn at random, played without a fuzzer.
//!
//! Longer: `VBDD_SEEDS=n cargo test --test hostile_corpus`; replay: `VBDD_SEED=n`.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    unreachable_pub
)]

#[path = "../fuzz/bodies/handshake.rs"]
mod handshake;
#[path = "backend_world/host.rs"]
mod host;
mod hostile_support;
#[path = "../fuzz/bodies/image.rs"]
mod image;
#[path = "../fuzz/bodies/qcow2.rs"]
mod qcow2;
#[path = "../fuzz/bodies/ring.rs"]
mod ring;
#[path = "../fuzz/bodies/vhd.rs"]
mod vhd;
mod world;
#[path = "../fuzz/bodies/xenstore_replies.rs"]
mod xenstore_replies;

use std::path::Path;

use world::for_seeds;
use world::rng::Rng;

/// Plays all inputs of a target that are committed.
fn replay(target: &str, play: fn(&[u8])) {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&place).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        play(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 20, "{count} inputs in {}", place.display());
}

/// Plays inputs drawn from seeds.
fn drawn(seeds: u64, play: fn(&[u8])) {
    for_seeds(seeds, |seed| {
        let mut rng = Rng::new(seed);
        let length = rng.below(1000);
        let bytes: Vec<u8> = (0..length).map(|_| u8::try_from(rng.below(256)).unwrap()).collect();
        println!("seed {seed}");
        play(&bytes);
        Ok(())
    });
}

#[test]
fn connections_of_the_corpus() {
    replay("connection", hostile_support::script::play);
}

#[test]
fn rings_of_the_corpus() {
    replay("ring", ring::play);
}

#[test]
fn handshakes_of_the_corpus() {
    replay("handshake", handshake::play);
}

#[test]
fn replies_of_the_corpus() {
    replay("xenstore_replies", xenstore_replies::play);
}

#[test]
fn indirect_requests_of_the_corpus() {
    replay("indirect", hostile_support::indirect::play);
}

#[test]
fn indirect_requests_drawn_at_random() {
    drawn(200, hostile_support::indirect::play);
}

#[test]
fn connections_drawn_at_random() {
    drawn(30, hostile_support::script::play);
}

#[test]
fn qcow2_images_of_the_corpus() {
    replay("qcow2", qcow2::play);
}

#[test]
fn qcow2_images_drawn_at_random() {
    drawn(300, qcow2::play);
}

#[test]
fn vhds_of_the_corpus() {
    replay("vhd", vhd::play);
}

#[test]
fn vhds_drawn_at_random() {
    drawn(300, vhd::play);
}
