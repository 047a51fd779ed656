//! Listing a directory: in one message where it fits, else in parts.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write as _;

use super::edits::terminated;
use super::jobs::{Request, plain, refused};
use super::limits::{LIST_BYTES_MAX, LIST_RESTARTS_MAX};
use super::types::{Failure, Outcome, ProtocolError};
use crate::path::Path;
use crate::wire::{ErrorCode, MessageType};

#[derive(Debug)]
pub(super) struct List {
    path: Path,
    in_parts: bool,
    sent: bool,
    /// Names so far, each ended by a NUL. The next part starts at this offset.
    names: Vec<u8>,
    /// The directory's generation when the first part was read.
    generation: Vec<u8>,
    restarts: u32,
}

impl List {
    pub(super) fn new(path: Path) -> List {
        List { path, in_parts: false, sent: false, names: Vec::new(), generation: Vec::new(), restarts: 0 }
    }

    pub(super) fn next_request(&mut self) -> Option<Request> {
        if core::mem::replace(&mut self.sent, true) {
            return None;
        }
        let mut payload = terminated(&self.path);
        if !self.in_parts {
            return Some(plain(MessageType::Directory, payload, 0));
        }
        let mut offset = String::new();
        // Writing to a String cannot fail.
        let _ = write!(offset, "{}\0", self.names.len());
        payload.extend_from_slice(offset.as_bytes());
        Some(plain(MessageType::DirectoryPart, payload, 0))
    }

    pub(super) fn reply(
        &mut self,
        result: Result<&[u8], ErrorCode>,
    ) -> Result<Option<Outcome>, ProtocolError> {
        match result {
            Ok(payload) if self.in_parts => self.part(payload),
            Ok(payload) => {
                let names = parse(payload).ok_or(ProtocolError::Malformed(MessageType::Directory))?;
                Ok(Some(Outcome::Listed(names)))
            }
            Err(ErrorCode::TooBig) if !self.in_parts => {
                self.in_parts = true;
                self.sent = false;
                Ok(None)
            }
            Err(code) => Ok(Some(refused(&self.path, code))),
        }
    }

    /// A part is the generation and a NUL, then whole names, and one NUL more behind the very last.
    fn part(&mut self, payload: &[u8]) -> Result<Option<Outcome>, ProtocolError> {
        let malformed = ProtocolError::Malformed(MessageType::DirectoryPart);
        let end = payload.iter().position(|b| *b == 0).ok_or(malformed)?;
        let (generation, rest) = (&payload[..end], &payload[end + 1..]);
        if self.names.is_empty() {
            self.generation = generation.to_vec();
        } else if self.generation != generation {
            self.names.clear();
            self.restarts += 1;
            self.sent = false;
            let given_up = self.restarts > LIST_RESTARTS_MAX;
            return Ok(given_up.then_some(Outcome::Failed(Failure::ListKeepsChanging)));
        }
        let (names, last) = match rest {
            [0] => (&rest[..0], true),
            [names @ .., 0] if names.ends_with(&[0]) => (names, true),
            [.., 0] => (rest, false),
            _ => return Err(malformed),
        };
        if self.names.len() + names.len() > LIST_BYTES_MAX {
            return Ok(Some(Outcome::Failed(Failure::ListTooLong)));
        }
        self.names.extend_from_slice(names);
        if last {
            return Ok(Some(Outcome::Listed(parse(&self.names).ok_or(malformed)?)));
        }
        self.sent = false;
        Ok(None)
    }
}

/// Names that each end with a NUL. `None` unless every one is a proper name of a node.
fn parse(bytes: &[u8]) -> Option<Vec<String>> {
    if bytes.is_empty() {
        return Some(Vec::new());
    }
    let proper = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'@');
    let names = bytes.strip_suffix(b"\0")?.split(|b| *b == 0);
    names
        .map(|name| {
            let proper = !name.is_empty() && name.iter().all(proper);
            proper.then(|| core::str::from_utf8(name).ok().map(String::from)).flatten()
        })
        .collect()
}
