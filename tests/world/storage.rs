//! Storage in memory: latency, reordering, errors, and a volatile cache that power loss empties as it likes.
//!
//! A write becomes visible when it completes and durable when a flush ends that was queued after its `Done` was taken.
//! Until then every version of a sector that was ever in the cache may be the one that survives. The same goes for an image's
//! length: until a flush any that it has had since the last one may be the one that survives.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use vbdd::buffers::{Pool, Span};
use vbdd::keep::Left;
use vbdd::params::{Format, Image};
use vbdd::storage::{
    Access, DiscardUnit, Done, FileId, Identity, Io, IoKind, Layer, OpenError, Opened, Storage, StorageError,
};

use super::chains;
use super::device::Device;
use super::model::sector_bytes;
use super::{Plant, Shared};

pub const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

/// How much longer than at first an image can get before its medium is full, in sectors: 32 MiB.
pub const GROWTH: usize = 64 << 10;

/// The units in which every image lets content go: odd on purpose.
pub const UNIT: DiscardUnit = DiscardUnit { granularity_bytes: 4096, alignment_bytes: 1536 };

#[derive(Clone, Debug)]
struct Version {
    write: u64,
    bytes: Sector,
}

/// One image.
#[derive(Debug)]
pub struct File {
    path: String,
    read_only: bool,
    visible: Vec<Sector>,
    durable: Vec<Sector>,
    /// Versions since the durable one, oldest first.
    cached: BTreeMap<usize, Vec<Version>>,
    /// Versions that a failed flush dropped from the cache: visible, and not to be made durable by a later flush.
    forgotten: BTreeMap<usize, Vec<Sector>>,
    /// Writes with a `Done` that was taken, and that no flush has covered yet.
    taken: BTreeSet<u64>,
    taken_last: u64,
    /// Its length after a power loss at best, in sectors, and what it has been since, oldest first, by which change.
    durable_sectors: usize,
    lengths: Vec<(u64, usize)>,
    /// How long it can get, in sectors.
    room: usize,
}

#[derive(Debug)]
struct Running {
    io: Io,
    image: usize,
    number: u64,
    due_us: u64,
    /// Bytes of a write when it was submitted: they must not change until it is done.
    data: Vec<u8>,
    /// What a flush covers: writes with a `Done` taken when it was queued.
    covers: BTreeSet<u64>,
}

impl Running {
    /// What of the image a discard lets go (whole units only), or is zeroed, in bytes.
    fn emptied(&self) -> Option<(u64, u64)> {
        let from = self.io.offset_bytes;
        match self.io.kind {
            IoKind::Discard { length_bytes } => Some(UNIT.within(from, length_bytes)),
            IoKind::Zero { length_bytes } => Some((from, from + length_bytes)),
            _ => None,
        }
    }

    fn first_sector(&self) -> usize {
        self.emptied().map_or(self.io.offset_bytes, |(from, _)| from) as usize / SECTOR
    }

    /// Sectors that a write, a discard or a range of zeroes changes.
    fn sectors(&self) -> usize {
        self.emptied().map_or(self.data.len(), |(from, to)| (to - from) as usize) / SECTOR
    }
}

/// An error that was injected: which image, what, where; or left over from a process that died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injected {
    pub image: usize,
    pub kind: IoKind,
    pub offset_bytes: u64,
    pub certain: bool,
}

/// All media of the host, and the transfers that its kernel runs.
#[derive(Debug, Default)]
pub struct Media {
    pub images: Vec<File>,
    queued: Vec<Running>,
    running: Vec<Running>,
    numbers: u64,
    pub injected: Vec<Injected>,
    pub flush_failed: Vec<usize>,
    /// Images turn out to know no discard.
    pub no_discard: bool,
    /// Transfers started since the world began.
    pub transfers: u64,
    /// Sectors of images that a grant copy may just have written: image, first, count.
    direct: Vec<(usize, usize, usize)>,
    /// Images of which no transfer ever ends.
    pub hung: BTreeSet<usize>,
    /// The next transfer of this kind never ends.
    pub hang_next: Option<IoKind>,
    /// Devices of limited speed, and on which of them an image lies. Other transfers take what `Faults` says.
    pub devices: Vec<Device>,
    pub device_of: BTreeMap<usize, usize>,
    /// Images that have a format.
    pub formats: BTreeMap<usize, Format>,
}

impl Media {
    /// An image whose sectors hold the model's first content.
    pub fn create(&mut self, path: &str, sectors: usize, read_only: bool) -> usize {
        // Room for all that it may become: grant copies may go straight to a sector, which must not move then.
        let room = sectors + GROWTH;
        let mut content: Vec<Sector> = Vec::with_capacity(room);
        content.extend((0..sectors).map(|sector| sector_bytes(0, sector as u64)));
        self.images.push(File {
            path: path.to_owned(),
            read_only,
            durable: content.clone(),
            visible: content,
            cached: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            taken: BTreeSet::new(),
            taken_last: 0,
            durable_sectors: sectors,
            lengths: Vec::new(),
            room,
        });
        self.images.len() - 1
    }

    /// Somebody may write an image from now on.
    pub fn make_writable(&mut self, path: &str) {
        self.images.iter_mut().filter(|image| image.path == path).for_each(|image| image.read_only = false);
    }

    /// How an image is to be opened.
    pub fn image(&self, image: usize) -> Image {
        let format = self.formats.get(&image).copied().unwrap_or(Format::Raw);
        Image { format, path: self.images[image].path.clone() }
    }

    /// The image that goes by a path, and whether it is read-only.
    pub fn find(&self, path: &str) -> Option<(usize, bool)> {
        let image = self.images.iter().position(|image| image.path == path)?;
        Some((image, self.images[image].read_only))
    }

    pub fn sectors(&self, image: usize) -> usize {
        self.images[image].visible.len()
    }

    /// What is visible of an image.
    pub fn bytes(&self, image: usize) -> &[u8] {
        self.images[image].visible.as_flattened()
    }

    /// Everything that was written to an image, and is visible, is durable.
    pub fn sync(&mut self, image: usize) {
        let image = &mut self.images[image];
        image.cached.clear();
        image.forgotten.clear();
        image.taken.clear();
        image.lengths.clear();
        image.durable.clone_from(&image.visible);
        image.durable_sectors = image.visible.len();
    }

    /// Somebody else changes an image: visible and durable at once.
    pub fn overwrite(&mut self, image: usize, offset: usize, bytes: &[u8]) {
        let image = &mut self.images[image];
        for all in [&mut image.visible, &mut image.durable] {
            all.as_flattened_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// True for an address in an image's own memory.
    pub fn holds(&self, address: *const u8) -> bool {
        self.images.iter().any(|image| image.visible.as_flattened().as_ptr_range().contains(&address))
    }

    /// Grant copies were made, some perhaps straight to images: what is visible there now is a version of its own, and such
    /// a write is finished for every flush from now on.
    pub fn copied(&mut self, is_local: &dyn Fn(*const u8) -> bool) {
        for (image, first, count) in self.direct.clone() {
            let image = &mut self.images[image];
            if !(first..first + count).any(|sector| is_local(image.visible[sector].as_ptr())) {
                continue;
            }
            self.numbers += 1;
            for sector in first..first + count {
                let version = Version { write: self.numbers, bytes: image.visible[sector] };
                image.cached.entry(sector).or_default().push(version);
            }
            image.taken.insert(self.numbers);
            image.taken_last = self.numbers;
        }
    }

    /// When the next transfer is done, if any ever is.
    pub fn next_due(&self) -> Option<u64> {
        let running = self.running.iter().map(|one| one.due_us).filter(|due| *due != u64::MAX);
        running.chain(self.devices.iter().filter_map(Device::next_due)).min()
    }

    /// What devices have done by now is done.
    fn advance_devices(&mut self, now_us: u64) {
        for device in &mut self.devices {
            device.advance(now_us);
            for number in device.take_done() {
                if let Some(one) = self.running.iter_mut().find(|one| one.number == number) {
                    one.due_us = now_us;
                }
            }
        }
    }

    pub fn in_flight(&self) -> usize {
        self.queued.len() + self.running.len()
    }

    /// Lets the transfers that never end go on.
    pub fn unhang(&mut self) {
        self.hung.clear();
        self.running.iter_mut().filter(|one| one.due_us == u64::MAX).for_each(|one| one.due_us = 0);
    }

    /// The process is gone. What the kernel had begun is done, in part, or never; it is over before a successor opens
    /// the image.
    pub fn process_died(&mut self, chance: &mut dyn FnMut() -> bool) {
        self.copied(&|_| true);
        self.direct.clear();
        self.queued.clear();
        for one in std::mem::take(&mut self.running) {
            for n in 0..one.sectors() {
                if chance() {
                    self.land(&one, n);
                }
            }
            if one.io.kind == IoKind::SetLength && chance() {
                self.set_length(one.image, one.number, one.first_sector());
            }
        }
        // Every write that landed is finished now: a later flush covers it.
        for image in &mut self.images {
            image.taken = image.cached.values().flatten().map(|version| version.write).collect();
            image.taken.extend(image.lengths.iter().map(|(change, _)| *change));
        }
        self.injected.iter_mut().for_each(|error| error.certain = false);
    }

    /// The host loses power: of each sector any version survives that was not older than the last that a flush made
    /// durable; `torn` mixes two of them.
    pub fn power_loss(&mut self, torn: bool, pick: &mut dyn FnMut(usize) -> usize) {
        self.copied(&|_| true);
        self.direct.clear();
        self.queued.clear();
        for one in std::mem::take(&mut self.running) {
            for n in 0..one.sectors() {
                if pick(2) == 0 {
                    self.land(&one, n);
                }
            }
            if one.io.kind == IoKind::SetLength && pick(2) == 0 {
                self.set_length(one.image, one.number, one.first_sector());
            }
        }
        for image in &mut self.images {
            let cached = std::mem::take(&mut image.cached);
            let forgotten = std::mem::take(&mut image.forgotten);
            let mut choices: BTreeMap<usize, Vec<Sector>> = BTreeMap::new();
            for (sector, versions) in forgotten {
                choices.entry(sector).or_default().extend(versions);
            }
            for (sector, versions) in cached {
                choices.entry(sector).or_default().extend(versions.iter().map(|version| version.bytes));
            }
            for (sector, mut versions) in choices {
                versions.push(image.durable[sector]);
                let mut survivor = versions[pick(versions.len())];
                if torn && pick(4) == 0 {
                    let other = versions[pick(versions.len())];
                    let cut = pick(SECTOR / 8) * 8;
                    survivor[cut..].copy_from_slice(&other[cut..]);
                }
                image.durable[sector] = survivor;
            }
            if !image.lengths.is_empty() {
                let mut lengths: Vec<usize> = image.lengths.drain(..).map(|(_, sectors)| sectors).collect();
                lengths.push(image.durable_sectors);
                image.durable_sectors = lengths[pick(lengths.len())];
            }
            image.durable.resize(image.durable_sectors, [0; SECTOR]);
            image.visible.clear();
            image.visible.extend_from_slice(&image.durable);
        }
    }

    /// The image ends elsewhere. False when its medium is full.
    fn set_length(&mut self, image: usize, change: u64, sectors: usize) -> bool {
        let image = &mut self.images[image];
        if sectors > image.room {
            return false;
        }
        // What is cut off reads as zero should the image ever get longer again; until a flush the cut may be undone.
        for sector in sectors..image.visible.len() {
            let version = Version { write: change, bytes: [0; SECTOR] };
            image.cached.entry(sector).or_default().push(version);
        }
        image.visible.resize(sectors, [0; SECTOR]);
        image.durable.resize(image.durable.len().max(sectors), [0; SECTOR]);
        image.lengths.push((change, sectors));
        true
    }

    /// Sector `n` of a write, or of what a discard lets go, reaches the cache.
    fn land(&mut self, one: &Running, n: usize) {
        let image = &mut self.images[one.image];
        let sector = one.first_sector() + n;
        let mut bytes = [0; SECTOR];
        if one.io.kind == IoKind::Write {
            bytes.copy_from_slice(&one.data[n * SECTOR..(n + 1) * SECTOR]);
        }
        image.visible[sector] = bytes;
        image.cached.entry(sector).or_default().push(Version { write: one.number, bytes });
    }

    /// A flush ended well: of each sector the newest version that it covers is durable.
    fn make_durable(&mut self, flush: &Running) {
        let image = &mut self.images[flush.image];
        for (sector, versions) in &mut image.cached {
            let newest = versions.iter().rposition(|version| flush.covers.contains(&version.write));
            if let Some(newest) = newest {
                image.durable[*sector] = versions[newest].bytes;
                image.forgotten.remove(sector);
                versions.drain(..=newest);
            }
        }
        image.cached.retain(|_, versions| !versions.is_empty());
        if let Some(newest) = image.lengths.iter().rposition(|(change, _)| flush.covers.contains(change)) {
            image.durable_sectors = image.lengths[newest].1;
            image.lengths.drain(..=newest);
        }
        image.taken.retain(|write| !flush.covers.contains(write));
    }

    /// A flush failed: what it covered may be dropped from the cache for good.
    fn forget(&mut self, flush: &Running, drop: &mut dyn FnMut() -> bool) {
        let image = &mut self.images[flush.image];
        for (sector, versions) in &mut image.cached {
            if drop() {
                let forgotten = image.forgotten.entry(*sector).or_default();
                forgotten.extend(versions.drain(..).map(|version| version.bytes));
            }
        }
        image.cached.retain(|_, versions| !versions.is_empty());
    }

    /// Somebody makes an image longer or shorter.
    pub fn resize(&mut self, image: usize, sectors: usize) {
        let image = &mut self.images[image];
        image.cached.retain(|sector, _| *sector < sectors);
        image.forgotten.retain(|sector, _| *sector < sectors);
        image.visible.resize(sectors, [0; SECTOR]);
        image.durable.resize(sectors, [0; SECTOR]);
        image.durable_sectors = sectors;
        image.lengths.clear();
    }

    /// The durable content of a sector; of the cache nothing is asked.
    pub fn durable(&self, image: usize, sector: usize) -> &Sector {
        &self.images[image].durable[sector]
    }

    pub fn visible(&self, image: usize, sector: usize) -> &Sector {
        &self.images[image].visible[sector]
    }
}

/// The backend's handle.
pub struct SimStorage {
    shared: Rc<Shared>,
    pool: Pool,
    files: Vec<Option<usize>>,
    opened: VecDeque<(u64, Result<Opened, OpenError>)>,
    layers: Vec<(FileId, Vec<Layer>)>,
    left: Left,
}

impl SimStorage {
    pub fn new(shared: Rc<Shared>, pool_bytes: usize) -> SimStorage {
        SimStorage {
            shared,
            pool: Pool::new(pool_bytes).unwrap(),
            files: Vec::new(),
            opened: VecDeque::new(),
            layers: Vec::new(),
            left: Left::default(),
        }
    }

    pub fn pool_used_bytes(&self) -> u64 {
        self.pool.used_bytes()
    }

    pub fn open_files(&self) -> usize {
        self.files.iter().flatten().count()
    }

    /// What is in the memory of a transfer: the pool's, or a guest's page.
    fn bytes(&self, span: Span) -> Vec<u8> {
        if self.pool.contains(span) {
            return self.pool.bytes(span).to_vec();
        }
        // SAFETY: a mapped page of a guest, which stays mapped until the transfer is done; if not, the test dies of it.
        unsafe { std::slice::from_raw_parts(span.address(), span.length_bytes() as usize) }.to_vec()
    }

    /// Writes to the memory of a transfer.
    fn fill(&mut self, span: Span, bytes: &[u8]) {
        if !self.pool.copy_in(span, bytes) {
            assert_eq!(span.length_bytes() as usize, bytes.len());
            // SAFETY: as in `bytes`.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), span.address(), bytes.len()) };
        }
    }

    /// Opens an image by its number, without the detour over paths.
    pub fn open_number(&mut self, image: usize) -> FileId {
        self.files.push(Some(image));
        FileId(self.files.len() as u32 - 1)
    }

    fn open_raw(&mut self, path: &str, access: Access) -> Result<Opened, OpenError> {
        let found = self.shared.media.borrow().find(path);
        let refuse = |reason: &str| OpenError { path: path.to_owned(), reason: reason.to_owned() };
        let (image, read_only) = found.ok_or_else(|| refuse("does not exist"))?;
        if read_only && access == Access::ReadWrite {
            return Err(refuse("is read-only"));
        }
        let size_bytes = (self.shared.media.borrow().sectors(image) * SECTOR) as u64;
        Ok(Opened {
            file: self.open_number(image),
            identity: Identity::File { device: 1, inode: image as u64 },
            size_bytes,
            physical_block_bytes: 512,
            direct: true,
            discard: (!read_only).then_some(UNIT),
            locked: true,
        })
    }

    fn open_layers(&mut self, image: &Image, access: Access) -> Result<Opened, OpenError> {
        let shared = self.shared.clone();
        let layers =
            chains::open(&shared, image, access, self.left.clone(), |number| self.open_number(number))?;
        let leaf = &layers[0];
        let granularity_bytes = leaf.format.unit_bytes() as u32;
        let opened = Opened {
            file: leaf.file,
            identity: leaf.identity,
            size_bytes: leaf.format.geometry().sectors * SECTOR as u64,
            physical_block_bytes: 512,
            direct: true,
            discard: Some(DiscardUnit { granularity_bytes, alignment_bytes: 0 }),
            locked: true,
        };
        self.layers.push((opened.file, layers));
        Ok(opened)
    }

    /// Ends a transfer: applies it and says how it went.
    fn finish(&mut self, one: &Running) -> Result<(), StorageError> {
        let shared = self.shared.clone();
        let (faults, plant) = (shared.faults.get(), shared.plant.get());
        let sectors = one.io.span.length_bytes() as usize / SECTOR;
        let first = one.io.offset_bytes as usize / SECTOR;
        let mut media = shared.media.borrow_mut();
        let rate = match one.io.kind {
            IoKind::Read => faults.read_error,
            IoKind::Write | IoKind::Discard { .. } | IoKind::Zero { .. } | IoKind::SetLength => {
                faults.write_error
            }
            IoKind::Flush => faults.flush_error,
        };
        let error = shared.strikes(rate);
        let hidden = match one.io.kind {
            IoKind::Write => plant == Plant::WriteErrorHidden,
            IoKind::Flush => plant == Plant::FlushErrorHidden,
            _ => false,
        };
        if matches!(one.io.kind, IoKind::Discard { .. }) && media.no_discard {
            return Err(StorageError::Os(libc::EOPNOTSUPP));
        }
        if error {
            let (image, kind, offset_bytes) = (one.image, one.io.kind, one.io.offset_bytes);
            media.injected.push(Injected { image, kind, offset_bytes, certain: true });
        }
        match one.io.kind {
            IoKind::Read if !error => {
                for n in 0..sectors {
                    let bytes =
                        media.images[one.image].visible.get(first + n).copied().unwrap_or([0; SECTOR]);
                    let part = one.io.span.part((n * SECTOR) as u32, SECTOR as u32).unwrap();
                    self.fill(part, &bytes);
                }
            }
            IoKind::Read => {}
            IoKind::Write => {
                if self.bytes(one.io.span) != one.data {
                    shared.fail("the memory of a write changed while it was in flight");
                }
                for n in 0..sectors {
                    if !error || shared.chance(1, 2) {
                        media.land(one, n);
                    }
                }
            }
            IoKind::Discard { .. } => {
                for n in 0..one.sectors() {
                    if shared.chance(1, 2) {
                        media.land(one, n);
                    }
                }
            }
            IoKind::Zero { .. } => {
                for n in 0..one.sectors() {
                    if !error || shared.chance(1, 2) {
                        media.land(one, n);
                    }
                }
            }
            IoKind::SetLength if error => {}
            IoKind::SetLength => {
                if !media.set_length(one.image, one.number, first) {
                    return Err(StorageError::Os(libc::ENOSPC));
                }
            }
            IoKind::Flush if error => {
                media.flush_failed.push(one.image);
                media.forget(one, &mut || shared.chance(1, 2));
            }
            IoKind::Flush => {
                if plant != Plant::FlushNotDone {
                    media.make_durable(one);
                }
            }
        }
        let errno = if shared.chance(1, 2) { libc::EIO } else { libc::ENOSPC };
        if error && !hidden { Err(StorageError::Os(errno)) } else { Ok(()) }
    }
}

impl Storage for SimStorage {
    fn open_image(&mut self, token: u64, image: &Image, access: Access) {
        self.shared.point("open", token, 0);
        let image = Image { path: image.path.replace("//", "/"), ..image.clone() };
        let answer = if image.format == Format::Raw {
            self.open_raw(&image.path, access)
        } else {
            self.open_layers(&image, access)
        };
        self.opened.push_back((token, answer));
    }

    fn set_left(&mut self, left: Left) {
        if self.shared.plant.get() != Plant::NothingLeft {
            self.left = left;
        }
    }

    fn layers(&mut self, file: FileId) -> Option<Vec<Layer>> {
        let place = self.layers.iter().position(|(leaf, _)| *leaf == file)?;
        Some(self.layers.swap_remove(place).1)
    }

    fn opened(&mut self) -> Option<(u64, Result<Opened, OpenError>)> {
        self.opened.pop_front()
    }

    fn measure(&mut self, file: FileId) -> Option<u64> {
        let image = self.files.get(file.0 as usize).copied().flatten()?;
        Some((self.shared.media.borrow().images[image].visible.len() * SECTOR) as u64)
    }

    fn close(&mut self, file: FileId) {
        for layer in self.layers(file).into_iter().flatten().skip(1) {
            self.close(layer.file);
        }
        self.shared.point("close", file.0.into(), 0);
        let Some(image) = self.files.get_mut(file.0 as usize).and_then(Option::take) else {
            return self.shared.fail(format!("{file:?} is closed and not open"));
        };
        let media = self.shared.media.borrow();
        // Of an image that several share it cannot be told whose transfers they are.
        let shared = self.files.contains(&Some(image));
        if !shared && media.queued.iter().chain(&media.running).any(|one| one.image == image) {
            self.shared.fail("an image is closed with transfers in flight");
        }
    }

    fn buffers(&mut self) -> &mut Pool {
        &mut self.pool
    }

    fn direct(&mut self, file: FileId, kind: IoKind, offset_bytes: u64, length_bytes: u32) -> Option<Span> {
        if !self.shared.strikes(self.shared.direct.get().0) {
            return None;
        }
        let image = self.files.get(file.0 as usize).copied().flatten()?;
        let mut media = self.shared.media.borrow_mut();
        let (first, count) = (offset_bytes as usize / SECTOR, length_bytes as usize / SECTOR);
        let opened = &mut media.images[image];
        let bytes = opened.visible.get_mut(first..first + count)?.as_flattened_mut();
        // SAFETY: an image's sectors stay where they are for the life of the world; who copies to or from them does so
        // alone, on this thread.
        let span = unsafe { Span::foreign(bytes.as_mut_ptr(), length_bytes) };
        if kind == IoKind::Write {
            if opened.read_only {
                return None;
            }
            media.direct.push((image, first, count));
        }
        self.shared.note("direct", offset_bytes, length_bytes.into());
        Some(span)
    }

    fn takes_pages(&mut self, _: FileId) -> bool {
        self.shared.direct.get().0 > 0
    }

    fn not_direct(&mut self, file: FileId) {
        self.shared.note("not direct", file.0.into(), 0);
    }

    fn queue(&mut self, io: Io) {
        self.shared.point("queue", io.offset_bytes, io.span.length_bytes().into());
        let Some(image) = self.files.get(io.file.0 as usize).copied().flatten() else {
            return self.shared.fail("a transfer names a file that is not open");
        };
        let mut media = self.shared.media.borrow_mut();
        let aligned = io.offset_bytes.is_multiple_of(512) && io.span.length_bytes().is_multiple_of(512);
        let end = io.offset_bytes.saturating_add(io.length_bytes()) as usize;
        // Formats may read past the end of their file, which reads as zero there.
        let may_end_outside =
            io.kind == IoKind::SetLength || io.kind == IoKind::Read && !media.formats.is_empty();
        let inside = end <= media.images[image].visible.len() * SECTOR || may_end_outside;
        if !aligned || !inside {
            self.shared.fail(format!("a transfer outside the image: {io:?}"));
        }
        if media.images[image].read_only && !matches!(io.kind, IoKind::Read | IoKind::Flush) {
            self.shared.fail("a write to an image that was opened to be read");
        }
        media.numbers += 1;
        let number = media.numbers;
        let data = if io.kind == IoKind::Write { self.bytes(io.span) } else { Vec::new() };
        let mut covers =
            if io.kind == IoKind::Flush { media.images[image].taken.clone() } else { BTreeSet::new() };
        if self.shared.plant.get() == Plant::FlushSkipsLast {
            covers.remove(&media.images[image].taken_last);
        }
        let mut io = io;
        if self.shared.plant.get() == Plant::WriteMisplaced && io.kind == IoKind::Write && end < 64 * SECTOR {
            io.offset_bytes += 512;
        }
        media.queued.push(Running { io, image, number, due_us: 0, data, covers });
    }

    fn submit(&mut self) {
        self.shared.media.borrow_mut().direct.clear();
        self.shared.point("submit", 0, 0);
        let (faults, now) = (self.shared.faults.get(), self.shared.clock.now_us());
        let shared = self.shared.clone();
        let mut media = shared.media.borrow_mut();
        for mut one in std::mem::take(&mut media.queued) {
            let mut latency = self.shared.below(faults.latency_us_max + 1);
            if self.shared.strikes(faults.slow) {
                latency *= 100;
            }
            one.due_us = now + latency;
            if let Some(device) = media.device_of.get(&one.image).copied() {
                one.due_us = u64::MAX;
                let bytes = u64::from(one.io.span.length_bytes());
                media.devices[device].submit(now, one.number, bytes);
            }
            if media.hung.contains(&one.image) {
                one.due_us = u64::MAX;
            }
            if media.hang_next == Some(one.io.kind) {
                media.hang_next = None;
                one.due_us = u64::MAX;
            }
            if one.io.kind == IoKind::Read {
                // The device may write there from now on.
                self.fill(one.io.span, &vec![0xA5; one.io.span.length_bytes() as usize]);
            }
            media.transfers += 1;
            media.running.push(one);
        }
    }

    fn done(&mut self) -> Option<Done> {
        self.shared.point("done", 0, 0);
        let now = self.shared.clock.now_us();
        let one = {
            let mut media = self.shared.media.borrow_mut();
            media.advance_devices(now);
            let ready: Vec<usize> =
                (0..media.running.len()).filter(|n| media.running[*n].due_us <= now).collect();
            if ready.is_empty() {
                return None;
            }
            media.running.swap_remove(ready[self.shared.index(ready.len())])
        };
        let result = self.finish(&one);
        if !matches!(one.io.kind, IoKind::Read | IoKind::Flush) {
            let mut media = self.shared.media.borrow_mut();
            let image = &mut media.images[one.image];
            image.taken.insert(one.number);
            image.taken_last = one.number;
        }
        self.shared.note("ended", one.io.offset_bytes, u64::from(result.is_ok()));
        Some(Done { token: one.io.token, result })
    }
}
