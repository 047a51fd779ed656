//! What is to be sent: headers, which are copied here, and data, which stay where they are until the kernel has them.

use std::collections::VecDeque;
use std::io::IoSlice;

use crate::buffers::{Pool, Span};

/// Sent bytes of headers that are kept before the others are moved to their place.
const HEADS_SENT_MAX: usize = 16 << 10;

#[derive(Clone, Copy, Debug)]
enum Piece {
    /// The next bytes of `heads`.
    Head(usize),
    /// Memory of a request; its place is free when the last piece of it is sent.
    Data { span: Span, last_of: Option<u16> },
}

/// The unsent bytes of one client, in order.
#[derive(Debug, Default)]
pub(super) struct Output {
    heads: Vec<u8>,
    /// Bytes of `heads` that are sent.
    heads_sent: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that are sent.
    first_sent: usize,
}

impl Output {
    /// Appends bytes, by copying them.
    #[inline]
    pub(super) fn head(&mut self, bytes: &[u8]) {
        self.heads.extend_from_slice(bytes);
        self.added(bytes.len());
    }

    /// Appends whatever `write` appends to the bytes that it is given.
    pub(super) fn heads<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let before = self.heads.len();
        let answer = write(&mut self.heads);
        self.added(self.heads.len() - before);
        answer
    }

    fn added(&mut self, length: usize) {
        match self.pieces.back_mut() {
            _ if length == 0 => {}
            Some(Piece::Head(before)) => *before += length,
            _ => self.pieces.push_back(Piece::Head(length)),
        }
    }

    /// Appends memory, which must stay as it is until it is sent. `last_of`: the request that is over then.
    #[inline]
    pub(super) fn data(&mut self, span: Span, last_of: Option<u16>) {
        self.pieces.push_back(Piece::Data { span, last_of });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Copied bytes that are not sent.
    pub(super) fn heads_unsent(&self) -> usize {
        self.heads.len() - self.heads_sent
    }

    /// The first unsent bytes, as many as `slices` can name. How many it names.
    pub(super) fn gather<'a>(&'a self, pool: &'a Pool, slices: &mut [IoSlice<'a>]) -> usize {
        let (mut head_at, mut skip, mut count) = (self.heads_sent, self.first_sent, 0);
        for (piece, slice) in self.pieces.iter().zip(slices) {
            let bytes = match *piece {
                Piece::Head(length) => {
                    // What is sent of the first piece is counted in `heads_sent` already.
                    let from = head_at;
                    head_at += length - skip;
                    skip = 0;
                    self.heads.get(from..head_at)
                }
                Piece::Data { span, .. } => pool.bytes(span).get(std::mem::take(&mut skip)..),
            };
            *slice = IoSlice::new(bytes.unwrap_or_default());
            count += 1;
        }
        count
    }

    /// So many bytes were sent; `over` is told the requests that are over with it. True if a piece is complete.
    pub(super) fn sent(&mut self, mut bytes: usize, mut over: impl FnMut(u16)) -> bool {
        let mut complete = false;
        while let Some(piece) = self.pieces.front().copied() {
            let length = match piece {
                Piece::Head(length) => length,
                Piece::Data { span, .. } => span.length_bytes() as usize,
            };
            let now = bytes.min(length - self.first_sent);
            bytes -= now;
            self.first_sent += now;
            if matches!(piece, Piece::Head(_)) {
                self.heads_sent += now;
            }
            if self.first_sent < length {
                self.compact();
                return complete;
            }
            self.first_sent = 0;
            self.pieces.pop_front();
            complete = true;
            if let Piece::Data { last_of: Some(place), .. } = piece {
                over(place);
            }
        }
        self.heads.clear();
        self.heads_sent = 0;
        complete
    }

    /// Forgets what is sent, for a client that never has everything.
    fn compact(&mut self) {
        if self.heads_sent > HEADS_SENT_MAX {
            self.heads.drain(..self.heads_sent);
            self.heads_sent = 0;
        }
    }

    /// Nothing of it will be sent; `over` is told the requests that are over with it.
    pub(super) fn abandon(&mut self, mut over: impl FnMut(u16)) {
        for piece in self.pieces.drain(..) {
            if let Piece::Data { last_of: Some(place), .. } = piece {
                over(place);
            }
        }
        (self.heads_sent, self.first_sent) = (0, 0);
        self.heads.clear();
    }
}
