//! What can be offered at all.

use crate::limits::{QUEUES_MAX, RING_PAGE_ORDER_MAX};
use crate::vbd::Features;

/// What the data path serves. What the options ask for beyond it is not offered.
pub(super) const SERVED: Features = Features {
    ring_page_order_max: RING_PAGE_ORDER_MAX,
    queues_max: QUEUES_MAX,
    indirect_segments_max: 0,
    persistent: false,
    flush: true,
    barrier: false,
    discard: false,
};
