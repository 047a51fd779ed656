//! The hypervisor of this machine, or none: one type for every command, so that the data path is compiled once.

use super::{
    CopySegment, DomainId, GrantRef, Hypervisor, HypervisorError, LinuxHypervisor, NoGuests, Port,
    RingMapping,
};

/// What serves whoever uses this process's disks.
#[derive(Debug)]
pub enum Host {
    /// Xen, which this machine is a domain of.
    Xen(LinuxHypervisor),
    /// Nobody but network clients uses the disks.
    NoGuests(NoGuests),
}

macro_rules! each {
    ($self:expr, $host:ident => $body:expr) => {
        match $self {
            Host::Xen($host) => $body,
            Host::NoGuests($host) => $body,
        }
    };
}

impl Hypervisor for Host {
    fn map(&mut self, domain: DomainId, grants: &[GrantRef]) -> Result<RingMapping, HypervisorError> {
        each!(self, host => host.map(domain, grants))
    }

    fn unmap(&mut self, mapping: RingMapping) {
        each!(self, host => host.unmap(mapping));
    }

    fn copy(&mut self, segments: &mut [CopySegment]) -> Result<(), HypervisorError> {
        each!(self, host => host.copy(segments))
    }

    fn bind(&mut self, domain: DomainId, remote_port: u32) -> Result<Port, HypervisorError> {
        each!(self, host => host.bind(domain, remote_port))
    }

    fn unbind(&mut self, port: Port) {
        each!(self, host => host.unbind(port));
    }

    fn pending(&mut self, ports: &mut Vec<Port>) {
        each!(self, host => host.pending(ports));
    }

    fn unmask(&mut self, ports: &[Port]) {
        each!(self, host => host.unmask(ports));
    }

    fn notify(&mut self, port: Port) {
        each!(self, host => host.notify(port));
    }
}
