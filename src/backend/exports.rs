//! What others may see of the disks that guests have connected: for the NBD server.

use super::Backend;
use crate::hypervisor::Hypervisor;
use crate::pump::DiskId;
use crate::storage::{FileId, Storage};
use crate::vbd::Address;

/// An open disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenDisk {
    /// Whose.
    pub address: Address,
    /// The pump's name for it.
    pub disk: DiskId,
    /// The image's file. A disk whose number and file are the same is the same.
    pub file: FileId,
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// The medium's physical block, in bytes.
    pub physical_block_bytes: u32,
    /// Format and path of the image.
    pub image: String,
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    /// True once after disks were opened, closed or resized.
    pub fn disks_changed(&mut self) -> bool {
        std::mem::take(&mut self.disks_changed)
    }

    /// The disks that are open and stay so for now.
    pub fn open_disks(&self) -> impl Iterator<Item = OpenDisk> {
        self.devices.iter().filter_map(|(address, device)| {
            let image =
                device.image.as_ref().filter(|image| !device.closing_image && !image.request.is_empty())?;
            let named = &image.request.image;
            Some(OpenDisk {
                address: *address,
                disk: image.disk,
                file: image.opened.file,
                sectors: image.opened.size_bytes / formats::SECTOR_BYTES,
                physical_block_bytes: image.opened.physical_block_bytes,
                image: format!("{}:{}", named.format.name(), named.path),
            })
        })
    }
}
