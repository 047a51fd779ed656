//! Reading disks from end to end: what lies in files is read by several threads, in large parts, and comes back in order.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use formats::bytes::index;
use formats::qcow2::{Compression, unpack};
use formats::{Extent, Place, SECTOR_BYTES};

use super::Failed;
use super::file::read_at;
use super::layers::Chain;
use crate::error::Error;

/// The most that one job reads.
pub(super) const PART_BYTES: u64 = 2 << 20;
/// Pieces of a job at most: fragmented images have small ones.
const PIECES_MAX: usize = 512;
/// Threads, and jobs that are begun or wait. With the part that is being used: 14 MiB.
const THREADS: usize = 2;
const JOBS_MAX: usize = 6;

/// Where the bytes of a part come from.
#[derive(Clone, Debug)]
pub(super) struct Fill {
    file: Arc<File>,
    path: Arc<str>,
    place: Place,
    packing: (Compression, u32),
    /// Where in the part, and how many bytes.
    at: usize,
    length: usize,
}

/// What a stretch of a disk is.
#[derive(Clone, Debug)]
pub(super) enum What {
    /// In no image.
    Absent,
    /// Zero, as metadata say.
    Zero,
    /// To be read: at most [`PART_BYTES`].
    Data(Vec<Fill>),
}

/// The next stretch of a chain: absent or zero as far as it goes, or data. It ends at `end` (a sector) at the latest.
///
/// # Errors
/// See [`Chain::piece`].
pub(super) fn stretch(chain: &mut Chain, from: u64, end: u64) -> Result<(What, u64), Failed> {
    let first = chain.piece(Extent { sector: from, sectors: end - from })?;
    let mut sectors = first.sectors;
    if first.is_zero() {
        while from + sectors < end {
            let next = chain.piece(Extent { sector: from + sectors, sectors: end - from - sectors })?;
            if next.place != first.place {
                break;
            }
            sectors += next.sectors;
        }
        let what = if first.place == Place::Zero { What::Zero } else { What::Absent };
        return Ok((what, sectors));
    }
    let end = end.min(from + PART_BYTES / SECTOR_BYTES);
    let (mut fills, mut at, mut piece) = (Vec::new(), from, first);
    loop {
        let sectors = piece.sectors.min(end - at);
        if let Some(layer) = chain.layers.get(piece.depth) {
            fills.push(Fill {
                file: layer.link.medium.file(),
                path: Arc::from(layer.link.image.path.as_str()),
                place: piece.place,
                packing: layer.packing(),
                at: index((at - from) * SECTOR_BYTES),
                length: index(sectors * SECTOR_BYTES),
            });
        }
        at += sectors;
        if at >= end || fills.len() >= PIECES_MAX {
            break;
        }
        piece = chain.piece(Extent { sector: at, sectors: end - at })?;
        if piece.is_zero() {
            break;
        }
    }
    Ok((What::Data(fills), at - from))
}

/// The last cluster that was unpacked: its neighbours within a part often come from the same.
type Unpacked = (Option<(Arc<File>, u64)>, Vec<u8>);

/// Fills a part of so many bytes: all of it is named, or nothing, which is zero.
///
/// # Errors
/// What the system says, and clusters that do not unpack.
pub(super) fn fill(fills: &[Fill], length: usize, part: &mut Vec<u8>) -> Result<(), Failed> {
    if fills.is_empty() {
        part.clear();
    }
    part.resize(length, 0);
    let mut unpacked: Unpacked = (None, Vec::new());
    for fill in fills {
        let place = part.get_mut(fill.at..fill.at.saturating_add(fill.length)).unwrap_or_default();
        match fill.place {
            Place::Data { offset_bytes } => read_at(&fill.file, offset_bytes, place).map_err(|error| {
                Failed::from(Error::new(
                    format!("{}: reading at byte {offset_bytes}: {error}", fill.path),
                    "",
                ))
            })?,
            Place::Compressed { offset_bytes, bytes, skip_bytes } => {
                unpack_into(fill, (offset_bytes, bytes), index(skip_bytes.into()), place, &mut unpacked)?;
            }
            Place::Zero | Place::Parent => place.fill(0),
        }
    }
    Ok(())
}

fn unpack_into(
    fill: &Fill,
    (offset_bytes, bytes): (u64, u32),
    skip: usize,
    place: &mut [u8],
    (known, unit): &mut Unpacked,
) -> Result<(), Failed> {
    let wrong =
        |what: &str| Failed::from(Error::new(format!("{}: {what} at byte {offset_bytes}", fill.path), ""));
    let is_known =
        known.as_ref().is_some_and(|(file, at)| Arc::ptr_eq(file, &fill.file) && *at == offset_bytes);
    if !is_known {
        let mut packed = vec![0; index(bytes.into())];
        read_at(&fill.file, offset_bytes, &mut packed)
            .map_err(|error| wrong(&format!("reading: {error}")))?;
        *known = None;
        if !unpack(fill.packing.0, &packed, unit, index(fill.packing.1.into())) {
            return Err(wrong("a compressed cluster that does not unpack"));
        }
        *known = Some((Arc::clone(&fill.file), offset_bytes));
    }
    match unit.get(skip..skip.saturating_add(place.len())) {
        Some(found) => place.copy_from_slice(found),
        None => return Err(wrong("a compressed cluster that is too short")),
    }
    Ok(())
}

/// What a thread is to do: fill a part, or two and say where they begin to differ.
#[derive(Debug, Default)]
pub(super) struct Job {
    /// Of the first part.
    pub(super) fills: Vec<Fill>,
    /// Of the second, if there is to be one.
    pub(super) others: Option<Vec<Fill>>,
    /// Bytes of either.
    pub(super) length: usize,
    /// Memory for the first.
    pub(super) part: Vec<u8>,
}

/// The first part, and where the second differs from it.
pub(super) type Answer = Result<(Vec<u8>, Option<usize>), Failed>;

impl Job {
    fn run(mut self) -> Answer {
        fill(&self.fills, self.length, &mut self.part)?;
        let mut difference = None;
        if let Some(others) = &self.others {
            let mut other = Vec::new();
            fill(others, self.length, &mut other)?;
            if self.part != other {
                difference = self.part.iter().zip(&other).position(|(one, other)| one != other);
            }
        }
        Ok((self.part, difference))
    }
}

#[derive(Debug, Default)]
struct Queue {
    /// Not begun, with the place of their answers.
    jobs: VecDeque<(usize, Job)>,
    /// In the order of the jobs; the first is number `taken`.
    answers: VecDeque<Option<Answer>>,
    taken: usize,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut queue = self.lock();
        while !queue.closed {
            let Some((number, job)) = queue.jobs.pop_front() else {
                queue = self.wait(queue);
                continue;
            };
            drop(queue);
            let answer = job.run();
            queue = self.lock();
            let place = number - queue.taken;
            if let Some(place) = queue.answers.get_mut(place) {
                *place = Some(answer);
            }
            self.changed.notify_all();
        }
    }
}

/// Threads that do jobs; answers come in the order of the jobs.
#[derive(Debug)]
pub(super) struct Pool(Arc<Shared>);

impl Pool {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system has none.
    pub(super) fn new() -> Result<Pool, Failed> {
        let pool = Pool(Arc::default());
        for _ in 0..THREADS {
            let shared = Arc::clone(&pool.0);
            let started = std::thread::Builder::new().name("reader".into()).spawn(move || shared.work());
            started.map_err(|error| Error::new(format!("cannot start a thread: {error}"), ""))?;
        }
        Ok(pool)
    }

    /// Jobs whose answers were not taken.
    #[must_use]
    pub(super) fn open(&self) -> usize {
        self.0.lock().answers.len()
    }

    /// Whether an answer should be taken before another job is given.
    #[must_use]
    pub(super) fn is_full(&self) -> bool {
        self.open() >= JOBS_MAX
    }

    /// Gives a job.
    pub(super) fn give(&self, job: Job) {
        let mut queue = self.0.lock();
        let number = queue.taken + queue.answers.len();
        queue.answers.push_back(None);
        queue.jobs.push_back((number, job));
        self.0.changed.notify_all();
    }

    /// Takes the oldest answer; there must be a job that has none yet.
    ///
    /// # Errors
    /// Why the job could not be done.
    pub(super) fn take(&self) -> Answer {
        let mut queue = self.0.lock();
        loop {
            match queue.answers.front_mut().map(Option::take) {
                Some(Some(answer)) => {
                    queue.answers.pop_front();
                    queue.taken += 1;
                    return answer;
                }
                Some(None) => queue = self.0.wait(queue),
                None => return Err(Error::new("no job was given", "").into()),
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.closed = true;
        self.0.changed.notify_all();
    }
}

/// A stretch of a disk, with its bytes.
#[derive(Debug)]
pub(super) struct Stretch {
    /// First sector.
    pub(super) sector: u64,
    /// How many.
    pub(super) sectors: u64,
    /// The bytes, or why there are none.
    pub(super) bytes: Bytes,
}

/// See [`Stretch`].
#[derive(Debug)]
pub(super) enum Bytes {
    /// In no image.
    Absent,
    /// Zero.
    Zero,
    /// These.
    Data(Vec<u8>),
}

/// A disk, stretch by stretch, read ahead.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    chain: &'a mut Chain,
    at: u64,
    end: u64,
    pool: Pool,
    /// What was planned; data are being read.
    ahead: VecDeque<Stretch>,
    spare: Vec<Vec<u8>>,
}

impl Stream<'_> {
    /// Begins to read a disk from its first sector.
    ///
    /// # Errors
    /// When there are no threads.
    pub(super) fn new(chain: &mut Chain) -> Result<Stream<'_>, Failed> {
        let end = chain.sectors;
        Ok(Stream { chain, at: 0, end, pool: Pool::new()?, ahead: VecDeque::new(), spare: Vec::new() })
    }

    /// The next stretch; `None` at the end.
    ///
    /// # Errors
    /// What is wrong with an image, and what the system says.
    pub(super) fn next(&mut self) -> Result<Option<Stretch>, Failed> {
        while self.at < self.end && !self.pool.is_full() && self.ahead.len() < 64 {
            let (what, sectors) = stretch(self.chain, self.at, self.end)?;
            let bytes = match what {
                What::Absent => Bytes::Absent,
                What::Zero => Bytes::Zero,
                What::Data(fills) => {
                    let part = self.spare.pop().unwrap_or_default();
                    self.pool.give(Job { fills, others: None, length: index(sectors * SECTOR_BYTES), part });
                    Bytes::Data(Vec::new())
                }
            };
            self.ahead.push_back(Stretch { sector: self.at, sectors, bytes });
            self.at += sectors;
        }
        let Some(mut stretch) = self.ahead.pop_front() else { return Ok(None) };
        if let Bytes::Data(part) = &mut stretch.bytes {
            *part = self.pool.take()?.0;
        }
        Ok(Some(stretch))
    }

    /// Takes a part back whose bytes are not needed any more.
    pub(super) fn give_back(&mut self, part: Vec<u8>) {
        self.spare.push(part);
    }
}

/// The first run of a part, from `from` on, that is all zero or has something in each unit: whether it is zero, and where it ends. Units
/// are counted from the part's beginning.
#[must_use]
pub(super) fn zero_run(part: &[u8], from: usize, unit: usize) -> (bool, usize) {
    let mut units = part.get(from..).unwrap_or_default().chunks(unit.max(1));
    let Some(first) = units.next() else { return (true, part.len()) };
    let (is_zero, mut end) = (all_zero(first), from + first.len());
    for next in units {
        if all_zero(next) != is_zero {
            break;
        }
        end += next.len();
    }
    (is_zero, end)
}

/// Whether there is nothing but zero.
#[must_use]
pub(super) fn all_zero(bytes: &[u8]) -> bool {
    let mut words = bytes.chunks_exact(64);
    let rest_is_zero = words.remainder().iter().all(|byte| *byte == 0);
    rest_is_zero && words.all(|word| word.iter().fold(0, |sum, byte| sum | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zeroes_are_found_unit_by_unit() {
        let mut part = vec![0; 10_000];
        part[4096] = 1;
        part[9_999] = 1;
        assert_eq!(zero_run(&part, 0, 4096), (true, 4096));
        assert_eq!(zero_run(&part, 4096, 4096), (false, 10_000));
        assert_eq!(zero_run(&part, 4096, 512), (false, 4608));
        assert_eq!(zero_run(&part, 4608, 512), (true, 9728));
        assert_eq!(zero_run(&part, 9728, 512), (false, 10_000));
        assert_eq!(zero_run(&part, 10_000, 512), (true, 10_000));
        assert!(all_zero(&[]) && all_zero(&[0; 100]) && !all_zero(&[0, 0, 1]));
    }

    #[test]
    fn answers_come_in_the_order_of_jobs() {
        let pool = Pool::new().unwrap();
        let (mut given, mut taken) = (0, 0);
        while taken < 100 {
            while given < 100 && !pool.is_full() {
                // Larger parts take longer.
                let others = (given % 2 == 0).then(Vec::new);
                pool.give(Job { length: 1 + given * 7919 % 100_000, others, ..Job::default() });
                given += 1;
            }
            let (part, difference) = pool.take().unwrap();
            assert_eq!((part.len(), difference), (1 + taken * 7919 % 100_000, None));
            taken += 1;
        }
        assert_eq!((pool.open(), pool.take().is_err()), (0, true));
    }
}
