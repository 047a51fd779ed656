//! Sane guests on the data path: every request answered once and rightly, whatever the timing.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use rings::Abi;
use world::backend::Vbd;
use world::guest::{Habits, SaneGuest};
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
    for_seeds(12, |seed| served(seed, 60, calm()).map(drop));
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

#[test]
fn storage_errors_reach_the_request_they_hit_and_no_other() {
    let faults = Faults { read_error: 40, write_error: 40, flush_error: 20, slow: 30, ..calm() };
    for_seeds(12, |seed| served(seed, 60, faults).map(drop));
}

#[test]
fn failed_batches_spurious_events_and_overflows_lose_nothing() {
    let faults = Faults { copy_batch: 40, overflow: 60, spurious: 60, ..calm() };
    for_seeds(12, |seed| served(seed, 60, faults).map(drop));
}

#[test]
fn what_an_acknowledged_flush_covers_survives_power_loss_at_any_moment() {
    for_seeds(30, |seed| {
        let mut world = sane_world(seed, 60);
        let torn = seed % 2 == 0;
        let flush_error = if seed % 5 == 0 { 100 } else { 0 };
        world.shared.faults.set(Faults { slow: 100, flush_error, torn, ..calm() });
        let end = 1 + world.shared.below(6000);
        world.run_until(|world| world.steps > end || world.finished())?;
        world.lose_power(torn)
    });
}

#[test]
fn a_queue_that_closes_in_mid_flight_serves_what_was_sent() {
    for_seeds(12, |seed| {
        let mut world = sane_world(seed, 200);
        world.shared.faults.set(Faults { slow: 100, ..calm() });
        let end = 1 + world.shared.below(3000);
        world.run_until(|world| world.steps > end || world.finished())?;
        // A guest that leaves sends nothing more, and waits for what it has sent.
        world.shared.stop_sending.set(true);
        for at in 0..world.backend.lines.len() {
            let queue = world.backend.lines[at].queue.unwrap();
            world.backend.with(|pump| pump.close(queue));
        }
        world.run()?;
        world.close()
    });
}

#[test]
fn a_guest_that_dies_leaves_nothing_behind() {
    for_seeds(12, |seed| {
        let mut world = sane_world(seed, 200);
        world.shared.faults.set(Faults { slow: 100, ..calm() });
        let end = 1 + world.shared.below(3000);
        world.run_until(|world| world.steps > end || world.finished())?;
        let victim = world.shared.index(world.backend.vbds.len());
        world.destroy(victim);
        world.run()?;
        world.close()
    });
}

#[test]
fn a_guest_that_dies_while_its_rings_are_taken_over_is_not_touched() {
    for_seeds(20, |seed| {
        let mut world = sane_world(seed, 200);
        world.shared.faults.set(Faults { slow: 100, ..calm() });
        let end = 1 + world.shared.below(3000);
        world.run_until(|world| world.steps > end || world.finished())?;
        world.backend.die();
        assert!(world.backend.start());
        // What was owed is filed again, and nothing of it has been copied yet.
        let victim = world.shared.index(world.backend.vbds.len());
        world.destroy(victim);
        world.run()?;
        world.close()
    });
}

#[test]
fn a_queue_that_closes_while_it_waits_for_memory_serves_what_was_sent() {
    for_seeds(4, |seed| {
        let mut world = World::new(seed, 1 << 20);
        let disk = world.add_image(300, false);
        // Two queues of 32 requests of eleven pages each want three times the arena.
        world.add_guest(Habits {
            queues: 2,
            requests: 200,
            frames: 360,
            segments_min: 11,
            whole_pages: true,
            ..Habits::new(1, disk)
        });
        // Storage so slow that both rings are full and wait for memory.
        world.shared.faults.set(Faults { latency_us_max: 100_000, ..calm() });
        let end = 100 + world.shared.below(1000);
        world.run_until(|world| world.steps > end || world.finished())?;
        world.shared.stop_sending.set(true);
        for at in 0..world.backend.lines.len() {
            let queue = world.backend.lines[at].queue.unwrap();
            world.backend.with(|pump| pump.close(queue));
        }
        world.run()?;
        world.close()
    });
}

#[test]
fn rings_of_every_order_can_be_full_of_requests() {
    for order in 0..=4 {
        for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
            let entries = abi.entries(1 << order);
            let mut world = World::new(order, 8 << 20);
            let disk = world.add_image(5000, false);
            world.add_guest(Habits {
                abi,
                ring_pages: 1 << order,
                requests: 2 * entries,
                frames: entries as usize,
                depth: entries,
                segments_max: 1,
                indirect: 0,
                reads: 16,
                ..Habits::new(1, disk)
            });
            world.shared.faults.set(Faults { latency_us_max: 1_000_000, ..calm() });
            let taken = |world: &World| {
                let queue = world.backend.lines[0].queue.unwrap();
                world.backend.pump.as_ref().unwrap().unanswered(queue)
            };
            world.run_until(|world| world.backend.turns > 0 && taken(world) == entries as usize).unwrap();
            world.run().unwrap();
            world.check_media().unwrap();
            world.close().unwrap();
        }
    }
}

/// Two domains whose queues lead to one disk, with barriers and flushes in both.
fn shared_disk(seed: u64) -> World {
    let mut world = World::new(seed, 1 << 20);
    let disk = world.add_image(300, false);
    let mut rings = Vec::new();
    for domain in [1, 2] {
        let habits =
            Habits { queues: 2, requests: 150, barriers: 2, flushes: 2, ..Habits::new(domain, disk) };
        let guest = SaneGuest::new(&world.shared, habits);
        rings.extend(guest.rings());
        world.add_actor(Box::new(guest));
    }
    let image = world.shared.models.borrow()[disk].image;
    world.backend.add(Vbd { image, sectors: 300, read_only: false, rings });
    world.shared.faults.set(Faults { slow: 100, ..calm() });
    world
}

#[test]
fn queues_of_a_disk_are_aborted_and_the_others_go_on() {
    for_seeds(30, |seed| {
        let mut world = shared_disk(seed);
        let end = 1 + world.shared.below(3000);
        world.run_until(|world| world.steps > end || world.finished())?;
        // The second domain dies: its two queues are aborted, whatever barrier or flush is theirs.
        world.shared.guests.borrow_mut().retain(|guest| guest.domain() != 2);
        world.shared.xen.borrow_mut().destroy_domain(2);
        for at in 2..4 {
            if let Some(queue) = world.backend.lines[at].queue {
                world.backend.with(|pump| pump.abort(queue));
            }
        }
        world.shared.xen.borrow_mut().aborted.insert(2);
        world.run()?;
        world.close()
    });
}

#[test]
fn queues_of_a_disk_are_closed_and_the_others_go_on() {
    for_seeds(30, |seed| {
        let mut world = shared_disk(seed);
        let end = 1 + world.shared.below(3000);
        world.run_until(|world| world.steps > end || world.finished())?;
        // One domain leaves: what it has sent is served, its queues drain and are detached.
        let leaving: Vec<_> = world.backend.lines[2..].iter().filter_map(|line| line.queue).collect();
        for queue in leaving {
            world.backend.with(|pump| pump.quiesce(queue));
        }
        world.run_until(|world| world.backend.lines[2..].iter().all(|line| line.drained))?;
        for at in 2..4 {
            world.backend.detach(at, false);
        }
        // The other one is served to the end; the ring that was left is then taken up again.
        let first_done = |world: &World| world.shared.guests.borrow()[0].finished();
        world.run_until(first_done)?;
        world.backend.die();
        world.run()?;
        world.check_media()?;
        world.close()
    });
}
