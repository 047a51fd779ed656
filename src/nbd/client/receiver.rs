//! Takes replies apart, however the bytes come in. Which requests there are, and what becomes of them, is the session's.

use crate::nbd::wire::{CHUNK_MAGIC, Chunk, Reader, SIMPLE_REPLY_MAGIC, SimpleReply, chunk};

/// The longest text of an error, and the longest chunk of an unknown kind of error, in bytes.
const TEXT_BYTES_MAX: u32 = 64 << 10;

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The first bytes of a reply: which kind it is.
    Magic,
    /// The rest of a simple reply's header.
    Simple,
    /// The rest of a chunk's header.
    Chunk,
    /// The fixed part of a chunk's body.
    Fixed { place: u16, header: Chunk },
    /// Data of a read: `left` bytes, the first of which is byte `at` of the request. The last of them end the reply if
    /// `done`.
    Data { place: u16, at: u32, left: u32, done: bool },
    /// Text that nobody reads.
    Skip { place: u16, left: u32, done: bool },
}

/// The bytes of a header so far, and what they belong to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receiver {
    pub next: Next,
    head: [u8; Chunk::BYTES],
    have: usize,
}

impl Receiver {
    pub(super) const START: Receiver = Receiver { next: Next::Magic, head: [0; Chunk::BYTES], have: 0 };

    /// How many bytes the header or fixed part has that comes next; 0 for data.
    fn wanted(&self) -> usize {
        match self.next {
            Next::Magic => 4,
            Next::Simple => SimpleReply::BYTES,
            Next::Chunk => Chunk::BYTES,
            Next::Fixed { header, .. } => fixed_bytes(header.kind),
            Next::Data { .. } | Next::Skip { .. } => 0,
        }
    }

    /// Takes bytes of a header off the front; what it is, once it is whole.
    pub(super) fn head(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        let wanted = self.wanted();
        let count = wanted.saturating_sub(self.have).min(bytes.len());
        let (front, rest) = bytes.split_at_checked(count)?;
        self.head.get_mut(self.have..self.have + count)?.copy_from_slice(front);
        self.have += count;
        *bytes = rest;
        if self.have < wanted {
            return None;
        }
        self.whole()
    }

    fn whole(&mut self) -> Option<Head> {
        let mut from = Reader(&self.head);
        match self.next {
            Next::Magic => match from.u32()? {
                SIMPLE_REPLY_MAGIC => self.next = Next::Simple,
                CHUNK_MAGIC => self.next = Next::Chunk,
                _ => return Some(Head::Nonsense),
            },
            Next::Simple => {
                let (head, _) = self.head.split_first_chunk::<{ SimpleReply::BYTES }>()?;
                self.have = 0;
                return SimpleReply::from_bytes(head).map(Head::Simple);
            }
            Next::Chunk => {
                self.have = 0;
                return Chunk::from_bytes(&self.head).map(Head::Chunk);
            }
            Next::Fixed { place, header } => {
                self.have = 0;
                let fixed = match header.kind {
                    chunk::OFFSET_DATA => Fixed::Data { offset_bytes: from.u64()? },
                    chunk::OFFSET_HOLE => {
                        Fixed::Hole { offset_bytes: from.u64()?, length_bytes: from.u32()? }
                    }
                    _ => Fixed::Error { error: from.u32()? },
                };
                return Some(Head::Fixed { place, header, fixed });
            }
            Next::Data { .. } | Next::Skip { .. } => {}
        }
        Some(Head::Goes)
    }
}

/// What was found.
#[derive(Clone, Copy, Debug)]
pub(super) enum Head {
    /// Bytes that begin no reply.
    Nonsense,
    /// More of it is to come.
    Goes,
    Simple(SimpleReply),
    Chunk(Chunk),
    Fixed {
        place: u16,
        header: Chunk,
        fixed: Fixed,
    },
}

/// The fixed part of a chunk's body.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fixed {
    Data { offset_bytes: u64 },
    Hole { offset_bytes: u64, length_bytes: u32 },
    Error { error: u32 },
}

/// Its length in bytes.
pub(super) fn fixed_bytes(kind: u16) -> usize {
    match kind {
        chunk::OFFSET_DATA => 8,
        chunk::OFFSET_HOLE => 12,
        _ => 4,
    }
}

/// Whether a chunk's length can be. That of data is looked at when it is known where they belong.
pub(super) fn is_possible(header: &Chunk) -> bool {
    let length = header.length_bytes;
    match header.kind {
        chunk::NONE => length == 0 && header.flags & chunk::DONE != 0,
        chunk::OFFSET_DATA => length > 8,
        chunk::OFFSET_HOLE => length == 12,
        // Each begins with its number, and a text with its length; how long the text says that it is nobody asks.
        kind if kind & chunk::IS_ERROR != 0 => (6..=TEXT_BYTES_MAX).contains(&length),
        _ => false,
    }
}
