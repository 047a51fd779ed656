//! Guests that misbehave beside one that does not: the sane one never notices.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use world::backend::Vbd;
use world::guest::Habits;
use world::hostile::{HostileGuest, Malice};
use world::run::World;
use world::{Faults, for_seeds};

const WILD: Malice = Malice { breaks_ring: true, storms: false, greedy: false };
const STORM: Malice = Malice { breaks_ring: false, storms: true, greedy: false };
const GREEDY: Malice = Malice { breaks_ring: false, storms: false, greedy: true };

/// A sane guest with two queues beside `count` hostile ones, each with a disk of its own.
fn besieged(seed: u64, habits: Habits, hostile: &[Malice]) -> World {
    let mut world = World::new(seed, 1 << 20);
    let disk = world.add_image(300, false);
    world.add_guest(Habits { disk, ..habits });
    for (n, malice) in hostile.iter().enumerate() {
        let image = world.shared.media.borrow_mut().create(&format!("/hostile/{n}"), 64, false);
        let guest = HostileGuest::new(&world.shared, 100 + n as u16, *malice);
        world.backend.add(Vbd { image, sectors: 64, read_only: false, rings: vec![guest.ring()] });
        world.add_actor(Box::new(guest));
    }
    world.shared.faults.set(Faults { latency_us_max: 300, ..Faults::default() });
    world
}

fn victim() -> Habits {
    Habits { queues: 2, requests: 100, ..Habits::new(1, 0) }
}

/// Serves the victim, kills the hostile guests, and looks for what is left of them.
fn unharmed(mut world: World) -> Result<World, String> {
    world.run()?;
    for vbd in 1..world.backend.vbds.len() {
        world.destroy(vbd);
    }
    world.close()?;
    Ok(world)
}

#[test]
fn junk_on_other_rings_harms_nobody() {
    let mut misdeeds = 0;
    let mut broken = 0;
    for seed in 0..20 {
        let world = unharmed(besieged(seed, victim(), &[WILD, WILD, STORM])).unwrap();
        let own: u64 =
            world.backend.lines.iter().filter(|line| line.vbd == 0).map(|line| line.misdeeds).sum();
        let theirs: u64 = world.backend.lines.iter().map(|line| line.misdeeds).sum();
        broken += u64::from(theirs > 0);
        misdeeds += theirs - own;
    }
    assert!(misdeeds > 250 && broken == 20, "{misdeeds} misdeeds in {broken} runs: too tame");
}

#[test]
fn a_turn_is_bounded_whatever_the_guests_do() {
    // Eight rounds of 32 requests from each of 5 rings; a request costs a transfer, its completion, and its share of
    // copies and events: no more than 4 calls.
    let bound = 8 * (5 * 32 * 4 + 16);
    for_seeds(8, |seed| {
        let world = unharmed(besieged(seed, victim(), &[GREEDY, WILD, STORM]))?;
        let most = world.backend.calls_per_turn_max;
        if most > bound { Err(format!("{most} calls in one turn, more than {bound}")) } else { Ok(()) }
    });
}

#[test]
fn small_requests_of_others_do_not_keep_memory_from_large_ones() {
    for_seeds(4, |seed| {
        // All requests of the victim need eleven pages in a row, those of the greedy ones one; together they want more
        // than there is.
        let habits = Habits {
            requests: 20,
            depth: 1,
            frames: 360,
            segments_min: 11,
            whole_pages: true,
            flushes: 0,
            flushes_with_data: 0,
            odd: 0,
            ..victim()
        };
        let world = besieged(seed, habits, &vec![GREEDY; 7 + seed as usize % 4]);
        world.shared.eager.set(true);
        world.shared.preempt.set(false);
        world.shared.faults.set(Faults { latency_us_max: 20_000, ..Faults::default() });
        let world = unharmed(world)?;
        let waited = world.latency_us_max();
        if waited > 60_000 { Err(format!("a request waited {waited} us for memory")) } else { Ok(()) }
    });
}

#[test]
fn guests_whose_disks_hang_leave_memory_to_the_others() {
    for_seeds(4, |seed| {
        // Seven guests fill their rings and get no answer, ever; together they want 224 pages of the 256.
        let habits = Habits { requests: 60, indirect_max: 24, ..victim() };
        let mut world = besieged(seed, habits, &[GREEDY; 7]);
        let hung: Vec<usize> = world.backend.vbds[1..].iter().map(|vbd| vbd.image).collect();
        world.shared.media.borrow_mut().hung.extend(hung);
        world.shared.eager.set(true);
        world.run()?;
        let free = (1 << 20) - world.backend.pump.as_ref().unwrap().storage.pool_used_bytes();
        if free < (1 << 20) / 8 {
            return Err(format!("{free} bytes are left"));
        }
        world.shared.media.borrow_mut().unhang();
        unharmed(world).map(drop)
    });
}

#[test]
fn an_honest_guest_under_load_is_never_taken_for_a_storm() {
    for_seeds(15, |seed| {
        let mut world = besieged(seed, Habits { requests: 400, ..victim() }, &[]);
        world.run()?;
        match world.backend.delay_us_max {
            0 => Ok(()),
            delay => Err(format!("its events were held back for {delay} us")),
        }
    });
}

#[test]
fn a_storm_of_events_costs_less_and_less() {
    let mut world = besieged(1, Habits { requests: 0, ..victim() }, &[STORM]);
    let start = world.backend.turns;
    // Nobody but the storming guest acts, once in 50 us, for ten seconds, and it sends events without requests: whoever
    // sends requests with them only uses its disk.
    world.shared.preempt.set(false);
    while !world.backend.start() {}
    while world.shared.clock.now_us() < 10_000_000 {
        world.shared.xen.borrow_mut().guest_notify(100, 1);
        world.shared.clock.advance_to(world.shared.clock.now_us() + 50);
        if world.backend.wants_turn() {
            world.backend.turn();
        }
    }
    world.shared.check().unwrap();
    // 8 a second and turns of the port's life before the delay is full.
    let turns = world.backend.turns - start;
    assert!(turns < 220, "{turns} turns in 10 s for 200 000 events");
    assert!(turns > 60, "{turns}: the port was never let through again");
}
