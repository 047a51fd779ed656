//! The backend's end of a ring.
//!
//! Indices are free-running `u32`. Between `responses_private` and `requests_consumed` lie the requests that we owe an
//! answer; what the frontend claims beyond that must fit into the rest of the ring, or it has lost its right to the
//! ring: see [`Overrun`].

use crate::abi::{Abi, LARGEST_STRIDE};
use crate::request::{Slot, Status};
use crate::shared::{Index, SharedPages};

/// The frontend's producer index lies outside what the ring can hold. The ring must not be looked at again until the
/// frontend reconnects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun {
    /// The index that was read.
    pub request_producer: u32,
    /// Requests consumed until then.
    pub requests_consumed: u32,
    /// Responses published until then.
    pub responses_produced: u32,
}

/// The backend's end of one ring.
#[derive(Debug)]
pub struct BackRing {
    shared: SharedPages,
    abi: Abi,
    entries: u32,
    requests_consumed: u32,
    requests_known: u32,
    responses_private: u32,
    responses_published: u32,
}

impl BackRing {
    /// Takes the backend's end of a fresh ring, whose indices the frontend has set to 0.
    #[must_use]
    pub fn attach(shared: SharedPages, abi: Abi) -> BackRing {
        BackRing::at(shared, abi, 0)
    }

    /// Takes the backend's end of a ring that an earlier backend has left: goes on where the shared response producer
    /// stands, with the `unanswered` requests behind it counted as consumed. Those slots may hold responses already, so
    /// the caller must know the requests from elsewhere.
    #[must_use]
    pub fn resume(shared: SharedPages, abi: Abi, unanswered: u32) -> BackRing {
        let produced = shared.load(Index::ResponseProducer);
        let mut ring = BackRing::at(shared, abi, produced);
        ring.requests_consumed = produced.wrapping_add(unanswered.min(ring.entries));
        ring.requests_known = ring.requests_consumed;
        ring
    }

    /// The shared response producer of a ring that is about to be resumed.
    #[must_use]
    pub fn responses_produced(shared: &SharedPages) -> u32 {
        shared.load(Index::ResponseProducer)
    }

    fn at(shared: SharedPages, abi: Abi, counter: u32) -> BackRing {
        let entries = shared.entries(abi);
        BackRing {
            shared,
            abi,
            entries,
            requests_consumed: counter,
            requests_known: counter,
            responses_private: counter,
            responses_published: counter,
        }
    }

    /// Whether every request of a ring that is about to be resumed is answered.
    #[must_use]
    pub fn is_idle(shared: &SharedPages) -> bool {
        shared.load(Index::RequestProducer) == shared.load(Index::ResponseProducer)
    }

    /// Entries of the ring.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Requests taken and not yet answered.
    #[must_use]
    pub fn unanswered(&self) -> u32 {
        self.requests_consumed.wrapping_sub(self.responses_private)
    }

    /// The counters: requests consumed, responses published.
    #[must_use]
    pub fn counters(&self) -> (u32, u32) {
        (self.requests_consumed, self.responses_published)
    }

    /// Looks at the frontend's producer index; how many requests may now be taken.
    ///
    /// # Errors
    /// [`Overrun`] when the index claims more than the ring holds. Indices behind those that were consumed are such a
    /// claim too, as the arithmetic is modulo 2³².
    pub fn look(&mut self) -> Result<u32, Overrun> {
        let producer = self.shared.load(Index::RequestProducer);
        let waiting = producer.wrapping_sub(self.requests_consumed);
        if waiting > self.entries.saturating_sub(self.unanswered()) {
            return Err(Overrun {
                request_producer: producer,
                requests_consumed: self.requests_consumed,
                responses_produced: self.responses_published,
            });
        }
        self.requests_known = producer;
        Ok(waiting)
    }

    /// Takes the next request that [`BackRing::look`] has seen: copied once.
    pub fn take(&mut self) -> Option<Slot> {
        if self.requests_consumed == self.requests_known {
            return None;
        }
        let bytes: [u8; LARGEST_STRIDE] = self.shared.copy_entry(self.abi, self.requests_consumed);
        self.requests_consumed = self.requests_consumed.wrapping_add(1);
        Some(Slot::new(bytes, self.abi))
    }

    /// The index that the next response will have.
    #[must_use]
    pub fn next_response(&self) -> u32 {
        self.responses_private
    }

    /// Writes a response. It becomes visible with [`BackRing::publish`]. Returns false, and does nothing, if no request
    /// is unanswered: there are never more responses than requests.
    pub fn respond(&mut self, id: u64, operation: u8, status: Status) -> bool {
        if self.unanswered() == 0 {
            return false;
        }
        // Padding is written as zero: nothing of ours leaks (XSA-216).
        let mut bytes = [0_u8; 16];
        let [i0, i1, i2, i3, i4, i5, i6, i7] = id.to_le_bytes();
        let [s0, s1] = status.code().to_le_bytes();
        bytes[..12].copy_from_slice(&[i0, i1, i2, i3, i4, i5, i6, i7, operation, 0, s0, s1]);
        let length = self.abi.layout().response_bytes;
        self.shared.write_entry(self.abi, self.responses_private, bytes.get(..length).unwrap_or(&bytes));
        self.responses_private = self.responses_private.wrapping_add(1);
        true
    }

    /// Makes the written responses visible. True when the frontend asked for an event.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.responses_published, self.responses_private);
        if old == new {
            return false;
        }
        self.shared.store(Index::ResponseProducer, new);
        self.responses_published = new;
        SharedPages::full_fence();
        let event = self.shared.load(Index::ResponseEvent);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Asks for an event with the next request, then looks once more: what came in between is not announced.
    ///
    /// # Errors
    /// As [`BackRing::look`].
    pub fn rest(&mut self) -> Result<u32, Overrun> {
        self.shared.store(Index::RequestEvent, self.requests_consumed.wrapping_add(1));
        SharedPages::full_fence();
        self.look()
    }
}
