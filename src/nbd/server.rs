//! The server: exports, clients, and the way of their requests to disks.
//!
//! One owner drives it: descriptors that are ready go in by [`Server::ready`], [`Server::turn`] receives and asks disks,
//! [`Server::answered`] takes their answers, [`Server::send`] sends replies. Nothing here waits; no client waits for another but
//! for memory, and of that each has a share.

mod budget;
mod client;
mod exports;
mod handshake;
mod listen;
mod output;
mod replies;
mod session;

pub use exports::{Export, ExportId, Exports};
pub use listen::{Address, Listener};

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::buffers::Pool;
use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::limits::{NBD_ACCEPTS_PER_TURN, NBD_CLIENTS_MAX, NBD_REST, NBD_RETRY};
use crate::pump::{DiskId, Outside, Pump};
use crate::reactor::{Reactor, Ready};
use crate::storage::{Storage, StorageError};
use budget::Budget;
use client::Client;
use listen::Arrival;

/// What the server needs of whoever has the disks.
pub trait Disks {
    /// The memory that requests name.
    fn buffers(&mut self) -> &mut Pool;

    /// Starts a request, whose answer goes to [`Server::answered`]. A flush covers what was answered before.
    fn ask(&mut self, disk: DiskId, request: Outside);
}

impl<H: Hypervisor, S: Storage> Disks for Pump<H, S> {
    fn buffers(&mut self) -> &mut Pool {
        self.storage.buffers()
    }

    fn ask(&mut self, disk: DiskId, request: Outside) {
        Pump::ask(self, disk, request);
    }
}

/// What a client's steps need of the world.
struct Cx<'a, D> {
    disks: &'a mut D,
    budget: &'a mut Budget,
    client: u16,
    now: Duration,
}

impl<D> Cx<'_, D> {
    fn token(&self, place: u16) -> u64 {
        u64::from(self.client) << 16 | u64::from(place)
    }
}

/// Listeners at most; the first keys of the poller are theirs.
const LISTENERS_MAX: usize = 4;

/// See the module.
#[derive(Debug)]
pub struct Server {
    exports: Exports,
    listeners: Vec<Listener>,
    clients: Vec<Option<Client>>,
    budget: Budget,
    first_key: usize,
    /// Clients from which something came.
    readable: Vec<u16>,
    /// Clients that have closed both directions.
    gone: Vec<u16>,
    /// Clients that may have something to send.
    touched: Vec<u16>,
    first_to_go_on: usize,
    /// A listener has somebody waiting.
    arrivals: bool,
    /// When it listens again, after it could not take a client.
    listens_at: Option<Duration>,
    now: Duration,
}

impl Server {
    /// A server without listeners. Its keys of the poller begin at `first_key` and have no end.
    #[must_use]
    pub fn new(first_key: usize) -> Server {
        Server {
            exports: Exports::default(),
            listeners: Vec::new(),
            clients: Vec::new(),
            budget: Budget::default(),
            first_key,
            readable: Vec::new(),
            gone: Vec::new(),
            touched: Vec::new(),
            first_to_go_on: 0,
            arrivals: false,
            listens_at: None,
            now: Duration::ZERO,
        }
    }

    /// Takes clients from `listener` from now on.
    ///
    /// # Errors
    /// When it cannot be polled, or is one too many.
    pub fn listen(&mut self, listener: Listener, reactor: &mut Reactor) -> Result<(), Error> {
        if self.listeners.len() >= LISTENERS_MAX {
            return Err(Error::new(format!("more than {LISTENERS_MAX} places to listen at"), ""));
        }
        reactor.add(listener.as_fd(), self.first_key + self.listeners.len(), false)?;
        self.listeners.push(listener);
        Ok(())
    }

    /// Takes no more clients.
    pub fn stop_listening(&mut self, reactor: &mut Reactor) {
        for listener in self.listeners.drain(..) {
            if self.listens_at.is_none() {
                reactor.remove(listener.as_fd());
            }
        }
        self.arrivals = false;
        self.listens_at = None;
    }

    /// Offers a disk.
    pub fn add_export(&mut self, export: Export) -> ExportId {
        self.exports.add(export)
    }

    /// Offers a disk no more, and closes the connections that use it. Its requests in flight go on:
    /// see [`Server::requests_of`].
    pub fn remove_export(&mut self, export: ExportId, disks: &mut impl Disks, reactor: &mut Reactor) {
        self.exports.remove(export);
        for at in 0..self.clients.len() {
            if self.clients.get(at).and_then(Option::as_ref).is_some_and(|one| one.export() == Some(export)) {
                self.close(at, disks, reactor);
            }
        }
    }

    /// Requests of an export that its disk has not answered, also after it was removed; and replies that are not sent.
    #[must_use]
    pub fn requests_of(&self, export: ExportId) -> usize {
        let of = self.clients.iter().flatten().filter(|client| client.export() == Some(export));
        of.map(Client::in_flight).sum()
    }

    /// Clients that are connected.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.clients.iter().flatten().filter(|client| client.socket.is_some()).count()
    }

    /// Requests that no disk has answered, and replies that are not sent.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.clients.iter().flatten().map(Client::in_flight).sum()
    }

    /// Closes every connection.
    pub fn close_all(&mut self, disks: &mut impl Disks, reactor: &mut Reactor) {
        (0..self.clients.len()).for_each(|at| self.close(at, disks, reactor));
    }

    /// A descriptor is ready. Only for keys from `first_key` on.
    pub fn ready(&mut self, ready: Ready) {
        let Some(at) = ready.key.checked_sub(self.first_key + LISTENERS_MAX) else {
            self.arrivals = true;
            return;
        };
        let Some(client) = self.clients.get_mut(at).and_then(Option::as_mut) else { return };
        let Ok(id) = u16::try_from(at) else { return };
        let Some((reads, _)) = client.polled else { return };
        if ready.readable && !reads {
            // Nobody is there any more to take a reply.
            self.gone.push(id);
        } else if ready.readable {
            self.readable.push(id);
        }
        if ready.writable {
            self.touched.push(id);
        }
    }

    /// Takes new clients, receives from those that have sent something, and asks disks.
    pub fn turn(&mut self, disks: &mut impl Disks, now: Duration, reactor: &mut Reactor) {
        self.now = now;
        self.accept(disks, reactor);
        self.end_the_late(disks, reactor);
        self.budget.take_progress();
        let mut gone = std::mem::take(&mut self.gone);
        gone.drain(..).for_each(|id| self.close(id.into(), disks, reactor));
        self.gone = gone;
        self.go_on(disks, reactor);
        let mut readable = std::mem::take(&mut self.readable);
        for id in readable.drain(..) {
            self.step(id.into(), disks, reactor, |client, exports, cx| {
                client.waits || client.receive(exports, cx)
            });
        }
        self.readable = readable;
    }

    /// Lets clients go on that wait for memory or room; another is the first each time.
    fn go_on(&mut self, disks: &mut impl Disks, reactor: &mut Reactor) {
        let (count, first) = (self.clients.len(), self.first_to_go_on);
        for at in (0..count).map(|at| (at + first) % count) {
            let client = self.clients.get(at).and_then(Option::as_ref);
            if client.is_some_and(|client| client.waits && client.socket.is_some()) {
                self.step(at, disks, reactor, |client, exports, cx| client.take(exports, cx));
            }
        }
        self.first_to_go_on = (first + 1) % count.max(1);
    }

    /// A disk has answered.
    pub fn answered(&mut self, token: u64, result: Result<(), StorageError>, disks: &mut impl Disks) {
        let (Ok(id), Ok(place)) = (u16::try_from(token >> 16), u16::try_from(token & 0xffff)) else { return };
        let (budget, now) = (&mut self.budget, self.now);
        let Some(slot) = self.clients.get_mut(usize::from(id)) else { return };
        let Some(client) = slot else { return };
        client.answered(place, result, &mut Cx { disks, budget, client: id, now });
        if client.is_gone() {
            *slot = None;
        } else if client.has_output() {
            touch(&mut self.touched, id);
        }
    }

    /// Sends what there is to send. True when there is more to do at once: [`Server::turn`] is to be called again.
    pub fn send(&mut self, disks: &mut impl Disks, now: Duration, reactor: &mut Reactor) -> bool {
        self.now = now;
        let mut touched = std::mem::take(&mut self.touched);
        for id in touched.drain(..) {
            self.step(id.into(), disks, reactor, |client, _, cx| client.send(cx));
        }
        self.touched = touched;
        self.budget.take_progress() && self.clients.iter().flatten().any(|client| client.waits)
    }

    /// When [`Server::turn`] wants to be called though nothing happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let all = || self.clients.iter().flatten();
        let starved = all().any(|client| client.waits) && self.budget.held_bytes() == 0;
        let retry = starved.then_some(self.now + NBD_RETRY);
        all().filter_map(Client::deadline).chain(self.listens_at).chain(retry).min()
    }

    /// Does something with a client, and brings the poller up to date. A client that is of no use any more is closed.
    fn step<D: Disks>(
        &mut self,
        at: usize,
        disks: &mut D,
        reactor: &mut Reactor,
        what: impl FnOnce(&mut Client, &Exports, &mut Cx<'_, D>) -> bool,
    ) {
        let Some(client) = self.clients.get_mut(at).and_then(Option::as_mut) else { return };
        if client.socket.is_none() {
            return;
        }
        let Ok(id) = u16::try_from(at) else { return };
        let mut cx = Cx { disks, budget: &mut self.budget, client: id, now: self.now };
        if !what(client, &self.exports, &mut cx) {
            return self.close(at, disks, reactor);
        }
        if client.has_output() || client.interest() == (false, false) {
            touch(&mut self.touched, id);
        }
        self.poll(at, disks, reactor);
    }

    /// Tells the poller what to look for now.
    fn poll(&mut self, at: usize, disks: &mut impl Disks, reactor: &mut Reactor) {
        let key = self.first_key + LISTENERS_MAX + at;
        let Some(client) = self.clients.get_mut(at).and_then(Option::as_mut) else { return };
        let (wanted, Some(socket), Some(polled)) = (client.interest(), &client.socket, client.polled) else {
            return;
        };
        if polled == wanted {
            return;
        }
        match reactor.set_interest(socket.as_fd(), key, wanted.0, wanted.1) {
            Ok(()) => client.polled = Some(wanted),
            Err(error) => {
                log::warn!("nbd: {error}");
                self.close(at, disks, reactor);
            }
        }
    }

    fn close(&mut self, at: usize, disks: &mut impl Disks, reactor: &mut Reactor) {
        let Some(slot) = self.clients.get_mut(at) else { return };
        let (Some(client), Ok(id)) = (slot.as_mut(), u16::try_from(at)) else { return };
        if let Some(socket) = client.socket.take() {
            if client.polled.take().is_some() {
                reactor.remove(socket.as_fd());
            }
            log::debug!("nbd: client {at} is gone");
        }
        client.let_go(&mut Cx { disks, budget: &mut self.budget, client: id, now: self.now });
        if client.is_gone() {
            *slot = None;
        }
    }

    fn end_the_late(&mut self, disks: &mut impl Disks, reactor: &mut Reactor) {
        for at in 0..self.clients.len() {
            let deadline = self.clients.get(at).and_then(Option::as_ref).and_then(Client::deadline);
            if deadline.is_some_and(|deadline| deadline <= self.now) {
                log::info!("nbd: client {at} took too long, and is disconnected");
                self.close(at, disks, reactor);
            }
        }
    }

    fn accept(&mut self, disks: &mut impl Disks, reactor: &mut Reactor) {
        if self.listens_at.is_some_and(|at| at <= self.now) {
            self.listens_at = None;
            for (listener, key) in self.listeners.iter().zip(self.first_key..) {
                if let Err(error) = reactor.add(listener.as_fd(), key, false) {
                    log::warn!("nbd: {error}");
                }
            }
        }
        if !std::mem::take(&mut self.arrivals) {
            return;
        }
        for at in 0..self.listeners.len() {
            for _ in 0..NBD_ACCEPTS_PER_TURN {
                match self.listeners.get(at).map_or(Arrival::Nobody, Listener::accept) {
                    Arrival::Nobody => break,
                    Arrival::Client(socket) => self.enter(socket, disks, reactor),
                    Arrival::Failed(error) => return self.rest(&error, reactor),
                }
            }
        }
    }

    /// Takes a client whose socket came from elsewhere than a listener; it must not block. One too many is refused by
    /// closing it.
    pub fn enter(&mut self, socket: OwnedFd, disks: &mut impl Disks, reactor: &mut Reactor) {
        let mut client = Client::new(socket, self.now);
        let at = self.clients.iter().position(Option::is_none).unwrap_or(self.clients.len());
        if at >= NBD_CLIENTS_MAX {
            log::info!("nbd: {NBD_CLIENTS_MAX} clients are connected: another is refused");
            return;
        }
        let Some(socket) = &client.socket else { return };
        let key = self.first_key + LISTENERS_MAX + at;
        if let Err(error) = reactor.add(socket.as_fd(), key, false) {
            return log::warn!("nbd: {error}");
        }
        client.polled = Some((true, false));
        if at == self.clients.len() {
            self.clients.push(None);
        }
        if let Some(slot) = self.clients.get_mut(at) {
            *slot = Some(client);
        }
        self.step(at, disks, reactor, |client, _, cx| client.send(cx));
    }

    /// Stops to listen for a while: a descriptor is missing, and whoever waits would be announced for ever.
    fn rest(&mut self, error: &std::io::Error, reactor: &mut Reactor) {
        log::warn!("nbd: cannot take a client: {error}; the next try is in a second");
        self.listeners.iter().for_each(|listener| reactor.remove(listener.as_fd()));
        self.listens_at = Some(self.now + NBD_REST);
    }
}

fn touch(touched: &mut Vec<u16>, id: u16) {
    if !touched.contains(&id) {
        touched.push(id);
    }
}
