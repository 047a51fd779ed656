//! The table of open files.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use super::FileId;
use super::calls::unlock_like_qemu;
use super::hazards::Hazards;
use super::legs::{SECTOR_BYTES, Shape};
use super::maps::Mapped;
use super::medium::{Path, Prepared};
use super::slots::Fifo;
use super::zeroes::Way;
use super::{Access, DiscardUnit, Identity};

/// Bits of a [`FileId`] that number the place; the others count how often it was used, so that a handle of a closed file
/// does not mean the next one.
const PLACE_BITS: u32 = 12;

/// Files open at once: 4096, chains of images included.
pub(super) const FILES_MAX: u32 = 1 << PLACE_BITS;

/// An open file.
#[derive(Debug)]
pub(super) struct File {
    pub fd: OwnedFd,
    pub tail: Option<OwnedFd>,
    pub path: Path,
    pub shape: Shape,
    pub access: Access,
    pub identity: Identity,
    pub physical_block_bytes: u32,
    /// The engine's number for it, where it has one.
    pub attached: Option<u32>,
    /// Requests not yet finished.
    pub in_flight: u32,
    /// To be closed when the last request has finished.
    pub closing: bool,
    /// Whether the log has been told of its oddities.
    pub warned: bool,
    /// The units in which content can be let go, if at all.
    pub discard: Option<DiscardUnit>,
    /// A discard is under way, and the others that wait for it.
    pub discarding: bool,
    pub discards: Fifo,
    /// The unit in which the file system keeps it, in bytes, and how ranges of it are zeroed.
    pub unit_bytes: u32,
    pub zeroing: Way,
    /// A change of its space (zeroes, its length) is under way, and the others that wait for it.
    pub changing: bool,
    pub changes: Fifo,
    /// Only where a block is larger than a sector.
    pub hazards: Option<Hazards>,
    /// Only where it lives in memory.
    pub mapped: Mapped,
    /// Only where it lives on a server: its number among those.
    pub remote: Option<u32>,
}

impl Drop for File {
    /// The lock is given up at once: the kernel may keep the open file for a second after it was closed, as io_uring lets
    /// go of registered files late. While a transfer is in flight the lock has to stay, whatever becomes of us.
    fn drop(&mut self) {
        let is_locked = self.access == Access::ReadWrite && matches!(self.identity, Identity::File { .. });
        if is_locked && self.in_flight == 0 {
            unlock_like_qemu(self.fd.as_fd());
            let _ = rustix::fs::flock(&self.fd, rustix::fs::FlockOperation::Unlock);
        }
    }
}

impl File {
    fn new(prepared: Prepared) -> File {
        let serialised = prepared.shape.block > SECTOR_BYTES;
        File {
            fd: prepared.fd,
            tail: prepared.tail,
            path: prepared.path,
            shape: prepared.shape,
            access: prepared.access,
            identity: prepared.identity,
            physical_block_bytes: prepared.physical_block_bytes,
            attached: None,
            in_flight: 0,
            closing: false,
            warned: false,
            discard: prepared.discard,
            discarding: false,
            discards: Fifo::EMPTY,
            unit_bytes: prepared.unit_bytes,
            zeroing: Way::first(prepared.path, prepared.identity),
            changing: false,
            changes: Fifo::EMPTY,
            hazards: serialised.then(|| Hazards::new(prepared.shape)),
            mapped: if prepared.path == Path::Memory { Mapped::No } else { Mapped::Never },
            remote: None,
        }
    }

    /// It ends elsewhere from now on.
    pub(super) fn resize(&mut self, size: u64) {
        let has_tail = self.tail.is_some();
        self.shape = self.shape.resized(size, has_tail);
        if let Some(hazards) = &mut self.hazards {
            hazards.resize(size, has_tail);
        }
    }

    /// The descriptor that a leg goes to.
    pub(super) fn descriptor(&self, tail: bool) -> RawFd {
        match &self.tail {
            Some(fd) if tail => fd.as_raw_fd(),
            _ => self.fd.as_raw_fd(),
        }
    }
}

#[derive(Debug)]
struct Entry {
    generation: u32,
    file: Option<File>,
}

/// All open files.
#[derive(Debug, Default)]
pub(super) struct Files {
    entries: Vec<Entry>,
    free: Vec<u32>,
}

impl Files {
    /// Puts a file into the table. `None` when it is full.
    pub(super) fn insert(&mut self, prepared: Prepared) -> Option<FileId> {
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                let place = u32::try_from(self.entries.len()).ok().filter(|place| *place < FILES_MAX)?;
                self.entries.push(Entry { generation: 0, file: None });
                place
            }
        };
        let entry = self.entries.get_mut(place as usize)?;
        entry.generation = (entry.generation + 1) % (1 << (32 - PLACE_BITS));
        entry.file = Some(File::new(prepared));
        Some(FileId(place | entry.generation << PLACE_BITS))
    }

    fn entry(&mut self, id: FileId) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(Self::place(id) as usize)?;
        (entry.generation == id.0 >> PLACE_BITS).then_some(entry)
    }

    /// The place of a file in the table.
    pub(super) fn place(id: FileId) -> u32 {
        id.0 & (FILES_MAX - 1)
    }

    #[inline]
    pub(super) fn at(&mut self, id: FileId) -> Option<&mut File> {
        self.entry(id)?.file.as_mut()
    }

    /// The file at a place of the table.
    pub(super) fn in_place(&mut self, place: u32) -> Option<&mut File> {
        self.entries.get_mut(place as usize)?.file.as_mut()
    }

    /// All open files.
    pub(super) fn all(&mut self) -> impl Iterator<Item = &mut File> {
        self.entries.iter_mut().filter_map(|entry| entry.file.as_mut())
    }

    /// Takes a file out of the table.
    pub(super) fn remove(&mut self, id: FileId) -> Option<File> {
        let file = self.entry(id)?.file.take()?;
        self.free.push(Self::place(id));
        Some(file)
    }
}
