//! Words of a command line: options, images, sizes.

use lexopt::{Arg, Parser};

use super::Failed;
use crate::error::Error;
use crate::params::{Format, Image};

/// What options a command has, by their names: one letter is `-f`, more are `--repair`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    /// Those with a value.
    pub(super) values: &'static [&'static str],
    /// Those without.
    pub(super) flags: &'static [&'static str],
}

/// Spellings that mean the same: the name by which a command asks comes second.
const SAME: [(&str, &str); 7] = [
    ("force-share", "U"),
    ("quiet", "q"),
    ("format", "f"),
    ("r", "repair"),
    ("object-format", "O"),
    ("strict", "s"),
    ("progress", "p"),
];

/// A command line, taken apart.
#[derive(Debug, Default)]
pub(super) struct Words {
    options: Vec<(String, String)>,
    /// What is no option.
    pub(super) arguments: Vec<String>,
    /// `--help` was among them.
    pub(super) help: bool,
}

/// A mistake on the command line.
#[must_use]
pub(super) fn misuse(what: impl Into<String>, command: &str) -> Failed {
    Error::new(what, format!("see vbdd image {command} --help")).into()
}

impl Words {
    /// Reads the rest of a command line.
    ///
    /// # Errors
    /// Options that the command does not have, and text that is no UTF-8.
    pub(super) fn parse(parser: &mut Parser, command: &str, options: Options) -> Result<Words, Failed> {
        let mut words = Words::default();
        while let Some(argument) = parser.next().map_err(|error| misuse(error.to_string(), command))? {
            let name = match argument {
                Arg::Value(value) => {
                    let text = value
                        .into_string()
                        .map_err(|text| misuse(format!("{} is not UTF-8", text.display()), command))?;
                    words.arguments.push(text);
                    continue;
                }
                // A size such as -1G.
                Arg::Short(digit) if digit.is_ascii_digit() => {
                    let rest = parser.optional_value().and_then(|rest| rest.into_string().ok());
                    words.arguments.push(format!("-{digit}{}", rest.unwrap_or_default()));
                    continue;
                }
                Arg::Short(letter) => String::from(letter),
                Arg::Long(name) => String::from(name),
            };
            let name = SAME.iter().find(|(other, _)| *other == name).map_or(name.as_str(), |(_, own)| own);
            if name == "h" || name == "help" {
                words.help = true;
                return Ok(words);
            }
            let value = if name == "repair" && options.values.contains(&name) {
                repair(parser)
            } else if options.values.contains(&name) {
                let value = parser.value().and_then(lexopt::ValueExt::string);
                value.map_err(|error| misuse(error.to_string(), command))?
            } else if options.flags.contains(&name) || name == "json" || name == "q" {
                String::new()
            } else {
                let dashes = if name.len() == 1 { "-" } else { "--" };
                return Err(misuse(format!("there is no option {dashes}{name}"), command));
            };
            words.options.push((name.into(), value));
        }
        Ok(words)
    }

    /// Whether an option was given.
    #[must_use]
    pub(super) fn has(&self, name: &str) -> bool {
        self.options.iter().any(|(other, _)| other == name)
    }

    /// The last value of an option.
    #[must_use]
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.options.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// The `key=value` of all `-o`, in order; a key alone is `on`.
    #[must_use]
    pub(super) fn settings(&self) -> Vec<(&str, &str)> {
        let texts = self.options.iter().filter(|(name, _)| name == "o").map(|(_, value)| value.as_str());
        let parts = texts.flat_map(|text| text.split(','));
        parts.map(|part| part.split_once('=').unwrap_or((part, "on"))).collect()
    }

    /// So many arguments, not more and not fewer.
    ///
    /// # Errors
    /// What is missing or too much.
    pub(super) fn exactly<'a, const N: usize>(
        &'a self,
        command: &str,
        names: [&'a str; N],
    ) -> Result<[&'a str; N], Failed> {
        if let Some(extra) = self.arguments.get(N) {
            return Err(misuse(format!("{extra} is one argument too many"), command));
        }
        let mut found = names;
        for (place, name) in found.iter_mut().zip(&self.arguments) {
            *place = name.as_str();
        }
        match names.get(self.arguments.len()) {
            Some(missing) => Err(misuse(format!("{missing} is missing"), command)),
            None => Ok(found),
        }
    }

    /// The format that an option names.
    ///
    /// # Errors
    /// One that nobody knows.
    pub(super) fn format(&self, option: &str) -> Result<Option<Format>, Failed> {
        self.value(option).map(format_of_name).transpose()
    }

    /// A whole number.
    ///
    /// # Errors
    /// Anything else.
    pub(super) fn number(&self, option: &str, otherwise: u64) -> Result<u64, Failed> {
        let Some(text) = self.value(option) else { return Ok(otherwise) };
        text.parse().map_err(|_| Error::new(format!("-{option} {text}: no number"), "a whole number").into())
    }

    /// A size.
    ///
    /// # Errors
    /// See [`size`].
    pub(super) fn size(&self, option: &str, otherwise: u64) -> Result<u64, Failed> {
        self.value(option).map_or(Ok(otherwise), size)
    }
}

/// `--repair` alone is `--repair leaks`.
fn repair(parser: &mut Parser) -> String {
    let attached = parser.optional_value().and_then(|value| value.into_string().ok());
    let mut next = || {
        let mut rest = parser.try_raw_args()?;
        let word = rest.peek()?.to_str().filter(|word| matches!(*word, "leaks" | "all"))?.to_owned();
        rest.next();
        Some(word)
    };
    attached.or_else(&mut next).unwrap_or_else(|| String::from("leaks"))
}

/// A format by its name.
///
/// # Errors
/// One that nobody knows.
pub(super) fn format_of_name(name: &str) -> Result<Format, Failed> {
    let known = || Error::new(format!("{name} is no format"), "one of raw, qcow2, vhd").into();
    Format::of_name(name).filter(|_| name != "aio").ok_or_else(known)
}

/// An image as the command line names it: `FORMAT:PATH`, or a path whose format an option says.
///
/// # Errors
/// Where nobody says the format, with what it looks like; and paths that cannot be.
pub(super) fn image(text: &str, format: Option<Format>) -> Result<Image, Failed> {
    let (format, path) = match (format, text.split_once(':')) {
        (Some(format), _) => (format, text),
        (None, Some((name, path))) if format_of_name(name).is_ok() => (format_of_name(name)?, path),
        _ => {
            let hint = super::guess::hint_of_path(text);
            return Err(
                Error::new(format!("{text}: its format is not named, and is never guessed"), hint).into()
            );
        }
    };
    Ok(Image { format, path: absolute(path)? })
}

/// A path from the root on.
///
/// # Errors
/// An empty one, or one that is not UTF-8.
pub(super) fn absolute(path: &str) -> Result<String, Failed> {
    let whole = std::path::absolute(path).map_err(|error| Error::new(format!("\"{path}\": {error}"), ""))?;
    let whole = whole.into_os_string().into_string();
    whole.map_err(|_| Error::new("the working directory's name is not UTF-8", "go to another").into())
}

/// A size in bytes: a number, with a unit of 1024 or not.
///
/// # Errors
/// Anything else.
pub(super) fn size(text: &str) -> Result<u64, Failed> {
    let wrong = || {
        Failed::from(Error::new(format!("{text} is no size"), "a number with k, M, G, T or P, such as 20G"))
    };
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or_default() {
        "" | "b" | "B" => 0,
        "k" | "K" | "kiB" | "KiB" => 10,
        "m" | "M" | "MiB" => 20,
        "g" | "G" | "GiB" => 30,
        "t" | "T" | "TiB" => 40,
        "p" | "P" | "PiB" => 50,
        _ => return Err(wrong()),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, "0"));
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    if part.len() > 9 {
        return Err(wrong());
    }
    let scale = 10_u128.pow(u32::try_from(part.len()).unwrap_or(0));
    let part: u128 = part.parse().map_err(|_| wrong())?;
    let bytes = (u128::from(whole) << shift) + (part << shift) / scale;
    u64::try_from(bytes).ok().filter(|bytes| *bytes <= 1 << 62).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: Options = Options { values: &["f", "o", "repair"], flags: &["U", "backing-chain"] };

    fn words(arguments: &[&str]) -> Result<Words, String> {
        Words::parse(&mut Parser::from_args(arguments), "info", OPTIONS)
            .map_err(|failed| failed.error.to_string())
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in
            [("512", 512), ("1k", 1024), ("20G", 20 << 30), ("1.5M", 3 << 19), ("2TiB", 2 << 40)]
        {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "G", "1X", "-1", "1.G", "1e3", "99999999999T", "1.0000000001G", "0x10"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn options_may_come_in_any_order() {
        let words = words(&["-o", "a=1,b", "x", "--force-share", "-fraw", "--repair", "all", "y", "-oc=d=e"])
            .unwrap();
        assert_eq!(words.arguments, ["x", "y"]);
        assert_eq!(words.settings(), [("a", "1"), ("b", "on"), ("c", "d=e")]);
        assert_eq!(
            (words.value("f"), words.value("repair"), words.has("U")),
            (Some("raw"), Some("all"), true)
        );
        assert_eq!(words.exactly("info", ["A", "B"]).unwrap(), ["x", "y"]);
        assert!(words.exactly("info", ["A"]).is_err() && words.exactly("info", ["A", "B", "C"]).is_err());
    }

    #[test]
    fn repair_alone_means_leaks() {
        for (arguments, value, left) in [
            (&["--repair", "x"][..], "leaks", 1),
            (&["--repair"], "leaks", 0),
            (&["--repair=all", "x"], "all", 1),
            (&["-r", "leaks", "x"], "leaks", 1),
        ] {
            let words = words(arguments).unwrap();
            assert_eq!((words.value("repair"), words.arguments.len()), (Some(value), left), "{arguments:?}");
        }
    }

    #[test]
    fn mistakes_say_where_to_look() {
        assert_eq!(words(&["--frob"]).unwrap_err(), "there is no option --frob (see vbdd image info --help)");
        assert!(words(&["-f"]).unwrap_err().contains("missing argument"));
        let error = image("/no/where.img", None).unwrap_err().error.to_string();
        assert!(error.contains("never guessed") && error.contains("-f"), "{error}");
        assert_eq!(image("qcow2:/a:b", None).unwrap(), Image { format: Format::Qcow2, path: "/a:b".into() });
        assert_eq!(image("raw:b", Some(Format::Vhd)).unwrap().format, Format::Vhd);
    }
}
