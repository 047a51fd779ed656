//! The handshake: fixed newstyle, structured replies if the server has them, `GO` with block sizes.
//!
//! Over anything that reads and writes; time-outs are the stream's. What a server may say is bounded, whatever it says.

use std::io::{Error, ErrorKind, Read, Write};

use crate::nbd::wire::{
    INIT_MAGIC, OPTION_MAGIC, OptionReply, Reader, handshake, info, option, option_reply, transmission,
};

/// The magic number of the way before newstyle.
const OLD_MAGIC: u64 = 0x0000_4202_8186_1253;

/// Errors of options that only clients need to tell apart.
const ERR_TLS_REQD: u32 = option_reply::ERROR | 5;

/// Answers to one option at most, and bytes of one answer.
const REPLIES_MAX: u32 = 64;
const REPLY_BYTES_MAX: u32 = 16 * 1024;

/// What transfers of at most this many bytes a server takes that does not say.
const MOST_BYTES: u32 = 32 << 20;

/// The largest smallest block that the protocol allows, in bytes.
const LEAST_BYTES_MAX: u32 = 64 << 10;

/// What a server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its length in bytes.
    pub size_bytes: u64,
    /// What it can do: see [`transmission`].
    pub flags: u16,
    /// Requests are multiples of this, in bytes: a power of two up to 64 KiB.
    pub least_bytes: u32,
    /// Requests had better be multiples of this: a power of two, not less.
    pub preferred_bytes: u32,
    /// A request moves at most this many bytes: not less either.
    pub most_bytes: u32,
    /// Replies may be structured ones.
    pub structured: bool,
}

impl Export {
    /// Whether all of some flags are there.
    #[must_use]
    pub fn can(&self, flags: u16) -> bool {
        self.flags & transmission::HAS_FLAGS != 0 && self.flags & flags == flags
    }
}

fn bad(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, why.into())
}

/// Greets a server and asks for an export. Afterwards requests may be sent.
///
/// # Errors
/// The stream's own; and `InvalidData` with a sentence, where the server does not speak the protocol or refuses.
pub fn greet<S: Read + Write>(stream: &mut S, export: &str) -> Result<Export, Error> {
    let hello: [u8; 18] = read(stream)?;
    let mut from = Reader(&hello);
    let (init, magic, flags) = (from.u64(), from.u64(), from.u16().unwrap_or(0));
    if init != Some(INIT_MAGIC) {
        return Err(bad("what answers there is no NBD server"));
    }
    if magic == Some(OLD_MAGIC) || flags & handshake::FIXED_NEWSTYLE == 0 {
        return Err(bad("the server speaks an old form of the protocol: it must offer fixed newstyle"));
    }
    if magic != Some(OPTION_MAGIC) {
        return Err(bad("what answers there is no NBD server"));
    }
    let ours = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    stream.write_all(&u32::from(ours).to_be_bytes())?;
    let structured = ask_for_structure(stream)?;
    let mut told = Told::default();
    go(stream, export, &mut told)?;
    told.export(structured)
}

fn read<const N: usize>(stream: &mut impl Read) -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn send(stream: &mut impl Write, option: u32, data: &[u8]) -> Result<(), Error> {
    let length = u32::try_from(data.len()).map_err(|_| bad("the export's name is too long"))?;
    let mut message = Vec::with_capacity(16 + data.len());
    message.extend(OPTION_MAGIC.to_be_bytes());
    message.extend(option.to_be_bytes());
    message.extend(length.to_be_bytes());
    message.extend(data);
    stream.write_all(&message)?;
    stream.flush()
}

/// The next answer to an option: its kind, and what it says.
fn reply(stream: &mut impl Read, option: u32) -> Result<(u32, Vec<u8>), Error> {
    let header = OptionReply::from_bytes(&read(stream)?)
        .filter(|header| header.option == option)
        .ok_or_else(|| bad("the server answers what it was not asked"))?;
    if header.length_bytes > REPLY_BYTES_MAX {
        return Err(bad("the server's answer to an option is too long"));
    }
    let mut body = vec![0; header.length_bytes as usize];
    stream.read_exact(&mut body)?;
    Ok((header.kind, body))
}

fn ask_for_structure<S: Read + Write>(stream: &mut S) -> Result<bool, Error> {
    send(stream, option::STRUCTURED_REPLY, &[])?;
    let (kind, body) = reply(stream, option::STRUCTURED_REPLY)?;
    match kind {
        option_reply::ACK => Ok(true),
        ERR_TLS_REQD => Err(refused(kind, &body)),
        kind if kind & option_reply::ERROR != 0 => Ok(false),
        _ => Err(bad("the server's answer to an option makes no sense")),
    }
}

fn go<S: Read + Write>(stream: &mut S, export: &str, told: &mut Told) -> Result<(), Error> {
    let length = u32::try_from(export.len()).map_err(|_| bad("the export's name is too long"))?;
    let mut data = Vec::with_capacity(export.len() + 8);
    data.extend(length.to_be_bytes());
    data.extend(export.as_bytes());
    data.extend(1_u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    send(stream, option::GO, &data)?;
    for _ in 0..REPLIES_MAX {
        match reply(stream, option::GO)? {
            (option_reply::ACK, _) => return Ok(()),
            (option_reply::INFO, body) => told.take(&body)?,
            (kind, body) if kind & option_reply::ERROR != 0 => return Err(refused(kind, &body)),
            _ => return Err(bad("the server's answer to an option makes no sense")),
        }
    }
    Err(bad("the server's answer to an option does not end"))
}

/// A server's refusal as a sentence, with what it says itself.
fn refused(kind: u32, body: &[u8]) -> Error {
    let why = match kind {
        option_reply::ERR_UNKNOWN => "the server has no export of that name",
        option_reply::ERR_POLICY => "the server does not let us have that export",
        option_reply::ERR_SHUTDOWN => "the server is shutting down",
        option_reply::ERR_UNSUP => "the server is too old: it must know NBD_OPT_GO",
        ERR_TLS_REQD => "the server wants TLS, which is not supported",
        _ => "the server refuses the export",
    };
    let said: String = String::from_utf8_lossy(body).chars().filter(|c| !c.is_control()).take(120).collect();
    bad(if said.is_empty() { why.to_owned() } else { format!("{why} (it says: {said})") })
}

/// What the server has told so far.
#[derive(Default)]
struct Told {
    export: Option<(u64, u16)>,
    blocks: Option<(u32, u32, u32)>,
}

impl Told {
    fn take(&mut self, body: &[u8]) -> Result<(), Error> {
        let mut from = Reader(body);
        let short = || bad("the server's description of the export is too short");
        match from.u16().ok_or_else(short)? {
            info::EXPORT => {
                self.export = Some((from.u64().ok_or_else(short)?, from.u16().ok_or_else(short)?));
            }
            info::BLOCK_SIZE => {
                let mut next = || from.u32().ok_or_else(short);
                self.blocks = Some((next()?, next()?, next()?));
            }
            _ => {}
        }
        Ok(())
    }

    fn export(self, structured: bool) -> Result<Export, Error> {
        let (size_bytes, flags) =
            self.export.ok_or_else(|| bad("the server does not say how large the export is"))?;
        let (least, preferred, most) = self.blocks.unwrap_or((1, 4096, MOST_BYTES));
        let sane = least.is_power_of_two()
            && least <= LEAST_BYTES_MAX
            && preferred.is_power_of_two()
            && preferred >= least
            && most >= least;
        if !sane {
            return Err(bad("the server's block sizes make no sense"));
        }
        if i64::try_from(size_bytes).is_err() {
            return Err(bad("the server's export is larger than any can be"));
        }
        // A transfer is a multiple of the least block, and no longer than anybody's memory.
        let most_bytes = most.min(MOST_BYTES);
        let most_bytes = most_bytes - most_bytes % least;
        Ok(Export {
            size_bytes,
            flags,
            least_bytes: least,
            preferred_bytes: preferred,
            most_bytes,
            structured,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server whose every word is known before it speaks.
    struct Script {
        says: Vec<u8>,
        at: usize,
        heard: Vec<u8>,
    }

    impl Script {
        fn new() -> Script {
            let mut script = Script { says: Vec::new(), at: 0, heard: Vec::new() };
            script.says.extend(INIT_MAGIC.to_be_bytes());
            script.says.extend(OPTION_MAGIC.to_be_bytes());
            script.says.extend(3_u16.to_be_bytes());
            script
        }

        fn reply(mut self, option: u32, kind: u32, body: &[u8]) -> Script {
            let length_bytes = u32::try_from(body.len()).unwrap();
            self.says.extend(OptionReply { option, kind, length_bytes }.to_bytes());
            self.says.extend(body);
            self
        }

        fn structured(self) -> Script {
            self.reply(option::STRUCTURED_REPLY, option_reply::ACK, &[])
        }

        fn export(self, size: u64) -> Script {
            let mut body = info::EXPORT.to_be_bytes().to_vec();
            body.extend(size.to_be_bytes());
            body.extend(0x0d_u16.to_be_bytes());
            self.reply(option::GO, option_reply::INFO, &body)
        }

        fn blocks(self, sizes: [u32; 3]) -> Script {
            let mut body = info::BLOCK_SIZE.to_be_bytes().to_vec();
            sizes.iter().for_each(|size| body.extend(size.to_be_bytes()));
            self.reply(option::GO, option_reply::INFO, &body)
        }

        fn ack(self) -> Script {
            self.reply(option::GO, option_reply::ACK, &[])
        }

        fn greet(mut self, name: &str) -> Result<Export, String> {
            greet(&mut self, name).map_err(|error| error.to_string())
        }
    }

    impl Read for Script {
        fn read(&mut self, bytes: &mut [u8]) -> Result<usize, Error> {
            let count = bytes.len().min(self.says.len() - self.at).min(7);
            bytes[..count].copy_from_slice(&self.says[self.at..self.at + count]);
            self.at += count;
            Ok(count)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> Result<usize, Error> {
            self.heard.extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> Result<(), Error> {
            Ok(())
        }
    }

    #[test]
    fn an_export_is_agreed_upon() {
        let export =
            Script::new().structured().export(1 << 30).blocks([512, 4096, 1 << 20]).ack().greet("x").unwrap();
        assert_eq!((export.size_bytes, export.flags, export.structured), (1 << 30, 13, true));
        assert_eq!((export.least_bytes, export.preferred_bytes, export.most_bytes), (512, 4096, 1 << 20));
        assert!(export.can(transmission::SEND_FLUSH) && !export.can(transmission::SEND_TRIM));
        let plain = Script::new().reply(option::STRUCTURED_REPLY, option_reply::ERR_UNSUP, b"no");
        let export = plain.export(5).ack().greet("").unwrap();
        assert_eq!(
            (export.size_bytes, export.structured, export.least_bytes, export.most_bytes),
            (5, false, 1, 32 << 20)
        );
        let huge =
            Script::new().structured().export(5).blocks([4096, 4096, u32::MAX]).ack().greet("").unwrap();
        assert_eq!(huge.most_bytes, 32 << 20);
        let mut script = Script::new().structured().export(5).ack();
        greet(&mut script, "disk").unwrap();
        assert_eq!(script.heard[..4], [0, 0, 0, 3]);
        assert_eq!(script.heard[20..36], *b"IHAVEOPT\0\0\0\x07\0\0\0\x0c");
        assert_eq!(script.heard[36..], *b"\0\0\0\x04disk\0\x01\0\x03");
    }

    #[test]
    fn refusals_and_nonsense_are_said() {
        let go = |kind, body: &[u8]| {
            Script::new().structured().reply(option::GO, kind, body).greet("x").unwrap_err()
        };
        assert_eq!(go(option_reply::ERR_UNKNOWN, b""), "the server has no export of that name");
        assert!(go(option_reply::ERR_POLICY, b"go\naway").contains("(it says: goaway)"));
        assert!(go(ERR_TLS_REQD, b"").contains("TLS"));
        assert!(go(option_reply::ERR_UNSUP, b"").contains("too old"));
        assert!(go(9, b"").contains("makes no sense"));
        assert!(go(option_reply::INFO, b"\0").contains("too short"));
        assert!(go(option_reply::INFO, b"\0\0\0").contains("too short"));
        for sizes in
            [[3, 4096, 8192], [0, 0, 0], [1 << 20, 1 << 20, 1 << 21], [4096, 512, 8192], [4096, 4096, 512]]
        {
            let error = Script::new().structured().export(5).blocks(sizes).ack().greet("x").unwrap_err();
            assert!(error.contains("block sizes"), "{sizes:?}");
        }
        assert!(Script::new().structured().ack().greet("x").unwrap_err().contains("how large"));
        assert!(Script::new().structured().export(1 << 63).ack().greet("x").unwrap_err().contains("larger"));
        let endless = (0..100).fold(Script::new().structured(), |script, _| script.export(5));
        assert!(endless.greet("x").unwrap_err().contains("does not end"));
        assert!(Script::new().reply(option::GO, 1, b"").greet("x").unwrap_err().contains("not asked"));
        let long = vec![0; 20_000];
        assert!(
            Script::new()
                .reply(option::STRUCTURED_REPLY, 1, &long)
                .greet("x")
                .unwrap_err()
                .contains("too long")
        );
        let mut old = Script::new();
        old.says[16..18].fill(0);
        assert!(old.greet("x").unwrap_err().contains("fixed newstyle"));
        let mut other = Script::new();
        other.says[..4].copy_from_slice(b"SSH-");
        assert!(other.greet("x").unwrap_err().contains("no NBD server"));
        assert!(Script { says: Vec::new(), at: 0, heard: Vec::new() }.greet("x").is_err());
    }
}
