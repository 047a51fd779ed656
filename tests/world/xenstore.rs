//! A simulated xenstored: one plain struct, no thread, no clock, no I/O.
//!
//! It follows the C xenstored of Xen 4.17 in permissions, errors, quotas, conflicts and events; the conformance checks
//! hold it to the real one. On top it can misbehave in every way that the protocol allows: see [`Faults`].
//!
//! Two ways in: connections that carry bytes ([`XenstoreServer::connect`], `receive`, `step`, `transmit`), and direct
//! calls in the name of a domain (`write`, `read`, ...) for toolstacks and guests that are part of the script.

mod device;
mod requests;
pub mod socket;
mod store;
mod watches;

use std::collections::{BTreeMap, VecDeque};

use super::rng::Rng;
use ::xenstore::wire::{Decoder, Header, MessageType};
use ::xenstore::{ErrorCode, Permission, wire};
pub use store::{Node, Store};
use store::{Transaction, View};
use watches::Watch;

/// A domain's number.
pub type Domain = u16;

/// One connection, of one domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u32);

/// Limits for domains other than 0, with the real defaults.
#[derive(Clone, Copy, Debug)]
pub struct Quotas {
    /// Nodes that a domain may own.
    pub nodes: usize,
    /// Bytes of a node: header, permissions, value and names of the children.
    pub node_bytes: usize,
    /// Watches of a domain.
    pub watches: usize,
    /// Transactions open at once.
    pub transactions: usize,
    /// Replies not yet fetched, past which nothing more of that connection is looked at.
    pub outstanding: usize,
    /// Entries in a node's permissions.
    pub permissions: usize,
}

impl Default for Quotas {
    fn default() -> Quotas {
        Quotas {
            nodes: 1000,
            node_bytes: 2048,
            watches: 128,
            transactions: 10,
            outstanding: 20,
            permissions: 5,
        }
    }
}

/// Chances, each as (numerator, denominator), of what the protocol allows and a lazy test would never see.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// A watch fires although nothing happened; per step.
    pub spurious_event: (usize, usize),
    /// An event is sent twice.
    pub duplicate_event: (usize, usize),
    /// An event is held back for some steps.
    pub late_event: (usize, usize),
    /// A commit that could have been made is answered with EAGAIN.
    pub clash: (usize, usize),
    /// A reply overtakes earlier ones.
    pub overtaking_reply: (usize, usize),
}

impl Faults {
    /// None of it.
    pub const NONE: Faults = Faults {
        spurious_event: (0, 1),
        duplicate_event: (0, 1),
        late_event: (0, 1),
        clash: (0, 1),
        overtaking_reply: (0, 1),
    };

    /// A good deal of each.
    pub const MANY: Faults = Faults {
        spurious_event: (1, 50),
        duplicate_event: (1, 8),
        late_event: (1, 6),
        clash: (1, 4),
        overtaking_reply: (1, 4),
    };
}

/// Bugs that the real server does not have. A test that checks what clients make of the server must find each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// None.
    Nothing,
    /// Commits transactions although what they read has changed.
    IgnoresClashes,
    /// Drops every other event.
    LosesEvents,
}

/// A message on its way to a client.
#[derive(Clone, Debug)]
struct Outgoing {
    event: bool,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Connection {
    domain: Domain,
    decoder: Decoder,
    inbox: VecDeque<(Header, Vec<u8>)>,
    outbox: VecDeque<Outgoing>,
    /// The rest of a message that was fetched in part.
    partial: VecDeque<u8>,
    late: Vec<Outgoing>,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Transaction>,
    last_transaction: u32,
    outstanding_max_seen: usize,
    closed: bool,
}

impl Connection {
    fn replies_waiting(&self) -> usize {
        self.outbox.iter().filter(|message| !message.event).count()
    }
}

/// The server.
#[derive(Debug)]
pub struct XenstoreServer {
    store: Store,
    connections: BTreeMap<ConnectionId, Connection>,
    last_connection: u32,
    /// Who hears of `@introduceDomain` and `@releaseDomain` besides domain 0.
    special_readers: Vec<Domain>,
    introduced: Vec<Domain>,
    /// Its limits.
    pub quotas: Quotas,
    /// Its misbehaviour.
    pub faults: Faults,
    /// Its bug, for tests of the tests.
    pub planted: Planted,
    /// Commits refused with EAGAIN, those by chance included.
    pub clashes: u64,
    rng: Rng,
}

impl XenstoreServer {
    /// A server with nothing in it but the root and `/tool/xenstored`.
    pub fn new(seed: u64) -> XenstoreServer {
        XenstoreServer {
            store: Store::new(),
            connections: BTreeMap::new(),
            last_connection: 0,
            special_readers: Vec::new(),
            introduced: vec![0],
            quotas: Quotas::default(),
            faults: Faults::NONE,
            planted: Planted::Nothing,
            clashes: 0,
            rng: Rng::new(seed),
        }
    }

    /// Opens a connection for a domain. Domain 0 may do anything.
    pub fn connect(&mut self, domain: Domain) -> ConnectionId {
        self.last_connection += 1;
        let id = ConnectionId(self.last_connection);
        let connection = Connection {
            domain,
            decoder: Decoder::default(),
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            partial: VecDeque::new(),
            late: Vec::new(),
            watches: Vec::new(),
            transactions: BTreeMap::new(),
            last_transaction: 0,
            outstanding_max_seen: 0,
            closed: false,
        };
        self.connections.insert(id, connection);
        id
    }

    /// Ends a connection, from either side: its watches and transactions are gone.
    pub fn disconnect(&mut self, id: ConnectionId) {
        self.connections.remove(&id);
    }

    /// Whether the server has dropped the connection, or never had it.
    pub fn is_closed(&self, id: ConnectionId) -> bool {
        self.connections.get(&id).is_none_or(|connection| connection.closed)
    }

    /// Takes bytes that a client sent. A client that breaks the framing loses its connection.
    pub fn receive(&mut self, id: ConnectionId, bytes: &[u8]) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let mut input = bytes;
        while !connection.closed {
            match connection.decoder.next(&mut input) {
                Ok(Some(message)) => connection.inbox.push_back(message),
                Ok(None) => break,
                Err(_) => {
                    connection.closed = true;
                    connection.watches.clear();
                    connection.transactions.clear();
                    connection.inbox.clear();
                    connection.outbox.clear();
                }
            }
        }
        let outstanding = connection.inbox.len() + connection.replies_waiting();
        connection.outstanding_max_seen = connection.outstanding_max_seen.max(outstanding);
    }

    /// Fetches up to `most` bytes for a client.
    pub fn transmit(&mut self, id: ConnectionId, most: usize) -> Vec<u8> {
        let Some(connection) = self.connections.get_mut(&id) else { return Vec::new() };
        while connection.partial.len() < most {
            let Some(message) = connection.outbox.pop_front() else { break };
            connection.partial.extend(message.bytes);
        }
        let most = most.min(connection.partial.len());
        connection.partial.drain(..most).collect()
    }

    /// Serves one request of a connection that has one, chosen by chance. False when nobody has any.
    pub fn step(&mut self) -> bool {
        self.misbehave();
        let outstanding = self.quotas.outstanding;
        let ready: Vec<ConnectionId> = self
            .connections
            .iter()
            .filter(|(_, c)| !c.inbox.is_empty() && (c.domain == 0 || c.replies_waiting() < outstanding))
            .map(|(id, _)| *id)
            .collect();
        if ready.is_empty() {
            return false;
        }
        let id = *self.rng.pick(&ready);
        let message = self.connections.get_mut(&id).and_then(|connection| connection.inbox.pop_front());
        if let Some((header, payload)) = message {
            self.serve(id, header, &payload);
        }
        true
    }

    /// Serves all that was asked, and lets late events out.
    pub fn settle(&mut self) {
        while self.step() {}
        for connection in self.connections.values_mut() {
            connection.outbox.extend(connection.late.drain(..));
        }
    }

    /// The most requests that a connection ever had outstanding.
    pub fn outstanding_max_seen(&self, id: ConnectionId) -> usize {
        self.connections.get(&id).map_or(0, |connection| connection.outstanding_max_seen)
    }

    /// Transactions that a connection has open.
    pub fn transactions_open(&self, id: ConnectionId) -> usize {
        self.connections.get(&id).map_or(0, |connection| connection.transactions.len())
    }

    /// The watches of a connection, as (path, token).
    pub fn watches_of(&self, id: ConnectionId) -> Vec<(String, String)> {
        let watches = self.connections.get(&id).map(|connection| connection.watches.as_slice());
        watches.unwrap_or_default().iter().map(|w| (w.path.clone(), w.token.clone())).collect()
    }

    /// What is stored, for looking at it from outside.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Lets a domain hear of `@introduceDomain` and `@releaseDomain`, as `xenstore-chmod` would.
    pub fn allow_special(&mut self, domain: Domain) {
        self.special_readers.push(domain);
    }

    /// A new domain: its directory, readable and not writable by it, its `domid`, and the special event.
    pub fn introduce_domain(&mut self, domain: Domain) {
        let home = format!("/local/domain/{domain}");
        let _ = self.mkdir(0, &home);
        let readable = [(0, ::xenstore::Access::None), (domain, ::xenstore::Access::Read)];
        let list = readable.map(|(domain, access)| Permission { domain, access });
        let _ = self.set_permissions(0, &home, &list);
        let _ = self.write(0, &format!("{home}/domid"), domain.to_string().as_bytes());
        self.introduced.push(domain);
        self.fire_special("@introduceDomain");
    }

    /// A domain is gone: its connections end, the nodes that it owned vanish without an event, permissions for it are
    /// void, and the special event fires.
    pub fn release_domain(&mut self, domain: Domain) {
        self.connections.retain(|_, connection| connection.domain != domain);
        self.introduced.retain(|introduced| *introduced != domain);
        self.store.forget_domain(domain);
        self.fire_special("@releaseDomain");
    }

    /// Reads a node in the name of a domain.
    pub fn read(&mut self, domain: Domain, path: &str) -> Result<Vec<u8>, ErrorCode> {
        let node = self.view(domain).node_for(&absolute(domain, path), false)?;
        Ok(node.value.clone())
    }

    /// Writes a node in the name of a domain.
    pub fn write(&mut self, domain: Domain, path: &str, value: &[u8]) -> Result<(), ErrorCode> {
        self.direct(domain, |view| view.write(&absolute(domain, path), value))
    }

    /// Writes several nodes as one transaction would: no watch fires before all are written, and all or none is.
    pub fn write_all(&mut self, domain: Domain, pairs: &[(&str, &str)]) -> Result<(), ErrorCode> {
        let before = self.store.clone();
        let result = self.direct(domain, |view| {
            let mut write =
                |(path, value): &(&str, &str)| view.write(&absolute(domain, path), value.as_bytes());
            pairs.iter().try_for_each(&mut write)
        });
        if result.is_err() {
            self.store = before;
        }
        result
    }

    /// Makes a node in the name of a domain.
    pub fn mkdir(&mut self, domain: Domain, path: &str) -> Result<(), ErrorCode> {
        self.direct(domain, |view| view.mkdir(&absolute(domain, path)))
    }

    /// Removes a node and all below in the name of a domain.
    pub fn remove(&mut self, domain: Domain, path: &str) -> Result<(), ErrorCode> {
        self.direct(domain, |view| view.remove(&absolute(domain, path)))
    }

    /// Sets the permissions of a node in the name of a domain.
    pub fn set_permissions(
        &mut self,
        domain: Domain,
        path: &str,
        list: &[Permission],
    ) -> Result<(), ErrorCode> {
        self.direct(domain, |view| view.set_permissions(&absolute(domain, path), list))
    }

    /// A view of the live store for a domain.
    fn view(&mut self, domain: Domain) -> View<'_> {
        View { store: &mut self.store, domain, quotas: self.quotas, log: None, events: Vec::new() }
    }

    fn direct(
        &mut self,
        domain: Domain,
        change: impl FnOnce(&mut View<'_>) -> Result<(), ErrorCode>,
    ) -> Result<(), ErrorCode> {
        let mut view = self.view(domain);
        let result = change(&mut view);
        let events = view.events;
        if result.is_ok() {
            self.fire_all(&events);
        }
        result
    }

    fn reply(&mut self, id: ConnectionId, header: Header, kind: MessageType, payload: &[u8]) {
        let message = wire::encode(kind, header.request, header.transaction, &[payload]);
        let too_big = || wire::encode(MessageType::Error, header.request, header.transaction, &[b"E2BIG\0"]);
        let Some(bytes) = message.or_else(too_big) else { return };
        let (numerator, denominator) = self.faults.overtaking_reply;
        let overtakes = self.rng.chance(numerator, denominator);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let at =
            if overtakes { self.rng.below(connection.outbox.len() + 1) } else { connection.outbox.len() };
        connection.outbox.insert(at, Outgoing { event: false, bytes });
    }

    /// What happens without anybody asking.
    fn misbehave(&mut self) {
        let Faults { spurious_event: (numerator, denominator), .. } = self.faults;
        if self.rng.chance(numerator, denominator) {
            self.fire_spurious();
        }
        for connection in self.connections.values_mut() {
            if !connection.late.is_empty() && self.rng.chance(1, 4) {
                let at = self.rng.below(connection.late.len());
                let message = connection.late.swap_remove(at);
                connection.outbox.push_back(message);
            }
        }
    }
}

/// A path as the server sees it: relative ones start at the domain's directory.
fn absolute(domain: Domain, path: &str) -> String {
    if path.starts_with(['/', '@']) { path.to_owned() } else { format!("/local/domain/{domain}/{path}") }
}
