//! The whole host: toolstack, xenstored, guests that come and go, and a daemon that dies, restarts and reconnects.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod world;

use world::for_seeds;
use world::guest::Habits;
use world::host::Host;
use world::xenstore::Faults;

fn host(seed: u64, guests: u16, requests: u32, doomed: bool) -> Host {
    let mut host = Host::new(seed);
    for n in 0..guests {
        let habits = Habits { requests, ..Habits::new(n + 1, 0) };
        host.plug(habits, doomed && n % 2 == 0);
    }
    host
}

#[test]
fn guests_connect_work_and_leave() {
    for_seeds(5, |seed| host(seed, 3, 60, false).run(|_| ()));
}

#[test]
fn xenstored_at_its_worst_changes_nothing() {
    for_seeds(10, |seed| {
        let mut host = host(seed, 3, 60, false);
        host.store.faults = Faults::MANY;
        host.run(|host| {
            if host.shared.chance(1, 2000) {
                host.reconnect();
            }
        })
    });
}

#[test]
fn domains_die_at_any_moment() {
    for_seeds(5, |seed| host(seed, 4, 200, true).run(|_| ()));
}

#[test]
fn a_daemon_that_dies_or_is_restarted_is_not_noticed() {
    let (mut deaths, mut handovers) = (0, 0);
    for seed in 0..16 {
        let mut host = host(seed, 3, 150, false);
        host.run(restarts).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
        deaths += host.deaths;
        handovers += host.handovers;
    }
    assert!(
        deaths >= 30 && handovers >= 15,
        "{deaths} deaths, {handovers} handovers: too few to show anything"
    );
}

#[test]
fn all_of_it_at_once() {
    for_seeds(10, |seed| {
        let mut host = host(seed, 4, 150, true);
        host.store.faults = Faults::MANY;
        host.shared.faults.set(world::Faults {
            latency_us_max: 500,
            slow: 50,
            overflow: 20,
            ..Default::default()
        });
        host.run(|host| {
            restarts(host);
            if host.shared.chance(1, 1000) {
                host.reconnect();
            }
        })
    });
}

/// Kills the daemon at some call, or asks it to end, now and then.
fn restarts(host: &mut Host) {
    if host.shared.countdown.get().is_none() && host.shared.chance(1, 300) {
        host.shared.countdown.set(Some(host.shared.below(300)));
    } else if host.shared.chance(1, 1000) {
        host.stop();
    }
}
