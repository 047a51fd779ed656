//! Changed metadata in memory that outlives the process.
//!
//! A guest's write into new space of an image is answered when its data are in the file and the entry that names them is
//! changed in memory. Should the host go down, that is what a guest expects of a disk with a cache: it has not flushed. But
//! should only this process be killed the guest lives on, and must find what it has written. So each changed page is also kept
//! in the state directory (see [`crate::journal`]) until it is written to the image; a successor writes what it finds there
//! to the image before it opens it.
//!
//! ```text
//! chunk    "metadata-N": page 0: 0 magic  8 when a page was kept last (seconds since 1970)  32 127 entries of 32 bytes
//!          from 4096 on two buffers of 4096 bytes for each entry
//! entry    0 state (0 free, 1 the first buffer counts, 2 the second)  4 length  8 st_dev  16 st_ino  24 offset in the image
//! ```
//!
//! A page that changes again goes to the buffer that does not count, then the state says so: a successor finds the old or the
//! new, each whole.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{Ordering, compiler_fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use formats::pages::Key;
use formats::{Keeper, PAGE_BYTES};

use crate::journal::{JournalStore, Memory};
use crate::limits::KEPT_CHUNKS_MAX;
use crate::storage::Identity;

const MAGIC: u64 = u64::from_le_bytes(*b"vbddmeta");
const HEAD_BYTES: usize = 4096;
const ENTRY_BYTES: usize = 32;
const ENTRIES: usize = (HEAD_BYTES - ENTRY_BYTES) / ENTRY_BYTES;
const KEPT_AT: usize = 8;
const CHUNK_BYTES: usize = HEAD_BYTES + ENTRIES * 2 * PAGE_BYTES;

/// What predecessors had changed of an image and not written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftPages {
    /// Where a page lies in the image, in bytes, and what it holds.
    pub pages: Vec<(u64, Vec<u8>)>,
    /// When the last of them was kept, or somewhat later: seconds since 1970.
    pub kept_at_seconds: u64,
}

/// What predecessors have left, by the file that it belongs to. Openers take it.
#[derive(Clone, Debug, Default)]
pub struct Left(Arc<Mutex<BTreeMap<Identity, LeftPages>>>);

impl Left {
    /// The pages of a file, to be written to it before it is opened for writing. They stay until the pump knows that this was done.
    #[must_use]
    pub fn of(&self, identity: Identity) -> LeftPages {
        let left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        left.get(&identity).cloned().unwrap_or_default()
    }

    fn add(&self, identity: Identity, page: (u64, Vec<u8>), kept_at_seconds: u64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = all.entry(identity).or_default();
        left.pages.push(page);
        left.kept_at_seconds = left.kept_at_seconds.max(kept_at_seconds);
    }

    fn remove(&self, identity: Identity) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&identity);
    }
}

/// One piece of that memory.
#[derive(Debug)]
struct Chunk {
    memory: Memory,
    used: usize,
}

/// An entry: which chunk, which of its entries.
type Place = (usize, usize);

#[derive(Debug, Default)]
struct Table {
    chunks: Vec<Chunk>,
    free: Vec<Place>,
    /// By the page's place in the cache.
    slots: BTreeMap<u32, Place>,
    /// What predecessors have left.
    orphans: BTreeMap<Identity, Vec<Place>>,
    /// Leaves of open disks.
    names: BTreeMap<u32, Identity>,
    /// There was no memory for a page: the log knows.
    full: bool,
}

/// The shared handle of the journals.
pub(crate) type Journals = Rc<RefCell<Box<dyn JournalStore>>>;

/// Keeps pages in chunks of memory that outlive the process. Clones are the same.
#[derive(Clone)]
pub(crate) struct Kept {
    table: Rc<RefCell<Table>>,
    journals: Journals,
    left: Left,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kept({} chunks)", self.table.borrow().chunks.len())
    }
}

fn name_of(chunk: usize) -> String {
    format!("metadata-{chunk}")
}

impl Chunk {
    /// A number of an entry, or of the head.
    fn number(&self, at: usize) -> u64 {
        assert!(at + 8 <= HEAD_BYTES && at.is_multiple_of(8));
        // SAFETY: within the head of a chunk, aligned, and nobody else touches it.
        unsafe { self.memory.address().add(at).cast::<u64>().read_volatile() }
    }

    fn set_number(&self, at: usize, value: u64) {
        assert!(at + 8 <= HEAD_BYTES && at.is_multiple_of(8));
        compiler_fence(Ordering::SeqCst);
        // SAFETY: as in `number`.
        unsafe { self.memory.address().add(at).cast::<u64>().write_volatile(value) };
        compiler_fence(Ordering::SeqCst);
    }

    /// State and length, which change together.
    fn state(&self, entry: usize) -> (u32, usize) {
        let word = self.number((entry + 1) * ENTRY_BYTES);
        let bytes = word.to_le_bytes();
        let [a, b, c, d, e, f, g, h] = bytes;
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]) as usize)
    }

    fn set_state(&self, entry: usize, state: u32, length: usize) {
        let length = u32::try_from(length).unwrap_or(0);
        self.set_number((entry + 1) * ENTRY_BYTES, u64::from(state) | u64::from(length) << 32);
    }

    fn buffer(&self, entry: usize, second: bool) -> *mut u8 {
        let at = HEAD_BYTES + (entry * 2 + usize::from(second)) * PAGE_BYTES;
        assert!(at + PAGE_BYTES <= self.memory.length_bytes());
        self.memory.address().wrapping_add(at)
    }

    fn store(&self, entry: usize, second: bool, bytes: &[u8]) {
        let length = bytes.len().min(PAGE_BYTES);
        // SAFETY: `buffer` has checked that a page's room lies in the chunk; nobody else touches it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.buffer(entry, second), length) };
    }

    fn load(&self, entry: usize, second: bool, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length.min(PAGE_BYTES)];
        // SAFETY: as in `store`.
        unsafe { std::ptr::copy_nonoverlapping(self.buffer(entry, second), bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }
}

/// Stand for `st_dev` where it is no file: no file system has these numbers.
const DEVICE: u64 = u64::MAX;
const REMOTE: u64 = u64::MAX - 1;

/// A file as two numbers, and back.
fn numbers_of(identity: Identity) -> (u64, u64) {
    match identity {
        Identity::File { device, inode } => (device, inode),
        Identity::Device { number } => (DEVICE, number),
        Identity::Remote { number } => (REMOTE, number),
    }
}

fn identity_of(device: u64, inode: u64) -> Identity {
    match device {
        DEVICE => Identity::Device { number: inode },
        REMOTE => Identity::Remote { number: inode },
        device => Identity::File { device, inode },
    }
}

impl Kept {
    /// Looks for what predecessors have left.
    pub(crate) fn new(journals: Journals) -> Kept {
        let kept = Kept { table: Rc::default(), journals, left: Left::default() };
        while kept.add_chunk(true) {}
        kept.tidy();
        kept
    }

    /// What predecessors have left, for whoever opens images.
    pub(crate) fn left(&self) -> Left {
        self.left.clone()
    }

    /// Maps the next chunk. With `existing` only one that a predecessor has used: false where there is none.
    fn add_chunk(&self, existing: bool) -> bool {
        let mut table = self.table.borrow_mut();
        let number = table.chunks.len();
        if number >= KEPT_CHUNKS_MAX {
            return false;
        }
        let mut journals = self.journals.borrow_mut();
        let Some(memory) = journals.open(&name_of(number), CHUNK_BYTES) else { return false };
        let mut chunk = Chunk { memory, used: 0 };
        if chunk.number(0) != MAGIC {
            if existing {
                journals.close(&name_of(number), memory, true);
                return false;
            }
            chunk.set_number(0, MAGIC);
        }
        for entry in (0..ENTRIES).rev() {
            let (state, length) = chunk.state(entry);
            if state == 0 {
                table.free.push((number, entry));
                continue;
            }
            let at = (entry + 1) * ENTRY_BYTES;
            let identity = identity_of(chunk.number(at + 8), chunk.number(at + 16));
            let page = (chunk.number(at + 24), chunk.load(entry, state == 2, length));
            self.left.add(identity, page, chunk.number(KEPT_AT));
            table.orphans.entry(identity).or_default().push((number, entry));
            chunk.used += 1;
        }
        table.chunks.push(chunk);
        true
    }

    /// What predecessors have left of a file is in it now, or not wanted.
    pub(crate) fn written(&self, identity: Identity) {
        self.left.remove(identity);
        let places = self.table.borrow_mut().orphans.remove(&identity);
        for place in places.into_iter().flatten() {
            self.give_back(place);
        }
    }

    /// Says which file a disk's pages belong to, while it is open.
    pub(crate) fn name(&self, disk: u32, identity: Option<Identity>) {
        let names = &mut self.table.borrow_mut().names;
        match identity {
            Some(identity) => names.insert(disk, identity),
            None => names.remove(&disk),
        };
    }

    fn give_back(&self, (number, entry): Place) {
        let mut table = self.table.borrow_mut();
        if let Some(chunk) = table.chunks.get_mut(number) {
            chunk.set_state(entry, 0, 0);
            chunk.used = chunk.used.saturating_sub(1);
            table.free.push((number, entry));
        }
        drop(table);
        self.tidy();
    }

    /// Where nothing is kept nothing need be there for a successor.
    fn tidy(&self) {
        let mut table = self.table.borrow_mut();
        if table.chunks.iter().any(|chunk| chunk.used > 0) {
            return;
        }
        table.free.clear();
        table.full = false;
        // The last first: a successor looks for them from the first on.
        while let Some(chunk) = table.chunks.pop() {
            self.journals.borrow_mut().close(&name_of(table.chunks.len()), chunk.memory, true);
        }
    }

    fn take_place(&self) -> Option<Place> {
        let place = self.table.borrow_mut().free.pop();
        if place.is_some() {
            return place;
        }
        let has_more = self.add_chunk(false);
        let mut table = self.table.borrow_mut();
        if !has_more && !std::mem::replace(&mut table.full, true) {
            log::warn!(
                "no room to keep changed metadata in the state directory: should vbdd be killed now, guests lose writes \
                 that they have not flushed"
            );
        }
        table.free.pop()
    }
}

impl Keeper for Kept {
    fn keep(&mut self, slot: u32, key: &Key, bytes: &[u8]) {
        let numbers = self.table.borrow().names.get(&key.disk).map(|identity| numbers_of(*identity));
        let Some((device, inode)) = numbers else { return };
        let known = self.table.borrow().slots.get(&slot).copied();
        let Some(place) = known.or_else(|| self.take_place()) else { return };
        let mut table = self.table.borrow_mut();
        let (number, entry) = place;
        let Some(chunk) = table.chunks.get_mut(number) else { return };
        let second = chunk.state(entry).0 == 1;
        chunk.store(entry, second, bytes);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        chunk.set_number(KEPT_AT, now.map_or(0, |now| now.as_secs()));
        if known.is_none() {
            let at = (entry + 1) * ENTRY_BYTES;
            chunk.set_number(at + 8, device);
            chunk.set_number(at + 16, inode);
            chunk.set_number(at + 24, key.offset_bytes);
            chunk.used += 1;
        }
        chunk.set_state(entry, if second { 2 } else { 1 }, bytes.len());
        table.slots.insert(slot, place);
    }

    fn release(&mut self, slot: u32) {
        let place = self.table.borrow_mut().slots.remove(&slot);
        if let Some(place) = place {
            self.give_back(place);
        }
    }
}

#[cfg(test)]
mod tests;
