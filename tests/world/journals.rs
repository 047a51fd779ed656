//! Journals in memory that outlives the simulated process.

use std::collections::BTreeMap;
use std::rc::Rc;

use vbdd::journal::{JournalStore, Memory};

use super::{Plant, Shared};

#[repr(align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// What a directory on tmpfs would hold.
#[derive(Default)]
pub struct Vault {
    files: BTreeMap<String, Box<[Page]>>,
    pub open: usize,
    /// No room for another journal.
    pub full: bool,
}

impl Vault {
    pub fn names(&self) -> Vec<String> {
        self.files.keys().cloned().collect()
    }

    /// The process is gone; its journals stay.
    pub fn process_died(&mut self) {
        self.open = 0;
    }

    /// Makes every journal forget its first request in flight: a planted bug.
    fn forget_one(&mut self) {
        for pages in self.files.values_mut() {
            let entries = (pages.len() - 1) * 4096 / 128;
            for entry in 0..entries {
                let at = 4096 + entry * 128;
                let state = &mut pages[at / 4096].0[at % 4096];
                if *state == 1 {
                    *state = 0;
                    break;
                }
            }
        }
    }
}

/// The backend's handle.
pub struct SimJournals(pub Rc<Shared>);

impl JournalStore for SimJournals {
    fn open(&mut self, name: &str, length_bytes: usize) -> Option<Memory> {
        self.0.point("journal", length_bytes as u64, 0);
        let mut vault = self.0.vault.borrow_mut();
        if vault.full {
            return None;
        }
        if self.0.plant.get() == Plant::JournalForgets {
            vault.forget_one();
        }
        vault.open += 1;
        let pages = length_bytes.div_ceil(4096);
        let file = vault.files.entry(name.to_owned()).or_insert_with(|| vec![Page([0; 4096]); pages].into());
        if file.len() != pages {
            // The journal of a ring of another size: made anew, as on disk.
            *file = vec![Page([0; 4096]); pages].into();
        }
        // SAFETY: page-aligned, as long as asked for; the box stays in the vault, which outlives every pump, and only
        // `forget_one`, between two pumps, touches it too.
        Some(unsafe { Memory::new(file.as_mut_ptr().cast(), length_bytes) })
    }

    fn close(&mut self, name: &str, _memory: Memory, remove: bool) {
        self.0.point("journal closed", remove.into(), 0);
        let mut vault = self.0.vault.borrow_mut();
        vault.open -= 1;
        if remove {
            vault.files.remove(name);
        }
    }
}
