//! `vbdd image convert`.

use formats::bytes::{index, wide};
use formats::{Extent, Op, Request, SECTOR_BYTES};

use super::create::{Below, Plan, below};
use super::drive::Drive;
use super::file::{ImageFile, Lock, Shell};
use super::json::Object;
use super::layers::Chain;
use super::out::{self, Progress};
use super::read::{Bytes, Stream, zero_run};
use super::target::Target;
use super::words::{self, Options, Words};
use super::{Command, Failed};
use crate::chains::{self, Wish};
use crate::cli::print;
use crate::error::Error;
use crate::params::Image;

pub(super) const COMMAND: Command = Command {
    name: "convert",
    help: HELP,
    options: Options {
        values: &["f", "O", "o", "B", "F", "l", "S"],
        flags: &["n", "U", "p", "target-is-zero"],
    },
    run,
};

const HELP: &str = "\
vbdd image convert copies a disk into another image, of any format. What is zero takes no space there.

Usage: vbdd image convert [-f FORMAT] [-O FORMAT] [OPTIONS] FORMAT:SOURCE FORMAT:TARGET

  -f FORMAT         of SOURCE, where it does not say it
  -O FORMAT         of TARGET, where it does not say it
  -o KEY=VALUE,...  settings of TARGET, as of vbdd image create
  -B BACKING        TARGET is a leaf over BACKING: only what SOURCE itself holds is copied, and nothing from below it
  -F FORMAT         the format of BACKING
  -l NAME           what SOURCE was when its internal snapshot NAME (or ID) was made
  -S SIZE           zeroes of that size are left out (4k); 0 writes them
  -n                TARGET is there already (an image or a device), at least as large, and is written in place
  --target-is-zero  with -n: it reads as zero, so that zeroes need not be written
  -U                SOURCE may be open elsewhere for writing
  -p                accepted: there is a bar wherever standard error is a terminal
  --json            tell what was made as JSON

Without -n TARGET gets its name, and what was there goes, only when all is written and durable: an interruption leaves what was
there. Compressed output (qemu-img's -c) is not made; compressed images are read.
";

/// Why nothing more is written into the target where the source has nothing, or zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blank {
    /// It reads as zero.
    Zero,
    /// It shows what an image below holds: zero must be written, and what is nowhere must not.
    Below,
    /// It may hold anything.
    Anything,
}

fn run(words: &Words) -> Result<u8, Failed> {
    let [source, target] = words.exactly("convert", ["SOURCE", "TARGET"])?;
    let source = words::image(source, words.format("f")?)?;
    let target = words::image(target, words.format("O")?)?;
    let below = match words.value("B") {
        Some(name) => Some(below(&target.path, name, words.format("F")?, false)?),
        None => None,
    };
    let lock = if words.has("U") { Lock::None } else { Lock::Shared };
    let mut chain = Chain::open(&source, Shell { lock }, below.is_none())?;
    if let (Some(name), Some(leaf)) = (words.value("l"), chain.layers.first_mut()) {
        leaf.use_snapshot(name)?;
        chain.sectors = leaf.sectors;
    }
    chain.deep = true;
    let unit = index(words.size("S", 4096)?).next_multiple_of(512);
    let copy = Copy { unit, quiet: words.has("q") };
    let made = if words.has("n") {
        if below.is_some() || words.value("o").is_some() {
            return Err(words::misuse("with -n nothing is made, so -o and -B say nothing", "convert"));
        }
        copy.in_place(&mut chain, &target, words.has("target-is-zero"))?
    } else {
        let plan = Plan::new(target.format, &words.settings(), chain.bytes(), below.as_ref())?;
        copy.anew(&mut chain, &target, &plan, below.as_ref())?
    };
    if words.has("json") {
        let object = Object::new().text("filename", &target.path).text("format", target.format.name());
        print(&(object.number("virtual-size", made.0).number("actual-size", made.1).end() + "\n"))?;
    }
    Ok(0)
}

/// How it is copied.
struct Copy {
    /// Zeroes of this size are looked for; 0 for none.
    unit: usize,
    quiet: bool,
}

impl Copy {
    /// Into a new file. Returns the size of its disk, and what it takes.
    fn anew(
        &self,
        chain: &mut Chain,
        image: &Image,
        plan: &Plan,
        below: Option<&Below>,
    ) -> Result<(u64, u64), Failed> {
        if chain.layers.iter().any(|layer| same_file(&layer.link.image.path, &image.path)) {
            let what = format!("{}: source and target are one file", image.path);
            return Err(Error::new(what, "write to another name, and rename it").into());
        }
        let (target, mut file) = Target::begin(&image.path)?;
        let made = plan.make(image, &mut file)?;
        let temporary =
            Image { format: image.format, path: target.temporary().to_string_lossy().into_owned() };
        let wish = Wish { writable: true, parents: below.is_some() };
        let opened = chains::open(&mut Shell { lock: Lock::None }, &temporary, wish);
        let mut links = opened
            .map_err(|error| Error::new(error.to_string().replace(&temporary.path, &image.path), ""))?;
        // Nothing has to be durable before the file gets its name.
        if let Some(leaf) = links.first_mut() {
            leaf.medium.unsynced = true;
        }
        let mut drive = Drive::of(links, true);
        let blank = if below.is_some() { Blank::Below } else { Blank::Zero };
        self.all(chain, &mut drive, blank)?;
        drive.close()?;
        drop(drive);
        target.finish(&file.file())?;
        Ok((made, file.allocated_bytes()))
    }

    /// Into an image that is there.
    fn in_place(&self, chain: &mut Chain, image: &Image, is_zero: bool) -> Result<(u64, u64), Failed> {
        let mut drive = Drive::open(image, Shell { lock: Lock::None }, true)?;
        if drive.sectors() < chain.sectors {
            let (has, needs) = (drive.sectors() * SECTOR_BYTES, chain.bytes());
            let what = format!("{}: too small: it has {has} bytes, and the source {needs}", image.path);
            return Err(Error::new(what, "vbdd image resize makes it larger").into());
        }
        out::note(&format!("{} is written in place: an interruption leaves it half written", image.path));
        self.all(chain, &mut drive, if is_zero { Blank::Zero } else { Blank::Anything })?;
        drive.close()?;
        let made = drive.sectors() * SECTOR_BYTES;
        Ok((made, drive.leaf().map_or(0, ImageFile::allocated_bytes)))
    }

    /// The whole disk, stretch by stretch.
    fn all(&self, chain: &mut Chain, drive: &mut Drive, blank: Blank) -> Result<(), Failed> {
        let mut progress = Progress::new("convert", chain.bytes(), self.quiet);
        let mut stream = Stream::new(chain)?;
        while let Some(stretch) = stream.next()? {
            progress.done(stretch.sector * SECTOR_BYTES);
            let end = stretch.sector + stretch.sectors;
            match stretch.bytes {
                Bytes::Absent if blank != Blank::Anything => {}
                Bytes::Zero if blank == Blank::Zero => {}
                Bytes::Absent | Bytes::Zero => drive.clear(Op::WriteZeroes, stretch.sector, end)?,
                Bytes::Data(mut part) => {
                    self.part(drive, stretch.sector, &mut part, blank)?;
                    stream.give_back(part);
                }
            }
        }
        Ok(())
    }

    /// Data, in which there may be zeroes.
    fn part(&self, drive: &mut Drive, sector: u64, part: &mut [u8], blank: Blank) -> Result<(), Failed> {
        let mut from = 0;
        while from < part.len() {
            let (is_zero, to) =
                if self.unit == 0 { (false, part.len()) } else { zero_run(part, from, self.unit) };
            let extent = Extent {
                sector: sector + wide(from) / SECTOR_BYTES,
                sectors: wide(to - from) / SECTOR_BYTES,
            };
            let token = wide(from);
            from = to;
            let op = match (is_zero, blank) {
                (true, Blank::Zero) => continue,
                (true, _) => Op::WriteZeroes,
                (false, _) => Op::Write,
            };
            drive.submit(Request { token, op, extent }, part)?;
        }
        drive.settle(part)
    }
}

fn same_file(one: &str, other: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (std::fs::metadata(one), std::fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}
