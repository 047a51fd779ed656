//! The seam to storage: opening images and moving bytes.
//!
//! Everything is asynchronous: what is queued here comes back, once, as a [`Done`]. The implementation hides short
//! transfers, EINTR, alignment (read-modify-write where the medium has larger blocks than the request) and the ragged
//! end of a file whose size is no multiple of 512. It does not order anything: a flush covers the writes whose `Done`
//! was taken before the flush was queued, and whoever wants more must wait (see `disk`).

pub mod aio;
pub mod engine;
pub mod linux;
pub mod uring;

mod calls;
mod chained;
mod changes;
mod discards;
mod files;
mod hazards;
mod legs;
mod maps;
mod medium;
mod merge;
mod opening;
mod remote;
mod requests;
mod slots;
mod workers;
mod zeroes;

use crate::buffers::{Pool, Span};
use crate::keep::Left;
use crate::params::Image;

/// An open image file or block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

impl FileId {
    /// Names no file: what an empty drive has.
    pub const NONE: FileId = FileId(u32::MAX);
}

/// What may be done with an open image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads only.
    ReadOnly,
    /// Reads and writes; nobody else should.
    ReadWrite,
    /// Reads and writes, and the administrator vouches for others who do so too: no claim, no lock.
    ReadWriteShared,
}

/// Tells one file from another whatever path led to it: the sharing check compares these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Identity {
    /// A regular file: device and inode of the file system.
    File {
        /// `st_dev`.
        device: u64,
        /// `st_ino`.
        inode: u64,
    },
    /// A block device: its own number.
    Device {
        /// `st_rdev`.
        number: u64,
    },
    /// An export of a server: a number made of their names. One that goes by two names counts as two.
    Remote {
        /// That number.
        number: u64,
    },
}

impl Identity {
    /// The device that does the work, as far as can be told: requests to the same one share what it can do.
    #[must_use]
    pub fn device(&self) -> u64 {
        match *self {
            Identity::File { device, .. } => device,
            Identity::Device { number } | Identity::Remote { number } => number,
        }
    }
}

/// The units in which a medium lets content go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardUnit {
    /// Length of a unit in bytes: a multiple of 512.
    pub granularity_bytes: u32,
    /// Where the first whole unit starts, in bytes: less than the granularity.
    pub alignment_bytes: u32,
}

impl DiscardUnit {
    /// The whole units within `length` bytes from `offset`: first byte, and the byte after the last. Both the same when
    /// there are none.
    #[must_use]
    pub fn within(&self, offset: u64, length: u64) -> (u64, u64) {
        let unit = u64::from(self.granularity_bytes.max(1));
        let shift = u64::from(self.alignment_bytes) % unit;
        // In units' own terms everything lies `unit - shift` further on, so that nothing gets below zero.
        let up = unit - shift;
        let Some(end) = offset.checked_add(length).and_then(|end| end.checked_add(up)) else {
            return (offset, offset);
        };
        let Some(from) = (offset + up).checked_next_multiple_of(unit) else { return (offset, offset) };
        let to = end - end % unit;
        if to <= from { (offset, offset) } else { (from - up, to - up) }
    }
}

/// An image that was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its handle, until [`Storage::close`].
    pub file: FileId,
    /// Which file it really is.
    pub identity: Identity,
    /// Size in bytes at the time of opening: of a raw image the file's, else the disk's.
    pub size_bytes: u64,
    /// The medium's physical block in bytes (512 or 4096 as a rule): what `physical-sector-size` should say.
    pub physical_block_bytes: u32,
    /// Whether it bypasses the page cache.
    pub direct: bool,
    /// The units in which content can be let go; `None` where that cannot be done, or the image is not writable.
    pub discard: Option<DiscardUnit>,
    /// False for a writable image that another open file has locked: another program, or a process that is gone and whose
    /// last writes are not over.
    pub locked: bool,
}

/// One image of an open chain.
#[derive(Debug)]
pub struct Layer {
    /// Its file.
    pub file: FileId,
    /// Which file that really is.
    pub identity: Identity,
    /// How to read it.
    pub format: Box<dyn formats::Format>,
}

/// What is to be done with bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// Fill the span from the file. Bytes past the end of the file read as zero.
    Read,
    /// Write the span to the file. Never extends it: a regular file ends where it did when it was opened, or where
    /// [`IoKind::SetLength`] has put its end since, rounded up to 512.
    Write,
    /// Make durable what was written before: `fdatasync`.
    Flush,
    /// The content is needed no longer. Whole units of the medium that lie within are let go, and may read as anything
    /// then; the rest stays as it is.
    Discard {
        /// How much, in bytes.
        length_bytes: u64,
    },
    /// The range reads as zero afterwards, every sector of it, whatever the units of the medium are; never past the end of
    /// the file. To a crash it is like a write of zeroes: each sector is old or zero until a flush.
    Zero {
        /// How much, in bytes.
        length_bytes: u64,
    },
    /// The file ends at `offset_bytes` afterwards: what is new of it reads as zero, and what lay behind is gone. Durable
    /// with the next flush. A block device has the length that it has: `ENOSPC` for more of it, and nothing to do for less.
    /// Transfers in flight must not reach past the new end.
    SetLength,
}

/// One transfer. `token` comes back in the [`Done`].
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// The caller's own name for it.
    pub token: u64,
    /// Of which file.
    pub file: FileId,
    /// What to do.
    pub kind: IoKind,
    /// Where in the file; a multiple of 512.
    pub offset_bytes: u64,
    /// The memory, a multiple of 512 long; empty for what moves nothing.
    pub span: Span,
}

impl Io {
    /// How much of the file it is about, in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        match self.kind {
            IoKind::Discard { length_bytes } | IoKind::Zero { length_bytes } => length_bytes,
            _ => self.span.length_bytes().into(),
        }
    }
}

/// Why a transfer or an open failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StorageError {
    /// The operating system's errno.
    Os(i32),
    /// The file ended where a write needed it not to.
    PastEnd,
}

impl StorageError {
    /// True when the medium does not know the operation, and never will.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(self, StorageError::Os(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY))
    }
}

/// A transfer that ended, well or badly.
#[derive(Clone, Debug)]
pub struct Done {
    /// The caller's name for it.
    pub token: u64,
    /// How it ended. After an error of a write, any part of it may have been written.
    pub result: Result<(), StorageError>,
}

/// Why an image was not opened. `Display` gives the operator's sentence: what, where, what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenError {
    /// The path as it was asked for.
    pub path: String,
    /// What is wrong and what to do about it, one line.
    pub reason: String,
}

impl std::fmt::Display for OpenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)
    }
}

/// What the backend needs of storage. One owner, one thread, no blocking call.
pub trait Storage {
    /// Starts to open an image, with its parents if it has a format. The answer comes from [`Storage::opened`] under
    /// `token`.
    fn open_image(&mut self, token: u64, image: &Image, access: Access);

    /// Hands over what killed processes had changed of images and not written: it is written when such an image is opened for
    /// writing.
    fn set_left(&mut self, left: Left);

    /// Takes the layers of an image that was opened and has a format, leaf first: the leaf's file is the one that was
    /// opened. Each file is to be closed by itself then. `None` for a raw image, and the second time.
    fn layers(&mut self, file: FileId) -> Option<Vec<Layer>>;

    /// Starts to open a raw image at `path` (absolute).
    fn open(&mut self, token: u64, path: &str, access: Access) {
        self.open_image(token, &Image { format: crate::params::Format::Raw, path: path.into() }, access);
    }

    /// Takes one finished open, if there is one.
    fn opened(&mut self) -> Option<(u64, Result<Opened, OpenError>)>;

    /// Looks at the size of an open file again, and goes by it from now on. In bytes; `None` if it cannot be told without
    /// waiting, or the file is not open.
    fn measure(&mut self, file: FileId) -> Option<u64> {
        let _ = file;
        None
    }

    /// Closes a file. The caller has taken every `Done` of it.
    fn close(&mut self, file: FileId);

    /// The memory that transfers may name.
    fn buffers(&mut self) -> &mut Pool;

    /// Where the bytes of a file are that lives in memory, for a grant copy that goes straight there: no transfer, and no
    /// copy of ours. Only until the second [`Storage::submit`] from now, and only to be named to the hypervisor, whose copy
    /// fails as a whole if the pages cannot be had any more. `None` where the bytes must go through [`Storage::queue`]: in
    /// most cases.
    fn direct(&mut self, file: FileId, kind: IoKind, offset_bytes: u64, length_bytes: u32) -> Option<Span> {
        let _ = (file, kind, offset_bytes, length_bytes);
        None
    }

    /// Whether transfers of this file may name memory that is not of [`Storage::buffers`]: pages of a guest.
    fn takes_pages(&mut self, file: FileId) -> bool {
        let _ = file;
        false
    }

    /// A copy to or from what [`Storage::direct`] had named failed as a whole: the file is not what it was.
    fn not_direct(&mut self, file: FileId) {
        let _ = file;
    }

    /// Queues a transfer; nothing need start before [`Storage::submit`]. Its `Done` may be there at once, without any
    /// descriptor becoming readable: take [`Storage::done`] until it is empty before waiting.
    fn queue(&mut self, io: Io);

    /// Starts all that is queued, with as few system calls as the engine needs.
    fn submit(&mut self);

    /// Gives unused memory back to the system, where there is such a thing.
    fn trim(&mut self) {}

    /// Takes one finished transfer, if there is one. Starts what has to be tried or continued before it says no.
    fn done(&mut self) -> Option<Done>;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks every sector whether its whole unit lies within.
    fn by_hand(unit: DiscardUnit, offset: u64, length: u64) -> (u64, u64) {
        let (size, shift) = (u64::from(unit.granularity_bytes), u64::from(unit.alignment_bytes));
        let starts = (0..).map(|n| n * size + shift).take_while(|start| start + size <= offset + length);
        let whole: Vec<u64> = starts.filter(|start| *start >= offset).collect();
        match (whole.first(), whole.last()) {
            (Some(first), Some(last)) => (*first, last + size),
            _ => (offset, offset),
        }
    }

    #[test]
    fn only_whole_units_are_within() {
        for (granularity_bytes, alignment_bytes) in
            [(512, 0), (4096, 0), (4096, 1536), (1536, 512), (8192, 7680)]
        {
            let unit = DiscardUnit { granularity_bytes, alignment_bytes };
            for offset in (0..20_000).step_by(512) {
                for length in (512..30_000).step_by(512) {
                    assert_eq!(
                        unit.within(offset, length),
                        by_hand(unit, offset, length),
                        "{unit:?} {offset} {length}"
                    );
                }
            }
            for (offset, length) in [(u64::MAX - 511, 512), (512, u64::MAX - 511), (u64::MAX - 600, 600)] {
                let (from, to) = unit.within(offset, length);
                assert!(
                    from <= to && from >= offset.min(from) && to - from <= length,
                    "{unit:?} {offset} {length}"
                );
            }
        }
    }
}
