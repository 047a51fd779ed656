//! `vbdd image rebase`.

use formats::qcow2::parent::set_backing;
use formats::vhd::change::set_parent;
use formats::{Extent, Op, Place, Request, SECTOR_BYTES};

use super::compare::{Pair, pair};
use super::create::{Below, backing_format, below, parent, relative};
use super::drive::Drive;
use super::file::{Lock, Shell};
use super::json::Object;
use super::layers::Chain;
use super::out::Progress;
use super::read::{PART_BYTES, all_zero};
use super::words::{self, Options, Words};
use super::{Command, Failed, trouble};
use crate::cli::print;
use crate::error::Error;
use crate::params::{Format, Image};

pub(super) const COMMAND: Command = Command {
    name: "rebase",
    help: HELP,
    options: Options { values: &["f", "b", "F"], flags: &["u", "p"] },
    run,
};

const HELP: &str = "\
vbdd image rebase puts an image over another parent, or over none.

Usage: vbdd image rebase [-u] [-f FORMAT] -b BACKING -F FORMAT FORMAT:PATH

  -f FORMAT   qcow2 or vhd, where PATH does not say it
  -b BACKING  the new parent, absolute or relative to the image's directory; \"\" for none (QCOW2)
  -F FORMAT   the new parent's format
  -u          only write the new name down: the parent holds the same, or was moved
  -p          accepted
  --json      the image and its parent's name as JSON

Without -u the disk stays what it is: where the old and the new parent differ, what the old one holds is copied first. This can be
interrupted at any time, and begun again.
";

/// What is copied at a time: a default cluster.
const UNIT_SECTORS: u64 = (64 << 10) / SECTOR_BYTES;

fn run(words: &Words) -> Result<u8, Failed> {
    let [path] = words.exactly("rebase", ["PATH"])?;
    let image = words::image(path, words.format("f")?)?;
    let name = words.value("b").ok_or_else(|| words::misuse("-b is missing: the new parent", "rebase"))?;
    if image.format == Format::Raw {
        return Err(Error::new(format!("{}: a raw image has no parent", image.path), "").into());
    }
    let unsafely = words.has("u");
    let new = match name {
        "" if image.format == Format::Vhd => {
            let what = format!("{}: a differencing VHD without a parent is no VHD", image.path);
            return Err(Error::new(what, "convert it").into());
        }
        "" => None,
        name => Some(below(&image.path, name, words.format("F")?, unsafely)?),
    };
    let shell = Shell { lock: Lock::None };
    if unsafely {
        let (mut file, _) =
            shell.open_file(&image.path, true).map_err(|error| super::opening(error, &image))?;
        switch(&image, &mut file, new.as_ref())?;
    } else {
        let mut drive = Drive::open(&image, shell, true)?;
        copy(&image, new.as_ref(), &mut drive, words.has("q"))?;
        drive.close()?;
        if let Some(file) = drive.leaf() {
            switch(&image, file, new.as_ref())?;
        }
    }
    if words.has("json") {
        let object = Object::new().text("filename", &image.path);
        let name = new.as_ref().map(|new| new.name.as_str());
        print(&(object.maybe("backing-filename", name).end() + "\n"))?;
    }
    Ok(0)
}

/// Writes the parent's name down.
fn switch(image: &Image, file: &mut super::file::ImageFile, new: Option<&Below>) -> Result<(), Failed> {
    let done = match (image.format, new) {
        (Format::Vhd, Some(new)) => {
            let mut parent = parent(new)?;
            parent.path = relative(&image.path, &new.image.path);
            let grows = !file.is_device();
            set_parent(file, grows, &parent)
        }
        (_, Some(new)) => set_backing(file, Some((&new.name, backing_format(new.image.format)))),
        (_, None) => set_backing(file, None),
    };
    done.map_err(|why| trouble(image, file, &why))
}

/// Copies into the image what the old parent holds and the new one does not.
fn copy(image: &Image, new: Option<&Below>, drive: &mut Drive, quiet: bool) -> Result<(), Failed> {
    let shell = Shell { lock: Lock::None };
    let mut top = Chain::open(image, shell, false)?;
    let mut old = Chain::open(image, shell, true)?;
    let own = top.layers.first().map(|leaf| leaf.link.identity);
    old.layers.remove(0);
    let mut new = match new {
        Some(new) => Chain::open(&new.image, shell, true)?,
        None => Chain { layers: Vec::new(), sectors: 0, deep: false },
    };
    if new.layers.iter().any(|layer| Some(layer.link.identity) == own) {
        let what = format!("{}: it would be its own parent", image.path);
        return Err(Error::new(what, "the new parent is built on this very image").into());
    }
    (old.deep, new.deep) = (true, true);
    let mut progress = Progress::new("rebase", top.bytes(), quiet);
    let (mut at, end) = (0, top.sectors);
    let mut parts = (Vec::new(), Vec::new());
    while at < end {
        progress.done(at * SECTOR_BYTES);
        let piece = top.piece(Extent { sector: at, sectors: end - at })?;
        let stop = at + piece.sectors;
        while piece.place == Place::Parent && at < stop {
            let (found, sectors) = pair(&mut old, &mut new, at, stop)?;
            if let Pair::Data(ours, theirs) = found {
                let length = formats::bytes::index(sectors * SECTOR_BYTES);
                super::read::fill(&ours, length, &mut parts.0)?;
                super::read::fill(&theirs, length, &mut parts.1)?;
                write_differences(drive, at, &mut parts.0, &parts.1)?;
            }
            at += sectors;
        }
        at = stop;
    }
    Ok(())
}

/// Writes the units of `old` that `new` does not have.
fn write_differences(drive: &mut Drive, sector: u64, old: &mut [u8], new: &[u8]) -> Result<(), Failed> {
    let unit = formats::bytes::index(UNIT_SECTORS * SECTOR_BYTES);
    debug_assert!(PART_BYTES.is_multiple_of(UNIT_SECTORS * SECTOR_BYTES));
    let mut requests = Vec::new();
    for (number, (ours, theirs)) in (0..).zip(old.chunks(unit).zip(new.chunks(unit))) {
        if ours != theirs {
            let op = if all_zero(ours) { Op::WriteZeroes } else { Op::Write };
            let sectors = ours.len() as u64 / SECTOR_BYTES;
            let extent = Extent { sector: sector + number * UNIT_SECTORS, sectors };
            requests.push(Request { token: number * UNIT_SECTORS * SECTOR_BYTES, op, extent });
        }
    }
    for request in requests {
        drive.submit(request, old)?;
    }
    drive.settle(old)
}
