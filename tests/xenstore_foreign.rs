//! A client that is not ours talks to the simulated server: the crate xenstore-rs, over a unix socket.
//!
//! What it cannot do: its blocking client, the only one without tokio, has no watches, no transactions, no permissions
//! and no DIRECTORY_PART; it takes values for UTF-8, and it uses request number 0 for everything.
// Helpers of tests may fail loudly, as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

pub mod world;

use std::io::ErrorKind;
use std::process::Command;

use world::xenstore::XenstoreServer;
use world::xenstore::socket::SocketServer;
use xenstore_rs::Xs;
use xenstore_rs::unix::XsUnix;

/// Set for the process that plays the foreign client. It finds its server by the variable `XENSTORED_PATH`, and a
/// process must not change its own environment while threads run, so it is a process of its own.
const ROLE: &str = "VBDD_TEST_FOREIGN_CLIENT";

#[test]
fn a_foreign_client_finds_a_xenstored() {
    if std::env::var_os(ROLE).is_some() {
        play();
        return;
    }
    let mut server = XenstoreServer::new(1);
    server.write(0, "/local/domain/0/name", b"Domain-0").unwrap();
    let served = SocketServer::start(server, 0).unwrap();
    let client = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_foreign_client_finds_a_xenstored", "--nocapture"])
        .env(ROLE, "1")
        .env("XENSTORED_PATH", served.path())
        .output()
        .unwrap();
    assert!(client.status.success(), "{client:?}");
    // What it did has arrived.
    let mut server = served.server();
    assert_eq!(server.read(0, "/test/deep/node").unwrap(), b"a value, with \xc3\xbc");
    assert!(server.read(0, "/test/gone").is_err());
}

fn play() {
    let xs = XsUnix::new().unwrap();
    assert_eq!(&*xs.read("/local/domain/0/name").unwrap(), "Domain-0");
    xs.write("/test/deep/node", "a value, with ü").unwrap();
    assert_eq!(&*xs.read("/test/deep/node").unwrap(), "a value, with ü");
    xs.write("/test/empty", "").unwrap();
    assert_eq!(&*xs.read("/test/empty").unwrap(), "");
    let mut names = xs.directory("/test").unwrap();
    names.sort();
    assert_eq!(names.iter().map(|name| &**name).collect::<Vec<_>>(), ["deep", "empty"]);
    assert!(xs.directory("/test/empty").unwrap().is_empty());
    assert_eq!(xs.read("/test/none").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(xs.read("not//well").unwrap_err().kind(), ErrorKind::InvalidInput);
    xs.write("/test/gone/below", "x").unwrap();
    xs.rm("/test/gone").unwrap();
    assert_eq!(xs.read("/test/gone/below").unwrap_err().kind(), ErrorKind::NotFound);
    xs.rm("/test/gone").unwrap();
    for round in 0..200 {
        let value = "v".repeat(round * 20);
        xs.write("/test/size", &value).unwrap();
        assert_eq!(&*xs.read("/test/size").unwrap(), value);
    }
    for number in 0..100 {
        xs.write(&format!("/big/{number:03}{}", "n".repeat(60)), "").unwrap();
    }
    let error = xs.directory("/big").unwrap_err();
    assert!(error.to_string().contains("E2BIG"), "{error}");
}
