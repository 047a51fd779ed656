//! The in-flight journal: what a successor must know to take over a live ring exactly.
//!
//! Responses overwrite the ring's slots in the order in which requests finish, so a ring alone does not tell which of
//! its requests are still owed an answer. Each queue therefore keeps a copy of every request that it has taken in memory
//! that outlives the process (a file on tmpfs, mapped). It is written by plain stores, no system call; it survives the
//! death of the process at any instruction, and need not survive that of the machine, since the guests' rings do not.
//!
//! ```text
//! page 0   0 magic  8 length of the record (u32)  12 the record: who this ring is, bincode   4088 rsp_prod as published
//! entry n  at 4096 + n*128:  0 state  4 response index  8 order of taking  12 -  16..128 the slot as it was on the ring
//! state    0 free   1 taken, not answered   2 answered; the answer counts once the ring's rsp_prod has passed its index
//! ```
//!
//! An entry's bytes are complete before its state says so, and a state of 2 is written before `rsp_prod` moves. A process
//! that dies between the two leaves an entry whose index `rsp_prod` has not passed: that request is done again, which
//! is harmless, as the guest has not seen an answer and its pages are still granted.

mod directory;

pub use directory::JournalDirectory;

use std::sync::atomic::{AtomicU32, Ordering, compiler_fence};

use bincode::{Decode, Encode};
use rings::LARGEST_STRIDE;

const MAGIC: u64 = u64::from_le_bytes(*b"vbddring");
const HEAD_BYTES: usize = 4096;
const ENTRY_BYTES: usize = 128;
const SLOT_AT: usize = 16;
const PUBLISHED_AT: usize = 4088;
const RECORD_BYTES: usize = PUBLISHED_AT - 12;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
const ANSWERED: u32 = 2;

/// Which ring a journal belongs to. A successor goes by the journal only if all of it agrees with what it maps.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RingRecord {
    /// Version of this record and of the entries.
    pub version: u16,
    /// The guest.
    pub domain: u16,
    /// The ABI's `protocol` text.
    pub protocol: String,
    /// The ring's grant references.
    pub grants: Vec<u32>,
    /// The guest's event channel.
    pub remote_port: u32,
}

/// The version that this code writes and reads.
pub const RECORD_VERSION: u16 = 1;

/// Memory that outlives the process: page-aligned, zero when new, shared by no other thread.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    address: *mut u8,
    length_bytes: usize,
}

impl Memory {
    /// Length that a journal for a ring of `entries` needs.
    #[must_use]
    pub fn needed_bytes(entries: u32) -> usize {
        HEAD_BYTES + entries as usize * ENTRY_BYTES
    }

    /// Names memory for a journal.
    ///
    /// # Safety
    /// `address` must be aligned to 4096 bytes and point to `length_bytes` bytes that stay readable and writable for as
    /// long as any [`Journal`] made of it lives, and no other code of this process may touch them.
    #[must_use]
    pub unsafe fn new(address: *mut u8, length_bytes: usize) -> Memory {
        Memory { address, length_bytes }
    }

    /// First byte.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> usize {
        self.length_bytes
    }
}

/// Where journals live: a directory on tmpfs, or the simulated world.
pub trait JournalStore {
    /// The memory of the journal called `name`, created with zeroes if it does not exist. `None` when there is no room;
    /// the ring is then served without one.
    fn open(&mut self, name: &str, length_bytes: usize) -> Option<Memory>;

    /// Lets go of the memory, and of the journal itself where `remove` says that nobody will need it again.
    fn close(&mut self, name: &str, memory: Memory, remove: bool);
}

/// Keeps nothing: for a process that serves no ring.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoJournals;

impl JournalStore for NoJournals {
    fn open(&mut self, _: &str, _: usize) -> Option<Memory> {
        None
    }

    fn close(&mut self, _: &str, _: Memory, _: bool) {}
}

/// A request that the predecessor had taken and not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owed {
    /// The journal's entry that holds it.
    pub entry: u32,
    order: u32,
    /// The slot's bytes.
    pub bytes: [u8; LARGEST_STRIDE],
}

/// The journal of one queue.
#[derive(Debug)]
pub struct Journal {
    memory: Memory,
    entries: u32,
    order: u32,
}

impl Journal {
    /// Starts an empty journal for the ring that `record` names, and that has answered `responses_produced` requests.
    #[must_use]
    pub fn create(
        memory: Memory,
        entries: u32,
        record: &RingRecord,
        responses_produced: u32,
    ) -> Option<Journal> {
        let mut journal = Journal::over(memory, entries)?;
        journal.store_magic(0);
        journal.produced(responses_produced);
        for entry in 0..entries {
            journal.store(entry, 0, FREE);
        }
        let mut bytes = [0_u8; RECORD_BYTES];
        let length = bincode::encode_into_slice(record, &mut bytes, bincode::config::standard()).ok()?;
        journal.write(8, &u32::try_from(length).ok()?.to_le_bytes());
        journal.write(12, bytes.get(..length)?);
        journal.store_magic(MAGIC);
        Some(journal)
    }

    /// Opens a predecessor's journal of the same ring, with what it still owed at `responses_produced`, in the order of
    /// taking. `None` if the memory holds no journal of that ring. Nothing that is owed is forgotten on the way, so that
    /// a process that dies while it takes over leaves the same journal to the next.
    #[must_use]
    pub fn inherit(
        memory: Memory,
        entries: u32,
        record: &RingRecord,
        responses_produced: u32,
    ) -> Option<(Journal, Vec<Owed>)> {
        let mut journal = Journal::over(memory, entries)?;
        if journal.load_magic() != MAGIC {
            return None;
        }
        let length = u32::from_le_bytes(journal.read::<4>(8)) as usize;
        let head = journal.read::<RECORD_BYTES>(12);
        let bytes = head.get(..length)?;
        let (found, _): (RingRecord, usize) =
            bincode::decode_from_slice(bytes, bincode::config::standard().with_limit::<HEAD_BYTES>()).ok()?;
        if found != *record {
            return None;
        }
        // A ring that is behind what was published is another ring, that happens to have the same references.
        let published = u32::from_le_bytes(journal.read(PUBLISHED_AT));
        if responses_produced.wrapping_sub(published) > entries {
            return None;
        }
        journal.produced(responses_produced);
        let mut owed = Vec::new();
        for entry in 0..entries {
            match journal.owed(entry, responses_produced) {
                Some(one) => {
                    // It will be answered under another index: the old one must not be taken for it.
                    journal.store(entry, 0, TAKEN);
                    owed.push(one);
                }
                None => journal.store(entry, 0, FREE),
            }
        }
        // Taking order is a free-running counter. A request may be in flight while any number of others come and go.
        let older = |a: u32, b: u32| if b.wrapping_sub(a) > u32::MAX / 2 { b } else { a };
        let oldest = owed.iter().map(|one| one.order).reduce(older);
        let oldest = oldest.unwrap_or(0);
        owed.sort_by_key(|one| one.order.wrapping_sub(oldest));
        journal.order = owed.last().map_or(0, |one| one.order.wrapping_add(1));
        Some((journal, owed))
    }

    fn owed(&self, entry: u32, responses_produced: u32) -> Option<Owed> {
        match self.load(entry, 0) {
            TAKEN => {}
            ANSWERED if self.load(entry, 4).wrapping_sub(responses_produced) < self.entries => {}
            _ => return None,
        }
        let at = HEAD_BYTES + entry as usize * ENTRY_BYTES;
        Some(Owed { entry, order: self.load(entry, 8), bytes: self.read(at + SLOT_AT) })
    }

    fn over(memory: Memory, entries: u32) -> Option<Journal> {
        let enough = memory.length_bytes >= Memory::needed_bytes(entries);
        enough.then_some(Journal { memory, entries, order: 0 })
    }

    /// The memory, to be closed.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// Writes down that the request in `bytes` was taken, as entry `entry`.
    pub fn taken(&mut self, entry: u32, bytes: &[u8; LARGEST_STRIDE]) {
        self.write(HEAD_BYTES + entry as usize * ENTRY_BYTES + SLOT_AT, bytes);
        self.store(entry, 8, self.order);
        self.order = self.order.wrapping_add(1);
        self.store(entry, 0, TAKEN);
    }

    /// Writes down that entry `entry` has its response at ring index `response`, not yet published.
    pub fn answered(&mut self, entry: u32, response: u32) {
        self.store(entry, 4, response);
        self.store(entry, 0, ANSWERED);
    }

    /// Writes down that the response of entry `entry` was published.
    pub fn published(&mut self, entry: u32) {
        self.store(entry, 0, FREE);
    }

    /// Writes down that the ring's response producer now stands at `responses_produced`.
    pub fn produced(&mut self, responses_produced: u32) {
        self.write(PUBLISHED_AT, &responses_produced.to_le_bytes());
    }

    fn word(&self, entry: u32, offset: usize) -> Option<&AtomicU32> {
        if entry >= self.entries {
            return None;
        }
        let at = HEAD_BYTES + entry as usize * ENTRY_BYTES + offset;
        // SAFETY: `over` checked that all entries lie within the memory; it is aligned to a page, and `offset` is one
        // of the entry's first three words.
        Some(unsafe { AtomicU32::from_ptr(self.memory.address.add(at).cast()) })
    }

    fn load(&self, entry: u32, offset: usize) -> u32 {
        self.word(entry, offset).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, entry: u32, offset: usize, value: u32) {
        if let Some(word) = self.word(entry, offset) {
            word.store(value, Ordering::Release);
        }
    }

    fn store_magic(&self, value: u64) {
        compiler_fence(Ordering::SeqCst);
        self.write(0, &value.to_le_bytes());
        compiler_fence(Ordering::SeqCst);
    }

    fn load_magic(&self) -> u64 {
        u64::from_le_bytes(self.read::<8>(0))
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        if at.saturating_add(bytes.len()) <= self.memory.length_bytes {
            // SAFETY: in bounds by the line above; nobody else touches the memory (see `Memory::new`).
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.address.add(at), bytes.len()) }
        }
    }

    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        if at.saturating_add(N) <= self.memory.length_bytes {
            // SAFETY: as in `write`.
            unsafe { std::ptr::copy_nonoverlapping(self.memory.address.add(at), bytes.as_mut_ptr(), N) }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Room([u8; 4096 * 2]);

    fn record() -> RingRecord {
        let protocol = "x86_64-abi".to_owned();
        RingRecord { version: RECORD_VERSION, domain: 1, protocol, grants: vec![8], remote_port: 3 }
    }

    fn memory(room: &mut Room) -> Memory {
        // SAFETY: aligned by its type; the tests touch it through one journal at a time.
        unsafe { Memory::new(room.0.as_mut_ptr(), room.0.len()) }
    }

    fn entries(owed: &[Owed]) -> Vec<u32> {
        owed.iter().map(|one| one.entry).collect()
    }

    #[test]
    fn what_is_owed_comes_in_the_order_of_taking_however_old() {
        let mut room = Room([0; 8192]);
        let memory = memory(&mut room);
        let mut journal = Journal::create(memory, 8, &record(), 0).unwrap();
        for start in [0, u32::MAX - 3] {
            journal.order = start;
            journal.taken(5, &[1; LARGEST_STRIDE]);
            for _ in 0..100 {
                journal.taken(2, &[2; LARGEST_STRIDE]);
                journal.answered(2, 0);
                journal.published(2);
            }
            journal.taken(1, &[3; LARGEST_STRIDE]);
            let (inherited, owed) = Journal::inherit(memory, 8, &record(), 0).unwrap();
            assert_eq!((entries(&owed), owed[0].bytes), (vec![5, 1], [1; LARGEST_STRIDE]));
            assert_eq!(inherited.order, start.wrapping_add(102));
        }
    }

    #[test]
    fn an_answer_that_was_not_published_is_owed_again_whatever_is_published_meanwhile() {
        let mut room = Room([0; 8192]);
        let memory = memory(&mut room);
        let mut journal = Journal::create(memory, 8, &record(), 40).unwrap();
        journal.taken(0, &[0; LARGEST_STRIDE]);
        journal.answered(0, 40);
        journal.taken(1, &[1; LARGEST_STRIDE]);
        let (mut successor, owed) = Journal::inherit(memory, 8, &record(), 40).unwrap();
        assert_eq!(entries(&owed), [0, 1]);
        // The successor answers the other one first, and dies.
        successor.answered(1, 40);
        let (_, owed) = Journal::inherit(memory, 8, &record(), 41).unwrap();
        assert_eq!(entries(&owed), [0]);
    }

    #[test]
    fn a_journal_of_another_ring_is_not_inherited() {
        let mut room = Room([0; 8192]);
        let memory = memory(&mut room);
        assert!(Journal::inherit(memory, 8, &record(), 0).is_none(), "nothing but zeroes");
        assert!(Journal::create(memory, 64, &record(), 0).is_none(), "too small");
        Journal::create(memory, 8, &record(), 0).unwrap().taken(0, &[0; LARGEST_STRIDE]);
        let other = RingRecord { remote_port: 4, ..record() };
        assert!(Journal::inherit(memory, 8, &other, 0).is_none());
        assert!(Journal::inherit(memory, 8, &record(), 0).is_some_and(|(_, owed)| owed.len() == 1));
    }
}
