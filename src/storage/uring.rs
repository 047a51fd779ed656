//! The io_uring engine: one `io_uring_enter` per batch, answers read from shared memory.
//!
//! The ring is a plain one, whose descriptor a poller can watch: a ring with `DEFER_TASKRUN` is never reported readable,
//! since its answers are only made when its owner enters the kernel.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, opcode};

use super::engine::{Action, Engine, Landed, Transfer};

/// Transfers pushed after which the medium is set to work, without waiting for the end of the batch: one system call in
/// eight transfers, and the medium is not idle while a long batch is made. Measured in `docs/design/storage.md`.
pub(super) const EAGER_BATCH: u32 = 8;

/// Transfers that one `io_uring_enter` can start: 8 disks' rings of 32. Each costs 64 bytes of ring.
const SUBMISSIONS: u32 = 256;

/// Transfers in flight at once, and room for their answers, so that the answers never overflow. Each costs 16 bytes.
const IN_FLIGHT_MAX: u32 = 2048;

/// Files registered with the ring; more are served by their descriptors. Each costs 8 bytes of kernel memory.
const FILES: u32 = 256;

/// Answers taken from the ring at a time.
const REAP_BATCH: usize = 32;

/// The engine.
pub struct Uring {
    ring: IoUring,
    /// How many files the ring has room for.
    files: u32,
    /// Pushed or in the kernel, and not yet reaped.
    outstanding: u32,
    /// Pushed and not yet handed to the kernel.
    pushed: u32,
    batch: [Landed; REAP_BATCH],
    batch_next: usize,
    batch_end: usize,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("files", &self.files).field("outstanding", &self.outstanding).finish()
    }
}

impl Uring {
    /// Makes a ring and checks that it can do what we ask.
    ///
    /// # Errors
    /// Why it cannot be used, in words.
    pub fn new() -> Result<Uring, String> {
        let ring = Self::build().map_err(|error| match error.raw_os_error() {
            Some(libc::ENOSYS) => {
                String::from("this kernel has no io_uring (Linux 5.6 brought what is needed)")
            }
            Some(libc::EPERM) => {
                String::from("it is forbidden here (sysctl kernel.io_uring_disabled, or a seccomp filter)")
            }
            _ => format!("io_uring_setup: {error}"),
        })?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(|error| {
            format!("this kernel's io_uring is too old to be asked what it can ({error})")
        })?;
        for (code, name) in
            [(opcode::Read::CODE, "READ"), (opcode::Write::CODE, "WRITE"), (opcode::Fsync::CODE, "FSYNC")]
        {
            if !probe.is_supported(code) {
                return Err(format!("this kernel's io_uring has no {name}"));
            }
        }
        if !ring.params().is_feature_nodrop() {
            return Err(String::from("this kernel's io_uring may drop answers"));
        }
        let files = Self::room_for_files(&ring);
        let empty = Landed { tag: 0, result: 0 };
        let batch = [empty; REAP_BATCH];
        Ok(Uring { ring, files, outstanding: 0, pushed: 0, batch, batch_next: 0, batch_end: 0 })
    }

    /// A ring that does not interrupt us for every answer, where the kernel (5.19) knows how; else a plain one.
    fn build() -> std::io::Result<IoUring> {
        let plain = |builder: &mut io_uring::Builder| {
            builder.setup_cqsize(IN_FLIGHT_MAX).setup_clamp().dontfork().build(SUBMISSIONS)
        };
        let mut builder = IoUring::builder();
        match plain(builder.setup_coop_taskrun()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => plain(&mut IoUring::builder()),
            other => other,
        }
    }

    /// Registers an empty table of files. Answers with its size: 0 where the kernel or the limit on open files refuses.
    fn room_for_files(ring: &IoUring) -> u32 {
        let submitter = ring.submitter();
        let empty = [-1; FILES as usize];
        let sparse = submitter.register_files_sparse(FILES).is_ok();
        if sparse || submitter.register_files(&empty).is_ok() { FILES } else { 0 }
    }

    /// For the log.
    #[must_use]
    pub fn describe(&self) -> String {
        let sort = if self.files == 0 { "no registered files" } else { "registered files" };
        format!("{} in flight at most, {sort}", self.ring.params().cq_entries())
    }

    fn entry(transfer: &Transfer, parts: u32) -> io_uring::squeue::Entry {
        let Transfer { offset_bytes, address, length_bytes, .. } = *transfer;
        let parts_at = address.cast::<libc::iovec>().cast_const();
        macro_rules! on {
            ($fd:expr) => {
                match transfer.action {
                    Action::Read if parts > 0 => {
                        opcode::Readv::new($fd, parts_at, parts).offset(offset_bytes).build()
                    }
                    Action::Write if parts > 0 => {
                        opcode::Writev::new($fd, parts_at, parts).offset(offset_bytes).build()
                    }
                    Action::Read => {
                        opcode::Read::new($fd, address, length_bytes).offset(offset_bytes).build()
                    }
                    Action::Write => opcode::Write::new($fd, address.cast_const(), length_bytes)
                        .offset(offset_bytes)
                        .build(),
                    Action::Sync => opcode::Fsync::new($fd).flags(FsyncFlags::DATASYNC).build(),
                }
            };
        }
        let entry = match transfer.attached {
            Some(index) => on!(Fixed(index)),
            None => on!(Fd(transfer.fd)),
        };
        entry.user_data(u64::from(transfer.tag))
    }

    #[inline]
    fn push_entry(&mut self, entry: &io_uring::squeue::Entry) -> bool {
        if self.outstanding >= self.ring.params().cq_entries() {
            return false;
        }
        // SAFETY: the memory and the descriptor stay valid until the transfer has landed (see `Transfer`).
        if unsafe { self.ring.submission().push(entry) }.is_err() {
            return false;
        }
        self.outstanding += 1;
        self.pushed += 1;
        if self.pushed >= EAGER_BATCH {
            self.submit();
        }
        true
    }

    /// Copies answers from the ring to the batch.
    fn refill(&mut self) {
        let mut end = 0;
        for (place, answer) in self.batch.iter_mut().zip(&mut self.ring.completion()) {
            let tag = u32::try_from(answer.user_data()).unwrap_or(u32::MAX);
            *place = Landed { tag, result: answer.result() };
            end += 1;
        }
        self.batch_next = 0;
        self.batch_end = end;
    }
}

impl Engine for Uring {
    fn attach(&mut self, index: u32, fd: BorrowedFd<'_>) -> bool {
        index < self.files
            && self
                .ring
                .submitter()
                .register_files_update(index, &[fd.as_raw_fd()])
                .is_ok_and(|count| count == 1)
    }

    fn detach(&mut self, index: u32) {
        if let Err(error) = self.ring.submitter().register_files_update(index, &[-1]) {
            log::warn!("io_uring: file {index} stays registered until its place is used again: {error}");
        }
    }

    #[inline]
    fn push(&mut self, transfer: &Transfer) -> bool {
        self.push_entry(&Self::entry(transfer, 0))
    }

    fn push_vectored(&mut self, transfer: &Transfer, parts: usize) -> bool {
        u32::try_from(parts).is_ok_and(|parts| self.push_entry(&Self::entry(transfer, parts)))
    }

    fn submit(&mut self) -> bool {
        while self.pushed > 0 {
            match self.ring.submit() {
                // Kernels stop early at an entry that they cannot even take; the rest needs another call.
                Ok(0) => return false,
                Ok(count) => {
                    self.pushed = self.pushed.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX))
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // No memory, or answers must be taken first: both pass.
                Err(_) => return false,
            }
        }
        true
    }

    #[inline]
    fn reap(&mut self) -> Option<Landed> {
        if self.batch_next == self.batch_end {
            if self.outstanding == 0 {
                return None;
            }
            self.refill();
            if self.batch_end == 0 && self.ring.submission().cq_overflow() {
                // Answers wait in the kernel for room: an enter fetches them. The bound on transfers in flight makes
                // this impossible, unless a kernel answers one transfer twice.
                let _ = self.ring.submit();
                self.refill();
            }
        }
        let landed = *self.batch.get(self.batch_next..self.batch_end)?.first()?;
        self.batch_next += 1;
        self.outstanding = self.outstanding.saturating_sub(1);
        Some(landed)
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }

    /// Nothing to do: the ring is readable as long as it holds answers.
    fn acknowledge(&mut self) {}

    /// The kernel's own workers take what would block.
    fn blocks_on_cached_files(&self) -> bool {
        false
    }

    fn syncs(&self) -> bool {
        true
    }
}
