//! Run inside a guest of the Xen machine. Prints what it found as `name=value` words on one line.
//!
//! - `pattern SEED BYTES`: prints pseudo-random bytes that anyone can make again.
//! - `load PATH SHAPE DEPTH REQUESTS [SEED]`: a counted load; SHAPE is randread, randwrite (4 KiB), read or write (128 KiB).
//! - `verify PATH BLOCKS STOP-FILE SECONDS [SEED [PAUSE_MS]]`: writes and checks 4 KiB blocks until STOP-FILE exists.
//! - `hammer PATH THREADS REGION_KIB STOP-FILE SECONDS [SEED [FIRST_REGION]]`: the same from several threads, with all sizes.
//! - `ask TTY LOG SECONDS LOOK_MS COMMAND`: run in dom0; has the agent at the other end of a console run COMMAND.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a command-line tool whose output is its purpose

mod ask;
mod direct;
mod hammer;
mod load;
mod pattern;
mod verify;

use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "usage: vbdd-guest pattern SEED BYTES | load PATH SHAPE DEPTH REQUESTS [SEED] | \
                     verify PATH BLOCKS STOP-FILE SECONDS [SEED [PAUSE_MS]] | \
                     hammer PATH THREADS REGION_KIB STOP-FILE SECONDS [SEED [FIRST_REGION]] | ask TTY LOG SECONDS LOOK_MS COMMAND";

fn word(words: &[String], at: usize) -> Result<&str, String> {
    words.get(at).map(String::as_str).ok_or_else(|| USAGE.to_owned())
}

fn number(words: &[String], at: usize) -> Result<u64, String> {
    let word = word(words, at)?;
    word.parse().map_err(|_| format!("{word:?} is not a number"))
}

fn seed(words: &[String], at: usize) -> Result<u64, String> {
    if words.len() > at { number(words, at) } else { Ok(1) }
}

fn run(words: &[String]) -> Result<u8, String> {
    let line = match word(words, 0)? {
        "pattern" => return pattern::print(number(words, 1)?, number(words, 2)?).map(|()| 0),
        "ask" => {
            let (limit, look) =
                (Duration::from_secs(number(words, 3)?), Duration::from_millis(number(words, 4)?));
            return ask::run(word(words, 1)?, word(words, 2)?, limit, look, word(words, 5)?);
        }
        "load" => {
            let shape = load::Shape::named(word(words, 2)?).ok_or_else(|| USAGE.to_owned())?;
            let depth = usize::try_from(number(words, 3)?).map_err(|e| e.to_string())?;
            load::run(word(words, 1)?, shape, depth, number(words, 4)?, seed(words, 5)?)?
        }
        "verify" => {
            let pause = if words.len() > 6 { number(words, 6)? } else { 0 };
            let (longest, pause) = (Duration::from_secs(number(words, 4)?), Duration::from_millis(pause));
            let limits = verify::Limits { longest, pause };
            verify::run(word(words, 1)?, number(words, 2)?, word(words, 3)?, limits, seed(words, 5)?)?
        }
        "hammer" => {
            let job = hammer::Job {
                path: word(words, 1)?.to_owned(),
                threads: number(words, 2)?,
                region_bytes: number(words, 3)? << 10,
                stop: word(words, 4)?.to_owned(),
                longest: Duration::from_secs(number(words, 5)?),
                seed: seed(words, 6)?,
                first_region: if words.len() > 7 { number(words, 7)? } else { 0 },
            };
            hammer::run(&job)?
        }
        _ => return Err(USAGE.to_owned()),
    };
    println!("{line}");
    Ok(0)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(status) => ExitCode::from(status),
        Err(reason) => {
            eprintln!("vbdd-guest: {reason}");
            ExitCode::FAILURE
        }
    }
}
