//! Verified I/O from several threads at once, with transfers from one sector to a mebibyte at any sector: what fills
//! several queues, large rings and indirect requests.
//!
//! Each thread owns a region of the disk and knows its contents from a copy in memory, so every read can be compared
//! whole.

use crate::direct::{self, BLOCK_BYTES, Buffer};
use crate::pattern::Pattern;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const SECTOR_BYTES: u64 = 512;

/// The longest transfer, in sectors: what 256 segments of an indirect request hold.
const LONGEST_SECTORS: u64 = 2048;

/// Transfers between two flushes of a thread.
const FLUSH_EVERY: u64 = 32;

/// What shall be done.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Device or file.
    pub(crate) path: String,
    /// Threads, each with its region.
    pub(crate) threads: u64,
    /// Size of a region.
    pub(crate) region_bytes: u64,
    /// Number of the first region, so that several processes can share a disk.
    pub(crate) first_region: u64,
    /// Ends the run when it exists.
    pub(crate) stop: String,
    /// When it ends by itself.
    pub(crate) longest: Duration,
    /// Seed of all choices.
    pub(crate) seed: u64,
}

/// Counts of a thread, or of all.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    writes: u64,
    reads: u64,
    flushes: u64,
    bytes: u64,
}

struct Worker {
    file: File,
    start_bytes: u64,
    shadow: Vec<u8>,
    buffer: Buffer,
    choice: Pattern,
    counts: Counts,
}

fn index(value: u64) -> Result<usize, String> {
    usize::try_from(value).map_err(|e| e.to_string())
}

impl Worker {
    fn new(job: &Job, number: u64) -> Result<Worker, String> {
        let (file, size_bytes) = direct::open(&job.path, true)?;
        let start_bytes = (job.first_region + number) * job.region_bytes;
        if start_bytes + job.region_bytes > size_bytes {
            return Err(format!("{} has {size_bytes} bytes, too few for that many regions", job.path));
        }
        let shadow = vec![0; index(job.region_bytes)?];
        let buffer = Buffer::new(index(LONGEST_SECTORS * SECTOR_BYTES)? + BLOCK_BYTES);
        let choice = Pattern::new(job.seed.wrapping_mul(1000).wrapping_add(job.first_region + number));
        Ok(Worker { file, start_bytes, shadow, buffer, choice, counts: Counts::default() })
    }

    fn pick(&mut self, below: u64) -> u64 {
        self.choice.next() % below
    }

    /// Chooses a transfer: where in the region it begins, where in the buffer, and how long it is, all in bytes.
    fn choose(&mut self) -> Result<(usize, usize, usize), String> {
        let sectors = self.shadow.len() as u64 / SECTOR_BYTES;
        let longest = if self.pick(2) == 0 { 8 } else { LONGEST_SECTORS }.min(sectors);
        let length = 1 + self.pick(longest);
        let at = self.pick(sectors - length + 1);
        // Not at the beginning of a page: the first segment of the request then begins at another sector than 0.
        let skip = self.pick(8);
        Ok((index(at * SECTOR_BYTES)?, index(skip * SECTOR_BYTES)?, index(length * SECTOR_BYTES)?))
    }

    fn write(&mut self) -> Result<(), String> {
        let (at, skip, length) = self.choose()?;
        let seed = self.choice.next();
        let bytes = &mut self.buffer.bytes()[skip..skip + length];
        Pattern::new(seed).fill(bytes);
        self.shadow[at..at + length].copy_from_slice(bytes);
        self.file
            .write_all_at(bytes, self.start_bytes + at as u64)
            .map_err(|e| format!("writing {length} bytes at {}: {e}", self.start_bytes + at as u64))?;
        self.counts.writes += 1;
        self.counts.bytes += length as u64;
        Ok(())
    }

    fn check(&mut self, at: usize, skip: usize, length: usize) -> Result<(), String> {
        let place = self.start_bytes + at as u64;
        let bytes = &mut self.buffer.bytes()[skip..skip + length];
        bytes.fill(0xa5);
        self.file
            .read_exact_at(bytes, place)
            .map_err(|e| format!("reading {length} bytes at {place}: {e}"))?;
        self.counts.reads += 1;
        self.counts.bytes += length as u64;
        let expected = &self.shadow[at..at + length];
        match bytes.iter().zip(expected).position(|(found, expected)| found != expected) {
            None => Ok(()),
            Some(first) => {
                Err(format!("wrong byte at {} of {length} bytes read at {place}", place + first as u64))
            }
        }
    }

    fn flush(&mut self) -> Result<(), String> {
        self.counts.flushes += 1;
        self.file.sync_data().map_err(|e| format!("flushing: {e}"))
    }

    /// The whole region in the longest transfers, for the beginning and the end.
    fn sweep(&mut self, write: bool) -> Result<(), String> {
        let step = index(LONGEST_SECTORS * SECTOR_BYTES)?;
        for at in (0..self.shadow.len()).step_by(step) {
            let length = step.min(self.shadow.len() - at);
            if write {
                let bytes = &mut self.buffer.bytes()[..length];
                bytes.copy_from_slice(&self.shadow[at..at + length]);
                self.file
                    .write_all_at(bytes, self.start_bytes + at as u64)
                    .map_err(|e| format!("writing {length} bytes: {e}"))?;
                self.counts.writes += 1;
            } else {
                self.check(at, 0, length)?;
            }
        }
        self.flush()
    }

    fn run(&mut self, stop: &Path, end: Instant) -> Result<(), String> {
        self.sweep(true)?;
        while !stop.exists() && Instant::now() < end {
            if self.pick(2) == 0 {
                self.write()?;
            } else {
                let (at, skip, length) = self.choose()?;
                self.check(at, skip, length)?;
            }
            if self.pick(FLUSH_EVERY) == 0 {
                self.flush()?;
            }
        }
        self.sweep(false)
    }
}

/// Runs the job and reports in one line; with an error, that comes first.
///
/// # Errors
/// When any transfer failed or any byte was wrong.
pub(crate) fn run(job: &Job) -> Result<String, String> {
    let end = Instant::now() + job.longest;
    let outcomes: Vec<Result<Counts, String>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..job.threads)
            .map(|number| {
                scope.spawn(move || {
                    let mut worker = Worker::new(job, number)?;
                    worker.run(Path::new(&job.stop), end)?;
                    Ok(worker.counts)
                })
            })
            .collect();
        handles
            .into_iter()
            .map(|handle| handle.join().unwrap_or_else(|_| Err("a thread panicked".to_owned())))
            .collect()
    });
    let mut sum = Counts::default();
    let mut reasons = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(counts) => {
                sum.writes += counts.writes;
                sum.reads += counts.reads;
                sum.flushes += counts.flushes;
                sum.bytes += counts.bytes;
            }
            Err(reason) => reasons.push(reason),
        }
    }
    let line = format!(
        "written={} read={} flushes={} mib={} threads={}",
        sum.writes,
        sum.reads,
        sum.flushes,
        sum.bytes >> 20,
        job.threads
    );
    match reasons.first() {
        None => Ok(format!("errors=0 {line}")),
        Some(first) => Err(format!("{first}; errors={} {line}", reasons.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str, region_bytes: u64) -> Job {
        let scratch = |what: &str| {
            let path = std::env::temp_dir().join(format!("vbdd-hammer-{name}-{what}-{}", std::process::id()));
            path.to_str().unwrap().to_owned()
        };
        let job = Job {
            path: scratch("disk"),
            threads: 3,
            region_bytes,
            first_region: 1,
            stop: scratch("stop"),
            longest: Duration::from_millis(200),
            seed: 5,
        };
        std::fs::write(&job.path, vec![0u8; usize::try_from(4 * region_bytes).unwrap()]).unwrap();
        job
    }

    #[test]
    fn a_faithful_disk_passes_and_other_regions_stay() {
        let job = job("good", 64 << 10);
        let line = run(&job).unwrap();
        assert!(line.starts_with("errors=0 written="), "{line}");
        assert!(std::fs::read(&job.path).unwrap()[..64 << 10].iter().all(|byte| *byte == 0));
        std::fs::remove_file(&job.path).unwrap();
    }

    #[test]
    fn one_wrong_byte_is_found() {
        let job = job("bad", 64 << 10);
        let mut worker = Worker::new(&job, 0).unwrap();
        for _ in 0..50 {
            worker.write().unwrap();
        }
        worker.sweep(false).unwrap();
        worker.shadow[12_345] ^= 1;
        let reason = worker.sweep(false).unwrap_err();
        assert!(reason.contains(&format!("wrong byte at {}", (64 << 10) + 12_345)), "{reason}");
        std::fs::remove_file(&job.path).unwrap();
    }

    #[test]
    fn a_disk_too_small_is_refused() {
        let job = Job { threads: 5, ..job("small", 64 << 10) };
        assert!(run(&job).unwrap_err().contains("too few"));
        std::fs::remove_file(&job.path).unwrap();
    }
}
