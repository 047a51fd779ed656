//! The command line.

pub mod nbd;
pub mod serve;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use crate::error::Error;
use crate::tool::{self, Failed};

const HELP: &str = "\
vbdd serves the virtual disks of Xen guests from images.

Usage: vbdd COMMAND [OPTIONS]

Commands:
  serve     serve every disk that appears in xenstore, until SIGTERM
  nbd       serve one image to NBD clients
  status    show what a running vbdd serves
  resize    tell a guest that its disk's image has grown
  image     make, show, check, change and move images
  help      this text, or that of a command

Options:
  -h, --help       this text
  -V, --version    the version

vbdd COMMAND --help tells more. Manual: vbdd(8), vbdd-image(1).
";

/// Runs the command that `arguments` (without the program's name) ask for.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let json = arguments.iter().any(|argument| argument == "--json");
    match command(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(Failed { error, code }) => {
            let text = if json { error_json(&error) } else { format!("vbdd: {error}") };
            let _ = writeln!(std::io::stderr(), "{text}");
            ExitCode::from(code)
        }
    }
}

fn command(arguments: Vec<OsString>) -> Result<u8, Failed> {
    if arguments.first().is_some_and(|name| name == "image") {
        return tool::run(&mut lexopt::Parser::from_args(arguments.into_iter().skip(1)));
    }
    daemon_command(arguments)?;
    Ok(0)
}

fn daemon_command(arguments: Vec<OsString>) -> Result<(), Error> {
    use lexopt::prelude::{Long, Short, Value};
    let mut parser = lexopt::Parser::from_args(arguments);
    match parser.next().map_err(|error| usage(&error))? {
        None | Some(Short('h') | Long("help")) => print(HELP),
        Some(Short('V') | Long("version")) => print(concat!("vbdd ", env!("CARGO_PKG_VERSION"), "\n")),
        Some(Value(name)) => match name.to_str() {
            Some("serve") => match serve::parse(&mut parser)? {
                Some(options) => crate::daemon::serve(&options),
                None => print(serve::HELP),
            },
            Some("nbd") => match nbd::parse(&mut parser)? {
                Some(options) => crate::nbd::process::run(&options),
                None => print(nbd::HELP),
            },
            Some("status") => crate::control::client::status(&mut parser),
            Some("resize") => crate::control::client::resize(&mut parser),
            Some("help") => help_of(&mut parser),
            _ => Err(Error::new(format!("there is no command {}", name.display()), "see vbdd --help")),
        },
        Some(other) => Err(usage(&other.unexpected())),
    }
}

fn help_of(parser: &mut lexopt::Parser) -> Result<(), Error> {
    use lexopt::prelude::Value;
    match parser.next().map_err(|error| usage(&error))? {
        Some(Value(name)) if name == "serve" => print(serve::HELP),
        Some(Value(name)) if name == "nbd" => print(nbd::HELP),
        Some(Value(name)) if name == "status" => print(crate::control::client::HELP),
        Some(Value(name)) if name == "resize" => print(crate::control::client::RESIZE_HELP),
        Some(Value(name)) if name == "image" => {
            let command = parser.next().map_err(|error| usage(&error))?;
            let command = if let Some(Value(name)) = command { name.into_string().ok() } else { None };
            print(tool::help(command.as_deref()))
        }
        _ => print(HELP),
    }
}

/// Writes to standard output. A reader that has gone away is no error.
///
/// # Errors
/// When standard output cannot be written for another reason.
pub fn print(text: &str) -> Result<(), Error> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(format!("cannot write to standard output: {error}"), ""))
        }
        _ => Ok(()),
    }
}

/// A mistake on the command line.
pub(crate) fn usage(error: &lexopt::Error) -> Error {
    Error::new(error.to_string(), "see vbdd --help")
}

fn error_json(error: &Error) -> String {
    let mut text = String::from("{\"error\":");
    json_string(&error.what, &mut text);
    text.push_str(",\"hint\":");
    json_string(&error.hint, &mut text);
    text.push('}');
    text
}

/// Appends `value` as a JSON string.
pub fn json_string(value: &str, into: &mut String) {
    into.push('"');
    for character in value.chars() {
        match character {
            '"' | '\\' => {
                into.push('\\');
                into.push(character);
            }
            '\n' => into.push_str("\\n"),
            '\u{0}'..='\u{1f}' | '\u{7f}' => into.push_str(&format!("\\u{:04x}", u32::from(character))),
            _ => into.push(character),
        }
    }
    into.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_strings_are_escaped() {
        let mut text = String::new();
        json_string("a\"b\\c\n\u{1}é", &mut text);
        assert_eq!(text, "\"a\\\"b\\\\c\\n\\u0001é\"");
    }

    #[test]
    fn unknown_commands_and_options_say_where_to_look() {
        for (arguments, expected) in [
            (vec!["srve"], "there is no command srve (see vbdd --help)"),
            (vec!["--frob"], "invalid option '--frob' (see vbdd --help)"),
            (vec!["serve", "--frob"], "invalid option '--frob' (see vbdd --help)"),
        ] {
            let arguments = arguments.into_iter().map(OsString::from).collect();
            assert_eq!(command(arguments).unwrap_err().error.to_string(), expected);
        }
    }
}
