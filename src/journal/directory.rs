//! Journals as files in a directory on tmpfs, and the lock that keeps a second process out.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::ptr;

use log::warn;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, ftruncate, mkdir, open, openat, unlinkat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::{JournalStore, Memory};
use crate::error::Error;

const SUFFIX: &str = ".ring";

/// The state directory: one file for each live ring.
#[derive(Debug)]
pub struct JournalDirectory {
    path: PathBuf,
    directory: OwnedFd,
    /// Held as long as the process lives.
    _lock: OwnedFd,
}

impl JournalDirectory {
    /// Opens the directory, making it if need be, and takes its lock.
    ///
    /// # Errors
    /// Where the directory cannot be used, or another vbdd uses it.
    pub fn open(path: &Path) -> Result<JournalDirectory, Error> {
        let shown = path.display();
        match mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => {
                let hint = "make its parent directory, or name another with --state-dir";
                return Err(Error::new(format!("cannot make the state directory {shown}: {errno}"), hint));
            }
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = open(path, OFlags::RDONLY | flags, Mode::empty()).map_err(|errno| {
            Error::new(
                format!("cannot open the state directory {shown}: {errno}"),
                "name another with --state-dir",
            )
        })?;
        check_owner(&directory).map_err(|what| {
            Error::new(format!("the state directory {shown} {what}"), "name another with --state-dir")
        })?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock = openat(&directory, "lock", flags, Mode::RUSR | Mode::WUSR).map_err(|errno| {
            Error::new(format!("cannot open {shown}/lock: {errno}"), "see its permissions")
        })?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            let hint = "stop it first, or give this one its own --state-dir and other --kind";
            Error::new(format!("another vbdd uses the state directory {shown}"), hint)
        })?;
        Ok(JournalDirectory { path: path.to_owned(), directory, _lock: lock })
    }

    fn map(&self, name: &str, length_bytes: usize) -> rustix::io::Result<Memory> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat(&self.directory, format!("{name}{SUFFIX}"), flags, Mode::RUSR | Mode::WUSR)?;
        let wanted = u64::try_from(length_bytes).map_err(|_| Errno::INVAL)?;
        if u64::try_from(fstat(&file)?.st_size) != Ok(wanted) {
            // Blocks are allocated now: a full file system must not turn a later store into SIGBUS.
            ftruncate(&file, 0)?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, wanted)?;
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice.
        let address = unsafe { mmap(ptr::null_mut(), length_bytes, protection, MapFlags::SHARED, &file, 0) }?;
        // SAFETY: mapped just now, page-aligned, as long as said; unmapped only by `close`, which takes the memory from
        // a journal that is gone. The lock keeps other processes of ours out.
        Ok(unsafe { Memory::new(address.cast(), length_bytes) })
    }

    fn remove(&self, name: &str) {
        let file = format!("{name}{SUFFIX}");
        match unlinkat(&self.directory, &file, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => warn!("cannot remove {}/{file}: {errno}", self.path.display()),
        }
    }
}

/// Whoever can write a journal decides what is written to the images at the next start.
fn check_owner(directory: &OwnedFd) -> Result<(), String> {
    let stat = fstat(directory).map_err(|errno| format!("cannot be examined: {errno}"))?;
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err("belongs to another user".to_owned());
    }
    if stat.st_mode & 0o022 != 0 {
        return Err("can be written by others".to_owned());
    }
    Ok(())
}

impl JournalStore for JournalDirectory {
    fn open(&mut self, name: &str, length_bytes: usize) -> Option<Memory> {
        match self.map(name, length_bytes) {
            Ok(memory) => Some(memory),
            Err(errno) => {
                let path = self.path.display();
                warn!(
                    "no journal {path}/{name}{SUFFIX}: {errno}; if vbdd dies without a clean stop, requests that are in \
                     flight then are lost"
                );
                None
            }
        }
    }

    fn close(&mut self, name: &str, memory: Memory, remove: bool) {
        // SAFETY: the memory came from `map`, and its journal is gone.
        if let Err(errno) = unsafe { munmap(memory.address().cast(), memory.length_bytes()) } {
            warn!("munmap of the journal {name} failed: {errno}");
        }
        if remove {
            self.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Journal, RECORD_VERSION, RingRecord};

    fn record() -> RingRecord {
        RingRecord {
            version: RECORD_VERSION,
            domain: 7,
            protocol: "x86_64-abi".to_owned(),
            grants: vec![8],
            remote_port: 3,
        }
    }

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vbdd-journal-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn what_was_owed_is_found_again_in_order_by_a_later_process() {
        let path = scratch("owed");
        let mut directory = JournalDirectory::open(&path).unwrap();
        let length = Memory::needed_bytes(32);
        let memory = directory.open("vbd-7-51712", length).unwrap();
        let mut journal = Journal::create(memory, 32, &record(), 0).unwrap();
        for (entry, byte) in [(5, 1), (0, 2), (9, 3), (3, 4), (30, 5)] {
            journal.taken(entry, &[byte; 112]);
        }
        journal.produced(10);
        journal.answered(0, 10);
        journal.answered(9, 11);
        journal.published(0);
        directory.close("vbd-7-51712", journal.memory(), false);
        drop(directory);

        let mut directory = JournalDirectory::open(&path).unwrap();
        let memory = directory.open("vbd-7-51712", length).unwrap();
        assert!(Journal::inherit(memory, 32, &RingRecord { domain: 8, ..record() }, 11).is_none());
        assert!(Journal::inherit(memory, 32, &record(), 9).is_none(), "a younger ring");
        let (_, owed) = Journal::inherit(memory, 32, &record(), 11).unwrap();
        let found: Vec<(u32, u8)> = owed.iter().map(|one| (one.entry, one.bytes[0])).collect();
        assert_eq!(found, [(5, 1), (9, 3), (3, 4), (30, 5)], "an unpublished answer is still owed");
        let (_, owed) = Journal::inherit(memory, 32, &record(), 12).unwrap();
        assert_eq!(owed.len(), 4, "once owed under no index, it is owed until it is answered");
        directory.close("vbd-7-51712", memory, true);
        assert!(std::fs::read_dir(&path).unwrap().all(|entry| entry.unwrap().file_name() == "lock"));
        std::fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let path = scratch("open");
        std::fs::create_dir(&path).unwrap();
        for (mode, fine) in [(0o777, false), (0o1777, false), (0o770, false), (0o755, true), (0o700, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(JournalDirectory::open(&path).is_ok(), fine, "{mode:o}");
        }
        std::fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_second_process_is_kept_out() {
        let path = scratch("lock");
        let first = JournalDirectory::open(&path).unwrap();
        let refusal = JournalDirectory::open(&path).unwrap_err();
        assert!(refusal.to_string().contains("another vbdd uses"), "{refusal}");
        drop(first);
        assert!(JournalDirectory::open(&path).is_ok());
        std::fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn taking_order_survives_the_wrap_of_its_counter() {
        let path = scratch("wrap");
        let mut directory = JournalDirectory::open(&path).unwrap();
        let memory = directory.open("q", Memory::needed_bytes(32)).unwrap();
        let mut journal = Journal::create(memory, 32, &record(), 0).unwrap();
        journal.order = u32::MAX - 1;
        for entry in [4, 3, 2, 1] {
            journal.taken(entry, &[0; 112]);
        }
        let (journal, owed) = Journal::inherit(memory, 32, &record(), 0).unwrap();
        assert_eq!(owed.iter().map(|one| one.entry).collect::<Vec<_>>(), [4, 3, 2, 1]);
        assert_eq!(journal.order, 2);
        std::fs::remove_dir_all(&path).unwrap();
    }
}
