//! Run inside a guest of the Xen machine. Prints what it measured as `name=value` words on one line.
//!
//! - `pattern SEED BYTES`: prints pseudo-random bytes that anyone can make again.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a command-line tool whose output is its purpose

mod pattern;

use std::process::ExitCode;

fn number(words: &[String], at: usize) -> Result<u64, String> {
    let word = words.get(at).ok_or(format!("argument {at} is missing"))?;
    word.parse().map_err(|_| format!("{word:?} is not a number"))
}

fn run(words: &[String]) -> Result<(), String> {
    match words.first().map(String::as_str) {
        Some("pattern") => pattern::print(number(words, 1)?, number(words, 2)?),
        _ => Err("usage: vbdd-guest pattern SEED BYTES".to_owned()),
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("vbdd-guest: {reason}");
            ExitCode::FAILURE
        }
    }
}
