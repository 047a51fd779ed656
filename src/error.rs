//! Errors for the operator: what is wrong, and what to do.

use std::fmt;

/// An error that ends a command, or that is logged: what is wrong (with path, node or offset) and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What is wrong, one line.
    pub what: String,
    /// What to do, one line; may be empty.
    pub hint: String,
}

impl Error {
    /// An error from its two sentences.
    #[must_use]
    pub fn new(what: impl Into<String>, hint: impl Into<String>) -> Error {
        Error { what: what.into(), hint: hint.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
