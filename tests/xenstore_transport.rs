//! [`Xenbus`] over a real unix socket: connections that end, servers that talk nonsense, sockets that are full.
// Helpers of tests may fail loudly, as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

pub mod world;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ::xenstore::{Edit, Event, Failure, Job, JobId, Outcome, Path, WatchToken};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vbdd::xenbus::{Options, Xenbus};
use world::xenstore::XenstoreServer;
use world::xenstore::socket::SocketServer;

const PATIENCE: Duration = Duration::from_secs(20);

fn path(text: &str) -> Path {
    Path::parse(text).unwrap()
}

/// A client and its clock.
struct Bench {
    xenbus: Xenbus,
    started: Instant,
}

impl Bench {
    fn open(socket: &std::path::Path) -> Bench {
        let options = Options { path: Some(socket.to_path_buf()), seed: 1 };
        Bench { xenbus: Xenbus::open(&options, 0).unwrap(), started: Instant::now() }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap()
    }

    /// Waits as a poller would, then lets the client work.
    fn turn(&mut self) {
        let now_ms = self.now_ms();
        let due_ms = self.xenbus.timeout().map_or(50, |at| at.saturating_sub(now_ms).min(50));
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::try_from(due_ms * 1_000_000 + 999_999).unwrap() };
        let write = if self.xenbus.wants_write() { PollFlags::OUT } else { PollFlags::empty() };
        let (mut readable, mut writable) = (false, false);
        match self.xenbus.fd() {
            Some(fd) => {
                let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN | write)];
                poll(&mut fds, Some(&timeout)).unwrap();
                let got = fds[0].revents();
                readable = got.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
                writable = got.contains(PollFlags::OUT);
            }
            None => std::thread::sleep(Duration::from_millis(due_ms)),
        }
        let now_ms = self.now_ms();
        self.xenbus.handle_time(now_ms);
        if readable {
            self.xenbus.handle_readable(now_ms);
        }
        if writable {
            self.xenbus.handle_writable(now_ms);
        }
    }

    fn event(&mut self) -> Event {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(event) = self.xenbus.session().event() {
                return event;
            }
            assert!(Instant::now() < deadline, "no event");
            self.turn();
        }
    }

    fn submit(&mut self, job: Job) -> JobId {
        let id = self.xenbus.session().submit(job).unwrap();
        let now_ms = self.now_ms();
        self.xenbus.flush(now_ms);
        id
    }
}

fn event(at: &str) -> Event {
    Event::Watch { token: WatchToken(1), path: path(at) }
}

#[test]
fn a_lost_connection_is_made_again_and_the_world_looked_at_anew() {
    let mut server = XenstoreServer::new(1);
    server.introduce_domain(5);
    server.write(0, "/a", b"x").unwrap();
    let served = SocketServer::start(server, 5).unwrap();
    let mut bench = Bench::open(served.path());
    assert_eq!(bench.event(), Event::Reset);
    assert_eq!(bench.xenbus.session().domain(), Some(5));
    bench.xenbus.session().watch(&path("/local/domain/5/w"), WatchToken(1)).unwrap();
    bench.xenbus.flush(0);
    assert_eq!(bench.event(), event("/local/domain/5/w"));
    for round in 1..4 {
        assert_eq!(bench.xenbus.connections_made(), round);
        served.drop_connections();
        assert_eq!(bench.event(), Event::Reset);
        assert_eq!(bench.event(), event("/local/domain/5/w"), "watches are registered again");
        served.server().write(0, "/local/domain/5/w/x", b"").unwrap();
        assert_eq!(bench.event(), event("/local/domain/5/w/x"));
    }
}

#[test]
fn a_server_that_is_away_is_waited_for() {
    let served = SocketServer::start(XenstoreServer::new(1), 0).unwrap();
    let place = served.path().to_path_buf();
    let mut bench = Bench::open(&place);
    assert_eq!(bench.event(), Event::Reset);
    drop(served);
    while bench.xenbus.fd().is_some() {
        bench.turn();
    }
    let id = bench.submit(Job::Edit(Edit::Mkdir(path("/later"))));
    for _ in 0..5 {
        bench.turn();
    }
    assert!(bench.xenbus.session().event().is_none());
    // The same place, as after a restart of xenstored.
    let listener = UnixListener::bind(&place).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while bench.xenbus.fd().is_none() {
        assert!(Instant::now() < deadline, "it does not connect again");
        bench.turn();
    }
    let (mut stream, _) = listener.accept().unwrap();
    let mut header = [0; 16];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[0], 12, "the job submitted meanwhile is sent");
    drop(stream);
    drop(listener);
    std::fs::remove_file(&place).unwrap();
    assert_eq!(bench.event(), Event::Reset);
    let lost = Outcome::Failed(Failure::ConnectionLost { maybe_applied: true });
    assert_eq!(bench.event(), Event::Job { id, outcome: lost });
}

#[test]
fn a_server_that_talks_nonsense_is_dropped_and_not_asked_too_often() {
    let place = temporary("nonsense");
    let listener = UnixListener::bind(&place).unwrap();
    let mut bench = Bench::open(&place);
    listener.set_nonblocking(true).unwrap();
    let (mut connections, begun) = (0, Instant::now());
    while begun.elapsed() < Duration::from_millis(1500) {
        if let Ok((mut stream, _)) = listener.accept() {
            connections += 1;
            let _ = stream.write_all(&[0xff; 64]);
            std::thread::sleep(Duration::from_millis(1));
        }
        bench.turn();
    }
    std::fs::remove_file(&place).unwrap();
    assert!((2..=5).contains(&connections), "{connections} connections in 1.5 s");
    assert!(bench.xenbus.session().event().is_none(), "there was nothing to look at");
}

#[test]
fn a_full_socket_is_written_on_when_it_has_room_again() {
    let place = temporary("full");
    let listener = UnixListener::bind(&place).unwrap();
    let mut bench = Bench::open(&place);
    let (mut stream, _) = listener.accept().unwrap();
    std::fs::remove_file(&place).unwrap();
    // The number of requests outstanding is bounded, so only a small socket fills up.
    rustix::net::sockopt::set_socket_send_buffer_size(bench.xenbus.fd().unwrap(), 4096).unwrap();
    for round in 0..40 {
        let at = path(&format!("/n{round}"));
        bench.submit(Job::Edit(Edit::Write(at, vec![b'v'; 4000])));
    }
    assert!(bench.xenbus.wants_write());
    stream.set_nonblocking(true).unwrap();
    let mut decoder = ::xenstore::wire::Decoder::default();
    let (mut requests, deadline) = (0, Instant::now() + PATIENCE);
    while requests < 16 {
        assert!(Instant::now() < deadline, "only {requests} requests came");
        let mut buffer = [0; 3000];
        if let Ok(bytes) = stream.read(&mut buffer) {
            let mut input = &buffer[..bytes];
            while decoder.next(&mut input).unwrap().is_some() {
                requests += 1;
            }
        }
        bench.turn();
    }
    assert!(!bench.xenbus.wants_write());
    assert_eq!(bench.xenbus.session().statistics().requests, 16, "no more than the server may be asked");
}

#[test]
fn a_place_that_is_not_there_is_named() {
    let options = Options { path: Some(PathBuf::from("/nonexistent/socket")), seed: 0 };
    let error = Xenbus::open(&options, 0).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/socket") && error.contains("No such file"), "{error}");
    let error = Xenbus::open(&Options::default(), 0).map(drop);
    if let Err(error) = error {
        let error = error.to_string();
        assert!(error.contains("/run/xenstored/socket") && error.contains("/dev/xen/xenbus"), "{error}");
    }
}

fn temporary(name: &str) -> PathBuf {
    let place = std::env::temp_dir().join(format!("vbdd-transport-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&place);
    place
}
