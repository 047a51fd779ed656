//! Restarts.

use vbdd::vbd::{Event, Geometry, Place, Script, Timer};

use crate::host::{BE, DRIVER, FE, Host, bad_grant, ready};

#[test]
fn a_stop_leaves_the_ring_to_the_successor() {
    let mut host = Host::connected(DRIVER);
    host.give(Event::Stop);
    host.run();
    assert_eq!((host.took().as_str(), host.state()), ("handover, close, stopped", 4));
    host.killed();
    host.run();
    assert_eq!((host.took().as_str(), host.state()), ("open /dev/vg/a, connect [8]/9 resume", 4));
    host.fe(4);
    assert_eq!(host.took(), "");
}

#[test]
fn a_stop_at_any_moment_of_connecting() {
    for hold in ["ReadWorld", "Open", "Connect", "Publish"] {
        let mut host = ready();
        host.ring(8, 9).hold = vec![hold];
        if hold == "Open" {
            host = Host::new(DRIVER);
            host.hold = vec![hold];
        }
        host.fe(3);
        host.give(Event::Stop);
        host.run();
        host.hold.clear();
        host.run();
        assert!(host.took().ends_with("stopped"), "{hold}");
        assert!(host.timers.is_empty());
        host.killed();
        host.ring(8, 9).fe(3).run();
        host.settle();
        assert_eq!(host.state(), 4, "{hold}");
    }
}

#[test]
fn a_predecessor_died_in_2() {
    let mut host = ready();
    host.killed();
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, 2", "what is offered may be another set");
    host.killed();
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "open /dev/vg/a, connect [8]/9, 4");
}

#[test]
fn a_predecessor_died_in_4() {
    for (state, then, after) in [
        (3, "open /dev/vg/a, connect [8]/9 resume", 4),
        (4, "open /dev/vg/a, connect [8]/9 resume", 4),
        (1, "open /dev/vg/a, 2", 2),
        (5, "5, open /dev/vg/a, connect [8]/9 resume", 5),
        (6, "6", 6),
    ] {
        let mut host = Host::connected(DRIVER);
        host.killed();
        host.fe(state);
        assert_eq!((host.took().as_str(), host.state()), (then, after), "frontend in {state}");
    }
    let mut host = Host::connected(DRIVER);
    host.killed();
    host.remove_all(FE);
    host.run();
    assert_eq!(host.took(), "6");
}

#[test]
fn a_predecessor_died_while_the_device_was_unplugged() {
    let mut host = Host::connected(DRIVER);
    host.unplug();
    host.killed();
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, connect [8]/9 resume", "the guest may still need it to unmount");
    host.fe(6).fire(Timer::Linger);
    assert_eq!(host.took(), "drain, close, 6, remove, forget");

    let mut host = Host::connected(DRIVER);
    host.unplug().fe(6);
    host.killed();
    host.took();
    host.run().fire(Timer::Linger);
    assert_eq!(host.took(), "remove, forget");

    let mut host = Host::connected(Place::Dom0);
    host.unplug();
    host.put(FE, "state", "6");
    host.killed();
    host.run();
    assert_eq!(host.took(), "6");
}

#[test]
fn an_image_that_is_missing_at_a_take_over_is_waited_for() {
    let mut host = Host::connected(DRIVER);
    host.killed();
    host.open_error = Some("not mounted yet".into());
    host.run();
    for _ in 0..100 {
        host.fire(Timer::Retry);
    }
    assert_eq!((host.state(), host.be("error")), (4, None));
    host.took();
    host.open_error = None;
    host.fire(Timer::Retry);
    assert_eq!(host.took(), "open /dev/vg/a, connect [8]/9 resume");
}

#[test]
fn nodes_that_make_no_sense_to_a_successor_do_not_close_a_disk_in_use() {
    let mut host = Host::connected(DRIVER);
    host.killed();
    host.put(BE, "params", "qcow:/a");
    host.run();
    host.changed = true;
    host.run();
    assert_eq!((host.took().as_str(), host.state(), host.notices.len()), ("", 4, 1));
    host.put(BE, "params", "/dev/vg/a");
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, connect [8]/9 resume");
}

#[test]
fn a_take_over_that_fails_is_repeated_and_then_given_up() {
    let mut host = Host::connected(DRIVER);
    host.config.attempts = 3;
    host.killed();
    host.connect_error = Some(bad_grant());
    host.run().fire(Timer::Retry).fire(Timer::Retry);
    let connect = "connect [8]/9 resume";
    assert_eq!(host.took(), format!("open /dev/vg/a, {connect}, {connect}, {connect}, close, 6"));
}

#[test]
fn an_image_that_grew_while_nobody_served_it() {
    let mut host = Host::connected(DRIVER);
    host.killed();
    host.geometry = Geometry { sectors: 4096, physical_sector_bytes: 512, discard: None };
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, connect [8]/9 resume, 4");
    assert_eq!(host.be("sectors"), Some("4096"));
}

#[test]
fn the_script_may_be_said_to_be_ours_or_not() {
    let mut host = Host::new(Place::Dom0);
    host.config.script = Script::Ours;
    host.run();
    assert_eq!((host.took().as_str(), host.be("hotplug-status")), ("open /dev/vg/a, 2", Some("connected")));
    let mut host = Host::new(Place::Dom0);
    host.remove(BE, "script");
    host.config.script = Script::Toolstacks;
    host.run();
    assert_eq!((host.took().as_str(), host.be("hotplug-status")), ("2", None));
}
