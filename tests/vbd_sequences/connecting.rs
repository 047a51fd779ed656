//! Connecting.

use rings::Abi;
use vbdd::vbd::{Discard, Place, Timer};

use crate::host::{BE, DRIVER, FE, Host, ready};

#[test]
fn linux_connects() {
    let mut host = ready();
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "connect [8]/9, 4");
    host.fe(4);
    assert_eq!(host.took(), "");
    assert!(host.vbd.as_ref().unwrap().is_connected());
    let plan = host.connected.unwrap();
    assert_eq!((plan.domain, plan.rings[0].abi, plan.resume), (7, Abi::X86_64, false));
}

#[test]
fn everything_is_published_with_2_where_we_play_the_script() {
    let host = ready();
    for (name, value) in [
        ("feature-flush-cache", "1"),
        ("feature-max-indirect-segments", "256"),
        ("max-ring-page-order", "4"),
        ("max-ring-pages", "16"),
        ("multi-queue-max-queues", "4"),
        ("feature-max-indirect-segments", "256"),
        ("sectors", "2048"),
        ("sector-size", "512"),
        ("physical-sector-size", "4096"),
        ("info", "0"),
        ("hotplug-status", "connected"),
        ("state", "2"),
    ] {
        assert_eq!(host.be(name), Some(value), "{name}");
    }
    for name in ["feature-discard", "discard-granularity", "discard-alignment", "discard-secure", "error"] {
        assert_eq!(host.be(name), None, "{name}: the image cannot be punched");
    }
    assert_eq!(host.last.unwrap().writes.last().unwrap().0, "state");
}

#[test]
fn discard_is_offered_where_the_image_can_be_punched_and_written() {
    let discard = Discard { granularity_bytes: 4096, alignment_bytes: 512 };
    for (mode, enabled, options, offered) in [
        ("w", None, None, true),
        ("w", Some("1"), Some("max-queues=1"), true),
        ("r", None, None, false),
        ("w", Some("0"), None, false),
        ("w", None, Some("discard=0"), false),
    ] {
        let mut host = Host::new(DRIVER);
        host.geometry.discard = Some(discard);
        host.put(BE, "mode", mode);
        for (name, value) in [("discard-enable", enabled), ("vbdd", options)] {
            value.into_iter().for_each(|value| host.put(BE, name, value));
        }
        host.run();
        let expected = offered.then_some(["1", "4096", "512"]);
        for (n, name) in
            ["feature-discard", "discard-granularity", "discard-alignment"].into_iter().enumerate()
        {
            assert_eq!(host.be(name), expected.map(|values| values[n]), "{mode} {enabled:?} {options:?}");
        }
        assert_eq!(host.be("discard-secure"), None);
    }
}

/// What an earlier process offered and this one does not is taken back before the next frontend looks.
#[test]
fn an_offer_that_is_withdrawn_is_removed() {
    let mut host = Host::empty(DRIVER);
    host.config.terms.offered.persistent = true;
    host.config.terms.offered.barrier = true;
    host.plug();
    host.run().fire(Timer::Settle);
    host.ring(8, 9).fe(3).fe(4);
    assert_eq!(host.be("feature-barrier"), Some("1"));
    host.killed();
    host.config.terms = host.config.terms.with("persistent=0 max-queues=1 max-ring-page-order=0").unwrap();
    host.run();
    assert_eq!(host.be("feature-persistent"), Some("1"), "the guest was told, and goes by it");
    host.fe(6).fe(1);
    for name in ["feature-persistent", "multi-queue-max-queues", "max-ring-page-order", "max-ring-pages"] {
        assert_eq!(host.be(name), None, "{name}");
    }
    assert_eq!(host.be("feature-flush-cache"), Some("1"));
}

#[test]
fn with_the_toolstacks_script_2_comes_first_and_the_image_when_the_frontend_connects() {
    let mut host = Host::new(Place::Dom0);
    host.run();
    assert_eq!(host.took(), "2");
    assert_eq!((host.be("hotplug-status"), host.be("sectors")), (None, None));
    host.fire(Timer::SettleForScript).put(BE, "hotplug-status", "connected");
    host.run().ring(8, 9).fe(3);
    assert_eq!(host.took(), "open /dev/vg/a, connect [8]/9, 4");
    assert_eq!((host.be("sectors"), host.be("info")), (Some("2048"), Some("0")));
}

#[test]
fn dom0_without_a_script_node_plays_the_script() {
    let mut host = Host::new(Place::Dom0);
    host.remove(BE, "script");
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, 2");
    assert_eq!(host.be("hotplug-status"), Some("connected"));
}

#[test]
fn the_toolstacks_script_may_make_the_image_appear_later() {
    let mut host = Host::new(Place::Dom0);
    host.run().fire(Timer::SettleForScript);
    host.open_error = Some("no such device".into());
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "2, open /dev/vg/a");
    assert_eq!(host.state(), 2);
    host.fire(Timer::Retry);
    assert_eq!(host.took(), "open /dev/vg/a");
    host.open_error = None;
    host.fire(Timer::Retry);
    assert_eq!(host.took(), "open /dev/vg/a, connect [8]/9, 4");
}

#[test]
fn an_image_that_never_appears_is_given_up() {
    let mut host = Host::new(Place::Dom0);
    host.config.attempts = 3;
    host.run().fire(Timer::SettleForScript);
    host.open_error = Some("no such device".into());
    host.ring(8, 9).fe(3).fire(Timer::Retry).fire(Timer::Retry);
    assert_eq!(host.took(), "2, open /dev/vg/a, open /dev/vg/a, open /dev/vg/a, 6");
    assert_eq!((host.be("error"), host.be("hotplug-status")), (Some("no such device"), None));
    assert!(host.timers.is_empty());
}

#[test]
fn two_stays_visible_for_a_moment_when_the_device_is_new() {
    let mut host = Host::new(DRIVER);
    host.run();
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "open /dev/vg/a, 2, connect [8]/9");
    host.fire(Timer::Settle);
    assert_eq!(host.took(), "4");
}

#[test]
fn two_stays_longer_where_libxl_waits_for_it() {
    let (long, brief) = (Timer::SettleForScript.delay_ms(), Timer::Settle.delay_ms());
    assert!(long >= 500 && brief <= 100, "{long} {brief}");
    let mut host = Host::new(DRIVER);
    host.put(BE, "script", "block");
    host.run();
    assert!(host.timers.contains(&Timer::SettleForScript) && !host.timers.contains(&Timer::Settle));
    let mut host = Host::new(DRIVER);
    host.run();
    assert!(host.timers.contains(&Timer::Settle) && !host.timers.contains(&Timer::SettleForScript));
    host.ring(8, 9).fe(3).fire(Timer::Settle);
    assert_eq!(host.took(), "open /dev/vg/a, 2, connect [8]/9, 4");
}

#[test]
fn a_script_that_has_run_proves_that_2_was_seen() {
    let mut host = Host::new(Place::Dom0);
    host.run().ring(8, 9).fe(3);
    assert_eq!(host.state(), 2);
    host.put(BE, "hotplug-status", "connected");
    host.run();
    assert_eq!(host.state(), 4);
    // In a driver domain the node is our own.
    let mut host = Host::new(DRIVER);
    host.put(BE, "script", "block");
    host.run().ring(8, 9).fe(3);
    assert_eq!((host.state(), host.be("hotplug-status")), (2, Some("connected")));
}

#[test]
fn an_unplug_does_not_wait_for_2_to_be_seen() {
    let mut host = Host::new(DRIVER);
    host.run().unplug();
    assert_eq!(host.took(), "open /dev/vg/a, 2, close, 6");
}

#[test]
fn frontends_that_do_not_wait_for_2() {
    for state in [3, 4] {
        let mut host = Host::new(DRIVER);
        host.ring(8, 9).fe(state);
        assert_eq!(host.took(), "open /dev/vg/a, 2, connect [8]/9");
        host.fire(Timer::Settle);
        assert_eq!(host.took(), "4");
    }
}

#[test]
fn a_frontend_that_resumes_writes_3_at_once() {
    let mut host = Host::empty(DRIVER);
    host.plug();
    host.ring(8, 9).fe(3).fire(Timer::Settle);
    assert_eq!(host.took(), "open /dev/vg/a, 2, connect [8]/9, 4");
}

#[test]
fn events_without_a_change_do_nothing() {
    let mut host = Host::connected(DRIVER);
    for _ in 0..10 {
        host.changed = true;
        host.run();
    }
    assert_eq!(host.took(), "");
}

#[test]
fn states_that_say_nothing_change_nothing() {
    let mut host = Host::connected(DRIVER);
    for state in [2, 7, 8, 0, 9] {
        host.fe(state);
    }
    for junk in [&b"4 "[..], b"-4", b"04", b"\xff\xfe", b"", &[b'4'; 4000]] {
        host.put_bytes(FE, "state", junk);
        host.run();
    }
    assert_eq!(host.took(), "");
    let mut host = Host::new(DRIVER);
    host.fe(2);
    assert_eq!(host.took(), "open /dev/vg/a, 2");
}
