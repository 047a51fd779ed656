//! Checking an image against itself, and repairing what can be.
//!
//! References are counted in windows of clusters, so that memory is bounded whatever the image: one walk over the metadata for
//! each window.

use alloc::vec::Vec;

use crate::bytes::{be64, index, put};
use crate::error::{Corruption, Failure, Unsupported};
use crate::medium::Medium;
use crate::qcow2::header::{CORRUPT, DIRTY, Header, field};
use crate::qcow2::shape::{COPIED, refcount, refcount_bytes};
use crate::qcow2::walk::{Effort, Kind, Visitor, Walk};

/// Clusters counted in one walk: 32 MiB of memory; 512 GiB of file at 64 KiB clusters.
pub const WINDOW: u64 = 8 << 20;

/// Findings that are kept; more are only counted.
pub const FINDINGS_MAX: usize = 100;

/// What checking found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Clusters of the file.
    pub clusters: u64,
    /// Clusters that are in use.
    pub used: u64,
    /// Clusters that are counted more often than they are named: space that is lost, nothing else.
    pub leaks: u64,
    /// Contradictions that endanger data.
    pub corruptions: u64,
    /// Those of them that are entries which cannot be followed: with any of these, nothing is repaired.
    pub structural: u64,
    /// The first of all.
    pub findings: Vec<Corruption>,
    /// Leaks that were repaired.
    pub leaks_repaired: u64,
    /// Contradictions that were repaired.
    pub corruptions_repaired: u64,
}

impl Report {
    fn corrupt(&mut self, what: &'static str, at_bytes: u64) {
        self.corruptions += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Corruption { what, at_bytes });
        }
    }

    /// Nothing is wrong, or is any more.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.leaks == self.leaks_repaired && self.corruptions == self.corruptions_repaired
    }
}

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Nothing.
    Nothing,
    /// Leaks, and marks of being the only one that are missing: what a crash leaves.
    Leaks,
    /// Refcounts that are too low, and marks that do not fit: what is counted too often stays.
    Low,
    /// All of these.
    All,
}

impl Fix {
    fn leaks(self) -> bool {
        matches!(self, Fix::Leaks | Fix::All)
    }

    fn low(self) -> bool {
        matches!(self, Fix::Low | Fix::All)
    }
}

/// Counts references to the clusters of a window.
struct Counter<'a> {
    from: u64,
    counts: Vec<u32>,
    /// What is wrong is said in the first walk only.
    report: Option<&'a mut Report>,
}

impl Visitor for Counter<'_> {
    fn reference(&mut self, first: u64, count: u64, _: Kind) {
        let (from, to) = within(self.from, (first, count));
        let to = to.min(self.counts.len());
        for count in self.counts.get_mut(from..to).unwrap_or_default() {
            *count = count.saturating_add(1);
        }
    }

    fn wrong(&mut self, what: Corruption) {
        if let Some(report) = self.report.as_mut() {
            report.structural += 1;
            report.corrupt(what.what, what.at_bytes);
        }
    }
}

/// A run of clusters as indices of a window that begins at `from`; the end may lie behind the window's.
fn within(from: u64, (first, count): (u64, u64)) -> (usize, usize) {
    (index(first.saturating_sub(from)), index((first + count).saturating_sub(from)))
}

/// Marks of being the only one that do not fit the refcount.
struct Marks {
    from: u64,
    counts: Vec<u32>,
    /// How many, and the first of them: where, and whether to set it.
    count: u64,
    wrong: Vec<(u64, bool)>,
}

/// Marks that are corrected with one walk.
const MARKS_MAX: usize = 64 << 10;

impl Visitor for Marks {
    fn reference(&mut self, first: u64, count: u64, kind: Kind) {
        let Kind::Entries { entry_at, step, copied } = kind else { return };
        let (from, to) = within(self.from, (first, count));
        let to = to.min(self.counts.len());
        let counts = self.counts.get(from..to).unwrap_or_default();
        if counts.iter().all(|count| (*count == 1) == copied) {
            return;
        }
        // A part of the run may lie before the window.
        for (number, count) in (self.from.saturating_sub(first)..).zip(counts) {
            if (*count == 1) != copied {
                self.count += 1;
                if self.wrong.len() < MARKS_MAX {
                    self.wrong.push((entry_at + number * step, !copied));
                }
            }
        }
    }

    fn wrong(&mut self, _: Corruption) {}
}

/// Checks an image, and repairs what `fix` says.
///
/// # Errors
/// What is wrong with the header, or what the medium says.
pub fn check(medium: &mut dyn Medium, fix: Fix) -> Result<Report, Unsupported> {
    check_within(medium, fix, Effort::new())
}

fn check_within(medium: &mut dyn Medium, fix: Fix, mut effort: Effort) -> Result<Report, Unsupported> {
    let header = Header::read(medium)?;
    if fix == Fix::All {
        crate::qcow2::blocks::add_missing(medium, &header, &mut effort)?;
    }
    let report = recount_within(medium, &header, fix, &mut effort)?;
    if fix != Fix::Nothing {
        unmark(medium, &header, &report)?;
    }
    Ok(report)
}

/// Checks refcounts and marks against what a header names, which need not be the one that the image has now.
///
/// # Errors
/// What the medium says.
pub(crate) fn recount(medium: &mut dyn Medium, header: &Header, fix: Fix) -> Result<Report, Failure> {
    recount_within(medium, header, fix, &mut Effort::new())
}

fn recount_within(
    medium: &mut dyn Medium,
    header: &Header,
    fix: Fix,
    effort: &mut Effort,
) -> Result<Report, Failure> {
    let end = medium.length_bytes().div_ceil(header.shape.cluster_bytes());
    let mut report = Report { clusters: end, ..Report::default() };
    let mut from = 0;
    while from < end.max(1) {
        let length = WINDOW.min(end - from);
        check_window(medium, header, (from, length, end), fix, (&mut report, effort))?;
        from += WINDOW;
    }
    check_behind(medium, header, end, (&mut report, effort))?;
    Ok(report)
}

fn check_window(
    medium: &mut dyn Medium,
    header: &Header,
    window: (u64, u64, u64),
    fix: Fix,
    result: (&mut Report, &mut Effort),
) -> Result<(), Failure> {
    let (from, length, end) = window;
    let (report, effort) = result;
    effort.spend(length * 8)?;
    let counts = alloc::vec![0_u32; index(length)];
    let first = from == 0;
    let mut counter = Counter { from, counts, report: first.then_some(&mut *report) };
    Walk { medium, header, end, effort }.all(&mut counter)?;
    let counts = counter.counts;
    // What cannot be followed may be anything: nothing is written on the strength of it.
    let structural = report.structural;
    let fix = if structural > 0 { Fix::Nothing } else { fix };
    let stored = compare(medium, header, (from, &counts), fix, report)?;
    // What is counted too seldom is not alone, whatever its refcount says.
    let trusted = report.corruptions == report.corruptions_repaired;
    // Marks are judged by the refcounts that are there after the repair.
    let mut marks = Marks { from, counts: stored, count: 0, wrong: Vec::new() };
    Walk { medium, header, end, effort }.all(&mut marks)?;
    for &(entry_at, _) in marks.wrong.iter().take(FINDINGS_MAX) {
        report.corrupt("mark of being the only one does not fit the refcount", entry_at);
    }
    let told = (marks.wrong.len().min(FINDINGS_MAX)) as u64;
    report.corruptions += marks.count - told;
    let mends = |copied: bool| fix.low() || fix.leaks() && copied && trusted;
    loop {
        let more = marks.count > marks.wrong.len() as u64;
        let mut mended = 0;
        for (entry_at, copied) in core::mem::take(&mut marks.wrong) {
            if mends(copied) {
                mark(medium, entry_at, copied)?;
                mended += 1;
            }
        }
        report.corruptions_repaired += mended;
        if mended == 0 || !more {
            return Ok(());
        }
        marks.count = 0;
        Walk { medium, header, end, effort }.all(&mut marks)?;
    }
}

/// Marks an entry as the only one that names its cluster, or as one of several.
fn mark(medium: &mut dyn Medium, entry_at: u64, copied: bool) -> Result<(), Failure> {
    let mut entry = [0; 8];
    medium.read(entry_at, &mut entry)?;
    let value = be64(&entry, 0);
    let value = if copied { value | COPIED } else { value & !COPIED };
    write_bytes(medium, entry_at, &value.to_be_bytes())
}

/// Compares what is counted with what is named; gives the refcounts that are there afterwards.
fn compare(
    medium: &mut dyn Medium,
    header: &Header,
    window: (u64, &[u32]),
    fix: Fix,
    report: &mut Report,
) -> Result<Vec<u32>, Failure> {
    let (from, counts) = window;
    let shape = header.shape;
    let per_block = shape.refcounts_per_block();
    let (table_at, table_end) = header.reftable_range();
    let mut table = alloc::vec![0; index(table_end - table_at)];
    medium.read(table_at, &mut table)?;
    let mut block = alloc::vec![0; index(shape.cluster_bytes())];
    let (mut loaded, mut changed) = (u64::MAX, false);
    let mut stored = Vec::with_capacity(counts.len());
    let mut block_at = 0;
    for (cluster, &named) in (from..).zip(counts) {
        let number = cluster / per_block;
        if number != loaded {
            write_block(medium, block_at, &block, core::mem::take(&mut changed))?;
            loaded = number;
            block_at = be64(&table, index(number * 8));
            let usable = block_at % shape.cluster_bytes() == 0 && number * 8 < table.len() as u64;
            block_at = if usable { block_at } else { 0 };
            block.fill(0);
            if block_at != 0 {
                medium.read(block_at, &mut block)?;
            }
        }
        let named = u64::from(named);
        let mut count = refcount(&block, shape.refcount_order, cluster % per_block);
        report.used += u64::from(named > 0);
        if count != named {
            let leak = count > named;
            if leak {
                report.leaks += 1;
            } else {
                report.corrupt(
                    "refcount is lower than the number of references",
                    cluster << shape.cluster_bits,
                );
            }
            // A block that is something else too is not written.
            let within = (block_at >> shape.cluster_bits).checked_sub(from).map(index);
            let alone = within.and_then(|at| counts.get(at)).is_none_or(|count| *count == 1);
            let wanted = alone && if leak { fix.leaks() } else { fix.low() };
            if wanted && block_at != 0 && named <= shape.refcount_max() {
                let (at, bytes, length) =
                    refcount_bytes(&block, shape.refcount_order, cluster % per_block, named);
                put(&mut block, at, bytes.get(..length).unwrap_or_default());
                changed = true;
                count = named;
                report.leaks_repaired += u64::from(leak);
                report.corruptions_repaired += u64::from(!leak);
            }
        }
        stored.push(crate::bytes::narrow(count));
    }
    write_block(medium, block_at, &block, changed)?;
    Ok(stored)
}

fn write_block(medium: &mut dyn Medium, at: u64, block: &[u8], changed: bool) -> Result<(), Failure> {
    if changed { medium.write(at, block) } else { Ok(()) }
}

/// Clusters that are counted behind the end of the file.
fn check_behind(
    medium: &mut dyn Medium,
    header: &Header,
    end: u64,
    result: (&mut Report, &mut Effort),
) -> Result<(), Failure> {
    let (report, effort) = result;
    let shape = header.shape;
    let per_block = shape.refcounts_per_block();
    let (at, to) = header.reftable_range();
    let mut table = alloc::vec![0; index(to - at)];
    medium.read(at, &mut table)?;
    let mut block = alloc::vec![0; index(shape.cluster_bytes())];
    for (number, entry) in (0..).zip(table.chunks_exact(8).map(|entry| be64(entry, 0))) {
        if entry == 0 || (number + 1) * per_block <= end || entry % shape.cluster_bytes() != 0 {
            continue;
        }
        effort.spend(per_block * 8)?;
        medium.read(entry, &mut block)?;
        for cluster in end.max(number * per_block)..(number + 1) * per_block {
            report.leaks += u64::from(refcount(&block, shape.refcount_order, cluster % per_block) != 0);
        }
    }
    Ok(())
}

/// Removes the marks of what is repaired, once that is durable.
fn unmark(medium: &mut dyn Medium, header: &Header, report: &Report) -> Result<(), Failure> {
    medium.sync()?;
    let sound = report.corruptions == report.corruptions_repaired;
    let mut bits = header.incompatible;
    if sound {
        bits &= !(DIRTY | CORRUPT);
    }
    if header.shape.version >= 3 && bits != header.incompatible {
        write_bytes(medium, field::INCOMPATIBLE as u64, &bits.to_be_bytes())?;
        medium.sync()?;
    }
    Ok(())
}

/// Changes bytes within a sector.
pub(crate) fn write_bytes(medium: &mut dyn Medium, at: u64, bytes: &[u8]) -> Result<(), Failure> {
    let within = at % 512;
    let mut sector = [0; 512];
    medium.read(at - within, &mut sector)?;
    put(&mut sector, index(within), bytes);
    medium.write(at - within, &sector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::create::{Create, create};

    struct Bytes(Vec<u8>);

    impl Medium for Bytes {
        fn length_bytes(&mut self) -> u64 {
            self.0.len() as u64
        }
        fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Failure> {
            bytes.fill(0);
            let found = self.0.get(index(at)..).unwrap_or_default();
            bytes.iter_mut().zip(found).for_each(|(to, from)| *to = *from);
            Ok(())
        }
        fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
            put(&mut self.0, index(at), bytes);
            Ok(())
        }
        fn zero(&mut self, _: u64, _: u64) -> Result<(), Failure> {
            Ok(())
        }
        fn set_length(&mut self, length: u64) -> Result<(), Failure> {
            self.0.resize(index(length), 0);
            Ok(())
        }
        fn sync(&mut self) -> Result<(), Failure> {
            Ok(())
        }
    }

    /// An L1 table may name one L2 table as often as it is long.
    #[test]
    fn the_effort_of_a_check_is_bounded() {
        let mut medium = Bytes(Vec::new());
        let mut what = Create::new(32 << 20);
        what.shape.cluster_bits = 9;
        create(&mut medium, &what).unwrap();
        let end = medium.0.len();
        medium.0.resize(end + 512, 0);
        let l1 = index(be64(&medium.0, 40));
        for number in 0..1024 {
            put(&mut medium.0, l1 + number * 8, &(end as u64 | COPIED).to_be_bytes());
        }
        // Each window of clusters counts, as does each table.
        let (window, tables) = (medium.0.len() as u64 / 512 * 8, 1024 * 512);
        let within = |medium: &mut Bytes, bytes| check_within(medium, Fix::Nothing, Effort::of(bytes));
        let few = within(&mut medium, window + tables);
        assert!(matches!(few, Err(Unsupported::Malformed(what)) if what.what.contains("minutes")), "{few:?}");
        assert!(within(&mut medium, 2 * (window + tables) + (256 << 10)).is_ok());
    }
}
