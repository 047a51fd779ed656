//! The NBD server beside a disk in memory and a clock of the test: how long it waits for whom, what a client can hold, and the
//! inputs of fuzzing.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, clippy::print_stdout, dead_code, unreachable_pub)]

#[path = "../fuzz/bodies/nbd_server.rs"]
mod nbd_server;
mod nbd_support;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nbd_server::{Memory, export, round};
use nbd_support::Dice;
use vbdd::limits::{NBD_CLIENT_BYTES, NBD_HANDSHAKE_AGE, NBD_MESSAGE_AGE, NBD_REQUESTS_MAX};
use vbdd::nbd::server::Server;
use vbdd::nbd::wire::{Request, command, option};
use vbdd::reactor::Reactor;

struct World {
    server: Server,
    disks: Memory,
    reactor: Reactor,
    now: Duration,
}

impl World {
    fn new() -> World {
        let mut server = Server::new(0);
        server.add_export(export(false));
        let (disks, reactor) = (Memory::new(64 << 20), Reactor::new().unwrap());
        let mut world = World { server, disks, reactor, now: Duration::from_secs(1) };
        world.turn(0);
        world
    }

    fn connect(&mut self) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        self.server.enter(OwnedFd::from(far), &mut self.disks, &mut self.reactor);
        near
    }

    /// A client that is ready to ask; replies are simple.
    fn ready(&mut self) -> UnixStream {
        let mut near = self.connect();
        let mut words = 3_u32.to_be_bytes().to_vec();
        words.extend(b"IHAVEOPT");
        words.extend(option::EXPORT_NAME.to_be_bytes());
        words.extend([0; 4]);
        near.write_all(&words).unwrap();
        self.turn(1);
        assert_eq!(near.read(&mut [0; 1000]).unwrap(), 18 + 10);
        near
    }

    fn turn(&mut self, answers: usize) -> bool {
        round(&mut self.server, &mut self.disks, &mut self.reactor, self.now, answers)
    }

    fn later(&mut self, time: Duration) {
        self.now += time;
        self.turn(10);
    }
}

fn ask(stream: &mut UnixStream, command: u16, cookie: u64, offset_bytes: u64, length_bytes: u32) {
    let request = Request { flags: 0, command, cookie, offset_bytes, length_bytes };
    stream.write_all(&request.to_bytes()).unwrap();
}

fn is_closed(stream: &mut UnixStream) -> bool {
    let mut bytes = vec![0; 1 << 20];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

const MOMENT: Duration = Duration::from_secs(1);

#[test]
fn a_handshake_ends_in_time_or_the_connection_does() {
    let mut world = World::new();
    let (mut silent, mut slow, mut ready) = (world.connect(), world.connect(), world.ready());
    slow.write_all(&3_u32.to_be_bytes()).unwrap();
    world.later(NBD_HANDSHAKE_AGE - MOMENT);
    slow.write_all(b"IHAVE").unwrap();
    world.turn(0);
    assert!(!is_closed(&mut silent) && !is_closed(&mut slow));
    assert!(world.server.deadline().unwrap() <= world.now + MOMENT);
    world.later(MOMENT);
    assert!(is_closed(&mut silent) && is_closed(&mut slow), "whatever it had said");
    world.later(NBD_MESSAGE_AGE * 100);
    assert!(!is_closed(&mut ready), "who is ready may be silent for ever");
    assert_eq!(world.server.deadline(), None);
}

#[test]
fn a_message_that_was_begun_is_ended_in_time_or_the_connection_is() {
    for begun in [5, 28, 28 + 4095] {
        let mut world = World::new();
        let mut client = world.ready();
        let request =
            Request { flags: 0, command: command::WRITE, cookie: 1, offset_bytes: 0, length_bytes: 4096 };
        let mut text = request.to_bytes().to_vec();
        text.resize(28 + 4096, 1);
        // Any number of whole messages takes any time.
        for _ in 0..3 {
            client.write_all(&text[..begun]).unwrap();
            world.later(NBD_MESSAGE_AGE - MOMENT);
            client.write_all(&text[begun..]).unwrap();
            world.later(MOMENT / 2);
            world.turn(1);
            assert!(!is_closed(&mut client), "{begun}");
        }
        client.write_all(&text[..begun]).unwrap();
        world.later(MOMENT);
        // One byte more is no whole message.
        client.write_all(&text[begun..begun + 1]).unwrap();
        world.later(NBD_MESSAGE_AGE - 2 * MOMENT);
        assert!(begun == text.len() - 1 || !is_closed(&mut client), "{begun}");
        world.later(2 * MOMENT);
        assert_eq!(is_closed(&mut client), begun < text.len() - 1, "{begun}");
        drop(client);
        world.later(MOMENT);
        assert_eq!((world.disks.pool.used_bytes(), world.server.in_flight()), (0, 0));
    }
}

#[test]
fn who_does_not_take_replies_is_cut_off_and_others_are_served_meanwhile() {
    let mut world = World::new();
    let mut deaf: Vec<UnixStream> = (0..10).map(|_| world.ready()).collect();
    for client in &mut deaf {
        (0..20).for_each(|cookie| ask(client, command::READ, cookie, 0, 1 << 20));
    }
    for _ in 0..200 {
        world.turn(5);
    }
    assert!(!world.turn(0), "who waits, waits at rest");
    let mut ready = Vec::new();
    world.reactor.wait(Some(Duration::ZERO), &mut ready);
    assert!(ready.is_empty(), "{ready:?}");
    let mut honest = world.ready();
    let length = NBD_CLIENT_BYTES as u32 / 2;
    for cookie in 0..4 {
        ask(&mut honest, command::READ, cookie, 0, length);
    }
    let (mut got, mut bytes) = (0, vec![0; 1 << 20]);
    for _ in 0..100 {
        world.turn(5);
        got += honest.read(&mut bytes).unwrap_or(0);
    }
    assert_eq!(got as u32, 4 * (16 + length));
    // More than its own share is had when the others are gone.
    ask(&mut honest, command::READ, 9, 0, 1 << 20);
    world.turn(5);
    assert!(honest.read(&mut bytes).is_err());
    // Those who waited for memory themselves make others wait once more.
    world.later(NBD_MESSAGE_AGE);
    world.later(NBD_MESSAGE_AGE);
    for _ in 0..100 {
        world.turn(5);
        got += honest.read(&mut bytes).unwrap_or(0);
    }
    assert_eq!(got as u32, 5 * 16 + 4 * length + (1 << 20));
    assert!(deaf.iter_mut().all(is_closed));
    assert_eq!(world.server.clients(), 1);
}

#[test]
fn a_client_has_so_many_requests_in_flight_and_no_more() {
    let mut world = World::new();
    let mut client = world.ready();
    let flush = Request { flags: 0, command: command::FLUSH, cookie: 1, offset_bytes: 0, length_bytes: 0 };
    client.write_all(&flush.to_bytes().repeat(1000)).unwrap();
    for _ in 0..20 {
        world.turn(0);
    }
    assert_eq!((world.disks.asked.len(), world.server.in_flight()), (NBD_REQUESTS_MAX, NBD_REQUESTS_MAX));
    for _ in 0..400 {
        world.turn(10);
    }
    assert_eq!(client.read(&mut vec![0; 20_000]).unwrap(), 1000 * 16);
}

#[test]
fn an_export_that_is_removed_takes_its_clients_along() {
    let mut world = World::new();
    let other = world.server.add_export(vbdd::nbd::server::Export { name: "b".into(), ..export(false) });
    let mut client = world.connect();
    let mut words = 3_u32.to_be_bytes().to_vec();
    words.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x01b");
    client.write_all(&words).unwrap();
    world.turn(0);
    ask(&mut client, command::WRITE_ZEROES, 1, 0, 512);
    ask(&mut client, command::READ, 2, 0, 512);
    world.turn(0);
    assert_eq!(world.server.requests_of(other), 2);
    world.server.remove_export(other, &mut world.disks, &mut world.reactor);
    assert!(is_closed(&mut client));
    assert_eq!(world.server.requests_of(other), 2, "what the disk has, it has");
    world.turn(2);
    assert_eq!((world.server.requests_of(other), world.disks.pool.used_bytes()), (0, 0));
}

#[test]
fn inputs_of_the_corpus() {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/nbd_server");
    let mut count = 0;
    for entry in std::fs::read_dir(&place).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        nbd_server::play(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 20, "{count} inputs in {}", place.display());
}

#[test]
fn inputs_drawn_at_random() {
    let count = std::env::var("VBDD_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    for seed in 0..count {
        println!("seed {seed}");
        let mut dice = Dice::new(seed + 1);
        let mut bytes: Vec<u8> = (0..dice.below(600)).map(|_| dice.below(256) as u8).collect();
        if let Some(how) = bytes.first_mut() {
            *how |= 2;
        }
        nbd_server::play(&bytes);
    }
}
