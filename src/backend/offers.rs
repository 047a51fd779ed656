//! What can be offered at all.

use rings::Offers;

use crate::limits::{INDIRECT_SEGMENTS, QUEUES_MAX, RING_PAGE_ORDER_MAX};
use crate::vbd::Features;

/// What the data path serves. What the options ask for beyond it is not offered.
pub(super) const SERVED: Features = Features {
    ring_page_order_max: RING_PAGE_ORDER_MAX,
    queues_max: QUEUES_MAX,
    indirect_segments_max: INDIRECT_SEGMENTS,
    persistent: true,
    flush: true,
    barrier: true,
    discard: true,
};

/// What requests are taken: all that is ever offered, since a predecessor may have told the frontend more; but discards only
/// where this disk's administrator lets it.
pub(super) fn taken(features: &Features) -> Offers {
    Offers {
        indirect_segments: SERVED.indirect_segments_max,
        barrier: SERVED.barrier,
        discard: features.discard,
    }
}
