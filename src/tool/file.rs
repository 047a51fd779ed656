//! Files and block devices as the tool opens them: through the page cache, by the operator's own rights.

use std::fs::{File, OpenOptions};
use std::io::{Error as IoError, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use formats::bytes::{index, wide};
use formats::{Failure, Medium};
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::out::Progress;
use crate::chains::{Found, Library};
use crate::storage::{Identity, OpenError};

/// Metadata that are read one after another come from reads of this size.
const WINDOW_BYTES: usize = 64 << 10;
/// Zeroes that are written at a time, where a file system has no call for it.
const ZEROES_BYTES: usize = 1 << 20;

/// What the tool holds against others while it has a file open. A running vbdd locks the images that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    /// Nothing: what is read may change meanwhile.
    None,
    /// No writer beside us, for files that are only read.
    Shared,
}

/// Opens what a path names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shell {
    /// For files that are only read; those that are written are nobody else's.
    pub(super) lock: Lock,
}

/// An open file.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: Arc<File>,
    is_device: bool,
    /// Nothing has to be durable before the end: syncs are left out.
    pub(super) unsynced: bool,
    window: Vec<u8>,
    window_at: u64,
    read_end: u64,
    /// What failed last: more than an errno can say.
    trouble: Option<String>,
    /// Moves with what is read.
    progress: Option<(Progress, u64)>,
}

impl ImageFile {
    /// A file that is open for whatever will be done with it.
    #[must_use]
    pub(super) fn new(file: File, is_device: bool) -> ImageFile {
        ImageFile {
            file: Arc::new(file),
            is_device,
            unsynced: false,
            window: Vec::new(),
            window_at: 0,
            read_end: u64::MAX,
            trouble: None,
            progress: None,
        }
    }

    /// Shows how much of it was read, from now on.
    pub(super) fn show(&mut self, progress: Progress) {
        self.progress = Some((progress, 0));
    }

    /// The file itself, for those who read data.
    #[must_use]
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// A block device, or a regular file?
    #[must_use]
    pub(super) fn is_device(&self) -> bool {
        self.is_device
    }

    /// What failed last, in words.
    #[must_use]
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Bytes that it takes on the medium.
    #[must_use]
    pub(super) fn allocated_bytes(&mut self) -> u64 {
        if self.is_device {
            return self.length_bytes();
        }
        self.file.metadata().map_or(0, |found| found.blocks() * 512)
    }

    /// The part of a range, from its start on, that is a hole (true) or not (false), as far as the file system tells.
    #[must_use]
    pub(super) fn hole(&self, from: u64, to: u64) -> (bool, u64) {
        use rustix::fs::SeekFrom::{Data, Hole};
        let all_data = (false, to);
        if self.is_device {
            return all_data;
        }
        match rustix::fs::seek(&self.file, Data(from)) {
            Ok(data) if data > from => (true, data.min(to)),
            Ok(_) => match rustix::fs::seek(&self.file, Hole(from)) {
                Ok(hole) if hole > from => (false, hole.min(to)),
                _ => all_data,
            },
            // No data behind this place.
            Err(Errno::NXIO) => (true, to),
            Err(_) => all_data,
        }
    }

    fn failed(&mut self, doing: &str, offset_bytes: u64, error: &IoError) -> Failure {
        self.trouble = Some(format!("{doing} at byte {offset_bytes}: {error}"));
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Failure::NoSpace,
            errno => Failure::Io(errno.unwrap_or(0)),
        }
    }

    /// Writes zeroes, where a hole will not do.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn write_zeroes(&mut self, mut offset_bytes: u64, end: u64) -> Result<(), Failure> {
        let zeroes = vec![0; ZEROES_BYTES.min(index(end.saturating_sub(offset_bytes)))];
        while offset_bytes < end {
            let part = (end - offset_bytes).min(wide(zeroes.len()));
            self.write(offset_bytes, zeroes.get(..index(part)).unwrap_or_default())?;
            offset_bytes += part;
        }
        Ok(())
    }

    /// Gives a range back to the file system, if it takes it.
    pub(super) fn punch(&mut self, offset_bytes: u64, length_bytes: u64) {
        self.window.clear();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(&self.file, flags, offset_bytes, length_bytes);
    }

    /// Copies from the window, if the range lies in it.
    fn copy_from_window(&self, offset_bytes: u64, bytes: &mut [u8]) -> bool {
        let from = offset_bytes.checked_sub(self.window_at).map(index);
        let part = from.and_then(|from| self.window.get(from..from.checked_add(bytes.len())?));
        part.map(|part| bytes.copy_from_slice(part)).is_some()
    }
}

/// Fills `bytes` from a place in a file; what lies behind its end is zero.
///
/// # Errors
/// What the system says.
pub(super) fn read_at(file: &File, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), IoError> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset_bytes.saturating_add(wide(done))) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Medium for ImageFile {
    fn length_bytes(&mut self) -> u64 {
        if self.is_device {
            return (&*self.file).seek(SeekFrom::End(0)).unwrap_or(0);
        }
        self.file.metadata().map_or(0, |found| found.len())
    }

    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        if let Some((progress, read)) = &mut self.progress {
            *read += wide(bytes.len());
            progress.done(*read);
        }
        if self.copy_from_window(offset_bytes, bytes) {
            return Ok(());
        }
        // Small reads that go on where the last one ended, or begin at the beginning, are a walk.
        let near = offset_bytes == 0 || offset_bytes.wrapping_sub(self.read_end) < wide(WINDOW_BYTES);
        self.read_end = offset_bytes.saturating_add(wide(bytes.len()));
        let file = self.file();
        if !near || bytes.len() >= WINDOW_BYTES {
            let result = read_at(&file, offset_bytes, bytes);
            return result.map_err(|error| self.failed("reading", offset_bytes, &error));
        }
        self.window.resize(WINDOW_BYTES, 0);
        self.window_at = offset_bytes;
        if let Err(error) = read_at(&file, offset_bytes, &mut self.window) {
            self.window.clear();
            return Err(self.failed("reading", offset_bytes, &error));
        }
        self.copy_from_window(offset_bytes, bytes);
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.window.clear();
        let result = self.file.write_all_at(bytes, offset_bytes);
        result.map_err(|error| self.failed("writing", offset_bytes, &error))
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        self.window.clear();
        if length_bytes == 0 {
            return Ok(());
        }
        let mut end = offset_bytes.saturating_add(length_bytes);
        if self.is_device {
            end = end.min(self.length_bytes());
            if end <= offset_bytes {
                return Ok(());
            }
        }
        for flags in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
            let flags = flags | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&self.file, flags, offset_bytes, end - offset_bytes).is_ok() {
                return Ok(());
            }
        }
        if !self.is_device {
            // What lies behind the end is zero already.
            end = end.min(self.length_bytes());
        }
        self.write_zeroes(offset_bytes, end)
    }

    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        self.window.clear();
        if self.is_device {
            return if length_bytes <= self.length_bytes() { Ok(()) } else { Err(Failure::NoSpace) };
        }
        let result = self.file.set_len(length_bytes);
        result.map_err(|error| self.failed("setting the length", length_bytes, &error))
    }

    fn sync(&mut self) -> Result<(), Failure> {
        if self.unsynced {
            return Ok(());
        }
        let result = self.file.sync_data();
        result.map_err(|error| self.failed("syncing", 0, &error))
    }
}

fn refuse(path: &str, reason: impl Into<String>) -> OpenError {
    OpenError { path: path.into(), reason: reason.into() }
}

impl Shell {
    /// Opens an image file. One that is to be written is locked against everybody else.
    ///
    /// # Errors
    /// The operator's sentence.
    pub(super) fn open_file(self, path: &str, writable: bool) -> Result<(ImageFile, Identity), OpenError> {
        // A FIFO must not make us wait for its other end.
        let mut options = OpenOptions::new();
        let device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        // A device that is to be written is claimed, so that one which is mounted is refused.
        let claim = if device && writable { libc::O_EXCL } else { 0 };
        options.read(true).write(writable).custom_flags(libc::O_NONBLOCK | claim);
        let file = options.open(path).map_err(|error| refuse(path, open_hint(&error)))?;
        let found = file.metadata().map_err(|error| refuse(path, error.to_string()))?;
        let is_device = found.file_type().is_block_device();
        if !is_device && !found.is_file() {
            return Err(refuse(path, "is neither a regular file nor a block device"));
        }
        if writable || self.lock == Lock::Shared {
            let how = if writable {
                FlockOperation::NonBlockingLockExclusive
            } else {
                FlockOperation::NonBlockingLockShared
            };
            let ours = rustix::fs::flock(&file, how) == Err(Errno::WOULDBLOCK);
            // qemu locks single bytes of what it has open, by another call.
            let qemus = writable
                && !is_device
                && matches!(rustix::fs::fcntl_lock(&file, how), Err(Errno::AGAIN | Errno::ACCESS));
            if ours || qemus {
                let hint = if writable { "" } else { ", or read it as it is with -U" };
                return Err(refuse(
                    path,
                    format!(
                        "is in use by another process, such as a running vbdd or qemu; end that first{hint}"
                    ),
                ));
            }
        }
        let identity = if is_device {
            Identity::Device { number: found.rdev() }
        } else {
            Identity::File { device: found.dev(), inode: found.ino() }
        };
        Ok((ImageFile::new(file, is_device), identity))
    }
}

fn open_hint(error: &IoError) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => String::from("does not exist; check the path"),
        std::io::ErrorKind::PermissionDenied => String::from("may not be opened; check its permissions"),
        std::io::ErrorKind::ResourceBusy => String::from(
            "is in use on this host (mounted, or part of a volume group or RAID); release it first",
        ),
        _ => format!("cannot be opened: {error}"),
    }
}

impl Library for Shell {
    type File = ImageFile;

    fn open(&mut self, path: &str, writable: bool) -> Result<Found<ImageFile>, OpenError> {
        let (medium, identity) = self.open_file(path, writable)?;
        let grows = !medium.is_device();
        Ok(Found { medium, identity, grows })
    }
}
