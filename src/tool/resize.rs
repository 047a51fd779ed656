//! `vbdd image resize`.

use formats::qcow2::resize as qcow2;
use formats::vhd::change as vhd;
use formats::{Medium, Op, SECTOR_BYTES, Unsupported};

use super::drive::Drive;
use super::file::{ImageFile, Lock, Shell};
use super::json::Object;
use super::layers::Chain;
use super::words::{self, Options, Words};
use super::{Command, Failed, trouble};
use crate::cli::print;
use crate::error::Error;
use crate::params::{Format, Image};

pub(super) const COMMAND: Command =
    Command { name: "resize", help: HELP, options: Options { values: &["f"], flags: &["shrink"] }, run };

const HELP: &str = "\
vbdd image resize gives a disk another size. A guest that has it open needs vbdd resize besides.

Usage: vbdd image resize [-f FORMAT] [--shrink] FORMAT:PATH [+|-]SIZE

  -f FORMAT  raw, qcow2 or vhd, where PATH does not say it
  --shrink   a smaller SIZE is meant: what lies behind it is lost (raw, and QCOW2 without internal snapshots)
  --json     the new size as JSON

New space reads as zero, whatever the image below holds there. A VHD is rounded up to 2 MiB, and cannot shrink.
";

fn run(words: &Words) -> Result<u8, Failed> {
    // A size such as -1G looks like an option.
    let [path, size] = words.exactly("resize", ["PATH", "SIZE"])?;
    let image = words::image(path, words.format("f")?)?;
    let chain = Chain::open(&image, Shell { lock: Lock::None }, true)?;
    let old = chain.bytes();
    let below = chain.layers.get(1).map_or(0, |layer| layer.sectors);
    drop(chain);
    let wanted = match (size.strip_prefix('+'), size.strip_prefix('-')) {
        (Some(more), _) => old.saturating_add(words::size(more)?),
        (_, Some(less)) => old.saturating_sub(words::size(less)?),
        _ => words::size(size)?,
    };
    let wanted = wanted.next_multiple_of(SECTOR_BYTES);
    if wanted == 0 {
        return Err(Error::new("a disk needs at least one sector", "give a larger SIZE").into());
    }
    if wanted < old && !words.has("shrink") {
        let what = format!("{}: it would become smaller, from {old} to {wanted} bytes", image.path);
        return Err(Error::new(what, "if what lies behind may be lost, say --shrink").into());
    }
    let made = if wanted < old { shrink(&image, wanted, old)? } else { grow(&image, wanted, old, below)? };
    if words.has("json") {
        let object = Object::new().text("filename", &image.path).number("virtual-size", made);
        print(&(object.end() + "\n"))?;
    } else if made != wanted {
        super::out::note(&format!("{}: the disk has {made} bytes, whole blocks of 2 MiB", image.path));
    }
    Ok(0)
}

fn open(image: &Image) -> Result<ImageFile, Failed> {
    let opened = Shell { lock: Lock::None }.open_file(&image.path, true);
    opened.map(|(file, _)| file).map_err(|error| super::opening(error, image))
}

/// What is new would show what an image below has there: it is covered by zeroes.
fn grow(image: &Image, wanted: u64, old: u64, below_sectors: u64) -> Result<u64, Failed> {
    let mut file = open(image)?;
    let grows = !file.is_device();
    let made = match image.format {
        Format::Raw if !grows => Err(Unsupported::Refused("a device has the size that it has")),
        Format::Raw => {
            file.set_length(wanted).and_then(|()| file.sync()).map(|()| wanted).map_err(Unsupported::from)
        }
        Format::Qcow2 => qcow2::grow(&mut file, wanted).map(|()| wanted),
        Format::Vhd => vhd::grow(&mut file, grows, wanted),
    };
    let made = made.map_err(|why| trouble(image, &file, &why))?;
    drop(file);
    let (from, to) = (old / SECTOR_BYTES, (made / SECTOR_BYTES).min(below_sectors));
    if from < to {
        let mut drive = Drive::open(image, Shell { lock: Lock::None }, true)?;
        drive.clear(Op::WriteZeroes, from, to)?;
        drive.close()?;
    }
    Ok(made)
}

fn shrink(image: &Image, wanted: u64, old: u64) -> Result<u64, Failed> {
    let mut file = open(image)?;
    let refused = match image.format {
        Format::Raw if file.is_device() => Some("a device has the size that it has"),
        Format::Raw => None,
        Format::Qcow2 => qcow2::may_shrink(&mut file).map_err(|why| trouble(image, &file, &why))?,
        Format::Vhd => Some("a VHD cannot become smaller: convert it into a new one"),
    };
    if let Some(what) = refused {
        return Err(trouble(image, &file, &Unsupported::Refused(what)));
    }
    if image.format == Format::Qcow2 {
        // The lock goes with the file, and another is taken at once.
        drop(file);
        let mut drive = Drive::open(image, Shell { lock: Lock::None }, true)?;
        let cut = wanted.next_multiple_of(2 << 20).min(old);
        drive.clear(Op::WriteZeroes, wanted / SECTOR_BYTES, cut / SECTOR_BYTES)?;
        drive.clear(Op::Discard, cut / SECTOR_BYTES, old / SECTOR_BYTES)?;
        drive.close()?;
        drop(drive);
        file = open(image)?;
        let made = qcow2::shrink(&mut file, wanted);
        made.map_err(|why| trouble(image, &file, &why))?;
        return Ok(wanted);
    }
    let done = file.set_length(wanted).and_then(|()| file.sync());
    done.map_err(|why| trouble(image, &file, &why.into()))?;
    Ok(wanted)
}
