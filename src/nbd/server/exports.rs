//! What can be asked for, by name.

use std::collections::BTreeMap;

use crate::pump::DiskId;

/// Names an export for its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExportId(u32);

/// A disk that clients may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// What clients call it.
    pub name: String,
    /// For people.
    pub description: String,
    /// The disk.
    pub disk: DiskId,
    /// Its size, in sectors of 512 bytes.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// What a request should be a multiple of, in bytes: a power of two from 512 on.
    pub preferred_bytes: u32,
}

impl Export {
    /// Its size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.sectors.saturating_mul(formats::SECTOR_BYTES)
    }
}

/// The exports of a server.
#[derive(Debug, Default)]
pub struct Exports {
    all: BTreeMap<ExportId, Export>,
    next: u32,
}

impl Exports {
    /// Adds one.
    pub fn add(&mut self, export: Export) -> ExportId {
        let id = ExportId(self.next);
        self.next = self.next.wrapping_add(1);
        self.all.insert(id, export);
        id
    }

    /// Removes one: nobody finds it any more.
    pub fn remove(&mut self, id: ExportId) {
        self.all.remove(&id);
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, id: ExportId) -> Option<&Export> {
        self.all.get(&id)
    }

    /// The export of that name. The empty name is that of the only one.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<(ExportId, &Export)> {
        let only = name.is_empty() && self.all.len() == 1;
        let (id, export) = self.all.iter().find(|(_, export)| only || export.name == name)?;
        Some((*id, export))
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = (ExportId, &Export)> {
        self.all.iter().map(|(id, export)| (*id, export))
    }
}
