//! `vbdd image map`.

use std::fmt::Write;

use formats::{Place, SECTOR_BYTES};

use super::file::{Lock, Shell};
use super::layers::{Chain, Piece};
use super::out::Out;
use super::words::{self, Options, Words};
use super::{Command, Failed};
use crate::error::Error;

pub(super) const COMMAND: Command = Command {
    name: "map",
    help: HELP,
    options: Options { values: &["f", "start-offset", "max-length"], flags: &["U"] },
    run,
};

const HELP: &str = "\
vbdd image map says where the bytes of a disk lie, in the image and in those below it.

Usage: vbdd image map [OPTIONS] FORMAT:PATH

  -f FORMAT             raw, qcow2 or vhd, where PATH does not say it
  --start-offset BYTES  begin there (0)
  --max-length BYTES    and go on for so long (to the end)
  -U                    accepted: map never minds that others use the image
  --json                every stretch as an object, the whole an array; printed as it is found

JSON fields: start, length (bytes of the disk), depth (0 is the image, 1 the one below, ...), present (in an image of the
chain), zero (reads as zero), data (bytes are stored), compressed, and offset (in the file) where data are stored as they are.
";

fn run(words: &Words) -> Result<u8, Failed> {
    let [path] = words.exactly("map", ["PATH"])?;
    let image = words::image(path, words.format("f")?)?;
    let mut chain = Chain::open(&image, Shell { lock: Lock::None }, true)?;
    let start = words.size("start-offset", 0)?;
    let length = words.size("max-length", u64::MAX)?;
    let end = start.saturating_add(length).min(chain.bytes());
    if start >= chain.bytes() || !start.is_multiple_of(SECTOR_BYTES) {
        let what = format!("--start-offset {start}: not within the disk, or no multiple of 512");
        return Err(Error::new(what, format!("the disk has {} bytes", chain.bytes())).into());
    }
    let mut out = Out::new();
    let json = words.has("json");
    let mut separator = "[";
    let mut line = String::new();
    if !json {
        out.text("Offset          Length          Mapped to       File\n")?;
    }
    let range = (start / SECTOR_BYTES, end.div_ceil(SECTOR_BYTES));
    chain.for_each(range, &mut |chain, piece| {
        line.clear();
        if json {
            line.push_str(separator);
            separator = ",\n";
            json_line(&mut line, &piece);
        } else {
            text_line(&mut line, chain, &piece);
        }
        out.text(&line)
    })?;
    if json {
        out.text(if separator == "[" { "[]\n" } else { "]\n" })?;
    }
    out.end()?;
    Ok(0)
}

fn json_line(line: &mut String, piece: &Piece) {
    let (data, compressed) = match piece.place {
        Place::Data { .. } => (true, false),
        Place::Compressed { .. } => (true, true),
        Place::Zero | Place::Parent => (false, false),
    };
    let _ = write!(
        line,
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {data}, \"compressed\": {compressed}",
        piece.sector * SECTOR_BYTES,
        piece.sectors * SECTOR_BYTES,
        piece.depth,
        piece.place != Place::Parent,
        !data,
    );
    if let Place::Data { offset_bytes } = piece.place {
        let _ = write!(line, ", \"offset\": {offset_bytes}");
    }
    line.push('}');
}

/// Like qemu-img: only what is stored.
fn text_line(line: &mut String, chain: &Chain, piece: &Piece) {
    let path = chain.layers.get(piece.depth).map_or("", |layer| layer.link.image.path.as_str());
    let (start, length) = (piece.sector * SECTOR_BYTES, piece.sectors * SECTOR_BYTES);
    match piece.place {
        Place::Data { offset_bytes } => {
            let _ = writeln!(line, "{start:<#15x} {length:<#15x} {offset_bytes:<#15x} {path}");
        }
        Place::Compressed { .. } => {
            let _ = writeln!(line, "{start:<#15x} {length:<#15x} {:<15} {path}", "compressed");
        }
        Place::Zero | Place::Parent => {}
    }
}
