//! `vbdd image create`, and what other commands need to make images.

use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use formats::qcow2::{Compression, create as qcow2};
use formats::vhd::{Kind, create as vhd};
use formats::{Medium, SECTOR_BYTES};

use super::file::{ImageFile, Lock, Shell};
use super::json::Object;
use super::layers::{Chain, Facts};
use super::target::Target;
use super::words::{self, Options, Words};
use super::{Command, Failed, out, trouble};
use crate::cli::print;
use crate::error::Error;
use crate::params::{Format, Image};

pub(super) const COMMAND: Command = Command {
    name: "create",
    help: HELP,
    options: Options { values: &["f", "o", "b", "F"], flags: &["u"] },
    run,
};

const HELP: &str = "\
vbdd image create makes an image. A file that is there is replaced when the new one is whole.

Usage: vbdd image create [-f FORMAT] [-o KEY=VALUE,...] [-b BACKING -F FORMAT] FORMAT:PATH [SIZE]

  -f FORMAT      raw, qcow2 or vhd, where PATH does not say it
  -b BACKING     the image below: its path, absolute or relative to the new image's directory. SIZE may be left out then
  -F FORMAT      the format of the image below
  -o KEY=VALUE   settings, several with commas:
                 qcow2: cluster_size=64k compat=1.1|0.10 refcount_bits=16 extended_l2=off compression_type=zlib|zstd
                 vhd: subformat=dynamic|fixed, metadata_size=SIZE (room to grow to that size without moving anything)
                 raw: preallocation=off|falloc|full
  -u             do not look at the image below
  --json         tell what was made as JSON

SIZE is in bytes, or with k, M, G or T. A dynamic or differencing VHD is rounded up to 2 MiB.
";

/// The image below a new one.
#[derive(Clone, Debug)]
pub(super) struct Below {
    /// Its name, as the new image is to say it.
    pub(super) name: String,
    /// What it is.
    pub(super) image: Image,
    /// The new image names it without anybody having looked at it.
    pub(super) unseen: bool,
}

/// How an image is to be made.
#[derive(Clone, Debug)]
enum Shape {
    Raw { preallocation: String },
    Qcow2(qcow2::Create),
    Vhd(vhd::Create),
}

/// What is to be made.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    shape: Shape,
    pub(super) disk_bytes: u64,
}

fn run(words: &Words) -> Result<u8, Failed> {
    let path = words.arguments.first().ok_or_else(|| words::misuse("PATH is missing", "create"))?;
    if let Some(extra) = words.arguments.get(2) {
        return Err(words::misuse(format!("{extra} is one argument too many"), "create"));
    }
    let image = words::image(path, words.format("f")?)?;
    let mut settings = words.settings();
    let mut setting = |key: &str| {
        let at = settings.iter().rposition(|(other, _)| *other == key)?;
        Some(settings.remove(at).1)
    };
    let size = setting("size").or(words.arguments.get(1).map(String::as_str)).map(words::size).transpose()?;
    let backing = setting("backing_file").or(words.value("b"));
    let backing_format =
        setting("backing_fmt").or(words.value("F")).map(words::format_of_name).transpose()?;
    let below = match backing {
        Some(name) => Some(below(&image.path, name, backing_format, words.has("u"))?),
        None => None,
    };
    let size = match (size, &below) {
        (Some(size), _) => size.next_multiple_of(SECTOR_BYTES),
        (None, Some(below)) if !below.unseen => {
            Chain::open(&below.image, Shell { lock: Lock::None }, true)?.bytes()
        }
        _ => return Err(words::misuse("SIZE is missing", "create")),
    };
    let plan = Plan::new(image.format, &settings, size, below.as_ref())?;
    let made = make_file(&image, &plan, below.as_ref())?;
    if made > size {
        out::note(&format!("{}: the disk has {made} bytes, whole blocks of 2 MiB", image.path));
    }
    if words.has("json") {
        let object = Object::new().text("filename", &image.path).text("format", image.format.name());
        print(&(object.number("virtual-size", made).end() + "\n"))?;
    }
    Ok(0)
}

/// The image that a new one at `path` would name.
pub(super) fn below(path: &str, name: &str, format: Option<Format>, unseen: bool) -> Result<Below, Failed> {
    let whole = Path::new(path).parent().unwrap_or(Path::new("/")).join(name);
    let whole = whole.to_string_lossy().into_owned();
    let format = format.ok_or_else(|| {
        Error::new(
            format!("{name}: the backing format is not named, and is never guessed"),
            super::guess::hint_of_path(&whole).replace("-f", "-F"),
        )
    })?;
    Ok(Below { name: name.into(), image: Image { format, path: whole }, unseen })
}

/// A path to `to` as seen from the directory of `from`; both absolute.
pub(super) fn relative(from: &str, to: &str) -> String {
    let parts = |path: &Path| path.components().map(|part| part.as_os_str().to_owned()).collect::<Vec<_>>();
    let clean = |path: &str| {
        let path = Path::new(path);
        let directory = path.parent().unwrap_or(Path::new("/"));
        let real = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.into());
        (parts(&real), path.file_name().unwrap_or_default().to_owned())
    };
    let ((from, _), (to, name)) = (clean(from), clean(to));
    let common = from.iter().zip(&to).take_while(|(one, other)| one == other).count();
    let mut found = PathBuf::new();
    found.extend(from.iter().skip(common).map(|_| Component::ParentDir));
    found.extend(to.iter().skip(common));
    found.push(name);
    found.to_string_lossy().into_owned()
}

/// Makes an image under its name, or on a device. Returns the size of its disk.
fn make_file(image: &Image, plan: &Plan, below: Option<&Below>) -> Result<u64, Failed> {
    let is_device = std::fs::metadata(&image.path)
        .is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_block_device(&found.file_type()));
    if is_device {
        let opened = Shell { lock: Lock::None }.open_file(&image.path, true);
        let (mut file, _) = opened.map_err(|error| Error::new(error.to_string(), ""))?;
        out::note(&format!("{}: a device: what it holds is given up, from the first write on", image.path));
        return plan.make(image, &mut file);
    }
    let (target, mut file) = Target::begin(&image.path)?;
    let made = plan.make(image, &mut file)?;
    if below.is_some_and(|below| !below.unseen) {
        target.opens(image)?;
    }
    target.finish(&file.file())?;
    Ok(made)
}

fn one_of<'a>(key: &str, value: &'a str, known: &[&str]) -> Result<&'a str, Failed> {
    if known.contains(&value) {
        return Ok(value);
    }
    Err(Error::new(format!("-o {key}={value}: no such choice"), format!("one of {}", known.join(", ")))
        .into())
}

fn switch(key: &str, value: &str) -> Result<bool, Failed> {
    one_of(key, value, &["on", "off"]).map(|value| value == "on")
}

impl Plan {
    /// From the settings of `-o`.
    ///
    /// # Errors
    /// Settings that the format does not have.
    pub(super) fn new(
        format: Format,
        settings: &[(&str, &str)],
        disk_bytes: u64,
        below: Option<&Below>,
    ) -> Result<Plan, Failed> {
        if disk_bytes == 0 {
            return Err(Error::new("a disk needs at least one sector", "give a SIZE").into());
        }
        let mut shape = match format {
            Format::Raw if below.is_some() => {
                return Err(Error::new("a raw image has nothing below it", "use -f qcow2 or -f vhd").into());
            }
            Format::Raw => Shape::Raw { preallocation: String::from("off") },
            Format::Qcow2 => {
                let backing =
                    below.map(|below| (below.name.clone(), backing_format(below.image.format).into()));
                Shape::Qcow2(qcow2::Create { backing, ..qcow2::Create::new(disk_bytes) })
            }
            Format::Vhd => Shape::Vhd(vhd::Create {
                kind: if below.is_some() { Kind::Differencing } else { Kind::Dynamic },
                disk_bytes,
                room_bytes: 0,
                uuid: uuid()?,
                seconds: now().as_secs(),
                parent: None,
            }),
        };
        for (key, value) in settings {
            let known = match &mut shape {
                Shape::Raw { preallocation } => set_raw(preallocation, key, value)?,
                Shape::Qcow2(create) => set_qcow2(create, key, value)?,
                Shape::Vhd(create) => set_vhd(create, key, value)?,
            };
            if !known {
                let what = format!("-o {key}: {} images have no such setting", format.name());
                return Err(Error::new(what, "see vbdd image create --help").into());
            }
        }
        if let (Shape::Vhd(create), Some(below)) = (&mut shape, below) {
            create.parent = Some(parent(below)?);
        }
        Ok(Plan { shape, disk_bytes })
    }

    /// Makes the image in an empty file, or on a device. Returns the size of its disk.
    pub(super) fn make(&self, image: &Image, file: &mut ImageFile) -> Result<u64, Failed> {
        let made = match &self.shape {
            Shape::Raw { preallocation } => make_raw(file, preallocation, self.disk_bytes),
            Shape::Qcow2(create) => match qcow2::create(file, create) {
                Err(formats::Failure::Unsupported) => {
                    let hint = "-o cluster_size larger, or a shorter backing name";
                    return Err(Error::new(format!("{}: QCOW2 cannot be like that", image.path), hint).into());
                }
                other => other.map_err(formats::Unsupported::from).map(|()| create.size_bytes),
            },
            Shape::Vhd(create) => vhd::create(file, create),
        };
        made.map_err(|why| trouble(image, file, &why))
    }
}

/// The format of a parent, as QCOW2 and qemu spell it.
pub(super) fn backing_format(format: Format) -> &'static str {
    if format == Format::Vhd { "vpc" } else { format.name() }
}

/// What a differencing VHD says of its parent.
pub(super) fn parent(below: &Below) -> Result<vhd::Parent, Failed> {
    match below.image.format {
        Format::Raw => Ok(vhd::Parent { uuid: None, timestamp: 0, path: below.name.clone() }),
        Format::Qcow2 => {
            Err(Error::new("a VHD cannot say that its parent is QCOW2", "make a QCOW2 image, or convert")
                .into())
        }
        Format::Vhd => {
            let chain = Chain::open(&below.image, Shell { lock: Lock::None }, false)?;
            match chain.layers.first().map(|leaf| &leaf.facts) {
                Some(Facts::Vhd(headers)) => Ok(vhd::Parent::of(headers, below.name.clone())),
                _ => Err(Error::new(format!("{}: no VHD", below.image.path), "").into()),
            }
        }
    }
}

fn set_raw(preallocation: &mut String, key: &str, value: &str) -> Result<bool, Failed> {
    if key == "preallocation" {
        *preallocation = one_of(key, value, &["off", "falloc", "full"])?.into();
    }
    Ok(key == "preallocation")
}

fn set_qcow2(create: &mut qcow2::Create, key: &str, value: &str) -> Result<bool, Failed> {
    match key {
        "cluster_size" => {
            let bytes = words::size(value)?;
            if !bytes.is_power_of_two() || !(512..=2 << 20).contains(&bytes) {
                return Err(
                    Error::new(format!("-o cluster_size={value}"), "a power of two from 512 to 2M").into()
                );
            }
            create.shape.cluster_bits = bytes.ilog2();
        }
        "compat" => {
            let old = matches!(one_of(key, value, &["0.10", "1.1", "v2", "v3"])?, "0.10" | "v2");
            create.shape.version = if old { 2 } else { 3 };
        }
        "refcount_bits" => {
            let bits = one_of(key, value, &["1", "2", "4", "8", "16", "32", "64"])?;
            create.shape.refcount_order = bits.parse::<u32>().unwrap_or(16).ilog2();
        }
        "extended_l2" => create.shape.extended = switch(key, value)?,
        "compression_type" => {
            let zstd = one_of(key, value, &["zlib", "zstd"])? == "zstd";
            create.compression = if zstd { Compression::Zstd } else { Compression::Zlib };
        }
        "lazy_refcounts" => drop(one_of(key, value, &["off"])?),
        "preallocation" => drop(one_of(key, value, &["off"])?),
        _ => return Ok(false),
    }
    Ok(true)
}

fn set_vhd(create: &mut vhd::Create, key: &str, value: &str) -> Result<bool, Failed> {
    match key {
        "subformat" => {
            let fixed = one_of(key, value, &["dynamic", "fixed"])? == "fixed";
            if fixed && create.kind == Kind::Differencing {
                return Err(
                    Error::new("a fixed VHD has nothing below it", "leave subformat=fixed out").into()
                );
            }
            create.kind = if fixed { Kind::Fixed } else { create.kind };
        }
        "metadata_size" => create.room_bytes = words::size(value)?,
        // The size is always exactly what is asked for.
        "force_size" => drop(switch(key, value)?),
        _ => return Ok(false),
    }
    Ok(true)
}

fn make_raw(file: &mut ImageFile, preallocation: &str, disk_bytes: u64) -> Result<u64, formats::Unsupported> {
    file.set_length(disk_bytes)?;
    if file.is_device() || preallocation == "off" {
        return Ok(disk_bytes);
    }
    if preallocation == "falloc" {
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&*file.file(), flags, 0, disk_bytes)
            .map_err(|errno| formats::Unsupported::Io(errno.raw_os_error()))?;
    } else {
        file.write_zeroes(0, disk_bytes)?;
    }
    Ok(disk_bytes)
}

/// Time since 1970.
pub(super) fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A new identity: random, version 4.
pub(super) fn uuid() -> Result<[u8; 16], Failed> {
    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| Error::new(format!("cannot read /dev/urandom: {error}"), ""))?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes)
}
