//! Opening an image and finding out what its medium asks of transfers. Runs on an opener thread: everything here may block.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FlockOperation, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::changes::punch;
use super::legs::{BLOCK_BYTES_MAX, SECTOR_BYTES, Shape};
use super::linux::Alignment;
use super::remote::Connected;
use super::{Access, DiscardUnit, Identity, OpenError};
use crate::images::{Image, Roots, explain};

/// `statfs` numbers of file systems that live in memory (`linux/magic.h`): tmpfs, ramfs, hugetlbfs.
const MEMORY_MAGIC: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// How often, and how long apart, a device that was busy is tried again: our own last claim of it may still be on its way
/// out, when a guest hands its disk from a boot loader to a kernel.
const BUSY_TRIES: u32 = 40;
const BUSY_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// The largest physical block that is believed, in bytes.
const PHYSICAL_BYTES_MAX: u32 = 65536;

/// How a file's transfers are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// By the engine, past the page cache.
    Direct,
    /// By the engine, through the page cache.
    Cached,
    /// At once, by the calling thread: the file lives in memory.
    Memory,
    /// By a server: its descriptor here stands for it, and no transfer goes there.
    Remote,
}

/// An opened image, on its way from the opener to the owner of the file table.
#[derive(Debug)]
pub(super) struct Prepared {
    pub fd: OwnedFd,
    /// For the ragged end that `O_DIRECT` cannot reach.
    pub tail: Option<OwnedFd>,
    pub path: Path,
    pub shape: Shape,
    pub access: Access,
    pub identity: Identity,
    pub physical_block_bytes: u32,
    pub discard: Option<DiscardUnit>,
    /// The unit in which the file system keeps it, in bytes: what zeroes of less are to be written.
    pub unit_bytes: u32,
    pub locked: bool,
    /// The connection to its server.
    pub remote: Option<Box<Connected>>,
}

/// Opens what `path` names.
pub(super) fn open(
    roots: &Arc<Roots>,
    path: &str,
    access: Access,
    direct: bool,
    least: Option<Alignment>,
) -> Result<Prepared, OpenError> {
    let image = roots.locate(path)?;
    let fail = |errno| explain(path, errno, Some(access));
    let opening = Opening { roots, image: &image, access };
    let cached = |fd: OwnedFd, in_memory: bool| opening.cached(path, fd, in_memory);
    if direct {
        match opening.attempt(OFlags::DIRECT) {
            Ok(fd) => {
                let in_memory = !image.is_device() && is_in_memory(&fd);
                if !in_memory && let Some((block, memory)) = alignment(&fd, image.is_device(), least) {
                    return opening.direct(path, fd, block, memory);
                }
                // Before the second open: the claim on a device excludes ourselves too.
                drop(fd);
                return cached(opening.attempt(OFlags::empty()).map_err(fail)?, in_memory);
            }
            Err(Errno::INVAL) => {}
            Err(errno) => return Err(fail(errno)),
        }
    }
    let fd = opening.attempt(OFlags::empty()).map_err(fail)?;
    let in_memory = !image.is_device() && is_in_memory(&fd);
    cached(fd, in_memory)
}

impl Prepared {
    /// Looks at the size again: a repair may have cut the file.
    pub(super) fn remeasure(&mut self, path: &str) -> Result<(), OpenError> {
        if self.path == Path::Remote {
            return Ok(());
        }
        let size = size(path, &self.fd)?;
        if size != self.shape.size {
            self.shape = self.shape.resized(size, self.tail.is_some());
        }
        Ok(())
    }
}

struct Opening<'a> {
    roots: &'a Roots,
    image: &'a Image,
    access: Access,
}

impl Opening<'_> {
    fn attempt(&self, extra: OFlags) -> Result<OwnedFd, Errno> {
        let mut tries = 0;
        loop {
            match self.roots.open(self.image, self.access, extra) {
                Err(Errno::BUSY) if tries < BUSY_TRIES => {
                    tries += 1;
                    std::thread::sleep(BUSY_PAUSE);
                }
                Err(Errno::INTR) => {}
                other => return other,
            }
        }
    }

    fn direct(&self, path: &str, fd: OwnedFd, block: u32, memory: u32) -> Result<Prepared, OpenError> {
        let fail = |errno| explain(path, errno, Some(self.access));
        let shape = Shape::new(size(path, &fd)?, block, memory);
        // A file may get a ragged end yet, if its length changes by less than a block.
        let may_get_ragged =
            block > SECTOR_BYTES && self.access != Access::ReadOnly && !self.image.is_device();
        let tail = match shape.tail {
            u64::MAX if !may_get_ragged => None,
            _ => Some(self.attempt(OFlags::empty()).map_err(fail)?),
        };
        Ok(self.prepared(fd, tail, Path::Direct, shape))
    }

    fn cached(&self, path: &str, fd: OwnedFd, in_memory: bool) -> Result<Prepared, OpenError> {
        let shape = Shape::new(size(path, &fd)?, 1, 1).cached();
        let way = if in_memory { Path::Memory } else { Path::Cached };
        Ok(self.prepared(fd, None, way, shape))
    }

    fn prepared(&self, fd: OwnedFd, tail: Option<OwnedFd>, path: Path, shape: Shape) -> Prepared {
        let physical_block_bytes = physical_block(&fd, self.image, shape.block);
        let (access, identity) = (self.access, self.image.identity);
        let locked = access != Access::ReadWrite || self.image.is_device() || lock(&fd);
        let discard = if access == Access::ReadOnly { None } else { discard_unit(&fd, self.image, shape) };
        let unit_bytes = match path {
            Path::Memory => SECTOR_BYTES,
            _ => unit(&fd, self.image).max(shape.block),
        };
        Prepared {
            fd,
            tail,
            path,
            shape,
            access,
            identity,
            physical_block_bytes,
            discard,
            unit_bytes,
            locked,
            remote: None,
        }
    }
}

/// Takes the file's `flock`. It belongs to the open file, which transfers in flight keep open beyond the death of their
/// process: whoever gets the lock knows that no write of a predecessor can still land. Devices have their claim for that.
/// It does not clash with the byte locks that QEMU's tools take.
fn lock(fd: &OwnedFd) -> bool {
    tried(|| {
        let lock = || rustix::fs::flock(fd, FlockOperation::NonBlockingLockExclusive);
        // A file system without locks cannot be asked.
        rustix::io::retry_on_intr(lock) != Err(Errno::WOULDBLOCK)
    })
}

/// Tries again and again for a while what somebody who is on his way out may hinder.
pub(super) fn tried(attempt: impl Fn() -> bool) -> bool {
    for _ in 0..BUSY_TRIES {
        if attempt() {
            return true;
        }
        std::thread::sleep(BUSY_PAUSE);
    }
    attempt()
}

/// Size in bytes, of a file or a device.
fn size(path: &str, fd: &OwnedFd) -> Result<u64, OpenError> {
    let size = rustix::fs::seek(fd, SeekFrom::End(0)).map_err(|errno| explain(path, errno, None))?;
    if size == 0 {
        let reason =
            String::from("is empty (0 bytes); an image must have its full size before it is attached");
        return Err(OpenError { path: path.into(), reason });
    }
    Ok(size)
}

/// The size of an open file or device in bytes, as far as the kernel knows it without asking a file server. Not 0: then it
/// is being replaced, or it is no longer there.
pub(super) fn size_now(fd: &OwnedFd) -> Option<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(fd, "", flags, StatxFlags::SIZE | StatxFlags::TYPE).ok()?;
    let kind = rustix::fs::FileType::from_raw_mode(stat.stx_mode.into());
    let size = match kind {
        rustix::fs::FileType::BlockDevice => rustix::fs::seek(fd, SeekFrom::End(0)).ok()?,
        _ => stat.stx_size,
    };
    (size > 0).then_some(size)
}

fn is_in_memory(fd: &OwnedFd) -> bool {
    rustix::fs::fstatfs(fd).is_ok_and(|stat| MEMORY_MAGIC.contains(&(stat.f_type & 0xffff_ffff)))
}

/// What block and memory alignment direct transfers need, in bytes; `None` when they do not work at all.
///
/// What the kernel says is tried with a real read, since file systems differ between what they say and what they take.
fn alignment(fd: &OwnedFd, is_device: bool, least: Option<Alignment>) -> Option<(u32, u32)> {
    let (mut block, mut memory) = told(fd, is_device)?;
    if let Some(least) = least {
        block = block.max(least.block_bytes.next_power_of_two());
        memory = memory.max(least.memory_bytes.next_power_of_two());
    }
    let mut block = block.clamp(SECTOR_BYTES, BLOCK_BYTES_MAX);
    let mut memory = memory.clamp(1, BLOCK_BYTES_MAX);
    loop {
        match trial(fd, block, memory) {
            Ok(()) => return Some((block, memory)),
            Err(Errno::INVAL) if memory < block => memory = block,
            Err(Errno::INVAL) if block < BLOCK_BYTES_MAX => {
                block *= 2;
                memory = block;
            }
            Err(Errno::INVAL) => return None,
            // The first sectors cannot be read: the guest may still get at the rest.
            Err(_) => return Some((BLOCK_BYTES_MAX, BLOCK_BYTES_MAX)),
        }
    }
}

/// What the kernel says, or the least where it says nothing.
fn told(fd: &OwnedFd, is_device: bool) -> Option<(u32, u32)> {
    let mut block = SECTOR_BYTES;
    if is_device {
        block = rustix::fs::ioctl_blksszget(fd).unwrap_or(SECTOR_BYTES);
    }
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    match stat {
        // Linux 6.1 and a file system that knows.
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            let (offset, memory) = (stat.stx_dio_offset_align, stat.stx_dio_mem_align);
            let sane = |value: u32| value.is_power_of_two() && value <= BLOCK_BYTES_MAX;
            (sane(offset) && sane(memory)).then_some((offset.max(block), memory))
        }
        _ => Some((block, block)),
    }
}

/// Reads one block of the file into memory that is aligned no better than asked.
fn trial(fd: &OwnedFd, block: u32, memory: u32) -> Result<(), Errno> {
    let (block, memory) = (block as usize, memory as usize);
    let mut room = vec![0u8; block + 2 * BLOCK_BYTES_MAX as usize];
    let page = BLOCK_BYTES_MAX as usize;
    let start = room.as_ptr() as usize;
    let skip = start.next_multiple_of(page) - start + memory % page;
    let target = room.get_mut(skip..skip + block).ok_or(Errno::INVAL)?;
    rustix::io::retry_on_intr(|| rustix::io::pread(fd, &mut *target, 0)).map(|_| ())
}

/// The block that the medium writes without reading first, in bytes.
fn physical_block(fd: &OwnedFd, image: &Image, block: u32) -> u32 {
    let told = match image.identity {
        Identity::Device { .. } => rustix::fs::ioctl_blkpbszget(fd).ok(),
        Identity::Remote { .. } => None,
        Identity::File { device, .. } => from_sysfs(device),
    };
    let least = block.max(SECTOR_BYTES);
    let sane = |value: &u32| value.is_power_of_two() && (least..=PHYSICAL_BYTES_MAX).contains(value);
    told.filter(sane).unwrap_or(least)
}

/// The largest unit of discard that is believed, in bytes.
const DISCARD_BYTES_MAX: u32 = 64 << 20;

/// What a file system keeps a file in, or the largest block of a device, in bytes.
fn unit(fd: &OwnedFd, image: &Image) -> u32 {
    if image.is_device() {
        return SECTOR_BYTES;
    }
    let told = rustix::fs::fstat(fd).ok().and_then(|stat| u32::try_from(stat.st_blksize).ok());
    told.filter(|bytes| bytes.is_power_of_two() && *bytes <= DISCARD_BYTES_MAX)
        .unwrap_or(BLOCK_BYTES_MAX)
        .max(SECTOR_BYTES)
}

/// The units in which the medium lets content go; `None` where it cannot.
fn discard_unit(fd: &OwnedFd, image: &Image, shape: Shape) -> Option<DiscardUnit> {
    let unit = match image.identity {
        Identity::Device { number } => device_discard_unit(number)?,
        Identity::Remote { .. } => return None,
        Identity::File { .. } => DiscardUnit { granularity_bytes: unit(fd, image), alignment_bytes: 0 },
    };
    let granularity_bytes = unit.granularity_bytes.max(shape.block).max(SECTOR_BYTES);
    let sane = granularity_bytes.is_multiple_of(SECTOR_BYTES) && granularity_bytes <= DISCARD_BYTES_MAX;
    let unit = DiscardUnit { granularity_bytes, alignment_bytes: unit.alignment_bytes % granularity_bytes };
    // Behind the end of a file there is nothing to lose: a file system that knows no holes says so.
    let behind = shape.size.checked_next_multiple_of(granularity_bytes.into())?;
    let is_device = matches!(image.identity, Identity::Device { .. });
    let works = is_device || punch(fd.as_fd(), behind, granularity_bytes.into()).is_ok();
    (sane && works).then_some(unit)
}

/// What the kernel says of a device: `queue/discard_granularity`, 0 where it discards nothing, and `discard_alignment`. A
/// partition has its parent's queue and an alignment of its own.
fn device_discard_unit(number: u64) -> Option<DiscardUnit> {
    let queue = |name: &str| {
        let names = [format!("queue/{name}"), format!("../queue/{name}")];
        names.iter().find_map(|name| sysfs_number(number, name))
    };
    let (granularity, most) = (queue("discard_granularity")?, queue("discard_max_bytes")?);
    let alignment = sysfs_number(number, "discard_alignment").unwrap_or(0);
    let granularity_bytes = u32::try_from(granularity).ok().filter(|bytes| *bytes > 0 && most > 0)?;
    Some(DiscardUnit { granularity_bytes, alignment_bytes: u32::try_from(alignment).unwrap_or(0) })
}

/// A number that the kernel tells of a block device.
fn sysfs_number(device: u64, name: &str) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{name}")).ok()?;
    text.trim().parse().ok()
}

/// The physical block of the device that holds a file system, where it is a single one. For a partition the queue is its
/// parent's.
fn from_sysfs(device: u64) -> Option<u32> {
    let names = ["queue/physical_block_size", "../queue/physical_block_size"];
    names.iter().find_map(|name| u32::try_from(sysfs_number(device, name)?).ok())
}
