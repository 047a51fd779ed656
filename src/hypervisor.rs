//! The seam to the hypervisor: grant mapping and copying, event channels.
//!
//! [`Hypervisor`] is implemented by `hypervisor::linux` over `/dev/xen/gntdev` and `/dev/xen/evtchn`, and by the
//! simulated world in `tests/`. Nothing above this seam knows which of them it talks to.

mod host;
mod linux;
mod none;

pub use host::Host;
pub use linux::LinuxHypervisor;
pub use none::NoGuests;

use crate::buffers::Span;

/// A domain's number, as xenstore and the hypervisor use it.
pub type DomainId = u16;

/// A grant reference: the guest's name for a page that it lets us touch.
pub type GrantRef = u32;

/// Our end of an event channel. Only valid until [`Hypervisor::unbind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port(pub u32);

/// A mapping of a guest's ring pages, contiguous and writable, until [`Hypervisor::unmap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingMapping {
    /// The implementation's own name for this mapping.
    pub id: u32,
    /// First byte of the mapped pages.
    pub address: *mut u8,
    /// Length in bytes: a multiple of 4096.
    pub length_bytes: usize,
}

/// Which way a grant copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDirection {
    /// From the guest's page into our buffer (the guest writes).
    FromGuest,
    /// From our buffer into the guest's page (the guest reads).
    ToGuest,
}

/// One segment of a batched grant copy. `offset + local.length` never exceeds 4096.
#[derive(Clone, Copy, Debug)]
pub struct CopySegment {
    /// The guest whose grant it is.
    pub domain: DomainId,
    /// The granted page.
    pub grant: GrantRef,
    /// First byte within the granted page.
    pub offset_bytes: u16,
    /// Our side of the copy, and the length of it.
    pub local: Span,
    /// Which way the bytes go.
    pub direction: CopyDirection,
    /// Filled in by [`Hypervisor::copy`]: true when the hypervisor said that this segment was copied.
    pub copied: bool,
}

/// Why the hypervisor refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HypervisorError {
    /// The guest's grant or port is not what it claimed: the guest's fault.
    BadGrant(GrantRef),
    /// The guest's event channel cannot be bound: the guest's fault.
    BadPort(u32),
    /// The kernel or hypervisor failed for a reason of its own: call, and errno.
    Failed(&'static str, i32),
}

/// What the backend needs of a hypervisor. One owner, one thread, no blocking.
pub trait Hypervisor {
    /// Maps `grants` of `domain` as one contiguous writable range. Either all are mapped or none.
    ///
    /// # Errors
    /// [`HypervisorError::BadGrant`] for a reference that the guest did not grant.
    fn map(&mut self, domain: DomainId, grants: &[GrantRef]) -> Result<RingMapping, HypervisorError>;

    /// Releases a mapping. Nothing may touch its pages afterwards.
    fn unmap(&mut self, mapping: RingMapping);

    /// Copies a batch. On `Ok`, each segment's `copied` tells whether it succeeded; on `Err` none can be trusted.
    ///
    /// # Errors
    /// When the whole batch could not be handed to the hypervisor.
    fn copy(&mut self, segments: &mut [CopySegment]) -> Result<(), HypervisorError>;

    /// Binds the guest's `remote_port`. A fresh binding is pending at once.
    ///
    /// # Errors
    /// [`HypervisorError::BadPort`] when the guest did not offer that port to us.
    fn bind(&mut self, domain: DomainId, remote_port: u32) -> Result<Port, HypervisorError>;

    /// Closes our end. Events of this port that were read earlier are stale.
    fn unbind(&mut self, port: Port);

    /// Appends the ports that have events. Each is masked until [`Hypervisor::unmask`].
    fn pending(&mut self, ports: &mut Vec<Port>);

    /// Lets the next event of each of `ports` through. To be followed by a last look at their rings.
    fn unmask(&mut self, ports: &[Port]);

    /// Sends an event to the guest's end of `port`.
    fn notify(&mut self, port: Port);
}
