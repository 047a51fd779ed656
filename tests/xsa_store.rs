//! The security advisories about xenstore, its events and its races, each against the whole backend in the simulated world.
//! What each is about, and the rows that need no code: `docs/design/hostile.md`.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

#[path = "backend_world/host.rs"]
mod host;
mod hostile_support;
mod world;

use std::time::Duration;

use ::xenstore::{Access, Permission};
use host::Host;
use hostile_support::lines;
use hostile_support::neighbour::{NEIGHBOUR, ends_well, host};
use hostile_support::puppet::{DOMAIN, Puppet};
use rings::Abi;
use rings::request::operation::{READ, WRITE};
use world::Faults;

#[test]
fn xsa_349_a_flood_of_watch_events_is_bounded_work() {
    let (mut host, path) = host();
    let puppet = Puppet::connected(&mut host, DOMAIN, Abi::X86_64, &path, "w");
    host.settle();
    let before = host.session.statistics();
    let (turns, start) = (host.turns, host.shared.clock.now());
    // The state again and again, and hundreds of nodes below it, whose events arrive under the same watch.
    let fe = Host::fe(DOMAIN);
    for n in 0..30_000_u32 {
        host.store.write(DOMAIN, &format!("{fe}/state"), b"4").unwrap();
        host.store.write(DOMAIN, &format!("{fe}/state/{}", n % 500), b"x").unwrap();
        if n % 10 == 0 {
            host.round();
        }
    }
    host.settle();
    let seconds = (host.shared.clock.now() - start).as_secs();
    let after = host.session.statistics();
    let requests = after.requests - before.requests;
    // A read of the world is some 30 requests: 20 at once and 10 a second.
    let bound = (20 + 10 * (seconds + 1)) * 40;
    assert!(requests < bound, "{requests} requests in {seconds} s for 60 000 events, bound {bound}");
    assert!(host.turns - turns < 60_000, "{} turns", host.turns - turns);
    drop(puppet);
    ends_well(host);
}

#[test]
fn xsa_350_states_that_race_with_requests_in_flight() {
    for seed in 0..6 {
        let (mut host, path) = host();
        let mut puppet = Puppet::connected(&mut host, DOMAIN, Abi::X86_64, &path, "w");
        // Transfers that outlast many changes of state: what ends late must not touch a ring that is gone.
        host.shared.faults.set(Faults { latency_us_max: 400_000, ..Faults::default() });
        let mut n = seed;
        for round in 0..60 {
            let whole = puppet.whole(round % 16);
            for k in 0..8 {
                if puppet.front.free() > 0 {
                    puppet.front.write([READ, WRITE][k % 2], k as u64, 0, &[whole], 1);
                }
            }
            let _ = puppet.front.publish();
            puppet.kick(&host);
            n = n * 1_103_515_245 % 1_000_003 + 12_345;
            host.run_for(Duration::from_micros((n % 60_000) as u64));
            let state = ["6", "1", "3", "5", "4", "6", "3"][n % 7];
            if state == "3" {
                puppet.renew();
            }
            host.set_fe(DOMAIN, &[("state", state)]);
            if n % 11 == 0 {
                let _ = host.store.remove(DOMAIN, &format!("{}/state", Host::fe(DOMAIN)));
            }
            assert!(host.shared.xen.borrow().maps_of(DOMAIN) <= 1, "a ring that is gone is mapped");
        }
        host.shared.faults.set(Faults { latency_us_max: 300, ..Faults::default() });
        ends_well(host);
    }
}

#[test]
fn xsa_180_what_a_guest_writes_reaches_log_and_nodes_as_one_printable_line() {
    let (mut host, path) = host();
    lines::keep();
    host.attach(DOMAIN, &path, &[]);
    host.wait_be(DOMAIN, "2");
    let puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
    let long = "\u{1b}]0;x\u{7}".repeat(300);
    let hostile =
        ["x\nERROR all is lost\r\n\u{1b}[2J", "\u{0}\u{8}\u{7f}\u{9b}31m", "\u{202e}\u{2028}gnol", &long];
    for text in hostile {
        host.set_fe(DOMAIN, &[("protocol", text), ("event-channel", &puppet.port.to_string())]);
        host.set_fe(DOMAIN, &[("ring-ref", &puppet.ring[0].to_string()), ("state", "3")]);
        host.wait_be(DOMAIN, "6");
        let error = host.be_node(DOMAIN, "error").unwrap();
        assert!(error.len() <= 250 && !error.chars().any(char::is_control), "{error:?}");
        host.set_fe(DOMAIN, &[("state", "6")]);
        host.run_for(Duration::from_secs(1));
        host.set_fe(DOMAIN, &[("state", "1")]);
        host.wait_be(DOMAIN, "2");
    }
    let kept = lines::kept("");
    assert!(kept.len() > 3);
    for line in kept {
        assert!(line.len() < 700 && !line.chars().any(char::is_control), "{line:?}");
    }
    ends_well(host);
}

#[test]
fn xsa_180_a_reconnect_storm_is_bounded_in_lines_requests_and_turns() {
    let (mut host, path) = host();
    let mut puppet = Puppet::connected(&mut host, DOMAIN, Abi::X86_64, &path, "w");
    host.wait_served(NEIGHBOUR);
    lines::keep();
    let before = host.session.statistics().requests;
    let (start, turns) = (host.shared.clock.now(), host.turns);
    let mut connects = 0;
    while host.shared.clock.now() - start < Duration::from_secs(60) {
        host.set_fe(DOMAIN, &[("state", "6")]);
        host.run_for(Duration::from_millis(2));
        host.set_fe(DOMAIN, &[("state", "1")]);
        host.run_for(Duration::from_millis(2));
        puppet.renew();
        puppet.announce(&mut host, "3");
        host.run_for(Duration::from_millis(2));
        connects += 1;
    }
    let seconds = (host.shared.clock.now() - start).as_secs();
    let requests = host.session.statistics().requests - before;
    assert!(connects > 5000, "{connects}");
    assert!(requests < (20 + 10 * seconds) * 60, "{requests} xenstore requests in {seconds} s");
    let count = lines::kept("").len() as u64;
    assert!(count <= 11 + seconds / 10, "{count} lines in {seconds} s");
    let turns = host.turns - turns;
    assert!(turns < 100 * (20 + 10 * seconds), "{turns} turns in {seconds} s");
    ends_well(host);
}

#[test]
fn xsa_175_178_only_the_toolstacks_paths_are_believed() {
    // Backend nodes that point elsewhere than at the frontend of the path itself.
    for (name, value) in [
        ("frontend", "/local/domain/100/device/vbd/51712"),
        ("frontend", "/local/domain/7/device/vbd/51713"),
        ("frontend", "/local/domain/7/device/vbd/51712/"),
        ("frontend", "/local/domain/07/device/vbd/51712"),
        ("frontend", "device/vbd/51712"),
        ("frontend", "/local/domain/7/device/vbd/51712\0"),
        ("frontend", "/local/domain/0"),
        ("frontend-id", "100"),
        ("frontend-id", "-7"),
        ("frontend-id", "65543"),
        ("frontend-id", "7 "),
        ("frontend-id", ""),
    ] {
        let (mut host, path) = host();
        host.attach(DOMAIN, &path, &[(name, Some(value))]);
        host.wait_be(DOMAIN, "6");
        assert!(host.be_node(DOMAIN, "error").unwrap().contains(name), "{name} {value:?}");
        ends_well(host);
    }
    // What the guest says of its backend, its image and its rights in its own directory is never asked for.
    let (mut host, path) = host();
    host.attach(DOMAIN, &path, &[("mode", Some("r"))]);
    host.wait_be(DOMAIN, "2");
    host.set_fe(
        DOMAIN,
        &[
            ("backend", "/local/domain/3/backend/vbd/100/51712"),
            ("backend-id", "0"),
            ("params", "/images/0"),
            ("physical-device", "8:0"),
            ("mode", "w"),
            ("online", "0"),
            ("frontend-id", "100"),
            ("script", "/bin/sh"),
            ("type", "tap"),
        ],
    );
    let puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
    puppet.announce(&mut host, "3");
    host.wait_be(DOMAIN, "4");
    assert_eq!(host.be_node(DOMAIN, "info").as_deref(), Some("4"));
    assert_eq!(host.be_node(DOMAIN, "sectors").as_deref(), Some("64"));
    let status = host.backend.as_ref().unwrap().status_text();
    assert!(status.contains("/images/1"), "{status}");
    ends_well(host);
}

#[test]
fn xsa_115_a_driver_domain_needs_no_special_watch_and_sees_a_guest_go() {
    let (mut host, path) = host();
    let puppet = Puppet::connected(&mut host, DOMAIN, Abi::X86_64, &path, "w");
    let watches = host.watches();
    assert!(
        watches.len() >= 3 && watches.iter().all(|path| path.starts_with("/local/domain/")),
        "{watches:?}"
    );
    // xenstored drops what the domain owned; there is no event for it but the toolstack's.
    drop(puppet);
    host.destroy_domain(DOMAIN);
    host.store.release_domain(DOMAIN);
    host.set_be(DOMAIN, &[("online", "0"), ("state", "5")]);
    host.run_until("unmapped", |host| host.shared.xen.borrow().maps_of(DOMAIN) == 0);
    ends_well(host);
}

#[test]
fn xsa_322_326_416_417_419_nodes_that_vanish_or_are_hidden_at_any_step() {
    let frontend = ["state", "ring-ref", "event-channel", "protocol", ""];
    let backend = ["state", "params", "online", "frontend", "frontend-id", "mode", "type", "sectors", ""];
    let names = frontend.map(|name| (true, name)).into_iter().chain(backend.map(|name| (false, name)));
    for (front, name) in names {
        for step in 0..5 {
            for hide in [false, true] {
                if hide && !front {
                    continue;
                }
                let (mut host, path) = host();
                host.attach(DOMAIN, &path, &[]);
                let victim = if front { Host::fe(DOMAIN) } else { host.be(DOMAIN) };
                let victim = if name.is_empty() { victim } else { format!("{victim}/{name}") };
                let vanish = |host: &mut Host| {
                    if hide {
                        let hidden = [Permission { domain: DOMAIN, access: Access::None }];
                        let _ = host.store.set_permissions(DOMAIN, &victim, &hidden);
                    } else {
                        let _ = host.store.remove(0, &victim);
                    }
                    host.run_for(Duration::from_millis(300));
                };
                let mut puppet = Puppet::new(&host.shared, DOMAIN, Abi::X86_64, 1);
                let write_fe = |host: &mut Host, name: &str, value: &str| {
                    let _ =
                        host.store.write(DOMAIN, &format!("{}/{name}", Host::fe(DOMAIN)), value.as_bytes());
                };
                for now in 0..5 {
                    if now == step {
                        vanish(&mut host);
                    }
                    match now {
                        0 => host.run_for(Duration::from_millis(300)),
                        1 => {
                            for (name, value) in puppet.nodes() {
                                write_fe(&mut host, &name, &value);
                            }
                        }
                        2 => write_fe(&mut host, "state", "3"),
                        3 => write_fe(&mut host, "state", "4"),
                        _ => {
                            let whole = puppet.whole(0);
                            puppet.front.write(WRITE, 1, 0, &[whole], 1);
                            let _ = puppet.front.publish();
                            puppet.kick(&host);
                        }
                    }
                    host.run_for(Duration::from_millis(300));
                }
                ends_well(host);
            }
        }
    }
}
