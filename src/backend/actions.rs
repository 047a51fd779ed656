//! The actions of the state machines, carried out.

use xenstore::{Edit, ErrorCode, Failure, Guard, Job, Outcome, Path};

use super::{Backend, Ending, Pending, Purpose};
use crate::hypervisor::{DomainId, Hypervisor};
use crate::pump::DiskId;
use crate::storage::{Storage, StorageError};
use crate::vbd::{self, Action, Address, Key, Node, Notice, Side};
use crate::xenbus::Session;

/// The path of a key of a device.
pub(super) fn path_of(address: &Address, own: DomainId, key: &Key) -> Option<Path> {
    let directory = match key.side {
        Side::Backend => address.backend_path(own),
        Side::Frontend => address.frontend_path(),
    };
    Path::parse(&format!("{directory}/{}", key.name)).ok()
}

/// What a read of a node says.
pub(super) fn node_of(value: Result<Vec<u8>, ErrorCode>) -> Node {
    match value {
        Ok(bytes) => Node::Present(bytes),
        Err(ErrorCode::Denied) => Node::Denied,
        Err(_) => Node::Missing,
    }
}

/// What a publication's end means to the state machine.
pub(super) fn publication_outcome(outcome: Outcome) -> vbd::Event<'static> {
    match outcome {
        Outcome::Committed { .. } | Outcome::Done => vbd::Event::Published,
        Outcome::GuardFailed { .. } | Outcome::Failed(Failure::ConnectionLost { .. }) => {
            vbd::Event::Superseded
        }
        Outcome::Failed(Failure::Refused { code, path }) if super::quotas::is_quota(code) => {
            let failure = Failure::Refused { code, path };
            vbd::Event::PublishFailed(format!("{failure}; {}", super::quotas::RAISE))
        }
        Outcome::Failed(failure) => vbd::Event::PublishFailed(failure.to_string()),
        other => vbd::Event::PublishFailed(format!("xenstored answered {other:?}")),
    }
}

/// An operator's words for a storage error.
pub(super) fn storage_error_text(error: &StorageError) -> String {
    match error {
        StorageError::Os(errno) => std::io::Error::from_raw_os_error(*errno).to_string(),
        StorageError::PastEnd => "the image is shorter than it was when it was opened".to_owned(),
    }
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    pub(super) fn act(&mut self, session: &mut Session, address: Address, action: Action) {
        log::trace!("{address}: {action:?}");
        match action {
            Action::ReadWorld => self.read_world(session, address),
            Action::Open(request) if request.is_empty() => self.open_empty(address, request),
            Action::Open(request) => self.open_image(session, address, request),
            Action::CloseImage => self.close_image(address),
            Action::Connect(plan) => self.connect(address, plan),
            Action::Disconnect(how) => self.disconnect(address, how),
            Action::Publish(publication) => {
                let own = self.options.vbd.own_domain;
                let directory = address.backend_path(own);
                let path = |name: &str| Path::parse(&format!("{directory}/{name}")).ok();
                let writes = publication.writes.iter();
                let writes =
                    writes.filter_map(|(name, value)| Some(Edit::Write(path(name)?, value.clone().into())));
                let removals = publication.removals.iter().filter_map(|name| Some(Edit::Remove(path(name)?)));
                self.publish(session, address, &publication.guards, removals.chain(writes).collect());
            }
            Action::RemoveBackend(guards) => {
                let Ok(path) = Path::parse(&address.backend_path(self.options.vbd.own_domain)) else {
                    return;
                };
                self.publish(session, address, &guards, vec![Edit::Remove(path)]);
            }
            Action::ArmTimer(timer) => {
                let at = self.now + std::time::Duration::from_millis(timer.delay_ms());
                if let Some(device) = self.devices.get_mut(&address) {
                    device.timers.insert(timer, at);
                    self.due_at(at);
                }
            }
            Action::CancelTimer(timer) => {
                if let Some(device) = self.devices.get_mut(&address) {
                    device.timers.remove(&timer);
                }
            }
            Action::Report(notice) => self.report(address, &notice),
            Action::Forget => self.forget(session, address),
            Action::Stopped => {
                if let Some(device) = self.devices.get_mut(&address) {
                    device.stopped = true;
                }
            }
        }
    }

    fn report(&mut self, address: Address, notice: &Notice) {
        let (level, text) = match notice {
            Notice::Misbehaved(misdeed) => (log::Level::Warn, misdeed.to_string()),
            Notice::Refused(text) => (log::Level::Error, format!("not served: {text}")),
            Notice::WillRetry(text) => (log::Level::Warn, format!("{text}; trying again")),
            Notice::PublishFailed(text) => (log::Level::Error, format!("xenstore: {text}; trying again")),
        };
        self.notice(address, level, &text);
    }

    fn publish(&mut self, session: &mut Session, address: Address, guards: &[vbd::Guard], edits: Vec<Edit>) {
        let own = self.options.vbd.own_domain;
        let guards = guards.iter().filter_map(|guard| {
            let expected = match &guard.expected {
                Node::Present(bytes) => Guard::Equals(bytes.clone()),
                Node::Missing => Guard::Absent,
                // What may not be read cannot be compared; when that changes, a watch fires.
                Node::Denied => return None,
            };
            Some((path_of(&address, own, &guard.key)?, expected))
        });
        match session.submit(Job::Transaction { guards: guards.collect(), edits }) {
            Ok(id) => {
                self.jobs.insert(id, Purpose::Publish(address));
            }
            Err(error) => {
                let event = vbd::Event::PublishFailed(error.to_string());
                self.pending.push_back((address, Pending::Step(event)));
            }
        }
    }

    fn close_image(&mut self, address: Address) {
        let disk =
            self.devices.get(&address).and_then(|device| device.image.as_ref()).map(|image| image.disk);
        let is_last = disk.is_some_and(|disk| !self.is_shared(address, disk));
        self.disks_changed = true;
        let Some(device) = self.devices.get_mut(&address) else { return };
        match disk {
            Some(disk) if is_last => {
                device.closing_image = true;
                self.pump.close_disk(disk);
            }
            _ => {
                device.image = None;
                self.pending.push_back((address, Pending::Step(vbd::Event::ImageClosed)));
            }
        }
    }

    pub(super) fn disk_synced(&mut self, disk: DiskId, durable: bool) {
        // Of several that use the disk, the one that waits.
        let waits = |device: &super::Device| {
            let holds = device.image.as_ref().is_some_and(|image| image.disk == disk);
            holds && (device.closing_image || matches!(device.ending, Ending::Syncing(_)))
        };
        let found = self.devices.iter().find(|(_, device)| waits(device)).map(|(address, _)| *address);
        let Some(address) = found else { return };
        if !durable {
            let path = self.image_path(address);
            self.notice(
                address,
                log::Level::Error,
                &format!("flushing {path} failed: written data may be lost"),
            );
        }
        let Some(device) = self.devices.get_mut(&address) else { return };
        if let Ending::Syncing(how) = device.ending {
            self.disconnected(address, how);
        } else if std::mem::take(&mut device.closing_image) {
            device.image = None;
            self.pump.remove_disk(disk);
            self.pending.push_back((address, Pending::Step(vbd::Event::ImageClosed)));
        }
    }
}
