//! The process dies at every call it makes, and a successor takes the rings over: guests never notice.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use rings::Abi;
use world::guest::Habits;
use world::run::{World, sane_world};
use world::{Faults, for_seeds};

/// A short run: two guests, two queues, few requests of every kind.
fn short_world(seed: u64) -> World {
    let mut world = World::new(seed, 1 << 20);
    world.backend.in_order = seed % 2 == 1;
    let abis = [Abi::X86_64, Abi::X86_32, Abi::Arm];
    for n in 0..2_u64 {
        let disk = world.add_image(200, false);
        world.add_guest(Habits {
            queues: 1 + n as usize,
            abi: abis[((seed + n) % 3) as usize],
            requests: 12,
            depth: 8,
            segments_max: 4,
            reads: 4,
            flushes: 2,
            flushes_with_data: 2,
            barriers: 1,
            odd: 2,
            in_order: seed % 2 == 1,
            ..Habits::new(n as u16 + 1, disk)
        });
    }
    world.shared.faults.set(Faults { latency_us_max: 300, slow: 50, ..Faults::default() });
    world
}

fn survives(world: &mut World) -> Result<(), String> {
    world.run()?;
    world.check_media()?;
    world.close()
}

#[test]
fn a_successor_takes_over_whatever_call_was_the_last() {
    for_seeds(3, |seed| {
        let mut world = short_world(seed);
        survives(&mut world)?;
        // The last two close the images, which nobody takes over.
        let calls = world.shared.calls.get() - 2;
        assert!(calls > 100, "a run that makes {calls} calls tests nothing");
        for last in 0..calls {
            let mut world = short_world(seed);
            world.shared.countdown.set(Some(last));
            survives(&mut world).map_err(|what| format!("dead at call {last} of {calls}: {what}"))?;
            assert_eq!(world.backend.deaths, 1, "seed {seed}, call {last}");
        }
        Ok(())
    });
}

#[test]
fn successors_that_die_too_leave_as_much_to_theirs() {
    for_seeds(25, |seed| {
        let mut world = sane_world(seed, 40);
        world.shared.faults.set(Faults { latency_us_max: 300, slow: 50, ..Faults::default() });
        for _ in 0..20 {
            let lifetime = world.shared.below([20, 200, 2000][world.shared.index(3)]);
            world.shared.countdown.set(Some(lifetime));
            let deaths = world.backend.deaths;
            world.run_until(|world| world.backend.deaths > deaths || world.finished())?;
        }
        survives(&mut world)
    });
}

#[test]
fn what_was_flushed_before_a_death_survives_power_loss_after_it() {
    for_seeds(30, |seed| {
        let mut world = sane_world(seed, 60);
        world.shared.faults.set(Faults { latency_us_max: 300, slow: 50, ..Faults::default() });
        let lifetime = world.shared.below(2000);
        world.shared.countdown.set(Some(lifetime));
        let end = 1 + world.shared.below(4000);
        world.run_until(|world| world.steps > end || world.finished())?;
        world.lose_power(false)
    });
}

#[test]
fn a_quiet_handover_answers_everything_first() {
    for_seeds(20, |seed| {
        let mut world = sane_world(seed, 60);
        for _ in 0..5 {
            let end = world.steps + 1 + world.shared.below(600);
            world.run_until(|world| world.steps > end || world.finished())?;
            for at in 0..world.backend.lines.len() {
                if let Some(queue) = world.backend.lines[at].queue {
                    world.backend.with(|pump| pump.quiesce(queue));
                }
            }
            world.wait_drained()?;
            let detach = world.shared.chance(1, 2);
            for at in 0..world.backend.lines.len() {
                if detach {
                    world.backend.detach(at, false);
                }
            }
            world.backend.die();
        }
        survives(&mut world)
    });
}
