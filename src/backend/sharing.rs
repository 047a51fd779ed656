//! Who may have an image open together: readers; whoever the administrator vouches for (`mode` with `!`); and two domains of
//! one virtual machine, a guest and its stub domain, or both ends of a migration within the host.
//!
//! Of an image with a format there is one opening only, whose metadata nobody else may change: two domains of one machine use
//! the same disk, and a `!` vouches for nothing.

use xenstore::{Job, Outcome, Path};

use super::{Backend, Device, OpenImage, Pending, Purpose, media};
use crate::hypervisor::{DomainId, Hypervisor};
use crate::params::{Format, Image};
use crate::pump::DiskId;
use crate::storage::{Access, Identity, Storage};
use crate::vbd::{self, Address, OpenRequest};
use crate::xenbus::Session;

/// Why a disk is not opened.
pub(super) fn refusal(image: &Image, other: Address) -> String {
    let way_out = match image.format {
        Format::Raw => "detach it there, or use mode w! if the guests know how to share it",
        _ => "detach it there, or give each guest an overlay of its own",
    };
    let (guest, device) = (other.frontend, other.devid);
    format!("{} is in use by guest {guest} as device {device}, and not both read-only; {way_out}", image.path)
}

/// Whether `request` does not go together with what `other` has open. It asks for itself alone if it writes: another user's
/// `!` vouches for that user only.
fn clashes(request: &OpenRequest, other: &OpenRequest) -> bool {
    if request.image.format != Format::Raw || other.image.format != Format::Raw {
        return !(request.read_only && other.read_only);
    }
    !(request.forced || request.read_only && (other.read_only || other.forced))
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    /// Who else has the same file open in a way that does not go together with `request`: as its disk, or below it. What lies
    /// below a disk is read, and must not change.
    pub(super) fn sharer(
        &self,
        address: Address,
        identity: Identity,
        parents: &[Identity],
        request: &OpenRequest,
    ) -> Option<Address> {
        let kin = self.devices.get(&address).and_then(|device| device.kin);
        let clash = |device: &Device| {
            device.image.as_ref().is_some_and(|image| {
                let other = image.opened.identity;
                (other == identity && clashes(request, &image.request))
                    || (parents.contains(&other) && !image.request.read_only)
                    || (image.parents.contains(&identity) && !request.read_only)
            })
        };
        let mut others = self.devices.iter().filter(|(other, _)| **other != address);
        others.find(|(other, device)| kin != Some(other.frontend) && clash(device)).map(|(other, _)| *other)
    }

    pub(super) fn open_image(&mut self, session: &mut Session, address: Address, request: OpenRequest) {
        let path = &request.image.path;
        let same = |device: &Device| {
            device
                .image
                .as_ref()
                .is_some_and(|image| image.request.image.path == *path && clashes(&request, &image.request))
        };
        let mut others = self.devices.iter().filter(|(other, _)| other.frontend != address.frontend);
        let other = others.find(|(_, device)| same(device)).map(|(other, _)| *other);
        let Some(device) = self.devices.get_mut(&address) else { return };
        device.kin = None;
        let Some(other) = other else {
            let access = match (request.read_only, request.forced) {
                (true, _) => Access::ReadOnly,
                (false, true) if request.image.format == Format::Raw => Access::ReadWriteShared,
                (false, _) => Access::ReadWrite,
            };
            return self.start_open(address, request, access);
        };
        device.opening = Some(request);
        let node = |domain: DomainId, name: &str| Path::parse(&format!("/local/domain/{domain}/{name}")).ok();
        let paths = [address.frontend, other.frontend]
            .into_iter()
            .flat_map(|domain| [node(domain, "vm"), node(domain, "target")])
            .flatten()
            .collect();
        match session.submit(Job::Read(paths)) {
            Ok(id) => {
                self.jobs.insert(id, Purpose::Kinship(address, other));
            }
            Err(_) => self.kinship_known(address, other, false),
        }
    }

    /// `vm` names a virtual machine (a path with its uuid), `target` is the domain that a stub domain works for. A driver
    /// domain may read neither, as a rule.
    pub(super) fn kinship_read(&mut self, address: Address, other: Address, outcome: Outcome) {
        let Outcome::Read(values) = outcome else {
            return self.kinship_known(address, other, false);
        };
        let mut texts = values
            .into_iter()
            .map(|value| value.ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default());
        let mut next = || texts.next().unwrap_or_default();
        let (own_vm, own_target, other_vm, other_target) = (next(), next(), next(), next());
        let one_vm = !own_vm.is_empty() && own_vm == other_vm;
        let stub = own_target == other.frontend.to_string() || other_target == address.frontend.to_string();
        self.kinship_known(address, other, one_vm || stub);
    }

    pub(super) fn kinship_known(&mut self, address: Address, other: Address, kin: bool) {
        let Some(device) = self.devices.get_mut(&address) else { return };
        let Some(request) = device.opening.take() else { return };
        if !kin {
            let text = refusal(&request.image, other);
            self.pending.push_back((address, Pending::Step(vbd::Event::Opened(Err(text)))));
            return;
        }
        device.kin = Some(other.frontend);
        if request.image.format != Format::Raw {
            return self.share_disk(address, other, request);
        }
        // The other one has the claim and the lock.
        let access = if request.read_only { Access::ReadOnly } else { Access::ReadWriteShared };
        self.start_open(address, request, access);
    }

    /// Has a device use the disk that another of the same machine has open.
    fn share_disk(&mut self, address: Address, other: Address, request: OpenRequest) {
        let shared = self.devices.get(&other).filter(|device| !device.closing_image);
        let Some(image) = shared.and_then(|device| device.image.clone()) else {
            return self.start_open(address, request, Access::ReadWrite);
        };
        let event = if image.request.read_only == request.read_only {
            let geometry = media::geometry_of(&image.opened);
            if let Some(device) = self.devices.get_mut(&address) {
                device.image = Some(OpenImage { request, ..image });
            }
            self.disks_changed = true;
            Ok(geometry)
        } else {
            Err(refusal(&request.image, other))
        };
        self.pending.push_back((address, Pending::Step(vbd::Event::Opened(event))));
    }

    /// Whether another device uses the same disk.
    pub(super) fn is_shared(&self, address: Address, disk: DiskId) -> bool {
        let has = |device: &Device| device.image.as_ref().is_some_and(|image| image.disk == disk);
        self.devices.iter().any(|(other, device)| *other != address && has(device))
    }

    fn start_open(&mut self, address: Address, request: OpenRequest, access: Access) {
        let Some(device) = self.devices.get_mut(&address) else { return };
        self.pump.storage.open_image(device.token, &request.image, access);
        device.opening = Some(request);
    }
}
