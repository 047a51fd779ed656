//! Any bytes from an NBD server, in any pieces, over several connections: the client neither panics nor hangs, answers every
//! request once, stores nothing where it was not asked for, and calls no read whole that is not.
use std::collections::BTreeMap;
use std::io::{Read, Write};

use vbdd::nbd::client::{Address, Command, Export, Memory, Purpose, Request, Session, greet};
use vbdd::nbd::wire::{Chunk, Request as Header, SimpleReply, transmission};

/// A server that has said all it will ever say.
struct Said<'a>(&'a [u8]);

impl Read for Said<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Memory of requests by tag, which bytes of it were stored, and what was answered.
#[derive(Default)]
struct Room {
    memory: BTreeMap<u32, (Command, Vec<bool>)>,
    zeroes: Vec<u8>,
    answered: usize,
}

impl Memory<u32> for Room {
    fn bytes(&self, _: u32, length: u32) -> &[u8] {
        &self.zeroes[..length as usize]
    }
    fn store(&mut self, memory: u32, at: u32, bytes: &[u8]) {
        self.zero(memory, at, u32::try_from(bytes.len()).unwrap());
    }
    fn zero(&mut self, memory: u32, at: u32, length: u32) {
        let (command, stored) = self.memory.get_mut(&memory).expect("nobody waits for that");
        assert_eq!(*command, Command::Read);
        stored[at as usize..(at + length) as usize].fill(true);
    }
    fn done(&mut self, tag: u32, result: Result<u32, u32>) {
        let (command, stored) = self.memory.remove(&tag).expect("answered twice");
        self.answered += 1;
        if let (Command::Read, Ok(moved)) = (command, result) {
            assert_eq!(moved as usize, stored.len());
            assert!(stored.iter().all(|stored| *stored), "a read with a gap");
        }
    }
}

struct Client {
    session: Session<u32>,
    room: Room,
    structured: bool,
    up: bool,
    pushed: u32,
    /// Headers that were sent over this connection.
    sent: Vec<Header>,
}

impl Client {
    fn push(&mut self, what: u8, at: u8, length: u8) {
        let command = match what % 5 {
            0 => Command::Write,
            1 => Command::Flush,
            2 => Command::Trim,
            3 => Command::WriteZeroes,
            _ => Command::Read,
        };
        let length_bytes = if command == Command::Flush { 0 } else { (1 + u32::from(length)) * 8 };
        let tag = self.pushed;
        self.pushed += 1;
        self.room.memory.insert(tag, (command, vec![false; length_bytes as usize]));
        let request = Request { tag, command, offset_bytes: u64::from(at) * 8, length_bytes, memory: tag };
        self.session.push(request, &mut self.room);
    }

    /// Sends what there is, or the first so many bytes.
    fn send(&mut self, most: usize) {
        let bytes: Vec<u8> = self.session.outgoing(&self.room).flatten().copied().take(most).collect();
        let mut rest = bytes.as_slice();
        while let Some(head) = rest.first_chunk() {
            let Some(header) = Header::from_bytes(head) else { break };
            self.sent.push(header);
            let data = if header.command == 1 { header.length_bytes as usize } else { 0 };
            rest = rest.get(Header::BYTES + data..).unwrap_or_default();
        }
        self.session.sent(bytes.len());
    }

    fn receive(&mut self, bytes: &[u8], straight: bool) {
        let mut bytes = bytes;
        while self.up && !bytes.is_empty() {
            let expected = self.session.expects().filter(|_| straight);
            if let Some((memory, at, left)) = expected {
                let count = bytes.len().min(left as usize);
                self.room.store(memory, at, &bytes[..count]);
                self.session.received(count, &mut self.room);
                bytes = &bytes[count..];
                continue;
            }
            let (now, later) = bytes.split_at(if straight { 1 } else { bytes.len() });
            bytes = later;
            if self.session.receive(now, &mut self.room).is_err() {
                self.hang_up();
            }
        }
    }

    fn hang_up(&mut self) {
        self.session.lost(&mut self.room);
        self.sent.clear();
        self.up = false;
    }

    fn connect(&mut self) {
        if !self.up && !self.session.is_broken() {
            self.session.connected(self.structured);
            self.up = true;
        }
    }
}

fn play_session(flags: u8, data: &[u8]) {
    let structured = flags & 1 != 0;
    let export = Export {
        size_bytes: 1 << 20,
        flags: transmission::HAS_FLAGS
            | if flags & 2 == 0 { transmission::SEND_FLUSH } else { transmission::SEND_FUA },
        least_bytes: 1,
        preferred_bytes: 4096,
        most_bytes: 1 << 20,
        structured,
    };
    let kept = if flags & 4 == 0 { 1 << 20 } else { 3000 };
    let purpose = if flags & 8 == 0 { Purpose::Writing } else { Purpose::Reading };
    let Ok(session) = Session::new(export, purpose, kept) else { return };
    let room = Room { zeroes: vec![0; 4096], ..Room::default() };
    let mut client = Client { session, room, structured, up: true, pushed: 0, sent: Vec::new() };
    let mut rest = data;
    while let Some((&[what, a, b, c], more)) = rest.split_first_chunk::<4>() {
        rest = more;
        let straight = what & 0x80 != 0;
        let length = usize::from(c).min(rest.len());
        let named = client.sent.get(usize::from(a) % client.sent.len().max(1)).copied();
        match what & 7 {
            0 | 1 => client.push(a, b, c),
            2 => client.send(if straight { usize::MAX } else { usize::from(c) }),
            3 => {
                let (bytes, more) = rest.split_at(length);
                rest = more;
                client.receive(bytes, straight);
            }
            4 => {
                let cookie = named.map_or(0, |header| header.cookie);
                let error = if b < 128 { 0 } else { u32::from(b) - 128 };
                let mut bytes = SimpleReply { error, cookie }.to_bytes().to_vec();
                if named.is_some_and(|header| header.command == 0 && error == 0) {
                    bytes.resize(bytes.len() + named.map_or(0, |header| header.length_bytes as usize), 7);
                }
                client.receive(&bytes, straight);
            }
            5 | 6 => {
                // A chunk with a body that begins with an offset near the request's.
                let (cookie, offset) = named.map_or((0, 0), |header| (header.cookie, header.offset_bytes));
                let kind = match b & 15 {
                    kind @ 0..6 => u16::from(kind),
                    kind => 0x8000 | u16::from(kind & 3),
                };
                let mut body = (offset + u64::from(b >> 5)).to_be_bytes().to_vec();
                if kind == 2 {
                    body.extend((u32::from(c) * 8).to_be_bytes());
                } else {
                    body.resize(8 + usize::from(c) * 8, 7);
                }
                if kind == 0 {
                    body.clear();
                }
                let length_bytes = u32::try_from(body.len()).unwrap();
                let header = Chunk { flags: u16::from(b >> 4 & 1), kind, cookie, length_bytes };
                client.receive(&[&header.to_bytes()[..], &body].concat(), straight);
            }
            _ if a & 1 == 0 && client.up => client.hang_up(),
            _ if a & 2 == 0 => client.connect(),
            _ if !client.up => client.session.fail_all(5, &mut client.room),
            _ => client.session.trim(),
        }
    }
    if client.up {
        client.hang_up();
    }
    client.session.fail_all(5, &mut client.room);
    assert_eq!(client.room.answered, client.pushed as usize, "a request without an answer");
    assert_eq!(client.session.pending(), 0);
}

pub fn play(data: &[u8]) {
    let Some((&flags, data)) = data.split_first() else { return };
    match flags & 0xc0 {
        0x40 => {
            let _ = greet(&mut Said(data), "disk");
        }
        0x80 => {
            if let Ok(text) = std::str::from_utf8(data)
                && let Ok(address) = Address::parse(text)
            {
                assert_eq!(Address::parse(&address.to_string()), Ok(address));
            }
        }
        _ => play_session(flags, data),
    }
}
