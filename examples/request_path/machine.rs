//! The machine below the pump: a hypervisor made of memory and two eventfds, and the real storage under a clock.
//!
//! Every call of the real hypervisor layer makes one system call here too: reading events and unmasking are a `read`
//! and a `write` of an eventfd, a batch of grant copies and a notification an `ioctl` that an eventfd refuses (a
//! kernel entry, without the hypercall behind it). What other domains do is no business of the process that is
//! measured: a guest's event makes our eventfd readable by `writev`, so that strace tells it from our own calls.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::mm::{MapFlags, ProtFlags};
use vbdd::buffers::{Pool, Span};
use vbdd::hypervisor::{
    CopyDirection, CopySegment, DomainId, GrantRef, Hypervisor, HypervisorError, Port, RingMapping,
};
use vbdd::keep::Left;
use vbdd::params::Image;
use vbdd::storage::linux::LinuxStorage;
use vbdd::storage::{Access, Done, FileId, Io, IoKind, Layer, OpenError, Opened, Storage};

use crate::measure::{Call, Clock, Stage};

/// Bytes of a granted page.
pub(crate) const PAGE: usize = 4096;

/// Transfers that the io_uring engine hands to the kernel without waiting for the end of the batch.
const EAGER_BATCH: u64 = 8;

/// Memory of all guests; a grant reference is the number of a page in it.
#[derive(Clone, Copy)]
pub(crate) struct GuestMemory {
    base: *mut u8,
    pages: usize,
}

impl GuestMemory {
    /// Maps `pages` pages, for good.
    pub(crate) fn new(pages: usize) -> std::io::Result<GuestMemory> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), pages * PAGE, protection, MapFlags::SHARED)
        }?;
        Ok(GuestMemory { base: base.cast(), pages })
    }

    /// The page that `grant` names.
    pub(crate) fn page(&self, grant: GrantRef) -> Option<*mut u8> {
        let number = usize::try_from(grant).ok().filter(|number| *number < self.pages)?;
        Some(self.base.wrapping_add(number * PAGE))
    }
}

#[derive(Clone, Copy, Default)]
struct Channel {
    masked: bool,
    /// An event came while it was masked.
    pending: bool,
    /// The backend has sent an event, and the guest has not looked yet.
    notified: bool,
}

/// The hypervisor.
pub(crate) struct LocalHypervisor {
    memory: GuestMemory,
    events: OwnedFd,
    sink: OwnedFd,
    channels: Vec<Channel>,
    fired: Vec<Port>,
    clock: Rc<Clock>,
}

impl LocalHypervisor {
    pub(crate) fn new(memory: GuestMemory, clock: Rc<Clock>) -> std::io::Result<LocalHypervisor> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let (events, sink) = (eventfd(0, flags)?, eventfd(0, flags)?);
        Ok(LocalHypervisor { memory, events, sink, channels: Vec::new(), fired: Vec::new(), clock })
    }

    /// Readable when a port has an event.
    pub(crate) fn events_fd(&self) -> &OwnedFd {
        &self.events
    }

    /// The guest's end of channel `number` sends an event.
    pub(crate) fn event(&mut self, number: usize) {
        let Some(channel) = self.channels.get_mut(number) else { return };
        if std::mem::replace(&mut channel.masked, true) {
            channel.pending = true;
            return;
        }
        self.fired.push(Port(u32::try_from(number).unwrap_or(u32::MAX)));
        let one = 1_u64.to_ne_bytes();
        // Never full: at most one is outstanding for each port.
        let _ = rustix::io::writev(&self.events, &[std::io::IoSlice::new(&one)]);
    }

    /// Whether the guest's end of channel `number` has got an event since it was last asked.
    pub(crate) fn take_notified(&mut self, number: usize) -> bool {
        self.channels.get_mut(number).is_some_and(|channel| std::mem::take(&mut channel.notified))
    }

    /// A kernel entry that does nothing, in place of a hypercall.
    fn enter_kernel(&self) {
        // SAFETY: an eventfd knows no ioctl and looks at no argument; this one is FIONREAD's neighbour that nobody has.
        unsafe { libc::ioctl(self.sink.as_raw_fd(), 0x4508, 0) };
    }
}

impl Hypervisor for LocalHypervisor {
    fn map(&mut self, _: DomainId, grants: &[GrantRef]) -> Result<RingMapping, HypervisorError> {
        let first = grants.first().copied().unwrap_or(GrantRef::MAX);
        let address = self.memory.page(first).ok_or(HypervisorError::BadGrant(first))?;
        Ok(RingMapping { id: first, address, length_bytes: grants.len() * PAGE })
    }

    fn unmap(&mut self, _: RingMapping) {}

    fn copy(&mut self, segments: &mut [CopySegment]) -> Result<(), HypervisorError> {
        let Some(first) = segments.first() else { return Ok(()) };
        let stage = match first.direction {
            CopyDirection::FromGuest => Stage::CopyIn,
            CopyDirection::ToGuest => Stage::CopyOut,
        };
        let clock = Rc::clone(&self.clock);
        clock.count(Call::Copy);
        clock.time(stage, || {
            self.enter_kernel();
            for segment in segments {
                let length = segment.local.length_bytes() as usize;
                let offset = usize::from(segment.offset_bytes);
                let Some(page) = self.memory.page(segment.grant) else { continue };
                if offset + length > PAGE {
                    continue;
                }
                let guest = page.wrapping_add(offset);
                let (from, to) = match segment.direction {
                    CopyDirection::FromGuest => (guest.cast_const(), segment.local.address()),
                    CopyDirection::ToGuest => (segment.local.address().cast_const(), guest),
                };
                // SAFETY: within a guest's page by the check above, and within a span of the arena; both stay mapped.
                unsafe { std::ptr::copy_nonoverlapping(from, to, length) };
                segment.copied = true;
            }
        });
        Ok(())
    }

    fn bind(&mut self, _: DomainId, _: u32) -> Result<Port, HypervisorError> {
        let number = self.channels.len();
        self.channels.push(Channel::default());
        self.event(number);
        u32::try_from(number).map(Port).map_err(|_| HypervisorError::BadPort(u32::MAX))
    }

    fn unbind(&mut self, _: Port) {}

    fn pending(&mut self, ports: &mut Vec<Port>) {
        let clock = Rc::clone(&self.clock);
        clock.count(Call::Read);
        clock.time(Stage::Pending, || {
            let mut count = [0; 8];
            if rustix::io::read(&self.events, &mut count).is_ok() {
                ports.append(&mut self.fired);
            }
        });
    }

    fn unmask(&mut self, ports: &[Port]) {
        let clock = Rc::clone(&self.clock);
        clock.count(Call::Unmask);
        clock.time(Stage::Unmask, || {
            let _ = rustix::io::write(&self.sink, &1_u64.to_ne_bytes());
        });
        for port in ports {
            let number = port.0 as usize;
            let Some(channel) = self.channels.get_mut(number) else { continue };
            channel.masked = false;
            if std::mem::take(&mut channel.pending) {
                self.event(number);
            }
        }
    }

    fn notify(&mut self, port: Port) {
        self.clock.count(Call::Notify);
        self.clock.time(Stage::Notify, || self.enter_kernel());
        if let Some(channel) = self.channels.get_mut(port.0 as usize) {
            channel.notified = true;
        }
    }
}

/// The real storage; its calls are timed, and its system calls are counted as the engine makes them.
pub(crate) struct Timed {
    pub(crate) inner: LinuxStorage,
    /// Files are in memory: each transfer is one system call, made in `queue`.
    pub(crate) in_memory: bool,
    /// Files in memory are copied to and from without a call.
    pub(crate) straight: bool,
    pushed: u64,
    clock: Rc<Clock>,
}

impl Timed {
    pub(crate) fn new(inner: LinuxStorage, clock: Rc<Clock>) -> Timed {
        Timed { inner, in_memory: false, straight: false, pushed: 0, clock }
    }
}

impl Storage for Timed {
    fn open_image(&mut self, token: u64, image: &Image, access: Access) {
        self.inner.open_image(token, image, access);
    }

    fn set_left(&mut self, left: Left) {
        self.inner.set_left(left);
    }

    fn layers(&mut self, file: FileId) -> Option<Vec<Layer>> {
        self.inner.layers(file)
    }

    fn opened(&mut self) -> Option<(u64, Result<Opened, OpenError>)> {
        self.inner.opened()
    }

    fn close(&mut self, file: FileId) {
        self.inner.close(file);
    }

    fn buffers(&mut self) -> &mut Pool {
        self.inner.buffers()
    }

    fn direct(&mut self, file: FileId, kind: IoKind, offset_bytes: u64, length_bytes: u32) -> Option<Span> {
        if self.straight { self.inner.direct(file, kind, offset_bytes, length_bytes) } else { None }
    }

    fn takes_pages(&mut self, file: FileId) -> bool {
        self.straight && self.inner.takes_pages(file)
    }

    fn queue(&mut self, io: Io) {
        self.pushed += 1;
        if self.in_memory || self.pushed == EAGER_BATCH {
            self.pushed = 0;
            self.clock.count(Call::Storage);
        }
        self.clock.time(Stage::Queue, || self.inner.queue(io));
    }

    fn submit(&mut self) {
        if std::mem::take(&mut self.pushed) > 0 {
            self.clock.count(Call::Storage);
        }
        self.clock.time(Stage::Submit, || self.inner.submit());
    }

    fn done(&mut self) -> Option<Done> {
        self.clock.time(Stage::Reap, || self.inner.done())
    }
}
