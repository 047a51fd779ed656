//! Images on NBD servers that others have written.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod storage_support;

use std::time::{Duration, Instant};

use storage_support::servers::Server;
use storage_support::{Dice, Directory, Rig, options, pattern};
use vbdd::buffers::Span;
use vbdd::nbd::client::Allowed;
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::linux::Options;
use vbdd::storage::{Access, FileId, Identity, IoKind, Storage, StorageError};

/// A directory with a short path: a socket's name has 107 bytes at most, for those who make it.
fn place(name: &str) -> Directory {
    Directory::new("/tmp", name)
}

fn rig(directory: &Directory, patience: Option<Duration>) -> Rig {
    let servers = vec![Allowed::Sockets(directory.0.clone())];
    Rig::new(&Options { servers, server_patience: patience, ..options(&directory.0, EngineChoice::Auto) })
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn end(rig: &mut Rig, file: FileId, kind: IoKind, offset: u64) -> Result<(), StorageError> {
    let token = rig.queue(file, kind, offset, Span::EMPTY);
    rig.finish(token)
}

#[test]
fn an_image_is_read_and_written_where_it_lies() {
    let directory = place("remote-file");
    let image = directory.file("image", &pattern(3 << 20, 3));
    for more in [&[][..], &["--no-sr"], &["-r"]] {
        let server = Server::nbdkit(&directory, &[more, &["file", &image]].concat());
        let mut rig = rig(&directory, None);
        let read_only = more.contains(&"-r");
        let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        if read_only {
            let error = rig.open(&server.uri(), Access::ReadWrite).unwrap_err();
            assert!(error.reason.contains("lets it only be read"), "{error}");
        }
        let opened = rig.open(&server.uri(), access).unwrap();
        assert_eq!((opened.size_bytes, opened.direct, opened.locked), (3 << 20, false, true));
        assert!(matches!(opened.identity, Identity::Remote { .. }));
        assert_eq!(rig.storage.measure(opened.file), Some(3 << 20));
        let expected = std::fs::read(&image).unwrap();
        assert!(rig.read(opened.file, 0, 1 << 20).unwrap() == expected[..1 << 20]);
        assert_eq!(rig.read(opened.file, (3 << 20) - 512, 1024).unwrap()[512..], [0; 512]);
        if read_only {
            assert_eq!(rig.write(opened.file, 0, &[1; 512]), Err(StorageError::Os(libc::EROFS)));
            continue;
        }
        rig.write(opened.file, 4096 + 512, &pattern(1 << 20, 9)).unwrap();
        assert_eq!(rig.write(opened.file, 3 << 20, &[1; 512]), Err(StorageError::PastEnd));
        end(&mut rig, opened.file, IoKind::Zero { length_bytes: 512 }, 0).unwrap();
        end(&mut rig, opened.file, IoKind::Zero { length_bytes: 1 << 20 }, 2 << 20).unwrap();
        end(&mut rig, opened.file, IoKind::SetLength, 3 << 20).unwrap();
        assert_eq!(
            end(&mut rig, opened.file, IoKind::SetLength, 4 << 20),
            Err(StorageError::Os(libc::ENOSPC))
        );
        rig.flush(opened.file).unwrap();
        let bytes = std::fs::read(&image).unwrap();
        assert!(bytes[4608..4608 + (1 << 20)] == pattern(1 << 20, 9) && bytes[..512] == [0; 512]);
        assert!(bytes[2 << 20..].iter().all(|byte| *byte == 0));
        let unit = opened.discard.unwrap();
        assert_eq!((unit.granularity_bytes, unit.alignment_bytes), (4096, 0));
        end(&mut rig, opened.file, IoKind::Discard { length_bytes: 1 << 20 }, 0).unwrap();
        // Holes are told apart on the way back, too.
        let read = rig.read(opened.file, 0, 1 << 20).unwrap();
        assert!(read == std::fs::read(&image).unwrap()[..1 << 20]);
        rig.storage.close(opened.file);
        assert_eq!(rig.read(opened.file, 0, 512), Err(StorageError::Os(libc::EBADF)));
    }
}

/// Random requests, many at a time, none of which overlap; and what each sector must hold.
struct Load {
    file: FileId,
    dice: Dice,
    shadow: Vec<u8>,
    flights: Vec<(u64, IoKind, usize, Vec<u8>, Span)>,
    done: u64,
    failed: u64,
}

impl Load {
    fn new(file: FileId, seed: u64, shadow: Vec<u8>) -> Load {
        Load { file, dice: Dice(seed), shadow, flights: Vec::new(), done: 0, failed: 0 }
    }

    fn start(&mut self, rig: &mut Rig) {
        let sectors = self.shadow.len() / 512;
        let mut below = |limit: usize| self.dice.below(limit as u64) as usize;
        let count = if below(8) == 0 { 1 + below(500) } else { 1 + below(24) };
        let from = below(sectors);
        let count = count.min(sectors - from);
        let length_bytes = count as u64 * 512;
        let kind = match below(20) {
            0 => IoKind::Flush,
            1 => IoKind::Zero { length_bytes },
            2..11 => IoKind::Write,
            _ => IoKind::Read,
        };
        let (from, count) = if kind == IoKind::Flush { (0, 0) } else { (from * 512, count * 512) };
        let overlaps = |flight: &(u64, IoKind, usize, Vec<u8>, Span)| {
            from < flight.2 + flight.3.len() && flight.2 < from + count
        };
        if self.flights.iter().any(overlaps) {
            return;
        }
        let fill = if kind == IoKind::Write { 1 + below(255) as u8 } else { 0 };
        let bytes = vec![fill; count];
        let has_memory = matches!(kind, IoKind::Read | IoKind::Write);
        let span = if has_memory { rig.alloc(count) } else { Span::EMPTY };
        if has_memory {
            rig.storage.buffers().copy_in(span, &bytes);
        }
        let token = rig.queue(self.file, kind, from as u64, span);
        self.flights.push((token, kind, from, bytes, span));
    }

    fn take(&mut self, rig: &mut Rig) -> usize {
        let done = rig.pump();
        for token in &done {
            let at = self.flights.iter().position(|flight| flight.0 == *token).unwrap();
            let (_, kind, from, bytes, span) = self.flights.swap_remove(at);
            let result = rig.forget(*token).unwrap();
            self.done += 1;
            let range = from..from + bytes.len();
            match (kind, &result) {
                (_, Err(_)) => self.failed += 1,
                (IoKind::Read, _) => {
                    let got = rig.storage.buffers().bytes(span);
                    let wrong = got.chunks(512).zip(self.shadow[range].chunks(512)).position(|(a, b)| a != b);
                    assert_eq!(wrong, None, "{kind:?} of {} bytes at {from}", bytes.len());
                }
                (IoKind::Write | IoKind::Zero { .. }, _) => self.shadow[range].copy_from_slice(&bytes),
                _ => {}
            }
            if span != Span::EMPTY {
                assert!(rig.storage.buffers().free(span));
            }
        }
        done.len()
    }

    /// Until so many are done, or all are when no more come.
    fn run(&mut self, rig: &mut Rig, requests: u64, depth: usize) {
        let (end, begin) = (self.done + requests, Instant::now());
        while self.done < end || !self.flights.is_empty() {
            if self.done + (self.flights.len() as u64) < end {
                (0..8).for_each(|_| {
                    if self.flights.len() < depth {
                        self.start(rig);
                    }
                });
            }
            if self.take(rig) == 0 {
                rig.wait(Duration::from_millis(200));
            }
            assert!(begin.elapsed() < Duration::from_secs(100), "stuck: {} in flight", self.flights.len());
        }
    }
}

#[test]
fn every_server_is_understood_under_load() {
    let size = 4 << 20;
    let kits: [(&str, &[&str]); 7] = [
        ("nbdkit", &["nbdkit", "-f", "-U", "SOCKET", "file", "DIR/image"]),
        ("nbdkit, simple replies", &["nbdkit", "-f", "-U", "SOCKET", "--no-sr", "file", "DIR/image"]),
        (
            "nbdkit, blocks of 4096",
            &[
                "nbdkit",
                "-f",
                "-U",
                "SOCKET",
                "--filter=blocksize-policy",
                "file",
                "DIR/image",
                "blocksize-minimum=4096",
                "blocksize-maximum=64K",
                "blocksize-error-policy=error",
            ],
        ),
        (
            "nbdkit, late",
            &[
                "nbdkit",
                "-f",
                "-U",
                "SOCKET",
                "--filter=delay",
                "file",
                "DIR/image",
                "rdelay=2ms",
                "wdelay=1ms",
            ],
        ),
        ("qemu-nbd", &["qemu-nbd", "-t", "-k", "SOCKET", "-f", "raw", "--discard=unmap", "DIR/image"]),
        (
            "qemu-nbd, no cache",
            &["qemu-nbd", "-t", "-k", "SOCKET", "-f", "raw", "--cache=none", "--aio=native", "DIR/image"],
        ),
        ("nbd-server", &["nbd-server", "-d", "-C", "DIR/conf"]),
    ];
    for (name, command) in kits {
        let directory = place("remote-load");
        let image = directory.file("image", &pattern(size, 3));
        let socket = directory.path("s");
        let conf = format!(
            "[generic]\nunixsock = {socket}\nport = {}\nlistenaddr = 127.0.0.1\n\
             [disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n",
            free_port()
        );
        directory.file("conf", conf.as_bytes());
        let server = Server::new(&directory, command);
        let mut rig = rig(&directory, None);
        let export = if name == "nbd-server" { "disk" } else { "" };
        let uri = format!("nbd+unix:///{export}?socket={socket}");
        let opened = rig.open(&uri, Access::ReadWrite).unwrap();
        let mut load = Load::new(opened.file, 0x5eed, pattern(size, 3));
        load.run(&mut rig, 3000, 32);
        assert_eq!(load.failed, 0, "{name}");
        rig.flush(opened.file).unwrap();
        assert!(std::fs::read(directory.path("image")).unwrap() == load.shadow, "{name}");
        rig.storage.close(opened.file);
        drop(server);
    }
}

/// The server loses all that was not flushed each time that it dies: its cache is a file of its own.
#[test]
fn a_server_that_is_killed_loses_nothing_that_was_answered() {
    let directory = place("remote-killed");
    directory.file("image", &pattern(2 << 20, 3));
    let arguments = ["--filter=cache", "file", "DIR/image", "cache=writeback"];
    let mut server = Server::nbdkit(&directory, &arguments);
    let mut rig = rig(&directory, None);
    let opened = rig.open(&server.uri(), Access::ReadWrite).unwrap();
    let mut load = Load::new(opened.file, 0x5eed, pattern(2 << 20, 3));
    for round in 0..12 {
        // In the middle of it, or while nothing is asked.
        load.run(&mut rig, 100, 16);
        if round % 2 == 0 {
            (0..20).for_each(|_| load.start(&mut rig));
            rig.pump();
        }
        server.kill();
        rig.wait(Duration::from_millis(20));
        load.take(&mut rig);
        (0..20).for_each(|_| load.start(&mut rig));
        rig.pump();
        server.restart();
        load.run(&mut rig, 100, 16);
    }
    assert_eq!(load.failed, 0);
    // What a flush was answered for is in the file, and dies with nobody.
    rig.flush(opened.file).unwrap();
    server.kill();
    assert!(std::fs::read(directory.path("image")).unwrap() == load.shadow);
}

#[test]
fn requests_wait_for_a_server_and_fail_when_that_takes_too_long() {
    let directory = place("remote-patience");
    directory.file("image", &pattern(1 << 20, 3));
    let mut server = Server::nbdkit(&directory, &["file", "DIR/image"]);
    let mut rig = rig(&directory, Some(Duration::from_secs(1)));
    let file = rig.open(&server.uri(), Access::ReadWrite).unwrap().file;
    rig.write(file, 0, &[7; 4096]).unwrap();
    server.kill();
    let failed = Err(StorageError::Os(libc::EIO));
    assert_eq!(rig.write(file, 8192, &[8; 4096]), failed);
    assert_eq!(rig.read(file, 0, 512).map(|_| ()), failed, "at once, now");
    server.restart();
    let begin = Instant::now();
    while rig.read(file, 0, 512).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(60), "it never comes back");
        rig.wait(Duration::from_millis(100));
    }
    rig.flush(file).unwrap();
    assert_eq!(rig.read(file, 0, 4096).unwrap(), [7; 4096]);
    // One that is there and does not answer is no better.
    server.signal("-STOP");
    assert_eq!(rig.read(file, 0, 512).map(|_| ()), failed);
    server.signal("-CONT");
    let begin = Instant::now();
    while rig.read(file, 0, 512).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(60), "it never comes back");
        rig.wait(Duration::from_millis(100));
    }
    assert_eq!(rig.storage.in_flight(), 0);
}

#[test]
fn another_export_does_not_take_the_place_of_one_that_is_gone() {
    let directory = place("remote-another");
    directory.file("image", &pattern(1 << 20, 3));
    let mut server = Server::nbdkit(&directory, &["file", "DIR/image"]);
    let mut rig = rig(&directory, Some(Duration::from_secs(2)));
    let file = rig.open(&server.uri(), Access::ReadWrite).unwrap().file;
    rig.write(file, 0, &[7; 4096]).unwrap();
    server.kill();
    directory.file("image", &pattern(2 << 20, 4));
    server.restart();
    assert_eq!(rig.write(file, 4096, &[8; 4096]), Err(StorageError::Os(libc::EIO)));
    assert!(std::fs::read(directory.path("image")).unwrap() == pattern(2 << 20, 4));
}

#[test]
fn errors_meet_the_request_that_they_belong_to() {
    let directory = place("remote-errors");
    directory.file("image", &pattern(1 << 20, 3));
    for sr in [&[][..], &["--no-sr"]] {
        let arguments = ["--filter=error", "file", "DIR/image", "error=ENOSPC", "error-rate=20%"];
        let server = Server::nbdkit(&directory, &[sr, &arguments].concat());
        let mut rig = rig(&directory, None);
        let file = rig.open(&server.uri(), Access::ReadWrite).unwrap().file;
        let mut failed = 0;
        for at in 0..200 {
            match rig.read(file, at * 4096, 4096) {
                Ok(bytes) => {
                    let from = at as usize * 4096;
                    assert!(bytes == pattern(1 << 20, 3)[from..from + 4096]);
                }
                Err(error) => {
                    assert_eq!(error, StorageError::Os(libc::ENOSPC));
                    failed += 1;
                }
            }
        }
        assert!((5..150).contains(&failed), "{failed} of 200");
    }
    // Zeroes are written where the server does not know how to make them.
    let server = Server::nbdkit(&directory, &["--filter=nozero", "file", "DIR/image"]);
    let mut rig = rig(&directory, None);
    let file = rig.open(&server.uri(), Access::ReadWrite).unwrap().file;
    end(&mut rig, file, IoKind::Zero { length_bytes: 300 << 10 }, 512).unwrap();
    let bytes = std::fs::read(directory.path("image")).unwrap();
    assert!(bytes[512..512 + (300 << 10)].iter().all(|byte| *byte == 0));
    assert!(bytes[512 + (300 << 10)..] == pattern(1 << 20, 3)[512 + (300 << 10)..]);
}

#[test]
fn what_may_not_be_asked_or_cannot_be_is_said() {
    let directory = place("remote-refused");
    directory.file("image", &pattern(1 << 20, 3));
    let server = Server::nbdkit(&directory, &["file", "DIR/image"]);
    let elsewhere = place("remote-elsewhere");
    let outside = elsewhere.path("s");
    let mut rig = rig(&directory, None);
    let mut refusal = |path: &str| rig.open(path, Access::ReadWrite).unwrap_err().to_string();
    for (path, why) in [
        (format!("nbd+unix:///?socket={outside}"), "--allow-nbd"),
        (String::from("nbd://127.0.0.1/x"), "add --allow-nbd 127.0.0.1:10809"),
        (format!("nbd+unix:///?socket={}", directory.path("none")), "does not exist"),
        (format!("nbd+unix:///?socket={}", directory.path("image")), "is no socket"),
        (format!("nbd+unix:///?socket={}/../s", directory.0.display()), "\"..\""),
        (String::from("nbd+unix:///x"), "?socket=PATH"),
        (String::from("nbds://127.0.0.1/x"), "TLS"),
    ] {
        let error = refusal(&path);
        assert!(error.contains(why), "{path}: {error}");
    }
    // A link that leads out of what is allowed.
    std::os::unix::fs::symlink(&outside, directory.path("link")).unwrap();
    assert!(refusal(&format!("nbd+unix:///?socket={}", directory.path("link"))).contains("symbolic link"));
    drop(server);
    // Its socket is still there, and nobody listens.
    assert!(refusal(&format!("nbd+unix:///?socket={}", directory.path("s"))).contains("is it running?"));
    let mut nobody = Rig::new(&options(&directory.0, EngineChoice::Auto));
    let error = nobody.open("nbd://localhost/", Access::ReadOnly).unwrap_err().to_string();
    assert!(error.contains("--allow-nbd"), "{error}");
}

#[test]
fn servers_by_tcp() {
    let directory = place("remote-tcp");
    let image = directory.file("image", &pattern(1 << 20, 3));
    let port = free_port();
    let pid = directory.path("s");
    let port_text = port.to_string();
    // The file of its process number tells that it listens.
    let command =
        ["nbdkit", "-f", "-i", "127.0.0.1", "-p", &port_text, "-e", "disk", "-P", &pid, "file", &image];
    let _server = Server::new(&directory, &command);
    let servers = vec![Allowed::Host { host: String::from("localhost"), port }];
    let mut rig = Rig::new(&Options { servers, ..options(&directory.0, EngineChoice::Auto) });
    let opened = rig.open(&format!("nbd://localhost:{port}/disk"), Access::ReadWrite).unwrap();
    let mut load = Load::new(opened.file, 0x5eed, pattern(1 << 20, 3));
    load.run(&mut rig, 1000, 32);
    assert_eq!(load.failed, 0);
    let error = rig.open(&format!("nbd://127.0.0.1:{port}/disk"), Access::ReadWrite).unwrap_err();
    assert!(error.reason.contains("--allow-nbd"), "another name is another server: {error}");
}

#[test]
fn an_idle_connection_wakes_nobody() {
    let directory = place("remote-idle");
    directory.file("image", &pattern(1 << 20, 3));
    let server = Server::nbdkit(&directory, &["file", "DIR/image"]);
    let mut rig = rig(&directory, Some(Duration::from_secs(100)));
    let file = rig.open(&server.uri(), Access::ReadWrite).unwrap().file;
    rig.write(file, 0, &[1; 4096]).unwrap();
    rig.flush(file).unwrap();
    let begin = Instant::now();
    // The timer looks once more, and stops then.
    while rig.wait(Duration::from_millis(600)) {
        assert!(begin.elapsed() < Duration::from_secs(20), "it wakes again and again");
        rig.pump();
    }
}
