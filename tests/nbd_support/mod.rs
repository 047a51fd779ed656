//! What tests of the NBD server share: a process that serves an image, and a client of our own that says whatever it likes.
#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use vbdd::nbd::wire::{
    BASE_ALLOCATION, Chunk, INIT_MAGIC, OPTION_MAGIC, OptionReply, Request, SimpleReply, chunk, command,
    option, option_reply,
};

/// A directory that goes with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = place.join(format!("nbd-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a tool that must be there and succeed; what it said.
pub fn run(dir: &Scratch, tool: &str, arguments: &[&str]) -> String {
    let output =
        Command::new("timeout").arg("60").arg(tool).args(arguments).current_dir(&dir.0).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() != Some(127),
        "{tool} is missing: the Debian packages qemu-utils, libnbd-bin, fio and nbdkit are needed (tests/run installs them)"
    );
    assert!(output.status.success(), "{tool} {}: {text}", arguments.join(" "));
    text.into_owned()
}

/// A `vbdd nbd` that runs.
pub struct Served {
    child: Child,
    pub socket: PathBuf,
}

impl Served {
    pub fn new(dir: &Scratch, image: &str, more: &[&str]) -> Served {
        let socket = dir.0.join("s");
        let child = Command::new(env!("CARGO_BIN_EXE_vbdd"))
            .args(["nbd", image, "--socket", "s"])
            .args(more)
            .current_dir(&dir.0)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let served = Served { child, socket };
        for _ in 0..2000 {
            if served.socket.exists() {
                return served;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{image} is not served");
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub fn connect(&self) -> Client {
        Client::greeted(UnixStream::connect(&self.socket).unwrap())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as an operator does; the image must be durable and clean then.
    pub fn stop(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert!(self.child.wait().unwrap().success());
        assert!(!self.socket.exists(), "the socket is gone");
    }

    /// Ends it as a power loss does, as far as the process goes.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A reply, put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub error: u32,
    /// Offset and bytes; a hole has its length in zeroes.
    pub data: Vec<(u64, Vec<u8>)>,
    pub holes: usize,
    /// Length and flags.
    pub extents: Vec<(u32, u32)>,
}

pub struct Client {
    pub stream: UnixStream,
    pub structured: bool,
    pub size: u64,
    pub flags: u16,
    /// Lengths of the simple reads in flight, by cookie.
    reads: Vec<(u64, u32, u64)>,
}

impl Client {
    /// One that has said nothing and read nothing.
    pub fn silent(stream: UnixStream) -> Client {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        Client { stream, structured: false, size: 0, flags: 0, reads: Vec::new() }
    }

    /// Reads the server's first words and answers them.
    pub fn greeted(stream: UnixStream) -> Client {
        let mut client = Client::silent(stream);
        assert_eq!(client.u64(), INIT_MAGIC);
        assert_eq!(client.u64(), OPTION_MAGIC);
        assert_eq!(client.u16(), 3);
        client.send(&3_u32.to_be_bytes());
        client
    }

    /// The usual handshake.
    pub fn ready(mut self, structured: bool) -> Client {
        if structured {
            self.option(option::STRUCTURED_REPLY, &[]);
            assert_eq!(self.option_reply(), (option::STRUCTURED_REPLY, option_reply::ACK, vec![]));
            self.structured = true;
            self.option(option::SET_META_CONTEXT, &contexts("", &[BASE_ALLOCATION]));
            let (_, kind, data) = self.option_reply();
            assert_eq!((kind, &data[4..]), (option_reply::META_CONTEXT, BASE_ALLOCATION.as_bytes()));
            assert_eq!(self.option_reply().1, option_reply::ACK);
        }
        assert_eq!(self.go(""), option_reply::ACK);
        self
    }

    /// Asks for an export; the kind of the last answer.
    pub fn go(&mut self, name: &str) -> u32 {
        self.option(option::GO, &info(name, &[]));
        loop {
            let (_, kind, data) = self.option_reply();
            if kind != option_reply::INFO {
                return kind;
            }
            if data[..2] == [0, 0] {
                self.size = u64::from_be_bytes(data[2..10].try_into().unwrap());
                self.flags = u16::from_be_bytes(data[10..12].try_into().unwrap());
            }
        }
    }

    pub fn option(&mut self, option: u32, data: &[u8]) {
        let mut text = OPTION_MAGIC.to_be_bytes().to_vec();
        text.extend(option.to_be_bytes());
        text.extend((data.len() as u32).to_be_bytes());
        text.extend(data);
        self.send(&text);
    }

    pub fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        let header = OptionReply::from_bytes(&self.array()).expect("an answer to an option");
        (header.option, header.kind, self.take(header.length_bytes as usize))
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take(N).try_into().unwrap()
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }

    /// True when the server has closed the connection, and said nothing before.
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(bytes) => bytes == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends a request without waiting for its reply.
    pub fn ask(&mut self, cookie: u64, command: u16, flags: u16, offset: u64, length: u32, data: &[u8]) {
        let request = Request { flags, command, cookie, offset_bytes: offset, length_bytes: length };
        let mut text = request.to_bytes().to_vec();
        text.extend(data);
        if command == command::READ && !self.structured {
            self.reads.push((cookie, length, offset));
        }
        self.send(&text);
    }

    /// One request, alone.
    pub fn call(&mut self, command: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> Reply {
        let cookie = 0x1234_5678_0000_0000 | offset;
        self.ask(cookie, command, flags, offset, length, data);
        let reply = self.reply();
        assert_eq!(reply.cookie, cookie);
        reply
    }

    /// The next reply, with all its chunks: they are never mixed with those of others here.
    pub fn reply(&mut self) -> Reply {
        let mut reply = Reply::default();
        loop {
            let mut header = self.take(SimpleReply::BYTES);
            if let Some(simple) = SimpleReply::from_bytes(&header.clone().try_into().unwrap()) {
                (reply.cookie, reply.error) = (simple.cookie, simple.error);
                self.simple_data(&mut reply);
                return reply;
            }
            header.extend(self.take(Chunk::BYTES - SimpleReply::BYTES));
            let part = Chunk::from_bytes(&header.try_into().unwrap()).expect("a reply");
            reply.cookie = part.cookie;
            let body = self.take(part.length_bytes as usize);
            let number = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().unwrap());
            let offset = || u64::from_be_bytes(body[..8].try_into().unwrap());
            match part.kind {
                chunk::NONE => assert!(body.is_empty()),
                chunk::OFFSET_DATA => reply.data.push((offset(), body[8..].to_vec())),
                chunk::OFFSET_HOLE => {
                    reply.data.push((offset(), vec![0; number(8) as usize]));
                    reply.holes += 1;
                }
                chunk::BLOCK_STATUS => {
                    reply.extents =
                        (4..body.len()).step_by(8).map(|at| (number(at), number(at + 4))).collect();
                }
                chunk::ERROR => {
                    reply.error = number(0);
                    assert_eq!(
                        usize::from(u16::from_be_bytes(body[4..6].try_into().unwrap())),
                        body.len() - 6
                    );
                    assert!(std::str::from_utf8(&body[6..]).is_ok());
                }
                kind => panic!("chunk of kind {kind}"),
            }
            if part.flags & chunk::DONE != 0 {
                return reply;
            }
        }
    }

    fn simple_data(&mut self, reply: &mut Reply) {
        let Some(at) = self.reads.iter().position(|(cookie, _, _)| *cookie == reply.cookie) else { return };
        let (_, length, offset) = self.reads.swap_remove(at);
        if reply.error == 0 {
            reply.data.push((offset, self.take(length as usize)));
        }
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        let reply = self.call(command::READ, 0, offset, length, &[]);
        assert_eq!(reply.error, 0);
        joined(&reply, offset, length)
    }

    /// Says good-bye, and waits until the server has closed.
    pub fn leave(mut self) {
        self.ask(0, command::DISC, 0, 0, 0, &[]);
        assert!(self.is_closed());
    }
}

/// The data of a read; each byte must have come once.
pub fn joined(reply: &Reply, offset: u64, length: u32) -> Vec<u8> {
    let mut all = vec![None; length as usize];
    for (at, bytes) in &reply.data {
        let from = (at - offset) as usize;
        for (place, byte) in all[from..from + bytes.len()].iter_mut().zip(bytes) {
            assert!(place.replace(*byte).is_none(), "byte {at} came twice");
        }
    }
    all.into_iter().map(|byte| byte.expect("every byte comes")).collect()
}

/// Data of `GO` and `INFO`.
pub fn info(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((kinds.len() as u16).to_be_bytes());
    kinds.iter().for_each(|kind| data.extend(kind.to_be_bytes()));
    data
}

/// Data of the options about contexts.
pub fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

/// Random numbers (xorshift).
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}
