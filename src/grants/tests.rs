use super::*;
use crate::hypervisor::{CopySegment, HypervisorError, Port};

/// Maps whatever is asked for, but for references from 100 000 on; counts.
#[derive(Default)]
struct Pages {
    mapped: std::collections::BTreeSet<u32>,
    made: u32,
}

impl Hypervisor for Pages {
    fn map(&mut self, _: DomainId, grants: &[GrantRef]) -> Result<RingMapping, HypervisorError> {
        assert_eq!(grants.len(), 1, "a page is mapped alone");
        if grants[0] >= 100_000 {
            return Err(HypervisorError::BadGrant(grants[0]));
        }
        self.made += 1;
        self.mapped.insert(self.made);
        let address = (self.made as usize * 4096) as *mut u8;
        Ok(RingMapping { id: self.made, address, length_bytes: 4096 })
    }

    fn unmap(&mut self, mapping: RingMapping) {
        assert!(self.mapped.remove(&mapping.id), "unmapped twice");
    }

    fn copy(&mut self, _: &mut [CopySegment]) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn bind(&mut self, _: DomainId, remote_port: u32) -> Result<Port, HypervisorError> {
        Err(HypervisorError::BadPort(remote_port))
    }

    fn unbind(&mut self, _: Port) {}
    fn pending(&mut self, _: &mut Vec<Port>) {}
    fn unmask(&mut self, _: &[Port]) {}
    fn notify(&mut self, _: Port) {}
}

#[test]
fn a_page_that_two_requests_use_stays_until_both_are_done() {
    let (mut xen, mut total) = (Pages::default(), 0);
    let mut grants = Grants::new(1);
    assert!(grants.pin(8, &mut xen, &mut total) && grants.pin(8, &mut xen, &mut total));
    assert_eq!((xen.made, total), (1, 1));
    grants.unpin(8);
    assert!(!grants.unmap_unused(&mut xen, &mut total));
    assert_eq!(grants.bytes(8, 512, 1024).unwrap().address() as usize, 4096 + 512);
    assert!(grants.bytes(8, 512, 4096).is_none() && grants.bytes(9, 0, 512).is_none());
    grants.unpin(8);
    assert!(grants.bytes(8, 0, 512).is_none(), "nobody may use what may be unmapped");
    assert!(grants.unmap_unused(&mut xen, &mut total));
    assert_eq!((xen.mapped.len(), total), (0, 0));
}

#[test]
fn a_reference_that_cannot_be_mapped_fails_alone() {
    let (mut xen, mut total) = (Pages::default(), 0);
    let mut grants = Grants::new(1);
    assert!(!grants.pin(100_000, &mut xen, &mut total));
    assert!(grants.pin(1, &mut xen, &mut total));
    assert_eq!((xen.mapped.len(), total), (1, 1));
}

#[test]
fn pages_are_bounded_for_a_queue_and_for_all() {
    let (mut xen, mut total) = (Pages::default(), GRANTS_MAX - 10);
    let (mut first, mut second) = (Grants::new(1), Grants::new(2));
    let pinned = (0..20).filter(|grant| first.pin(*grant, &mut xen, &mut total)).count();
    assert_eq!((pinned, total), (10, GRANTS_MAX));
    first.unmap_all(&mut xen, &mut total);
    total = 0;
    let mut held = 0;
    for grant in 0..4 * u32::try_from(GRANTS_PER_QUEUE_MAX).unwrap() {
        held += usize::from(second.pin(grant, &mut xen, &mut total));
        assert!(xen.mapped.len() <= GRANTS_PER_QUEUE_MAX && total == xen.mapped.len());
    }
    assert_eq!(held, GRANTS_PER_QUEUE_MAX, "what is pinned gives no room");
    second.unmap_all(&mut xen, &mut total);
    assert_eq!((xen.mapped.len(), total), (0, 0));
}

#[test]
fn a_guest_that_brings_other_pages_all_the_time_is_copied_mostly() {
    let (mut xen, mut total) = (Pages::default(), 0);
    let mut grants = Grants::new(1);
    let rounds = 20 * u32::try_from(GRANTS_PER_QUEUE_MAX).unwrap();
    for grant in 0..rounds {
        if grants.pin(grant, &mut xen, &mut total) {
            grants.unpin(grant);
        }
    }
    assert!((rounds / 4..=rounds * 3 / 4).contains(&xen.made), "{} of {rounds}", xen.made);
}
