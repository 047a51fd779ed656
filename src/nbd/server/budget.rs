//! Memory for requests of clients: a part of the pool that all disks share.

use crate::buffers::{PAGE_BYTES, Pool, Span};
use crate::limits::NBD_MEMORY_BYTES;

/// What all clients hold.
#[derive(Debug, Default)]
pub(super) struct Budget {
    held_bytes: u64,
}

impl Budget {
    /// Memory for a request of a client that holds so much already. A client leaves at least as much free as it holds, so that
    /// those who never take their replies do not stop the others.
    pub(super) fn take(&mut self, client_bytes: u64, length_bytes: u32, pool: &mut Pool) -> Option<Span> {
        let free = NBD_MEMORY_BYTES.saturating_sub(self.held_bytes);
        let needed = u64::from(length_bytes.next_multiple_of(PAGE_BYTES));
        if client_bytes + needed > free.saturating_sub(needed) {
            return None;
        }
        let span = pool.alloc(length_bytes)?;
        self.held_bytes += pages(span);
        Some(span)
    }

    /// Takes memory back.
    pub(super) fn give_back(&mut self, span: Span, pool: &mut Pool) {
        if pool.free(span) {
            self.held_bytes -= pages(span);
        }
    }

    /// What is held, in bytes.
    pub(super) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }
}

/// The memory that a span has, in bytes: whole pages.
pub(super) fn pages(span: Span) -> u64 {
    u64::from(span.length_bytes().next_multiple_of(PAGE_BYTES))
}
