//! Guests on images with formats, in the simulated world: every answer right, whatever the timing; a process that dies at any
//! call has a successor; what was flushed survives power loss.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use world::run::{World, sane_world_on};
use world::{Faults, Plant, for_seeds};

fn world(seed: u64, requests: u32) -> World {
    let world = sane_world_on(seed, requests, true);
    world.shared.faults.set(Faults { latency_us_max: 500, slow: 50, ..Faults::default() });
    world
}

fn ends_well(world: &mut World) -> Result<(), String> {
    world.run()?;
    world.close()?;
    world.check_media()
}

#[test]
fn guests_are_served() {
    for_seeds(20, |seed| ends_well(&mut world(seed, 60)));
}

/// A world whose process dies again and again.
fn dies(seed: u64, plant: Plant) -> Result<u64, String> {
    let mut world = world(seed, 60);
    world.shared.plant.set(plant);
    for _ in 0..6 {
        let lifetime = world.shared.below([50, 500, 2000][world.shared.index(3)]);
        world.shared.countdown.set(Some(lifetime));
        let before = world.backend.deaths;
        world.run_until(|world| world.backend.deaths > before || world.finished())?;
    }
    world.shared.countdown.set(None);
    ends_well(&mut world)?;
    Ok(world.backend.deaths)
}

#[test]
fn successors_of_processes_that_die_repair_and_go_on() {
    let deaths = std::cell::Cell::new(0);
    for_seeds(20, |seed| {
        deaths.set(deaths.get() + dies(seed, Plant::None)?);
        Ok(())
    });
    assert!(deaths.get() > 50, "{} deaths are too few to show anything", deaths.get());
}

/// Metadata that a process had changed in memory only are missed when nobody puts them back.
#[test]
fn what_is_not_put_back_is_missed() {
    let found = (0..20).filter(|seed| dies(*seed, Plant::NothingLeft).is_err()).count();
    assert!(found > 0, "a planted bug is not found");
}

#[test]
fn what_an_acknowledged_flush_covers_survives_power_loss_at_any_moment() {
    for_seeds(60, |seed| {
        let mut world = world(seed, 60);
        let end = 1 + world.shared.below(6000);
        world.run_until(|world| world.steps > end || world.finished())?;
        world.lose_power(false)
    });
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..3 {
        let traces: Vec<u64> = (0..2)
            .map(|_| {
                let mut world = world(seed, 40);
                ends_well(&mut world).unwrap();
                world.shared.trace()
            })
            .collect();
        assert_eq!(traces[0], traces[1], "seed {seed}");
    }
}
