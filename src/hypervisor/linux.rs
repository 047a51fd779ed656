//! The hypervisor through Linux: `/dev/xen/gntdev` and `/dev/xen/evtchn`.
//!
//! Layouts and numbers are those of Linux's `include/uapi/xen/gntdev.h` and `evtchn.h` on 64-bit machines; the tests
//! below hold them to what a C compiler makes of those headers.

mod evtchn;
mod gntdev;

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{CopySegment, DomainId, GrantRef, Hypervisor, HypervisorError, Port, RingMapping};
use crate::error::Error;

fn open_device(path: &str, module: &str) -> Result<OwnedFd, Error> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).map_err(
        |errno| {
            let hint = match errno {
                Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                    format!("is this a Xen domain, and is the kernel module {module} loaded?")
                }
                Errno::ACCESS | Errno::PERM => "vbdd must run as root".to_owned(),
                _ => format!("see whether the kernel module {module} works"),
            };
            Error::new(format!("cannot open {path}: {errno}"), hint)
        },
    )
}

/// Both devices, open.
#[derive(Debug)]
pub struct LinuxHypervisor {
    grants: gntdev::GrantDevice,
    events: evtchn::EventDevice,
}

impl LinuxHypervisor {
    /// Opens both devices.
    ///
    /// # Errors
    /// Names the device and the kernel module that provides it.
    pub fn open() -> Result<LinuxHypervisor, Error> {
        Ok(LinuxHypervisor { grants: gntdev::GrantDevice::open()?, events: evtchn::EventDevice::open()? })
    }

    /// Becomes readable when a port has an event.
    #[must_use]
    pub fn events_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl Hypervisor for LinuxHypervisor {
    fn map(&mut self, domain: DomainId, grants: &[GrantRef]) -> Result<RingMapping, HypervisorError> {
        self.grants.map(domain, grants)
    }

    fn unmap(&mut self, mapping: RingMapping) {
        self.grants.unmap(mapping);
    }

    fn copy(&mut self, segments: &mut [CopySegment]) -> Result<(), HypervisorError> {
        self.grants.copy(segments)
    }

    fn bind(&mut self, domain: DomainId, remote_port: u32) -> Result<Port, HypervisorError> {
        self.events.bind(domain, remote_port)
    }

    fn unbind(&mut self, port: Port) {
        self.events.unbind(port);
    }

    fn pending(&mut self, ports: &mut Vec<Port>) {
        self.events.pending(ports);
    }

    fn unmask(&mut self, ports: &[Port]) {
        self.events.unmask(ports);
    }

    fn notify(&mut self, port: Port) {
        self.events.notify(port);
    }
}
