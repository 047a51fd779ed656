//! Messages as bytes: a header of four little-endian 32-bit words, then up to 4096 bytes of payload.

use alloc::vec::Vec;
use core::fmt;

/// Bytes of a header: type, request id, transaction id, payload length.
pub const HEADER_BYTES: usize = 16;

/// Longest payload on a socket in either direction (`XENSTORE_PAYLOAD_MAX`). Whoever sends more loses its connection.
pub const PAYLOAD_BYTES_MAX: usize = 4096;

/// Longest payload that `/dev/xen/xenbus` takes: the kernel keeps header and payload in one buffer of 4096 bytes.
/// What it hands out may still be [`PAYLOAD_BYTES_MAX`] long.
pub const DEVICE_PAYLOAD_BYTES_MAX: usize = PAYLOAD_BYTES_MAX - HEADER_BYTES;

macro_rules! message_types {
    ($($(#[$doc:meta])* $name:ident = $number:literal),+ $(,)?) => {
        /// What a message asks or answers (`enum xsd_sockmsg_type`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum MessageType { $($(#[$doc])* $name),+ }

        impl MessageType {
            /// The number on the wire.
            #[must_use]
            pub fn number(self) -> u32 {
                match self { $(MessageType::$name => $number),+ }
            }

            /// The type of a number on the wire.
            #[must_use]
            pub fn from_number(number: u32) -> Option<MessageType> {
                match number { $($number => Some(MessageType::$name),)+ _ => None }
            }
        }
    };
}

message_types! {
    /// Commands to the daemon itself; not used by us.
    Control = 0,
    /// Names of the children of a node.
    Directory = 1,
    /// Value of a node.
    Read = 2,
    /// Permissions of a node.
    GetPerms = 3,
    /// Register a watch.
    Watch = 4,
    /// Remove a watch.
    Unwatch = 5,
    /// Open a transaction.
    TransactionStart = 6,
    /// Commit (`T`) or discard (`F`) a transaction.
    TransactionEnd = 7,
    /// Make a domain known to xenstored; toolstack only.
    Introduce = 8,
    /// Forget a domain; toolstack only.
    Release = 9,
    /// Directory of a domain.
    GetDomainPath = 10,
    /// Set the value of a node, making it and its parents where they are missing.
    Write = 11,
    /// Make a node and its parents where they are missing.
    Mkdir = 12,
    /// Remove a node and all below it.
    Rm = 13,
    /// Set the permissions of a node.
    SetPerms = 14,
    /// From the server, unasked: a watch fired.
    WatchEvent = 15,
    /// From the server: the request failed; the payload names the errno.
    Error = 16,
    /// Whether xenstored knows a domain; privileged.
    IsDomainIntroduced = 17,
    /// Toolstack only.
    Resume = 18,
    /// Toolstack only.
    SetTarget = 19,
    /// Remove all own watches and transactions.
    ResetWatches = 21,
    /// A part of the names of the children of a node, for lists that do not fit one message.
    DirectoryPart = 22,
}

/// The head of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Type number, unchecked: see [`MessageType::from_number`].
    pub kind: u32,
    /// The requester's number for the request; the reply carries the same. Junk in watch events.
    pub request: u32,
    /// The transaction it is part of, or 0.
    pub transaction: u32,
    /// Bytes of payload that follow.
    pub length: u32,
}

impl Header {
    /// The header as bytes. Xen runs on little-endian machines only, so the wire is little-endian.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        for (to, word) in
            bytes.chunks_exact_mut(4).zip([self.kind, self.request, self.transaction, self.length])
        {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header of bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Header {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Header { kind: word(0), request: word(4), transaction: word(8), length: word(12) }
    }
}

/// A whole message as bytes: its payload is `parts`, one after the other. `None` when it exceeds
/// [`PAYLOAD_BYTES_MAX`].
#[must_use]
pub fn encode(kind: MessageType, request: u32, transaction: u32, parts: &[&[u8]]) -> Option<Vec<u8>> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    if length > PAYLOAD_BYTES_MAX {
        return None;
    }
    let header = Header { kind: kind.number(), request, transaction, length: u32::try_from(length).ok()? };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + length);
    bytes.extend_from_slice(&header.to_bytes());
    for part in parts {
        bytes.extend_from_slice(part);
    }
    Some(bytes)
}

/// Puts messages together out of bytes that arrive in any pieces. Holds at most one message.
#[derive(Debug, Default)]
pub struct Decoder {
    head: [u8; HEADER_BYTES],
    head_filled: usize,
    payload: Vec<u8>,
}

/// The sender announced a payload longer than [`PAYLOAD_BYTES_MAX`]; the stream cannot be followed any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong(pub u32);

impl Decoder {
    /// Takes bytes from the front of `input` until a message is whole or the input is used up.
    ///
    /// # Errors
    /// [`TooLong`]: drop the connection.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<(Header, Vec<u8>)>, TooLong> {
        if self.head_filled < HEADER_BYTES {
            let taken = (HEADER_BYTES - self.head_filled).min(input.len());
            let (now, rest) = input.split_at(taken);
            self.head[self.head_filled..self.head_filled + taken].copy_from_slice(now);
            self.head_filled += taken;
            *input = rest;
            if self.head_filled < HEADER_BYTES {
                return Ok(None);
            }
        }
        let header = Header::from_bytes(&self.head);
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        if length > PAYLOAD_BYTES_MAX {
            return Err(TooLong(header.length));
        }
        let (now, rest) = input.split_at((length - self.payload.len()).min(input.len()));
        self.payload.extend_from_slice(now);
        *input = rest;
        if self.payload.len() < length {
            return Ok(None);
        }
        self.head_filled = 0;
        Ok(Some((header, core::mem::take(&mut self.payload))))
    }

    /// Forgets a message begun: the connection is a new one.
    pub fn reset(&mut self) {
        self.head_filled = 0;
        self.payload.clear();
    }
}

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal),+ $(,)?) => {
        /// Why xenstored refused, by the errno that it named.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum ErrorCode {
            $($(#[$doc])* $name,)+
            /// A name that the protocol does not list.
            Other,
        }

        impl ErrorCode {
            /// The errno's name, as on the wire.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(ErrorCode::$name => $text,)+ ErrorCode::Other => "an unknown error" }
            }

            /// The code of a name on the wire, with or without its NUL.
            #[must_use]
            pub fn from_payload(payload: &[u8]) -> ErrorCode {
                let name = payload.strip_suffix(b"\0").unwrap_or(payload);
                $(if name == $text.as_bytes() { return ErrorCode::$name; })+
                ErrorCode::Other
            }
        }
    };
}

error_codes! {
    /// EINVAL: malformed request or path.
    Invalid = "EINVAL",
    /// EACCES: no permission, or a missing node whose parent may not be read.
    Denied = "EACCES",
    /// EEXIST: the watch exists already.
    Exists = "EEXIST",
    /// EISDIR.
    IsDirectory = "EISDIR",
    /// ENOENT: no such node, watch or transaction.
    Missing = "ENOENT",
    /// ENOMEM: xenstored is out of memory, or a memory quota was hit.
    NoMemory = "ENOMEM",
    /// ENOSPC: a quota (nodes, size of a node, transactions, permissions) was hit.
    NoSpace = "ENOSPC",
    /// EIO.
    Io = "EIO",
    /// ENOTEMPTY.
    NotEmpty = "ENOTEMPTY",
    /// ENOSYS: the server does not know the request.
    Unsupported = "ENOSYS",
    /// EROFS.
    ReadOnly = "EROFS",
    /// EBUSY: a transaction inside a transaction.
    Busy = "EBUSY",
    /// EAGAIN: the transaction clashed with another change; redo it.
    Again = "EAGAIN",
    /// EISCONN.
    Connected = "EISCONN",
    /// E2BIG: the reply does not fit, or too many watches.
    TooBig = "E2BIG",
    /// EPERM: only the owner may do that.
    NotOwner = "EPERM",
    /// EQUOTA: what oxenstored says where a quota was hit.
    Quota = "EQUOTA",
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn a_message_has_the_layout_of_xs_wire_h() {
        let bytes = encode(MessageType::Write, 0x01020304, 5, &[b"/a", b"\0", b"v"]).unwrap();
        assert_eq!(bytes, [11, 0, 0, 0, 4, 3, 2, 1, 5, 0, 0, 0, 4, 0, 0, 0, b'/', b'a', 0, b'v']);
    }

    #[test]
    fn payloads_are_limited_to_the_byte() {
        assert!(encode(MessageType::Write, 1, 0, &[&[0; 4096]]).is_some());
        assert!(encode(MessageType::Write, 1, 0, &[&[0; 4096], b"x"]).is_none());
        let mut header = Header { kind: 2, request: 1, transaction: 0, length: 4097 };
        assert_eq!(Decoder::default().next(&mut &header.to_bytes()[..]), Err(TooLong(4097)));
        header.length = 4096;
        assert_eq!(Decoder::default().next(&mut &header.to_bytes()[..]), Ok(None));
    }

    #[test]
    fn any_split_gives_the_same_messages() {
        let mut stream = vec![];
        for (request, payload) in [(1, &b""[..]), (2, b"x"), (3, &[7; 4096]), (4, b"end\0")] {
            stream.extend(encode(MessageType::Read, request, 0, &[payload]).unwrap());
        }
        for piece in [1, 2, 3, 15, 16, 17, 31, 4096, 9999] {
            let mut decoder = Decoder::default();
            let mut seen = vec![];
            for chunk in stream.chunks(piece) {
                let mut input = chunk;
                while let Some((header, payload)) = decoder.next(&mut input).unwrap() {
                    seen.push((header.request, payload.len()));
                }
                assert!(input.is_empty());
            }
            assert_eq!(seen, [(1, 0), (2, 1), (3, 4096), (4, 4)], "pieces of {piece}");
        }
    }

    #[test]
    fn type_numbers_and_error_names_go_there_and_back() {
        for number in 0..64 {
            if let Some(kind) = MessageType::from_number(number) {
                assert_eq!(kind.number(), number);
            }
        }
        assert_eq!(MessageType::from_number(20), None);
        assert_eq!(MessageType::from_number(23), None);
        assert_eq!(ErrorCode::from_payload(b"EAGAIN\0"), ErrorCode::Again);
        assert_eq!(ErrorCode::from_payload(b"EAGAIN"), ErrorCode::Again);
        assert_eq!(ErrorCode::from_payload(b"EWHAT\0"), ErrorCode::Other);
        assert_eq!(ErrorCode::from_payload(b""), ErrorCode::Other);
    }
}
