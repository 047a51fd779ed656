//! Where a vbd lives in xenstore. Identity comes from the backend path alone: everything else can be written by others.

use crate::hypervisor::DomainId;

/// The first domain number that Xen keeps for itself (`DOMID_FIRST_RESERVED`).
const FIRST_RESERVED_DOMAIN: u32 = 0x7ff0;

/// The backend directory's first name: which toolstack spelling made the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `vbd`: libxl's backendtype phy, xenopsd's default.
    Vbd,
    /// `vbd3`: libxl's backendtype tap.
    Vbd3,
    /// `qdisk`.
    Qdisk,
}

impl Kind {
    /// Every kind that can be served.
    pub const ALL: [Kind; 3] = [Kind::Vbd, Kind::Vbd3, Kind::Qdisk];

    /// Its name in xenstore and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Vbd => "vbd",
            Kind::Vbd3 => "vbd3",
            Kind::Qdisk => "qdisk",
        }
    }

    /// The kind of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Which vbd: parsed from a backend path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// The directory's kind.
    pub kind: Kind,
    /// The guest.
    pub frontend: DomainId,
    /// The device's number: opaque.
    pub devid: u32,
}

impl Address {
    /// Reads a path at or below a backend directory, relative (`backend/vbd/7/51712/state`) or absolute
    /// (`/local/domain/OWN/backend/vbd/...`). Also returns what follows the directory: `state`, or nothing for itself.
    #[must_use]
    pub fn parse(path: &str, own_domain: DomainId) -> Option<(Address, &str)> {
        let relative = match path.strip_prefix("/local/domain/") {
            Some(absolute) => {
                let (domain, rest) = absolute.split_once('/')?;
                (decimal(domain)? == u32::from(own_domain)).then_some(rest)?
            }
            None => path,
        };
        let mut parts = relative.strip_prefix("backend/")?.splitn(4, '/');
        let kind = Kind::from_name(parts.next()?)?;
        let frontend = decimal(parts.next()?).filter(|domain| *domain < FIRST_RESERVED_DOMAIN)?;
        let devid = decimal(parts.next()?)?;
        let frontend = DomainId::try_from(frontend).ok()?;
        Some((Address { kind, frontend, devid }, parts.next().unwrap_or("")))
    }

    /// The backend directory, absolute.
    #[must_use]
    pub fn backend_path(&self, own_domain: DomainId) -> String {
        format!("/local/domain/{own_domain}/backend/{}/{}/{}", self.kind.name(), self.frontend, self.devid)
    }

    /// The frontend directory, absolute: `device/vbd` whatever the backend's kind.
    #[must_use]
    pub fn frontend_path(&self) -> String {
        format!("/local/domain/{}/device/vbd/{}", self.frontend, self.devid)
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.kind.name(), self.frontend, self.devid)
    }
}

/// A canonical decimal number: no sign, no space, no leading zero, so that two texts never name one thing.
fn decimal(text: &str) -> Option<u32> {
    let canonical = text == "0" || (text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0'));
    if canonical { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_all_shapes() {
        let it = Address { kind: Kind::Vbd3, frontend: 7, devid: 51712 };
        assert_eq!(Address::parse("backend/vbd3/7/51712", 3), Some((it, "")));
        assert_eq!(Address::parse("backend/vbd3/7/51712/state", 3), Some((it, "state")));
        assert_eq!(Address::parse("/local/domain/3/backend/vbd3/7/51712/a/b", 3), Some((it, "a/b")));
        assert_eq!(it.backend_path(3), "/local/domain/3/backend/vbd3/7/51712");
        assert_eq!(it.frontend_path(), "/local/domain/7/device/vbd/51712");
        assert_eq!(Address::parse(&it.backend_path(0), 0), Some((it, "")));
        assert_eq!(it.to_string(), "vbd3/7/51712");
        for bad in [
            "backend/vbd3/7",
            "backend/vbd3",
            "backend",
            "",
            "backend/vif/7/0",
            "backend/vbd/07/51712",
            "backend/vbd/7/-1",
            "backend/vbd/7/+1",
            "backend/vbd/7/4294967296",
            "backend/vbd/32752/1",
            "backend/vbd/65536/1",
            "backend/vbd/7/",
            "backend/vbd//1",
            "/local/domain/4/backend/vbd3/7/51712",
            "/local/domain/03/backend/vbd3/7/51712",
            "/backend/vbd/7/1",
            "xbackend/vbd/7/1",
        ] {
            assert_eq!(Address::parse(bad, 3), None, "{bad}");
        }
    }
}
