//! Permissions of a node: who owns it, what others may do.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write as _;

/// What a domain may do with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing (`n`).
    None,
    /// Read (`r`).
    Read,
    /// Write (`w`).
    Write,
    /// Both (`b`).
    Both,
}

impl Access {
    /// Whether it allows reading.
    #[must_use]
    pub fn reads(self) -> bool {
        matches!(self, Access::Read | Access::Both)
    }

    /// Whether it allows writing.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Access::Write | Access::Both)
    }
}

/// One entry of a node's list. The first entry is special: its domain *owns* the node and may do anything, and its
/// access is what every domain gets that has no entry of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// The domain.
    pub domain: u16,
    /// What it may do.
    pub access: Access,
}

impl Permission {
    /// As it goes over the wire: a letter and the domain's number.
    pub fn encode(self, into: &mut String) {
        into.push(match self.access {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        });
        // Writing to a String cannot fail.
        let _ = write!(into, "{}", self.domain);
    }

    /// Reads one entry as it came over the wire, without its NUL.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Permission> {
        let (letter, number) = bytes.split_first()?;
        let access = match letter {
            b'n' => Access::None,
            b'r' => Access::Read,
            b'w' => Access::Write,
            b'b' => Access::Both,
            _ => return None,
        };
        if number.is_empty() || !number.iter().all(u8::is_ascii_digit) {
            return None;
        }
        Some(Permission { domain: core::str::from_utf8(number).ok()?.parse().ok()?, access })
    }

    /// Reads a list, each entry ended by a NUL. `None` if any entry is malformed or there is none.
    #[must_use]
    pub fn parse_list(bytes: &[u8]) -> Option<Vec<Permission>> {
        bytes.strip_suffix(b"\0")?.split(|b| *b == 0).map(Permission::parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_go_there_and_back() {
        for (text, domain, access) in [
            ("n0", 0, Access::None),
            ("r1", 1, Access::Read),
            ("w65535", 65535, Access::Write),
            ("b7", 7, Access::Both),
        ] {
            let entry = Permission { domain, access };
            let mut out = String::new();
            entry.encode(&mut out);
            assert_eq!(out, text);
            assert_eq!(Permission::parse(text.as_bytes()), Some(entry));
        }
        for bad in ["", "n", "x1", "r-1", "r+1", "r65536", "r 1", "1"] {
            assert_eq!(Permission::parse(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn lists_need_their_last_nul() {
        assert_eq!(Permission::parse_list(b"n0\0r1\0").unwrap().len(), 2);
        assert_eq!(Permission::parse_list(b"n0\0r1"), None);
        assert_eq!(Permission::parse_list(b""), None);
        assert_eq!(Permission::parse_list(b"\0"), None);
    }
}
