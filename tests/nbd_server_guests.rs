//! Disks that guests have connected, read by NBD clients while the guests use them and come and go: in the simulated world,
//! with real sockets.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, clippy::print_stdout, dead_code, unreachable_pub)]

#[path = "backend_world/host.rs"]
mod host;
mod nbd_support;
mod world;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use host::{DEVID, Host};
use nbd_support::{Client, Scratch};
use vbdd::nbd::guests::{Exporter, SOCKET_NAME};
use vbdd::nbd::wire::{command, error, option, option_reply, transmission};
use vbdd::reactor::Reactor;
use world::guest::Habits;

struct Machine {
    host: Host,
    reactor: Reactor,
    exporter: Exporter,
    dir: Scratch,
}

impl Machine {
    fn new() -> Machine {
        let (host, dir) = (Host::new(5, 0), Scratch::new("guests"));
        let mut reactor = Reactor::new().unwrap();
        let exporter = Exporter::open(&dir.0.join("new/exports"), 0, &mut reactor).unwrap();
        Machine { host, reactor, exporter, dir }
    }

    fn attach(&mut self, guest: u16, requests: u32) -> usize {
        let (disk, path) = self.host.add_image(300);
        self.host.attach(guest, &path, &[]);
        self.host.connect_guest(Habits { requests, depth: 8, ..Habits::new(guest, disk) });
        disk
    }

    /// What the daemon's loop does, in between what the world does.
    fn round(&mut self) {
        let mut ready = Vec::new();
        self.reactor.wait(Some(Duration::ZERO), &mut ready);
        ready.into_iter().for_each(|ready| self.exporter.ready(ready));
        let now = self.host.shared.clock.now();
        let backend = self.host.backend.as_mut().unwrap();
        self.exporter.receive(backend, now, &mut self.reactor);
        // Time goes on only when nobody has anything to do.
        if backend.pump().has_work() {
            self.host.wake();
        }
        self.host.round();
        let backend = self.host.backend.as_mut().unwrap();
        self.exporter.send(backend, now, &mut self.reactor);
    }

    /// Lets a client talk, which waits for its answers, while the world goes on.
    fn with<T: Send + 'static>(&mut self, talk: impl FnOnce(Client) -> T + Send + 'static) -> T {
        let path = self.dir.0.join("new/exports").join(SOCKET_NAME);
        let thread = std::thread::spawn(move || talk(Client::greeted(UnixStream::connect(path).unwrap())));
        while !thread.is_finished() {
            self.round();
        }
        thread.join().unwrap()
    }

    fn names(&mut self) -> Vec<String> {
        self.with(|mut client| {
            client.option(option::LIST, &[]);
            let mut names = Vec::new();
            loop {
                let (_, kind, data) = client.option_reply();
                if kind == option_reply::ACK {
                    return names;
                }
                let length = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
                names.push(String::from_utf8(data[4..4 + length].to_vec()).unwrap());
            }
        })
    }
}

#[test]
fn disks_of_guests_are_read_and_never_written() {
    let mut machine = Machine::new();
    let socket = machine.dir.0.join("new/exports").join(SOCKET_NAME);
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let parent = std::fs::metadata(socket.parent().unwrap()).unwrap();
    assert_eq!(parent.permissions().mode() & 0o777, 0o700);
    assert!(machine.names().is_empty());
    let (disk, _) = (machine.attach(7, 200), machine.attach(8, 3000));
    let (seven, eight) = (format!("vbd/7/{DEVID}"), format!("vbd/8/{DEVID}"));
    assert_eq!(machine.names(), [seven.clone(), eight.clone()]);
    machine.host.wait_served(7);
    let name = seven.clone();
    let (size, bytes) = machine.with(move |mut client| {
        assert_eq!(client.go(&name), option_reply::ACK);
        assert_ne!(client.flags & transmission::READ_ONLY, 0);
        assert_eq!(client.call(command::WRITE, 0, 0, 512, &[1; 512]).error, error::EPERM);
        assert_eq!(client.call(command::TRIM, 0, 0, 512, &[]).error, error::EPERM);
        assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]).error, 0);
        let bytes = client.read(0, client.size as u32);
        let size = client.size;
        client.leave();
        (size, bytes)
    });
    assert_eq!(size, 300 * 512);
    assert!(bytes == machine.host.shared.media.borrow().bytes(disk)[..300 * 512]);
    // The guest unplugs its disk: who reads it is disconnected, and the others are not.
    let (first, second) = (seven.clone(), eight.clone());
    let thread = machine.with(move |mut client| {
        assert_eq!(client.go(&first), option_reply::ACK);
        client.read(512, 1024);
        client
    });
    let mut other = machine.with(move |mut client| {
        assert_eq!(client.go(&second), option_reply::ACK);
        client
    });
    machine.host.set_be(7, &[("online", "0"), ("state", "5")]);
    machine.host.set_fe(7, &[("state", "6")]);
    machine.host.run_until("closed", |host| host.be_node(7, "state").as_deref() == Some("6"));
    for _ in 0..2000 {
        machine.round();
    }
    let mut gone = thread;
    assert!(gone.is_closed());
    assert_eq!(machine.names(), [eight]);
    let thread = std::thread::spawn(move || other.read(0, 4096).len());
    while !thread.is_finished() {
        machine.round();
    }
    assert_eq!(thread.join().unwrap(), 4096);
    machine.host.wait_served(8);
}

#[test]
fn a_disk_that_grows_is_offered_anew() {
    let mut machine = Machine::new();
    let disk = machine.attach(7, 50);
    machine.host.wait_served(7);
    let name = format!("vbd/7/{DEVID}");
    let size = move |machine: &mut Machine| {
        let name = name.clone();
        machine.with(move |mut client| {
            client.go(&name);
            client.size
        })
    };
    assert_eq!(size(&mut machine), 300 * 512);
    machine.host.shared.media.borrow_mut().resize(disk, 500);
    let address = vbdd::vbd::Address { kind: vbdd::vbd::Kind::Vbd, frontend: 7, devid: DEVID };
    machine.host.backend.as_mut().unwrap().measure(address).unwrap();
    assert_eq!(size(&mut machine), 500 * 512);
    let backend = machine.host.backend.as_mut().unwrap();
    machine.exporter.stop(backend, &mut machine.reactor);
    assert_eq!(machine.exporter.in_flight(), 0);
    assert!(!machine.dir.0.join("new/exports").join(SOCKET_NAME).exists());
}
