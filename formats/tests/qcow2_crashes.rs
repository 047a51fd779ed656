//! Crashes at every step of random requests on random chains; and planted bugs that must be found.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod support;

use formats::qcow2::Planted;
use support::driver::{Faults, NoFaults};
use support::requests::Mortal;
use support::rng::{Rng, seeds};
use support::sweep::{Weather, failure_of};
use support::world::{Setup, World};

/// One seed: random requests, and `per_step` crashes after each piece of work.
fn run(seed: u64, plan: &Plan) -> u64 {
    let mut rng = Rng::new(seed);
    let mut setup = Setup::random(&mut rng);
    if let Some(far) = plan.far {
        setup = (1..).map(|_| Setup::random(&mut rng)).find(|setup| setup.far == far).unwrap();
    }
    let mut world = World::new(seed, setup, plan.planted);
    world.all.driver.disk.plant(plan.ledger);
    world.all.driver.lazy |= plan.lazy;
    world.setup.depth = world.setup.depth.max(plan.depth);
    let mut bad = Weather { one_in: 10 + rng.below(40), full: rng.one_in(2) };
    let faults: &mut dyn Faults = if plan.weather { &mut bad } else { &mut NoFaults };
    world.sweep(plan.steps, plan.per_step, faults);
    world.crashes
}

#[derive(Clone, Copy)]
struct Plan {
    planted: Planted,
    ledger: formats::ledger::Planted,
    weather: bool,
    steps: u64,
    per_step: u64,
    /// Only setups in which refcount tables grow, or none of them.
    far: Option<bool>,
    /// Transfers of guests' own memory take longest.
    lazy: bool,
    /// Requests in flight, at least.
    depth: u64,
}

impl Plan {
    fn new() -> Plan {
        let (planted, ledger) = (Planted::default(), formats::ledger::Planted::default());
        Plan { planted, ledger, weather: false, steps: 160, per_step: 3, far: None, lazy: false, depth: 1 }
    }
}

fn sweep(count: u64, weather: bool) {
    let mut crashes = 0;
    for seed in seeds(count) {
        println!("VBDD_SEED={seed} {:?}", Setup::random(&mut Rng::new(seed)));
        crashes += run(seed, &Plan { weather, ..Plan::new() });
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

/// The seed that finds a planted bug, and how, or `None`.
fn found_at(plan: &Plan) -> Option<(u64, String)> {
    let crash = |seed| failure_of(|| assert!(run(seed, plan) > 0));
    (0..600).find_map(|seed| crash(seed).map(|why| (seed, why)))
}

#[test]
fn planted_bugs_are_found() {
    std::panic::set_hook(Box::new(|_| {}));
    let none = Planted::default();
    let near = Plan { far: Some(false), ..Plan::new() };
    let far = Plan { far: Some(true), steps: 260, per_step: 6, ..Plan::new() };
    // What only requests in flight can notice needs many of them, and no crash.
    let busy = Plan { per_step: 1, steps: 400, lazy: true, depth: 24, ..near };
    let formats = [
        ("no_data_barrier", near, Planted { no_data_barrier: true, ..none }),
        ("no_refcount_barrier", near, Planted { no_refcount_barrier: true, ..none }),
        ("no_free_barrier", near, Planted { no_free_barrier: true, ..none }),
        ("no_free_grace", busy, Planted { no_free_grace: true, ..none }),
        ("no_table_barrier", near, Planted { no_table_barrier: true, ..none }),
        ("no_reftable_barrier", far, Planted { no_reftable_barrier: true, ..none }),
        ("no_block_barrier", far, Planted { no_block_barrier: true, ..none }),
        ("no_switch_barrier", far, Planted { no_switch_barrier: true, ..none }),
        ("no_dirty_bit", near, Planted { no_dirty_bit: true, ..none }),
        ("no_clean_barrier", near, Planted { no_clean_barrier: true, ..none }),
        ("discard_shows_parent", near, Planted { discard_shows_parent: true, ..none }),
    ]
    .map(|(name, plan, planted)| (name, Plan { planted, ..plan }));
    let ledger = formats::ledger::Planted::default();
    let ledgers = [
        ("no_tick", formats::ledger::Planted { no_tick: true, ..ledger }),
        ("no_sync_after_pages", formats::ledger::Planted { no_sync_after_pages: true, ..ledger }),
        ("no_flush", formats::ledger::Planted { no_flush: true, ..ledger }),
        ("no_flush_pages", formats::ledger::Planted { no_flush_pages: true, ..ledger }),
    ]
    .map(|(name, ledger)| (name, Plan { ledger, ..near }));
    let mut missed = Vec::new();
    for (name, plan) in formats.into_iter().chain(ledgers) {
        match found_at(&plan) {
            Some((seed, why)) => {
                println!("{name}: found with seed {seed}: {}", why.chars().take(120).collect::<String>())
            }
            None => missed.push(name),
        }
    }
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not found: {missed:?}");
}
