//! Crashes at every step of random requests on random chains of VHDs; and planted bugs that must be found.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod support;
mod vhd_support;

use formats::vhd::Planted;
use support::driver::{Faults, NoFaults};
use support::requests::Mortal as _;
use support::rng::{Rng, seeds};
use support::sweep::{Weather, failure_of};
use vhd_support::world::{Setup, World};

fn run(seed: u64, planted: Planted, ledger: formats::ledger::Planted, weather: bool) -> u64 {
    let mut rng = Rng::new(seed);
    let setup = Setup::random(&mut rng);
    let mut world = World::new(seed, setup, planted);
    world.all.driver.disk.plant(ledger);
    let mut bad = Weather { one_in: 10 + rng.below(40), full: rng.one_in(2) };
    let faults: &mut dyn Faults = if weather { &mut bad } else { &mut NoFaults };
    // VBDD_CRASHES: looks at what is left after each piece of work.
    let looks = std::env::var("VBDD_CRASHES").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    world.sweep(120, looks, faults);
    world.crashes
}

fn sweep(count: u64, weather: bool) {
    let mut crashes = 0;
    for seed in seeds(count) {
        println!("VBDD_SEED={seed} {:?}", Setup::random(&mut Rng::new(seed)));
        crashes += run(seed, Planted::default(), formats::ledger::Planted::default(), weather);
    }
    println!("{crashes} crash points");
}

#[test]
fn a_crash_loses_nothing_that_was_flushed() {
    sweep(16, false);
}

#[test]
fn errors_and_full_media_corrupt_nothing() {
    sweep(16, true);
}

/// Seeds until a planted bug is found, or `None`.
fn found_at(planted: Planted, ledger: formats::ledger::Planted) -> Option<(u64, String)> {
    let crash = |seed| failure_of(|| assert!(run(seed, planted, ledger, false) > 0));
    (0..150).find_map(|seed| crash(seed).map(|why| (seed, why)))
}

#[test]
fn planted_bugs_are_found() {
    std::panic::set_hook(Box::new(|_| {}));
    let none = Planted::default();
    let formats = [
        ("no_reserve_sync", Planted { no_reserve_sync: true, ..none }),
        ("no_zeroing", Planted { no_zeroing: true, ..none }),
        ("no_data_tick", Planted { no_data_tick: true, ..none }),
        ("no_unlink_wait", Planted { no_unlink_wait: true, ..none }),
        ("no_batmap_wait", Planted { no_batmap_wait: true, ..none }),
        ("no_map_tick", Planted { no_map_tick: true, ..none }),
        ("discard_shows_parent", Planted { discard_shows_parent: true, ..none }),
        ("no_close_wait", Planted { no_close_wait: true, ..none }),
    ];
    let calm = formats::ledger::Planted::default();
    let ledgers = [
        ("no_tick", formats::ledger::Planted { no_tick: true, ..calm }),
        ("no_sync_after_pages", formats::ledger::Planted { no_sync_after_pages: true, ..calm }),
        ("no_flush", formats::ledger::Planted { no_flush: true, ..calm }),
        ("no_flush_pages", formats::ledger::Planted { no_flush_pages: true, ..calm }),
    ];
    let all = formats.map(|(name, planted)| (name, planted, calm)).into_iter();
    let mut missed = Vec::new();
    for (name, planted, ledger) in all.chain(ledgers.map(|(name, ledger)| (name, none, ledger))) {
        match found_at(planted, ledger) {
            Some((seed, why)) => println!("{name}: found with seed {seed}: {why:.150}"),
            None => missed.push(name),
        }
    }
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not found: {missed:?}");
}
