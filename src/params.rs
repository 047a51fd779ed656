//! From the toolstack's `type` and `params` nodes to an image: which format, which path.
//!
//! A format is named, never probed: a guest writes its raw disk, so what lies there must not decide how it is read. What
//! the toolstack wrote is either one of the spellings below or an error that says what to write instead.
//!
//! ```text
//! raw:PATH  aio:PATH  qcow2:PATH  vhd:PATH   the format named; vpc: is vhd:
//! tap:aio:PATH  tap2:aio:PATH                xend, xl (blktap); with or without "tapdisk:" in the middle
//! raw:nbd://HOST/EXPORT  and the like         what lies on an NBD server: see nbd::client::address
//! file:PATH  phy:PATH  phy:NAME              xend, libvirt; NAME is relative to /dev
//! PATH                                       only with type=phy or type=file: those say "raw"
//! ```

use std::fmt;

use crate::nbd::client::Address;
use crate::nbd::client::address::is_remote;

/// The longest path that is taken, in bytes: Linux's own bound.
pub const PATH_MAX_BYTES: usize = 4095;

/// How much of a refused text is repeated in the error, in characters: the error may go into xenstore.
const QUOTED_MAX_CHARS: usize = 48;

/// How the bytes of an image are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// Byte n of the disk is byte n of the file or block device.
    Raw,
    /// QCOW2, of version 2 or 3.
    Qcow2,
    /// VHD: fixed, dynamic or differencing.
    Vhd,
}

impl Format {
    /// The format that goes by a name: qemu's and blktap's.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Format> {
        match name {
            "raw" | "aio" => Some(Format::Raw),
            "qcow2" => Some(Format::Qcow2),
            "vhd" | "vpc" => Some(Format::Vhd),
            _ => None,
        }
    }

    /// The name by which it is told.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vhd => "vhd",
        }
    }
}

/// An image that the toolstack named.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Image {
    /// Its format, as named.
    pub format: Format,
    /// Its absolute path, or the address of an NBD server. Whether it lies below an allowed root, or is an allowed server, is
    /// decided when it is opened.
    pub path: String,
}

/// Why `params` names no image that can be served. `Display` says what to write instead, in one bounded line.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ParamsError {
    /// Nothing there: an empty drive.
    Empty,
    /// A path, and nothing that names the format of it.
    NoFormat,
    /// A format that is known and not served.
    NotServed(&'static str),
    /// A disk that is reached through a network or another program.
    NotLocal(&'static str),
    /// A prefix that names no format.
    UnknownFormat(String),
    /// Options behind a format's name.
    UnknownOption(String),
    /// A path that does not begin with `/`.
    RelativePath(String),
    /// A path with a `..` in it.
    ParentInPath,
    /// What looks like the address of a server, and is none: why.
    BadServer(&'static str),
    /// A path with control characters, or longer than [`PATH_MAX_BYTES`].
    BadPath,
}

impl fmt::Display for ParamsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParamsError::Empty => f.write_str("params is empty: there is no medium in the drive"),
            ParamsError::NoFormat => {
                f.write_str("params names no format, and formats are never guessed: write raw:PATH, qcow2:PATH or vhd:PATH")
            }
            ParamsError::NotServed(name) => {
                write!(f, "format {name} is not supported: convert the image to raw, qcow2 or vhd")
            }
            ParamsError::NotLocal(name) => {
                write!(f, "{name} disks are not served: give a file or block device as raw:PATH")
            }
            ParamsError::UnknownFormat(name) => {
                write!(f, "unknown format \"{name}\" in params: write raw:PATH, qcow2:PATH or vhd:PATH")
            }
            ParamsError::UnknownOption(text) => {
                write!(f, "unknown option in \"{text}\" of params: write raw:PATH")
            }
            ParamsError::RelativePath(text) => {
                write!(f, "\"{text}\" in params is not an absolute path: begin it with /")
            }
            ParamsError::ParentInPath => {
                f.write_str("the path in params has a \"..\" in it: write it without")
            }
            ParamsError::BadServer(why) => write!(f, "params names no NBD server: {why}"),
            ParamsError::BadPath => write!(
                f,
                "the path in params has control characters or is longer than {PATH_MAX_BYTES} bytes: use another"
            ),
        }
    }
}

impl std::error::Error for ParamsError {}

/// Reads `params` in the light of `device_type`, the backend's `type` node (`phy`, `file`, `tap`, `qdisk`, `vbd3` ...;
/// empty where there is none).
///
/// # Errors
/// A [`ParamsError`] that says what to write instead.
pub fn parse(device_type: &str, params: &str) -> Result<Image, ParamsError> {
    if params.is_empty() {
        return Err(ParamsError::Empty);
    }
    if params.starts_with('/') {
        return match device_type {
            "phy" | "file" => raw(params),
            _ => Err(ParamsError::NoFormat),
        };
    }
    let Some((name, rest)) = params.split_once(':') else {
        return Err(ParamsError::RelativePath(quoted(params)));
    };
    match name {
        "tap" | "tap2" => named(rest.strip_prefix("tapdisk:").unwrap_or(rest)),
        "phy" if !rest.starts_with('/') && !rest.is_empty() => raw(&format!("/dev/{rest}")),
        "phy" | "file" => raw(rest),
        _ => named(params),
    }
}

/// `FORMAT:PATH`.
fn named(text: &str) -> Result<Image, ParamsError> {
    if text.starts_with('/') {
        return Err(ParamsError::NoFormat);
    }
    let Some((name, path)) = text.split_once(':') else {
        return Err(ParamsError::RelativePath(quoted(text)));
    };
    if let Some(format) = Format::of_name(name) {
        return image(format, path);
    }
    match name {
        "qcow" => Err(ParamsError::NotServed("qcow")),
        "qed" => Err(ParamsError::NotServed("qed")),
        "vmdk" => Err(ParamsError::NotServed("vmdk")),
        "vdi" => Err(ParamsError::NotServed("vdi")),
        "vhdx" => Err(ParamsError::NotServed("vhdx")),
        "nbd" | "nbds" | "nbd+unix" | "nbd+tcp" | "nbds+unix" => Err(ParamsError::NoFormat),
        "iscsi" => Err(ParamsError::NotLocal("iscsi")),
        "rbd" => Err(ParamsError::NotLocal("rbd")),
        "http" | "https" => Err(ParamsError::NotLocal("http")),
        "drbd" => Err(ParamsError::NotLocal("drbd")),
        _ if name.contains([',', '=']) => Err(ParamsError::UnknownOption(quoted(name))),
        _ => Err(ParamsError::UnknownFormat(quoted(name))),
    }
}

fn raw(path: &str) -> Result<Image, ParamsError> {
    image(Format::Raw, path)
}

fn image(format: Format, path: &str) -> Result<Image, ParamsError> {
    if path.is_empty() {
        return Err(ParamsError::Empty);
    }
    if path.len() > PATH_MAX_BYTES || path.chars().any(char::is_control) {
        return Err(ParamsError::BadPath);
    }
    if is_remote(path) {
        Address::parse(path).map_err(ParamsError::BadServer)?;
        return Ok(Image { format, path: path.to_owned() });
    }
    if !path.starts_with('/') {
        return Err(ParamsError::RelativePath(quoted(path)));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(ParamsError::ParentInPath);
    }
    Ok(Image { format, path: path.to_owned() })
}

/// A bounded, printable piece of what was refused.
fn quoted(text: &str) -> String {
    text.chars().take(QUOTED_MAX_CHARS).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(device_type: &str, params: &str) -> Result<String, ParamsError> {
        parse(device_type, params).map(|image| image.path)
    }

    #[test]
    fn the_spellings_that_toolstacks_write() {
        let table = [
            ("phy", "/dev/vg/lv", "/dev/vg/lv"),
            ("phy", "//dev/sm/backend/x", "//dev/sm/backend/x"),
            ("file", "/var/a.img", "/var/a.img"),
            ("qdisk", "raw:/var/a.img", "/var/a.img"),
            ("qdisk", "aio:/var/a.img", "/var/a.img"),
            ("vbd3", "aio:/var/a.img", "/var/a.img"),
            ("phy", "raw:/var/a.img", "/var/a.img"),
            ("", "raw:/var/a.img", "/var/a.img"),
            ("tap", "tap:aio:/var/a.img", "/var/a.img"),
            ("tap", "tap2:aio:/var/a.img", "/var/a.img"),
            ("tap", "tap:tapdisk:aio:/var/a.img", "/var/a.img"),
            ("tap", "tap2:tapdisk:raw:/var/a.img", "/var/a.img"),
            ("", "file:/var/a.img", "/var/a.img"),
            ("phy", "phy:/dev/vg/lv", "/dev/vg/lv"),
            ("phy", "phy:vg/lv", "/dev/vg/lv"),
            ("phy", "phy:sda1", "/dev/sda1"),
            ("qdisk", "raw:/var/a:b, c..d.img", "/var/a:b, c..d.img"),
            ("qdisk", "qcow2:/var/a.qcow2", "/var/a.qcow2"),
            ("vbd3", "vhd:/var/a.vhd", "/var/a.vhd"),
            ("phy", "/var/raw:x", "/var/raw:x"),
            ("qdisk", "raw:nbd://store/disk", "nbd://store/disk"),
            ("vbd3", "qcow2:nbd+unix:///d?socket=/run/s", "nbd+unix:///d?socket=/run/s"),
            ("tap", "tap:vhd:nbd://[::1]:9/d", "nbd://[::1]:9/d"),
        ];
        for (device_type, params, expected) in table {
            assert_eq!(path(device_type, params).as_deref(), Ok(expected), "{device_type} {params}");
        }
    }

    #[test]
    fn what_is_refused_and_how() {
        let table = [
            ("phy", "", ParamsError::Empty),
            ("qdisk", "raw:", ParamsError::Empty),
            ("phy", "phy:", ParamsError::Empty),
            ("qdisk", "/var/a.img", ParamsError::NoFormat),
            ("", "/var/a.img", ParamsError::NoFormat),
            ("tap", "tap:/var/a.img", ParamsError::NoFormat),
            ("tap", "tap:qcow:/a", ParamsError::NotServed("qcow")),
            ("phy", "nbd:unix:/run/s", ParamsError::NoFormat),
            ("phy", "nbd+unix:///d?socket=/run/s", ParamsError::NoFormat),
            (
                "qdisk",
                "raw:nbd:unix:/run/s",
                ParamsError::BadServer("write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"),
            ),
            (
                "qdisk",
                "qcow2:nbds://h/x",
                ParamsError::BadServer(
                    "TLS (nbds) is not supported: use a socket, or a network that is trusted",
                ),
            ),
            ("qdisk", "iso:/a", ParamsError::UnknownFormat("iso".into())),
            ("qdisk", "RAW:/a", ParamsError::UnknownFormat("RAW".into())),
            ("qdisk", ":/a", ParamsError::UnknownFormat(String::new())),
            ("qdisk", "raw,cache=no:/a", ParamsError::UnknownOption("raw,cache=no".into())),
            ("phy", "sda1", ParamsError::RelativePath("sda1".into())),
            ("qdisk", "raw:a.img", ParamsError::RelativePath("a.img".into())),
            ("", "file:a.img", ParamsError::RelativePath("a.img".into())),
            ("phy", "/var/../etc/shadow", ParamsError::ParentInPath),
            ("phy", "phy:../etc/shadow", ParamsError::ParentInPath),
            ("phy", "/a\nb", ParamsError::BadPath),
            ("qdisk", "raw:/a\0b", ParamsError::BadPath),
        ];
        for (device_type, params, expected) in table {
            assert_eq!(path(device_type, params), Err(expected), "{device_type} {params}");
        }
        let long = format!("/{}", "a".repeat(PATH_MAX_BYTES));
        assert_eq!(path("phy", &long), Err(ParamsError::BadPath));
    }

    #[test]
    fn whatever_is_written_the_answer_is_bounded_and_a_path_is_absolute() {
        let pieces = [
            "raw",
            "aio",
            "tap",
            "tap2",
            "tapdisk",
            "phy",
            "file",
            "vhd",
            ":",
            "/",
            "..",
            "a",
            "\u{7}",
            "é",
            ",",
            "nbd://",
            "nbd+unix:///",
            "?socket=",
        ];
        let mut seed = 1u64;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..8 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                text.push_str(pieces[(seed >> 33) as usize % pieces.len()]);
            }
            for device_type in ["phy", "qdisk", ""] {
                match parse(device_type, &text) {
                    Ok(image) => {
                        let local = image.path.starts_with('/') && !image.path.split('/').any(|p| p == "..");
                        assert!(local || Address::parse(&image.path).is_ok(), "{text}");
                        assert!(text.ends_with(&image.path) || text.contains("phy:"), "{text}");
                    }
                    Err(error) => {
                        let said = error.to_string();
                        assert!(said.len() <= 250 && !said.contains('\u{7}'), "{said}");
                    }
                }
            }
        }
    }
}
