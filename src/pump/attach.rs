//! How a queue begins: its ring mapped, its port bound, its journal opened, and what a predecessor owed taken over.

use rings::{BackRing, SharedPages};

use super::{AttachError, DiskId, Pump, QueueId, RingPlan, place_in};
use crate::hypervisor::Hypervisor;
use crate::journal::{Journal, Memory, Owed, RECORD_VERSION, RingRecord};
use crate::queue::Queue;
use crate::storage::Storage;

impl<H: Hypervisor, S: Storage> Pump<H, S> {
    /// Maps a ring, binds its event channel and starts to serve it from `disk`.
    ///
    /// # Errors
    /// When the guest's references or port do not hold, or the hypervisor fails; nothing stays mapped or bound.
    pub fn attach(&mut self, disk: DiskId, plan: &RingPlan) -> Result<QueueId, AttachError> {
        let mapping = self.hypervisor.map(plan.domain, &plan.grants).map_err(AttachError::Hypervisor)?;
        let port = match self.hypervisor.bind(plan.domain, plan.remote_port) {
            Ok(port) => port,
            Err(error) => {
                self.hypervisor.unmap(mapping);
                return Err(AttachError::Hypervisor(error));
            }
        };
        // SAFETY: the mapping is as long as `grants` says, stays until `detach` or `abort` drops the ring first, and is
        // not touched but through it.
        let shared = unsafe { SharedPages::new(mapping.address, plan.grants.len()) };
        let Some((journal, owed)) = self.open_journal(plan, &shared) else {
            self.hypervisor.unbind(port);
            self.hypervisor.unmap(mapping);
            return Err(AttachError::Unrecorded);
        };
        // A fresh ring has answered nothing, so this is where it starts too; and a frontend that does not wait for state
        // 4 may have been served by a predecessor that died before it wrote it.
        let ring = BackRing::resume(shared, plan.abi, u32::try_from(owed.len()).unwrap_or(0));
        let guest = (plan.domain, self.guests.join(plan.domain));
        let (device, in_order) = self.disk(disk.0).map_or((0, false), |disk| (disk.device, disk.in_order));
        let mut queue = Queue::new(disk.0, guest, port, ring, mapping, journal, in_order);
        queue.flow = self.fair.join(guest.1, device);
        let inherited = queue.inherit(&owed, plan.abi);
        let id = place_in(&mut self.queues, queue);
        self.names.resize(self.queues.len(), String::new());
        if let Some(name) = self.names.get_mut(id as usize) {
            name.clone_from(&plan.journal);
        }
        self.by_port.insert(port, id);
        for (place, slot) in inherited {
            self.admit(id, place, &slot);
        }
        if plan.resume {
            // The predecessor may have died between publishing answers and announcing them.
            self.hypervisor.notify(port);
        }
        self.list(id);
        Ok(QueueId(id))
    }

    /// Opens a ring's journal, if there can be one, and reads from it what a predecessor owed. `None` for a predecessor's ring
    /// with requests on it of which nothing is written down.
    fn open_journal(
        &mut self,
        plan: &RingPlan,
        shared: &SharedPages,
    ) -> Option<(Option<Journal>, Vec<Owed>)> {
        let record = RingRecord {
            version: RECORD_VERSION,
            domain: plan.domain,
            protocol: plan.abi.protocol().to_owned(),
            grants: plan.grants.clone(),
            remote_port: plan.remote_port,
        };
        let entries = shared.entries(plan.abi);
        let produced = BackRing::responses_produced(shared);
        let mut journals = self.journals.borrow_mut();
        let memory = journals.open(&plan.journal, Memory::needed_bytes(entries));
        if plan.resume
            && let Some(memory) = memory
            && let Some((journal, owed)) = Journal::inherit(memory, entries, &record, produced)
        {
            return Some((Some(journal), owed));
        }
        if plan.resume && !self.assume_clean && !BackRing::is_idle(shared) {
            if let Some(memory) = memory {
                journals.close(&plan.journal, memory, false);
            }
            return None;
        }
        let created = memory.and_then(|memory| Journal::create(memory, entries, &record, produced));
        if let (None, Some(memory)) = (&created, memory) {
            journals.close(&plan.journal, memory, true);
        }
        Some((created, Vec::new()))
    }
}
