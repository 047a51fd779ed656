//! `vbdd status` and `vbdd resize`: the control door from the other side.

use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::{Long, Short, Value};
use smol::future;
use smol::io::{AsyncReadExt, AsyncWriteExt};
use smol::net::unix::UnixStream;

use crate::cli;
use crate::error::Error;

/// The help of `vbdd status`.
pub const HELP: &str = "\
vbdd status shows what a running vbdd serves.

Usage: vbdd status [OPTIONS]

  --state-dir DIR    the state directory that it was started with (/run/vbdd)
  --json             the answer as JSON, one line
  -h, --help         this text
";

/// How long to wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The help of `vbdd resize`.
pub const RESIZE_HELP: &str = "\
vbdd resize looks at the size of a disk's image again and tells the guest if it has changed.

Usage: vbdd resize KIND/GUEST/DEVID [OPTIONS]

  --state-dir DIR    the state directory that vbdd serve was started with (/run/vbdd)
  --json             errors as JSON, as the answer always is
  -h, --help         this text

Grow the file or the device first. Without this command a change is seen within 10 seconds of any activity.
";

/// Runs `vbdd status`.
pub(crate) fn status(parser: &mut lexopt::Parser) -> Result<(), Error> {
    let mut directory = PathBuf::from("/run/vbdd");
    let mut json = false;
    while let Some(argument) = parser.next().map_err(|error| cli::usage(&error))? {
        match argument {
            Short('h') | Long("help") => return cli::print(HELP),
            Long("json") => json = true,
            Long("state-dir") => directory = parser.value().map_err(|error| cli::usage(&error))?.into(),
            other => return Err(cli::usage(&other.unexpected())),
        }
    }
    let command = if json { "status json\n" } else { "status\n" };
    cli::print(&answer_to(&directory, command)?)
}

/// Runs `vbdd resize`.
pub(crate) fn resize(parser: &mut lexopt::Parser) -> Result<(), Error> {
    let mut directory = PathBuf::from("/run/vbdd");
    let mut disk = None;
    while let Some(argument) = parser.next().map_err(|error| cli::usage(&error))? {
        match argument {
            Short('h') | Long("help") => return cli::print(RESIZE_HELP),
            Long("json") => {}
            Long("state-dir") => directory = parser.value().map_err(|error| cli::usage(&error))?.into(),
            Value(word) if disk.is_none() => disk = word.into_string().ok(),
            other => return Err(cli::usage(&other.unexpected())),
        }
    }
    let disk = disk.filter(|word| !word.is_empty() && !word.contains(char::is_whitespace));
    let disk = disk
        .ok_or_else(|| Error::new("which disk?", "vbdd resize KIND/GUEST/DEVID; vbdd status names them"))?;
    let answer = answer_to(&directory, &format!("resize {disk}\n"))?;
    if answer.starts_with("{\"error\"") {
        return Err(Error::new(format!("{disk}: {}", answer.trim_end()), ""));
    }
    cli::print(&answer)
}

fn answer_to(directory: &std::path::Path, command: &str) -> Result<String, Error> {
    let path = directory.join(super::SOCKET_NAME);
    let answer = smol::block_on(future::or(ask(&path, command), async {
        smol::Timer::after(PATIENCE).await;
        Err(std::io::ErrorKind::TimedOut.into())
    }));
    answer.map_err(|error| {
        let hint = "is vbdd serve running, with this --state-dir?";
        Error::new(format!("no answer from {}: {error}", path.display()), hint)
    })
}

async fn ask(path: &std::path::Path, command: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(path).await?;
    stream.write_all(command.as_bytes()).await?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}
