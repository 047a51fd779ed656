//! [`Storage`] on Linux: requests cut into legs, legs given to an engine, answers put together again.
//!
//! `docs/design/storage.md` tells the life of a request.

use std::collections::VecDeque;
use std::os::fd::{AsFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::calls::{self, Job};
use super::engine::{self, Action, AnyEngine, Engine, EngineChoice, Landed, Transfer};
use super::files::{FILES_MAX, File, Files};
use super::legs::{self, BOUNCE_BYTES, Next, Way};
use super::medium::{self, Path, Prepared};
use super::slots::{Fifo, Slots, Stage};
use super::workers::{Bell, Workers};
use super::{Access, Done, FileId, Io, IoKind, OpenError, Opened, Storage, StorageError};
use crate::buffers::{Pool, Span};
use crate::images::Roots;

/// Threads that open and close files. A dead file server holds one for each path that is tried; the rest go on.
const OPENERS_MAX: usize = 4;

/// Opens that wait for a thread. More are refused at once.
const OPENS_WAITING_MAX: usize = 256;

/// Threads for transfers that the engine has no asynchronous form for.
const HELPERS_MAX: usize = 4;

/// Bounce buffers in bytes: 16 requests go through them at a time, the others wait.
const BOUNCE_POOL_BYTES: usize = 16 * BOUNCE_BYTES as usize;

/// Tries of a transfer that moves nothing (EINTR, EAGAIN, short by less than a block) before it counts as failed.
const TRIES_MAX: u8 = 16;

/// What to make of a storage.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which engine.
    pub engine: EngineChoice,
    /// The directories below which images may lie.
    pub roots: Vec<PathBuf>,
    /// Size of the arena for data in flight, in bytes.
    pub pool_bytes: usize,
    /// Whether to go past the page cache where the file system allows.
    pub direct: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { engine: EngineChoice::Auto, roots: Vec::new(), pool_bytes: 64 << 20, direct: true }
    }
}

/// A job for an opener.
enum Errand {
    Open { token: u64, path: String, access: Access },
    Close(Box<File>),
}

impl std::fmt::Debug for Errand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Errand::Open { path, .. } => write!(f, "Open({path})"),
            Errand::Close(_) => f.write_str("Close"),
        }
    }
}

type OpenAnswer = (u64, Result<Prepared, OpenError>, String);

/// Storage on Linux files and block devices.
#[derive(Debug)]
pub struct LinuxStorage {
    pool: Pool,
    bounces: Pool,
    engine: AnyEngine,
    engine_text: String,
    files: Files,
    slots: Slots,
    /// Requests whose next transfer the engine had no room for.
    unpushed: Fifo,
    /// Requests that wait for a bounce buffer.
    unbounced: Fifo,
    /// Transfers that failed before they started.
    stillborn: VecDeque<Landed>,
    finished: VecDeque<Done>,
    refused_opens: VecDeque<(u64, Result<Opened, OpenError>)>,
    openers: Workers<Errand, OpenAnswer>,
    helpers: Workers<Job, Landed>,
    bell: Arc<Bell>,
    /// Whether a transfer was pushed by us and not on behalf of a caller who is about to submit.
    continued: bool,
}

impl LinuxStorage {
    /// Opens the roots, maps the arena and starts an engine.
    ///
    /// # Errors
    /// A sentence for the operator: which of these failed, why, and what to do.
    pub fn new(options: &Options) -> Result<LinuxStorage, String> {
        let (engine, text) = engine::start(options.engine)?;
        Self::build(options, engine, text)
    }

    /// The same over an engine that the caller brings: one that fails on purpose, say.
    ///
    /// # Errors
    /// As [`LinuxStorage::new`].
    pub fn with_engine(options: &Options, engine: Box<dyn Engine>) -> Result<LinuxStorage, String> {
        let text = format!("{engine:?}");
        Self::build(options, AnyEngine::Other(engine), text)
    }

    fn build(options: &Options, engine: AnyEngine, engine_text: String) -> Result<LinuxStorage, String> {
        let roots = Arc::new(Roots::new(&options.roots).map_err(|error| error.to_string())?);
        let pool =
            Pool::new(options.pool_bytes).map_err(|error| format!("no memory for buffers: {error}"))?;
        let bounces =
            Pool::new(BOUNCE_POOL_BYTES).map_err(|error| format!("no memory for buffers: {error}"))?;
        let bell = Arc::new(Bell::new().map_err(|error| format!("eventfd: {error}"))?);
        let direct = options.direct;
        let openers = Workers::new("vbdd-open", OPENERS_MAX, Arc::clone(&bell), move |errand| match errand {
            Errand::Open { token, path, access } => {
                let result = medium::open(&roots, &path, access, direct);
                Some((token, result, path))
            }
            Errand::Close(file) => {
                drop(file);
                None
            }
        });
        let helpers = Workers::new("vbdd-io", HELPERS_MAX, Arc::clone(&bell), |Job(transfer)| {
            Some(Landed { tag: transfer.tag, result: calls::now(&transfer) })
        });
        Ok(LinuxStorage {
            pool,
            bounces,
            engine,
            engine_text,
            files: Files::default(),
            slots: Slots::new(),
            unpushed: Fifo::EMPTY,
            unbounced: Fifo::EMPTY,
            stillborn: VecDeque::new(),
            finished: VecDeque::new(),
            refused_opens: VecDeque::new(),
            openers,
            helpers,
            bell,
            continued: false,
        })
    }

    /// Which engine was taken and why: a sentence for the log.
    #[must_use]
    pub fn engine_text(&self) -> &str {
        &self.engine_text
    }

    /// What the poller must watch for reading, level-triggered: at most two descriptors, the same ones for life.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> {
        [self.engine.wake_fd(), Some(self.bell.fd())].into_iter().flatten()
    }

    /// To be called when any of [`LinuxStorage::fds`] is readable, and then all of `done` and `opened` to be taken. It costs
    /// no system call with io_uring, unless a thread has answered.
    pub fn ready(&mut self) {
        self.engine.acknowledge();
        self.bell.answer();
    }

    /// Requests queued and not yet finished.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.slots.used()
    }

    fn refuse_open(&mut self, token: u64, path: String, reason: &str) {
        let error = OpenError { path, reason: reason.into() };
        self.refused_opens.push_back((token, Err(error)));
        // The caller is told as of any other open.
        self.bell.ring();
    }

    fn install(&mut self, path: String, prepared: Prepared) -> Result<Opened, OpenError> {
        let Some(file) = self.files.insert(prepared) else {
            let reason = format!("{FILES_MAX} files are open already; detach disks that are not needed");
            return Err(OpenError { path, reason });
        };
        let index = Files::place(file);
        let Some(entry) = self.files.at(file) else {
            return Err(OpenError {
                path,
                reason: String::from("the table of files is broken (a bug in vbdd)"),
            });
        };
        if entry.path != Path::Memory && self.engine.attach(index, entry.fd.as_fd()) {
            entry.attached = Some(index);
        }
        Ok(Opened {
            file,
            identity: entry.identity,
            size_bytes: entry.shape.size,
            physical_block_bytes: entry.physical_block_bytes,
            direct: entry.path == Path::Direct,
        })
    }

    /// Gives a file that nobody uses any more to the threads, since `close` may wait for a file server.
    fn put_away(&mut self, file: FileId) {
        let Some(file) = self.files.remove(file) else { return };
        if let Some(index) = file.attached {
            self.engine.detach(index);
        }
        // Without a thread it is closed here, by dropping what comes back.
        drop(self.openers.give(Errand::Close(Box::new(file))));
    }

    fn end(&mut self, token: u64, result: Result<(), StorageError>) {
        self.finished.push_back(Done { token, result });
    }

    /// What can be said of a request before it takes a place.
    fn admit(file: &File, io: &Io) -> Result<(), StorageError> {
        match io.kind {
            IoKind::Write if file.access == Access::ReadOnly => return Err(StorageError::Os(libc::EROFS)),
            IoKind::Flush => {
                if let Some(errno) = file.flush_failed {
                    return Err(StorageError::Os(errno));
                }
            }
            _ => {}
        }
        if file.closing {
            return Err(StorageError::Os(libc::EBADF));
        }
        legs::check(&file.shape, io.kind, io.offset_bytes, io.span.length_bytes())
    }

    /// Starts the next leg of a request, or ends it.
    fn advance(&mut self, number: u32) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else {
            return self.finish(number, Err(StorageError::Os(libc::EBADF)));
        };
        if slot.io.kind == IoKind::Flush {
            self.slots.at_mut(number).stage = Stage::Sync;
            return self.launch(number);
        }
        let offset = slot.io.offset_bytes + u64::from(slot.at);
        let left = slot.io.span.length_bytes() - slot.at;
        let address = slot.io.span.address() as usize + slot.at as usize;
        match legs::next(&file.shape, offset, address, left) {
            Next::Nothing => self.finish(number, Ok(())),
            Next::Zeroes => {
                slot.io.span.part(slot.at, left).unwrap_or(Span::EMPTY).zero();
                self.finish(number, Ok(()));
            }
            Next::Leg(leg) => {
                let place = self.slots.at_mut(number);
                place.leg = leg;
                if matches!(leg.way, Way::Bounce { .. }) {
                    return self.bounce(number);
                }
                place.memory = slot.io.span.part(slot.at, leg.length).unwrap_or(Span::EMPTY);
                place.stage = Stage::Move;
                place.place = leg.offset;
                self.launch(number);
            }
        }
    }

    /// Starts a bounced leg, as soon as there is a buffer.
    fn bounce(&mut self, number: u32) {
        let slot = *self.slots.at(number);
        let Way::Bounce { from, to } = slot.leg.way else { return };
        let Some(buffer) = slot.bounce.or_else(|| self.bounces.alloc(BOUNCE_BYTES)) else {
            self.unbounced.push(&mut self.slots, number);
            return;
        };
        let length = u32::try_from(to - from).unwrap_or(0);
        let place = self.slots.at_mut(number);
        place.bounce = Some(buffer);
        place.memory = buffer.part(0, length).unwrap_or(Span::EMPTY);
        place.place = from;
        let whole = slot.leg.offset == from && u64::from(slot.leg.length) == to - from;
        place.stage = match (slot.io.kind, whole) {
            (IoKind::Read, _) => Stage::Fetch,
            (_, false) => Stage::Fill,
            (_, true) => Stage::Store,
        };
        if whole && place.stage == Stage::Store {
            Self::overlay(place);
        }
        self.launch(number);
    }

    /// The part of the bounce buffer that a leg covers, and the part of the caller's memory.
    fn both_sides(slot: &super::slots::Slot) -> (Span, Span) {
        let Way::Bounce { from, .. } = slot.leg.way else { return (Span::EMPTY, Span::EMPTY) };
        let skip = u32::try_from(slot.leg.offset - from).unwrap_or(0);
        let inner = slot.bounce.and_then(|buffer| buffer.part(skip, slot.leg.length));
        let outer = slot.io.span.part(slot.at, slot.leg.length);
        (inner.unwrap_or(Span::EMPTY), outer.unwrap_or(Span::EMPTY))
    }

    fn overlay(slot: &super::slots::Slot) {
        let (inner, outer) = Self::both_sides(slot);
        inner.copy_from(&outer);
    }

    /// Starts the current transfer of a request from where it stands.
    #[inline]
    fn launch(&mut self, number: u32) {
        let slot = self.slots.at(number);
        let tail = slot.leg.way == Way::Tail && slot.stage == Stage::Move;
        let Some(file) = self.files.at(slot.io.file) else { return };
        let action = match slot.stage {
            Stage::Sync => Action::Sync,
            Stage::Fetch | Stage::Fill => Action::Read,
            Stage::Store => Action::Write,
            Stage::Move if slot.io.kind == IoKind::Read => Action::Read,
            Stage::Move => Action::Write,
        };
        let transfer = Transfer {
            tag: number,
            action,
            fd: file.descriptor(tail),
            attached: if tail { None } else { file.attached },
            offset_bytes: slot.place + u64::from(slot.moved),
            address: slot.memory.address().wrapping_add(slot.moved as usize),
            length_bytes: slot.memory.length_bytes() - slot.moved,
        };
        let cached = tail || file.path == Path::Cached;
        let synchronous = match action {
            Action::Sync => !self.engine.syncs(),
            _ => cached && self.engine.blocks_on_cached_files(),
        };
        if synchronous {
            if self.helpers.give(Job(transfer)).is_err() {
                self.stillborn.push_back(Landed { tag: number, result: -libc::EAGAIN });
            }
        } else if !self.unpushed.is_empty() || !self.engine.push(&transfer) {
            self.unpushed.push(&mut self.slots, number);
        }
    }

    /// Pushes what waited for room in the engine.
    fn push_more(&mut self) {
        let mut waiting = std::mem::replace(&mut self.unpushed, Fifo::EMPTY);
        while let Some(number) = waiting.pop(&self.slots) {
            self.launch(number);
            if !self.unpushed.is_empty() {
                // It went back to the end of an empty list: put the rest behind it, in order.
                self.unpushed.append(&mut self.slots, waiting);
                return;
            }
        }
    }

    /// An answer has come.
    fn land(&mut self, landed: Landed) {
        let number = landed.tag;
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        match calls::answer(landed.result) {
            // The usual end: all of it.
            Ok(count) if slot.moved + count >= slot.memory.length_bytes() => self.moved_all(number),
            Ok(count) => {
                let moved = slot.moved + count;
                let aligned = if file.path == Path::Direct { moved & !(file.shape.block - 1) } else { moved };
                let reads = matches!(slot.stage, Stage::Fetch | Stage::Fill)
                    || (slot.stage == Stage::Move && slot.io.kind == IoKind::Read);
                if reads && slot.place + u64::from(moved) >= file.shape.size {
                    // The end that the file had when it was opened: nothing but zeroes behind it.
                    let rest = slot.memory.length_bytes() - moved;
                    slot.memory.part(moved, rest).unwrap_or(Span::EMPTY).zero();
                    return self.moved_all(number);
                }
                let file_shrank = count == 0 && reads && slot.tries > 0;
                let stuck = aligned <= slot.moved && slot.tries >= TRIES_MAX;
                if file_shrank || stuck {
                    self.warn(number, "moved fewer bytes than there were: was the file cut short?");
                    return self.finish(number, Err(StorageError::Os(libc::EIO)));
                }
                let place = self.slots.at_mut(number);
                place.tries = if aligned > slot.moved { 0 } else { slot.tries + 1 };
                place.moved = aligned;
                self.relaunch(number);
            }
            Err(errno) => self.failed(number, errno),
        }
    }

    fn relaunch(&mut self, number: u32) {
        self.continued = true;
        self.launch(number);
    }

    fn failed(&mut self, number: u32, errno: i32) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        match errno {
            libc::EINTR | libc::EAGAIN if slot.tries < TRIES_MAX => {
                self.slots.at_mut(number).tries += 1;
                return self.relaunch(number);
            }
            // The file system took O_DIRECT when the file was opened, and does not keep the promise.
            libc::EINVAL if file.path == Path::Direct && slot.stage != Stage::Sync => {
                if let Ok(flags) = rustix::fs::fcntl_getfl(&file.fd)
                    && rustix::fs::fcntl_setfl(&file.fd, flags - OFlags::DIRECT).is_ok()
                {
                    file.path = Path::Cached;
                    file.shape = file.shape.cached();
                    self.warn(
                        number,
                        "refuses direct transfers after all: it goes through the page cache now",
                    );
                    return self.relaunch(number);
                }
            }
            // In flight while another transfer of the file met the same refusal.
            libc::EINVAL if file.path == Path::Cached && slot.tries == 0 && slot.stage != Stage::Sync => {
                self.slots.at_mut(number).tries += 1;
                return self.relaunch(number);
            }
            _ => {}
        }
        if slot.stage == Stage::Sync {
            file.flush_failed = Some(errno);
        }
        self.finish(number, Err(StorageError::Os(errno)));
    }

    /// Tells the log once per file.
    fn warn(&mut self, number: u32, text: &str) {
        let slot = *self.slots.at(number);
        let Some(file) = self.files.at(slot.io.file) else { return };
        if !std::mem::replace(&mut file.warned, true) {
            log::warn!("image {:?} at byte {}: {text}", file.identity, slot.place);
        }
    }

    /// The current transfer of a request has moved all that it was to move.
    fn moved_all(&mut self, number: u32) {
        let place = self.slots.at_mut(number);
        place.moved = 0;
        place.tries = 0;
        match place.stage {
            Stage::Sync => return self.finish(number, Ok(())),
            Stage::Fill => {
                Self::overlay(place);
                place.stage = Stage::Store;
                return self.relaunch(number);
            }
            Stage::Fetch => {
                let (inner, outer) = Self::both_sides(place);
                outer.copy_from(&inner);
            }
            Stage::Move | Stage::Store => {}
        }
        place.at += place.leg.length;
        if place.at == place.io.span.length_bytes() {
            return self.finish(number, Ok(()));
        }
        self.continued = true;
        self.advance(number);
    }

    /// A request has ended: its answer, and whoever waited for it.
    fn finish(&mut self, number: u32, result: Result<(), StorageError>) {
        let slot = *self.slots.at(number);
        self.end(slot.io.token, result);
        if let Some(buffer) = slot.bounce {
            self.bounces.free(buffer);
        }
        let mut close = false;
        if let Some(file) = self.files.at(slot.io.file) {
            file.in_flight -= 1;
            close = file.closing && file.in_flight == 0;
            if slot.listed.is_some() {
                self.unblock(number);
            }
        }
        self.slots.give(number);
        if close {
            self.put_away(slot.io.file);
        }
        if slot.bounce.is_some()
            && let Some(next) = self.unbounced.pop(&self.slots)
        {
            self.continued = true;
            self.bounce(next);
        }
    }

    /// Starts the writes that waited for this one.
    fn unblock(&mut self, number: u32) {
        let file = self.slots.at(number).io.file;
        if let Some(hazards) = self.files.at(file).and_then(|file| file.hazards.as_mut()) {
            hazards.leave(&mut self.slots, number);
        }
        loop {
            let Some(hazards) = self.files.at(file).and_then(|file| file.hazards.as_mut()) else { return };
            let Some(next) = hazards.freed(&mut self.slots) else { return };
            self.continued = true;
            self.advance(next);
        }
    }

    /// A transfer on a file in memory: a copy, done at once.
    #[inline]
    fn copy_now(&mut self, io: &Io) -> Result<(), StorageError> {
        let Some(file) = self.files.at(io.file) else { return Err(StorageError::Os(libc::EBADF)) };
        let action = match io.kind {
            IoKind::Read => Action::Read,
            IoKind::Write => Action::Write,
            IoKind::Flush => Action::Sync,
        };
        let room = file.shape.limit.saturating_sub(io.offset_bytes);
        let length = io.span.length_bytes().min(u32::try_from(room).unwrap_or(u32::MAX));
        let fd = file.descriptor(false);
        let mut moved = 0;
        while moved < length || action == Action::Sync {
            let transfer = Transfer {
                tag: 0,
                action,
                fd,
                attached: None,
                offset_bytes: io.offset_bytes + u64::from(moved),
                address: io.span.address().wrapping_add(moved as usize),
                length_bytes: length - moved,
            };
            match calls::answer(calls::now(&transfer)) {
                Err(libc::EINTR) => {}
                Ok(_) if action == Action::Sync => return Ok(()),
                Ok(0) if io.offset_bytes + u64::from(moved) >= file.shape.size => break,
                Ok(0) => return Err(StorageError::Os(libc::EIO)),
                Ok(count) => moved += count,
                Err(errno) => return Err(StorageError::Os(errno)),
            }
        }
        if io.span.length_bytes() > moved {
            io.span.part(moved, io.span.length_bytes() - moved).unwrap_or(Span::EMPTY).zero();
        }
        Ok(())
    }
}

impl Storage for LinuxStorage {
    fn open(&mut self, token: u64, path: &str, access: Access) {
        if self.openers.waiting() >= OPENS_WAITING_MAX {
            let reason = "too many files wait to be opened; does a file server not answer?";
            return self.refuse_open(token, path.into(), reason);
        }
        if self.openers.give(Errand::Open { token, path: path.into(), access }).is_err() {
            self.refuse_open(
                token,
                path.into(),
                "no thread could be started to open it; is there memory left?",
            );
        }
    }

    fn opened(&mut self) -> Option<(u64, Result<Opened, OpenError>)> {
        if let Some(refused) = self.refused_opens.pop_front() {
            return Some(refused);
        }
        let (token, result, path) = self.openers.take()?;
        Some((token, result.and_then(|prepared| self.install(path, prepared))))
    }

    fn close(&mut self, file: FileId) {
        let Some(entry) = self.files.at(file) else { return };
        entry.closing = true;
        if entry.in_flight == 0 {
            self.put_away(file);
        }
    }

    fn buffers(&mut self) -> &mut Pool {
        &mut self.pool
    }

    #[inline]
    fn queue(&mut self, io: Io) {
        let Some(file) = self.files.at(io.file) else {
            return self.end(io.token, Err(StorageError::Os(libc::EBADF)));
        };
        if let Err(error) = Self::admit(file, &io) {
            return self.end(io.token, Err(error));
        }
        if file.path == Path::Memory {
            let result = self.copy_now(&io);
            return self.end(io.token, result);
        }
        let Some(number) = self.slots.take(io) else {
            return self.end(io.token, Err(StorageError::Os(libc::ENOBUFS)));
        };
        file.in_flight += 1;
        if io.kind == IoKind::Write
            && let Some(hazards) = &mut file.hazards
            && !hazards.arrive(&mut self.slots, number)
        {
            return;
        }
        self.advance(number);
    }

    fn submit(&mut self) {
        self.continued = false;
        let mut all = self.engine.submit();
        while all && !self.unpushed.is_empty() {
            let before = self.unpushed.first();
            self.push_more();
            all = self.engine.submit();
            if self.unpushed.first() == before {
                // Full of transfers in flight: their answers make room.
                break;
            }
        }
        if !all {
            // The kernel could not take them now. Come back, even if no answer wakes us.
            self.bell.ring();
            self.continued = true;
        }
    }

    #[inline]
    fn done(&mut self) -> Option<Done> {
        loop {
            if let Some(done) = self.finished.pop_front() {
                return Some(done);
            }
            if let Some(landed) = self.engine.reap() {
                self.land(landed);
            } else if let Some(landed) = self.helpers.take() {
                self.land(landed);
            } else if let Some(landed) = self.stillborn.pop_front() {
                self.land(landed);
            } else {
                if self.continued || !self.unpushed.is_empty() {
                    self.submit();
                }
                return None;
            }
        }
    }
}
