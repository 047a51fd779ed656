//! `vbdd image scan`: the images of a directory as a tree. And `vbdd image hide`.

use std::collections::HashMap;
use std::path::Path;

use formats::qcow2::{Header, parent};
use formats::vhd::{Headers, change, read_headers};
use formats::{Medium, Unsupported};

use super::file::{ImageFile, Lock, Shell};
use super::info::uuid_text;
use super::json::Object;
use super::out::{Out, human};
use super::words::{self, Options, Words};
use super::{Command, Failed, trouble};
use crate::cli::print;
use crate::error::Error;
use crate::params::{Format, Image};

pub(super) const COMMAND: Command =
    Command { name: "scan", help: HELP, options: Options { values: &["f"], flags: &[] }, run };

pub(super) const HIDE: Command = Command {
    name: "hide",
    help: HIDE_HELP,
    options: Options { values: &["f"], flags: &["off"] },
    run: hide,
};

const HELP: &str = "\
vbdd image scan shows all images of a directory as a tree: each below the one that it is built on.

Usage: vbdd image scan [-f FORMAT] DIRECTORY

  -f FORMAT  every file is of this format. Else the end of its name says it: .vhd, .qcow2, .raw, .img; others are left out
  --json     an array with an object for each image, parents before children

An image that cannot be read has an error in its line, and is no reason to stop. Exit code: 3 if there was one.
";

const HIDE_HELP: &str = "\
vbdd image hide marks an image as one that only serves as a parent, as XCP-ng's and XenServer's storage managers do.

Usage: vbdd image hide [--off] [-f FORMAT] FORMAT:PATH

  -f FORMAT  qcow2 or vhd, where PATH does not say it
  --off      take the mark away
  --json     the image and its mark as JSON
";

/// Who an image is built on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Parent {
    None,
    /// A file's name in the same directory, or a path.
    Named(String),
    /// A VHD's identity; and its name.
    Identity([u8; 16], String),
}

/// One image.
#[derive(Debug)]
struct Found {
    name: String,
    format: Format,
    file_bytes: u64,
    allocated_bytes: u64,
    about: Result<About, String>,
    parent: Option<usize>,
    children: Vec<usize>,
    shown: bool,
}

/// What it says about itself.
#[derive(Debug)]
struct About {
    disk_bytes: u64,
    hidden: bool,
    uuid: Option<[u8; 16]>,
    marker: Option<u8>,
    parent: Parent,
}

fn run(words: &Words) -> Result<u8, Failed> {
    let [directory] = words.exactly("scan", ["DIRECTORY"])?;
    let directory = words::absolute(directory)?;
    let mut found = look(&directory, words.format("f")?)?;
    join(&mut found);
    let mut out = Out::new();
    let json = words.has("json");
    if json {
        out.text("[")?;
    }
    let mut tree = Tree { found: &mut found, out, json, lines: 0 };
    for root in 0..tree.found.len() {
        if tree.found.get(root).is_some_and(|image| image.parent.is_none()) {
            tree.show(root)?;
        }
    }
    // What is left is built on itself.
    for rest in 0..tree.found.len() {
        tree.show(rest)?;
    }
    let mut out = tree.out;
    if json {
        out.text("]\n")?;
    }
    out.end()?;
    Ok(if found.iter().any(|image| image.about.is_err()) { 3 } else { 0 })
}

fn format_of(name: &str, named: Option<Format>) -> Option<Format> {
    let by_name = || match name.rsplit_once('.')?.1 {
        "vhd" => Some(Format::Vhd),
        "qcow2" => Some(Format::Qcow2),
        "raw" | "img" => Some(Format::Raw),
        _ => None,
    };
    named.or_else(by_name).filter(|_| !name.starts_with('.'))
}

/// Reads the headers of all images, in the order of their names.
fn look(directory: &str, format: Option<Format>) -> Result<Vec<Found>, Failed> {
    let cannot =
        |error: std::io::Error| Failed::from(Error::new(format!("{directory}: {error}"), "give a directory"));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if let (Ok(name), false) = (entry.file_name().into_string(), is_directory) {
            names.push(name);
        }
    }
    names.sort_unstable();
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        let Some(format) = format_of(&name, format) else { continue };
        let path = format!("{directory}/{name}");
        let mut image = Found {
            name,
            format,
            file_bytes: 0,
            allocated_bytes: 0,
            about: Err(String::new()),
            parent: None,
            children: Vec::new(),
            shown: false,
        };
        match (Shell { lock: Lock::None }).open_file(&path, false) {
            Ok((mut file, _)) => {
                image.file_bytes = file.length_bytes();
                image.allocated_bytes = file.allocated_bytes();
                image.about = about(&mut file, format).map_err(|why| {
                    let image = Image { format, path };
                    trouble(&image, &file, &why).error.to_string()
                });
            }
            Err(error) => image.about = Err(error.to_string()),
        }
        found.push(image);
    }
    Ok(found)
}

fn about(file: &mut ImageFile, format: Format) -> Result<About, Unsupported> {
    match format {
        Format::Raw => Ok(About {
            disk_bytes: file.length_bytes() / 512 * 512,
            hidden: false,
            uuid: None,
            marker: None,
            parent: Parent::None,
        }),
        Format::Qcow2 => {
            let header = Header::read(file)?;
            let parent =
                header.backing.as_ref().map_or(Parent::None, |backing| Parent::Named(backing.name.clone()));
            let hidden = parent::hidden(&header);
            Ok(About { disk_bytes: header.size_bytes, hidden, uuid: None, marker: None, parent })
        }
        Format::Vhd => {
            let headers = read_headers(file)?;
            Ok(About {
                disk_bytes: headers.disk_bytes,
                hidden: headers.footer.hidden(),
                uuid: Some(headers.footer.uuid()),
                marker: headers.batmap.as_ref().map(|batmap| batmap.header.marker()),
                parent: parent_of_vhd(&headers),
            })
        }
    }
}

fn parent_of_vhd(headers: &Headers) -> Parent {
    let path = || headers.parent_paths().into_iter().next().unwrap_or_default();
    match headers.parent_uuid() {
        None => Parent::None,
        Some(None) => Parent::Named(path()),
        Some(Some(uuid)) => Parent::Identity(uuid, path()),
    }
}

/// Finds everybody's parent: by identity where there is one, else by the file's name.
fn join(found: &mut [Found]) {
    let mut by_name = HashMap::new();
    let mut by_uuid = HashMap::new();
    for (number, image) in found.iter().enumerate() {
        by_name.insert(image.name.clone(), number);
        if let Ok(About { uuid: Some(uuid), .. }) = &image.about {
            by_uuid.entry(*uuid).or_insert(number);
        }
    }
    for number in 0..found.len() {
        let Some(Found { about: Ok(about), .. }) = found.get(number) else { continue };
        let parent = match &about.parent {
            Parent::None => None,
            Parent::Identity(uuid, _) => by_uuid.get(uuid).copied(),
            Parent::Named(path) => {
                let name = Path::new(path).file_name().and_then(|name| name.to_str());
                name.and_then(|name| by_name.get(name).copied())
            }
        };
        if let Some(image) = found.get_mut(number) {
            image.parent = parent;
        }
        if let Some(parent) = parent.and_then(|parent| found.get_mut(parent)) {
            parent.children.push(number);
        }
    }
}

struct Tree<'a> {
    found: &'a mut [Found],
    out: Out,
    json: bool,
    lines: u64,
}

impl Tree<'_> {
    /// Shows an image and all that is built on it, each once.
    fn show(&mut self, root: usize) -> Result<(), Failed> {
        let mut stack = vec![(root, 0)];
        while let Some((number, depth)) = stack.pop() {
            let parent = self.found.get(number).and_then(|image| image.parent);
            let parent = parent.and_then(|parent| self.found.get(parent)).map(|parent| parent.name.clone());
            let Some(image) = self.found.get_mut(number).filter(|image| !image.shown) else { continue };
            image.shown = true;
            stack.extend(image.children.iter().rev().map(|child| (*child, depth + 1)));
            let line = if self.json { json(image, depth, parent.as_deref()) } else { text(image, depth) };
            if self.json && self.lines > 0 {
                self.out.text(",\n")?;
            }
            self.lines += 1;
            self.out.text(&line)?;
        }
        Ok(())
    }
}

fn text(image: &Found, depth: usize) -> String {
    let indent = "  ".repeat(depth);
    let (name, takes) = (&image.name, human(image.allocated_bytes));
    let about = match &image.about {
        Ok(about) => about,
        Err(why) => return format!("{indent}{name}  error: {why}\n"),
    };
    let hidden = if about.hidden { "  hidden" } else { "" };
    let missing = match &about.parent {
        Parent::Named(path) | Parent::Identity(_, path) if image.parent.is_none() => {
            format!("  parent not here: {path}")
        }
        _ => String::new(),
    };
    format!(
        "{indent}{name}  {} {}, takes {takes}{hidden}{missing}\n",
        image.format.name(),
        human(about.disk_bytes)
    )
}

fn json(image: &Found, depth: usize, parent: Option<&str>) -> String {
    let object = Object::new()
        .text("filename", &image.name)
        .text("format", image.format.name())
        .number("depth", depth as u64)
        .number("file-size", image.file_bytes)
        .number("actual-size", image.allocated_bytes);
    let about = match &image.about {
        Ok(about) => about,
        Err(why) => return object.text("error", why).end(),
    };
    let mut object = object.number("virtual-size", about.disk_bytes).flag("hidden", about.hidden);
    object = object.maybe("uuid", about.uuid.map(|uuid| uuid_text(&uuid)).as_deref());
    if let Some(marker) = about.marker {
        object = object.number("marker", marker.into());
    }
    let (path, uuid) = match &about.parent {
        Parent::None => (None, None),
        Parent::Named(path) => (Some(path), None),
        Parent::Identity(uuid, path) => (Some(path), Some(uuid_text(uuid))),
    };
    object = object.maybe("parent", parent).maybe("parent-uuid", uuid.as_deref());
    object.maybe("backing-filename", path.map(String::as_str)).end()
}

fn hide(words: &Words) -> Result<u8, Failed> {
    let [path] = words.exactly("hide", ["PATH"])?;
    let image = words::image(path, words.format("f")?)?;
    let hidden = !words.has("off");
    let opened = Shell { lock: Lock::None }.open_file(&image.path, true);
    let (mut file, _) = opened.map_err(|error| super::opening(error, &image))?;
    let done = match image.format {
        Format::Raw => Err(Unsupported::Refused("a raw image cannot be hidden")),
        Format::Qcow2 => parent::set_hidden(&mut file, hidden),
        Format::Vhd => change::set_hidden(&mut file, hidden),
    };
    done.map_err(|why| trouble(&image, &file, &why))?;
    if words.has("json") {
        print(&(Object::new().text("filename", &image.path).flag("hidden", hidden).end() + "\n"))?;
    }
    Ok(0)
}
