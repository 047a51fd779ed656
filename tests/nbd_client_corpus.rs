//! What fuzzing has found that an NBD server can say (`fuzz/corpus/nbd_client`), and more drawn at random, played to the client
//! without a fuzzer. Longer: `VBDD_SEEDS=n`; replay: `VBDD_SEED=n`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

#[path = "../fuzz/bodies/nbd_client.rs"]
mod nbd_client;

use std::path::Path;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn the_corpus_is_survived() {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/nbd_client");
    let inputs: Vec<_> = std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(inputs.len() > 20, "{} inputs in {}", inputs.len(), place.display());
    inputs.iter().for_each(|path| nbd_client::play(&std::fs::read(path).unwrap()));
}

#[test]
fn servers_that_say_anything_are_survived() {
    let one = number("VBDD_SEED");
    let seeds = one.map_or(0..number("VBDD_SEEDS").unwrap_or(20_000), |seed| seed..seed + 1);
    for seed in seeds {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[1]
        };
        let length = usize::from(next()) * 3;
        let mut data: Vec<u8> = (0..length).map(|_| next()).collect();
        if let Some(flags) = data.first_mut() {
            // Mostly sessions.
            *flags &= if *flags & 7 == 0 { 0xff } else { 0x3f };
        }
        nbd_client::play(&data);
    }
}
