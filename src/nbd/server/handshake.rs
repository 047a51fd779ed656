//! From the first byte to the first request: a client chooses an export.
//!
//! Bytes in, bytes out; nothing here waits. Every option is answered before the next is read.

use super::exports::{Export, ExportId, Exports};
use crate::limits::{NBD_OPTION_BYTES_MAX, NBD_OPTIONS_MAX, NBD_REQUEST_BYTES_MAX, NBD_UNSENT_BYTES_MAX};
use crate::nbd::wire::{
    BASE_ALLOCATION, INIT_MAGIC, OPTION_MAGIC, OptionReply, PADDING_BYTES, Reader, STRING_BYTES_MAX,
    handshake, info, option, option_reply, transmission,
};

/// An option's header, in bytes.
const OPTION_HEADER_BYTES: usize = 16;

/// An option that is longer than this is no mistake of a client that means well: 1 MiB is read and thrown away at most.
const SKIPPED_BYTES_MAX: u32 = 1 << 20;

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Which disk.
    pub export: ExportId,
    /// Reads are answered in chunks, and so is whatever has more to say than an error.
    pub structured: bool,
    /// The client may ask for block status.
    pub status: bool,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// More bytes, please.
    More,
    /// What was said is to be sent first: the rest is to come again.
    Full,
    /// Requests follow.
    Go(Agreed),
    /// The connection ends, once what was said is sent.
    End,
}

/// One client's handshake.
#[derive(Debug, Default)]
pub(super) struct Handshake {
    /// The client's flags are known.
    greeted: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export for which block status was asked for.
    status_of: Option<ExportId>,
    options: u32,
    /// Bytes of an overlong option that are still to come.
    skip: usize,
}

impl Handshake {
    /// The server's first words.
    pub(super) fn greet(out: &mut Vec<u8>) {
        out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
    }

    /// Takes what it can of `input` and answers it. How much was taken, and what comes next.
    pub(super) fn run(&mut self, input: &[u8], exports: &Exports, out: &mut Vec<u8>) -> (usize, Step) {
        let mut rest = input;
        loop {
            let skipped = self.skip.min(rest.len());
            (self.skip, rest) = (self.skip - skipped, rest.get(skipped..).unwrap_or_default());
            let step = if out.len() > NBD_UNSENT_BYTES_MAX {
                Some(Step::Full)
            } else {
                self.one(&mut rest, exports, out)
            };
            if let Some(step) = step {
                return (input.len() - rest.len(), step);
            }
        }
    }

    /// One message; `None` says that there may be another.
    fn one(&mut self, rest: &mut &[u8], exports: &Exports, out: &mut Vec<u8>) -> Option<Step> {
        let mut from = Reader(rest);
        if !self.greeted {
            let Some(flags) = from.u32() else { return Some(Step::More) };
            let known = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
            if flags & !u32::from(known) != 0 {
                return Some(Step::End);
            }
            self.greeted = true;
            self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
            *rest = from.0;
            return None;
        }
        let header = from.take(OPTION_HEADER_BYTES).map(Reader);
        let Some(mut header) = header.filter(|_| self.skip == 0) else { return Some(Step::More) };
        let (Some(magic), Some(option), Some(length)) = (header.u64(), header.u32(), header.u32()) else {
            return Some(Step::End);
        };
        if magic != OPTION_MAGIC || self.options >= NBD_OPTIONS_MAX || length > SKIPPED_BYTES_MAX {
            return Some(Step::End);
        }
        let bytes = length as usize;
        if bytes > NBD_OPTION_BYTES_MAX {
            if option == option::EXPORT_NAME {
                return Some(Step::End);
            }
            self.options += 1;
            (self.skip, *rest) = (bytes, from.0);
            error(out, option, option_reply::ERR_TOO_BIG, "the option is too long");
            return None;
        }
        let Some(data) = from.take(bytes) else { return Some(Step::More) };
        self.options += 1;
        *rest = from.0;
        self.answer(option, data, exports, out)
    }

    fn answer(&mut self, what: u32, data: &[u8], exports: &Exports, out: &mut Vec<u8>) -> Option<Step> {
        let empty = data.is_empty();
        match what {
            option::EXPORT_NAME => return Some(self.export_name(data, exports, out)),
            option::ABORT => {
                reply(out, what, option_reply::ACK, &[]);
                return Some(Step::End);
            }
            option::LIST if empty => list(exports, out),
            option::STRUCTURED_REPLY if empty => {
                self.structured = true;
                reply(out, what, option_reply::ACK, &[]);
            }
            option::STARTTLS if empty => {
                error(out, what, option_reply::ERR_UNSUP, "this server has no TLS");
            }
            option::LIST | option::STRUCTURED_REPLY | option::STARTTLS => {
                error(out, what, option_reply::ERR_INVALID, "this option has no data");
            }
            option::INFO | option::GO => {
                let export = self.info(what, data, exports, out)?;
                if what == option::GO {
                    return Some(Step::Go(self.agreed(export)));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(what, data, exports, out),
            _ => error(out, what, option_reply::ERR_UNSUP, "this option is not known"),
        }
        None
    }

    fn agreed(&self, export: ExportId) -> Agreed {
        Agreed { export, structured: self.structured, status: self.status_of == Some(export) }
    }

    /// The old way to begin, which has no answer for what cannot be.
    fn export_name(&self, name: &[u8], exports: &Exports, out: &mut Vec<u8>) -> Step {
        let found = std::str::from_utf8(name).ok().and_then(|name| exports.find(name));
        let Some((id, export)) = found else { return Step::End };
        out.extend_from_slice(&export.size_bytes().to_be_bytes());
        out.extend_from_slice(&self.flags(export).to_be_bytes());
        if !self.no_zeroes {
            out.resize(out.len() + PADDING_BYTES, 0);
        }
        Step::Go(self.agreed(id))
    }

    fn flags(&self, export: &Export) -> u16 {
        let mut flags = transmission::HAS_FLAGS | transmission::SEND_FLUSH | transmission::CAN_MULTI_CONN;
        if export.read_only {
            flags |= transmission::READ_ONLY;
        } else {
            flags |= transmission::SEND_FUA
                | transmission::SEND_TRIM
                | transmission::SEND_WRITE_ZEROES
                | transmission::SEND_FAST_ZERO;
        }
        if self.structured {
            flags |= transmission::SEND_DF;
        }
        flags
    }

    fn info(&self, what: u32, data: &[u8], exports: &Exports, out: &mut Vec<u8>) -> Option<ExportId> {
        let Some((name, wanted)) = asked_info(data) else {
            error(out, what, option_reply::ERR_INVALID, "malformed");
            return None;
        };
        let Some((id, export)) = exports.find(name) else {
            error(out, what, option_reply::ERR_UNKNOWN, "there is no such export");
            return None;
        };
        let mut text = Vec::with_capacity(64);
        let mut tell = |kind: u16, parts: &[&[u8]]| {
            text.clear();
            text.extend_from_slice(&kind.to_be_bytes());
            parts.iter().for_each(|part| text.extend_from_slice(part));
            reply(out, what, option_reply::INFO, &text);
        };
        let (size, flags) = (export.size_bytes().to_be_bytes(), self.flags(export).to_be_bytes());
        tell(info::EXPORT, &[&size, &flags]);
        let sizes = [512, export.preferred_bytes, NBD_REQUEST_BYTES_MAX].map(u32::to_be_bytes);
        tell(info::BLOCK_SIZE, &[sizes.as_flattened()]);
        let wants = |kind: u16| wanted.chunks_exact(2).any(|asked| *asked == kind.to_be_bytes());
        if wants(info::NAME) {
            tell(info::NAME, &[export.name.as_bytes()]);
        }
        if wants(info::DESCRIPTION) && !export.description.is_empty() {
            tell(info::DESCRIPTION, &[export.description.as_bytes()]);
        }
        reply(out, what, option_reply::ACK, &[]);
        Some(id)
    }

    fn contexts(&mut self, what: u32, data: &[u8], exports: &Exports, out: &mut Vec<u8>) {
        let selects = what == option::SET_META_CONTEXT;
        if selects {
            self.status_of = None;
        }
        let Some((name, named)) = asked_contexts(data, !selects) else {
            return error(out, what, option_reply::ERR_INVALID, "malformed");
        };
        if !self.structured {
            let text = "structured replies must be agreed on first";
            return error(out, what, option_reply::ERR_INVALID, text);
        }
        let Some((id, _)) = exports.find(name) else {
            return error(out, what, option_reply::ERR_UNKNOWN, "there is no such export");
        };
        if named {
            let mut text = CONTEXT_ID.to_be_bytes().to_vec();
            text.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, what, option_reply::META_CONTEXT, &text);
            if selects {
                self.status_of = Some(id);
            }
        }
        reply(out, what, option_reply::ACK, &[]);
    }
}

/// The number of [`BASE_ALLOCATION`] on every connection.
pub(super) const CONTEXT_ID: u32 = 1;

/// Name and the kinds of information that are asked for, two bytes each.
fn asked_info(data: &[u8]) -> Option<(&str, &[u8])> {
    let mut from = Reader(data);
    let name = from.string().filter(|name| name.len() <= STRING_BYTES_MAX)?;
    let count = usize::from(from.u16()?);
    (from.0.len() == count * 2).then_some((name, from.0))
}

/// Name of the export, and whether the queries name the context. A `list` without any query asks for all there are, and one
/// that names a namespace for all in it.
fn asked_contexts(data: &[u8], list: bool) -> Option<(&str, bool)> {
    let mut from = Reader(data);
    let name = from.string().filter(|name| name.len() <= STRING_BYTES_MAX)?;
    let count = from.u32()?;
    let mut named = list && count == 0;
    for _ in 0..count {
        let query = from.string()?;
        named |= query == BASE_ALLOCATION || list && query == "base:";
    }
    from.0.is_empty().then_some((name, named))
}

fn list(exports: &Exports, out: &mut Vec<u8>) {
    for (_, export) in exports.all() {
        let name = export.name.as_bytes();
        let mut text = u32::try_from(name.len()).unwrap_or(0).to_be_bytes().to_vec();
        text.extend_from_slice(name);
        text.extend_from_slice(export.description.as_bytes());
        reply(out, option::LIST, option_reply::SERVER, &text);
    }
    reply(out, option::LIST, option_reply::ACK, &[]);
}

fn error(out: &mut Vec<u8>, option: u32, kind: u32, text: &str) {
    reply(out, option, kind, text.as_bytes());
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    let length_bytes = u32::try_from(data.len()).unwrap_or(0);
    out.extend_from_slice(&OptionReply { option, kind, length_bytes }.to_bytes());
    out.extend_from_slice(data);
}
