//! Images that change while they are open: drives without a medium, files and devices that grow.

use formats::Raw;

use super::{Backend, OpenImage, Pending};
use crate::hypervisor::Hypervisor;
use crate::params::Format;
use crate::pump::DiskPlan;
use crate::storage::{FileId, Identity, Opened, Storage};
use crate::vbd::{self, Address, Geometry, OpenRequest};

/// What an empty drive says of its medium.
const NOTHING: Opened = Opened {
    file: FileId::NONE,
    identity: Identity::Device { number: u64::MAX },
    size_bytes: 0,
    physical_block_bytes: 512,
    direct: false,
    locked: true,
    discard: None,
};

/// How an image can be punched.
fn discard_of(opened: &Opened) -> Option<vbd::Discard> {
    opened.discard.map(|unit| vbd::Discard {
        granularity_bytes: unit.granularity_bytes,
        alignment_bytes: unit.alignment_bytes,
    })
}

/// What a guest is told of an image that was opened.
pub(super) fn geometry_of(opened: &Opened) -> Geometry {
    Geometry {
        sectors: opened.size_bytes / formats::SECTOR_BYTES,
        physical_sector_bytes: opened.physical_block_bytes,
        discard: discard_of(opened),
    }
}

/// What came of looking at an image's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Its size now, in sectors of 512 bytes.
    pub sectors: u64,
    /// What it was.
    pub before: u64,
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    /// A drive without a medium: no sector, and every read fails.
    pub(super) fn open_empty(&mut self, address: Address, request: OpenRequest) {
        let plan = DiskPlan::new(FileId::NONE, 0, true);
        let disk = self.pump.add_disk(&plan);
        if let Some(device) = self.devices.get_mut(&address) {
            device.image = Some(OpenImage { opened: NOTHING, parents: Vec::new(), disk, request });
        }
        let geometry = Geometry { sectors: 0, physical_sector_bytes: 512, discard: None };
        self.pending.push_back((address, Pending::Step(vbd::Event::Opened(Ok(geometry)))));
    }

    /// Looks whether images have another size than before.
    pub(super) fn look_at_sizes(&mut self) {
        let open = self.devices.iter().filter(|(_, device)| device.image.is_some() && !device.closing_image);
        let addresses: Vec<Address> = open.map(|(address, _)| *address).collect();
        for address in addresses {
            let _ = self.measure(address);
        }
    }

    /// Looks at the size of a disk's image now, and goes by it: the guest is told in [`Backend::turn`].
    ///
    /// # Errors
    /// Why there is no size, in a sentence.
    pub fn measure(&mut self, address: Address) -> Result<Measured, &'static str> {
        let device = self.devices.get_mut(&address).ok_or("no such disk is known")?;
        let closing = device.closing_image;
        let image = device.image.as_mut().filter(|_| !closing).ok_or("no image is open for it")?;
        if image.request.is_empty() {
            return Err("there is no medium in the drive");
        }
        if image.request.image.format != Format::Raw {
            return Err("the size of an image of this format is written in it, and does not follow the file");
        }
        let size_bytes = self.pump.storage.measure(image.opened.file).ok_or("its size cannot be told now")?;
        let raw = Raw::open(size_bytes).map_err(|_| "it is smaller than one sector now")?;
        let before = image.opened.size_bytes / formats::SECTOR_BYTES;
        let sectors = raw.geometry().sectors;
        if sectors == before {
            return Ok(Measured { sectors, before });
        }
        image.opened.size_bytes = size_bytes;
        let disk = image.disk;
        let path = image.request.image.path.clone();
        let geometry = geometry_of(&image.opened);
        self.pump.resize_disk(disk, sectors);
        self.disks_changed = true;
        self.pending.push_back((address, Pending::Step(vbd::Event::Resized(geometry))));
        let level = if sectors < before { log::Level::Warn } else { log::Level::Info };
        self.notice(address, level, &format!("{path} has {sectors} sectors now, and had {before}"));
        Ok(Measured { sectors, before })
    }
}
