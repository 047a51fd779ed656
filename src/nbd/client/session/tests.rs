//! A session against a server that answers late, in any order and in pieces, loses connections, and forgets what was not
//! flushed when it dies.

use std::collections::BTreeMap;

use super::*;
use crate::nbd::wire::{Chunk, SimpleReply, chunk, command, flag};

const BLOCK: usize = 16;
const BLOCKS: usize = 48;

struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// Memory by tag, and the answers that came.
#[derive(Default)]
struct Room {
    memory: BTreeMap<u32, Vec<u8>>,
    done: Vec<(u32, Result<u32, u32>)>,
}

impl Memory<u32> for Room {
    fn bytes(&self, memory: u32, length: u32) -> &[u8] {
        &self.memory[&memory][..length as usize]
    }
    fn store(&mut self, memory: u32, at: u32, bytes: &[u8]) {
        let at = at as usize;
        self.memory.get_mut(&memory).unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn zero(&mut self, memory: u32, at: u32, length: u32) {
        self.memory.get_mut(&memory).unwrap()[at as usize..(at + length) as usize].fill(0);
    }
    fn done(&mut self, tag: u32, result: Result<u32, u32>) {
        self.done.push((tag, result));
    }
}

fn export(structured: bool) -> Export {
    let flags = transmission::HAS_FLAGS
        | transmission::SEND_FLUSH
        | transmission::SEND_TRIM
        | transmission::SEND_WRITE_ZEROES;
    Export {
        size_bytes: (BLOCK * BLOCKS) as u64,
        flags,
        least_bytes: 1,
        preferred_bytes: 4096,
        most_bytes: 1 << 20,
        structured,
    }
}

struct Server {
    volatile: Vec<u8>,
    durable: Vec<u8>,
    received: Vec<u8>,
    asked: Vec<(Header, Vec<u8>)>,
    says: Vec<u8>,
    structured: bool,
    /// The next flush, or rewritten write, fails.
    fail_flush: bool,
}

impl Server {
    fn new(structured: bool) -> Server {
        let image = vec![0; BLOCK * BLOCKS];
        Server {
            volatile: image.clone(),
            durable: image,
            received: Vec::new(),
            asked: Vec::new(),
            says: Vec::new(),
            structured,
            fail_flush: false,
        }
    }

    fn hear(&mut self, bytes: &[u8]) {
        self.received.extend(bytes);
        while let Some(header) = self.received.first_chunk::<{ Header::BYTES }>() {
            let header = Header::from_bytes(header).unwrap();
            let data = if header.command == command::WRITE { header.length_bytes as usize } else { 0 };
            if self.received.len() < Header::BYTES + data {
                return;
            }
            let body = self.received[Header::BYTES..Header::BYTES + data].to_vec();
            self.received.drain(..Header::BYTES + data);
            self.asked.push((header, body));
        }
    }

    fn answer(&mut self, dice: &mut Dice) {
        if self.asked.is_empty() {
            return;
        }
        let (header, body) = self.asked.swap_remove(dice.below(self.asked.len()));
        let from = usize::try_from(header.offset_bytes).unwrap();
        let range = from..from + header.length_bytes as usize;
        let mut error = 0;
        match header.command {
            command::WRITE => self.volatile[range.clone()].copy_from_slice(&body),
            command::WRITE_ZEROES => self.volatile[range.clone()].fill(0),
            command::TRIM if dice.below(2) == 0 => self.volatile[range.clone()].fill(0),
            command::FLUSH if self.fail_flush => error = error::EIO,
            command::FLUSH => self.durable.clone_from(&self.volatile),
            _ => {}
        }
        let data = if header.command == command::READ { &self.volatile[range] } else { &[] };
        if !self.structured || (header.command != command::READ && dice.below(2) == 0) {
            self.says.extend(SimpleReply { error, cookie: header.cookie }.to_bytes());
            self.says.extend(data);
            return;
        }
        let cookie = header.cookie;
        let mut say = |kind, flags, parts: &[&[u8]]| {
            let body = parts.concat();
            let length_bytes = u32::try_from(body.len()).unwrap();
            self.says.extend(Chunk { flags, kind, cookie, length_bytes }.to_bytes());
            self.says.extend(body);
        };
        let mut at = 0;
        while at < data.len() {
            let length = 1 + dice.below(data.len() - at);
            let piece = &data[at..at + length];
            let offset = (header.offset_bytes + at as u64).to_be_bytes();
            if piece.iter().all(|byte| *byte == 0) && dice.below(2) == 0 {
                say(chunk::OFFSET_HOLE, 0, &[&offset, &u32::try_from(length).unwrap().to_be_bytes()]);
            } else {
                say(chunk::OFFSET_DATA, 0, &[&offset, piece]);
            }
            at += length;
        }
        if error != 0 {
            say(chunk::ERROR, chunk::DONE, &[&error.to_be_bytes(), &[0, 3], b"bad"]);
        } else {
            say(chunk::NONE, chunk::DONE, &[]);
        }
    }

    /// It dies and starts again: of each block what was flushed last is there, or what came later.
    fn die(&mut self, dice: &mut Dice) {
        for block in 0..BLOCKS {
            let range = block * BLOCK..(block + 1) * BLOCK;
            if dice.below(2) == 0 {
                self.durable[range.clone()].copy_from_slice(&self.volatile[range]);
            }
        }
        self.volatile.clone_from(&self.durable);
        self.hang_up();
    }

    fn hang_up(&mut self) {
        self.received.clear();
        self.asked.clear();
        self.says.clear();
    }
}

struct World {
    session: Session<u32>,
    room: Room,
    server: Server,
    dice: Dice,
    up: bool,
    next: u32,
    running: BTreeMap<u32, Request<u32>>,
    /// What each block must read as; `None` after a discard.
    shadow: Vec<Option<u8>>,
    /// What each block may be on the server's medium if it dies: what it was at the last flush that was answered, and since.
    possible: Vec<Vec<Option<u8>>>,
    /// At each flush in flight: how many of the possible ones it covers.
    flushes: BTreeMap<u32, Vec<usize>>,
    most_kept: u64,
}

impl World {
    fn new(seed: u64, kept: u64) -> World {
        let structured = seed.is_multiple_of(2);
        World {
            session: Session::new(export(structured), Purpose::Writing, kept).unwrap(),
            room: Room::default(),
            server: Server::new(structured),
            dice: Dice(seed),
            up: true,
            next: 0,
            running: BTreeMap::new(),
            shadow: vec![Some(0); BLOCKS],
            possible: vec![vec![Some(0)]; BLOCKS],
            flushes: BTreeMap::new(),
            most_kept: 0,
        }
    }

    fn blocks(request: &Request<u32>) -> std::ops::Range<usize> {
        let from = usize::try_from(request.offset_bytes).unwrap() / BLOCK;
        from..from + request.length_bytes as usize / BLOCK
    }

    fn start(&mut self) {
        let tag = self.next;
        self.next += 1;
        let command = match self.dice.below(10) {
            0..4 => Command::Read,
            4..8 => Command::Write,
            8 => [Command::Trim, Command::WriteZeroes][self.dice.below(2)],
            _ => Command::Flush,
        };
        let from = self.dice.below(BLOCKS);
        let count = 1 + self.dice.below((BLOCKS - from).min(5));
        let (from, count) = if command == Command::Flush { (0, 0) } else { (from, count) };
        let request = Request {
            tag,
            command,
            offset_bytes: (from * BLOCK) as u64,
            length_bytes: u32::try_from(count * BLOCK).unwrap(),
            memory: tag,
        };
        let blocks = Self::blocks(&request);
        let clash = |other: &Request<u32>| {
            let others = Self::blocks(other);
            others.start < blocks.end && blocks.start < others.end
        };
        if self.running.values().any(clash) {
            return;
        }
        let fill = u8::try_from(1 + tag % 255).unwrap();
        self.room.memory.insert(tag, vec![fill; count * BLOCK]);
        match command {
            Command::Write | Command::WriteZeroes => {
                let fill = if command == Command::Write { fill } else { 0 };
                blocks.for_each(|block| self.possible[block].push(Some(fill)));
            }
            Command::Trim => blocks.for_each(|block| self.possible[block].push(None)),
            Command::Flush => {
                let answered = |block: usize| {
                    let writing = self
                        .running
                        .values()
                        .any(|one| one.command != Command::Read && Self::blocks(one).contains(&block));
                    self.possible[block].len() - 1 - usize::from(writing)
                };
                self.flushes.insert(tag, (0..BLOCKS).map(answered).collect());
            }
            Command::Read => {}
        }
        self.running.insert(tag, request);
        self.session.push(request, &mut self.room);
    }

    fn take_answers(&mut self) {
        for (tag, result) in std::mem::take(&mut self.room.done) {
            let request = self.running.remove(&tag).expect("answered twice");
            let memory = self.room.memory.remove(&tag).unwrap();
            let flush = self.flushes.remove(&tag);
            assert!(result.is_ok(), "{request:?} {result:?}");
            match request.command {
                Command::Read => {
                    for (block, bytes) in Self::blocks(&request).zip(memory.chunks(BLOCK)) {
                        if let Some(expected) = self.shadow[block] {
                            assert_eq!(bytes, [expected; BLOCK], "block {block}, seed {}", self.dice.0);
                        }
                    }
                }
                Command::Write => Self::blocks(&request).for_each(|at| self.shadow[at] = Some(memory[0])),
                Command::WriteZeroes => Self::blocks(&request).for_each(|at| self.shadow[at] = Some(0)),
                Command::Trim => Self::blocks(&request).for_each(|at| self.shadow[at] = None),
                Command::Flush => {
                    for (block, covered) in flush.unwrap().into_iter().enumerate() {
                        let dropped = covered.min(self.possible[block].len() - 1);
                        self.possible[block].drain(..dropped);
                        for later in self.flushes.values_mut() {
                            later[block] = later[block].saturating_sub(dropped);
                        }
                    }
                }
            }
        }
    }

    fn step(&mut self) {
        match self.dice.below(12) {
            0..3 if self.running.len() < 12 => self.start(),
            0..5 => {
                let bytes: Vec<u8> = self.session.outgoing(&self.room).flatten().copied().collect();
                assert_eq!(bytes.is_empty(), !self.session.has_outgoing());
                if self.up && !bytes.is_empty() {
                    let count = 1 + self.dice.below(bytes.len());
                    self.server.hear(&bytes[..count]);
                    self.session.sent(count);
                }
            }
            5..8 => self.server.answer(&mut self.dice),
            8..11 if self.up && !self.server.says.is_empty() => {
                let count = 1 + self.dice.below(self.server.says.len());
                let bytes: Vec<u8> = self.server.says.drain(..count).collect();
                self.receive(&bytes);
            }
            11 if self.dice.below(20) == 0 => {
                if self.dice.below(2) == 0 {
                    self.server.die(&mut self.dice)
                } else {
                    self.server.hang_up()
                }
                self.check_durable();
                if self.up {
                    self.session.lost(&mut self.room);
                    self.up = false;
                }
            }
            11 if !self.up => {
                self.session.connected(self.server.structured);
                self.up = true;
            }
            _ => {}
        }
        self.most_kept = self.most_kept.max(self.session.unflushed_bytes());
        self.take_answers();
    }

    /// By the buffer, or straight to where it belongs.
    fn receive(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            if let Some((memory, at, left)) = self.session.expects().filter(|_| self.dice.below(2) == 0) {
                let count = rest.len().min(left as usize);
                self.room.store(memory, at, &rest[..count]);
                self.session.received(count, &mut self.room);
                rest = &rest[count..];
            } else {
                let count = 1 + self.dice.below(rest.len());
                self.session.receive(&rest[..count], &mut self.room).unwrap();
                rest = &rest[count..];
            }
        }
    }

    /// What a flush was answered for is on the medium.
    fn check_durable(&self) {
        for (block, bytes) in self.server.durable.chunks(BLOCK).enumerate() {
            let possible = &self.possible[block];
            let fits = possible.iter().any(|value| value.is_none_or(|value| bytes == [value; BLOCK]));
            assert!(fits, "block {block} is {bytes:?}, and may be {possible:?}");
        }
    }
}

#[test]
fn nothing_that_was_answered_is_ever_lost_and_nothing_flushed_is_not_durable() {
    for seed in 0..300 {
        for kept in [500, 100_000] {
            let mut world = World::new(seed, kept);
            for _ in 0..3000 {
                world.step();
            }
            assert!(world.most_kept > 0 && world.most_kept <= kept.max(200), "{}", world.most_kept);
            assert!(world.next > 100);
        }
    }
}

fn request(tag: u32, command: Command, offset_bytes: u64, length_bytes: u32) -> Request<u32> {
    Request { tag, command, offset_bytes, length_bytes, memory: tag }
}

/// A session with a read of 64 bytes at 32 in flight; answers with its cookie, too.
fn reading(structured: bool) -> (Session<u32>, Room, u64) {
    let mut session = Session::new(export(structured), Purpose::Writing, 1000).unwrap();
    let mut room = Room::default();
    room.memory.insert(1, vec![0xee; 64]);
    session.push(request(1, Command::Read, 32, 64), &mut room);
    let bytes: Vec<u8> = session.outgoing(&room).flatten().copied().collect();
    session.sent(bytes.len());
    let header = Header::from_bytes(bytes.first_chunk().unwrap()).unwrap();
    (session, room, header.cookie)
}

fn piece(kind: u16, flags: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let length_bytes = u32::try_from(body.len()).unwrap();
    [&Chunk { flags, kind, cookie, length_bytes }.to_bytes()[..], body].concat()
}

#[test]
fn what_a_server_may_not_say_ends_the_connection() {
    let data = |offset: u64, length: usize| [&offset.to_be_bytes()[..], &vec![7; length]].concat();
    let hole = |offset: u64, length: u32| [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
    let (mut plain, mut room, cookie) = reading(false);
    for (says, why) in [
        (vec![0; 16], "no reply"),
        (SimpleReply { error: 0, cookie: cookie + 1 }.to_bytes().to_vec(), "not asked"),
        (SimpleReply { error: 0, cookie: u64::MAX }.to_bytes().to_vec(), "not asked"),
        (piece(chunk::NONE, 1, cookie, &[]), "not agreed upon"),
        (SimpleReply { error: error::ESHUTDOWN, cookie }.to_bytes().to_vec(), "shutting down"),
    ] {
        let error = plain.receive(&says, &mut room).unwrap_err();
        assert!(error.0.contains(why), "{error:?}");
        plain.lost(&mut room);
        plain.connected(false);
        let bytes = plain.outgoing(&room).map(<[u8]>::len).sum();
        plain.sent(bytes);
    }
    let (mut session, mut room, cookie) = reading(true);
    for (says, why) in [
        (SimpleReply { error: 0, cookie }.to_bytes().to_vec(), "simple reply to a read"),
        (piece(chunk::NONE, 0, cookie, &[]), "cannot be"),
        (piece(chunk::NONE, 1, cookie, &[1]), "cannot be"),
        (piece(chunk::OFFSET_DATA, 1, cookie, &[0; 8]), "cannot be"),
        (piece(chunk::OFFSET_HOLE, 1, cookie, &[0; 13]), "cannot be"),
        (piece(chunk::ERROR, 1, cookie, &[0; 5]), "cannot be"),
        (piece(chunk::BLOCK_STATUS, 1, cookie, &[0; 12]), "cannot be"),
        (piece(77, 1, cookie, &[0; 12]), "cannot be"),
        (piece(chunk::OFFSET_DATA, 0, cookie, &data(0, 64)), "not asked for"),
        (piece(chunk::OFFSET_DATA, 0, cookie, &data(33, 64)), "not asked for"),
        (piece(chunk::OFFSET_DATA, 0, cookie, &data(u64::MAX, 2)), "not asked for"),
        (piece(chunk::OFFSET_HOLE, 0, cookie, &hole(32, 65)), "not asked for"),
        (piece(chunk::OFFSET_HOLE, 0, cookie, &hole(32, 0)), "not asked for"),
        (piece(chunk::OFFSET_HOLE, 0, cookie, &hole(40, u32::MAX)), "not asked for"),
        (
            [
                piece(chunk::OFFSET_HOLE, 0, cookie, &hole(32, 9)),
                piece(chunk::OFFSET_DATA, 0, cookie, &data(40, 3)),
            ]
            .concat(),
            "twice",
        ),
        (
            (0..9).flat_map(|at| piece(chunk::OFFSET_HOLE, 0, cookie, &hole(32 + 2 * at, 1))).collect(),
            "too many pieces",
        ),
        (piece(chunk::ERROR, 1, cookie, &[0, 0, 0, 108, 0, 0]), "shutting down"),
    ] {
        let error = session.receive(&says, &mut room).unwrap_err();
        assert!(error.0.contains(why), "{error:?} {why}");
        assert!(room.done.is_empty());
        session.lost(&mut room);
        session.connected(true);
        let bytes = session.outgoing(&room).map(<[u8]>::len).sum();
        session.sent(bytes);
    }
    // After all that it is still answered, once.
    session.receive(&piece(chunk::OFFSET_DATA, 1, cookie, &data(32, 64)), &mut room).unwrap();
    assert_eq!((room.done.as_slice(), &room.memory[&1]), (&[(1, Ok(64))][..], &vec![7; 64]));
    assert!(session.receive(&piece(chunk::NONE, 1, cookie, &[]), &mut room).is_err());
}

#[test]
fn a_read_with_a_gap_or_an_error_is_an_error() {
    let data = |offset: u64, length: usize| [&offset.to_be_bytes()[..], &vec![7; length]].concat();
    let (mut session, mut room, cookie) = reading(true);
    session.receive(&piece(chunk::OFFSET_DATA, 1, cookie, &data(32, 63)), &mut room).unwrap();
    assert_eq!(room.done, [(1, Err(error::EIO))]);
    for kind in [chunk::ERROR, chunk::ERROR_OFFSET, chunk::IS_ERROR | 77] {
        let (mut session, mut room, cookie) = reading(true);
        session
            .receive(&piece(kind, 0, cookie, &[0, 0, 0, 28, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8]), &mut room)
            .unwrap();
        session.receive(&piece(chunk::OFFSET_DATA, 1, cookie, &data(32, 64)), &mut room).unwrap();
        assert_eq!(room.done, [(1, Err(error::ENOSPC))]);
    }
    let (mut session, mut room, cookie) = reading(true);
    session.receive(&piece(chunk::NONE, 1, cookie, &[]), &mut room).unwrap();
    assert_eq!(room.done, [(1, Err(error::EIO))]);
    let (mut session, mut room, cookie) = reading(false);
    session.receive(&SimpleReply { error: 22, cookie }.to_bytes(), &mut room).unwrap();
    assert_eq!(room.done, [(1, Err(error::EINVAL))]);
    assert_eq!(session.pending(), 0);
}

/// Sends everything and has the server answer everything.
fn settle(session: &mut Session<u32>, room: &mut Room, server: &mut Server, dice: &mut Dice) {
    for _ in 0..100 {
        let bytes: Vec<u8> = session.outgoing(room).flatten().copied().collect();
        session.sent(bytes.len());
        server.hear(&bytes);
        while !server.asked.is_empty() {
            server.answer(dice);
        }
        let says = std::mem::take(&mut server.says);
        if session.receive(&says, room).is_err() {
            return;
        }
    }
}

#[test]
fn after_a_flush_that_failed_none_succeeds_and_after_a_loss_nothing_does() {
    let (mut session, mut room) =
        (Session::new(export(false), Purpose::Writing, 1000).unwrap(), Room::default());
    let (mut server, mut dice) = (Server::new(false), Dice(1));
    room.memory.insert(1, vec![5; 32]);
    session.push(request(1, Command::Write, 0, 32), &mut room);
    settle(&mut session, &mut room, &mut server, &mut dice);
    server.fail_flush = true;
    session.push(request(2, Command::Flush, 0, 0), &mut room);
    session.push(request(3, Command::Flush, 0, 0), &mut room);
    settle(&mut session, &mut room, &mut server, &mut dice);
    server.fail_flush = false;
    session.push(request(4, Command::Flush, 0, 0), &mut room);
    settle(&mut session, &mut room, &mut server, &mut dice);
    let failed = Err(error::EIO);
    let mut flushes = room.done[1..].to_vec();
    flushes.sort_by_key(|(tag, _)| *tag);
    assert_eq!(flushes, [(2, failed), (3, failed), (4, failed)]);
    room.memory.insert(5, vec![0; 32]);
    session.push(request(5, Command::Read, 0, 32), &mut room);
    settle(&mut session, &mut room, &mut server, &mut dice);
    assert_eq!((room.done.last(), &room.memory[&5]), (Some(&(5, Ok(32))), &vec![5; 32]));
    session.lost(&mut room);
    assert!(session.is_broken());
    session.push(request(6, Command::Read, 0, 32), &mut room);
    assert_eq!(room.done.last(), Some(&(6, failed)));
}

#[test]
fn exports_that_cannot_keep_what_is_written_are_not_written() {
    let with = |flags| Export { flags: transmission::HAS_FLAGS | flags, ..export(false) };
    let open = |flags, purpose| Session::<u32>::new(with(flags), purpose, 1000).map(|_| ());
    assert!(open(0, Purpose::Writing).unwrap_err().contains("durable"));
    // What was answered is not written again where others may have written since.
    let shared = open(transmission::SEND_FLUSH, Purpose::WritingShared);
    assert!(shared.unwrap_err().contains("no FUA"));
    assert_eq!(open(transmission::SEND_FUA, Purpose::WritingShared), Ok(()));
    assert!(
        open(transmission::READ_ONLY | transmission::SEND_FLUSH, Purpose::Writing)
            .unwrap_err()
            .contains("only be read")
    );
    assert_eq!(open(transmission::READ_ONLY, Purpose::Reading), Ok(()));
    // With FUA alone each write is durable when it is answered, and a flush has nothing to do.
    let mut session = Session::new(with(transmission::SEND_FUA), Purpose::Writing, 1000).unwrap();
    let mut room = Room::default();
    room.memory.insert(1, vec![5; 32]);
    session.push(request(1, Command::Write, 0, 32), &mut room);
    session.push(request(2, Command::Flush, 0, 0), &mut room);
    let bytes: Vec<u8> = session.outgoing(&room).flatten().copied().collect();
    assert_eq!(Header::from_bytes(bytes.first_chunk().unwrap()).unwrap().flags, flag::FUA);
    assert_eq!((bytes.len(), room.done.as_slice()), (60, &[(2, Ok(0))][..]));
    assert_eq!(session.unflushed_bytes(), 0);
}

#[test]
fn everybody_is_told_when_all_is_given_up() {
    let (mut session, mut room) =
        (Session::new(export(false), Purpose::Writing, 300).unwrap(), Room::default());
    for tag in 0..400 {
        room.memory.insert(tag, vec![5; 32]);
        let command = if tag % 2 == 0 { Command::Write } else { Command::Read };
        session.push(request(tag, command, u64::from(tag % 20) * 32, 32), &mut room);
    }
    assert_eq!(session.pending(), 400);
    session.fail_all(error::EIO, &mut room);
    assert_eq!((session.pending(), room.done.len()), (0, 400));
    assert!(!session.has_outgoing());
    // And it goes on when there is a server again.
    let (mut server, mut dice) = (Server::new(false), Dice(1));
    room.done.clear();
    session.connected(false);
    session.push(request(1, Command::Write, 0, 32), &mut room);
    settle(&mut session, &mut room, &mut server, &mut dice);
    assert_eq!(room.done, [(1, Ok(32))]);
}
