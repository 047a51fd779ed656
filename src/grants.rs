//! Persistent grants: pages of a guest that stay mapped from one request to the next, and that storage reads and writes
//! itself, without a grant copy.
//!
//! A page is mapped by itself, so that a reference that the guest does not grant fails alone. It is pinned by every
//! request that uses it, and two may use the same one; only what nobody pins is unmapped. `docs/design/data-path.md` says
//! when all of it is.

use std::collections::BTreeMap;

use crate::buffers::Span;
use crate::hypervisor::{DomainId, GrantRef, Hypervisor, RingMapping};
use crate::limits::{GRANTS_MAX, GRANTS_PER_QUEUE_MAX};

/// A mapped page.
#[derive(Clone, Copy, Debug)]
struct Page {
    mapping: RingMapping,
    /// Requests in flight that use it.
    pins: u32,
}

/// The pages of one queue that are mapped.
#[derive(Debug)]
pub(crate) struct Grants {
    domain: DomainId,
    pages: BTreeMap<GrantRef, Page>,
    /// References that found no room since everything unused was last unmapped.
    misses: usize,
}

impl Grants {
    pub(crate) fn new(domain: DomainId) -> Grants {
        Grants { domain, pages: BTreeMap::new(), misses: 0 }
    }

    /// Pins a page, which is mapped if it is not. False when it cannot be, or there are too many: the data must be copied.
    /// `total` counts the mapped pages of all queues.
    pub(crate) fn pin<H: Hypervisor>(
        &mut self,
        grant: GrantRef,
        hypervisor: &mut H,
        total: &mut usize,
    ) -> bool {
        if let Some(page) = self.pages.get_mut(&grant) {
            page.pins += 1;
            return true;
        }
        if self.pages.len() >= GRANTS_PER_QUEUE_MAX || *total >= GRANTS_MAX {
            self.misses += 1;
            // A guest that brings other pages all the time pays a mapping now and then, not with every request.
            if self.misses > self.pages.len() {
                self.unmap_unused(hypervisor, total);
            }
            return false;
        }
        // Mapped writable or not at all: what the guest grants for reading only is copied, as without this feature.
        let Ok(mapping) = hypervisor.map(self.domain, &[grant]) else { return false };
        self.pages.insert(grant, Page { mapping, pins: 1 });
        *total += 1;
        true
    }

    /// Gives one pin back.
    pub(crate) fn unpin(&mut self, grant: GrantRef) {
        if let Some(page) = self.pages.get_mut(&grant) {
            page.pins = page.pins.saturating_sub(1);
        }
    }

    /// The bytes of a pinned page.
    pub(crate) fn bytes(&self, grant: GrantRef, offset_bytes: u16, length_bytes: u16) -> Option<Span> {
        let page = self.pages.get(&grant).filter(|page| page.pins > 0)?;
        let (offset, length) = (usize::from(offset_bytes), usize::from(length_bytes));
        if offset + length > page.mapping.length_bytes {
            return None;
        }
        // SAFETY: the range lies in the mapped page, which stays mapped while it is pinned: until its request is answered,
        // which is after its transfers. The guest writes there too, so that nothing is read from it but by the kernel, and
        // by copies of bytes that nobody looks at.
        Some(unsafe { Span::foreign(page.mapping.address.wrapping_add(offset), u32::from(length_bytes)) })
    }

    /// Unmaps every page that no request uses. True if none is left.
    pub(crate) fn unmap_unused<H: Hypervisor>(&mut self, hypervisor: &mut H, total: &mut usize) -> bool {
        self.pages.retain(|_, page| {
            if page.pins > 0 {
                return true;
            }
            hypervisor.unmap(page.mapping);
            *total = total.saturating_sub(1);
            false
        });
        self.misses = 0;
        self.pages.is_empty()
    }

    /// Unmaps every page: no request is left.
    pub(crate) fn unmap_all<H: Hypervisor>(&mut self, hypervisor: &mut H, total: &mut usize) {
        self.pages.values_mut().for_each(|page| page.pins = 0);
        self.unmap_unused(hypervisor, total);
    }
}

#[cfg(test)]
mod tests;
