//! Why something was refused or failed, as values.

use alloc::string::String;
use core::fmt;

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The medium failed: an errno, or 0 where there is none.
    Io(i32),
    /// The medium is full. The disk works again when there is space.
    NoSpace,
    /// The image contradicts itself: reads of what is sound go on, nothing is written any more.
    Corrupt(Corruption),
    /// An `fdatasync` failed before: nothing can be promised until the image is opened anew.
    SyncFailed,
    /// The image is open for reading only.
    ReadOnly,
    /// The extent is not on the disk.
    OutOfRange,
    /// The format cannot do it, and says so rather than do something else.
    Unsupported,
}

/// What is wrong with an image, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What, in the terms of the format's specification.
    pub what: &'static str,
    /// Where in the image, in bytes.
    pub at_bytes: u64,
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.what, self.at_bytes)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Io(errno) => write!(f, "I/O error {errno}"),
            Failure::NoSpace => f.write_str("no space left on the medium"),
            Failure::Corrupt(what) => write!(f, "the image is corrupt: {what}"),
            Failure::SyncFailed => f.write_str("an earlier fdatasync failed"),
            Failure::ReadOnly => f.write_str("the image is open for reading only"),
            Failure::OutOfRange => f.write_str("beyond the end of the disk"),
            Failure::Unsupported => f.write_str("not supported by the image's format"),
        }
    }
}

/// Why an image was not opened. `Display` is one line for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// It is not of this format, or not whole.
    Malformed(Corruption),
    /// It uses something that is refused: what it is, and what to do.
    Refused(&'static str),
    /// A feature bit that nobody here knows; the image's own name for it where it has one.
    Feature(u8, String),
    /// The medium failed.
    Io(i32),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unsupported::Malformed(what) => write!(f, "{what}"),
            Unsupported::Refused(what) => f.write_str(what),
            Unsupported::Feature(bit, name) if name.is_empty() => {
                write!(f, "it needs feature {bit}, which is unknown")
            }
            Unsupported::Feature(bit, name) => write!(f, "it needs feature {bit} ({name}), which is unknown"),
            Unsupported::Io(errno) => write!(f, "I/O error {errno}"),
        }
    }
}

impl From<Failure> for Unsupported {
    fn from(failure: Failure) -> Unsupported {
        match failure {
            Failure::Corrupt(what) => Unsupported::Malformed(what),
            Failure::Io(errno) => Unsupported::Io(errno),
            Failure::NoSpace => Unsupported::Refused("no space left on the medium"),
            _ => Unsupported::Io(0),
        }
    }
}
