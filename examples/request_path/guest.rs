//! A guest: a frontend that keeps its ring as full as it is told to.

use rings::request::operation;
use rings::{Abi, FrontRing, Segment, SharedPages};
use vbdd::hypervisor::GrantRef;

use crate::machine::{GuestMemory, PAGE};

/// What a guest does.
#[derive(Clone, Copy)]
pub(crate) struct Habit {
    pub(crate) write: bool,
    pub(crate) depth: u32,
    /// From one block to the next, and not anywhere.
    pub(crate) sequential: bool,
    /// Bytes of a request: whole pages, 256 at most; more than 11 go by indirect requests.
    pub(crate) block_bytes: usize,
    /// Size of the disk in such blocks.
    pub(crate) blocks: u64,
}

impl Habit {
    pub(crate) fn pages(&self) -> usize {
        self.block_bytes / PAGE
    }

    /// Pages that a guest needs: its ring, the data of every request, and a page of descriptors for each.
    pub(crate) fn guest_pages(&self) -> usize {
        1 + self.depth as usize * (self.pages() + 1)
    }
}

/// The guest.
pub(crate) struct Guest {
    ring: FrontRing,
    memory: GuestMemory,
    first_grant: GrantRef,
    habit: Habit,
    /// Requests of its own that are free, and the block that each was last used for.
    free: Vec<u32>,
    block_of: Vec<u64>,
    dice: u64,
    next_block: u64,
    /// Requests that it is still to send.
    pub(crate) quota: u64,
    pub(crate) answered: u64,
    pub(crate) errors: u64,
}

impl Guest {
    /// A guest whose pages start at `first_grant`: the ring, then the data.
    pub(crate) fn new(memory: GuestMemory, first_grant: GrantRef, habit: Habit) -> Option<Guest> {
        // SAFETY: the page stays mapped for good; the backend's end of the ring reaches it in the same way, by copies
        // and atomics only.
        let shared = unsafe { SharedPages::new(memory.page(first_grant)?, 1) };
        Some(Guest {
            ring: FrontRing::create(shared, Abi::X86_64),
            memory,
            first_grant,
            habit,
            free: (0..habit.depth).collect(),
            block_of: vec![0; habit.depth as usize],
            dice: 0x9e37_79b9_7f4a_7c15 ^ (u64::from(first_grant) << 20),
            next_block: 0,
            quota: 0,
            answered: 0,
            errors: 0,
        })
    }

    pub(crate) fn habit(&self) -> &Habit {
        &self.habit
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.ring.unanswered().into()
    }

    fn grant(&self, request: u32, page: usize) -> GrantRef {
        let pages = request as usize * self.habit.pages() + page;
        self.first_grant + 1 + GrantRef::try_from(pages).unwrap_or(0)
    }

    fn block(&mut self) -> u64 {
        if self.habit.sequential {
            self.next_block = (self.next_block + 1) % self.habit.blocks;
            return self.next_block;
        }
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        let place = (u128::from(self.dice) * u128::from(self.habit.blocks)) >> 64;
        u64::try_from(place).unwrap_or(0)
    }

    /// Takes the answers and sends new requests as far as depth and quota allow. True if the backend wants an event.
    pub(crate) fn run(&mut self) -> bool {
        while let Some(response) = self.ring.take() {
            self.answered += 1;
            self.errors += u64::from(response.status != 0);
            self.free.extend(u32::try_from(response.id).ok());
        }
        let mut sent = false;
        while self.quota > 0
            && let Some(request) = self.free.pop()
        {
            let block = self.block();
            self.send(request, block);
            self.quota -= 1;
            sent = true;
        }
        sent && self.ring.publish()
    }

    fn send(&mut self, request: u32, block: u64) {
        let pages = self.habit.pages();
        let mut segments = [Segment { grant: 0, first: 0, last: 7 }; 11];
        self.block_of[request as usize] = block;
        let sector = block * (self.habit.block_bytes as u64 / 512);
        let op = if self.habit.write { operation::WRITE } else { operation::READ };
        if pages <= segments.len() {
            for (page, segment) in segments.iter_mut().enumerate().take(pages) {
                segment.grant = self.grant(request, page);
            }
            let count = u8::try_from(pages).unwrap_or(0);
            return self.ring.write(op, request.into(), sector, &segments[..pages], count);
        }
        let descriptors =
            self.first_grant + 1 + self.habit.depth * u32::try_from(pages).unwrap_or(0) + request;
        let Some(table) = self.memory.page(descriptors) else { return };
        for page in 0..pages {
            let segment = Segment { grant: self.grant(request, page), first: 0, last: 7 };
            // SAFETY: within a page of ours, as there are at most 256 of 8 bytes.
            unsafe { table.add(page * 8).cast::<[u8; 8]>().write_unaligned(segment.to_bytes()) };
        }
        let count = u16::try_from(pages).unwrap_or(0);
        self.ring.write_indirect(op, request.into(), sector, count, &[descriptors]);
    }

    /// Sends one request for each place, to blocks that differ, written data marked. See [`Guest::compare`].
    pub(crate) fn send_marked(&mut self) -> bool {
        for request in std::mem::take(&mut self.free) {
            for page in 0..self.habit.pages() {
                let mark = [request.to_le_bytes(), u32::try_from(page).unwrap_or(0).to_be_bytes()].concat();
                let Some(address) = self.memory.page(self.grant(request, page)) else { continue };
                // SAFETY: the start of a page of ours.
                unsafe { std::ptr::copy_nonoverlapping(mark.as_ptr(), address, mark.len()) };
            }
            let block = self.habit.blocks * u64::from(request) / u64::from(self.habit.depth);
            self.send(request, block);
        }
        self.ring.publish()
    }

    /// After [`Guest::send_marked`] was answered: whether the guest's memory and `file` agree about those blocks.
    pub(crate) fn compare(&self, file: &std::fs::File) -> std::io::Result<bool> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; self.habit.block_bytes];
        for request in 0..self.habit.depth {
            let block = self.block_of[request as usize];
            file.read_exact_at(&mut bytes, block * self.habit.block_bytes as u64)?;
            for (page, expected) in bytes.chunks(PAGE).enumerate() {
                let Some(address) = self.memory.page(self.grant(request, page)) else { return Ok(false) };
                // SAFETY: a page of ours; nothing is in flight that could write to it.
                let found = unsafe { std::slice::from_raw_parts(address, PAGE) };
                if found != expected {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
