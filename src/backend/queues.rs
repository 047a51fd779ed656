//! The queues of a disk's ring: all of them are connected, or none is.

use super::{Backend, Ending, Pending};
use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::pump::{AttachError, DiskId, QueueId, RingPlan};
use crate::storage::Storage;
use crate::vbd::{self, Address, ConnectError, ConnectPlan, Disconnect, Misdeed};

/// Queues that were attached before one could not be, and why that one could not.
struct Partial {
    queues: Vec<QueueId>,
    error: ConnectError,
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    pub(super) fn connect(&mut self, address: Address, plan: ConnectPlan) {
        let image = self.devices.get(&address).and_then(|device| device.image.as_ref());
        let Some(disk) = image.map(|image| image.disk) else {
            let error = ConnectError::Failed("no image is open".to_owned());
            return self.connect_ended(address, Err(error));
        };
        let terms = plan.terms;
        self.pump.set_terms(disk, super::offers::taken(&terms.offered), terms.in_order, terms.detect_zeroes);
        let mut refused = None;
        for (which, ring) in plan.rings.iter().enumerate() {
            let attached = self.attach_all(address, disk, &plan, ring);
            match attached {
                Ok(queues) => {
                    self.notice_connected(address, &plan, ring);
                    if let Some(device) = self.devices.get_mut(&address) {
                        device.queues = queues.into_iter().map(|queue| (queue, false)).collect();
                        device.plan = Some(plan);
                    }
                    return self.connect_ended(address, Ok(which));
                }
                Err(Partial { queues, error }) => {
                    let error = refused.take().unwrap_or(error);
                    if let Some(rest) = self.undo(address, queues, plan.resume, error) {
                        refused = Some(rest);
                    } else {
                        // The answer comes when the last of them has answered what it owed. Another way to read the
                        // nodes is then tried with the next attempt, if at all: a predecessor served this one.
                        return;
                    }
                }
            }
        }
        let error = refused.unwrap_or_else(|| ConnectError::Failed("no ring is named".to_owned()));
        self.connect_ended(address, Err(error));
    }

    fn connect_ended(&mut self, address: Address, result: Result<usize, ConnectError>) {
        let event = match result {
            Ok(which) => vbd::Event::Connected(which),
            Err(error) => vbd::Event::ConnectFailed(error),
        };
        self.pending.push_back((address, Pending::Step(event)));
    }

    fn notice_connected(&mut self, address: Address, plan: &ConnectPlan, ring: &vbd::RingPlan) {
        let again = if plan.resume { "taken over from a predecessor" } else { "connected" };
        let pages = ring.queues.first().map_or(0, |queue| queue.ring_refs.len());
        let (queues, protocol) = (ring.queues.len(), ring.abi.protocol());
        let shape = if ring.is_plain() { String::new() } else { format!(", queues {queues}, pages {pages}") };
        // A guest can connect as often as it likes.
        self.notice(address, log::Level::Info, &format!("{again}, {protocol}{shape}"));
    }

    fn attach_all(
        &mut self,
        address: Address,
        disk: DiskId,
        plan: &ConnectPlan,
        ring: &vbd::RingPlan,
    ) -> Result<Vec<QueueId>, Partial> {
        let mut queues = Vec::with_capacity(ring.queues.len());
        for (number, queue) in ring.queues.iter().enumerate() {
            let one = RingPlan {
                domain: plan.domain,
                grants: queue.ring_refs.clone(),
                remote_port: queue.event_channel,
                abi: ring.abi,
                resume: plan.resume,
                journal: format!("{}-{}-{}-{number}", address.kind.name(), address.frontend, address.devid),
            };
            match self.pump.attach(disk, &one) {
                Ok(queue) => {
                    if ring.persistent {
                        self.pump.keep_grants(queue);
                    }
                    queues.push(queue);
                }
                Err(error) => return Err(Partial { queues, error: connect_error(error) }),
            }
        }
        Ok(queues)
    }

    /// Gives up what was attached of a ring that cannot be connected as a whole. Gives the error back if that is done;
    /// otherwise queues owe answers, as they have inherited requests, and the error is kept until they have given them.
    fn undo(
        &mut self,
        address: Address,
        queues: Vec<QueueId>,
        resume: bool,
        error: ConnectError,
    ) -> Option<ConnectError> {
        let mut owing = Vec::new();
        for queue in queues {
            // A predecessor's ring is left for the next attempt, with its journal.
            if self.pump.unanswered(queue) > 0 || !self.pump.detach(queue, !resume) {
                self.pump.quiesce(queue);
                owing.push((queue, false));
            }
        }
        let device = self.devices.get_mut(&address).filter(|_| !owing.is_empty());
        let Some(device) = device else { return Some(error) };
        device.queues = owing;
        device.ending = Ending::Undoing;
        device.undone = Some(error);
        None
    }

    pub(super) fn disconnect(&mut self, address: Address, how: Disconnect) {
        let Some(device) = self.devices.get_mut(&address) else { return };
        if device.queues.is_empty() {
            self.pending.push_back((address, Pending::Step(vbd::Event::Disconnected)));
            return;
        }
        let queues: Vec<QueueId> = device.queues.iter().map(|(queue, _)| *queue).collect();
        match (device.ending, how) {
            // What is past draining ends by itself. The flush may take as long as the storage likes, though, and a guest
            // that is gone must not wait for it with its pages: that would keep the domain from being freed.
            (Ending::Syncing(_), Disconnect::Abort) => {}
            (Ending::Syncing(_), _) => return,
            // An abort may overtake a drain.
            _ => device.ending = Ending::Draining(how),
        }
        for queue in queues {
            match how {
                Disconnect::Drain => self.pump.close(queue),
                Disconnect::Abort => self.pump.abort(queue),
                Disconnect::HandOver => self.pump.quiesce(queue),
            }
        }
    }

    pub(super) fn queue_drained(&mut self, queue: QueueId) {
        let Some(address) = self.device_of(queue) else { return };
        let Some(device) = self.devices.get_mut(&address) else { return };
        for (known, drained) in &mut device.queues {
            *drained |= *known == queue;
        }
        if !device.queues.iter().all(|(_, drained)| *drained) {
            return;
        }
        match (device.ending, &device.image) {
            (Ending::No | Ending::Syncing(_), _) => {}
            (Ending::Undoing, _) => self.undone(address),
            (Ending::Draining(how @ (Disconnect::Drain | Disconnect::HandOver)), Some(image)) => {
                device.ending = Ending::Syncing(how);
                self.pump.sync(image.disk);
            }
            (Ending::Draining(how), _) => self.disconnected(address, how),
        }
    }

    /// The last of the queues that were connected in vain has answered.
    fn undone(&mut self, address: Address) {
        self.detach_all(address, false);
        let error = self.devices.get_mut(&address).and_then(|device| device.undone.take());
        let error =
            error.unwrap_or_else(|| ConnectError::Failed("not all queues could be connected".to_owned()));
        self.connect_ended(address, Err(error));
    }

    pub(super) fn disconnected(&mut self, address: Address, how: Disconnect) {
        self.detach_all(address, how != Disconnect::HandOver);
        self.pending.push_back((address, Pending::Step(vbd::Event::Disconnected)));
    }

    fn detach_all(&mut self, address: Address, forget: bool) {
        let Some(device) = self.devices.get_mut(&address) else { return };
        device.ending = Ending::No;
        device.plan = None;
        for (queue, _) in std::mem::take(&mut device.queues) {
            if !self.pump.detach(queue, forget) {
                log::error!("{address}: a queue was detached while it owed answers");
            }
        }
    }
}

fn connect_error(error: AttachError) -> ConnectError {
    match error {
        AttachError::Hypervisor(HypervisorError::BadGrant(grant)) => {
            ConnectError::Misbehaved(Misdeed::BadGrant(grant))
        }
        AttachError::Hypervisor(HypervisorError::BadPort(port)) => {
            ConnectError::Misbehaved(Misdeed::BadPort(port))
        }
        AttachError::Hypervisor(HypervisorError::Failed(call, errno)) => {
            let reason = std::io::Error::from_raw_os_error(errno);
            ConnectError::Failed(format!("{call} failed: {reason}"))
        }
        AttachError::Unrecorded => ConnectError::Failed(
            "the ring has requests of a time that no journal in the state directory tells of; start vbdd with the \
             --state-dir of the last one, or, if that one was stopped with SIGTERM, with --assume-clean"
                .to_owned(),
        ),
    }
}
