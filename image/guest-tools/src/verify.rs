//! Writes numbered, checksummed blocks and checks them, until it is told to stop.
//!
//! The disk is an array of 4 KiB blocks. Block B of generation G is the pattern seeded by (B, G) behind a header that
//! names B and G. A table in memory knows each block's last generation, so that a lost, torn or misplaced write shows
//! as soon as its block is read again.

use crate::direct::{self, BLOCK_BYTES, Buffer};
use crate::pattern::Pattern;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Blocks written between two flushes.
const BATCH: u64 = 16;

/// How long a run lasts, and how hard it works.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// When it ends by itself.
    pub(crate) longest: Duration,
    /// Pause between two batches, for a disk that shall only be in use while the test is about something else.
    pub(crate) pause: Duration,
}

/// Counts of a run.
#[derive(Debug, Default)]
struct Report {
    written: u64,
    read: u64,
    flushes: u64,
    longest: Duration,
}

struct Run {
    file: File,
    generations: Vec<u64>,
    choice: Pattern,
    buffer: Buffer,
    report: Report,
}

/// Fills a block with what block `block` of generation `generation` holds.
fn compose(bytes: &mut [u8], block: u64, generation: u64) {
    Pattern::new(block.wrapping_mul(0x1_0000_0001).wrapping_add(generation)).fill(bytes);
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
}

impl Run {
    fn timed<T>(
        &mut self,
        what: &str,
        act: impl FnOnce(&mut Run) -> std::io::Result<T>,
    ) -> Result<T, String> {
        let start = Instant::now();
        let result = act(self).map_err(|e| format!("{what}: {e}"));
        self.report.longest = self.report.longest.max(start.elapsed());
        result
    }

    fn write(&mut self, block: u64) -> Result<(), String> {
        let at = usize::try_from(block).map_err(|e| e.to_string())?;
        self.generations[at] += 1;
        compose(&mut self.buffer.bytes()[..BLOCK_BYTES], block, self.generations[at]);
        self.timed(&format!("writing block {block}"), |run| {
            run.file.write_all_at(&run.buffer.bytes()[..BLOCK_BYTES], block * BLOCK_BYTES as u64)
        })?;
        self.report.written += 1;
        Ok(())
    }

    fn check(&mut self, block: u64) -> Result<(), String> {
        let at = usize::try_from(block).map_err(|e| e.to_string())?;
        self.timed(&format!("reading block {block}"), |run| {
            run.file.read_exact_at(&mut run.buffer.bytes()[..BLOCK_BYTES], block * BLOCK_BYTES as u64)
        })?;
        self.report.read += 1;
        let mut expected = vec![0u8; BLOCK_BYTES];
        compose(&mut expected, block, self.generations[at]);
        let found = &self.buffer.bytes()[..BLOCK_BYTES];
        if *found == expected[..] {
            return Ok(());
        }
        let word = |at: usize| found[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        Err(format!(
            "block {block} should be of generation {}, but its header says block {} generation {}",
            self.generations[at],
            word(0),
            word(8)
        ))
    }

    fn flush(&mut self) -> Result<(), String> {
        self.timed("flushing", |run| run.file.sync_data())?;
        self.report.flushes += 1;
        Ok(())
    }

    /// One batch of writes, a flush, and as many checks of blocks from anywhere.
    fn turn(&mut self) -> Result<(), String> {
        let blocks = self.generations.len() as u64;
        for _ in 0..BATCH {
            let block = self.choice.next() % blocks;
            self.write(block)?;
        }
        self.flush()?;
        for _ in 0..BATCH {
            let block = self.choice.next() % blocks;
            self.check(block)?;
        }
        Ok(())
    }

    fn all(&mut self, stop: &Path, limits: Limits) -> Result<(), String> {
        let end = Instant::now() + limits.longest;
        for block in 0..self.generations.len() as u64 {
            self.write(block)?;
        }
        self.flush()?;
        while !stop.exists() && Instant::now() < end {
            self.turn()?;
            std::thread::sleep(limits.pause);
        }
        for block in 0..self.generations.len() as u64 {
            self.check(block)?;
        }
        Ok(())
    }
}

/// Works on the first `blocks` blocks of `path` until the file `stop` exists or the longest time is over, then
/// checks every block. The returned line also goes with an error, which then comes first.
///
/// # Errors
/// At the first failed transfer or wrong block.
pub(crate) fn run(path: &str, blocks: u64, stop: &str, limits: Limits, seed: u64) -> Result<String, String> {
    let (file, size_bytes) = direct::open(path, true)?;
    if size_bytes < blocks * BLOCK_BYTES as u64 {
        return Err(format!("{path} has {size_bytes} bytes, too few for {blocks} blocks"));
    }
    let generations = vec![0; usize::try_from(blocks).map_err(|e| e.to_string())?];
    let (choice, buffer, report) = (Pattern::new(seed), Buffer::new(BLOCK_BYTES), Report::default());
    let mut run = Run { file, generations, choice, buffer, report };
    let result = run.all(Path::new(stop), limits);
    let report = &run.report;
    let line = format!(
        "written={} read={} flushes={} longest_ms={}",
        report.written,
        report.read,
        report.flushes,
        report.longest.as_millis()
    );
    result.map(|()| format!("errors=0 {line}")).map_err(|reason| format!("{reason}; errors=1 {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> String {
        let path = std::env::temp_dir().join(format!("vbdd-verify-{name}-{}", std::process::id()));
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_faithful_disk_passes() {
        let (disk, stop) = (scratch("good"), scratch("good-stop"));
        std::fs::write(&disk, vec![0u8; 64 * BLOCK_BYTES]).unwrap();
        std::fs::write(&stop, b"").unwrap();
        let limits = Limits { longest: Duration::from_secs(5), pause: Duration::ZERO };
        let line = run(&disk, 64, &stop, limits, 1).unwrap();
        assert!(line.starts_with("errors=0 written=64 read=64 flushes=1 "), "{line}");
        std::fs::remove_file(disk).unwrap();
        std::fs::remove_file(stop).unwrap();
    }

    #[test]
    fn lost_torn_and_misplaced_writes_are_found() {
        let disk = scratch("bad");
        std::fs::write(&disk, vec![0u8; 4 * BLOCK_BYTES]).unwrap();
        let (file, _) = direct::open(&disk, true).unwrap();
        let mut run = Run {
            file,
            generations: vec![0; 4],
            choice: Pattern::new(1),
            buffer: Buffer::new(BLOCK_BYTES),
            report: Report::default(),
        };
        let mut expect_found = |plant: &dyn Fn(&mut Run)| {
            for block in 0..4 {
                run.write(block).unwrap();
                run.check(block).unwrap();
            }
            plant(&mut run);
            assert!(run.check(2).is_err());
        };
        // Lost: the table has moved on, the disk has not.
        expect_found(&|run| run.generations[2] += 1);
        // Misplaced: block 1's content lies where block 2's should.
        expect_found(&|run| {
            run.check(1).unwrap();
            run.file.write_all_at(run.buffer.bytes(), 2 * BLOCK_BYTES as u64).unwrap();
        });
        // Torn: the last sector is an older one.
        expect_found(&|run| {
            run.check(2).unwrap();
            run.buffer.bytes()[BLOCK_BYTES - 512..].fill(0);
            run.file.write_all_at(run.buffer.bytes(), 2 * BLOCK_BYTES as u64).unwrap();
        });
        std::fs::remove_file(disk).unwrap();
    }
}
