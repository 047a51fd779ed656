//! Sane guests on the data path: every request answered once and rightly, whatever the timing.
#![allow(missing_docs)]

mod world;

use world::run::{World, sane_world};
use world::{Faults, for_seeds};

/// Runs a world of sane guests to its end.
fn served(seed: u64, requests: u32, faults: Faults) -> Result<World, String> {
    let mut world = sane_world(seed, requests);
    world.shared.faults.set(faults);
    world.run()?;
    world.check_media()?;
    world.close()?;
    Ok(world)
}

fn calm() -> Faults {
    Faults { latency_us_max: 500, ..Faults::default() }
}

#[test]
fn sane_guests_are_served() {
    for_seeds(60, |seed| served(seed, 60, calm()).map(drop));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let (mut traces, mut calls) = (Vec::new(), 0);
    for seed in 0..5 {
        let first = served(seed, 40, calm()).unwrap();
        let second = served(seed, 40, calm()).unwrap();
        assert_eq!(first.shared.trace(), second.shared.trace(), "seed {seed}");
        traces.push(first.shared.trace());
        calls += first.shared.calls.get();
    }
    traces.sort_unstable();
    traces.dedup();
    assert_eq!(traces.len(), 5, "different seeds give different runs");
    assert!(calls > 1000);
}
