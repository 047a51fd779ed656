//! `vbdd image bench`.

use std::time::Instant;

use formats::bytes::index;
use formats::{Extent, Op, Request, SECTOR_BYTES};

use super::drive::Drive;
use super::file::{Lock, Shell};
use super::json::Object;
use super::words::{self, Options, Words};
use super::{Command, Failed};
use crate::cli::print;
use crate::error::Error;

pub(super) const COMMAND: Command = Command {
    name: "bench",
    help: HELP,
    options: Options {
        values: &["f", "c", "d", "s", "S", "offset", "pattern", "flush-interval"],
        flags: &["w", "U"],
    },
    run,
};

const HELP: &str = "\
vbdd image bench reads (or writes) a disk in equal steps, and tells how long that took.

Usage: vbdd image bench [OPTIONS] FORMAT:PATH

  -f FORMAT             raw, qcow2 or vhd, where PATH does not say it
  -c COUNT              requests (75000)
  -d DEPTH              at once (64)
  -s SIZE               bytes of each (4k)
  -S SIZE               from the beginning of one to that of the next (SIZE of -s); at the disk's end it begins anew
  --offset BYTES        where the first begins (0)
  -w                    write: what is there is lost
  --pattern BYTE        what is written (0)
  --flush-interval N    a flush after every N writes
  -U                    read an image that others have open for writing
  --json                the result as JSON

All is done by one thread through the page cache: what this shows is the cost of the format.
";

/// What is to be done.
struct Load {
    count: u64,
    depth: u64,
    size: u64,
    step: u64,
    at: u64,
    writes: bool,
    flush_interval: u64,
}

fn run(words: &Words) -> Result<u8, Failed> {
    let [path] = words.exactly("bench", ["PATH"])?;
    let image = words::image(path, words.format("f")?)?;
    let size = words.size("s", 4096)?;
    let writes = words.has("w");
    let load = Load {
        count: words.number("c", 75000)?,
        depth: words.number("d", 64)?.clamp(1, 128),
        size,
        step: words.size("S", size)?,
        at: words.size("offset", 0)?,
        writes,
        flush_interval: words.number("flush-interval", 0)?,
    };
    let pattern = u8::try_from(words.number("pattern", 0)?).unwrap_or(0);
    let lock = if words.has("U") { Lock::None } else { Lock::Shared };
    let mut drive = Drive::open(&image, Shell { lock }, writes)?;
    let disk = drive.sectors() * SECTOR_BYTES;
    let odd = [load.size, load.step, load.at].iter().any(|bytes| !bytes.is_multiple_of(SECTOR_BYTES));
    if odd || !(SECTOR_BYTES..=16 << 20).contains(&load.size) || load.size > disk || load.step > disk {
        let hint = format!("multiples of 512, a size of at most 16M, all within the disk's {disk} bytes");
        return Err(Error::new("-s, -S and --offset do not fit", hint).into());
    }
    let mut memory = vec![pattern; index(load.depth * load.size)];
    let start = Instant::now();
    load.go(&mut drive, disk, &mut memory)?;
    if writes {
        drive.close()?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let rate = if seconds > 0.0 { load.count as f64 / seconds } else { 0.0 };
    if words.has("json") {
        let object = Object::new().number("requests", load.count).number("size", load.size);
        let object = object.raw("seconds", &format!("{seconds:.6}")).raw("iops", &format!("{rate:.0}"));
        print(&(object.end() + "\n"))?;
    } else {
        let kind = if writes { "write" } else { "read" };
        let megabytes = rate * load.size as f64 / f64::from(1 << 20);
        print(&format!(
            "Sent {} {kind} requests of {} bytes, {} at once.\nRun completed in {seconds:.3} seconds: {rate:.0} IOPS, {megabytes:.1} MiB/s.\n",
            load.count, load.size, load.depth
        ))?;
    }
    Ok(0)
}

impl Load {
    fn go(&self, drive: &mut Drive, disk: u64, memory: &mut [u8]) -> Result<(), Failed> {
        let op = if self.writes { Op::Write } else { Op::Read };
        let (mut at, mut sent, mut unflushed) = (self.at % disk, 0, 0);
        while sent < self.count {
            let mut batch = self.depth.min(self.count - sent);
            if self.flush_interval > 0 {
                batch = batch.min(self.flush_interval - unflushed);
            }
            for slot in 0..batch {
                if at + self.size > disk {
                    at = 0;
                }
                let extent = Extent { sector: at / SECTOR_BYTES, sectors: self.size / SECTOR_BYTES };
                drive.submit(Request { token: slot * self.size, op, extent }, memory)?;
                at += self.step;
            }
            drive.settle(memory)?;
            sent += batch;
            unflushed += batch;
            if self.flush_interval > 0 && unflushed == self.flush_interval {
                drive.run(Op::Flush, Extent { sector: 0, sectors: 1 }, memory)?;
                unflushed = 0;
            }
        }
        Ok(())
    }
}
