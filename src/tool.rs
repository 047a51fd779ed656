//! `vbdd image`: images that nobody serves, made, looked at, mended and moved.
//!
//! Everything here runs with the operator's own rights and blocks as it likes; no daemon is needed. `docs/image-tool.md` is the manual,
//! `words` reads command lines, `layers` says where a chain's bytes lie, `drive` changes disks, `read` reads much at once,
//! `target` makes files that are whole or not there.

mod bench;
mod check;
mod compare;
mod convert;
mod create;
mod drive;
mod file;
mod guess;
mod info;
mod json;
mod layers;
mod map;
mod out;
mod read;
mod rebase;
mod resize;
mod scan;
mod snapshot;
mod target;
mod words;

use formats::{Failure, Unsupported};
use lexopt::{Arg, Parser};

use crate::cli::print;
use crate::error::Error;
use crate::params::Image;
use crate::storage::OpenError;

use file::ImageFile;
use words::{Options, Words};

/// The text of `vbdd image --help`.
pub const HELP: &str = "\
vbdd image makes, shows, checks, changes and moves disk images: raw, QCOW2 and VHD.

Usage: vbdd image COMMAND [OPTIONS] FORMAT:PATH...

Commands:
  create    make an image
  info      what an image says about itself
  map       where the bytes of its disk lie
  check     look for damage, and repair it
  resize    another size
  snapshot  internal snapshots of a QCOW2 image, or a new leaf over an image
  rebase    another parent
  convert   copy a disk into another image
  compare   whether two disks hold the same
  bench     how fast a disk is read or written
  scan      all images of a directory, as a tree
  hide      mark an image as one that only serves as a parent

Formats are raw, qcow2 and vhd, said as FORMAT:PATH or with -f; they are never guessed. vbdd image COMMAND --help
tells more. Everywhere: --json for machines, -q without a progress bar. Manual: vbdd-image(1).
";

/// Why a command ended, and the exit code that says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// For the operator.
    pub error: Error,
    /// For scripts: 1, unless the command's manual says otherwise.
    pub code: u8,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed { error, code: 1 }
    }
}

impl Failed {
    /// The same with another exit code.
    fn with_code(self, code: u8) -> Failed {
        Failed { code, ..self }
    }
}

/// One of the commands.
struct Command {
    name: &'static str,
    help: &'static str,
    options: Options,
    run: fn(&Words) -> Result<u8, Failed>,
}

const COMMANDS: [Command; 12] = [
    create::COMMAND,
    info::COMMAND,
    map::COMMAND,
    check::COMMAND,
    resize::COMMAND,
    snapshot::COMMAND,
    rebase::COMMAND,
    convert::COMMAND,
    compare::COMMAND,
    bench::COMMAND,
    scan::COMMAND,
    scan::HIDE,
];

/// Runs what follows `vbdd image` on the command line. Returns the exit code.
///
/// # Errors
/// What went wrong.
pub fn run(parser: &mut Parser) -> Result<u8, Failed> {
    let name = match parser.next().map_err(|error| words::misuse(error.to_string(), ""))? {
        None | Some(Arg::Short('h') | Arg::Long("help")) => None,
        Some(Arg::Value(name)) => Some(name.to_string_lossy().into_owned()),
        Some(other) => return Err(words::misuse(other.unexpected().to_string(), "")),
    };
    let Some(name) = name else {
        print(HELP)?;
        return Ok(0);
    };
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        return Err(Error::new(format!("there is no command image {name}"), "see vbdd image --help").into());
    };
    let words = Words::parse(parser, command.name, command.options)?;
    if words.help {
        print(command.help)?;
        return Ok(0);
    }
    (command.run)(&words)
}

/// The help of one command, or of all.
#[must_use]
pub fn help(name: Option<&str>) -> &'static str {
    let found = COMMANDS.iter().find(|command| Some(command.name) == name);
    found.map_or(HELP, |command| command.help)
}

/// What is wrong with an image, and what to do.
fn trouble(image: &Image, file: &ImageFile, why: &Unsupported) -> Failed {
    let what = match (why, file.trouble()) {
        (Unsupported::Io(_), Some(trouble)) => format!("{}: {trouble}", image.path),
        (Unsupported::Malformed(what), _) => format!("{}: damaged: {what}", image.path),
        _ => format!("{}: {why}", image.path),
    };
    let hint = match why {
        Unsupported::Malformed(_) => match guess::looks_like(&file.file()) {
            Some(name) if name != image.format.name() => {
                format!("it looks like {name} and not like {}: was -f right?", image.format.name())
            }
            _ => String::new(),
        },
        _ => String::new(),
    };
    Error::new(what, hint).into()
}

/// What a disk said.
fn failure(image: &Image, file: &ImageFile, why: Failure) -> Failed {
    let what = match (why, file.trouble()) {
        (Failure::Io(_) | Failure::NoSpace, Some(trouble)) => format!("{}: {trouble}", image.path),
        _ => format!("{}: {why}", image.path),
    };
    let hint = match why {
        Failure::NoSpace => "make room, and try again",
        Failure::Corrupt(_) => "see what vbdd image check says of it",
        _ => "",
    };
    Error::new(what, hint).into()
}

/// Why a chain was not opened.
fn opening(error: OpenError, image: &Image) -> Failed {
    let file = std::fs::metadata(&image.path).ok().filter(std::fs::Metadata::is_file);
    let file = file.and_then(|_| std::fs::File::open(&image.path).ok());
    let found = file.and_then(|file| guess::looks_like(&file)).filter(|name| *name != image.format.name());
    let hint = match found {
        Some(name) if error.path == image.path && image.format != crate::params::Format::Raw => {
            format!("it looks like {name} and not like {}: was -f right?", image.format.name())
        }
        _ => String::new(),
    };
    Error::new(error.to_string(), hint).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_its_help_and_every_option_stands_in_it() {
        let manual = include_str!("../man/vbdd-image.1").replace("\\-", "-");
        for command in &COMMANDS {
            assert!(HELP.contains(&format!("\n  {} ", command.name)), "{}", command.name);
            assert!(command.help.starts_with(&format!("vbdd image {} ", command.name)), "{}", command.name);
            assert!(manual.contains(&format!(".SS {}", command.name)), "{}", command.name);
            for option in command.options.values.iter().chain(command.options.flags) {
                let option = if option.len() == 1 { format!("-{option}") } else { format!("--{option}") };
                assert!(command.help.contains(&format!(" {option}")), "{}: {option}", command.name);
                assert!(manual.contains(&option), "{}: {option} is not in the manual", command.name);
            }
        }
    }
}
