//! Where a server is: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`; and which ones may be named.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use crate::nbd::wire::STRING_BYTES_MAX;

/// The port that has been given to the protocol.
pub const PORT: u16 = 10809;

/// The longest host name, in bytes: that of DNS.
const HOST_BYTES_MAX: usize = 253;

/// The longest path of a socket, in bytes: `PATH_MAX` without its zero.
const PATH_BYTES_MAX: usize = 4095;

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// By a Unix socket, at an absolute path without `..`.
    Unix(String),
    /// By TCP.
    Tcp {
        /// Name or address; an IPv6 address without its brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Where the server is.
    pub place: Place,
    /// The export's name; empty for the default one.
    pub export: String,
}

/// Whether a text is meant as the address of a server, and not as a path.
#[must_use]
pub fn is_remote(text: &str) -> bool {
    ["nbd:", "nbd+", "nbds:", "nbds+"].iter().any(|scheme| text.starts_with(scheme))
}

impl Address {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Address, &'static str> {
        if text.starts_with("nbds") {
            return Err("TLS (nbds) is not supported: use a socket, or a network that is trusted");
        }
        let address = if let Some(rest) = text.strip_prefix("nbd+unix://") {
            Self::parse_unix(rest)?
        } else if let Some(rest) = text.strip_prefix("nbd://") {
            Self::parse_tcp(rest)?
        } else {
            return Err("write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH");
        };
        if address.export.len() > STRING_BYTES_MAX || address.export.chars().any(char::is_control) {
            return Err("the export's name has control characters or is too long");
        }
        Ok(address)
    }

    fn parse_unix(rest: &str) -> Result<Address, &'static str> {
        let (export, query) = rest.split_once('?').ok_or("write ?socket=PATH behind the export's name")?;
        let export = match export.strip_prefix('/') {
            Some(export) => decode(export)?,
            None if export.is_empty() => String::new(),
            None => return Err("nbd+unix takes no host: write nbd+unix:///EXPORT?socket=PATH"),
        };
        let socket = query.strip_prefix("socket=").filter(|socket| !socket.contains('&'));
        let socket = decode(socket.ok_or("socket=PATH is all that may follow the question mark")?)?;
        let words = Path::new(&socket).components().all(|part| part != Component::ParentDir);
        if !socket.starts_with('/') || !words {
            return Err("the socket's path must begin with / and have no \"..\" in it");
        }
        if socket.len() > PATH_BYTES_MAX || socket.chars().any(char::is_control) {
            return Err("the socket's path has control characters or is too long");
        }
        Ok(Address { place: Place::Unix(socket), export })
    }

    fn parse_tcp(rest: &str) -> Result<Address, &'static str> {
        if rest.contains('?') {
            return Err("nbd:// takes no options behind a question mark");
        }
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = host_and_port(authority)?;
        Ok(Address { place: Place::Tcp { host, port: port.unwrap_or(PORT) }, export: decode(export)? })
    }
}

fn host_and_port(text: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("an IPv6 address ends with ]")?;
        (
            host,
            if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or("a port begins with :")?) },
        )
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    if host.is_empty() || host.len() > HOST_BYTES_MAX || !host.chars().all(good) {
        return Err("the host is missing, or is none");
    }
    let port = port.map(|port| {
        port.parse().ok().filter(|port| *port > 0).ok_or("the port is no number from 1 to 65535")
    });
    Ok((host.to_ascii_lowercase(), port.transpose()?))
}

/// Undoes `%20` and the like.
fn decode(text: &str) -> Result<String, &'static str> {
    const BAD: &str = "a % must be followed by two hexadecimal digits, and the result be UTF-8";
    let mut bytes = Vec::with_capacity(text.len());
    let mut from = text.bytes();
    while let Some(byte) = from.next() {
        if byte == b'%' {
            let mut digit = || from.next().and_then(|digit| char::from(digit).to_digit(16)).ok_or(BAD);
            let value = digit()? * 16 + digit()?;
            bytes.push(u8::try_from(value).map_err(|_| BAD)?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| BAD)
}

fn encode(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                write!(f, "{}", char::from(byte))?;
            }
            _ => write!(f, "%{byte:02x}")?,
        }
    }
    Ok(())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Unix(path) => {
                f.write_str("nbd+unix:///")?;
                encode(&self.export, f)?;
                f.write_str("?socket=")?;
                encode(path, f)
            }
            Place::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "nbd://[{host}]")?;
                } else {
                    write!(f, "nbd://{host}")?;
                }
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
                encode(&self.export, f)
            }
        }
    }
}

/// Servers that the operator trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Those whose sockets lie below a directory.
    Sockets(PathBuf),
    /// The one at a host and port.
    Host {
        /// As in [`Place::Tcp`].
        host: String,
        /// Port.
        port: u16,
    },
}

impl std::str::FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Allowed::Sockets(PathBuf::from(text)));
        }
        let (host, port) = host_and_port(text)
            .map_err(|why| format!("\"{text}\" is neither a directory nor HOST[:PORT]: {why}"))?;
        Ok(Allowed::Host { host, port: port.unwrap_or(PORT) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> Address {
        Address { place: Place::Tcp { host: host.into(), port }, export: export.into() }
    }

    fn unix(path: &str, export: &str) -> Address {
        Address { place: Place::Unix(path.into()), export: export.into() }
    }

    #[test]
    fn addresses_are_read_and_written() {
        for (text, address, again) in [
            ("nbd://store", tcp("store", 10809, ""), "nbd://store/"),
            ("nbd://Store:1/a%20b", tcp("store", 1, "a b"), "nbd://store:1/a%20b"),
            ("nbd://[::1]:7/x/y", tcp("::1", 7, "x/y"), "nbd://[::1]:7/x/y"),
            ("nbd://[fe80::1%eth0]/", tcp("fe80::1%eth0", 10809, ""), "nbd://[fe80::1%eth0]/"),
            ("nbd+unix:///?socket=/run/s", unix("/run/s", ""), "nbd+unix:///?socket=/run/s"),
            ("nbd+unix://?socket=/run/s", unix("/run/s", ""), "nbd+unix:///?socket=/run/s"),
            (
                "nbd+unix:///d%3f?socket=/run/a%26b",
                unix("/run/a&b", "d?"),
                "nbd+unix:///d%3f?socket=/run/a%26b",
            ),
            ("nbd+unix:////d?socket=/s", unix("/s", "/d"), "nbd+unix:////d?socket=/s"),
        ] {
            assert!(is_remote(text));
            assert_eq!(Address::parse(text).as_ref(), Ok(&address), "{text}");
            assert_eq!(address.to_string(), again);
            assert_eq!(Address::parse(again), Ok(address));
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let long = format!("nbd://h/{}", "a".repeat(5000));
        for text in [
            "nbd:",
            "nbd:h:1",
            "nbd://",
            "nbd:///x",
            "nbd://h:0/x",
            "nbd://h:70000/",
            "nbd://h:/x",
            "nbd://[::1/x",
            "nbd://[::1]7/x",
            "nbd://a b/x",
            "nbd://h/x?socket=/s",
            "nbd://h/%zz",
            "nbd://h/%f",
            "nbd://h/%ff",
            "nbd://h/a%0ab",
            "nbd://user@h/x",
            "nbds://h/x",
            "nbds+unix:///?socket=/s",
            "nbd+unix:///x",
            "nbd+unix://h/x?socket=/s",
            "nbd+unix:///x?socket=s",
            "nbd+unix:///x?socket=/run/../s",
            "nbd+unix:///x?socket=/s&tls=1",
            "nbd+unix:///x?sock=/s",
            "nbd+unix:///x?socket=",
            "nbd+unix:///x?socket=/a%00b",
            "nbd+tcp://h/x",
            &long,
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
            assert!(is_remote(text), "{text}");
        }
        for path in ["/nbd:", "nbd", "raw:/x", ""] {
            assert!(!is_remote(path));
        }
    }

    #[test]
    fn what_may_be_named() {
        assert_eq!("/run/nbd".parse(), Ok(Allowed::Sockets(PathBuf::from("/run/nbd"))));
        assert_eq!("Store".parse(), Ok(Allowed::Host { host: "store".into(), port: 10809 }));
        assert_eq!("[::1]:5".parse(), Ok(Allowed::Host { host: "::1".into(), port: 5 }));
        for text in ["", ":5", "a b", "h:x", "nbd://h"] {
            assert!(text.parse::<Allowed>().is_err(), "{text}");
        }
    }
}
