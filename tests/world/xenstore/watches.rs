//! Watches of the simulated server: who hears of what, and when.

use ::xenstore::wire::{self, MessageType};
use ::xenstore::{ErrorCode, Path};

use super::store::Change;
use super::{ConnectionId, Outgoing, Planted, XenstoreServer, absolute};

#[derive(Clone, Debug)]
pub(super) struct Watch {
    /// As the client spelt it.
    pub(super) path: String,
    /// As the server sees it.
    pub(super) absolute: String,
    pub(super) token: String,
}

impl Watch {
    /// The path in an event: spelt as the watch was.
    fn spell(&self, path: &str) -> String {
        if self.path == self.absolute {
            return path.to_owned();
        }
        let home = self.absolute.strip_suffix(&self.path).unwrap_or_default();
        path.strip_prefix(home).unwrap_or(path).to_owned()
    }

    fn hears(&self, change: &Change) -> bool {
        if change.exact {
            return self.absolute == change.path;
        }
        match change.path.strip_prefix(&self.absolute) {
            Some(rest) => rest.is_empty() || rest.starts_with('/'),
            None => self.absolute == "/" && change.path.starts_with('/'),
        }
    }
}

impl XenstoreServer {
    pub(super) fn watch(&mut self, id: ConnectionId, path: &str, token: &str) -> Result<(), ErrorCode> {
        let quota = self.quotas.watches;
        let Some(connection) = self.connections.get_mut(&id) else { return Err(ErrorCode::Invalid) };
        let absolute = absolute(connection.domain, path);
        if Path::parse(&absolute).is_err() {
            return Err(ErrorCode::Invalid);
        }
        if connection.watches.iter().any(|w| w.absolute == absolute && w.token == token) {
            return Err(ErrorCode::Exists);
        }
        if connection.domain != 0 && connection.watches.len() >= quota {
            return Err(ErrorCode::TooBig);
        }
        connection.watches.push(Watch { path: path.to_owned(), absolute, token: token.to_owned() });
        Ok(())
    }

    pub(super) fn unwatch(&mut self, id: ConnectionId, path: &str, token: &str) -> Result<(), ErrorCode> {
        let Some(connection) = self.connections.get_mut(&id) else { return Err(ErrorCode::Invalid) };
        let absolute = absolute(connection.domain, path);
        let found = connection.watches.iter().position(|w| w.absolute == absolute && w.token == token);
        connection.watches.remove(found.ok_or(ErrorCode::Missing)?);
        Ok(())
    }

    pub(super) fn fire_all(&mut self, changes: &[Change]) {
        for change in changes {
            let mut events = Vec::new();
            for (id, connection) in &self.connections {
                if !change.may_be_heard_by(connection.domain) {
                    continue;
                }
                for watch in connection.watches.iter().filter(|watch| watch.hears(change)) {
                    events.push((*id, watch.spell(&change.path), watch.token.clone()));
                }
            }
            for (id, path, token) in events {
                self.send_event(id, &path, &token);
            }
        }
    }

    pub(super) fn fire_special(&mut self, name: &str) {
        let mut events = Vec::new();
        for (id, connection) in &self.connections {
            if connection.domain == 0 || self.special_readers.contains(&connection.domain) {
                let watches = connection.watches.iter().filter(|watch| watch.path == name);
                events.extend(watches.map(|watch| (*id, watch.token.clone())));
            }
        }
        for (id, token) in events {
            self.send_event(id, name, &token);
        }
    }

    /// Fires some watch of somebody for no reason at all.
    pub(super) fn fire_spurious(&mut self) {
        let all = self.connections.iter().flat_map(|(id, connection)| {
            connection.watches.iter().map(|watch| (*id, watch.path.clone(), watch.token.clone()))
        });
        let all: Vec<_> = all.collect();
        if !all.is_empty() {
            let (id, path, token) = self.rng.pick(&all).clone();
            self.send_event(id, &path, &token);
        }
    }

    /// Queues an event, unless the very same one waits already. Events of the kernel's device carry junk numbers.
    pub(super) fn send_event(&mut self, id: ConnectionId, path: &str, token: &str) {
        let junk = u32::try_from(self.rng.below(40)).unwrap_or(0);
        let parts: [&[u8]; 4] = [path.as_bytes(), b"\0", token.as_bytes(), b"\0"];
        let Some(bytes) = wire::encode(MessageType::WatchEvent, junk, junk, &parts) else { return };
        let (late, twice) = (self.faults.late_event, self.faults.duplicate_event);
        let (late, twice) = (self.rng.chance(late.0, late.1), self.rng.chance(twice.0, twice.1));
        if self.planted == Planted::LosesEvents && self.rng.chance(1, 2) {
            return;
        }
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let message = Outgoing { event: true, bytes };
        let same = |other: &Outgoing| {
            other.event && other.bytes.get(wire::HEADER_BYTES..) == message.bytes.get(wire::HEADER_BYTES..)
        };
        if !twice && connection.outbox.iter().any(same) {
            return;
        }
        if twice {
            connection.outbox.push_back(message.clone());
        }
        if late {
            connection.late.push(message);
        } else {
            connection.outbox.push_back(message);
        }
    }
}
