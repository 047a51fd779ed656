//! Who else on this machine serves a kind: two owners of one device would both map its ring.

use std::fs;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;

use crate::error::Error;

/// Where the kernel lists the backend drivers that are loaded.
const BACKEND_DRIVERS: &str = "sys/bus/xen-backend/drivers";

/// Checks that nobody else claims `kind` (`vbd`, `vbd3` or `qdisk`) in this domain. `filesystem` is `/`.
///
/// # Errors
/// Names the other owner and how to get rid of it.
pub fn check(filesystem: &Path, kind: &str) -> Result<(), Error> {
    match kind {
        "vbd" if filesystem.join(BACKEND_DRIVERS).join("vbd").exists() => Err(Error::new(
            "kind vbd is owned by the kernel: xen-blkback is loaded, and it binds every vbd of this domain",
            "unload it (rmmod xen-blkback) and keep it out (blacklist xen-blkback), or leave --kind vbd away",
        )),
        "vbd3" => match process_named(filesystem, "tapback") {
            Some(pid) => Err(Error::new(
                format!("kind vbd3 is owned by tapback (process {pid})"),
                "stop tapback and keep it from starting, or leave --kind vbd3 away",
            )),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// A kind that this process serves, and no other vbdd of this machine, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Claim {
    _name: UnixListener,
}

/// Claims `kind` against every other vbdd, whatever state directory that one uses: two would close each other's rings.
///
/// The claim is the name of an abstract socket, to which nobody connects: the kernel frees it with the process.
///
/// # Errors
/// Another vbdd serves that kind.
pub fn claim(kind: &str) -> Result<Claim, Error> {
    let name = SocketAddr::from_abstract_name(format!("vbdd-serves-{kind}"));
    match name.and_then(|name| UnixListener::bind_addr(&name)) {
        Ok(listener) => Ok(Claim { _name: listener }),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(Error::new(
            format!("another vbdd serves kind {kind} already"),
            "stop it first, or leave that --kind away",
        )),
        Err(error) => Err(Error::new(format!("cannot claim kind {kind}: {error}"), "")),
    }
}

/// The process id of a process called `name`.
fn process_named(filesystem: &Path, name: &str) -> Option<u32> {
    let entries = fs::read_dir(filesystem.join("proc")).ok()?;
    entries.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let comm = fs::read_to_string(entry.path().join("comm")).ok()?;
        (comm.trim_end() == name).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_served_once() {
        let kind = format!("test-{}", std::process::id());
        let first = claim(&kind).unwrap();
        assert!(claim(&kind).unwrap_err().to_string().contains("another vbdd serves kind"));
        drop(first);
        assert!(claim(&kind).is_ok());
    }

    #[test]
    fn each_owner_is_seen_and_named() {
        let root = std::env::temp_dir().join(format!("vbdd-owners-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("proc/17")).unwrap();
        fs::write(root.join("proc/17/comm"), "bash\n").unwrap();
        for kind in ["vbd", "vbd3", "qdisk"] {
            assert_eq!(check(&root, kind), Ok(()), "{kind}");
        }
        fs::create_dir_all(root.join(BACKEND_DRIVERS).join("vbd")).unwrap();
        fs::create_dir_all(root.join("proc/4242")).unwrap();
        fs::write(root.join("proc/4242/comm"), "tapback\n").unwrap();
        assert!(check(&root, "vbd").unwrap_err().to_string().contains("rmmod xen-blkback"));
        assert!(check(&root, "vbd3").unwrap_err().to_string().contains("process 4242"));
        assert_eq!(check(&root, "qdisk"), Ok(()));
        fs::remove_dir_all(&root).unwrap();
    }
}
