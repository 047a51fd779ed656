//! `vbdd status`: the control door from the other side.

use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::{Long, Short};
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

/// Runs `vbdd status`.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<(), Error> {
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
    let path = directory.join(super::SOCKET_NAME);
    let command = if json { "status json\n" } else { "status\n" };
    let answer = smol::block_on(future::or(ask(&path, command), async {
        smol::Timer::after(PATIENCE).await;
        Err(std::io::ErrorKind::TimedOut.into())
    }));
    let answer = answer.map_err(|error| {
        let hint = "is vbdd serve running, with this --state-dir?";
        Error::new(format!("no answer from {}: {error}", path.display()), hint)
    })?;
    cli::print(&answer)
}

async fn ask(path: &std::path::Path, command: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(path).await?;
    stream.write_all(command.as_bytes()).await?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}
