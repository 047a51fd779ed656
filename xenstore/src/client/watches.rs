//! Watches: what the owner wants, what the server knows of it, and the events not yet taken.
//!
//! Events are remembered per watch and handed out to each watch in turn, so one guest that changes its nodes without end
//! neither grows our memory nor keeps the events of others waiting.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write as _;

use super::edits::terminated;
use super::limits::{EVENT_BYTES_MAX, EVENTS_PER_WATCH_MAX, WATCHES_MAX};
use super::types::{Event, ProtocolError, SubmitError, WatchToken};
use crate::path::Path;
use crate::wire::{ErrorCode, MessageType};

type Key = (WatchToken, Path);

/// What the server knows of a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    No,
    /// The answer to a WATCH or UNWATCH is awaited.
    Asked,
    Yes,
}

#[derive(Debug)]
struct Watch {
    wanted: bool,
    known: Known,
    pending: VecDeque<Path>,
    /// The pending event stands for all there were.
    collapsed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Watches {
    table: BTreeMap<Key, Watch>,
    /// Watches whose wish and whose state at the server differ.
    to_ask: BTreeSet<Key>,
    /// Watches with pending events, each once, in the order of their turns.
    turns: VecDeque<Key>,
    pending_bytes: usize,
    failed: VecDeque<(Key, ErrorCode)>,
    pub(super) coalesced: u64,
    pub(super) ignored: u64,
}

/// Path and token, each with its NUL.
pub(super) fn payload(path: &Path, token: WatchToken) -> Vec<u8> {
    let mut payload = terminated(path);
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(text, "{}\0", token.0);
    payload.extend_from_slice(text.as_bytes());
    payload
}

impl Watches {
    pub(super) fn watch(
        &mut self,
        path: &Path,
        token: WatchToken,
        connected: bool,
    ) -> Result<(), SubmitError> {
        let key = (token, path.clone());
        if let Some(watch) = self.table.get_mut(&key) {
            watch.wanted = true;
            if watch.known == Known::Yes {
                self.to_ask.remove(&key);
            }
            if watch.known != Known::No {
                // The server may not fire again at a registration that it never lost.
                self.remember(&key, path.clone());
            }
        } else if self.table.len() + self.failed.len() >= WATCHES_MAX {
            return Err(SubmitError::Full);
        } else {
            let watch = Watch { wanted: true, known: Known::No, pending: VecDeque::new(), collapsed: false };
            self.table.insert(key.clone(), watch);
            if connected {
                self.to_ask.insert(key);
            }
        }
        Ok(())
    }

    pub(super) fn unwatch(&mut self, path: &Path, token: WatchToken) {
        let key = (token, path.clone());
        self.failed.retain(|(failed, _)| *failed != key);
        let Some(watch) = self.table.get_mut(&key) else { return };
        watch.wanted = false;
        match watch.known {
            Known::No => {
                self.to_ask.remove(&key);
                self.forget_events(&key);
                self.table.remove(&key);
                return;
            }
            Known::Yes => {
                self.to_ask.insert(key.clone());
            }
            Known::Asked => {}
        }
        self.forget_events(&key);
    }

    pub(super) fn disconnected(&mut self) {
        self.to_ask.clear();
        self.turns.clear();
        self.pending_bytes = 0;
        self.table.retain(|_, watch| watch.wanted);
        for watch in self.table.values_mut() {
            watch.known = Known::No;
            watch.pending.clear();
            watch.collapsed = false;
        }
    }

    pub(super) fn register_all(&mut self) {
        self.to_ask.extend(self.table.keys().cloned());
    }

    /// The next WATCH or UNWATCH.
    pub(super) fn next_request(&mut self) -> Option<(MessageType, WatchToken, Path)> {
        while let Some(key) = self.to_ask.pop_first() {
            let Some(watch) = self.table.get_mut(&key) else { continue };
            let kind = match (watch.wanted, watch.known) {
                (true, Known::No) => MessageType::Watch,
                (false, Known::Yes) => MessageType::Unwatch,
                _ => continue,
            };
            watch.known = Known::Asked;
            return Some((kind, key.0, key.1));
        }
        None
    }

    pub(super) fn registered(&mut self, token: WatchToken, path: Path, result: Result<(), ErrorCode>) {
        let key = (token, path);
        let Some(watch) = self.table.get_mut(&key) else { return };
        match result {
            Ok(()) | Err(ErrorCode::Exists) => {
                watch.known = Known::Yes;
                if !watch.wanted {
                    self.to_ask.insert(key);
                }
            }
            Err(code) => {
                let wanted = watch.wanted;
                self.forget_events(&key);
                self.table.remove(&key);
                if wanted {
                    self.failed.push_back((key, code));
                }
            }
        }
    }

    pub(super) fn removed(&mut self, token: WatchToken, path: Path) {
        let key = (token, path);
        let Some(watch) = self.table.get_mut(&key) else { return };
        // Even a refusal means that the server has no such watch.
        watch.known = Known::No;
        if watch.wanted {
            self.to_ask.insert(key);
        } else {
            self.forget_events(&key);
            self.table.remove(&key);
        }
    }

    /// Takes a WATCH_EVENT: the path and the token, each with its NUL.
    pub(super) fn fired(&mut self, payload: &[u8]) -> Result<(), ProtocolError> {
        let malformed = ProtocolError::Malformed(MessageType::WatchEvent);
        let mut parts = payload.split(|b| *b == 0);
        let (Some(path), Some(token), Some([])) = (parts.next(), parts.next(), parts.next()) else {
            return Err(malformed);
        };
        let path = Path::from_bytes(path).map_err(|_| malformed)?;
        let Some(token) = core::str::from_utf8(token).ok().and_then(|text| text.parse().ok()).map(WatchToken)
        else {
            self.ignored += 1;
            return Ok(());
        };
        let mut matching = Vec::new();
        for (key, watch) in self.table.range((token, Path::least())..).take_while(|(key, _)| key.0 == token) {
            if watch.wanted && path.is_within(&key.1) {
                matching.push(key.clone());
            }
        }
        if matching.is_empty() {
            self.ignored += 1;
        }
        for key in matching {
            self.remember(&key, path.clone());
        }
        Ok(())
    }

    pub(super) fn has_events(&self) -> bool {
        !self.failed.is_empty() || !self.turns.is_empty()
    }

    pub(super) fn event(&mut self) -> Option<Event> {
        if let Some(((token, path), code)) = self.failed.pop_front() {
            return Some(Event::WatchFailed { token, path, code });
        }
        let key = self.turns.pop_front()?;
        let watch = self.table.get_mut(&key)?;
        let path = watch.pending.pop_front()?;
        self.pending_bytes -= path.as_str().len();
        if watch.pending.is_empty() {
            watch.collapsed = false;
        } else {
            self.turns.push_back(key.clone());
        }
        Some(Event::Watch { token: key.0, path })
    }

    fn remember(&mut self, key: &Key, path: Path) {
        let Some(watch) = self.table.get_mut(key) else { return };
        if watch.collapsed || watch.pending.contains(&path) {
            self.coalesced += 1;
            return;
        }
        if watch.pending.is_empty() {
            self.turns.push_back(key.clone());
        }
        let full = watch.pending.len() >= EVENTS_PER_WATCH_MAX
            || self.pending_bytes + path.as_str().len() > EVENT_BYTES_MAX;
        let path = if full {
            self.coalesced += 1;
            watch.collapsed = true;
            self.pending_bytes -= watch.pending.drain(..).map(|path| path.as_str().len()).sum::<usize>();
            key.1.clone()
        } else {
            path
        };
        self.pending_bytes += path.as_str().len();
        watch.pending.push_back(path);
    }

    fn forget_events(&mut self, key: &Key) {
        let Some(watch) = self.table.get_mut(key) else { return };
        watch.collapsed = false;
        if !watch.pending.is_empty() {
            self.pending_bytes -= watch.pending.drain(..).map(|path| path.as_str().len()).sum::<usize>();
            self.turns.retain(|turn| turn != key);
        }
    }
}
