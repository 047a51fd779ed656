//! What the backend can say about itself.

use super::Backend;
use crate::hypervisor::Hypervisor;
use crate::queue::Counters;
use crate::storage::Storage;
use crate::vbd::Address;

/// A disk as an operator wants to see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Which.
    pub address: Address,
    /// What its state machine is at, in a word.
    pub phase: &'static str,
    /// The image's path, if one is open.
    pub path: Option<String>,
    /// Size in bytes, if an image is open.
    pub size_bytes: Option<u64>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the page cache is bypassed.
    pub direct: bool,
    /// Requests in flight.
    pub in_flight: usize,
    /// Counts since the ring was connected.
    pub counters: Counters,
}

/// Sums over all disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Disks known.
    pub disks: usize,
    /// Disks with a connected ring.
    pub connected: usize,
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    /// The status of every disk.
    pub fn status(&self) -> impl Iterator<Item = DeviceStatus> + '_ {
        self.devices.iter().map(|(address, device)| {
            let image = device.image.as_ref();
            DeviceStatus {
                address: *address,
                phase: device.vbd.phase(),
                path: image.map(|image| image.request.image.path.clone()),
                size_bytes: image.map(|image| image.opened.size_bytes),
                read_only: image.is_some_and(|image| image.request.read_only),
                direct: image.is_some_and(|image| image.opened.direct),
                in_flight: device.queue.map_or(0, |queue| self.pump.unanswered(queue)),
                counters: device.queue.and_then(|queue| self.pump.counters(queue)).unwrap_or_default(),
            }
        })
    }

    /// How many disks there are.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let connected = self.devices.values().filter(|device| device.queue.is_some()).count();
        Totals { disks: self.devices.len(), connected }
    }
}
