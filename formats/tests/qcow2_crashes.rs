//! Crashes at every step of random requests on random chains; and planted bugs that must be found.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use formats::qcow2::Planted;
use support::rng::{Rng, seeds};
use support::sweep::{Weather, failure_of};
use support::world::{Setup, World};

fn run(seed: u64, planted: Planted, ledger: formats::ledger::Planted, weather: bool) -> u64 {
    let mut rng = Rng::new(seed);
    let setup = Setup::random(&mut rng);
    let mut world = World::new(seed, setup, planted);
    world.driver.disk.plant(ledger);
    let mut bad = Weather { one_in: 10 + rng.below(40), full: rng.one_in(2) };
    world.sweep(160, 3, weather.then_some(&mut bad));
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
fn a_crash_loses_nothing_that_was_flushed_and_leaves_nothing_but_leaks() {
    sweep(40, false);
}

#[test]
fn errors_and_full_media_corrupt_nothing() {
    sweep(40, true);
}

/// Seeds until a planted bug is found, or `None`.
fn found_at(planted: Planted, ledger: formats::ledger::Planted) -> Option<(u64, String)> {
    let crash = |seed| failure_of(|| assert!(run(seed, planted, ledger, false) > 0));
    (0..400).find_map(|seed| crash(seed).map(|why| (seed, why)))
}

#[test]
fn planted_bugs_are_found() {
    std::panic::set_hook(Box::new(|_| {}));
    let none = Planted::default();
    let formats = [
        ("no_data_barrier", Planted { no_data_barrier: true, ..none }),
        ("no_refcount_barrier", Planted { no_refcount_barrier: true, ..none }),
        ("no_free_barrier", Planted { no_free_barrier: true, ..none }),
        ("no_free_grace", Planted { no_free_grace: true, ..none }),
        ("no_table_barrier", Planted { no_table_barrier: true, ..none }),
        ("no_reftable_barrier", Planted { no_reftable_barrier: true, ..none }),
        ("no_block_barrier", Planted { no_block_barrier: true, ..none }),
        ("no_dirty_barrier", Planted { no_dirty_barrier: true, ..none }),
        ("no_clean_barrier", Planted { no_clean_barrier: true, ..none }),
        ("no_switch_barrier", Planted { no_switch_barrier: true, ..none }),
        ("discard_shows_parent", Planted { discard_shows_parent: true, ..none }),
    ];
    let ledger = formats::ledger::Planted::default();
    let ledgers = [
        ("no_tick", formats::ledger::Planted { no_tick: true, ..ledger }),
        ("no_sync_after_pages", formats::ledger::Planted { no_sync_after_pages: true, ..ledger }),
        ("no_flush", formats::ledger::Planted { no_flush: true, ..ledger }),
        ("no_flush_pages", formats::ledger::Planted { no_flush_pages: true, ..ledger }),
    ];
    let mut missed = Vec::new();
    let all = formats.map(|(name, planted)| (name, planted, ledger)).into_iter();
    for (name, planted, ledger) in all.chain(ledgers.map(|(name, ledger)| (name, none, ledger))) {
        match found_at(planted, ledger) {
            Some((seed, why)) => println!("{name}: found with seed {seed}: {why}"),
            None => missed.push(name),
        }
    }
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not found: {missed:?}");
}
