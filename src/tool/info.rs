//! `vbdd image info`.

use std::fmt::Write;

use formats::qcow2::bitmaps::bitmaps;
use formats::qcow2::header::{CORRUPT, DIRTY, LAZY_REFCOUNTS};
use formats::qcow2::parent::hidden;
use formats::qcow2::snapshots::{Snapshot, list};
use formats::qcow2::{Compression, Header};
use formats::vhd::check as vhd;
use formats::{Medium, SECTOR_BYTES};

use super::create::backing_format;
use super::file::{ImageFile, Lock, Shell};
use super::json::{Object, array};
use super::layers::{Chain, Facts, Layer};
use super::out::{Out, human};
use super::words::{self, Options, Words};
use super::{Command, Failed, trouble};
use crate::params::Format;

pub(super) const COMMAND: Command = Command {
    name: "info",
    help: HELP,
    options: Options { values: &["f"], flags: &["backing-chain", "U"] },
    run,
};

const HELP: &str = "\
vbdd image info tells what an image says about itself. It never waits for whoever uses the image.

Usage: vbdd image info [-f FORMAT] [--backing-chain] FORMAT:PATH

  -f FORMAT        raw, qcow2 or vhd, where PATH does not say it
  --backing-chain  the images below it, too; with --json an array
  -U               accepted: info never minds that others use the image
  --json           as JSON, with the field names of qemu-img
";

/// What there is to tell of an image: the same things as text and as JSON.
#[derive(Debug, Default)]
struct Story {
    text: String,
    json: Vec<(String, String)>,
}

impl Story {
    /// A line of text, and a field whose value is JSON.
    fn tell(&mut self, label: &str, text: &str, key: &str, json: String) {
        if !label.is_empty() {
            let _ = writeln!(self.text, "{label}: {text}");
        }
        if !key.is_empty() {
            self.json.push((key.into(), json));
        }
    }

    fn word(&mut self, label: &str, key: &str, value: &str) {
        self.tell(label, value, key, super::json::quoted(value));
    }

    fn number(&mut self, label: &str, key: &str, value: u64) {
        self.tell(label, &value.to_string(), key, value.to_string());
    }

    fn flag(&mut self, label: &str, key: &str, value: bool) {
        self.tell(label, &value.to_string(), key, value.to_string());
    }

    fn size(&mut self, label: &str, key: &str, bytes: u64) {
        self.tell(label, &format!("{} ({bytes} bytes)", human(bytes)), key, bytes.to_string());
    }

    fn object(&self) -> String {
        self.json.iter().fold(Object::new(), |object, (key, value)| object.raw(key, value)).end()
    }

    /// What only this format has.
    fn specific(&mut self, format: &str, story: &Story) {
        self.text.push_str("format specific information:\n");
        for line in story.text.lines() {
            let _ = writeln!(self.text, "    {line}");
        }
        let object = Object::new().text("type", format).raw("data", &story.object()).end();
        self.json.push(("format-specific".into(), object));
    }
}

fn run(words: &Words) -> Result<u8, Failed> {
    let [path] = words.exactly("info", ["PATH"])?;
    let image = words::image(path, words.format("f")?)?;
    let shell = Shell { lock: Lock::None };
    let whole = words.has("backing-chain");
    let all = Chain::open(&image, shell, true);
    let (mut chain, depth) = match all {
        Ok(chain) => {
            let depth = Ok(chain.layers.len());
            (chain, depth)
        }
        Err(failed) if whole => return Err(failed),
        Err(failed) => (Chain::open(&image, shell, false)?, Err(failed.error.what)),
    };
    if !whole {
        chain.layers.truncate(1);
    }
    let mut stories = Vec::new();
    for (above, layer) in chain.layers.iter_mut().enumerate() {
        let mut story = story_of(layer)?;
        match &depth {
            Ok(depth) => story.number("depth of the chain", "depth", (depth - above) as u64),
            Err(what) => story.word("chain", "chain-error", what),
        }
        stories.push(story);
    }
    let mut out = Out::new();
    if words.has("json") {
        let objects: Vec<String> = stories.iter().map(Story::object).collect();
        let text = if whole { array(&objects) } else { objects.concat() };
        out.text(&(text + "\n"))?;
    } else {
        let texts: Vec<&str> = stories.iter().map(|story| story.text.as_str()).collect();
        out.text(&texts.join("\n"))?;
    }
    out.end()?;
    Ok(0)
}

fn story_of(layer: &mut Layer) -> Result<Story, Failed> {
    let mut story = Story::default();
    let file = &mut layer.link.medium;
    let image = &layer.link.image;
    story.word("image", "filename", &image.path);
    story.word("file format", "format", image.format.name());
    story.size("virtual size", "virtual-size", layer.sectors * SECTOR_BYTES);
    story.size("disk size", "actual-size", file.allocated_bytes());
    story.size("file size", "file-size", file.length_bytes());
    let told = match &layer.facts {
        Facts::Raw => Ok(()),
        Facts::Qcow2(header) => tell_qcow2(&mut story, file, header, &image.path),
        Facts::Vhd(_) => tell_vhd(&mut story, file),
    };
    told.map_err(|why| trouble(image, file, &why))?;
    Ok(story)
}

fn tell_qcow2(
    story: &mut Story,
    file: &mut ImageFile,
    header: &Header,
    path: &str,
) -> Result<(), formats::Unsupported> {
    story.number("cluster_size", "cluster-size", header.shape.cluster_bytes());
    story.flag("", "dirty-flag", header.incompatible & DIRTY != 0);
    if header.incompatible & DIRTY != 0 {
        story.text.push_str("It was not closed by its last user.\n");
    }
    if let Some(backing) = &header.backing {
        let whole = std::path::Path::new(path).with_file_name(&backing.name);
        let whole = whole.to_string_lossy();
        story.tell("backing file", &format!("{} (actual path: {whole})", backing.name), "", String::new());
        story.word("", "backing-filename", &backing.name);
        story.word("", "full-backing-filename", &whole);
        if let Some(format) = &backing.format {
            story.word("backing file format", "backing-filename-format", format);
        }
    }
    let snapshots = list(file, header)?;
    if !snapshots.is_empty() {
        story.text.push_str(&snapshots_text(&snapshots));
        story.tell("", "", "snapshots", snapshots_json(&snapshots));
    }
    let mut own = Story::default();
    own.word("compat", "compat", if header.shape.version == 2 { "0.10" } else { "1.1" });
    let packing = if header.compression == Compression::Zstd { "zstd" } else { "zlib" };
    own.word("compression type", "compression-type", packing);
    own.flag("lazy refcounts", "lazy-refcounts", header.compatible & LAZY_REFCOUNTS != 0);
    own.number("refcount bits", "refcount-bits", 1 << header.shape.refcount_order);
    own.flag("corrupt", "corrupt", header.incompatible & CORRUPT != 0);
    own.flag("extended l2", "extended-l2", header.shape.extended);
    own.flag("hidden", "hidden", hidden(header));
    let bitmaps: Vec<String> = bitmaps(file, header)?
        .iter()
        .map(|bitmap| {
            let state = if bitmap.in_use { ", not saved: not to be trusted" } else { "" };
            let _ = writeln!(
                own.text,
                "bitmap: {} ({} bytes a bit{state})",
                bitmap.name, bitmap.granularity_bytes
            );
            let flags = [("in-use", bitmap.in_use), ("auto", bitmap.auto)];
            let flags = flags.iter().filter(|(_, set)| *set).map(|(name, _)| super::json::quoted(name));
            let object =
                Object::new().text("name", &bitmap.name).number("granularity", bitmap.granularity_bytes);
            object.raw("flags", &array(&flags.collect::<Vec<_>>())).end()
        })
        .collect();
    if !bitmaps.is_empty() {
        own.tell("", "", "bitmaps", array(&bitmaps));
    }
    story.specific("qcow2", &own);
    Ok(())
}

fn tell_vhd(story: &mut Story, file: &mut ImageFile) -> Result<(), formats::Unsupported> {
    let info = vhd::info(file)?;
    story.number("", "cluster-size", info.block_bytes);
    if info.unclean {
        story.text.push_str("It was not closed by its last user.\n");
    }
    story.flag("", "dirty-flag", info.unclean);
    if let Some(parent) = info.parent_uuid {
        let paths = info.parent_paths.join(", ");
        story.tell("backing file", &paths, "", String::new());
        story.word("", "backing-filename", info.parent_paths.first().map_or("", String::as_str));
        let format = if parent.is_none() { Format::Raw } else { Format::Vhd };
        story.word("backing file format", "backing-filename-format", backing_format(format));
    }
    let mut own = Story::default();
    own.word("subformat", "subformat", info.kind.name());
    own.word("uuid", "uuid", &uuid_text(&info.uuid));
    if let Some(Some(parent)) = info.parent_uuid {
        own.word("parent uuid", "parent-uuid", &uuid_text(&parent));
        own.word("parent name", "parent-name", &info.parent_name);
    }
    own.flag("hidden", "hidden", info.hidden);
    if let Some(marker) = info.marker {
        own.number("marker", "marker", marker.into());
    }
    own.number("allocated blocks", "allocated-blocks", info.allocated_blocks);
    own.number("block size", "block-size", info.block_bytes);
    own.size("grows in place to", "max-fast-resize", info.room_bytes);
    own.word("creator", "creator", &printable(&info.creator));
    own.number("created", "created-sec", info.created_seconds);
    story.specific("vhd", &own);
    Ok(())
}

fn printable(bytes: &[u8]) -> String {
    let shown = bytes.iter().filter(|byte| byte.is_ascii_graphic());
    shown.map(|byte| char::from(*byte)).collect()
}

/// A UUID as it is written.
pub(super) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in uuid.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// A table of snapshots for people.
pub(super) fn snapshots_text(snapshots: &[Snapshot]) -> String {
    let mut text =
        String::from("Snapshot list:\nID   TAG                   VM SIZE  DATE                 DISK SIZE\n");
    for snapshot in snapshots {
        let (id, name) = (&snapshot.id, &snapshot.name);
        let (state, disk) = (human(snapshot.vm_state_bytes), human(snapshot.disk_bytes));
        let _ = writeln!(text, "{id:<4} {name:<20} {state:>8}  {:<20} {disk}", date(snapshot.date.0));
    }
    text
}

/// The same for machines.
pub(super) fn snapshots_json(snapshots: &[Snapshot]) -> String {
    let object = |snapshot: &Snapshot| {
        let object = Object::new()
            .text("id", &snapshot.id)
            .text("name", &snapshot.name)
            .number("vm-state-size", snapshot.vm_state_bytes)
            .number("date-sec", snapshot.date.0.into())
            .number("date-nsec", snapshot.date.1.into())
            .number("vm-clock-sec", snapshot.vm_clock_ns / 1_000_000_000)
            .number("vm-clock-nsec", snapshot.vm_clock_ns % 1_000_000_000)
            .number("disk-size", snapshot.disk_bytes);
        match snapshot.icount {
            Some(count) => object.number("icount", count).end(),
            None => object.end(),
        }
    };
    array(&snapshots.iter().map(object).collect::<Vec<_>>())
}

/// Seconds since 1970 as a date, in UTC.
fn date(seconds: u32) -> String {
    let (days, rest) = (i64::from(seconds) / 86400, seconds % 86400);
    // The calendar of the Gregorian era, counted from March, in periods of 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_200, "2024-03-01 00:00:00"),
            (u32::MAX, "2106-02-07 06:28:15"),
        ] {
            assert_eq!(super::date(seconds), text);
        }
    }
}
