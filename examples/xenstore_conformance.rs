//! Checks that a xenstored behaves as vbdd relies on it: `xenstore_conformance [--socket PATH]`.
//!
//! Without an option it uses what vbdd would use: the socket in domain 0, the kernel's device elsewhere. It works below
//! `/local/domain/<own>/data/` and removes what it made. Exit code 0: all is well; 1: a check failed; 2: nothing to check.
// A program for the terminal.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../tests/world/xenstore/conformance/mod.rs"]
pub mod conformance;

use std::path::PathBuf;
use std::process::ExitCode;

use conformance::Verdict;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let mut place = None;
    while let Some(argument) = arguments.next() {
        match (argument.to_str(), arguments.next()) {
            (Some("--socket"), Some(path)) => place = Some(PathBuf::from(path)),
            _ => {
                eprintln!("usage: xenstore_conformance [--socket PATH]");
                return ExitCode::from(2);
            }
        }
    }
    let mut number = 0;
    let lines = conformance::run(place.as_deref(), |line| {
        number += 1;
        match &line.result {
            Ok(Verdict::Good) => println!("ok {number} {}", line.name),
            Ok(Verdict::Skipped(why)) => println!("ok {number} {} # skipped: {why}", line.name),
            Err(why) => println!("FAIL {number} {}: {why}", line.name),
        }
    });
    let lines = match lines {
        Ok(lines) => lines,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let failed = lines.iter().filter(|line| line.result.is_err()).count();
    let skipped = lines.iter().filter(|line| matches!(line.result, Ok(Verdict::Skipped(_)))).count();
    println!(
        "{} checks: {} passed, {skipped} skipped, {failed} failed",
        lines.len(),
        lines.len() - failed - skipped
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
