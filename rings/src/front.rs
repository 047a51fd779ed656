//! The frontend's end of a ring: for simulated guests, and for guests that misbehave on purpose.

use crate::abi::{Abi, LARGEST_STRIDE};
use crate::request::operation;
use crate::segment::Segment;
use crate::shared::{Index, SharedPages};

/// A response as the frontend finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The id that the request had.
    pub id: u64,
    /// The operation that the backend says it did.
    pub operation: u8,
    /// 0, -1 or -2; anything else is the backend's mistake.
    pub status: i16,
}

/// The frontend's end of one ring.
#[derive(Debug)]
pub struct FrontRing {
    shared: SharedPages,
    abi: Abi,
    requests_private: u32,
    requests_published: u32,
    responses_consumed: u32,
}

impl FrontRing {
    /// Initialises the shared page as frontends do: indices 0, event indices 1.
    #[must_use]
    pub fn create(shared: SharedPages, abi: Abi) -> FrontRing {
        shared.store(Index::RequestProducer, 0);
        shared.store(Index::RequestEvent, 1);
        shared.store(Index::ResponseProducer, 0);
        shared.store(Index::ResponseEvent, 1);
        FrontRing { shared, abi, requests_private: 0, requests_published: 0, responses_consumed: 0 }
    }

    /// Slots into which a request may be written.
    #[must_use]
    pub fn free(&self) -> u32 {
        let used = self.requests_private.wrapping_sub(self.responses_consumed);
        self.shared.entries(self.abi).saturating_sub(used)
    }

    /// Requests that were published and not answered.
    #[must_use]
    pub fn unanswered(&self) -> u32 {
        self.requests_published.wrapping_sub(self.responses_consumed)
    }

    /// Writes a request with its segments into the next slot; more than 11 segments are cut to what fits, while
    /// `count` says what the slot claims.
    pub fn write(&mut self, op: u8, id: u64, sector: u64, segments: &[Segment], count: u8) {
        let layout = self.abi.layout();
        let mut bytes = [0_u8; LARGEST_STRIDE];
        bytes[0] = op;
        bytes[1] = count;
        put(&mut bytes, layout.id, &id.to_le_bytes());
        put(&mut bytes, layout.sector, &sector.to_le_bytes());
        for (n, segment) in segments.iter().enumerate().take(11) {
            put(&mut bytes, layout.segments + n * 8, &segment.to_bytes());
        }
        self.write_raw(&bytes);
    }

    /// Writes an indirect request that claims `count` segments, described in the granted `pages`; more than eight pages are
    /// left out.
    pub fn write_indirect(&mut self, inner: u8, id: u64, sector: u64, count: u16, pages: &[u32]) {
        let layout = self.abi.layout();
        let mut bytes = [0_u8; LARGEST_STRIDE];
        let [c0, c1] = count.to_le_bytes();
        bytes[..4].copy_from_slice(&[operation::INDIRECT, inner, c0, c1]);
        put(&mut bytes, layout.id, &id.to_le_bytes());
        put(&mut bytes, layout.sector, &sector.to_le_bytes());
        for (n, page) in pages.iter().enumerate().take(8) {
            put(&mut bytes, layout.indirect_grants + n * 4, &page.to_le_bytes());
        }
        self.write_raw(&bytes);
    }

    /// Writes a discard of `count` sectors.
    pub fn write_discard(&mut self, id: u64, sector: u64, count: u64, flag: u8) {
        let layout = self.abi.layout();
        let mut bytes = [0_u8; LARGEST_STRIDE];
        bytes[..2].copy_from_slice(&[operation::DISCARD, flag]);
        put(&mut bytes, layout.id, &id.to_le_bytes());
        put(&mut bytes, layout.sector, &sector.to_le_bytes());
        put(&mut bytes, layout.discard_count, &count.to_le_bytes());
        self.write_raw(&bytes);
    }

    /// Writes a flush without data.
    pub fn write_flush(&mut self, id: u64) {
        self.write(operation::FLUSH, id, 0, &[], 0);
    }

    /// Writes any bytes as the next request.
    pub fn write_raw(&mut self, bytes: &[u8; LARGEST_STRIDE]) {
        self.shared.write_entry(self.abi, self.requests_private, bytes);
        self.requests_private = self.requests_private.wrapping_add(1);
    }

    /// Makes the written requests visible. True when the backend asked for an event.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.requests_published, self.requests_private);
        self.shared.store(Index::RequestProducer, new);
        self.requests_published = new;
        SharedPages::full_fence();
        new.wrapping_sub(self.shared.load(Index::RequestEvent)) < new.wrapping_sub(old)
    }

    /// Takes the next response. When there is none, asks for an event and looks once more.
    pub fn take(&mut self) -> Option<Response> {
        if self.shared.load(Index::ResponseProducer) == self.responses_consumed {
            self.shared.store(Index::ResponseEvent, self.responses_consumed.wrapping_add(1));
            SharedPages::full_fence();
            if self.shared.load(Index::ResponseProducer) == self.responses_consumed {
                return None;
            }
        }
        let bytes = self.shared.copy_entry(self.abi, self.responses_consumed);
        self.responses_consumed = self.responses_consumed.wrapping_add(1);
        let [i0, i1, i2, i3, i4, i5, i6, i7, operation, _, s0, s1, ..] = bytes;
        Some(Response {
            id: u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
            operation,
            status: i16::from_le_bytes([s0, s1]),
        })
    }

    /// Sets the request producer to any value: what a hostile frontend can do.
    pub fn force_request_producer(&mut self, value: u32) {
        self.shared.store(Index::RequestProducer, value);
    }

    /// Sets the response event index to any value.
    pub fn force_response_event(&mut self, value: u32) {
        self.shared.store(Index::ResponseEvent, value);
    }
}

fn put(bytes: &mut [u8; LARGEST_STRIDE], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}
