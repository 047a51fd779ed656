//! Opening an image with its parents: every file below the roots, the leaf as the caller wants it, parents for reading. Runs
//! on an opener thread: everything here may block.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use formats::{Failure, Medium};
use rustix::fs::{Advice, FallocateFlags, OFlags};
use rustix::io::Errno;

use super::calls::lock_like_qemu;
use super::linux::Alignment;
use super::medium::{self, Prepared};
use super::remote::{self, Servers};
use super::{Access, OpenError};
use crate::chains::{self, Found, Library, Wish};
use crate::images::{Roots, explain};
use crate::keep::Left;
use crate::nbd::client::address::is_remote;
use crate::params::{Format, Image};

/// The files of an opened image.
#[derive(Debug)]
pub(super) struct PreparedChain {
    /// The file that is written.
    pub leaf: Prepared,
    /// Of an image with a format: how to read the leaf, and the parents with theirs.
    pub formats: Vec<Box<dyn formats::Format>>,
    pub parents: Vec<Prepared>,
}

/// How to open.
pub(super) struct Opener<'a> {
    pub roots: &'a Arc<Roots>,
    pub servers: &'a Arc<Servers>,
    pub left: &'a Left,
    /// Of the leaf.
    pub access: Access,
    pub direct: bool,
    pub least: Option<Alignment>,
}

impl Opener<'_> {
    /// Opens an image, with its parents where its format has such.
    pub(super) fn open(&mut self, image: &Image) -> Result<PreparedChain, OpenError> {
        if image.format == Format::Raw {
            let leaf = if is_remote(&image.path) {
                remote::open(self.servers, &image.path, self.access)?.finish()
            } else {
                medium::open(self.roots, &image.path, self.access, self.direct, self.least)?
            };
            return Ok(PreparedChain { leaf, formats: Vec::new(), parents: Vec::new() });
        }
        let wish = Wish { writable: self.access != Access::ReadOnly, parents: true };
        let mut formats = Vec::new();
        let mut files = Vec::new();
        for link in chains::open(self, image, wish)? {
            formats.push(link.format);
            files.push(link.medium.finish());
        }
        let mut files = files.into_iter();
        let Some(mut leaf) = files.next() else {
            let reason = String::from("the chain of images is empty (a bug in vbdd)");
            return Err(OpenError { path: image.path.clone(), reason });
        };
        leaf.remeasure(&image.path)?;
        Ok(PreparedChain { leaf, formats, parents: files.collect() })
    }
}

impl Library for Opener<'_> {
    type File = Place;

    fn open(&mut self, path: &str, writable: bool) -> Result<Found<Place>, OpenError> {
        let access = if writable { self.access } else { Access::ReadOnly };
        if is_remote(path) {
            let medium = remote::open(self.servers, path, access)?;
            let identity = medium.identity();
            return Ok(Found { medium: Place::Remote(Box::new(medium)), identity, grows: false });
        }
        let prepared = medium::open(self.roots, path, access, self.direct, self.least)?;
        let image = self.roots.locate(path)?;
        // Metadata that another program changes too are lost; and what is repaired below must be nobody's.
        let is_ours = || {
            prepared.locked && (image.is_device() || medium::tried(|| lock_like_qemu(prepared.fd.as_fd())))
        };
        if writable && !is_ours() {
            let reason = "is in use: another program has it open for writing, or the last writes of an earlier vbdd are not \
                          over; stop that, or wait";
            return Err(OpenError { path: path.into(), reason: reason.into() });
        }
        // Not the claim of a device: the first open has it, and it excludes us too.
        let access = if writable { Access::ReadWriteShared } else { Access::ReadOnly };
        let cached = self.roots.open(&image, access, OFlags::empty());
        let fd = cached.map_err(|errno| explain(path, errno, Some(access)))?;
        let identity = prepared.identity;
        if image.identity != identity {
            return Err(explain(path, Errno::STALE, None));
        }
        let grows = !image.is_device();
        Ok(Found { medium: Place::Here(Box::new(Blocking { prepared, fd, grows })), identity, grows })
    }

    fn left(&mut self, found: &Found<Place>) -> Vec<(u64, Vec<u8>)> {
        let left = self.left.of(found.identity);
        if left.pages.is_empty() || !Self::changed_since(found, left.kept_at_seconds) {
            return left.pages;
        }
        let count = left.pages.len();
        log::error!(
            "{:?}: a killed vbdd has left {count} changed pages of metadata, but another program has written to the file \
             since: they are not written, and what its guest had not flushed is lost",
            found.identity
        );
        Vec::new()
    }
}

/// How much later than the last change of a killed process its last writes may have ended.
const LATE_SECONDS: u64 = 60;

impl Opener<'_> {
    /// Whether somebody else has written to a file since pages were kept of it.
    fn changed_since(found: &Found<Place>, kept_at_seconds: u64) -> bool {
        let Place::Here(file) = &found.medium else { return false };
        let modified = rustix::fs::fstat(&file.fd).map_or(0, |stat| stat.st_mtime);
        found.grows && u64::try_from(modified).unwrap_or(0) > kept_at_seconds + LATE_SECONDS
    }
}

/// Where the bytes of an image are.
#[derive(Debug)]
pub(super) enum Place {
    Here(Box<Blocking>),
    Remote(Box<remote::Blocking>),
}

impl Place {
    /// Keeps what transfers are done with.
    fn finish(self) -> Prepared {
        match self {
            Place::Here(file) => file.finish(),
            Place::Remote(export) => export.finish(),
        }
    }

    fn medium(&mut self) -> &mut dyn Medium {
        match self {
            Place::Here(file) => file.as_mut(),
            Place::Remote(export) => export.as_mut(),
        }
    }
}

impl Medium for Place {
    fn length_bytes(&mut self) -> u64 {
        self.medium().length_bytes()
    }
    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        self.medium().read(offset_bytes, bytes)
    }
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.medium().write(offset_bytes, bytes)
    }
    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        self.medium().zero(offset_bytes, length_bytes)
    }
    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        self.medium().set_length(length_bytes)
    }
    fn sync(&mut self) -> Result<(), Failure> {
        self.medium().sync()
    }
}

/// A file that answers at once, through the page cache: metadata have any alignment.
#[derive(Debug)]
pub(super) struct Blocking {
    prepared: Prepared,
    fd: OwnedFd,
    grows: bool,
}

impl Blocking {
    /// Keeps what transfers are done with. What the page cache holds is of no use to them.
    fn finish(self) -> Prepared {
        let _ = rustix::fs::fadvise(&self.fd, 0, None, Advice::DontNeed);
        self.prepared
    }
}

fn failure(errno: Errno) -> Failure {
    match errno {
        Errno::NOSPC | Errno::DQUOT => Failure::NoSpace,
        other => Failure::Io(other.raw_os_error()),
    }
}

impl Medium for Blocking {
    fn length_bytes(&mut self) -> u64 {
        medium::size_now(&self.fd).unwrap_or(0)
    }

    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        let mut at = 0;
        while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
            let offset = offset_bytes.saturating_add(at as u64);
            match rustix::io::pread(&self.fd, &mut *rest, offset) {
                Ok(0) => {
                    rest.fill(0);
                    return Ok(());
                }
                Ok(moved) => at += moved,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failure(errno)),
            }
        }
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let offset = offset_bytes.saturating_add(at as u64);
            match rustix::io::pwrite(&self.fd, rest, offset) {
                Ok(0) => return Err(Failure::Io(libc::EIO)),
                Ok(moved) => at += moved,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failure(errno)),
            }
        }
        Ok(())
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if self.grows && rustix::fs::fallocate(&self.fd, flags, offset_bytes, length_bytes).is_ok() {
            return Ok(());
        }
        let zeroes = [0; 4096];
        let mut at = 0;
        while at < length_bytes {
            let part = (length_bytes - at).min(zeroes.len() as u64);
            let part = usize::try_from(part).unwrap_or(zeroes.len());
            self.write(offset_bytes + at, zeroes.get(..part).unwrap_or(&zeroes))?;
            at += part as u64;
        }
        Ok(())
    }

    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        if self.grows {
            return rustix::fs::ftruncate(&self.fd, length_bytes).map_err(failure);
        }
        if length_bytes <= self.length_bytes() { Ok(()) } else { Err(Failure::NoSpace) }
    }

    fn sync(&mut self) -> Result<(), Failure> {
        rustix::fs::fdatasync(&self.fd).map_err(failure)
    }
}
