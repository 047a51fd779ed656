//! The simulated xenstored passes the same checks that the real one passes in the Xen machine.
// Helpers of tests may fail loudly, as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

pub mod world;

#[path = "world/xenstore/conformance/mod.rs"]
pub mod conformance;

use ::xenstore::{Access, Permission};
use conformance::Verdict;
use world::xenstore::XenstoreServer;
use world::xenstore::socket::SocketServer;

/// Runs all checks; how many were skipped.
fn check(server: XenstoreServer, domain: u16) -> (usize, usize) {
    let served = SocketServer::start(server, domain).unwrap();
    let lines = conformance::run(Some(served.path()), |line| println!("{line:?}")).unwrap();
    let failed: Vec<_> = lines.iter().filter(|line| line.result.is_err()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let skipped = lines.iter().filter(|line| matches!(line.result, Ok(Verdict::Skipped(_)))).count();
    let scratch = format!("/local/domain/{domain}/data/vbdd-check-{}", std::process::id());
    assert!(served.server().read(0, &scratch).is_err(), "the scratch directory was left behind");
    (lines.len(), skipped)
}

#[test]
fn the_simulated_server_passes_as_domain_0() {
    let mut server = XenstoreServer::new(1);
    server.mkdir(0, "/local/domain/0").unwrap();
    server.introduce_domain(4);
    let (all, skipped) = check(server, 0);
    assert!(all >= 50 && skipped <= 3, "{all} checks, {skipped} skipped");
}

#[test]
fn the_simulated_server_passes_as_a_driver_domain() {
    let mut server = XenstoreServer::new(1);
    server.introduce_domain(6);
    server.mkdir(0, "/local/domain/6/data").unwrap();
    let owned = [Permission { domain: 6, access: Access::None }];
    server.set_permissions(0, "/local/domain/6/data", &owned).unwrap();
    let (all, skipped) = check(server, 6);
    assert!(all >= 50 && skipped <= 3, "{all} checks, {skipped} skipped");
}
