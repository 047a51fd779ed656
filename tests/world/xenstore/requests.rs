//! What each request does, and which errno it fails with.

use ::xenstore::wire::{Header, MessageType, PAYLOAD_BYTES_MAX};
use ::xenstore::{ErrorCode, Permission};

use super::store::{Transaction, View};
use super::{ConnectionId, Domain, Planted, XenstoreServer, absolute};

type Answer = Result<Vec<u8>, ErrorCode>;

impl XenstoreServer {
    /// Serves one request; there is exactly one reply.
    pub(super) fn serve(&mut self, id: ConnectionId, header: Header, payload: &[u8]) {
        let Some(domain) = self.connections.get(&id).map(|connection| connection.domain) else { return };
        let kind = MessageType::from_number(header.kind);
        let answer = match kind {
            Some(kind) => self.answer(id, domain, kind, header.transaction, payload),
            None => Err(ErrorCode::Unsupported),
        };
        match (kind, answer) {
            (Some(kind), Ok(reply)) => self.reply(id, header, kind, &reply),
            (_, Err(code)) => {
                self.reply(id, header, MessageType::Error, format!("{}\0", code.name()).as_bytes());
                return;
            }
            (None, Ok(_)) => {}
        }
        if let (Some(MessageType::Watch), Some([path, token])) = (kind, strings(payload)) {
            self.send_event(id, path, token);
        }
    }

    fn answer(
        &mut self,
        id: ConnectionId,
        domain: Domain,
        kind: MessageType,
        transaction: u32,
        payload: &[u8],
    ) -> Answer {
        match kind {
            MessageType::Watch | MessageType::Unwatch => {
                let [path, token] = strings(payload).ok_or(ErrorCode::Invalid)?;
                match kind {
                    MessageType::Watch => self.watch(id, path, token)?,
                    _ => self.unwatch(id, path, token)?,
                }
                return ok();
            }
            MessageType::Control
            | MessageType::Introduce
            | MessageType::Release
            | MessageType::Resume
            | MessageType::SetTarget
            | MessageType::IsDomainIntroduced
                if domain != 0 =>
            {
                return Err(ErrorCode::Denied);
            }
            MessageType::WatchEvent | MessageType::Error => return Err(ErrorCode::Unsupported),
            _ => {}
        }
        let open = self.connections.get(&id).is_some_and(|c| c.transactions.contains_key(&transaction));
        if transaction != 0 && !open {
            return Err(ErrorCode::Missing);
        }
        match kind {
            MessageType::TransactionStart => self.start(id, domain, transaction),
            MessageType::TransactionEnd => self.end(id, transaction, payload),
            MessageType::ResetWatches => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.watches.clear();
                    connection.transactions.clear();
                }
                ok()
            }
            MessageType::GetDomainPath => {
                let number: Domain = one(payload)?.parse().map_err(|_| ErrorCode::Invalid)?;
                Ok(format!("/local/domain/{number}\0").into_bytes())
            }
            MessageType::IsDomainIntroduced => {
                let number: Domain = one(payload)?.parse().map_err(|_| ErrorCode::Invalid)?;
                Ok(if self.introduced.contains(&number) { b"T\0".to_vec() } else { b"F\0".to_vec() })
            }
            MessageType::Control
            | MessageType::Introduce
            | MessageType::Release
            | MessageType::Resume
            | MessageType::SetTarget => Err(ErrorCode::Unsupported),
            _ => self.on_nodes(id, domain, kind, transaction, payload),
        }
    }

    fn start(&mut self, id: ConnectionId, domain: Domain, inside: u32) -> Answer {
        if inside != 0 {
            return Err(ErrorCode::Busy);
        }
        let quota = self.quotas.transactions;
        let Some(connection) = self.connections.get_mut(&id) else { return Err(ErrorCode::Invalid) };
        if domain != 0 && connection.transactions.len() > quota {
            return Err(ErrorCode::NoSpace);
        }
        connection.last_transaction += 1;
        let number = connection.last_transaction;
        connection.transactions.insert(number, Transaction::new(&self.store));
        Ok(format!("{number}\0").into_bytes())
    }

    fn end(&mut self, id: ConnectionId, number: u32, payload: &[u8]) -> Answer {
        let commit = match payload {
            b"T\0" => true,
            b"F\0" => false,
            _ => return Err(ErrorCode::Invalid),
        };
        let transaction = self.connections.get_mut(&id).and_then(|c| c.transactions.remove(&number));
        let transaction = transaction.ok_or(ErrorCode::Missing)?;
        if !commit {
            return ok();
        }
        if transaction.spoilt {
            return Err(ErrorCode::NoMemory);
        }
        let (numerator, denominator) = self.faults.clash;
        let clashes = transaction.clashes(&self.store) && self.planted != Planted::IgnoresClashes;
        if clashes || self.rng.chance(numerator, denominator) {
            self.clashes += 1;
            return Err(ErrorCode::Again);
        }
        transaction.apply(&mut self.store);
        self.fire_all(&transaction.events);
        ok()
    }

    /// A request on nodes, in a transaction or outside.
    fn on_nodes(
        &mut self,
        id: ConnectionId,
        domain: Domain,
        kind: MessageType,
        number: u32,
        payload: &[u8],
    ) -> Answer {
        let quotas = self.quotas;
        if number == 0 {
            let mut view = View { store: &mut self.store, domain, quotas, log: None, events: Vec::new() };
            let answer = on_view(&mut view, kind, payload);
            let events = view.events;
            if answer.is_ok() {
                self.fire_all(&events);
            }
            return answer;
        }
        let transaction = self.connections.get_mut(&id).and_then(|c| c.transactions.get_mut(&number));
        let Some(transaction) = transaction else { return Err(ErrorCode::Missing) };
        let log = Some(&mut transaction.log);
        let mut view = View { store: &mut transaction.store, domain, quotas, log, events: Vec::new() };
        let answer = on_view(&mut view, kind, payload);
        let events = view.events;
        match &answer {
            Ok(_) => transaction.events.extend(events),
            Err(ErrorCode::NoSpace) => transaction.spoilt = true,
            Err(_) => {}
        }
        answer
    }
}

fn on_view(view: &mut View<'_>, kind: MessageType, payload: &[u8]) -> Answer {
    let domain = view.domain;
    match kind {
        MessageType::Read => Ok(view.node_for(&absolute(domain, one(payload)?), false)?.value.clone()),
        MessageType::Directory => {
            let node = view.node_for(&absolute(domain, one(payload)?), false)?;
            Ok(node.children.iter().flat_map(|name| format!("{name}\0").into_bytes()).collect())
        }
        MessageType::DirectoryPart => {
            let [path, offset] = strings(payload).ok_or(ErrorCode::Invalid)?;
            let node = view.node_for(&absolute(domain, path), false)?;
            let names: Vec<u8> =
                node.children.iter().flat_map(|name| format!("{name}\0").into_bytes()).collect();
            Ok(part(&names, offset.parse().unwrap_or(0), node.generation))
        }
        MessageType::GetPerms => {
            let node = view.node_for(&absolute(domain, one(payload)?), false)?;
            let mut text = String::new();
            for entry in &node.permissions {
                entry.encode(&mut text);
                text.push('\0');
            }
            Ok(text.into_bytes())
        }
        MessageType::Write => {
            let end = payload.iter().position(|b| *b == 0).ok_or(ErrorCode::Invalid)?;
            let path = std::str::from_utf8(&payload[..end]).map_err(|_| ErrorCode::Invalid)?;
            view.write(&absolute(domain, path), &payload[end + 1..])?;
            ok()
        }
        MessageType::Mkdir => {
            view.mkdir(&absolute(domain, one(payload)?))?;
            ok()
        }
        MessageType::Rm => {
            view.remove(&absolute(domain, one(payload)?))?;
            ok()
        }
        MessageType::SetPerms => {
            let end = payload.iter().position(|b| *b == 0).ok_or(ErrorCode::Invalid)?;
            let path = std::str::from_utf8(&payload[..end]).map_err(|_| ErrorCode::Invalid)?;
            let list = Permission::parse_list(&payload[end + 1..]).ok_or(ErrorCode::Invalid)?;
            view.set_permissions(&absolute(domain, path), &list)?;
            ok()
        }
        _ => Err(ErrorCode::Unsupported),
    }
}

/// Whole names from `offset` on, as many as fit; a NUL more behind the last of all.
fn part(names: &[u8], offset: usize, generation: u64) -> Vec<u8> {
    let mut reply = format!("{generation}\0").into_bytes();
    let rest = names.get(offset..).unwrap_or_default();
    let room = PAYLOAD_BYTES_MAX - reply.len() - 1;
    let mut taken = 0;
    for name in rest.split_inclusive(|b| *b == 0) {
        if taken + name.len() > room {
            break;
        }
        taken += name.len();
    }
    reply.extend_from_slice(&rest[..taken]);
    if taken == rest.len() {
        reply.push(0);
    }
    reply
}

fn ok() -> Answer {
    Ok(b"OK\0".to_vec())
}

/// The one string of a payload, with exactly one NUL at its end.
fn one(payload: &[u8]) -> Result<&str, ErrorCode> {
    let text = payload.strip_suffix(b"\0").filter(|text| !text.contains(&0)).ok_or(ErrorCode::Invalid)?;
    std::str::from_utf8(text).map_err(|_| ErrorCode::Invalid)
}

/// The two strings of a payload.
fn strings(payload: &[u8]) -> Option<[&str; 2]> {
    let mut parts = payload.strip_suffix(b"\0")?.split(|b| *b == 0);
    let (first, second) = (parts.next()?, parts.next()?);
    parts.next().is_none().then_some(())?;
    Some([std::str::from_utf8(first).ok()?, std::str::from_utf8(second).ok()?])
}
