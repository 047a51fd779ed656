//! The Linux AIO engine, for kernels without io_uring: `io_submit` per batch, answers read from the ring that the kernel
//! maps into the process.
//!
//! Layouts are those of `linux/aio_abi.h` and, for the ring, of `struct aio_ring`, which user space may read when its
//! magic number is right (as fio and QEMU do). Otherwise `io_getevents` is asked.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::EventfdFlags;

use super::engine::{Action, Engine, Landed, Transfer};
use super::uring::EAGER_BATCH;

/// Transfers in flight that are asked for, largest first: the system's total (`fs.aio-max-nr`) is shared with others.
const DEPTHS: [u32; 4] = [2048, 1024, 256, 64];

/// Control blocks that one `io_submit` takes: as many as io_uring's engine starts at a time. Each costs 72 bytes.
const BATCH: usize = 256;

/// Answers taken by one `io_getevents`, where the ring cannot be read.
const EVENTS: usize = 64;

/// `struct aio_ring`'s first words: id, nr, head, tail, magic, compat_features, incompat_features, header_length.
const RING_MAGIC: u32 = 0xa10a_10a1;

/// `IOCB_FLAG_RESFD`: tell an eventfd.
const FLAG_RESFD: u32 = 1;

/// `struct iocb`, little-endian order of `aio_key` and `aio_rw_flags`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ControlBlock {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    fd: u32,
    address: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

/// The head of `struct aio_ring`; events follow `header_length` bytes after its start.
#[repr(C)]
struct RingHead {
    id: u32,
    count: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compatible: u32,
    incompatible: u32,
    header_length: u32,
}

/// The engine.
pub struct Aio {
    /// The kernel's name for the context: the address of its ring.
    context: u64,
    depth: u32,
    readable_ring: bool,
    event_fd: OwnedFd,
    event_fd_number: u32,
    syncs: bool,
    outstanding: u32,
    /// Control blocks pushed and not yet handed to the kernel, in order.
    blocks: Vec<ControlBlock>,
    pointers: Vec<*mut ControlBlock>,
    /// Answers that did not come from the ring: refused by `io_submit`, or taken by `io_getevents`.
    answers: std::collections::VecDeque<Landed>,
}

impl std::fmt::Debug for Aio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Aio").field("depth", &self.depth).field("outstanding", &self.outstanding).finish()
    }
}

/// A system call's answer as the kernel gives it: a count, or an errno.
fn answer(result: libc::c_long) -> Result<usize, i32> {
    usize::try_from(result).map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

impl Aio {
    /// Makes a context.
    ///
    /// # Errors
    /// Why it cannot be used, in words.
    pub fn new() -> Result<Aio, String> {
        let event_fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| format!("eventfd: {error}"))?;
        let event_fd_number =
            u32::try_from(event_fd.as_raw_fd()).map_err(|error| format!("eventfd: {error}"))?;
        let (context, depth) = Self::setup()?;
        let mut aio = Aio {
            context,
            depth,
            readable_ring: Self::ring_is_readable(context),
            event_fd,
            event_fd_number,
            syncs: false,
            outstanding: 0,
            blocks: Vec::with_capacity(BATCH),
            pointers: Vec::with_capacity(BATCH),
            answers: std::collections::VecDeque::with_capacity(BATCH + EVENTS),
        };
        aio.syncs = aio.can_sync();
        Ok(aio)
    }

    fn setup() -> Result<(u64, u32), String> {
        let mut last = 0;
        for depth in DEPTHS {
            let mut context = 0u64;
            // SAFETY: io_setup writes one word, the context, which is ours and zero as it demands.
            let result = unsafe {
                libc::syscall(libc::SYS_io_setup, libc::c_long::from(depth), std::ptr::from_mut(&mut context))
            };
            match answer(result) {
                Ok(_) => return Ok((context, depth)),
                Err(errno) => last = errno,
            }
        }
        let error = std::io::Error::from_raw_os_error(last);
        let hint = if last == libc::EAGAIN { " (raise sysctl fs.aio-max-nr)" } else { "" };
        Err(format!("io_setup: {error}{hint}"))
    }

    /// Whether the ring has the layout that we know.
    fn ring_is_readable(context: u64) -> bool {
        let head = std::ptr::with_exposed_provenance::<RingHead>(usize::try_from(context).unwrap_or(0));
        if head.is_null() || !head.is_aligned() {
            return false;
        }
        // SAFETY: the context is the address of the ring, mapped until io_destroy; its head is at least this long in
        // every version of the layout.
        let head = unsafe { &*head };
        head.magic == RING_MAGIC
            && head.incompatible == 0
            && head.count > 0
            && head.header_length as usize == size_of::<RingHead>()
    }

    /// Tries a sync on a file in memory, where it costs nothing: kernels before 4.18 refuse the command.
    fn can_sync(&mut self) -> bool {
        use rustix::fs::MemfdFlags;
        let Ok(file) = rustix::fs::memfd_create("vbdd-probe", MemfdFlags::CLOEXEC) else { return false };
        let transfer = Transfer {
            tag: 0,
            action: Action::Sync,
            fd: file.as_raw_fd(),
            attached: None,
            offset_bytes: 0,
            address: std::ptr::null_mut(),
            length_bytes: 0,
        };
        self.push(&transfer);
        self.submit();
        let refused = self.answers.pop_front().is_some();
        while self.outstanding > 0 && !refused {
            self.get_events(1);
            if self.answers.pop_front().is_some() {
                self.outstanding -= 1;
            }
        }
        if refused {
            self.outstanding = 0;
        }
        self.acknowledge();
        !refused
    }

    /// For the log.
    #[must_use]
    pub fn describe(&self) -> String {
        let reaping =
            if self.readable_ring { "answers read in user space" } else { "answers by io_getevents" };
        let syncing = if self.syncs { "asynchronous flush" } else { "flush by helper threads" };
        format!("{} in flight at most, {reaping}, {syncing}", self.depth)
    }

    /// Takes answers by system call, waiting for `wanted` of them.
    fn get_events(&mut self, wanted: u32) {
        let mut events = [Event::default(); EVENTS];
        // SAFETY: the kernel writes at most EVENTS events to the array; no timeout structure is given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                libc::c_long::from(wanted),
                EVENTS,
                events.as_mut_ptr(),
                std::ptr::null_mut::<libc::timespec>(),
            )
        };
        for event in events.iter().take(answer(result).unwrap_or(0)) {
            self.answers.push_back(landed(event));
        }
    }

    /// Takes one answer from the ring.
    fn take_from_ring(&mut self) -> Option<Landed> {
        let start = std::ptr::with_exposed_provenance::<u8>(usize::try_from(self.context).ok()?);
        // SAFETY: `ring_is_readable` looked at this very head; it stays mapped as long as we have the context.
        let ring = unsafe { &*start.cast::<RingHead>() };
        let head = ring.head.load(Ordering::Relaxed);
        // Acquire: the event must be read after the tail that covers it.
        let tail = ring.tail.load(Ordering::Acquire);
        if head == tail || head >= ring.count {
            return None;
        }
        let offset = size_of::<RingHead>() + head as usize * size_of::<Event>();
        // SAFETY: `head` is below the count of events that the ring was mapped with, and the kernel writes no event
        // between head and tail.
        let event = unsafe { start.add(offset).cast::<Event>().read() };
        // Release: the kernel may overwrite the event once it sees the new head.
        ring.head.store((head + 1) % ring.count, Ordering::Release);
        Some(landed(&event))
    }
}

fn landed(event: &Event) -> Landed {
    Landed {
        tag: u32::try_from(event.data).unwrap_or(u32::MAX),
        result: i32::try_from(event.result).unwrap_or(-libc::EIO),
    }
}

impl Aio {
    /// Takes a transfer of one piece of memory (`parts` is 0), or of as many as there are `iovec`s at its address.
    fn push_parts(&mut self, transfer: &Transfer, parts: usize) -> bool {
        if self.outstanding >= self.depth || self.blocks.len() >= BATCH {
            return false;
        }
        let (Ok(fd), Ok(offset)) = (u32::try_from(transfer.fd), i64::try_from(transfer.offset_bytes)) else {
            self.answers.push_back(Landed { tag: transfer.tag, result: -libc::EINVAL });
            self.outstanding += 1;
            return true;
        };
        let mut block = ControlBlock {
            data: u64::from(transfer.tag),
            opcode: match transfer.action {
                // IOCB_CMD_PREADV and IOCB_CMD_PWRITEV.
                Action::Read if parts > 0 => 7,
                Action::Write if parts > 0 => 8,
                Action::Read => 0,
                Action::Write => 1,
                // IOCB_CMD_FDSYNC.
                Action::Sync => 3,
            },
            fd,
            flags: FLAG_RESFD,
            event_fd: self.event_fd_number,
            ..ControlBlock::default()
        };
        if transfer.action != Action::Sync {
            block.address = transfer.address.expose_provenance() as u64;
            block.length = if parts > 0 { parts as u64 } else { transfer.length_bytes.into() };
            block.offset = offset;
        }
        self.blocks.push(block);
        self.outstanding += 1;
        if self.blocks.len() >= EAGER_BATCH as usize {
            self.submit();
        }
        true
    }
}

impl Engine for Aio {
    /// There is nothing to register.
    fn attach(&mut self, _index: u32, _fd: BorrowedFd<'_>) -> bool {
        false
    }

    fn detach(&mut self, _index: u32) {}

    fn push(&mut self, transfer: &Transfer) -> bool {
        self.push_parts(transfer, 0)
    }

    fn push_vectored(&mut self, transfer: &Transfer, parts: usize) -> bool {
        self.push_parts(transfer, parts)
    }

    fn submit(&mut self) -> bool {
        let mut next = 0;
        let mut all = true;
        self.pointers.clear();
        self.pointers.extend(self.blocks.iter_mut().map(std::ptr::from_mut));
        while next < self.pointers.len() {
            let rest = &mut self.pointers[next..];
            // SAFETY: each pointer names a control block in `blocks`, which is not touched meanwhile; the kernel copies
            // the blocks before it returns. The memory that they name is valid until they land (see `Transfer`).
            let result =
                unsafe { libc::syscall(libc::SYS_io_submit, self.context, rest.len(), rest.as_mut_ptr()) };
            match answer(result) {
                Ok(0) => {
                    all = false;
                    break;
                }
                Ok(count) => next += count,
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN) => {
                    all = false;
                    break;
                }
                // The first one of the rest was refused, and nothing after it was looked at.
                Err(errno) => {
                    let tag = self
                        .blocks
                        .get(next)
                        .map_or(u32::MAX, |block| u32::try_from(block.data).unwrap_or(u32::MAX));
                    self.answers.push_back(Landed { tag, result: -errno });
                    next += 1;
                }
            }
        }
        self.blocks.drain(..next);
        all
    }

    fn reap(&mut self) -> Option<Landed> {
        if self.outstanding == 0 {
            return None;
        }
        if self.answers.is_empty() && !self.readable_ring {
            self.get_events(0);
        }
        let landed = match self.answers.pop_front() {
            Some(landed) => Some(landed),
            None if self.readable_ring => self.take_from_ring(),
            None => None,
        }?;
        self.outstanding -= 1;
        Some(landed)
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.event_fd.as_raw_fd())
    }

    fn acknowledge(&mut self) {
        let mut count = [0; 8];
        // It is empty when someone woke us for another reason.
        let _ = rustix::io::read(&self.event_fd, &mut count);
    }

    /// `io_submit` does such reads and writes before it returns.
    fn blocks_on_cached_files(&self) -> bool {
        true
    }

    fn syncs(&self) -> bool {
        self.syncs
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context is ours and is not used again. The kernel waits here for what is in flight.
        let _ = unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
