//! An export that answers at once: opening an image reads it, and repairs it where its format asks for that.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use formats::{Failure, Medium};
use rustix::event::EventfdFlags;

use super::connect::{Servers, Stream};
use super::{Connected, Goal, errno, session_for};
use crate::nbd::client::{Address, Command, Export, Memory, Purpose, Request, Session};
use crate::nbd::wire::{self, command, transmission};
use crate::storage::legs::{BLOCK_BYTES_MAX, SECTOR_BYTES, Shape};
use crate::storage::medium::{Path, Prepared};
use crate::storage::{Access, DiscardUnit, Identity, OpenError};

/// What is received at a time, in bytes.
const RECEIVE_BYTES: usize = 64 << 10;

/// The longest request, in bytes.
const REQUEST_BYTES: u32 = 1 << 20;

/// An export, one request after the other.
#[derive(Debug)]
pub(in crate::storage) struct Blocking {
    stream: Stream,
    session: Session<()>,
    goal: Arc<Goal>,
    access: Access,
    shape: Shape,
    /// Stands for the image in the table of files.
    stand_in: OwnedFd,
}

/// Connects to a server that a caller names.
///
/// # Errors
/// The operator's sentence.
pub(in crate::storage) fn open(
    servers: &Arc<Servers>,
    path: &str,
    access: Access,
) -> Result<Blocking, OpenError> {
    let refuse = |reason: String| OpenError { path: path.into(), reason };
    let address = Address::parse(path).map_err(|why| refuse(format!("is no address of a server: {why}")))?;
    let (stream, export) = servers.connect(&address).map_err(refuse)?;
    let purpose = match access {
        Access::ReadOnly => Purpose::Reading,
        Access::ReadWrite => Purpose::Writing,
        Access::ReadWriteShared => Purpose::WritingShared,
    };
    let session = session_for(export, purpose).map_err(|why| refuse(why.into()))?;
    let block = export.least_bytes.max(SECTOR_BYTES);
    if block > BLOCK_BYTES_MAX {
        return Err(refuse(format!(
            "the server wants blocks of {block} bytes, and at most {BLOCK_BYTES_MAX} can be had"
        )));
    }
    // What is left behind the last whole block cannot be reached.
    let shape = Shape::new(export.size_bytes - export.size_bytes % u64::from(block), block, 1);
    if shape.size == 0 {
        return Err(refuse(String::from("the export is empty")));
    }
    let stand_in = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
        .map_err(|errno| refuse(format!("cannot be opened: {errno}")))?;
    let goal = Arc::new(Goal { address, path: path.into(), servers: Arc::clone(servers), purpose });
    Ok(Blocking { stream, session, goal, access, shape, stand_in })
}

/// The one request's memory, and its answer.
struct Room<'a> {
    writes: &'a [u8],
    reads: &'a mut [u8],
    answer: Option<Result<u32, u32>>,
}

impl Memory<()> for Room<'_> {
    fn bytes(&self, (): (), length: u32) -> &[u8] {
        self.writes.get(..length as usize).unwrap_or_default()
    }

    fn store(&mut self, (): (), at: u32, bytes: &[u8]) {
        let at = at as usize;
        if let Some(target) = self.reads.get_mut(at..at + bytes.len()) {
            target.copy_from_slice(bytes);
        }
    }

    fn zero(&mut self, (): (), at: u32, length: u32) {
        let at = at as usize;
        if let Some(target) = self.reads.get_mut(at..at + length as usize) {
            target.fill(0);
        }
    }

    fn done(&mut self, _: u32, result: Result<u32, u32>) {
        self.answer = Some(result);
    }
}

impl Blocking {
    pub(in crate::storage) fn identity(&self) -> Identity {
        let mut hasher = DefaultHasher::new();
        self.goal.address.hash(&mut hasher);
        Identity::Remote { number: hasher.finish() }
    }

    /// Keeps what transfers are done with.
    pub(in crate::storage) fn finish(self) -> Prepared {
        let identity = self.identity();
        let export = *self.session.export();
        let block = self.shape.block;
        let can_trim = export.can(transmission::SEND_TRIM) && self.access != Access::ReadOnly;
        let discard = DiscardUnit { granularity_bytes: block.max(BLOCK_BYTES_MAX), alignment_bytes: 0 };
        Prepared {
            fd: self.stand_in,
            tail: None,
            path: Path::Remote,
            shape: self.shape,
            access: self.access,
            identity,
            physical_block_bytes: export.preferred_bytes.clamp(block, BLOCK_BYTES_MAX),
            discard: can_trim.then_some(discard),
            unit_bytes: block,
            locked: true,
            remote: Some(Box::new(Connected { socket: self.stream.into_fd(), export, goal: self.goal })),
        }
    }

    fn ask(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        writes: &[u8],
        reads: &mut [u8],
    ) -> Result<(), Failure> {
        self.stream.renew();
        exchange(
            &mut self.stream,
            &mut self.session,
            command,
            offset,
            length,
            Room { writes, reads, answer: None },
        )
    }

    /// The whole blocks around a range, at most a request's length of them: first byte, and how many bytes.
    fn around(&self, offset: u64, length: usize) -> (u64, u32) {
        let block = u64::from(self.session.export().least_bytes);
        let most = u64::from(self.session.export().most_bytes.min(REQUEST_BYTES));
        let from = offset - offset % block;
        let to = offset.saturating_add(length as u64).next_multiple_of(block).min(from + most);
        (from, u32::try_from(to - from).unwrap_or(0))
    }

    /// Flushes if asked to, and says good-bye.
    pub(super) fn leave(
        socket: OwnedFd,
        export: Export,
        flush: bool,
        purpose: Purpose,
    ) -> Result<(), String> {
        let mut stream = Stream::new(socket);
        if flush {
            let mut session = session_for(export, purpose)?;
            let room = Room { writes: &[], reads: &mut [], answer: None };
            exchange(&mut stream, &mut session, Command::Flush, 0, 0, room)
                .map_err(|failure| failure.to_string())?;
        }
        let bye =
            wire::Request { flags: 0, command: command::DISC, cookie: 0, offset_bytes: 0, length_bytes: 0 };
        let _ = stream.write_all(&bye.to_bytes());
        Ok(())
    }
}

/// Has one request done, and waits for it.
fn exchange(
    stream: &mut Stream,
    session: &mut Session<()>,
    command: Command,
    offset_bytes: u64,
    length_bytes: u32,
    mut room: Room<'_>,
) -> Result<(), Failure> {
    session.push(Request { tag: 0, command, offset_bytes, length_bytes, memory: () }, &mut room);
    let mut received = vec![0; RECEIVE_BYTES];
    let lost = |error: std::io::Error| Failure::Io(error.raw_os_error().unwrap_or(libc::EIO));
    loop {
        while session.has_outgoing() {
            let sent = match session.outgoing(&room).next() {
                Some(piece) => stream.write(piece).map_err(lost)?,
                None => 0,
            };
            session.sent(sent);
        }
        match room.answer {
            Some(Ok(_)) => return Ok(()),
            Some(Err(number)) if number == wire::error::ENOSPC => return Err(Failure::NoSpace),
            Some(Err(number)) => return Err(Failure::Io(errno(number))),
            None => {}
        }
        let count = stream.read(&mut received).map_err(lost)?;
        let bytes = received.get(..count).filter(|bytes| !bytes.is_empty());
        let bytes = bytes.ok_or(Failure::Io(libc::ECONNRESET))?;
        session.receive(bytes, &mut room).map_err(|_| Failure::Io(libc::EPROTO))?;
    }
}

impl Medium for Blocking {
    fn length_bytes(&mut self) -> u64 {
        self.shape.size
    }

    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        let mut at = 0;
        while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
            let offset = offset_bytes.saturating_add(at as u64);
            if offset >= self.shape.size {
                rest.fill(0);
                return Ok(());
            }
            let inside = usize::try_from(self.shape.size - offset).unwrap_or(usize::MAX).min(rest.len());
            let (from, length) = self.around(offset, inside);
            let mut whole = vec![0; length as usize];
            self.ask(Command::Read, from, length, &[], &mut whole)?;
            let skip = usize::try_from(offset - from).unwrap_or(0);
            let found = whole.get(skip..).unwrap_or_default();
            let count = found.len().min(inside);
            for (byte, found) in rest.iter_mut().zip(found.iter().take(count)) {
                *byte = *found;
            }
            at += count;
        }
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        if offset_bytes.saturating_add(bytes.len() as u64) > self.shape.size {
            return Err(Failure::NoSpace);
        }
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let offset = offset_bytes + at as u64;
            let (from, length) = self.around(offset, rest.len());
            let skip = usize::try_from(offset - from).unwrap_or(0);
            let count = rest.len().min(length as usize - skip);
            let mut whole = vec![0; length as usize];
            if count < whole.len() {
                self.ask(Command::Read, from, length, &[], &mut whole)?;
            }
            for (byte, new) in whole.iter_mut().skip(skip).zip(rest.iter().take(count)) {
                *byte = *new;
            }
            self.ask(Command::Write, from, length, &whole, &mut [])?;
            at += count;
        }
        Ok(())
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        let zeroes = vec![0; REQUEST_BYTES as usize];
        let mut at = 0;
        while at < length_bytes {
            let part = usize::try_from(length_bytes - at).unwrap_or(zeroes.len()).min(zeroes.len());
            self.write(offset_bytes.saturating_add(at), zeroes.get(..part).unwrap_or_default())?;
            at += part as u64;
        }
        Ok(())
    }

    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        if length_bytes <= self.shape.size { Ok(()) } else { Err(Failure::NoSpace) }
    }

    fn sync(&mut self) -> Result<(), Failure> {
        self.ask(Command::Flush, 0, 0, &[], &mut [])
    }
}
