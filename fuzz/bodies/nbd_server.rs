//! Any bytes from an NBD client, in any pieces, beside disks that answer in any order: the server neither panics nor hangs, and
//! when the client is gone everything it held is free.
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use formats::{Op, StatusRun};
use vbdd::buffers::Pool;
use vbdd::nbd::server::{Disks, Export, Server};
use vbdd::nbd::wire::{Request, option};
use vbdd::pump::{DiskId, Outside};
use vbdd::reactor::Reactor;
use vbdd::storage::StorageError;

pub const SECTORS: u64 = 5000;

/// Less than a client may have: at times there is none. Addresses of pools are never used again, so it must be little for many runs.
const POOL_BYTES: usize = 4 << 20;

/// A disk in memory, whose answers come when they are asked for.
pub struct Memory {
    pub pool: Pool,
    pub bytes: Vec<u8>,
    pub asked: Vec<Outside>,
}

impl Disks for Memory {
    fn buffers(&mut self) -> &mut Pool {
        &mut self.pool
    }

    fn ask(&mut self, disk: DiskId, request: Outside) {
        assert_eq!(disk, DiskId(3));
        assert!(request.token < 1 << 48);
        let extent = request.extent;
        assert!(request.op == Op::Flush || extent.sectors > 0 && extent.end() <= SECTORS, "{request:?}");
        let moves = matches!(request.op, Op::Read | Op::Write);
        let length = if moves { extent.sectors * 512 } else { 0 };
        assert!(request.op == Op::Status || u64::from(request.span.length_bytes()) == length, "{request:?}");
        self.asked.push(request);
    }
}

impl Memory {
    pub fn new(pool_bytes: usize) -> Memory {
        let pool = Pool::new(pool_bytes).expect("memory");
        Memory { pool, bytes: vec![0; SECTORS as usize * 512], asked: Vec::new() }
    }

    /// Answers one of the requests that were asked.
    pub fn answer(&mut self, which: usize, server: &mut Server) -> bool {
        if self.asked.is_empty() {
            return false;
        }
        let Outside { token, op, extent, span } = self.asked.swap_remove(which % self.asked.len());
        let range = extent.sector as usize * 512..extent.end() as usize * 512;
        // Some of the disk is broken.
        let broken = op != Op::Flush && extent.sector % 64 == 63;
        match op {
            _ if broken => {}
            Op::Flush => {}
            Op::Read => assert!(self.pool.copy_in(span, &self.bytes[range])),
            Op::Write => assert!(self.pool.copy_out(span, &mut self.bytes[range])),
            Op::Discard | Op::WriteZeroes => self.bytes[range].fill(0),
            Op::Status => {
                let half = extent.sectors.div_ceil(2);
                let mut runs = StatusRun { sectors: half, zero: true }.to_bytes().to_vec();
                runs.extend(StatusRun { sectors: extent.sectors - half, zero: false }.to_bytes());
                runs.extend([0; 8]);
                assert!(self.pool.copy_in(span, &runs));
            }
        }
        let result = if broken { Err(StorageError::Os(5)) } else { Ok(()) };
        server.answered(token, result, self);
        true
    }
}

pub fn export(read_only: bool) -> Export {
    let (name, description) = (String::from("disk"), String::from("for tests"));
    Export { name, description, disk: DiskId(3), sectors: SECTORS, read_only, preferred_bytes: 4096 }
}

/// One round of the server's loop. True when the next is to follow at once.
pub fn round(
    server: &mut Server,
    disks: &mut Memory,
    reactor: &mut Reactor,
    now: Duration,
    answers: usize,
) -> bool {
    let mut ready = Vec::new();
    reactor.wait(Some(Duration::ZERO), &mut ready);
    ready.into_iter().for_each(|ready| server.ready(ready));
    server.turn(disks, now, reactor);
    for which in 0..answers {
        disks.answer(which * 7 + answers, server);
    }
    server.send(disks, now, reactor)
}

/// Plays one input: the first byte says how the handshake goes; then pieces, each with a byte that says what it is and how the
/// disk goes on.
pub fn play(data: &[u8]) {
    let Some((how, mut rest)) = data.split_first() else { return };
    let (mut server, mut disks) = (Server::new(0), Memory::new(POOL_BYTES));
    let mut reactor = Reactor::new().expect("a poller");
    server.add_export(export(how & 1 != 0));
    let (mut near, far) = UnixStream::pair().expect("sockets");
    near.set_nonblocking(true).expect("a socket");
    far.set_nonblocking(true).expect("a socket");
    server.enter(OwnedFd::from(far), &mut disks, &mut reactor);
    let mut words = Vec::new();
    if how & 2 != 0 {
        words.extend(3_u32.to_be_bytes());
        if how & 4 != 0 {
            words.extend(message(option::STRUCTURED_REPLY, &[]));
            let mut contexts = [0_u8; 26].to_vec();
            contexts[7] = 1;
            contexts[11] = 15;
            contexts.truncate(12);
            contexts.extend(b"base:allocation");
            words.extend(message(option::SET_META_CONTEXT, &contexts));
        }
        words.extend(message(option::GO, &[0; 6]));
    }
    say(&near, &words);
    let mut now = Duration::from_millis(1);
    while let Some((what, tail)) = rest.split_first() {
        let length = usize::from(what >> 3);
        let (piece, behind) = tail.split_at(tail.len().min(length));
        rest = behind;
        if what & 4 != 0 {
            say(&near, &request(piece));
        } else {
            say(&near, piece);
        }
        round(&mut server, &mut disks, &mut reactor, now, usize::from(what & 3));
        if what & 3 == 2 {
            let _ = near.read(&mut vec![0; 100_000]);
        }
        now += Duration::from_millis(30);
    }
    if how & 8 != 0 {
        let _ = near.shutdown(std::net::Shutdown::Write);
    } else {
        drop(near);
    }
    for _ in 0..2000 {
        round(&mut server, &mut disks, &mut reactor, now, 3);
        if server.in_flight() == 0 && server.clients() == 0 {
            break;
        }
        now += Duration::from_millis(100);
    }
    assert_eq!((server.clients(), server.in_flight(), disks.asked.len()), (0, 0, 0));
    assert_eq!(disks.pool.used_bytes(), 0);
}

/// Sends what there is room for, if anybody is there.
fn say(near: &UnixStream, bytes: &[u8]) {
    let _ = rustix::net::send(near, bytes, rustix::net::SendFlags::NOSIGNAL);
}

fn message(option: u32, data: &[u8]) -> Vec<u8> {
    let mut text = b"IHAVEOPT".to_vec();
    text.extend(option.to_be_bytes());
    text.extend((data.len() as u32).to_be_bytes());
    text.extend(data);
    text
}

/// A request made of few bytes, whose numbers are near the interesting ones; a write brings its data.
fn request(piece: &[u8]) -> Vec<u8> {
    let byte = |at: usize| piece.get(at).copied().unwrap_or(0);
    let units = [1, 511, 512, 4096, 65536, 1 << 20];
    let scale = |at: usize| u64::from(byte(at)) * units[usize::from(byte(at + 1)) % units.len()];
    let offset_bytes = if byte(2) == 255 { u64::MAX - scale(3) } else { scale(2) };
    let length_bytes = scale(4) as u32;
    let (flags, command) = (u16::from(byte(1) >> 3), u16::from(byte(1) & 7));
    let request = Request { flags, command, cookie: u64::from(byte(0)), offset_bytes, length_bytes };
    let mut text = request.to_bytes().to_vec();
    if command == 1 && length_bytes <= 70_000 {
        text.resize(text.len() + length_bytes as usize, byte(0));
    }
    text
}
