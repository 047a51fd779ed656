//! No hypervisor: a machine whose disks are used by no guest.

use super::{CopySegment, DomainId, GrantRef, Hypervisor, HypervisorError, Port, RingMapping};

/// Has no guest and refuses every one.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoGuests;

impl Hypervisor for NoGuests {
    fn map(&mut self, _: DomainId, _: &[GrantRef]) -> Result<RingMapping, HypervisorError> {
        Err(HypervisorError::Failed("map", libc::ENODEV))
    }

    fn unmap(&mut self, _: RingMapping) {}

    fn copy(&mut self, _: &mut [CopySegment]) -> Result<(), HypervisorError> {
        Err(HypervisorError::Failed("copy", libc::ENODEV))
    }

    fn bind(&mut self, _: DomainId, _: u32) -> Result<Port, HypervisorError> {
        Err(HypervisorError::Failed("bind", libc::ENODEV))
    }

    fn unbind(&mut self, _: Port) {}

    fn pending(&mut self, _: &mut Vec<Port>) {}

    fn unmask(&mut self, _: &[Port]) {}

    fn notify(&mut self, _: Port) {}
}
