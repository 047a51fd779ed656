//! Grants: ring pages are mapped, data is copied.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr;

use log::error;
use rustix::io::Errno;
use rustix::ioctl::{self, Updater};
use rustix::mm::{MapFlags, ProtFlags};

use crate::error::Error;
use crate::hypervisor::{CopyDirection, CopySegment, DomainId, GrantRef, HypervisorError, RingMapping};
use crate::limits::RING_PAGES_MAX;

const PATH: &str = "/dev/xen/gntdev";
const PAGE_BYTES: usize = 4096;

/// `GNTCOPY_source_gref`.
const SOURCE_IS_GRANT: u16 = 1;
/// `GNTCOPY_dest_gref`.
const DEST_IS_GRANT: u16 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct MapRef {
    domid: u32,
    gref: u32,
}

/// `struct ioctl_gntdev_map_grant_ref` with room for the largest ring.
#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    index: u64,
    refs: [MapRef; RING_PAGES_MAX],
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
struct UnmapGrantRef {
    index: u64,
    count: u32,
    pad: u32,
}

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
struct GrantCopy {
    count: u32,
    segments: *mut Segment,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Foreign {
    gref: u32,
    offset: u16,
    domid: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
union End {
    local: *mut u8,
    foreign: Foreign,
}

/// `struct gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    source: End,
    dest: End,
    len: u16,
    flags: u16,
    status: i16,
}

// The kernel's macros encode the size of the structure's fixed head: one element of the array for the map call.
const MAP_GRANT_REF: ioctl::Opcode = 0x0018_4700;
const UNMAP_GRANT_REF: ioctl::Opcode = 0x0010_4701;
const GRANT_COPY: ioctl::Opcode = 0x0010_4708;

#[derive(Debug)]
pub(super) struct GrantDevice {
    fd: OwnedFd,
    /// Reused by every copy; grows to the largest batch and stays.
    scratch: Vec<Segment>,
    mappings: Vec<Option<Mapped>>,
}

#[derive(Clone, Copy, Debug)]
struct Mapped {
    index: u64,
    count: u32,
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Segment(len {}, flags {}, status {})", self.len, self.flags, self.status)
    }
}

impl GrantDevice {
    pub(super) fn open() -> Result<GrantDevice, Error> {
        let fd = super::open_device(PATH, "xen-gntdev")?;
        Ok(GrantDevice { fd, scratch: Vec::new(), mappings: Vec::new() })
    }

    pub(super) fn map(
        &mut self,
        domain: DomainId,
        grants: &[GrantRef],
    ) -> Result<RingMapping, HypervisorError> {
        let count = grants.len();
        if count == 0 || count > RING_PAGES_MAX {
            return Err(HypervisorError::Failed("gntdev map: number of ring pages", libc::EINVAL));
        }
        let mut refs = [MapRef { domid: domain.into(), gref: 0 }; RING_PAGES_MAX];
        for (place, gref) in refs.iter_mut().zip(grants) {
            place.gref = *gref;
        }
        let count32 = u32::try_from(count).unwrap_or(0);
        let mut call = MapGrantRef { count: count32, pad: 0, index: 0, refs };
        // SAFETY: the kernel reads `count` elements of `refs`, which holds as many, and writes `index`.
        unsafe { ioctl::ioctl(self.fd.as_fd(), Updater::<MAP_GRANT_REF, MapGrantRef>::new(&mut call)) }
            .map_err(|errno| HypervisorError::Failed("gntdev map", errno.raw_os_error()))?;
        let length_bytes = count * PAGE_BYTES;
        // SAFETY: a fresh mapping at an address of the kernel's choice disturbs no memory of ours.
        let mapped = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                length_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                self.fd.as_fd(),
                call.index,
            )
        };
        match mapped {
            Ok(address) => {
                let id = self.remember(Mapped { index: call.index, count: count32 });
                Ok(RingMapping { id, address: address.cast(), length_bytes })
            }
            Err(errno) => {
                self.forget_grants(call.index, count32);
                // The references are only tried here: whatever is wrong with them is the guest's doing, while a lack of
                // memory or of mapping slots is ours.
                match errno {
                    Errno::NOMEM | Errno::NOSPC => {
                        Err(HypervisorError::Failed("gntdev mmap", errno.raw_os_error()))
                    }
                    _ => Err(HypervisorError::BadGrant(grants.first().copied().unwrap_or(0))),
                }
            }
        }
    }

    fn remember(&mut self, mapped: Mapped) -> u32 {
        let free = self.mappings.iter().position(Option::is_none).unwrap_or_else(|| {
            self.mappings.push(None);
            self.mappings.len() - 1
        });
        if let Some(place) = self.mappings.get_mut(free) {
            *place = Some(mapped);
        }
        u32::try_from(free).unwrap_or(u32::MAX)
    }

    pub(super) fn unmap(&mut self, mapping: RingMapping) {
        let Some(mapped) = self.mappings.get_mut(mapping.id as usize).and_then(Option::take) else {
            error!("a ring mapping was released twice: {mapping:?}");
            return;
        };
        // SAFETY: the address and length are those that `map` returned, and the id proved that they were not unmapped
        // before. The owner of the mapping has dropped its ring.
        if let Err(errno) = unsafe { rustix::mm::munmap(mapping.address.cast(), mapping.length_bytes) } {
            error!("munmap of a ring failed: {errno}");
        }
        self.forget_grants(mapped.index, mapped.count);
    }

    fn forget_grants(&self, index: u64, count: u32) {
        let mut call = UnmapGrantRef { index, count, pad: 0 };
        // SAFETY: the kernel reads the structure, which has the size that the opcode names.
        let result = unsafe {
            ioctl::ioctl(self.fd.as_fd(), Updater::<UNMAP_GRANT_REF, UnmapGrantRef>::new(&mut call))
        };
        if let Err(errno) = result {
            error!("gntdev unmap of {count} pages failed: {errno}");
        }
    }

    pub(super) fn copy(&mut self, segments: &mut [CopySegment]) -> Result<(), HypervisorError> {
        if segments.is_empty() {
            return Ok(());
        }
        self.scratch.clear();
        self.scratch.extend(segments.iter().map(kernel_segment));
        let count = u32::try_from(self.scratch.len())
            .map_err(|_| HypervisorError::Failed("gntdev copy: batch", libc::E2BIG))?;
        let mut call = GrantCopy { count, segments: self.scratch.as_mut_ptr() };
        // SAFETY: `segments` points to `count` elements of the kernel's layout; local ends lie in the arena, which is
        // never unmapped, and span `len` bytes (see `kernel_segment`).
        let result =
            unsafe { ioctl::ioctl(self.fd.as_fd(), Updater::<GRANT_COPY, GrantCopy>::new(&mut call)) };
        result.map_err(|errno| HypervisorError::Failed("gntdev copy", errno.raw_os_error()))?;
        for (segment, done) in segments.iter_mut().zip(&self.scratch) {
            segment.copied = done.status == 0;
        }
        Ok(())
    }
}

/// The kernel's form of a segment. The length is cut to the page, so that no bug above can name bytes behind a span.
fn kernel_segment(segment: &CopySegment) -> Segment {
    let room = PAGE_BYTES.saturating_sub(segment.offset_bytes.into());
    let len = (segment.local.length_bytes() as usize).min(room);
    let foreign =
        End { foreign: Foreign { gref: segment.grant, offset: segment.offset_bytes, domid: segment.domain } };
    let local = End { local: segment.local.address() };
    let (source, dest, flags) = match segment.direction {
        CopyDirection::FromGuest => (foreign, local, SOURCE_IS_GRANT),
        CopyDirection::ToGuest => (local, foreign, DEST_IS_GRANT),
    };
    // A status that the kernel does not set must not read as success.
    Segment { source, dest, len: u16::try_from(len).unwrap_or(0), flags, status: -1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    /// Numbers printed by a C program that includes Linux's `xen/gntdev.h`.
    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(MAP_GRANT_REF, (24 << 16) | (0x47 << 8));
        assert_eq!((offset_of!(MapGrantRef, index), offset_of!(MapGrantRef, refs)), (8, 16));
        assert_eq!((size_of::<UnmapGrantRef>(), offset_of!(UnmapGrantRef, count)), (16, 8));
        assert_eq!((size_of::<GrantCopy>(), offset_of!(GrantCopy, segments)), (16, 8));
        assert_eq!(size_of::<Segment>(), 24);
        assert_eq!((offset_of!(Segment, dest), offset_of!(Segment, len)), (8, 16));
        assert_eq!((offset_of!(Segment, flags), offset_of!(Segment, status)), (18, 20));
        assert_eq!((offset_of!(Foreign, offset), offset_of!(Foreign, domid)), (4, 6));
    }
}
