//! Run in dom0: has a guest's agent run a command over the console, and waits for its answer.
//!
//! The agent (`domains/common/agent`) reads lines `ID COMMAND` and answers with `ID| line of output` and `ID= STATUS`.
//! A program and not a shell loop, because a shell that waits forks, and forks are what an emulated machine does worst.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

/// The longest line that is kept; an agent's lines are far shorter.
const LINE_BYTES_MAX: usize = 16_384;

/// What a line of the console means to the one who asked.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Output(&'a str),
    Status(u8),
    Other,
}

fn read_line<'a>(id: &str, line: &'a str) -> Line<'a> {
    // A kernel message that was cut short may stand before the agent's words.
    let Some(rest) = line.find(id).map(|at| &line[at + id.len()..]) else { return Line::Other };
    if let Some(text) = rest.strip_prefix('|') {
        return Line::Output(text.strip_prefix(' ').unwrap_or(text));
    }
    rest.strip_prefix("= ").and_then(|word| word.trim().parse().ok()).map_or(Line::Other, Line::Status)
}

/// Sends `command` through `tty`, prints the answer that appears in `log`, and returns the command's exit status;
/// 124 when there was none within `limit`.
///
/// # Errors
/// When the console cannot be used.
pub(crate) fn run(
    tty: &str,
    log: &str,
    limit: Duration,
    look: Duration,
    command: &str,
) -> Result<u8, String> {
    let id = format!("c{}", std::process::id());
    let mut log = File::open(log).map_err(|e| format!("{log}: {e}"))?;
    log.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    let mut tty = OpenOptions::new().write(true).open(tty).map_err(|e| format!("{tty}: {e}"))?;
    tty.write_all(format!("{id} {command}\n").as_bytes()).map_err(|e| e.to_string())?;
    let end = Instant::now() + limit;
    let mut pending = Vec::new();
    let mut chunk = [0u8; 4096];
    loop {
        let count = log.read(&mut chunk).map_err(|e| e.to_string())?;
        if count == 0 {
            if Instant::now() >= end {
                return Ok(124);
            }
            std::thread::sleep(look);
            continue;
        }
        for byte in &chunk[..count] {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&pending).replace('\r', "");
                match read_line(&id, &line) {
                    Line::Output(text) => println!("{text}"),
                    Line::Status(status) => return Ok(status),
                    Line::Other => {}
                }
                pending.clear();
            } else if pending.len() < LINE_BYTES_MAX {
                pending.push(*byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_asker_s_own_lines_count() {
        assert_eq!(read_line("c7", "c7| hello"), Line::Output("hello"));
        assert_eq!(read_line("c7", "c7| "), Line::Output(""));
        assert_eq!(read_line("c7", "c7= 3"), Line::Status(3));
        assert_eq!(read_line("c7", "[  1.0] xvdb: c7= 0"), Line::Status(0));
        assert_eq!(read_line("c7", "c8= 0"), Line::Other);
        assert_eq!(read_line("c7", "c71= 0"), Line::Other);
        assert_eq!(read_line("c7", "agent ready"), Line::Other);
    }

    #[test]
    fn an_answer_ends_the_wait_and_silence_does_too() {
        let name = |what: &str| {
            std::env::temp_dir().join(format!("vbdd-ask-{what}-{}", std::process::id())).display().to_string()
        };
        let (tty, log) = (name("tty"), name("log"));
        std::fs::write(&tty, "").unwrap();
        std::fs::write(&log, format!("c{}= 9\n", std::process::id())).unwrap();
        let ask = |limit| run(&tty, &log, Duration::from_millis(limit), Duration::from_millis(1), "true");
        // What stands in the log already is no answer.
        assert_eq!(ask(20), Ok(124));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                let mut log = OpenOptions::new().append(true).open(&log).unwrap();
                writeln!(log, "c{0}| a word\r\nc{0}= 5\r", std::process::id()).unwrap();
            });
            assert_eq!(ask(20_000), Ok(5));
        });
        std::fs::remove_file(tty).unwrap();
        std::fs::remove_file(log).unwrap();
    }
}
