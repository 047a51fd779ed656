//! One connection: its socket, what came and is not understood yet, what is to be sent, and since when it makes us wait.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use super::exports::Exports;
use super::handshake::{Handshake, Step};
use super::output::Output;
use super::session::Session;
use super::{Cx, Disks};
use crate::limits::{NBD_HANDSHAKE_AGE, NBD_INPUT_BYTES, NBD_MESSAGE_AGE};
use crate::storage::StorageError;

/// Pieces that one call sends: 64 reads in one piece each.
const SLICES: usize = 128;

/// Calls that send, for one client, before the others have their turn: 16 MiB at most.
const SENDS_PER_TURN: u32 = 4;

#[derive(Debug)]
enum Phase {
    Handshake(Handshake),
    Session(Box<Session>),
    /// It is over as soon as everything is sent.
    Ended,
}

/// Bytes that came and were not taken.
#[derive(Debug)]
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Where more can be received.
    fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: Option<OwnedFd>,
    input: Input,
    output: Output,
    phase: Phase,
    born: Duration,
    /// Since when part of a message is there, and the rest is not.
    partial_since: Option<Duration>,
    /// Since when the first unsent piece is the first.
    unsent_since: Option<Duration>,
    /// What is left of its input is to be looked at although nothing more came.
    pub(super) waits: bool,
    /// What the poller looks for: something to read, room to write; `None` when it does not look.
    pub(super) polled: Option<(bool, bool)>,
}

impl Client {
    pub(super) fn new(socket: OwnedFd, now: Duration) -> Client {
        let mut output = Output::default();
        output.heads(Handshake::greet);
        Client {
            socket: Some(socket),
            input: Input { bytes: vec![0; NBD_INPUT_BYTES].into_boxed_slice(), start: 0, end: 0 },
            output,
            phase: Phase::Handshake(Handshake::default()),
            born: now,
            partial_since: None,
            unsent_since: None,
            waits: false,
            polled: None,
        }
    }

    /// Receives once and takes what came. False: the connection is of no use any more.
    pub(super) fn receive(&mut self, exports: &Exports, cx: &mut Cx<'_, impl Disks>) -> bool {
        let Some(socket) = &self.socket else { return true };
        let session = match &mut self.phase {
            Phase::Session(session) => Some(session),
            Phase::Handshake(_) => None,
            Phase::Ended => return true,
        };
        let straight = session.as_ref().and_then(|session| session.destination());
        let room = self.input.room();
        if room.is_empty() && straight.is_none() {
            return true;
        }
        let result = match straight {
            Some(span) => {
                let data = cx.disks.buffers().bytes_mut(span);
                rustix::io::readv(socket, &mut [IoSliceMut::new(data), IoSliceMut::new(room)])
            }
            None => rustix::io::read(socket, room),
        };
        match result {
            Ok(0) => return self.nothing_more(cx),
            Ok(bytes) => {
                let data = straight.map_or(0, |span| bytes.min(span.length_bytes() as usize));
                if let Some(session) = session.filter(|_| data > 0) {
                    session.received(u32::try_from(data).unwrap_or(0), cx);
                }
                self.input.end += bytes - data;
            }
            Err(Errno::AGAIN | Errno::INTR) => return true,
            Err(_) => return false,
        }
        self.take(exports, cx)
    }

    /// The client has closed its side: what it asked for is answered, then it is over.
    fn nothing_more(&mut self, cx: &mut Cx<'_, impl Disks>) -> bool {
        match &mut self.phase {
            Phase::Session(session) if !session.waits => {
                session.abandon(cx);
                (self.input.start, self.input.end) = (0, 0);
                self.partial_since = None;
                true
            }
            Phase::Session(_) => true,
            Phase::Handshake(_) | Phase::Ended => false,
        }
    }

    /// Takes what it can of the input. False: what came is no protocol.
    pub(super) fn take(&mut self, exports: &Exports, cx: &mut Cx<'_, impl Disks>) -> bool {
        self.waits = false;
        if let Phase::Handshake(handshake) = &mut self.phase {
            let input = &self.input;
            let (taken, step) = self.output.heads(|out| handshake.run(input.rest(), exports, out));
            self.input.start += taken;
            match step {
                Step::More => {}
                Step::Full => self.waits = true,
                Step::End => self.phase = Phase::Ended,
                Step::Go(agreed) => {
                    // It was found a moment ago.
                    let Some(export) = exports.get(agreed.export) else { return false };
                    self.phase = Phase::Session(Box::new(Session::new(agreed, export)));
                }
            }
        }
        if let Phase::Session(session) = &mut self.phase {
            match session.run(self.input.rest(), &mut self.output, cx) {
                Ok(taken) => self.input.start += taken,
                Err(broken) => {
                    log::debug!("nbd: client {}: {broken:?}", cx.client);
                    return false;
                }
            }
            self.waits = session.waits;
            let partial = !session.waits && (self.input.start < self.input.end || session.mid_message());
            let whole = std::mem::take(&mut session.whole);
            let since = self.partial_since.filter(|_| !whole);
            self.partial_since = partial.then_some(since.unwrap_or(cx.now));
        }
        true
    }

    /// The disk has answered.
    pub(super) fn answered(
        &mut self,
        place: u16,
        result: Result<(), StorageError>,
        cx: &mut Cx<'_, impl Disks>,
    ) {
        let Phase::Session(session) = &mut self.phase else { return };
        if self.socket.is_none() {
            // Nobody waits for it: what would follow (a flush, more zeroes) is left undone.
            return session.over(place, cx);
        }
        session.answered(place, result, &mut self.output, cx);
    }

    /// Sends what it can. False: the connection is of no use any more.
    pub(super) fn send(&mut self, cx: &mut Cx<'_, impl Disks>) -> bool {
        for _ in 0..SENDS_PER_TURN {
            if self.output.is_empty() {
                break;
            }
            let Some(socket) = &self.socket else { return true };
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = self.output.gather(cx.disks.buffers(), &mut slices);
            let slices = slices.get(..count).unwrap_or_default();
            // A client that is gone is an error here, and not a signal.
            match rustix::net::sendmsg(
                socket,
                slices,
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL,
            ) {
                Ok(bytes) => {
                    cx.budget.progress();
                    let session = &mut self.phase;
                    let moved = self.output.sent(bytes, |place| {
                        if let Phase::Session(session) = session {
                            session.over(place, cx);
                        }
                    });
                    if moved {
                        self.unsent_since = None;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        self.unsent_since = (!self.output.is_empty()).then_some(self.unsent_since.unwrap_or(cx.now));
        !self.is_over()
    }

    /// Everything was said and answered.
    fn is_over(&self) -> bool {
        let ended = match &self.phase {
            Phase::Session(session) => session.closing && session.in_flight() == 0,
            Phase::Handshake(_) => false,
            Phase::Ended => true,
        };
        ended && self.output.is_empty()
    }

    /// The connection is closed: nothing will be sent, and what the disk has is waited for.
    pub(super) fn let_go(&mut self, cx: &mut Cx<'_, impl Disks>) {
        self.waits = false;
        (self.partial_since, self.unsent_since) = (None, None);
        let phase = &mut self.phase;
        self.output.abandon(|place| {
            if let Phase::Session(session) = phase {
                session.over(place, cx);
            }
        });
        match &mut self.phase {
            Phase::Session(session) => session.abandon(cx),
            phase => *phase = Phase::Ended,
        }
    }

    /// Whether it can be forgotten: it is closed, and the disk has nothing of it.
    pub(super) fn is_gone(&self) -> bool {
        self.socket.is_none() && self.in_flight() == 0
    }

    pub(super) fn in_flight(&self) -> usize {
        match &self.phase {
            Phase::Session(session) => session.in_flight(),
            _ => 0,
        }
    }

    /// Which export it uses.
    pub(super) fn export(&self) -> Option<super::ExportId> {
        match &self.phase {
            Phase::Session(session) => Some(session.agreed.export),
            _ => None,
        }
    }

    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// What the poller should look for.
    pub(super) fn interest(&self) -> (bool, bool) {
        let reads = match &self.phase {
            Phase::Session(session) => !session.closing && !self.waits,
            Phase::Handshake(_) => !self.waits,
            Phase::Ended => false,
        };
        (reads, !self.output.is_empty())
    }

    /// When the patience with it ends.
    pub(super) fn deadline(&self) -> Option<Duration> {
        let age = match &self.phase {
            Phase::Session(_) => None,
            Phase::Handshake(_) | Phase::Ended => Some(self.born + NBD_HANDSHAKE_AGE),
        };
        let late = |since: Option<Duration>| since.map(|since| since + NBD_MESSAGE_AGE);
        let all = [age, late(self.partial_since), late(self.unsent_since)];
        all.into_iter().flatten().min().filter(|_| self.socket.is_some())
    }
}
