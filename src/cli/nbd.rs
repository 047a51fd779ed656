//! `vbdd nbd`.

use std::path::PathBuf;

use lexopt::prelude::{Long, Short, Value};
use lexopt::{Parser, ValueExt};

use super::usage;
use crate::error::Error;
use crate::nbd::client::Address as ImageAddress;
use crate::nbd::client::address::is_remote;
use crate::nbd::server::Address;
use crate::params::{Format, Image};
use crate::storage::engine::EngineChoice;

pub(super) const HELP: &str = "\
vbdd nbd serves an image to NBD clients, until SIGTERM.

Usage: vbdd nbd FORMAT:PATH --socket PATH [OPTIONS]

  FORMAT:PATH           the image: raw:PATH, qcow2:PATH or vhd:PATH; for PATH also nbd://HOST[:PORT]/EXPORT or
                        nbd+unix:///EXPORT?socket=PATH
  --socket PATH         listen at this unix socket, which only its owner may use
  --listen ADDRESS      listen at this TCP address, 127.0.0.1:10809 say: whoever reaches it may use the image
  --read-only           refuse writes
  --export NAME         what clients call the image (the empty name, which always finds it)
  --root DIR            images below this one may lie in this directory; may be given several times (the image's own)
  --cache MODE          none or writeback: whether the page cache is used (none)
  --engine ENGINE       auto, uring or aio: how images are read and written (auto)
  --log-level LEVEL     error, warn, info, debug or trace (info); RUST_LOG overrides it
  --json                errors on standard error as JSON
  -h, --help            this text

SIGTERM or SIGINT: finishes the requests in flight, makes all data durable, and leaves the image clean.
";

/// The options of `vbdd nbd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// The image; its path is absolute.
    pub image: Image,
    /// Where clients come in.
    pub listen: Vec<Address>,
    /// Writes are refused.
    pub read_only: bool,
    /// What clients call it.
    pub export: String,
    /// Directories that images must lie below; none stands for the image's own.
    pub roots: Vec<PathBuf>,
    /// The page cache is not used.
    pub direct: bool,
    /// How images are read and written.
    pub engine: EngineChoice,
    /// The level of the log.
    pub log_level: log::LevelFilter,
}

/// Reads the options; `None` if help was asked for.
pub(super) fn parse(parser: &mut Parser) -> Result<Option<NbdOptions>, Error> {
    let mut image = None;
    let mut options = NbdOptions {
        image: Image { format: Format::Raw, path: String::new() },
        listen: Vec::new(),
        read_only: false,
        export: String::new(),
        roots: Vec::new(),
        direct: true,
        engine: EngineChoice::Auto,
        log_level: log::LevelFilter::Info,
    };
    while let Some(argument) = parser.next().map_err(|error| usage(&error))? {
        match argument {
            Short('h') | Long("help") => return Ok(None),
            Long("socket") => options.listen.push(Address::Unix(value(parser)?.into())),
            Long("listen") => {
                let text = value(parser)?;
                let address = text.parse().map_err(|_| {
                    Error::new(
                        format!("--listen {text}: no such address"),
                        "ADDRESS:PORT, 127.0.0.1:10809 say",
                    )
                })?;
                options.listen.push(Address::Tcp(address));
            }
            Long("read-only") => options.read_only = true,
            Long("export") => options.export = value(parser)?,
            Long("root") => options.roots.push(value(parser)?.into()),
            Long("cache") => {
                options.direct = match value(parser)?.as_str() {
                    "none" => true,
                    "writeback" => false,
                    other => {
                        let what = format!("--cache {other}: no such mode");
                        return Err(Error::new(what, "none or writeback"));
                    }
                };
            }
            Long("engine") => {
                let text = value(parser)?;
                options.engine =
                    text.parse().map_err(|error| Error::new(format!("--engine: {error}"), ""))?;
            }
            Long("log-level") => {
                let text = value(parser)?;
                options.log_level = text.parse().map_err(|_| {
                    let hint = "error, warn, info, debug or trace";
                    Error::new(format!("--log-level {text}: no such level"), hint)
                })?;
            }
            Long("json") => {}
            Value(text) if image.is_none() => {
                let text = text.string().map_err(|error| usage(&error))?;
                image = Some(named(&text)?);
            }
            other => return Err(usage(&other.unexpected())),
        }
    }
    options.image = image.ok_or_else(|| {
        Error::new("no image given", "raw:PATH, qcow2:PATH or vhd:PATH; see vbdd nbd --help")
    })?;
    if options.listen.is_empty() {
        return Err(Error::new("no place to listen at", "give --socket PATH or --listen ADDRESS:PORT"));
    }
    if options.export.len() > crate::nbd::wire::STRING_BYTES_MAX {
        return Err(Error::new("the name of the export is too long", ""));
    }
    Ok(Some(options))
}

fn value(parser: &mut Parser) -> Result<String, Error> {
    parser.value().and_then(|value| value.string()).map_err(|error| usage(&error))
}

/// An image as it is named on the command line: the format is never guessed; a relative path is one from here.
fn named(text: &str) -> Result<Image, Error> {
    let hint = "the format is never guessed: raw:PATH, qcow2:PATH or vhd:PATH";
    let parts = text.split_once(':').and_then(|(name, path)| Some((Format::of_name(name)?, path)));
    let Some((format, path)) = parts.filter(|(_, path)| !path.is_empty()) else {
        return Err(Error::new(format!("{text} does not name an image"), hint));
    };
    if is_remote(path) {
        ImageAddress::parse(path).map_err(|why| Error::new(format!("{path}: {why}"), ""))?;
        return Ok(Image { format, path: path.to_owned() });
    }
    let path = std::path::absolute(path).map_err(|error| Error::new(format!("{path}: {error}"), ""))?;
    let path = path.into_os_string().into_string();
    let path = path.map_err(|path| Error::new(format!("{} is not UTF-8", path.display()), ""))?;
    Ok(Image { format, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Option<NbdOptions>, String> {
        parse(&mut Parser::from_args(arguments)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_manual_page_names_every_option() {
        let manual = include_str!("../../man/vbdd.8").replace("\\-", "-");
        let options = HELP.lines().filter_map(|line| line.strip_prefix("  --")?.split_whitespace().next());
        for option in options {
            assert!(manual.contains(&format!("--{option}")), "{option}");
        }
    }

    #[test]
    fn options_are_read() {
        let options = parsed(&[
            "qcow2:/a/b.qcow2",
            "--socket",
            "/run/s",
            "--listen",
            "127.0.0.1:10809",
            "--read-only",
            "--cache=writeback",
            "--export",
            "disk",
        ]);
        let options = options.unwrap().unwrap();
        assert_eq!(options.image, Image { format: Format::Qcow2, path: "/a/b.qcow2".into() });
        let tcp = "127.0.0.1:10809".parse().unwrap();
        assert_eq!(options.listen, [Address::Unix("/run/s".into()), Address::Tcp(tcp)]);
        assert_eq!((options.read_only, options.direct, options.export.as_str()), (true, false, "disk"));
        let relative = parsed(&["raw:x.img", "--socket", "s"]).unwrap().unwrap();
        assert_eq!(relative.image.path, std::env::current_dir().unwrap().join("x.img").to_str().unwrap());
        assert_eq!(parsed(&["--help"]), Ok(None));
    }

    #[test]
    fn what_is_missing_or_wrong_is_said() {
        for (arguments, expected) in [
            (vec!["--socket", "s"], "no image given"),
            (vec!["raw:/a"], "no place to listen at"),
            (vec!["/a", "--socket", "s"], "/a does not name an image"),
            (vec!["vmdk:/a", "--socket", "s"], "vmdk:/a does not name an image"),
            (vec!["raw:", "--socket", "s"], "raw: does not name an image"),
            (vec!["raw:/a", "--listen", "here"], "--listen here: no such address"),
            (vec!["raw:/a", "raw:/b"], "unexpected argument"),
        ] {
            let error = parsed(&arguments).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
