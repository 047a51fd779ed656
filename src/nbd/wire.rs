//! What lies on the wire: numbers, headers, and how they are written. All of it is big-endian.
//!
//! Nothing here knows which side it is on; the names are the specification's, without their `NBD_` and in modules by kind.

/// What a server says first, and what every option begins with.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// See [`INIT_MAGIC`].
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What the answer to an option begins with.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// What a request begins with.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What a simple reply begins with.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// What a chunk of a structured reply begins with.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Zeroes behind an old way's answer, in bytes, unless both sides leave them out.
pub const PADDING_BYTES: usize = 124;
/// The longest string, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;
/// The name of the one context that there is.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// What a server (16 bits) and a client (32 bits) say of themselves at the start; the numbers are the same.
pub mod handshake {
    /// Options that are not understood get an answer.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// [`super::PADDING_BYTES`] are left out.
    pub const NO_ZEROES: u16 = 2;
}

/// Options of a client.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Answers to options.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// The bit of an answer that is an error.
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR | 1;
    pub const ERR_POLICY: u32 = ERROR | 2;
    pub const ERR_INVALID: u32 = ERROR | 3;
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// What a client may ask to be told of an export.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod transmission {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of chunks of a structured reply, and the flag of the last.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod chunk {
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// The bit of a kind that tells of an error.
    pub const IS_ERROR: u16 = 1 << 15;
    pub const ERROR: u16 = IS_ERROR | 1;
    pub const ERROR_OFFSET: u16 = IS_ERROR | 2;
}

/// Flags of an extent in the context [`BASE_ALLOCATION`].
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod state {
    pub const HOLE: u32 = 1;
    pub const ZERO: u32 = 2;
}

/// Errors of a command.
#[allow(missing_docs, reason = "the names are errno's")]
pub mod error {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// A request's header. The data of a write follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// See [`flag`].
    pub flags: u16,
    /// See [`command`].
    pub command: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// Where on the disk, in bytes.
    pub offset_bytes: u64,
    /// How much.
    pub length_bytes: u32,
}

impl Request {
    /// Length of the header.
    pub const BYTES: usize = 28;

    /// As it lies on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Request::BYTES] {
        let mut out = Writer::<{ Request::BYTES }>::default();
        out.put(&REQUEST_MAGIC.to_be_bytes());
        out.put(&self.flags.to_be_bytes());
        out.put(&self.command.to_be_bytes());
        out.put(&self.cookie.to_be_bytes());
        out.put(&self.offset_bytes.to_be_bytes());
        out.put(&self.length_bytes.to_be_bytes());
        out.bytes
    }

    /// Reads one; `None` if it does not begin as a request does.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Request::BYTES]) -> Option<Request> {
        let mut from = Reader(bytes);
        if from.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Request {
            flags: from.u16()?,
            command: from.u16()?,
            cookie: from.u64()?,
            offset_bytes: from.u64()?,
            length_bytes: from.u32()?,
        })
    }
}

/// The header of a simple reply. The data of a read follow, if there is no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// See [`error`]; 0 is none.
    pub error: u32,
    /// Of which request.
    pub cookie: u64,
}

impl SimpleReply {
    /// Length of the header.
    pub const BYTES: usize = 16;

    /// As it lies on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; SimpleReply::BYTES] {
        let mut out = Writer::<{ SimpleReply::BYTES }>::default();
        out.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.put(&self.error.to_be_bytes());
        out.put(&self.cookie.to_be_bytes());
        out.bytes
    }

    /// Reads one; `None` if it does not begin as a simple reply does.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; SimpleReply::BYTES]) -> Option<SimpleReply> {
        let mut from = Reader(bytes);
        (from.u32()? == SIMPLE_REPLY_MAGIC).then_some(())?;
        Some(SimpleReply { error: from.u32()?, cookie: from.u64()? })
    }
}

/// The header of a chunk of a structured reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// [`chunk::DONE`] on the last.
    pub flags: u16,
    /// See [`chunk`].
    pub kind: u16,
    /// Of which request.
    pub cookie: u64,
    /// What follows the header, in bytes.
    pub length_bytes: u32,
}

impl Chunk {
    /// Length of the header.
    pub const BYTES: usize = 20;

    /// As it lies on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Chunk::BYTES] {
        let mut out = Writer::<{ Chunk::BYTES }>::default();
        out.put(&CHUNK_MAGIC.to_be_bytes());
        out.put(&self.flags.to_be_bytes());
        out.put(&self.kind.to_be_bytes());
        out.put(&self.cookie.to_be_bytes());
        out.put(&self.length_bytes.to_be_bytes());
        out.bytes
    }

    /// Reads one; `None` if it does not begin as a chunk does.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Chunk::BYTES]) -> Option<Chunk> {
        let mut from = Reader(bytes);
        (from.u32()? == CHUNK_MAGIC).then_some(())?;
        Some(Chunk { flags: from.u16()?, kind: from.u16()?, cookie: from.u64()?, length_bytes: from.u32()? })
    }
}

/// The header of an answer to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// To which: see [`option`].
    pub option: u32,
    /// See [`option_reply`].
    pub kind: u32,
    /// What follows the header, in bytes.
    pub length_bytes: u32,
}

impl OptionReply {
    /// Length of the header.
    pub const BYTES: usize = 20;

    /// As it lies on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; OptionReply::BYTES] {
        let mut out = Writer::<{ OptionReply::BYTES }>::default();
        out.put(&OPTION_REPLY_MAGIC.to_be_bytes());
        out.put(&self.option.to_be_bytes());
        out.put(&self.kind.to_be_bytes());
        out.put(&self.length_bytes.to_be_bytes());
        out.bytes
    }

    /// Reads one; `None` if it does not begin as such an answer does.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; OptionReply::BYTES]) -> Option<OptionReply> {
        let mut from = Reader(bytes);
        (from.u64()? == OPTION_REPLY_MAGIC).then_some(())?;
        Some(OptionReply { option: from.u32()?, kind: from.u32()?, length_bytes: from.u32()? })
    }
}

/// Fills an array from its start.
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Default for Writer<N> {
    fn default() -> Self {
        Writer { bytes: [0; N], at: 0 }
    }
}

impl<const N: usize> Writer<N> {
    #[inline]
    fn put(&mut self, value: &[u8]) {
        if let Some(place) = self.bytes.get_mut(self.at..self.at + value.len()) {
            place.copy_from_slice(value);
        }
        self.at += value.len();
    }
}

/// Takes numbers and strings off the front of bytes; `None` where there are not enough.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `length` bytes.
    #[inline]
    pub fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    /// The next two bytes.
    #[inline]
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four.
    #[inline]
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight.
    #[inline]
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length of four bytes, then so many bytes of text.
    pub fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        std::str::from_utf8(self.take(length)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_they_are_written() {
        let request =
            Request { flags: 1, command: 2, cookie: 3, offset_bytes: 1 << 40, length_bytes: 0xffff_fe00 };
        assert_eq!(Request::from_bytes(&request.to_bytes()), Some(request));
        let first = [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3];
        assert_eq!(request.to_bytes()[..16], first);
        let reply = SimpleReply { error: 5, cookie: u64::MAX };
        assert_eq!(SimpleReply::from_bytes(&reply.to_bytes()), Some(reply));
        let part = Chunk { flags: chunk::DONE, kind: chunk::ERROR, cookie: 7, length_bytes: 6 };
        assert_eq!(Chunk::from_bytes(&part.to_bytes()), Some(part));
        let answer = OptionReply { option: 7, kind: option_reply::ERR_UNKNOWN, length_bytes: 0 };
        assert_eq!(OptionReply::from_bytes(&answer.to_bytes()), Some(answer));
        assert_eq!(Request::from_bytes(&[0; 28]), None);
        assert_eq!(SimpleReply::from_bytes(&[0; 16]), None);
        assert_eq!(Chunk::from_bytes(&[0; 20]), None);
        assert_eq!(OptionReply::from_bytes(&[0; 20]), None);
    }

    #[test]
    fn what_is_too_short_is_not_read() {
        let mut from = Reader(&[0, 0, 0, 2, b'a']);
        assert_eq!(from.string(), None);
        assert_eq!(Reader(&[0, 0, 0, 1, b'a', 9]).string(), Some("a"));
        assert_eq!(Reader(&[0, 0, 0, 1, 0xff]).string(), None);
        assert_eq!((Reader(&[1]).u16(), Reader(&[1; 3]).u32(), Reader(&[1; 7]).u64()), (None, None, None));
    }
}
