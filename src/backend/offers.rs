//! What can be offered at all.

use rings::Offers;

use crate::limits::{INDIRECT_SEGMENTS, QUEUES_MAX, RING_PAGE_ORDER_MAX};
use crate::vbd::Features;

/// What the data path serves. What the options ask for beyond it is not offered.
pub(super) const SERVED: Features = Features {
    ring_page_order_max: RING_PAGE_ORDER_MAX,
    queues_max: QUEUES_MAX,
    indirect_segments_max: INDIRECT_SEGMENTS,
    persistent: false,
    flush: true,
    barrier: true,
    discard: true,
};

/// What the data path takes from a frontend that was offered `features`.
pub(super) fn taken(features: &Features) -> Offers {
    Offers {
        indirect_segments: features.indirect_segments_max,
        barrier: features.barrier,
        discard: features.discard,
    }
}
