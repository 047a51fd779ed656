//! Event channels.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use log::error;
use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode};

use crate::error::Error;
use crate::hypervisor::{DomainId, HypervisorError, Port};

const PATH: &str = "/dev/xen/evtchn";

const BIND_INTERDOMAIN: Opcode = 0x0008_4501;
const UNBIND: Opcode = 0x0004_4503;
const NOTIFY: Opcode = 0x0004_4504;
const RESET: Opcode = 0x0000_4505;

/// Ports that are read or unmasked with one call. Few, as the memory for them is cleared each time.
const PORTS_PER_READ: usize = 32;

/// A call whose result is the ioctl's return value, with a structure going in.
struct Call<const OPCODE: Opcode, T>(T);

// SAFETY: the opcodes above only read the structure, whose layout is that of `linux/include/uapi/xen/evtchn.h`.
unsafe impl<const OPCODE: Opcode, T> Ioctl for Call<OPCODE, T> {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::from_mut(&mut self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<u32> {
        u32::try_from(out).map_err(|_| Errno::INVAL)
    }
}

#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

#[derive(Debug)]
pub(super) struct EventDevice {
    fd: OwnedFd,
    /// Ports that are bound, ascending: after an overflow each of them may have lost its event.
    bound: Vec<Port>,
}

impl EventDevice {
    pub(super) fn open() -> Result<EventDevice, Error> {
        Ok(EventDevice { fd: super::open_device(PATH, "xen-evtchn")?, bound: Vec::new() })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn call<const OPCODE: Opcode, T>(&self, argument: T) -> rustix::io::Result<u32> {
        // SAFETY: `Call` is only made here, with the opcode and the structure that belong together.
        unsafe { ioctl::ioctl(self.fd.as_fd(), Call::<OPCODE, T>(argument)) }
    }

    pub(super) fn bind(&mut self, domain: DomainId, remote_port: u32) -> Result<Port, HypervisorError> {
        let ends = BindInterdomain { remote_domain: domain.into(), remote_port };
        match self.call::<BIND_INTERDOMAIN, _>(ends) {
            Ok(number) => {
                let port = Port(number);
                if let Err(place) = self.bound.binary_search(&port) {
                    self.bound.insert(place, port);
                }
                Ok(port)
            }
            Err(errno @ (Errno::NOMEM | Errno::NOSPC)) => {
                Err(HypervisorError::Failed("evtchn bind", errno.raw_os_error()))
            }
            Err(_) => Err(HypervisorError::BadPort(remote_port)),
        }
    }

    pub(super) fn unbind(&mut self, port: Port) {
        if let Ok(place) = self.bound.binary_search(&port) {
            self.bound.remove(place);
        }
        if let Err(errno) = self.call::<UNBIND, _>(port.0) {
            error!("evtchn unbind of port {} failed: {errno}", port.0);
        }
    }

    pub(super) fn pending(&mut self, ports: &mut Vec<Port>) {
        let mut bytes = [0_u8; PORTS_PER_READ * 4];
        loop {
            match rustix::io::read(&self.fd, &mut bytes) {
                Ok(length) => {
                    let (numbers, _) = bytes.get(..length).unwrap_or(&[]).as_chunks::<4>();
                    let numbers = numbers.iter().map(|number| Port(u32::from_ne_bytes(*number)));
                    // Ports read after their unbinding are stale.
                    ports.extend(numbers.filter(|port| self.bound.binary_search(port).is_ok()));
                    if length < bytes.len() {
                        return;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::FBIG) => return self.recover_from_overflow(ports),
                Err(Errno::AGAIN) => return,
                Err(errno) => return error!("reading {PATH} failed: {errno}"),
            }
        }
    }

    /// The kernel dropped events for want of room. It masked those ports, so each bound port counts as pending: its
    /// owner looks at the ring and unmasks it.
    fn recover_from_overflow(&mut self, ports: &mut Vec<Port>) {
        error!("the kernel's queue of events overflowed; looking at all {} rings", self.bound.len());
        if let Err(errno) = self.call::<RESET, _>(0_u32) {
            error!("evtchn reset failed: {errno}");
        }
        ports.clear();
        ports.extend_from_slice(&self.bound);
    }

    pub(super) fn unmask(&mut self, ports: &[Port]) {
        let mut bytes = [0_u8; PORTS_PER_READ * 4];
        for some in ports.chunks(PORTS_PER_READ) {
            let (places, _) = bytes.as_chunks_mut::<4>();
            for (place, port) in places.iter_mut().zip(some) {
                *place = port.0.to_ne_bytes();
            }
            let used = bytes.get(..some.len() * 4).unwrap_or(&[]);
            if let Err(errno) = rustix::io::write(&self.fd, used) {
                error!("unmasking {} ports failed: {errno}", some.len());
            }
        }
    }

    pub(super) fn notify(&mut self, port: Port) {
        // A guest that died has closed its end: nobody is left to be told.
        if let Err(errno) = self.call::<NOTIFY, _>(port.0) {
            log::debug!("notifying port {} failed: {errno}", port.0);
        }
    }
}
