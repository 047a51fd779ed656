//! The `vbdd` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    vbdd::cli::run(std::env::args_os().skip(1))
}
