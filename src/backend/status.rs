//! What the backend can say about itself.

use super::Backend;
use crate::cli::json_string;
use crate::hypervisor::Hypervisor;
use crate::queue::Counters;
use crate::storage::Storage;
use crate::vbd::{Address, Vbd};

/// A disk as an operator wants to see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Which.
    pub address: Address,
    /// What its state machine is at, in a word.
    pub phase: &'static str,
    /// The image's path, if one is open.
    pub path: Option<String>,
    /// The format by which it is read, if one is open.
    pub format: Option<&'static str>,
    /// Size in bytes, if an image is open.
    pub size_bytes: Option<u64>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the page cache is bypassed.
    pub direct: bool,
    /// Queues that are connected.
    pub queues: usize,
    /// Requests in flight.
    pub in_flight: usize,
    /// Counts since the ring was connected.
    pub counters: Counters,
}

impl std::fmt::Display for DeviceStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Counters { reads, writes, flushes, discards, storage_errors, refused, .. } = self.counters;
        let mode = if self.read_only { "ro" } else { "rw" };
        let cache = if self.direct { "direct" } else { "cached" };
        write!(f, "{} {}", self.address, self.phase)?;
        if let (Some(path), Some(format), Some(size)) = (&self.path, self.format, self.size_bytes) {
            write!(f, " {format}:{path} {size} bytes {mode} {cache}")?;
        }
        write!(
            f,
            ", {reads} reads {writes} writes {flushes} flushes {discards} discards, {} in flight",
            self.in_flight
        )?;
        write!(f, ", {storage_errors} storage errors, {refused} refused")
    }
}

impl DeviceStatus {
    fn json(&self, into: &mut String) {
        let number = |into: &mut String, key: &str, value: u64| into.push_str(&format!(",\"{key}\":{value}"));
        into.push_str(&format!("{{\"kind\":\"{}\"", self.address.kind.name()));
        number(into, "frontend", self.address.frontend.into());
        number(into, "devid", self.address.devid.into());
        into.push_str(&format!(",\"phase\":\"{}\",\"path\":", self.phase));
        match &self.path {
            Some(path) => json_string(path, into),
            None => into.push_str("null"),
        }
        into.push_str(",\"format\":");
        match self.format {
            Some(format) => json_string(format, into),
            None => into.push_str("null"),
        }
        number(into, "size_bytes", self.size_bytes.unwrap_or(0));
        into.push_str(&format!(",\"read_only\":{},\"direct\":{}", self.read_only, self.direct));
        number(into, "queues", u64::try_from(self.queues).unwrap_or(0));
        number(into, "in_flight", u64::try_from(self.in_flight).unwrap_or(0));
        let counters = &self.counters;
        for (key, value) in [
            ("reads", counters.reads),
            ("writes", counters.writes),
            ("flushes", counters.flushes),
            ("barriers", counters.barriers),
            ("discards", counters.discards),
            ("indirect", counters.indirect),
            ("read_bytes", counters.read_bytes),
            ("written_bytes", counters.written_bytes),
            ("discarded_bytes", counters.discarded_bytes),
            ("storage_errors", counters.storage_errors),
            ("refused", counters.refused),
            ("events", counters.events),
            ("notifications", counters.notifications),
        ] {
            number(into, key, value);
        }
        into.push('}');
    }
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
            let queues = || device.queues.iter().map(|(queue, _)| *queue);
            DeviceStatus {
                address: *address,
                phase: phase(&device.vbd),
                path: image.map(|image| image.request.image.path.clone()),
                format: image.map(|image| image.request.image.format.name()),
                size_bytes: image.map(|image| image.opened.size_bytes),
                read_only: image.is_some_and(|image| image.request.read_only),
                direct: image.is_some_and(|image| image.opened.direct),
                queues: device.queues.len(),
                in_flight: queues().map(|queue| self.pump.unanswered(queue)).sum(),
                counters: Counters::sum(queues().filter_map(|queue| self.pump.counters(queue))),
            }
        })
    }

    /// The status for people: a line per disk.
    #[must_use]
    pub fn status_text(&self) -> String {
        let Totals { disks, connected } = self.totals();
        let mut text = format!("{disks} disks, {connected} connected");
        for status in self.status() {
            text.push_str(&format!("\n{status}"));
        }
        text
    }

    /// The status for programs: one line of JSON.
    #[must_use]
    pub fn status_json(&self) -> String {
        let mut text = String::from("{\"disks\":[");
        for (n, status) in self.status().enumerate() {
            if n > 0 {
                text.push(',');
            }
            status.json(&mut text);
        }
        text.push_str("]}");
        text
    }

    /// How many disks there are.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let connected = self.devices.values().filter(|device| !device.queues.is_empty()).count();
        Totals { disks: self.devices.len(), connected }
    }
}

fn phase(vbd: &Vbd) -> &'static str {
    if vbd.is_connected() {
        "connected"
    } else if vbd.open_image().is_some() {
        "waiting for the guest"
    } else {
        "no image"
    }
}
