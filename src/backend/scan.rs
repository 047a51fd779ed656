//! Which devices there are: the watches of the kinds' directories, and their listing.

use std::collections::BTreeMap;

use xenstore::{Job, Outcome, Path, SubmitError, WatchToken};

use super::notices::Bucket;
use super::{Backend, Device, Ending, Pending, Purpose};
use crate::hypervisor::{DomainId, Hypervisor};
use crate::limits::DEVICES_MAX;
use crate::storage::Storage;
use crate::vbd::{self, Address, Kind, Vbd};
use crate::xenbus::Session;

/// Tokens below this are the watches of the kinds' directories.
pub(super) const FIRST_DEVICE_TOKEN: u64 = 16;

/// The kind whose directory a token watches.
pub(super) fn kind_of(token: WatchToken) -> Option<Kind> {
    Kind::ALL.into_iter().find(|kind| token_of(*kind) == token)
}

fn token_of(kind: Kind) -> WatchToken {
    WatchToken(match kind {
        Kind::Vbd => 1,
        Kind::Vbd3 => 2,
        Kind::Qdisk => 3,
    })
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    fn directory(&self, kind: Kind) -> Option<Path> {
        Path::parse(&format!("/local/domain/{}/backend/{}", self.options.vbd.own_domain, kind.name())).ok()
    }

    /// A connection to xenstore stands, the first or another: everything may have changed.
    pub(super) fn connection_made(&mut self, session: &mut Session) {
        for kind in self.options.kinds.clone() {
            let Some(directory) = self.directory(kind) else { continue };
            if let Err(error) = session.watch(&directory, token_of(kind)) {
                log::error!("cannot watch {directory}: {error}");
            }
        }
        let addresses: Vec<Address> = self.devices.keys().copied().collect();
        for address in addresses {
            self.changed(address);
        }
    }

    fn changed(&mut self, address: Address) {
        self.pending.push_back((address, Pending::Step(vbd::Event::Changed)));
    }

    /// Something changed at or below a kind's directory.
    pub(super) fn backend_changed(&mut self, session: &mut Session, kind: Kind, path: &Path) {
        if let Some((address, _)) = Address::parse(path.as_str(), self.options.vbd.own_domain) {
            self.meet(session, address);
            return self.changed(address);
        }
        // The directory itself, or a guest's: it was made, removed, or the event stands for several.
        let own: Vec<Address> = self.devices.keys().filter(|address| address.kind == kind).copied().collect();
        for address in own {
            self.changed(address);
        }
        self.list(session, Purpose::ListGuests(kind));
    }

    /// Starts a listing. One that the client has no room for is due again.
    pub(super) fn list(&mut self, session: &mut Session, purpose: Purpose) {
        let directory = match purpose {
            Purpose::ListGuests(kind) => self.directory(kind),
            Purpose::ListDevices(kind, guest) => {
                self.directory(kind).and_then(|directory| directory.child(&guest.to_string()).ok())
            }
            Purpose::ReadWorld(_) | Purpose::ReadFurther(_) | Purpose::Kinship(..) | Purpose::Publish(_) => {
                None
            }
        };
        let Some(directory) = directory else { return };
        match session.submit(Job::List(directory.clone())) {
            Ok(id) => {
                self.jobs.insert(id, purpose);
            }
            Err(SubmitError::Full) => {
                if !self.unlisted.contains(&purpose) {
                    self.unlisted.push(purpose);
                }
            }
            Err(error) => log::error!("cannot list {directory}: {error}; disks there may go unseen"),
        }
    }

    pub(super) fn guests_listed(&mut self, session: &mut Session, kind: Kind, outcome: Outcome) {
        let Outcome::Listed(names) = outcome else { return };
        for name in names {
            // Only the canonical spelling: others would be guests of the same number, and `list` writes it anew.
            let Ok(guest) = name.parse::<DomainId>() else { continue };
            if guest.to_string() == name {
                self.list(session, Purpose::ListDevices(kind, guest));
            }
        }
    }

    pub(super) fn devices_listed(
        &mut self,
        session: &mut Session,
        kind: Kind,
        guest: DomainId,
        outcome: &Outcome,
    ) {
        let Outcome::Listed(names) = outcome else { return };
        let own = self.options.vbd.own_domain;
        for name in names {
            let path = format!("/local/domain/{own}/backend/{}/{guest}/{name}", kind.name());
            if let Some((address, "")) = Address::parse(&path, own) {
                self.meet(session, address);
                self.changed(address);
            }
        }
    }

    /// Makes a vbd for an address that has none.
    fn meet(&mut self, session: &mut Session, address: Address) {
        if self.stopping || self.devices.contains_key(&address) || !self.options.kinds.contains(&address.kind)
        {
            return;
        }
        if self.devices.len() >= DEVICES_MAX {
            log::error!("{address}: not served, as there are {DEVICES_MAX} disks already");
            return;
        }
        let token = self.next_token;
        self.next_token += 1;
        if let Ok(path) = Path::parse(&format!("{}/state", address.frontend_path()))
            && let Err(error) = session.watch(&path, WatchToken(token))
        {
            log::error!("{address}: cannot watch the frontend: {error}");
        }
        self.by_token.insert(token, address);
        let device = Device {
            vbd: Vbd::new(address, self.options.vbd),
            token,
            image: None,
            opening: None,
            kin: None,
            closing_image: false,
            queues: Vec::new(),
            plan: None,
            undone: None,
            ending: Ending::No,
            partial: None,
            timers: BTreeMap::new(),
            reads: Bucket::default(),
            read_at: None,
            notices: Bucket::default(),
            notices_dropped: 0,
            stopped: false,
        };
        self.devices.insert(address, device);
    }

    /// Drops a vbd that holds nothing.
    pub(super) fn forget(&mut self, session: &mut Session, address: Address) {
        let Some(device) = self.devices.remove(&address) else { return };
        self.by_token.remove(&device.token);
        self.unwatched.retain(|(_, token, _)| token.0 != device.token);
        if let Ok(path) = Path::parse(&format!("{}/state", address.frontend_path())) {
            session.unwatch(&path, WatchToken(device.token));
        }
        log::info!("{address}: gone");
    }
}
