//! Unplugging.

use vbdd::vbd::{Event, Place, Timer};

use crate::host::{BE, DRIVER, FE, Host, ready};

#[test]
fn a_clean_unplug_in_a_driver_domain() {
    let mut host = Host::connected(DRIVER);
    host.unplug();
    assert_eq!((host.took().as_str(), host.state()), ("", 5));
    host.fe(5);
    assert!(host.vbd.as_ref().unwrap().is_connected(), "an older Linux goes on using its ring in 5");
    host.fe(6);
    assert_eq!(host.took(), "drain, close, 6");
    assert_eq!(host.be("hotplug-status"), None);
    host.fire(Timer::Linger);
    assert_eq!(host.took(), "remove, forget");
    assert!(host.vbd.is_none());
}

#[test]
fn a_script_with_a_loop_device_has_time_to_take_it_away() {
    assert!(Timer::LingerForScript.delay_ms() >= 5 * Timer::Linger.delay_ms());
    let mut host = Host::connected(DRIVER);
    host.put(BE, "node", "/dev/loop0");
    host.unplug().fe(6);
    assert!(!host.timers.contains(&Timer::Linger));
    host.took();
    host.fire(Timer::LingerForScript);
    assert_eq!(host.took(), "remove, forget");
}

#[test]
fn a_clean_unplug_in_dom0_leaves_the_directory_to_the_toolstack() {
    let mut host = Host::connected(Place::Dom0);
    host.unplug().fe(5).fe(6);
    assert_eq!(host.took(), "drain, close, 6");
    assert!(host.timers.is_empty());
    host.remove_all(FE);
    host.run();
    assert_eq!(host.took(), "");
    host.remove_all(BE);
    host.run();
    assert_eq!(host.took(), "forget");
}

#[test]
fn the_frontend_is_told_5_if_only_online_says_so() {
    let mut host = Host::connected(DRIVER);
    host.put(BE, "online", "0");
    host.run();
    assert_eq!(host.took(), "5");
}

#[test]
fn a_forced_unplug() {
    for place in [DRIVER, Place::Dom0] {
        let mut host = Host::connected(place);
        host.remove_all(FE);
        host.unplug();
        assert_eq!(host.took(), "abort, close, 6");
    }
}

#[test]
fn an_unplug_of_a_device_that_nobody_uses() {
    for state in [1, 6, 2, 0] {
        let mut host = Host::new(DRIVER);
        host.run().fire(Timer::Settle);
        host.put(FE, "state", &state.to_string());
        host.unplug();
        assert_eq!(host.state(), 6, "frontend {state}");
        assert!(host.vbd.as_ref().unwrap().holds_nothing());
    }
}

#[test]
fn the_directory_goes_at_any_moment() {
    let mut host = Host::connected(DRIVER);
    host.remove_all(BE);
    host.run();
    assert_eq!(host.took(), "abort, close, forget");

    let mut host = Host::new(DRIVER);
    host.hold = vec!["Open"];
    host.run();
    host.remove_all(BE);
    host.run();
    assert_eq!(host.took(), "");
    host.hold.clear();
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, close, forget");

    let mut host = ready();
    host.hold = vec!["Connect"];
    host.ring(8, 9).fe(3);
    host.remove_all(BE);
    host.hold.clear();
    host.run();
    assert_eq!(host.took(), "connect [8]/9, abort, close, forget");
}

#[test]
fn a_drain_that_takes_long_becomes_an_abort_when_the_directory_goes() {
    let mut host = Host::connected(DRIVER);
    host.hold = vec!["Disconnect(Drain"];
    host.fe(6);
    assert_eq!(host.took(), "");
    host.remove_all(BE);
    host.run();
    assert_eq!(host.took(), "abort, close, forget");
}

#[test]
fn a_publication_never_makes_a_removed_directory_anew() {
    let mut host = Host::new(DRIVER);
    host.hold = vec!["Publish"];
    host.run();
    host.remove_all(BE);
    host.hold.clear();
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, superseded, close, forget");
    assert_eq!(host.be("state"), None);
}

#[test]
fn a_publication_does_not_overwrite_an_unplug() {
    let mut host = ready();
    host.hold = vec!["Publish"];
    host.ring(8, 9).fe(3);
    host.unplug();
    host.hold.clear();
    host.run();
    assert_eq!(host.took(), "connect [8]/9, superseded");
    assert_eq!(host.state(), 5);
    host.fe(6);
    assert_eq!(host.took(), "drain, close, 6");
}

#[test]
fn a_device_that_is_removed_and_added_between_two_looks() {
    let mut host = Host::connected(DRIVER);
    host.remove_all(BE);
    host.remove_all(FE);
    host.plug();
    host.put(BE, "params", "/dev/vg/b");
    host.run().fire(Timer::Settle);
    assert_eq!(host.took(), "abort, close, open /dev/vg/b, 2");
}

#[test]
fn a_device_that_is_added_while_its_removal_is_noticed() {
    let mut host = Host::connected(DRIVER);
    host.hold = vec!["ReadWorld"];
    host.remove_all(BE);
    host.run();
    let gone = host.world();
    host.plug();
    host.run();
    host.give(Event::World(&gone));
    host.hold.clear();
    host.run();
    assert_eq!(host.state(), 2, "{:?}", host.log);
}

#[test]
fn an_unplug_undone_before_the_directory_was_removed() {
    let mut host = Host::connected(DRIVER);
    host.unplug().fe(6);
    assert!(host.timers.contains(&Timer::Linger));
    host.put(BE, "online", "1");
    host.put(BE, "state", "1");
    host.put(FE, "state", "1");
    host.run();
    assert!(!host.timers.contains(&Timer::Linger));
    assert_eq!(host.took(), "drain, close, 6, open /dev/vg/a, 2");
}

/// `xl devd` beside us: it runs the block script at 2, which writes its nodes, or an error; and at 6 it removes the directory, as
/// we do.
#[test]
fn another_daemon_that_runs_scripts_does_no_harm() {
    for script in [
        &[
            ("physical-device", "7:0"),
            ("physical-device-path", "/dev/loop0"),
            ("hotplug-status", "connected"),
        ][..],
        &[("hotplug-error", "losetup failed"), ("hotplug-status", "error")],
    ] {
        let mut host = ready();
        for (name, value) in script {
            host.put(BE, name, value);
        }
        host.run().ring(8, 9).fe(3).fe(4);
        assert_eq!(host.took(), "connect [8]/9, 4");
        host.unplug().fe(6);
        assert_eq!(host.took(), "drain, close, 6");
        host.remove_all(BE);
        host.run();
        assert_eq!(host.took(), "forget");
        assert_eq!(host.be("state"), None, "nothing is made anew");
    }
}
