//! [`Storage`] on Linux: requests cut into legs, legs given to an engine, answers put together again.
//!
//! `docs/design/storage.md` tells the life of a request.

use std::collections::VecDeque;
use std::os::fd::{AsFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::calls::{self, Job};
use super::changes::Order;
use super::engine::{self, AnyEngine, Engine, EngineChoice, Landed};
use super::files::{File, Files};
use super::legs::{self, BOUNCE_BYTES};
use super::maps::{Answer, Mapped, Maps, Wish};
use super::medium::{self, Path};
use super::merge::Merges;
use super::opening::{self, Errand, OpenAnswer};
use super::remote::{Remotes, Servers};
use super::slots::{Fifo, Slots};
use super::workers::{Bell, Workers};
use super::{Access, Done, FileId, Io, IoKind, Layer, OpenError, Opened, Storage, StorageError};
use crate::buffers::{Pool, SPAN_BYTES_MAX, Span};
use crate::images::Roots;
use crate::keep::Left;
use crate::limits::NBD_PATIENCE;
use crate::nbd::client::Allowed;
use crate::params::Image;

/// Opens that wait for a thread. More are refused at once.
const OPENS_WAITING_MAX: usize = 256;

/// Threads for transfers that the engine has no asynchronous form for.
const HELPERS_MAX: usize = 4;

/// Threads for discards: as many disks can have one under way.
const DISCARDERS_MAX: usize = 4;

/// Threads for ranges of zeroes and lengths of files: as many files can have one under way.
const CHANGERS_MAX: usize = 4;

/// Bounce buffers in bytes: 16 requests go through them at a time, the others wait.
const BOUNCE_POOL_BYTES: usize = 16 * BOUNCE_BYTES as usize;

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
    /// Alignment to keep in direct transfers, for media that want more than the kernel says.
    pub alignment: Option<Alignment>,
    /// The NBD servers that images may lie on.
    pub servers: Vec<Allowed>,
    /// How long requests wait for a server that does not answer before they fail; for ever if there is none.
    pub server_patience: Option<Duration>,
}

/// What direct transfers must be multiples of, in bytes: powers of two, 512 to 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Offset and length in the file.
    pub block_bytes: u32,
    /// Address in memory.
    pub memory_bytes: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            engine: EngineChoice::Auto,
            roots: Vec::new(),
            pool_bytes: 64 << 20,
            direct: true,
            alignment: None,
            servers: Vec::new(),
            server_patience: Some(NBD_PATIENCE),
        }
    }
}

/// Storage on Linux files and block devices.
#[derive(Debug)]
pub struct LinuxStorage {
    pub(super) pool: Pool,
    pub(super) bounces: Pool,
    pub(super) engine: AnyEngine,
    engine_text: String,
    pub(super) files: Files,
    pub(super) slots: Slots,
    /// Requests whose next transfer the engine had no room for.
    pub(super) unpushed: Fifo,
    /// Requests that wait for a bounce buffer.
    pub(super) unbounced: Fifo,
    /// Transfers that may yet become one with the next.
    pub(super) merges: Merges,
    /// Transfers that failed before they started.
    pub(super) stillborn: VecDeque<Landed>,
    finished: VecDeque<Done>,
    pub(super) refused_opens: VecDeque<(u64, Result<Opened, OpenError>)>,
    /// Layers of opened images that were not asked for yet, by their leaf's file.
    pub(super) layers: Vec<(FileId, Vec<Layer>)>,
    pub(super) left: Left,
    pub(super) openers: Workers<Errand, OpenAnswer>,
    pub(super) helpers: Workers<Job, Landed>,
    pub(super) discarders: Workers<Order, Landed>,
    pub(super) changers: Workers<Order, Landed>,
    /// Zeroes to write: nobody ever writes to them, so they take no memory.
    pub(super) zeroes: Span,
    _zeroes: Pool,
    pub(super) bell: Arc<Bell>,
    /// Whether a transfer was pushed by us and not on behalf of a caller who is about to submit.
    pub(super) continued: bool,
    pub(super) maps: Maps,
    /// Images on servers, if the operator allows any.
    pub(super) remotes: Option<Remotes>,
    /// Whether anything was asked since [`LinuxStorage::was_busy`] was.
    busy: bool,
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
        let servers = Arc::new(Servers::new(&options.servers)?);
        let remotes = match options.servers.is_empty() {
            true => None,
            false => Some(Remotes::new(options.server_patience, &bell)?),
        };
        let openers = opening::start(&bell, roots, servers, (options.direct, options.alignment));
        let helpers = Workers::new("vbdd-io", HELPERS_MAX, Arc::clone(&bell), |Job(transfer)| {
            Some(Landed { tag: transfer.tag, result: calls::now(&transfer) })
        });
        let discarders =
            Workers::new("vbdd-discard", DISCARDERS_MAX, Arc::clone(&bell), |order: Order| Some(order.now()));
        let changers =
            Workers::new("vbdd-space", CHANGERS_MAX, Arc::clone(&bell), |order: Order| Some(order.now()));
        let no_zeroes = |error| format!("no memory for zeroes: {error}");
        let mut zero_pool = Pool::new(SPAN_BYTES_MAX as usize).map_err(no_zeroes)?;
        let zeroes = zero_pool.alloc(SPAN_BYTES_MAX).unwrap_or(Span::EMPTY);
        Ok(LinuxStorage {
            pool,
            bounces,
            engine,
            engine_text,
            files: Files::default(),
            slots: Slots::new(),
            unpushed: Fifo::EMPTY,
            unbounced: Fifo::EMPTY,
            merges: Merges::new(),
            stillborn: VecDeque::new(),
            finished: VecDeque::new(),
            refused_opens: VecDeque::new(),
            layers: Vec::new(),
            left: Left::default(),
            openers,
            helpers,
            discarders,
            changers,
            zeroes,
            _zeroes: zero_pool,
            bell,
            continued: false,
            maps: Maps::default(),
            remotes,
            busy: false,
        })
    }

    /// Which engine was taken and why: a sentence for the log.
    #[must_use]
    pub fn engine_text(&self) -> &str {
        &self.engine_text
    }

    /// What the poller must watch for reading, level-triggered: at most three descriptors, the same ones for life.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> {
        let remotes = self.remotes.as_ref().map(Remotes::fd);
        [self.engine.wake_fd(), Some(self.bell.fd()), remotes].into_iter().flatten()
    }

    /// To be called when any of [`LinuxStorage::fds`] is readable, and then all of `done` and `opened` to be taken. It costs
    /// no system call with io_uring, unless a thread has answered.
    pub fn ready(&mut self) {
        self.engine.acknowledge();
        self.bell.answer();
        if let Some(remotes) = &mut self.remotes {
            remotes.ready();
        }
    }

    /// Transfers that went along with another as one, since the storage was made.
    #[must_use]
    pub fn merged(&self) -> u64 {
        self.merges.merged
    }

    /// Whether there was any request since the last call of this.
    pub fn was_busy(&mut self) -> bool {
        std::mem::take(&mut self.busy) || self.slots.used() > 0
    }

    /// Memory in page tables for mapped files at most, in bytes.
    #[must_use]
    pub fn page_tables_bytes(&self) -> usize {
        self.maps.in_use() * 4096
    }

    /// Requests queued and not yet finished.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.slots.used()
    }

    /// Gives a file that nobody uses any more to the threads, since `close` may wait for a file server.
    pub(super) fn put_away(&mut self, file: FileId) {
        let Some(mut file) = self.files.remove(file) else { return };
        self.maps.unmap(&mut file.mapped);
        if let (Some(number), Some(remotes)) = (file.remote, &mut self.remotes) {
            remotes.remove(number);
        }
        if let Some(index) = file.attached {
            self.engine.detach(index);
        }
        // Without a thread it is closed here, by dropping what comes back.
        drop(self.openers.give(Errand::Close(Box::new(file))));
    }

    pub(super) fn end(&mut self, token: u64, result: Result<(), StorageError>) {
        self.finished.push_back(Done { token, result });
    }

    /// What can be said of a request before it takes a place.
    fn admit(file: &File, io: &Io) -> Result<(), StorageError> {
        if file.access == Access::ReadOnly && !matches!(io.kind, IoKind::Read | IoKind::Flush) {
            return Err(StorageError::Os(libc::EROFS));
        }
        if file.closing {
            return Err(StorageError::Os(libc::EBADF));
        }
        legs::check(&file.shape, io.kind, io.offset_bytes, io.length_bytes())
    }

    /// A request that moves bytes, or a flush, of a file that does not live in memory.
    #[inline]
    pub(super) fn queue_transfer(&mut self, io: Io) {
        let Some(file) = self.files.at(io.file) else {
            return self.end(io.token, Err(StorageError::Os(libc::EBADF)));
        };
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
}

impl Storage for LinuxStorage {
    fn open_image(&mut self, token: u64, image: &Image, access: Access) {
        if self.openers.waiting() >= OPENS_WAITING_MAX {
            let reason = "too many files wait to be opened; does a file server not answer?";
            return self.refuse_open(token, image.path.clone(), reason);
        }
        if self
            .openers
            .give(Errand::Open { token, image: image.clone(), access, left: self.left.clone() })
            .is_err()
        {
            let reason = "no thread could be started to open it; is there memory left?";
            self.refuse_open(token, image.path.clone(), reason);
        }
    }

    fn set_left(&mut self, left: Left) {
        self.left = left;
    }

    fn layers(&mut self, file: FileId) -> Option<Vec<Layer>> {
        let place = self.layers.iter().position(|(leaf, _)| *leaf == file)?;
        Some(self.layers.swap_remove(place).1)
    }

    fn opened(&mut self) -> Option<(u64, Result<Opened, OpenError>)> {
        if let Some(refused) = self.refused_opens.pop_front() {
            return Some(refused);
        }
        let (token, result, image) = self.openers.take()?;
        Some((token, result.and_then(|chain| self.install_all(image, chain))))
    }

    fn measure(&mut self, file: FileId) -> Option<u64> {
        let file = self.files.at(file).filter(|file| !file.closing)?;
        if file.path == Path::Remote {
            return Some(file.shape.size);
        }
        let size = medium::size_now(&file.fd)?;
        if size != file.shape.size {
            file.resize(size);
        }
        Some(file.shape.size)
    }

    fn close(&mut self, file: FileId) {
        // Of an image that nobody went on to use, the parents go along.
        for layer in self.layers(file).into_iter().flatten().skip(1) {
            self.close(layer.file);
        }
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
    fn direct(&mut self, id: FileId, kind: IoKind, offset: u64, length: u32) -> Option<Span> {
        self.busy = true;
        let file = self.files.at(id)?;
        let refused = file.closing || (kind == IoKind::Write && file.access == Access::ReadOnly);
        if file.path != Path::Memory || refused || length == 0 {
            return None;
        }
        let writable = file.access != Access::ReadOnly;
        let (fd, size) = (file.fd.as_fd(), file.shape.size);
        let (place, writes) = (Files::place(id), kind == IoKind::Write);
        let wish = Wish { place, fd, size, writable, writes, offset, length };
        match self.maps.find(&mut file.mapped, &wish) {
            Answer::Here(span) => Some(span),
            Answer::No => None,
            Answer::After((place, number)) => {
                let other = self.files.in_place(place)?;
                self.maps.give_up(&mut other.mapped, other.fd.as_fd(), number);
                None
            }
        }
    }

    /// Only files in memory: their transfers are over when `queue` returns, so that no device reaches into a page of a guest
    /// that is gone (XSA-229 is what such transfers led to).
    fn takes_pages(&mut self, file: FileId) -> bool {
        self.files.at(file).is_some_and(|file| file.path == Path::Memory)
    }

    fn not_direct(&mut self, file: FileId) {
        let Some(entry) = self.files.at(file) else { return };
        self.maps.unmap(&mut entry.mapped);
        entry.mapped = Mapped::Never;
        if !std::mem::replace(&mut entry.warned, true) {
            log::warn!("image {:?} cannot be mapped any more: was the file cut short?", entry.identity);
        }
    }

    #[inline]
    fn queue(&mut self, io: Io) {
        self.busy = true;
        let Some(file) = self.files.at(io.file) else {
            return self.end(io.token, Err(StorageError::Os(libc::EBADF)));
        };
        if let Err(error) = Self::admit(file, &io) {
            return self.end(io.token, Err(error));
        }
        match io.kind {
            IoKind::Discard { length_bytes } => self.queue_discard(&io, length_bytes),
            IoKind::Zero { length_bytes } => self.queue_zero(&io, length_bytes),
            IoKind::SetLength => self.queue_length(&io),
            IoKind::Read | IoKind::Write | IoKind::Flush if file.path == Path::Memory => {
                let result = self.copy_now(&io);
                self.end(io.token, result);
            }
            IoKind::Read | IoKind::Write | IoKind::Flush => self.queue_transfer(io),
        }
    }

    fn trim(&mut self) {
        self.pool.trim();
        self.bounces.trim();
        if let Some(remotes) = &mut self.remotes {
            remotes.trim();
        }
        for file in self.files.all() {
            self.maps.unmap(&mut file.mapped);
        }
        self.maps.forget_all();
    }

    fn submit(&mut self) {
        self.maps.next_turn();
        self.continued = false;
        self.end_run();
        if let Some(remotes) = &mut self.remotes {
            remotes.submit();
        }
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
            } else if let Some(landed) = self.remotes.as_mut().and_then(Remotes::landed) {
                self.land(landed);
            } else if let Some(landed) = self.discarders.take().or_else(|| self.changers.take()) {
                self.land(landed);
            } else {
                if self.continued || !self.unpushed.is_empty() || !self.merges.is_empty() {
                    self.submit();
                }
                return None;
            }
        }
    }
}
