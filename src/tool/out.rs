//! What operators see: standard output, remarks, progress.

use std::io::{BufWriter, ErrorKind, IsTerminal, StdoutLock, Write};
use std::time::{Duration, Instant};

use super::Failed;
use crate::error::Error;

/// Standard output for much text. A reader that goes away ends the program, without a word.
#[derive(Debug)]
pub(super) struct Out(BufWriter<StdoutLock<'static>>);

fn outcome(result: std::io::Result<()>) -> Result<(), Failed> {
    match result {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Error::new(format!("cannot write to standard output: {error}"), "").into()),
        Ok(()) => Ok(()),
    }
}

impl Out {
    /// Takes standard output.
    #[must_use]
    pub(super) fn new() -> Out {
        Out(BufWriter::with_capacity(64 << 10, std::io::stdout().lock()))
    }

    /// Writes.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn text(&mut self, text: &str) -> Result<(), Failed> {
        outcome(self.0.write_all(text.as_bytes()))
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn end(mut self) -> Result<(), Failed> {
        outcome(self.0.flush())
    }
}

/// Says something on standard error that is no failure.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "vbdd: {text}");
}

/// How often the bar moves, and how long a command must take to have one.
const INTERVAL: Duration = Duration::from_millis(200);

/// A bar on standard error, if that is a terminal.
#[derive(Debug)]
pub(super) struct Progress {
    shown: bool,
    total: u64,
    started: Instant,
    drawn: Option<Instant>,
    what: &'static str,
}

impl Progress {
    /// Of `total` bytes, nothing is done.
    #[must_use]
    pub(super) fn new(what: &'static str, total: u64, quiet: bool) -> Progress {
        let shown = !quiet && std::io::stderr().is_terminal();
        Progress { shown, total, started: Instant::now(), drawn: None, what }
    }

    /// So many bytes are done.
    pub(super) fn done(&mut self, bytes: u64) {
        if !self.shown || self.drawn.unwrap_or(self.started).elapsed() < INTERVAL {
            return;
        }
        self.drawn = Some(Instant::now());
        let permille =
            (u128::from(bytes) * 1000).checked_div(u128::from(self.total)).unwrap_or(1000).min(1000);
        let full = usize::try_from(permille / 25).unwrap_or(0);
        let seconds = self.started.elapsed().as_secs_f64();
        let rest = self.started.elapsed().as_millis() * (1000 - permille);
        let left = rest.checked_div(permille * 1000).unwrap_or(0);
        let text = format!(
            "\r{} [{:=<full$}{:full2$}] {:3}.{} % {seconds:.0} s, {left} s to go\x1b[K",
            self.what,
            "",
            "",
            permille / 10,
            permille % 10,
            full2 = 40 - full
        );
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = std::io::stderr().write_all(b"\r\x1b[K");
        }
    }
}

/// A size as people read it.
#[must_use]
pub(super) fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let power = bytes.max(1).ilog2() / 10;
    let unit = usize::try_from(power).ok().and_then(|power| units.get(power)).copied().unwrap_or("");
    let tenths = (u128::from(bytes) * 10 + ((1_u128 << (power * 10)) >> 1)) >> (power * 10);
    if power == 0 || tenths.is_multiple_of(10) {
        return format!("{} {unit}", tenths / 10);
    }
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_rounded_to_a_tenth() {
        for (bytes, text) in
            [(0, "0 B"), (512, "512 B"), (1 << 20, "1 MiB"), (1_600_000, "1.5 MiB"), (u64::MAX, "16 EiB")]
        {
            assert_eq!(super::human(bytes), text);
        }
    }
}
