//! Bugs planted on purpose: the oracles must find each of them, or they prove nothing.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use world::run::{World, sane_world};
use world::{Faults, Plant};

const FAULTS: Faults = Faults {
    read_error: 20,
    write_error: 20,
    flush_error: 0,
    copy_batch: 0,
    overflow: 0,
    spurious: 0,
    slow: 60,
    latency_us_max: 500,
    torn: false,
};

/// Serves guests, with a death in between, and loses power at the end.
fn whole_life(mut world: World) -> Result<(), String> {
    let (lifetime, end) = (world.shared.below(1500), 1 + world.shared.below(4000));
    world.shared.countdown.set(Some(lifetime));
    world.run_until(|world| world.steps > end || world.finished())?;
    let torn = world.shared.faults.get().torn;
    world.lose_power(torn)
}

/// Serves guests to the end and detaches them.
fn to_the_end(mut world: World) -> Result<(), String> {
    world.run()?;
    world.check_media()?;
    world.close()
}

/// The message of the first run that noticed.
fn noticed(plant: Plant, faults: Faults, run: fn(World) -> Result<(), String>) -> String {
    for seed in 0..60 {
        let world = sane_world(seed, 60);
        world.shared.faults.set(faults);
        world.shared.plant.set(plant);
        if let Err(what) = run(world) {
            return what;
        }
    }
    panic!("{plant:?} was not noticed in 60 runs");
}

#[track_caller]
fn notices(plant: Plant, faults: Faults, run: fn(World) -> Result<(), String>, sign: &str) {
    let what = noticed(plant, faults, run);
    assert!(what.contains(sign), "{plant:?} was noticed for another reason: {what}");
}

#[test]
fn without_a_bug_nothing_is_noticed() {
    for seed in 0..20 {
        for run in [whole_life as fn(World) -> _, to_the_end] {
            let world = sane_world(seed, 60);
            world.shared.faults.set(FAULTS);
            run(world).unwrap();
        }
    }
}

#[test]
fn flushes_that_do_not_flush_are_noticed() {
    notices(Plant::FlushNotDone, FAULTS, whole_life, "after power loss");
    notices(Plant::FlushSkipsLast, FAULTS, whole_life, "after power loss");
    let failing = Faults { flush_error: 300, ..FAULTS };
    notices(Plant::FlushErrorHidden, failing, whole_life, "after power loss");
}

#[test]
fn lost_wake_ups_are_noticed() {
    notices(Plant::UnmaskDropped, FAULTS, to_the_end, "stuck");
    notices(Plant::NotifyDropped, FAULTS, to_the_end, "stuck");
}

#[test]
fn wrong_data_is_noticed() {
    notices(Plant::WriteMisplaced, FAULTS, to_the_end, "sector");
    notices(Plant::WriteErrorHidden, FAULTS, to_the_end, "though it was made to fail");
    notices(Plant::CopySkipped, FAULTS, to_the_end, "sector");
    // A batch that fails as a whole is copied again one by one; who takes its statuses for true hands out stale memory.
    let failing = Faults { copy_batch: 60, ..FAULTS };
    notices(Plant::CopyStatusIgnored, failing, to_the_end, "sector");
}

#[test]
fn a_copy_that_did_not_reach_the_file_is_noticed() {
    notices(Plant::DirectFaultIgnored, FAULTS, to_the_end, "sector");
}

#[test]
fn forgotten_requests_and_answers_given_twice_are_noticed() {
    let what = noticed(Plant::JournalForgets, FAULTS, whole_life);
    assert!(
        ["stuck", "answer to nothing", "sector", "out of order"].iter().any(|sign| what.contains(sign)),
        "{what}"
    );
}

#[test]
fn what_is_not_given_back_is_noticed() {
    notices(Plant::UnmapDropped, FAULTS, to_the_end, "leaks");
    notices(Plant::UnbindDropped, FAULTS, to_the_end, "leaks");
}
