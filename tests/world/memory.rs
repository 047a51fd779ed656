//! A guest's memory, which both sides map: what is unmapped is really gone, so that touching it ends the test.

use std::os::fd::OwnedFd;
use std::ptr;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

pub const PAGE: usize = 4096;

/// Pages of one domain, mapped once for the guest itself.
#[derive(Debug)]
pub struct GuestMemory {
    file: OwnedFd,
    base: *mut u8,
    pages: usize,
}

impl GuestMemory {
    pub fn new(pages: usize) -> GuestMemory {
        let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, (pages * PAGE) as u64).unwrap();
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                pages * PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        GuestMemory { file, base: base.unwrap().cast(), pages }
    }

    /// First byte of a page, in the guest's own mapping.
    pub fn page(&self, frame: usize) -> *mut u8 {
        assert!(frame < self.pages);
        self.base.wrapping_add(frame * PAGE)
    }

    pub fn write(&self, frame: usize, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE);
        // SAFETY: within the page by the line above; the world is single-threaded, and no slice of it is borrowed.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.page(frame).add(offset), bytes.len()) }
    }

    pub fn read(&self, frame: usize, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= PAGE);
        // SAFETY: as in `write`.
        unsafe { ptr::copy_nonoverlapping(self.page(frame).add(offset), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Maps `frames` once more, one behind the other: the backend's view. It outlives this value.
    pub fn map_again(&self, frames: &[usize]) -> *mut u8 {
        let length = frames.len() * PAGE;
        // SAFETY: a fresh reservation, no access.
        let base = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), length, ProtFlags::empty(), MapFlags::PRIVATE)
        }
        .unwrap();
        for (n, frame) in frames.iter().enumerate() {
            assert!(*frame < self.pages);
            // SAFETY: replaces a page of the reservation just made.
            unsafe {
                rustix::mm::mmap(
                    base.wrapping_byte_add(n * PAGE),
                    PAGE,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED,
                    &self.file,
                    (*frame * PAGE) as u64,
                )
            }
            .unwrap();
        }
        base.cast()
    }
}

/// Ends a view made by [`GuestMemory::map_again`].
pub fn unmap(address: *mut u8, length_bytes: usize) {
    // SAFETY: the hypervisor twin calls this once for each view; whoever touches it later dies of it, as intended.
    unsafe { rustix::mm::munmap(address.cast(), length_bytes) }.unwrap();
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        unmap(self.base, self.pages * PAGE);
    }
}
