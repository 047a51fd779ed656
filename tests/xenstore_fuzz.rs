//! Random and mutated bytes at both ends: nobody panics, hangs or grows.
//!
//! Longer runs: `XENSTORE_FUZZ_ROUNDS=n`; replay: `XENSTORE_SEED=n`.
// Helpers of tests may fail loudly, as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

pub mod world;

use ::xenstore::wire::{self, HEADER_BYTES, Header, MessageType};
use ::xenstore::{Client, Config, Edit, Event, Guard, Job, Path, WatchToken, limits};
use world::rng::Rng;
use world::xenstore::XenstoreServer;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn rounds() -> impl Iterator<Item = u64> {
    let seed = number("XENSTORE_SEED");
    let first = seed.unwrap_or(0);
    let count = if seed.is_some() { 1 } else { number("XENSTORE_FUZZ_ROUNDS").unwrap_or(150) };
    first..first + count
}

fn path(text: &str) -> Path {
    Path::parse(text).unwrap()
}

/// Some payload: plausible, or junk.
fn payload(rng: &mut Rng) -> Vec<u8> {
    const PIECES: [&[u8]; 14] = [
        b"OK\0",
        b"EAGAIN\0",
        b"ENOENT\0",
        b"/a\0",
        b"/w/x\0",
        b"1\0",
        b"2\0",
        b"0\0",
        b"n0\0",
        b"a\0",
        b"\0",
        b"",
        b"T\0",
        b"\xff\xfe",
    ];
    let mut bytes: Vec<u8> = (0..rng.below(4)).flat_map(|_| rng.pick(&PIECES).to_vec()).collect();
    if rng.chance(1, 10) {
        bytes.extend((0..rng.below(5000)).map(|_| b'x'));
    }
    bytes
}

/// A message that may be wrong in any of its fields.
fn message(rng: &mut Rng, likely_request: u32) -> Vec<u8> {
    let payload = payload(rng);
    let length = match rng.below(12) {
        0 => u32::try_from(rng.below(6000)).unwrap(),
        1 => u32::MAX,
        _ => u32::try_from(payload.len()).unwrap(),
    };
    let request = if rng.chance(1, 8) { u32::try_from(rng.below(90)).unwrap() } else { likely_request };
    let kind = u32::try_from(rng.below(25)).unwrap();
    let mut bytes = Header { kind, request, transaction: u32::try_from(rng.below(3)).unwrap(), length }
        .to_bytes()
        .to_vec();
    bytes.extend(payload);
    bytes
}

fn jobs(client: &mut Client, rng: &mut Rng) {
    const PLACES: [&str; 3] = ["/a", "/b/c", "/w"];
    let at = path(PLACES[rng.below(3)]);
    let job = match rng.below(6) {
        0 => Job::Read(vec![at; rng.below(5)]),
        1 => Job::List(at),
        2 => Job::Permissions(at),
        3 => Job::Edit(Edit::Write(at, vec![1; rng.below(100)])),
        4 => Job::Edit(Edit::Remove(at)),
        _ => Job::Transaction {
            guards: vec![(at.clone(), Guard::Exists); rng.below(3)],
            edits: vec![Edit::Mkdir(at); rng.below(3)],
        },
    };
    let _ = client.submit(job);
}

#[test]
fn the_client_survives_any_server() {
    let (mut broken, mut answered) = (0, 0);
    for seed in rounds() {
        let mut rng = Rng::new(seed);
        let mut client = Client::new(Config { seed, ..Config::default() });
        client.connected();
        for token in 0..3 {
            client.watch(&path("/w"), WatchToken(token)).unwrap();
        }
        let mut last = (0, MessageType::Read);
        for turn in 0..300_u64 {
            jobs(&mut client, &mut rng);
            while let Some(bytes) = client.transmit() {
                let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
                last = (header.request, MessageType::from_number(header.kind).unwrap());
                let length = bytes.len();
                client.transmitted(length);
                // Mostly a proper type, so that replies get beyond the header.
                if rng.chance(9, 10) {
                    let kind = if rng.chance(1, 6) { MessageType::Error } else { last.1 };
                    let reply = wire::encode(kind, last.0, 0, &[&payload(&mut rng)]);
                    if let Some(reply) = reply
                        && client.receive(&reply).is_ok()
                    {
                        answered += 1;
                    }
                }
            }
            let mut bytes = message(&mut rng, last.0);
            if rng.chance(1, 4) && !bytes.is_empty() {
                let at = rng.below(bytes.len());
                bytes[at] ^= 1 << rng.below(8);
            }
            let split = rng.below(bytes.len() + 1);
            let result = client.receive(&bytes[..split]).and_then(|()| client.receive(&bytes[split..]));
            assert!(client.requests_outstanding() <= limits::REQUESTS_OUTSTANDING_MAX);
            if result.is_err() {
                broken += 1;
                assert!(!client.is_connected());
                client.disconnected();
                client.connected();
            }
            client.handle_time(turn * 50);
            let mut events = 0;
            while let Some(event) = client.event() {
                events += 1;
                assert!(
                    events <= limits::JOBS_MAX + 3 * limits::EVENTS_PER_WATCH_MAX + 8,
                    "events without end"
                );
                if let Event::Watch { path: at, .. } = event {
                    assert!(at.is_within(&path("/w")));
                }
            }
        }
    }
    println!("{answered} replies taken, {broken} connections broken");
    assert!(answered > 1000 && broken > 1000);
}

#[test]
fn the_simulated_server_survives_any_client() {
    let mut replies = 0;
    for seed in rounds() {
        let mut rng = Rng::new(seed);
        let mut server = XenstoreServer::new(seed);
        server.introduce_domain(3);
        for turn in 0..60_usize {
            let client = server.connect(if turn % 2 == 0 { 0 } else { 3 });
            for _ in 0..rng.below(30) {
                let request = u32::try_from(turn).unwrap();
                let bytes = if rng.chance(1, 30) {
                    (0..rng.below(100)).map(|_| u8::try_from(rng.below(256)).unwrap()).collect()
                } else {
                    message(&mut rng, request)
                };
                server.receive(client, &bytes);
            }
            server.settle();
            replies += server.transmit(client, usize::MAX).len() / HEADER_BYTES;
            if rng.chance(1, 2) {
                server.disconnect(client);
            }
        }
        assert!(server.store().node("/").is_some());
        for (at, node) in server.store().nodes() {
            for child in &node.children {
                let child = if at == "/" { format!("/{child}") } else { format!("{at}/{child}") };
                assert!(
                    server.store().node(&child).is_some(),
                    "{child} is listed and not there (seed {seed})"
                );
            }
        }
    }
    assert!(replies > 1000);
}
