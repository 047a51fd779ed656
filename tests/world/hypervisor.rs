//! The hypervisor's twin: domains, grants, event channels.
//!
//! Event channels behave as Linux's device gives them to a process: a port that was delivered stays masked until it is
//! written back; an event while masked is kept and delivered then; a fresh binding is pending at once; a closed port's
//! number is used again by the next binding.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use vbdd::hypervisor::{
    CopyDirection, CopySegment, DomainId, GrantRef, Hypervisor, HypervisorError, Port, RingMapping,
};

use super::memory::{self, GuestMemory, PAGE};
use super::{Plant, Shared};

#[derive(Clone, Copy, Debug)]
struct Grant {
    frame: usize,
    read_only: bool,
}

/// The guest's end of an event channel.
#[derive(Debug, Default)]
struct Remote {
    bound: Option<u32>,
    pending: bool,
}

#[derive(Debug)]
struct Domain {
    memory: Rc<GuestMemory>,
    grants: BTreeMap<GrantRef, Grant>,
    grants_free: BTreeSet<GrantRef>,
    grants_made: u32,
    remotes: BTreeMap<u32, Remote>,
}

/// Our end of an event channel.
#[derive(Debug)]
struct Local {
    domain: DomainId,
    remote: u32,
    pending: bool,
    enabled: bool,
}

/// A segment of a copy that was made to fail; or perhaps made to fail, before a process died.
#[derive(Clone, Copy, Debug)]
pub struct FailedCopy {
    pub domain: DomainId,
    pub grant: GrantRef,
    pub certain: bool,
}

/// The state of the machine.
#[derive(Debug, Default)]
pub struct Xen {
    domains: BTreeMap<DomainId, Domain>,
    /// Rings that are mapped: whose, where, how long.
    mappings: BTreeMap<u32, (DomainId, usize, usize)>,
    mappings_made: u32,
    locals: BTreeMap<u32, Local>,
    delivered: VecDeque<u32>,
    /// Copies asked for, by domain: (count, of which were done).
    pub copies: BTreeMap<DomainId, u64>,
    /// Segments of the batches that were made to fail.
    pub failed_copies: Vec<FailedCopy>,
    /// Domains whose queues were aborted: nothing more may be copied.
    pub aborted: BTreeSet<DomainId>,
    /// The next calls of `map` and `bind` fail for the system's own reason.
    /// Copies that one call can do: more fail as a whole.
    pub copies_max: Option<usize>,
    /// What a copied segment takes, and what of it the clock has not been told.
    pub copy_ns: u64,
    pub owed_ns: u64,
    pub fail_map: u32,
    /// After so many calls of `map` that succeed, one fails.
    pub fail_map_after: Option<u32>,
    pub fail_bind: u32,
}

impl Xen {
    pub fn create_domain(&mut self, domain: DomainId, pages: usize) -> Rc<GuestMemory> {
        let memory = Rc::new(GuestMemory::new(pages));
        let new = Domain {
            memory: memory.clone(),
            grants: BTreeMap::new(),
            grants_free: BTreeSet::new(),
            grants_made: 0,
            remotes: BTreeMap::new(),
        };
        assert!(self.domains.insert(domain, new).is_none());
        memory
    }

    /// The domain dies: its grants and ports go, pages that are mapped stay as a zombie's until they are unmapped.
    pub fn destroy_domain(&mut self, domain: DomainId) {
        self.domains.remove(&domain);
    }

    pub fn is_alive(&self, domain: DomainId) -> bool {
        self.domains.contains_key(&domain)
    }

    pub fn grant(&mut self, domain: DomainId, frame: usize, read_only: bool) -> GrantRef {
        let Some(owner) = self.domains.get_mut(&domain) else { return 0 };
        let fresh = owner.grants_made + 8;
        let free = owner.grants_free.pop_first().unwrap_or_else(|| {
            owner.grants_made += 1;
            fresh
        });
        owner.grants.insert(free, Grant { frame, read_only });
        free
    }

    pub fn revoke(&mut self, domain: DomainId, grant: GrantRef) {
        if let Some(owner) = self.domains.get_mut(&domain)
            && owner.grants.remove(&grant).is_some()
        {
            owner.grants_free.insert(grant);
        }
    }

    /// A port that the guest offers to us.
    pub fn offer_port(&mut self, domain: DomainId) -> u32 {
        let Some(owner) = self.domains.get_mut(&domain) else { return 0 };
        let port = owner.remotes.last_key_value().map_or(1, |(last, _)| last + 1);
        owner.remotes.insert(port, Remote::default());
        port
    }

    /// The guest sends an event. Nobody hears it while we are not bound.
    pub fn guest_notify(&mut self, domain: DomainId, port: u32) {
        let remote = self.domains.get(&domain).and_then(|owner| owner.remotes.get(&port));
        if let Some(local) = remote.and_then(|remote| remote.bound) {
            self.raise(local);
        }
    }

    /// Takes the guest's pending event.
    pub fn guest_event(&mut self, domain: DomainId, port: u32) -> bool {
        let remote = self.domains.get_mut(&domain).and_then(|owner| owner.remotes.get_mut(&port));
        remote.is_some_and(|remote| std::mem::take(&mut remote.pending))
    }

    fn raise(&mut self, port: u32) {
        let Some(local) = self.locals.get_mut(&port) else { return };
        if local.enabled {
            local.enabled = false;
            self.delivered.push_back(port);
        } else {
            local.pending = true;
        }
    }

    pub fn describe_ports(&self) -> String {
        format!("ports {:?}, delivered {:?}", self.locals, self.delivered)
    }

    /// The event device is readable.
    pub fn readable(&self) -> bool {
        !self.delivered.is_empty()
    }

    /// The process is gone: the kernel closes its ports and unmaps what it had mapped.
    pub fn process_died(&mut self) {
        for (_, address, length) in std::mem::take(&mut self.mappings).into_values() {
            memory::unmap(address as *mut u8, length);
        }
        for local in std::mem::take(&mut self.locals).into_values() {
            self.close_remote(&local);
        }
        self.delivered.clear();
        self.failed_copies.iter_mut().for_each(|failed| failed.certain = false);
    }

    fn close_remote(&mut self, local: &Local) {
        let remote =
            self.domains.get_mut(&local.domain).and_then(|owner| owner.remotes.get_mut(&local.remote));
        if let Some(remote) = remote {
            remote.bound = None;
        }
    }

    pub fn maps_of(&self, domain: DomainId) -> usize {
        self.mappings.values().filter(|(owner, ..)| *owner == domain).count()
    }

    /// Rings mapped, ports bound.
    pub fn held(&self) -> (usize, usize) {
        (self.mappings.len(), self.locals.len())
    }

    fn copy_one(&mut self, segment: &CopySegment) -> Result<bool, String> {
        let (offset, length) = (usize::from(segment.offset_bytes), segment.local.length_bytes() as usize);
        if offset + length > PAGE || length == 0 {
            return Err(format!("a copy crosses its page: {segment:?}"));
        }
        if self.aborted.contains(&segment.domain) {
            return Err(format!("a copy for a queue that was aborted: {segment:?}"));
        }
        *self.copies.entry(segment.domain).or_default() += 1;
        let Some(owner) = self.domains.get(&segment.domain) else { return Ok(false) };
        let Some(grant) = owner.grants.get(&segment.grant) else { return Ok(false) };
        let theirs = owner.memory.page(grant.frame).wrapping_add(offset);
        let ours = segment.local.address();
        // SAFETY: `theirs` lies within a page of the domain by the check above, `ours` in the arena, which stays mapped.
        unsafe {
            match segment.direction {
                CopyDirection::ToGuest if grant.read_only => return Ok(false),
                CopyDirection::ToGuest => std::ptr::copy_nonoverlapping(ours, theirs, length),
                CopyDirection::FromGuest => std::ptr::copy_nonoverlapping(theirs, ours, length),
            }
        }
        Ok(true)
    }
}

/// The backend's handle.
pub struct SimXen(pub Rc<Shared>);

impl SimXen {
    fn xen(&self) -> std::cell::RefMut<'_, Xen> {
        self.0.xen.borrow_mut()
    }
}

impl SimXen {
    fn copy_all(&mut self, segments: &mut [CopySegment]) -> Result<(), HypervisorError> {
        if self.0.xen.borrow().copies_max.is_some_and(|most| segments.len() > most) {
            segments.iter_mut().for_each(|segment| segment.copied = self.0.chance(1, 2));
            return Err(HypervisorError::Failed("copy", libc::ENOMEM));
        }
        if self.0.strikes(self.0.faults.get().copy_batch) {
            let mut xen = self.xen();
            for segment in segments.iter_mut() {
                let (domain, grant) = (segment.domain, segment.grant);
                // The pump may try again.
                xen.failed_copies.push(FailedCopy { domain, grant, certain: false });
                // On failure of the call the statuses mean nothing.
                segment.copied = self.0.chance(1, 2);
            }
            if self.0.plant.get() == Plant::CopyStatusIgnored {
                segments.iter_mut().for_each(|segment| segment.copied = true);
                return Ok(());
            }
            return Err(HypervisorError::Failed("copy", libc::ENOMEM));
        }
        let reaches_images = {
            let media = self.0.media.borrow();
            segments.iter().any(|segment| media.holds(segment.local.address()))
        };
        if reaches_images && self.0.strikes(self.0.direct.get().1) {
            for segment in segments.iter_mut() {
                if self.0.chance(1, 2) {
                    let _ = self.xen().copy_one(segment);
                }
                segment.copied = self.0.chance(1, 2);
            }
            if self.0.plant.get() == Plant::DirectFaultIgnored {
                segments.iter_mut().for_each(|segment| segment.copied = true);
                return Ok(());
            }
            return Err(HypervisorError::Failed("copy", libc::EFAULT));
        }
        let skips = self.0.plant.get() == Plant::CopySkipped;
        for segment in segments.iter_mut() {
            if skips && self.0.chance(1, 32) {
                segment.copied = true;
                continue;
            }
            match self.xen().copy_one(segment) {
                Ok(copied) => segment.copied = copied,
                Err(what) => self.0.fail(what),
            }
            if self.xen().copy_ns > 0 {
                let mut xen = self.xen();
                xen.owed_ns += xen.copy_ns;
                let us = xen.owed_ns / 1000;
                xen.owed_ns %= 1000;
                self.0.clock.advance_to(self.0.clock.now_us() + us);
            }
            self.0.note("copied", segment.grant.into(), segment.copied.into());
        }
        Ok(())
    }
}

impl Hypervisor for SimXen {
    fn map(&mut self, domain: DomainId, grants: &[GrantRef]) -> Result<RingMapping, HypervisorError> {
        self.0.point("map", domain.into(), grants.len() as u64);
        let mut xen = self.xen();
        if let Some(left) = xen.fail_map_after.take() {
            if left == 0 {
                return Err(HypervisorError::Failed("map", 12));
            }
            xen.fail_map_after = Some(left - 1);
        }
        if xen.fail_map > 0 {
            xen.fail_map -= 1;
            return Err(HypervisorError::Failed("map", libc::ENOMEM));
        }
        let bad = HypervisorError::BadGrant(grants.first().copied().unwrap_or(0));
        let Some(owner) = xen.domains.get(&domain) else { return Err(bad) };
        let mut frames = Vec::new();
        for grant in grants {
            match owner.grants.get(grant) {
                Some(granted) if !granted.read_only => frames.push(granted.frame),
                _ => return Err(HypervisorError::BadGrant(*grant)),
            }
        }
        let address = owner.memory.map_again(&frames);
        let (id, length_bytes) = (xen.mappings_made, frames.len() * PAGE);
        xen.mappings_made += 1;
        xen.mappings.insert(id, (domain, address as usize, length_bytes));
        Ok(RingMapping { id, address, length_bytes })
    }

    fn unmap(&mut self, mapping: RingMapping) {
        self.0.point("unmap", mapping.id.into(), 0);
        if self.0.plant.get() == Plant::UnmapDropped {
            return;
        }
        match self.xen().mappings.remove(&mapping.id) {
            Some((_, address, length)) => memory::unmap(address as *mut u8, length),
            None => self.0.fail(format!("unmapped twice: {mapping:?}")),
        }
    }

    fn copy(&mut self, segments: &mut [CopySegment]) -> Result<(), HypervisorError> {
        self.0.point("copy", segments.len() as u64, 0);
        let result = self.copy_all(segments);
        let locals: BTreeSet<*const u8> =
            segments.iter().map(|one| one.local.address().cast_const()).collect();
        self.0.media.borrow_mut().copied(&|address| locals.contains(&address));
        result
    }

    fn bind(&mut self, domain: DomainId, remote_port: u32) -> Result<Port, HypervisorError> {
        self.0.point("bind", domain.into(), remote_port.into());
        let mut xen = self.xen();
        if xen.fail_bind > 0 {
            xen.fail_bind -= 1;
            return Err(HypervisorError::Failed("bind", libc::ENOMEM));
        }
        let mut free = 1;
        while xen.locals.contains_key(&free) {
            free += 1;
        }
        let remote = xen.domains.get_mut(&domain).and_then(|owner| owner.remotes.get_mut(&remote_port));
        match remote {
            Some(remote) if remote.bound.is_none() => remote.bound = Some(free),
            _ => return Err(HypervisorError::BadPort(remote_port)),
        }
        xen.locals.insert(free, Local { domain, remote: remote_port, pending: false, enabled: true });
        xen.raise(free);
        Ok(Port(free))
    }

    fn unbind(&mut self, port: Port) {
        self.0.point("unbind", port.0.into(), 0);
        if self.0.plant.get() == Plant::UnbindDropped {
            return;
        }
        let mut xen = self.xen();
        match xen.locals.remove(&port.0) {
            Some(local) => xen.close_remote(&local),
            None => self.0.fail(format!("unbound twice: {port:?}")),
        }
    }

    fn pending(&mut self, ports: &mut Vec<Port>) {
        self.0.point("pending", 0, 0);
        let faults = self.0.faults.get();
        let mut xen = self.xen();
        if self.0.strikes(faults.overflow) {
            // Which events were lost is unknown: every bound port counts.
            xen.delivered.clear();
            ports.extend(xen.locals.keys().map(|port| Port(*port)));
            for local in xen.locals.values_mut() {
                local.enabled = false;
            }
            return;
        }
        let bound: Vec<u32> = xen.locals.keys().copied().collect();
        for port in bound {
            if self.0.strikes(faults.spurious) {
                xen.raise(port);
            }
        }
        while let Some(port) = xen.delivered.pop_front() {
            if xen.locals.contains_key(&port) {
                ports.push(Port(port));
            }
        }
    }

    fn unmask(&mut self, ports: &[Port]) {
        for port in ports {
            self.0.point("unmask", port.0.into(), 0);
            if self.0.plant.get() == Plant::UnmaskDropped && self.0.chance(1, 8) {
                continue;
            }
            let mut xen = self.xen();
            let Some(local) = xen.locals.get_mut(&port.0) else {
                self.0.fail(format!("{port:?} is unmasked and not bound"));
                continue;
            };
            local.enabled = true;
            if std::mem::take(&mut local.pending) {
                xen.raise(port.0);
            }
        }
    }

    fn notify(&mut self, port: Port) {
        self.0.point("notify", port.0.into(), 0);
        if self.0.plant.get() == Plant::NotifyDropped && self.0.chance(1, 8) {
            return;
        }
        let mut xen = self.xen();
        let Some(local) = xen.locals.get(&port.0) else {
            return self.0.fail(format!("{port:?} is notified and not bound"));
        };
        let (domain, remote) = (local.domain, local.remote);
        let remote = xen.domains.get_mut(&domain).and_then(|owner| owner.remotes.get_mut(&remote));
        if let Some(remote) = remote {
            remote.pending = true;
        }
    }
}
