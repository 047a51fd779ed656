//! `vbdd serve`.

use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::{Long, Short};
use lexopt::{Parser, ValueExt};
use rings::Abi;

use super::usage;
use crate::error::Error;
use crate::limits::{METADATA_CACHE_MIB, NBD_PATIENCE, XENSTORE_NODES, XENSTORE_WATCHES};
use crate::nbd::client::Allowed;
use crate::storage::engine::EngineChoice;
use crate::vbd::{Config, Place, Terms};

pub(super) const HELP: &str = "\
vbdd serve serves every disk of the given kinds whose backend is this domain.

Usage: vbdd serve --kind KIND --root DIR [OPTIONS]

  --kind KIND           claim backends of this kind: vbd, vbd3 or qdisk; may be given several times
  --root DIR            images must lie below this directory; may be given several times
  --allow-nbd SERVER    images may lie on NBD servers whose sockets are below this directory, or on the one at HOST[:PORT];
                        may be given several times (none)
  --nbd-timeout SECONDS how long requests wait for an NBD server that does not answer; 0 for ever (300)
  --engine ENGINE       auto, uring or aio: how images are read and written (auto)
  --place PLACE         auto, dom0 or driver-domain: who cleans up after an unplug (auto: dom0 if this domain is 0)
  --default-abi ABI     x86_64, x86_32 or arm: for a frontend that does not name its ABI (x86_64)
  --disk-options WORDS  what every disk is served with, as in the node vbdd: in-order, barrier, detect-zeroes,
                        persistent=0, discard=0, max-queues=N, max-ring-page-order=N
  --metadata-cache MIB  memory for metadata of QCOW2 and VHD images, all disks together, 1 to 65536 (32)
  --persistent-grants   offer frontends to keep their pages mapped; slower for vbdd than copying, see docs/performance.md
  --export-dir DIR      let NBD clients read the open disks, through the socket DIR/nbd that only its owner may use
  --state-dir DIR       where live rings are written down for the next vbdd (/run/vbdd)
  --assume-clean        take over rings that no journal tells of, as the last vbdd was stopped with SIGTERM
  --xenstore-nodes N    this domain's quota of nodes, if it was raised: how many disks fit is said at the start (1000)
  --xenstore-watches N  this domain's quota of watches, likewise (128)
  --xenstore PATH       the socket or device of xenstore (found by itself)
  --log-level LEVEL     error, warn, info, debug or trace (info); RUST_LOG overrides it
  --json                errors on standard error as JSON
  -h, --help            this text

SIGTERM or SIGINT: finishes the requests in flight, makes all data durable, and exits with the guests' rings as they
are. The next vbdd serve takes them over; guests see a pause. SIGUSR1: writes the status of all disks to the log.
";

/// Where this process runs, as far as cleaning up goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaceOption {
    /// Dom0 if the domain's number is 0.
    Auto,
    /// The toolstack removes the nodes.
    Dom0,
    /// The backend removes its nodes after an unplug.
    DriverDomain,
}

/// The options of `vbdd serve`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// Kinds to claim, without repetition.
    pub kinds: Vec<String>,
    /// Directories that images must lie below.
    pub roots: Vec<PathBuf>,
    /// NBD servers that images may lie on.
    pub servers: Vec<Allowed>,
    /// How long requests wait for one that does not answer; for ever if there is none.
    pub server_patience: Option<Duration>,
    /// How images are read and written.
    pub engine: EngineChoice,
    /// Who cleans up.
    pub place: PlaceOption,
    /// For frontends that name none.
    pub default_abi: Abi,
    /// What every disk is served with, in the words of the node `vbdd`.
    pub disk_options: String,
    /// Memory for metadata of images with a format, in MiB.
    pub metadata_cache_mib: u32,
    /// Frontends are offered to keep their pages granted.
    pub persistent_grants: bool,
    /// Where NBD clients come in, if they may.
    pub export_dir: Option<PathBuf>,
    /// Where the journals of live rings are.
    pub state_dir: PathBuf,
    /// Rings without a journal were left with everything answered.
    pub assume_clean: bool,
    /// The domain's quotas in xenstore, as far as known: nodes and watches.
    pub quotas: (u32, u32),
    /// The socket or device, where it is not to be found automatically.
    pub xenstore: Option<PathBuf>,
    /// The level of the log.
    pub log_level: log::LevelFilter,
}

impl ServeOptions {
    /// What disks are served with whose directories say nothing of it.
    #[must_use]
    pub fn terms(&self, usual: Terms) -> Terms {
        let usual = Terms { default_abi: self.default_abi, ..usual };
        // They were checked when they were read.
        usual.with(&self.disk_options).unwrap_or(usual)
    }
}

/// Reads the options; `None` if help was asked for.
pub(super) fn parse(parser: &mut Parser) -> Result<Option<ServeOptions>, Error> {
    let mut options = ServeOptions {
        kinds: Vec::new(),
        roots: Vec::new(),
        servers: Vec::new(),
        server_patience: Some(NBD_PATIENCE),
        engine: EngineChoice::Auto,
        place: PlaceOption::Auto,
        default_abi: Abi::X86_64,
        disk_options: String::new(),
        metadata_cache_mib: METADATA_CACHE_MIB,
        persistent_grants: false,
        export_dir: None,
        state_dir: PathBuf::from("/run/vbdd"),
        assume_clean: false,
        quotas: (XENSTORE_NODES, XENSTORE_WATCHES),
        xenstore: None,
        log_level: log::LevelFilter::Info,
    };
    while let Some(argument) = parser.next().map_err(|error| usage(&error))? {
        match argument {
            Short('h') | Long("help") => return Ok(None),
            Long("kind") => {
                let kind = one_of(parser, "--kind", &[("vbd", "vbd"), ("vbd3", "vbd3"), ("qdisk", "qdisk")])?;
                if !options.kinds.iter().any(|known| known == kind) {
                    options.kinds.push(kind.to_owned());
                }
            }
            Long("root") => options.roots.push(path(parser)?),
            Long("allow-nbd") => {
                let server = value(parser)?.parse();
                let hint = "the directory that its socket is in, or HOST[:PORT]";
                options.servers.push(server.map_err(|why| Error::new(format!("--allow-nbd: {why}"), hint))?);
            }
            Long("nbd-timeout") => {
                let seconds = number(parser, "--nbd-timeout")?;
                options.server_patience = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
            }
            Long("engine") => {
                let engines = [
                    ("auto", EngineChoice::Auto),
                    ("uring", EngineChoice::Uring),
                    ("aio", EngineChoice::Aio),
                ];
                options.engine = one_of(parser, "--engine", &engines)?;
            }
            Long("place") => {
                options.place = one_of(
                    parser,
                    "--place",
                    &[
                        ("auto", PlaceOption::Auto),
                        ("dom0", PlaceOption::Dom0),
                        ("driver-domain", PlaceOption::DriverDomain),
                    ],
                )?;
            }
            Long("default-abi") => {
                let abis = [("x86_64", Abi::X86_64), ("x86_32", Abi::X86_32), ("arm", Abi::Arm)];
                options.default_abi = one_of(parser, "--default-abi", &abis)?;
            }
            Long("disk-options") => {
                options.disk_options = value(parser)?;
                let usual = Config::new(0, Place::Dom0).terms;
                usual.with(&options.disk_options).map_err(|error| {
                    Error::new(format!("--disk-options says {error}"), "see docs/xenstore.md")
                })?;
            }
            Long("export-dir") => options.export_dir = Some(path(parser)?),
            Long("state-dir") => options.state_dir = path(parser)?,
            Long("metadata-cache") => {
                options.metadata_cache_mib = number(parser, "--metadata-cache")?;
                if !(1..=65536).contains(&options.metadata_cache_mib) {
                    let what = format!("--metadata-cache {}: out of range", options.metadata_cache_mib);
                    return Err(Error::new(what, "1 to 65536 MiB"));
                }
            }
            Long("persistent-grants") => options.persistent_grants = true,
            Long("assume-clean") => options.assume_clean = true,
            Long("xenstore-nodes") => options.quotas.0 = number(parser, "--xenstore-nodes")?,
            Long("xenstore-watches") => options.quotas.1 = number(parser, "--xenstore-watches")?,
            Long("xenstore") => options.xenstore = Some(path(parser)?),
            Long("log-level") => {
                let text = value(parser)?;
                options.log_level = text.parse().map_err(|_| {
                    Error::new(
                        format!("--log-level {text}: no such level"),
                        "error, warn, info, debug or trace",
                    )
                })?;
            }
            Long("json") => {}
            other => return Err(usage(&other.unexpected())),
        }
    }
    if options.kinds.is_empty() {
        return Err(Error::new(
            "no --kind given: nothing to serve",
            "give --kind vbd, --kind vbd3 or --kind qdisk",
        ));
    }
    if options.roots.is_empty() && options.servers.is_empty() {
        let hint = "give --root DIR, the directory that the images are in";
        return Err(Error::new("no --root given: no image could be opened", hint));
    }
    Ok(Some(options))
}

fn value(parser: &mut Parser) -> Result<String, Error> {
    parser.value().and_then(|value| value.string()).map_err(|error| usage(&error))
}

fn number(parser: &mut Parser, option: &str) -> Result<u32, Error> {
    let text = value(parser)?;
    text.parse().map_err(|_| Error::new(format!("{option} {text}: no number"), "a whole number"))
}

fn path(parser: &mut Parser) -> Result<PathBuf, Error> {
    parser.value().map(PathBuf::from).map_err(|error| usage(&error))
}

fn one_of<T: Copy>(parser: &mut Parser, option: &str, choices: &[(&str, T)]) -> Result<T, Error> {
    let text = value(parser)?;
    choices.iter().find(|(name, _)| *name == text).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        Error::new(format!("{option} {text}: no such choice"), format!("one of {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Option<ServeOptions>, String> {
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
            "--kind",
            "vbd",
            "--kind=qdisk",
            "--kind",
            "vbd",
            "--root",
            "/srv/a",
            "--root=/srv/b",
            "--engine",
            "aio",
            "--place",
            "driver-domain",
            "--default-abi",
            "x86_32",
            "--disk-options",
            "max-queues=2,in-order",
            "--allow-nbd",
            "/run/nbd",
            "--allow-nbd=Store:7",
            "--nbd-timeout",
            "0",
            "--log-level",
            "debug",
        ]);
        let options = options.unwrap().unwrap();
        let host = Allowed::Host { host: "store".into(), port: 7 };
        assert_eq!(options.servers, [Allowed::Sockets(PathBuf::from("/run/nbd")), host]);
        assert_eq!(options.server_patience, None);
        assert_eq!(options.kinds, ["vbd", "qdisk"]);
        assert_eq!(options.roots, [PathBuf::from("/srv/a"), PathBuf::from("/srv/b")]);
        assert_eq!((options.engine, options.place), (EngineChoice::Aio, PlaceOption::DriverDomain));
        assert_eq!((options.default_abi, options.log_level), (Abi::X86_32, log::LevelFilter::Debug));
        let terms = options.terms(Config::new(0, Place::Dom0).terms);
        assert_eq!((terms.default_abi, terms.offered.queues_max, terms.in_order), (Abi::X86_32, 2, true));
        assert_eq!(parsed(&["--help"]), Ok(None));
        let refused = parsed(&["--disk-options", "in-ordr"]).unwrap_err();
        assert!(refused.contains("\"in-ordr\", which is no option: in-order"), "{refused}");
    }

    #[test]
    fn mistakes_are_named_with_the_choices() {
        let root = ["--root", "/srv"];
        for (arguments, expected) in [
            (vec![], "no --kind given: nothing to serve (give --kind vbd, --kind vbd3 or --kind qdisk)"),
            (vec!["--kind", "vif"], "--kind vif: no such choice (one of vbd, vbd3, qdisk)"),
            (
                vec!["--kind", "vbd", "--engine", "fast"],
                "--engine fast: no such choice (one of auto, uring, aio)",
            ),
            (
                vec!["--allow-nbd", "nbd://store"],
                "--allow-nbd: \"nbd://store\" is neither a directory nor HOST[:PORT]: the port is no number from 1 to 65535 (the directory that its socket is in, or HOST[:PORT])",
            ),
            (
                vec!["--log-level", "loud"],
                "--log-level loud: no such level (error, warn, info, debug or trace)",
            ),
            (vec!["--kind"], "missing argument for option '--kind' (see vbdd --help)"),
        ] {
            assert_eq!(parsed(&[&root[..], &arguments].concat()), Err(expected.to_owned()));
        }
        let expected = "no --root given: no image could be opened (give --root DIR, the directory that the images are in)";
        assert_eq!(parsed(&["--kind", "vbd"]), Err(expected.to_owned()));
    }
}
