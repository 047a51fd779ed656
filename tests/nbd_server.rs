//! `vbdd nbd` and a client of our own: every option and command, what is refused, and clients that mean no good.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod nbd_support;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nbd_support::{Client, Dice, Reply, Scratch, Served, contexts, info, joined, run};
use vbdd::nbd::wire::{BASE_ALLOCATION, command, error, flag, option, option_reply, state, transmission};

const MIB: u64 = 1 << 20;

fn raw(dir: &Scratch, bytes: u64) -> &'static str {
    std::fs::File::create(dir.path("a.raw")).unwrap().set_len(bytes).unwrap();
    "raw:a.raw"
}

#[test]
fn every_option_has_its_answer() {
    let dir = Scratch::new("options");
    let served = Served::new(&dir, raw(&dir, MIB), &["--export", "disk one"]);
    let mode = std::fs::metadata(&served.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = served.connect();
    let mut answers = |option: u32, data: &[u8]| {
        client.option(option, data);
        let mut all = Vec::new();
        loop {
            let (to, kind, data) = client.option_reply();
            assert_eq!(to, option);
            all.push((kind, data));
            if kind == option_reply::ACK || kind & option_reply::ERROR != 0 {
                return all;
            }
        }
    };
    let kinds = |answers: Vec<(u32, Vec<u8>)>| answers.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>();
    let listed = answers(option::LIST, &[]);
    assert_eq!(listed[0].0, option_reply::SERVER);
    assert!(listed[0].1.starts_with(b"\0\0\0\x08disk one"));
    assert_eq!(kinds(answers(option::LIST, b"x")), [option_reply::ERR_INVALID]);
    assert_eq!(kinds(answers(option::STARTTLS, &[])), [option_reply::ERR_UNSUP]);
    assert_eq!(kinds(answers(99, b"whatever")), [option_reply::ERR_UNSUP]);
    assert_eq!(kinds(answers(option::LIST, &vec![0; 100_000])), [option_reply::ERR_TOO_BIG]);
    assert_eq!(kinds(answers(option::INFO, &info("other", &[]))), [option_reply::ERR_UNKNOWN]);
    assert_eq!(kinds(answers(option::GO, &[0, 0, 0, 9, 1])), [option_reply::ERR_INVALID]);
    let known = contexts("", &[BASE_ALLOCATION]);
    assert_eq!(kinds(answers(option::SET_META_CONTEXT, &known)), [option_reply::ERR_INVALID]);
    assert_eq!(kinds(answers(option::STRUCTURED_REPLY, &[])), [option_reply::ACK]);
    let both = [option_reply::META_CONTEXT, option_reply::ACK];
    for queries in [&[][..], &["base:"], &["qemu:", BASE_ALLOCATION]] {
        assert_eq!(kinds(answers(option::LIST_META_CONTEXT, &contexts("", queries))), both, "{queries:?}");
    }
    for queries in [&[][..], &["base:"], &["qemu:dirty-bitmap:x"]] {
        assert_eq!(kinds(answers(option::SET_META_CONTEXT, &contexts("", queries))), [option_reply::ACK]);
    }
    let unknown = contexts("other", &[BASE_ALLOCATION]);
    assert_eq!(kinds(answers(option::SET_META_CONTEXT, &unknown)), [option_reply::ERR_UNKNOWN]);
    assert_eq!(kinds(answers(option::SET_META_CONTEXT, &known[..9])), [option_reply::ERR_INVALID]);
    let told = answers(option::INFO, &info("", &[1, 2, 3, 77]));
    let told: Vec<&[u8]> = told.iter().map(|(_, data)| &data[..]).collect();
    assert_eq!(told[0][..10], *b"\0\0\0\0\0\0\0\x10\0\0");
    assert_eq!(told[1], b"\0\x03\0\0\x02\0\0\0\x10\0\0\x10\0\0");
    assert_eq!(told[2], b"\0\x01disk one");
    assert!(told[3].starts_with(b"\0\x02raw image /"));
    assert_eq!(kinds(answers(option::SET_META_CONTEXT, &contexts("disk one", &[BASE_ALLOCATION]))), both);
    // What is agreed on for one name holds for the other name of the same export.
    assert_eq!(client.go(""), option_reply::ACK);
    let wanted = transmission::HAS_FLAGS | transmission::SEND_DF | transmission::CAN_MULTI_CONN;
    assert_eq!((client.flags & wanted, client.flags & transmission::READ_ONLY), (wanted, 0));
    client.structured = true;
    let status = client.call(command::BLOCK_STATUS, 0, 0, MIB as u32, &[]);
    assert_eq!((status.error, status.extents), (0, vec![(MIB as u32, 0)]));
    client.leave();
    let mut client = served.connect();
    client.option(option::ABORT, &[]);
    assert_eq!(client.option_reply().1, option_reply::ACK);
    assert!(client.is_closed());
    served.stop();
}

#[test]
fn the_old_way_to_begin() {
    let dir = Scratch::new("old");
    let served = Served::new(&dir, raw(&dir, MIB), &[]);
    for (flags, padding) in [(1_u32, 124), (3, 0), (0, 124)] {
        let mut client = Client::silent(UnixStream::connect(&served.socket).unwrap());
        client.take(18);
        client.send(&flags.to_be_bytes());
        client.option(option::EXPORT_NAME, b"");
        assert_eq!(client.u64(), MIB);
        assert_eq!(client.u16() & 1, 1);
        assert_eq!(client.take(padding), vec![0; padding]);
        assert_eq!(client.read(100, 33), vec![0; 33]);
        client.leave();
    }
    let mut client = served.connect();
    client.option(option::EXPORT_NAME, b"no such");
    assert!(client.is_closed());
    let mut client = Client::silent(UnixStream::connect(&served.socket).unwrap());
    client.take(18);
    client.send(&4_u32.to_be_bytes());
    assert!(client.is_closed(), "flags that nobody knows");
    served.stop();
}

#[test]
fn what_cannot_be_is_refused_and_does_no_harm() {
    let dir = Scratch::new("refused");
    let size = 3 * MIB;
    for structured in [false, true] {
        let served = Served::new(&dir, raw(&dir, size), &[]);
        let mut client = served.connect().ready(structured);
        let errors = |reply: Reply| reply.error;
        let call = |client: &mut Client, command, flags, offset, length| {
            let data = if command == command::WRITE { vec![7; length as usize] } else { Vec::new() };
            errors(client.call(command, flags, offset, length, &data))
        };
        for (command, flags, offset, length, expected) in [
            (command::READ, 0, size, 1, error::EINVAL),
            (command::READ, 0, size - 1, 2, error::EINVAL),
            (command::READ, 0, u64::MAX, 1, error::EINVAL),
            (command::READ, 0, 0, MIB as u32 + 1, error::EOVERFLOW),
            (command::READ, 0, 1, MIB as u32, error::EOVERFLOW),
            (command::READ, 1 << 9, 0, 512, error::EINVAL),
            (command::READ, flag::NO_HOLE, 0, 512, error::EINVAL),
            (command::WRITE, 0, size, 512, error::ENOSPC),
            (command::WRITE, 0, u64::MAX - 100, 512, error::ENOSPC),
            (command::WRITE, 0, 1, 512, error::EINVAL),
            (command::WRITE, 0, 0, 511, error::EINVAL),
            (command::WRITE, 0, 0, 2 * MIB as u32, error::EOVERFLOW),
            (command::WRITE, flag::DF, 0, 512, error::EINVAL),
            (command::WRITE_ZEROES, 0, 512, 100, error::EINVAL),
            (command::WRITE_ZEROES, 0, size, 512, error::ENOSPC),
            (command::WRITE_ZEROES, flag::FAST_ZERO, 0, 512, error::ENOTSUP),
            (command::TRIM, 0, size, 512, error::ENOSPC),
            (command::BLOCK_STATUS, 0, size, 512, error::EINVAL),
            (command::BLOCK_STATUS, 0, 0, 0, error::EINVAL),
            (5, 0, 0, 512, error::EINVAL),
            (77, 0, 0, 512, error::EINVAL),
        ] {
            let got = call(&mut client, command, flags, offset, length);
            assert_eq!(got, expected, "command {command} flags {flags} at {offset} + {length}, {structured}");
        }
        for (command, flags, offset, length) in [
            (command::READ, flag::FUA, 0, 0),
            (command::WRITE, flag::FUA, 0, 512),
            (command::TRIM, flag::FUA, 5, 100),
            (command::TRIM, 0, 5, 5000),
            (command::FLUSH, 0, 0, 0),
            (command::WRITE_ZEROES, flag::FUA | flag::NO_HOLE, 512, MIB as u32),
        ] {
            assert_eq!(call(&mut client, command, flags, offset, length), 0, "command {command}");
        }
        let status = client.call(command::BLOCK_STATUS, flag::REQ_ONE, 700, 1000, &[]);
        assert_eq!(status.error, if structured { 0 } else { error::EINVAL });
        assert_eq!(status.extents, if structured { vec![(1000, 0)] } else { vec![] });
        assert_eq!(client.read(0, 1024), [vec![7; 512], vec![0; 512]].concat());
        client.leave();
        served.stop();
    }
    let served = Served::new(&dir, "raw:a.raw", &["--read-only"]);
    let mut client = served.connect().ready(true);
    assert_eq!(client.flags & transmission::READ_ONLY, transmission::READ_ONLY);
    for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        let data = if command == command::WRITE { vec![9; 512] } else { Vec::new() };
        assert_eq!(client.call(command, 0, 0, 512, &data).error, error::EPERM);
    }
    assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(client.read(0, 512), vec![7; 512]);
    served.stop();
}

/// Requests of several connections, many at a time, beside a shadow.
fn shadowed(served: &Served, shadow: &mut [u8], seed: u64) {
    let mut dice = Dice::new(seed);
    let mut clients: Vec<Client> = (0..3).map(|at| served.connect().ready(at != 1)).collect();
    let mut zeroes = 0;
    for _ in 0..60 {
        // Ranges of a round do not meet, so that their order does not matter.
        let lane = shadow.len() as u64 / 24;
        let mut asked = Vec::new();
        for number in 0..24_u64 {
            let client = dice.below(3) as usize;
            let (base, length) = (number * lane, (1 + dice.below(lane / 512)) * 512);
            let offset = base + dice.below((lane - length) / 512 + 1) * 512;
            let range = offset as usize..(offset + length) as usize;
            let length = length as u32;
            let fua = if dice.below(5) == 0 { flag::FUA } else { 0 };
            let one = &mut clients[client];
            match dice.below(8) {
                0..3 => {
                    let data: Vec<u8> =
                        range.clone().map(|at| (at as u64 / 512 + seed + number) as u8 | 1).collect();
                    one.ask(number, command::WRITE, fua, offset, length, &data);
                    shadow[range.clone()].copy_from_slice(&data);
                }
                3 => {
                    let hole = if dice.below(2) == 0 { flag::NO_HOLE } else { 0 };
                    one.ask(number, command::WRITE_ZEROES, fua | hole, offset, length, &[]);
                    shadow[range.clone()].fill(0);
                }
                4 => {
                    one.ask(number, command::TRIM, fua, offset, length, &[]);
                    asked.push((client, number, range, 4));
                    continue;
                }
                5 => one.ask(number, command::FLUSH, 0, 0, 0, &[]),
                kind => {
                    // Bytes, not sectors.
                    let range = range.start + 3..range.end - 5;
                    let flags = if kind == 6 && client != 1 { flag::DF } else { 0 };
                    one.ask(number, command::READ, flags, offset + 3, length - 8, &[]);
                    asked.push((client, number, range, 1));
                    continue;
                }
            }
            asked.push((client, number, range, 0));
        }
        for (client, one) in clients.iter_mut().enumerate() {
            for _ in 0..asked.iter().filter(|(who, ..)| *who == client).count() {
                let reply = one.reply();
                let (_, _, range, kind) =
                    asked.iter().find(|(_, number, ..)| *number == reply.cookie).unwrap();
                assert_eq!(reply.error, 0);
                if *kind == 1 {
                    let data = joined(&reply, range.start as u64, range.len() as u32);
                    assert!(data == shadow[range.clone()], "{range:?} of seed {seed}");
                }
            }
        }
        // What is trimmed is zero, or what it was.
        for (_, _, range, _) in asked.iter().filter(|(.., kind)| *kind == 4) {
            let now = clients[0].read(range.start as u64, range.len() as u32);
            for (old, new) in shadow[range.clone()].chunks_mut(512).zip(now.chunks(512)) {
                assert!(old == new || new.iter().all(|byte| *byte == 0));
                old.copy_from_slice(new);
            }
        }
        zeroes += check_status(&mut clients[0], shadow);
    }
    println!("{zeroes} bytes said to be nowhere");
    clients.into_iter().for_each(Client::leave);
}

/// What is said to be a hole reads as zero.
fn check_status(client: &mut Client, shadow: &[u8]) -> usize {
    let (mut at, mut zeroes) = (0, 0);
    while at < shadow.len() {
        let status = client.call(command::BLOCK_STATUS, 0, at as u64, (shadow.len() - at) as u32, &[]);
        assert!(status.error == 0 && !status.extents.is_empty());
        for (length, flags) in status.extents {
            let range = at..at + length as usize;
            if flags == state::HOLE | state::ZERO {
                assert!(shadow[range.clone()].iter().all(|byte| *byte == 0), "{range:?}");
                zeroes += range.len();
            }
            at = range.end;
        }
    }
    zeroes
}

#[test]
fn several_clients_beside_a_shadow() {
    for (seed, create, image) in [
        (1, vec!["create", "-q", "-f", "raw", "i", "6M"], "raw:i"),
        (2, vec!["create", "-q", "-f", "qcow2", "i", "6M"], "qcow2:i"),
        (3, vec!["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "i", "6M"], "qcow2:i"),
        (4, vec!["create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", "i", "6M"], "vhd:i"),
    ] {
        let dir = Scratch::new("shadow");
        run(&dir, "qemu-img", &create);
        for cache in ["none", "writeback"] {
            let served = Served::new(&dir, image, &["--cache", cache]);
            let mut client = served.connect().ready(true);
            let mut shadow: Vec<u8> = (0..6).flat_map(|at| client.read(at * MIB, MIB as u32)).collect();
            client.leave();
            shadowed(&served, &mut shadow, seed);
            served.stop();
            let format = create[3];
            run(&dir, "qemu-img", &["convert", "-f", format, "-O", "raw", "i", "out"]);
            assert!(std::fs::read(dir.path("out")).unwrap() == shadow, "{image}, {cache}");
            if format == "qcow2" {
                run(&dir, "qemu-img", &["check", "-f", "qcow2", "i"]);
            }
        }
    }
}

#[test]
fn reads_of_nothing_come_as_holes_and_long_ones_in_parts() {
    let dir = Scratch::new("holes");
    let served = Served::new(&dir, raw(&dir, 4 * MIB), &[]);
    let mut client = served.connect().ready(true);
    let reply = client.call(command::READ, 0, 0, MIB as u32, &[]);
    assert_eq!((reply.data.len(), reply.holes), (1, 1));
    assert_eq!(client.call(command::WRITE, 0, 128 << 10, 512, &[5; 512]).error, 0);
    assert_eq!(client.call(command::WRITE, 0, MIB - 512, 512, &[6; 512]).error, 0);
    let reply = client.call(command::READ, 0, 0, MIB as u32, &[]);
    let lengths: Vec<usize> = reply.data.iter().map(|(_, data)| data.len() >> 10).collect();
    assert_eq!((lengths, reply.holes), (vec![128, 64, 768, 64], 2));
    let expected = joined(&reply, 0, MIB as u32);
    let whole = client.call(command::READ, flag::DF, 0, MIB as u32, &[]);
    assert_eq!((whole.data.len(), whole.holes, joined(&whole, 0, MIB as u32)), (1, 0, expected));
    client.leave();
    served.stop();
}

#[test]
fn clients_that_mean_no_good_stop_nobody() {
    let dir = Scratch::new("nasty");
    let served = Served::new(&dir, raw(&dir, 8 * MIB), &[]);
    let mut honest = served.connect().ready(true);
    assert_eq!(honest.call(command::WRITE, 0, 0, 4096, &[3; 4096]).error, 0);
    let mut kept = Vec::new();
    let mut dice = Dice::new(9);
    for round in 0..300 {
        let connected = UnixStream::connect(&served.socket).unwrap();
        match round % 6 {
            // Noise instead of a handshake, and instead of requests.
            0 => {
                let noise: Vec<u8> = (0..5000).map(|_| dice.below(256) as u8).collect();
                let _ = (&connected).write_all(&noise);
            }
            1 => {
                let mut client = Client::greeted(connected).ready(dice.below(2) == 0);
                let noise: Vec<u8> = (0..200).map(|_| dice.below(256) as u8).collect();
                client.send(&noise);
                assert!(client.is_closed());
            }
            // Half a header, half the data of a write; then gone.
            2 => Client::greeted(connected).ready(true).send(&[0x25, 0x60, 0x95]),
            3 => Client::greeted(connected).ready(true).ask(
                1,
                command::WRITE,
                0,
                4096,
                1 << 20,
                &vec![1; 70_000],
            ),
            // Asks for a lot and goes without a look at it.
            4 => {
                let mut client = Client::greeted(connected).ready(false);
                (0..50).for_each(|at| client.ask(at, command::READ, 0, 0, 1 << 20, &[]));
            }
            // The same, and stays.
            _ if kept.len() < 20 => {
                let mut client = Client::greeted(connected).ready(true);
                let request = client.stream.try_clone().unwrap();
                request.set_nonblocking(true).unwrap();
                for at in 0..200 {
                    client.ask(at, command::READ, flag::DF, 0, 4096 << (at % 9), &[]);
                }
                kept.push(client);
            }
            _ => {}
        }
        if round % 5 == 0 {
            assert_eq!(honest.read(0, 4096), vec![3; 4096], "round {round}");
        }
    }
    assert_eq!(honest.call(command::FLUSH, 0, 0, 0, &[]).error, 0);
    drop(kept);
    // A write longer than anyone could mean ends the connection, and a half-closed one is served to its end.
    let mut client = served.connect().ready(true);
    client.ask(1, command::WRITE, 0, 0, u32::MAX, &[]);
    assert!(client.is_closed());
    let mut client = served.connect().ready(true);
    client.ask(7, command::WRITE, flag::FUA, 8192, 512, &[8; 512]);
    client.ask(8, command::READ, 0, 8192, 512, &[]);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut cookies = [client.reply().cookie, client.reply().cookie];
    cookies.sort_unstable();
    assert_eq!(cookies, [7, 8]);
    assert!(client.is_closed());
    served.stop();
}

#[test]
fn more_clients_than_there_is_room_for_are_refused() {
    let dir = Scratch::new("crowd");
    let served = Served::new(&dir, raw(&dir, MIB), &[]);
    let mut all: Vec<Client> = (0..64).map(|_| served.connect().ready(false)).collect();
    let mut refused = UnixStream::connect(&served.socket).unwrap();
    assert_eq!(std::io::Read::read(&mut refused, &mut [0]).unwrap(), 0);
    assert!(all.iter_mut().all(|client| client.read(0, 512) == vec![0; 512]));
    all.truncate(10);
    std::thread::sleep(Duration::from_millis(20));
    served.connect().ready(true).leave();
    served.stop();
}

#[test]
fn two_processes_do_not_write_one_image() {
    let dir = Scratch::new("locked");
    let served = Served::new(&dir, raw(&dir, MIB), &[]);
    let vbdd = env!("CARGO_BIN_EXE_vbdd");
    for (socket, expected) in [("t", "locked"), ("s", "cannot listen at")] {
        let mode = if socket == "s" { "--read-only" } else { "--json" };
        let arguments = ["nbd", "raw:a.raw", "--socket", socket, mode];
        let output = std::process::Command::new(vbdd).args(arguments).current_dir(&dir.0).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(expected), "{text}");
    }
    served.connect().ready(true).leave();
    served.kill();
    // What a dead process left behind is in nobody's way.
    std::os::unix::net::UnixListener::bind(dir.path("s")).unwrap();
    let served = Served::new(&dir, "raw:a.raw", &[]);
    std::thread::sleep(Duration::from_millis(300));
    served.connect().ready(true).leave();
    served.stop();
}
