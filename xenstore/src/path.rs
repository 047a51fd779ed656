//! Paths of nodes, checked once when made.

use alloc::string::String;
use core::fmt;

/// Longest path in bytes, a leading `/local/domain/<number>/` not counted (`XENSTORE_REL_PATH_MAX`). The protocol names
/// 3072 for absolute paths (`XENSTORE_ABS_PATH_MAX`), but xenstored refuses, since 4.17 at the latest, whatever a
/// domain could not spell relatively.
pub const PATH_BYTES_MAX: usize = 2048;

/// The path of a node, or the name of a special watch (`@releaseDomain`). Always well-formed: xenstored would not
/// answer it with EINVAL for its spelling.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path(String);

/// Why a text is no path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathError {
    /// The empty text is no path.
    Empty,
    /// Longer than xenstored takes.
    TooLong,
    /// A character other than ASCII letters and digits and `-/_@`.
    BadCharacter,
    /// Two slashes in a row, or one at the end: a node without a name.
    EmptyName,
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PathError::Empty => "a xenstore path cannot be empty",
            PathError::TooLong => "a xenstore path has at most 2048 bytes after /local/domain/<number>/",
            PathError::BadCharacter => "a xenstore path has only ASCII letters, digits and -/_@",
            PathError::EmptyName => "a xenstore path has no doubled slash and no slash at its end",
        })
    }
}

impl core::error::Error for PathError {}

impl Path {
    /// Checks a path: absolute (`/a/b`), relative to the own domain (`a/b`), or special (`@releaseDomain`).
    ///
    /// # Errors
    /// [`PathError`] says which rule it breaks.
    pub fn parse(text: &str) -> Result<Path, PathError> {
        if text.is_empty() {
            return Err(PathError::Empty);
        }
        if text.len() > home_bytes(text) + PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        if !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'/' | b'_' | b'@')) {
            return Err(PathError::BadCharacter);
        }
        if text.contains("//") || (text.len() > 1 && text.ends_with('/')) {
            return Err(PathError::EmptyName);
        }
        Ok(Path(String::from(text)))
    }

    /// A bound that no path precedes, to start a search in a sorted table from. Not itself a path.
    pub(crate) fn least() -> Path {
        Path(String::new())
    }

    /// As [`Path::parse`], of bytes that came from outside.
    ///
    /// # Errors
    /// As [`Path::parse`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Path, PathError> {
        Path::parse(core::str::from_utf8(bytes).map_err(|_| PathError::BadCharacter)?)
    }

    /// The node `name` below this one; `name` may itself have several parts.
    ///
    /// # Errors
    /// When the name is empty or badly spelt, or the whole too long.
    pub fn child(&self, name: &str) -> Result<Path, PathError> {
        if name.is_empty() || name.starts_with('/') {
            return Err(PathError::EmptyName);
        }
        let mut whole = String::with_capacity(self.0.len() + 1 + name.len());
        if self.0 != "/" {
            whole.push_str(&self.0);
        }
        whole.push('/');
        whole.push_str(name);
        Path::parse(&whole)
    }

    /// The node that this one is in; `None` for the root, a one-part relative path and a special name.
    #[must_use]
    pub fn parent(&self) -> Option<Path> {
        if self.is_special() || self.0 == "/" {
            return None;
        }
        match self.0.rfind('/') {
            None => None,
            Some(0) => Some(Path(String::from("/"))),
            Some(at) => Some(Path(String::from(&self.0[..at]))),
        }
    }

    /// The last part: the node's own name. Empty for the root.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// As it goes over the wire.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is relative to the own domain's directory.
    #[must_use]
    pub fn is_relative(&self) -> bool {
        !self.0.starts_with('/') && !self.is_special()
    }

    /// Whether it is the name of a special watch, and not of a node.
    #[must_use]
    pub fn is_special(&self) -> bool {
        self.0.starts_with('@')
    }

    /// Whether this is `ancestor` or lies below it.
    #[must_use]
    pub fn is_within(&self, ancestor: &Path) -> bool {
        self.below(ancestor).is_some()
    }

    /// What follows `ancestor` in this path: empty when they are equal, `None` when it does not lie below.
    #[must_use]
    pub fn below<'a>(&'a self, ancestor: &Path) -> Option<&'a str> {
        if ancestor.0 == "/" && self.0.starts_with('/') {
            return Some(&self.0[1..]);
        }
        let rest = self.0.strip_prefix(ancestor.0.as_str())?;
        if rest.is_empty() { Some(rest) } else { rest.strip_prefix('/') }
    }
}

/// Length of the `/local/domain/<number>/` that a path begins with, or 0.
fn home_bytes(text: &str) -> usize {
    let Some(rest) = text.strip_prefix("/local/domain/") else { return 0 };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let whole = (1..=5).contains(&digits) && rest.as_bytes().get(digits) == Some(&b'/');
    if whole { text.len() - rest.len() + digits + 1 } else { 0 }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::str::FromStr for Path {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Path, PathError> {
        Path::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn good_paths_are_taken_as_they_are() {
        for text in [
            "/",
            "/a",
            "/local/domain/0/backend/vbd/1/51712",
            "domid",
            "device/vbd",
            "@releaseDomain",
            "/a@b_-9",
        ] {
            assert_eq!(Path::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn bad_paths_are_named() {
        use PathError::*;
        for (text, why) in [
            ("", Empty),
            ("//", EmptyName),
            ("/a//b", EmptyName),
            ("/a/", EmptyName),
            ("a/", EmptyName),
            ("/a b", BadCharacter),
            ("/a.b", BadCharacter),
            ("/ä", BadCharacter),
            ("/a\0", BadCharacter),
            ("/a\n", BadCharacter),
        ] {
            assert_eq!(Path::parse(text), Err(why), "{text:?}");
        }
        assert_eq!(Path::from_bytes(b"/a\xff"), Err(BadCharacter));
    }

    #[test]
    fn lengths_are_limited_to_the_byte() {
        let of = |lead: &str, len: usize| lead.to_string() + &"x".repeat(len - lead.len());
        for lead in ["/", "a", "@", "/local/domain/", "/local/domain/x/", "/local/domain/123456/"] {
            assert!(Path::parse(&of(lead, 2048)).is_ok(), "{lead}");
            assert_eq!(Path::parse(&of(lead, 2049)), Err(PathError::TooLong), "{lead}");
        }
        for home in ["/local/domain/0/", "/local/domain/65535/"] {
            assert!(Path::parse(&of(home, home.len() + 2048)).is_ok(), "{home}");
            assert_eq!(Path::parse(&of(home, home.len() + 2049)), Err(PathError::TooLong), "{home}");
        }
        let deep = Path::parse(&of("/", 2046)).unwrap();
        assert!(deep.child("a").is_ok());
        assert_eq!(deep.child("ab"), Err(PathError::TooLong));
    }

    #[test]
    fn family_relations() {
        let p = |text| Path::parse(text).unwrap();
        assert_eq!(p("/").child("a").unwrap(), p("/a"));
        assert_eq!(p("/a").child("b/c").unwrap(), p("/a/b/c"));
        assert_eq!(p("/a").child(""), Err(PathError::EmptyName));
        assert_eq!(p("/a").child("/b"), Err(PathError::EmptyName));
        assert_eq!(p("/a/b").parent(), Some(p("/a")));
        assert_eq!(p("/a").parent(), Some(p("/")));
        assert_eq!(p("/").parent(), None);
        assert_eq!(p("a").parent(), None);
        assert_eq!(p("@x/1").parent(), None);
        assert_eq!(p("/a/b").name(), "b");
        assert_eq!(p("/").name(), "");
        assert_eq!(p("/a/b").below(&p("/a")), Some("b"));
        assert_eq!(p("/a/b").below(&p("/")), Some("a/b"));
        assert_eq!(p("/a").below(&p("/a")), Some(""));
        assert_eq!(p("/ab").below(&p("/a")), None);
        assert!(!p("b").is_within(&p("/")));
        assert!(p("device/vbd").is_within(&p("device")));
    }
}
