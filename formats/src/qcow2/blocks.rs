//! Refcount blocks that are missing: lazy refcounts leave such images when their writer dies.

use alloc::collections::BTreeSet;

use crate::bytes::index;
use crate::error::{Corruption, Failure};
use crate::medium::Medium;
use crate::qcow2::check::write_bytes;
use crate::qcow2::header::Header;
use crate::qcow2::walk::{Effort, Kind, Visitor, Walk};

/// The blocks that the clusters in use need, and whether everything could be followed.
struct Needed {
    per_block: u64,
    numbers: BTreeSet<u64>,
    sound: bool,
}

impl Visitor for Needed {
    fn reference(&mut self, first: u64, count: u64, _: Kind) {
        let last = first + count.max(1) - 1;
        self.numbers.extend(first / self.per_block..=last / self.per_block);
    }

    fn wrong(&mut self, _: Corruption) {
        self.sound = false;
    }
}

/// Makes empty blocks, at the end of the file, for all clusters that are in use; their refcounts are then corrected like others. Does
/// nothing where an entry cannot be followed, or the table is too short.
pub(crate) fn add_missing(
    medium: &mut dyn Medium,
    header: &Header,
    effort: &mut Effort,
) -> Result<(), Failure> {
    let shape = header.shape;
    let (cluster, per_block) = (shape.cluster_bytes(), shape.refcounts_per_block());
    let (table, table_end) = header.reftable_range();
    let mut end = medium.length_bytes().div_ceil(cluster);
    let mut needed = Needed { per_block, numbers: BTreeSet::new(), sound: true };
    Walk { medium, header, end, effort }.all(&mut needed)?;
    if !needed.sound {
        return Ok(());
    }
    while let Some(number) = needed.numbers.pop_first() {
        let at = table + number * 8;
        if at >= table_end {
            return Ok(());
        }
        let mut entry = [0; 8];
        medium.read(at, &mut entry)?;
        if entry != [0; 8] {
            continue;
        }
        medium.set_length((end + 1) * cluster)?;
        medium.write(end * cluster, &alloc::vec![0; index(cluster)])?;
        medium.sync()?;
        write_bytes(medium, at, &(end * cluster).to_be_bytes())?;
        // The block is a cluster too, and may need another one.
        needed.numbers.insert(end / per_block);
        end += 1;
    }
    medium.sync()
}
