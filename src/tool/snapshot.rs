//! `vbdd image snapshot`: inside a QCOW2 image, or as a new leaf over an image.

use formats::qcow2::snapshots;
use formats::qcow2::{Header, create as qcow2};

use super::create::{Below, Plan, now, relative};
use super::file::{ImageFile, Lock, Shell};
use super::json::Object;
use super::layers::{Chain, Facts};
use super::target::Target;
use super::words::{self, Options, Words};
use super::{Command, Failed, info, trouble};
use crate::cli::print;
use crate::error::Error;
use crate::params::Format;

pub(super) const COMMAND: Command = Command {
    name: "snapshot",
    help: HELP,
    options: Options { values: &["f", "O", "o", "c", "a", "d"], flags: &["l", "U"] },
    run,
};

const HELP: &str = "\
vbdd image snapshot keeps what a disk holds now: inside a QCOW2 image, or by a new leaf over an image.

Usage: vbdd image snapshot [-f qcow2] -l | -c NAME | -a NAME | -d NAME  FORMAT:PATH
       vbdd image snapshot [-f FORMAT] [-O FORMAT] [-o KEY=VALUE,...] FORMAT:PARENT CHILD

  -l         list the internal snapshots
  -c NAME    make one
  -a NAME    make the disk what it was then (NAME or ID); what was written since is lost
  -d NAME    delete one
  -f FORMAT  of PATH or PARENT, where they do not say it
  -O FORMAT  of CHILD, where the parent is raw: qcow2 or vhd. Else it is the parent's
  -o ...     settings of CHILD, as of vbdd image create
  -U         accepted with -l
  --json     the list of internal snapshots, or the new image, as JSON

CHILD is a new image over PARENT, which from then on must not be written. It names it relative to its own directory.
";

fn run(words: &Words) -> Result<u8, Failed> {
    let actions = ["l", "c", "a", "d"].iter().filter(|name| words.has(name)).count();
    match actions {
        0 => external(words),
        1 => internal(words),
        _ => Err(words::misuse("-l, -c, -a and -d do not go together", "snapshot")),
    }
}

fn internal(words: &Words) -> Result<u8, Failed> {
    let [path] = words.exactly("snapshot", ["PATH"])?;
    let image = words::image(path, words.format("f")?)?;
    if image.format != Format::Qcow2 {
        let what = format!("{}: only QCOW2 has internal snapshots", image.path);
        return Err(
            Error::new(what, "vbdd image snapshot PARENT CHILD makes a new leaf over an image").into()
        );
    }
    let opened = Shell { lock: Lock::None }.open_file(&image.path, !words.has("l"));
    let (mut file, _) = opened.map_err(|error| super::opening(error, &image))?;
    act(words, &mut file).map_err(|why| trouble(&image, &file, &why))?;
    // After a change as JSON: what there is now.
    if words.has("l") || words.has("json") {
        let header = Header::read(&mut file);
        let list = header.and_then(|header| snapshots::list(&mut file, &header));
        let list = list.map_err(|why| trouble(&image, &file, &why))?;
        match (words.has("json"), list.is_empty()) {
            (true, _) => print(&(info::snapshots_json(&list) + "\n"))?,
            (false, true) => {}
            (false, false) => print(&info::snapshots_text(&list))?,
        }
    }
    Ok(0)
}

fn act(words: &Words, file: &mut ImageFile) -> Result<(), formats::Unsupported> {
    let now = now();
    let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos());
    if let Some(name) = words.value("c") {
        snapshots::create(file, name, date)?;
    }
    if let Some(name) = words.value("a") {
        snapshots::apply(file, name)?;
    }
    if let Some(name) = words.value("d") {
        snapshots::delete(file, name)?;
    }
    Ok(())
}

fn external(words: &Words) -> Result<u8, Failed> {
    let [parent, child] = words.exactly("snapshot", ["PARENT", "CHILD"])?;
    let parent = words::image(parent, words.format("f")?)?;
    let format = match (parent.format, words.format("O")?) {
        (Format::Raw, None) => {
            let hint = "say -O qcow2 or -O vhd";
            return Err(Error::new(
                "a raw image cannot be a leaf over another: of which format is CHILD?",
                hint,
            )
            .into());
        }
        (own, None) => own,
        (_, Some(other)) => other,
    };
    let child = words::image(child, Some(format))?;
    if std::fs::symlink_metadata(&child.path).is_ok() {
        let what = format!("{} is there already", child.path);
        return Err(Error::new(what, "a snapshot needs a new name").into());
    }
    let chain = Chain::open(&parent, Shell { lock: Lock::Shared }, true)?;
    let size = chain.bytes();
    let mut settings = words.settings();
    let room;
    match chain.layers.first().map(|leaf| &leaf.facts) {
        // The leaf grows as far as its parent does, and has its sizes.
        Some(Facts::Vhd(headers)) if format == Format::Vhd => {
            let create = formats::vhd::create::Create::snapshot(headers, String::new(), [0; 16], 0);
            room = create.room_bytes.to_string();
            settings.insert(0, ("metadata_size", &room));
        }
        Some(Facts::Qcow2(header)) if format == Format::Qcow2 => {
            let usual = qcow2::Create::new(size).shape.cluster_bits;
            room = header.shape.cluster_bytes().to_string();
            if header.shape.cluster_bits != usual && !settings.iter().any(|(key, _)| *key == "cluster_size") {
                settings.insert(0, ("cluster_size", &room));
            }
        }
        _ => {}
    }
    let below = Below { name: relative(&child.path, &parent.path), image: parent, unseen: false };
    let plan = Plan::new(format, &settings, size, Some(&below))?;
    let (target, mut file) = Target::begin(&child.path)?;
    plan.make(&child, &mut file)?;
    target.opens(&child)?;
    target.finish(&file.file())?;
    if words.has("json") {
        let object = Object::new().text("filename", &child.path).text("format", format.name());
        let object = object.number("virtual-size", size).text("backing-filename", &below.name);
        print(&(object.end() + "\n"))?;
    }
    Ok(0)
}
