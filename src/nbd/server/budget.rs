//! Memory for requests of clients: a part of the pool that all disks share.

use crate::buffers::{PAGE_BYTES, Pool, Span};
use crate::limits::{NBD_CLIENT_BYTES, NBD_SHARED_BYTES};

/// What all clients hold.
#[derive(Debug, Default)]
pub(super) struct Budget {
    held_bytes: u64,
    /// Of it, what is more than their own shares.
    shared_bytes: u64,
    /// Something that a client may wait for is there: memory, a place, room for a reply.
    progress: bool,
}

/// What a client that holds so much has of what all share.
fn beyond(held_bytes: u64) -> u64 {
    held_bytes.saturating_sub(NBD_CLIENT_BYTES)
}

impl Budget {
    /// Memory for a request of a client that holds so much already: of its own share, which nobody else can take; or of what all
    /// share, of which a client leaves at least as much free as it has.
    pub(super) fn take(&mut self, client_bytes: u64, length_bytes: u32, pool: &mut Pool) -> Option<Span> {
        let after = client_bytes + u64::from(length_bytes.next_multiple_of(PAGE_BYTES));
        let shared = self.shared_bytes + beyond(after) - beyond(client_bytes);
        if beyond(after) > 0 && beyond(after) > NBD_SHARED_BYTES.saturating_sub(shared) {
            return None;
        }
        let span = pool.alloc(length_bytes)?;
        self.held_bytes += pages(span);
        self.shared_bytes = shared;
        Some(span)
    }

    /// Something that a client may wait for is there.
    pub(super) fn progress(&mut self) {
        self.progress = true;
    }

    /// Whether there was such a thing since this was asked.
    pub(super) fn take_progress(&mut self) -> bool {
        std::mem::take(&mut self.progress)
    }

    /// Takes memory back of a client that held so much with it.
    pub(super) fn give_back(&mut self, client_bytes: u64, span: Span, pool: &mut Pool) {
        if pool.free(span) {
            self.held_bytes -= pages(span);
            self.shared_bytes -= beyond(client_bytes) - beyond(client_bytes - pages(span));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{NBD_CLIENTS_MAX, NBD_MEMORY_BYTES, NBD_REQUEST_BYTES_MAX};

    /// One after the other, clients take all that they get and keep it.
    #[test]
    fn whoever_keeps_everything_leaves_everybody_a_share() {
        let mut pool = Pool::new(usize::try_from(NBD_MEMORY_BYTES).unwrap()).unwrap();
        let mut budget = Budget::default();
        let mut clients = vec![(0, Vec::new()); NBD_CLIENTS_MAX];
        for (at, (held, spans)) in clients.iter_mut().enumerate() {
            for length in [NBD_REQUEST_BYTES_MAX, 100_000, 4096, 512] {
                while let Some(span) = budget.take(*held, length, &mut pool) {
                    *held += pages(span);
                    spans.push(span);
                }
            }
            assert!(*held >= NBD_CLIENT_BYTES, "client {at} has {held}");
            assert!(at > 0 || *held > NBD_SHARED_BYTES / 2 - u64::from(NBD_REQUEST_BYTES_MAX));
        }
        assert!(budget.held_bytes() <= NBD_MEMORY_BYTES);
        for (held, spans) in &mut clients {
            for span in spans.drain(..) {
                budget.give_back(*held, span, &mut pool);
                *held -= pages(span);
            }
        }
        assert_eq!((budget.held_bytes, budget.shared_bytes, pool.used_bytes()), (0, 0, 0));
    }
}
