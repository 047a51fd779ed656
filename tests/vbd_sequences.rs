//! The vbd's side of every handshake that frontends and toolstacks are known to make, and of some that they should not.

// A test that meets the unexpected must stop, also in its helpers; clippy knows only #[test] functions.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "vbd_sequences/host.rs"]
mod host;

use host::{BE, FE, Host, bad_grant};
use rings::Abi;
use vbdd::vbd::{ConnectError, Event, Geometry, Misdeed, Notice, Place, Script, Timer};

const DRIVER: Place = Place::DriverDomain;

/// A driver domain's device that has shown its 2 long enough.
fn ready() -> Host {
    let mut host = Host::new(DRIVER);
    host.run().fire(Timer::Settle);
    assert_eq!(host.took(), "open /dev/vg/a, 2");
    host
}

// --- connecting ------------------------------------------------------------------------------------------------------

#[test]
fn linux_connects() {
    let mut host = ready();
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "connect [8]/9, 4");
    host.fe(4);
    assert_eq!(host.took(), "");
    assert!(host.vbd.as_ref().unwrap().is_connected());
    let plan = host.connected.unwrap();
    assert_eq!((plan.domain, plan.ring.abi, plan.resume), (7, Abi::X86_64, false));
}

#[test]
fn everything_is_published_with_2_where_we_play_the_script() {
    let host = ready();
    for (name, value) in [
        ("feature-flush-cache", "1"),
        ("sectors", "2048"),
        ("sector-size", "512"),
        ("physical-sector-size", "4096"),
        ("info", "0"),
        ("hotplug-status", "connected"),
        ("state", "2"),
    ] {
        assert_eq!(host.be(name), Some(value), "{name}");
    }
    for name in
        ["feature-persistent", "feature-discard", "feature-barrier", "feature-max-indirect-segments", "error"]
    {
        assert_eq!(host.be(name), None, "{name}");
    }
    assert_eq!(host.last.unwrap().writes.last().unwrap().0, "state");
}

#[test]
fn with_the_toolstacks_script_2_comes_first_and_the_image_when_the_frontend_connects() {
    let mut host = Host::new(Place::Dom0);
    host.run();
    assert_eq!(host.took(), "2");
    assert_eq!((host.be("hotplug-status"), host.be("sectors")), (None, None));
    host.fire(Timer::Settle).put(BE, "hotplug-status", "connected");
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
    host.run().fire(Timer::Settle);
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
    host.run().fire(Timer::Settle);
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

// --- unplugging ------------------------------------------------------------------------------------------------------

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

// --- closing and coming back -------------------------------------------------------------------------------------------

#[test]
fn pv_grub_hands_over_to_linux() {
    let mut host = Host::connected(DRIVER);
    host.fe(6);
    assert_eq!(host.took(), "drain, close, 6");
    assert_eq!(host.be("hotplug-status"), Some("connected"), "the device is not unplugged");
    host.remove(FE, "ring-ref");
    host.remove(FE, "event-channel");
    host.fe(1);
    assert_eq!(host.took(), "open /dev/vg/a, 2");
    host.ring(20, 21).fe(3).fe(4);
    assert_eq!(host.took(), "connect [20]/21, 4");
}

#[test]
fn the_closing_dance_of_minios_ovmf_and_kexec() {
    let mut host = Host::connected(DRIVER);
    host.fe(5);
    assert_eq!((host.took().as_str(), host.state()), ("5", 5));
    host.fe(6);
    assert_eq!((host.took().as_str(), host.state()), ("drain, close, 6", 6));
    host.fe(1);
    assert_eq!((host.took().as_str(), host.state()), ("open /dev/vg/a, 2", 2));
    host.ring(8, 9).fe(4);
    assert_eq!(host.took(), "connect [8]/9, 4");
}

#[test]
fn windows_dances_on_a_device_that_was_never_connected() {
    let mut host = ready();
    for (state, answer) in [(5, 5), (6, 6), (1, 2), (5, 5), (6, 6), (1, 2)] {
        host.fe(state);
        assert_eq!(host.state(), answer, "after {state}");
    }
    host.ring(8, 9).fe(3);
    assert_eq!(host.state(), 4);
}

#[test]
fn closing_and_coming_back_seen_as_one() {
    for (state, then) in [(1, "drain, 2"), (3, "drain, connect [20]/21, 4"), (4, "drain, connect [20]/21, 4")]
    {
        let mut host = Host::connected(DRIVER);
        host.ring(20, 21).fe(state);
        assert_eq!(host.took(), then, "back in {state}");
    }
}

#[test]
fn a_new_handshake_with_the_same_ring_nodes() {
    let mut host = Host::connected(DRIVER);
    host.fe(3);
    assert_eq!(host.took(), "drain, connect [8]/9, 4", "3 after 4");
    host.fe(4).fe(5).fe(4);
    assert_eq!(host.took(), "5, drain, connect [8]/9, 4", "4 after 5");
    host.fe(5).fe(1);
    assert_eq!(host.took(), "5, drain, 2", "1 after 5");
}

#[test]
fn a_rewritten_ring_is_another_ring() {
    let mut host = Host::connected(DRIVER);
    host.put(FE, "protocol", "x86_32-abi");
    host.run();
    assert_eq!(host.took(), "drain, connect [8]/9, 4");
    assert_eq!(host.connected.as_ref().unwrap().ring.abi, Abi::X86_32);
}

#[test]
fn junk_in_the_ring_nodes_of_a_ring_in_use_is_ignored() {
    let mut host = Host::connected(DRIVER);
    host.put(FE, "ring-ref", "-1");
    host.fe(4);
    host.remove(FE, "event-channel");
    host.fe(4);
    assert_eq!(host.took(), "");
}

#[test]
fn the_frontend_goes_while_the_device_stays() {
    for denied in [false, true] {
        let mut host = Host::connected(DRIVER);
        if denied {
            host.deny(FE)
        } else {
            host.remove_all(FE)
        }
        host.run();
        assert_eq!((host.took().as_str(), host.state()), ("abort, close, 6", 6));
    }
    let mut host = Host::connected(DRIVER);
    host.remove_all(FE);
    host.run().fe(1);
    assert_eq!(host.took(), "abort, close, 6, open /dev/vg/a, 2");
}

#[test]
fn a_6_is_not_shown_to_a_frontend_that_has_gone_on() {
    let mut host = Host::connected(DRIVER);
    host.hold = vec!["Publish"];
    host.fe(6);
    host.hold.clear();
    host.fe(1);
    assert_eq!(host.took(), "drain, close, superseded, open /dev/vg/a, 2");
}

// --- what frontends get wrong --------------------------------------------------------------------------------------------

#[test]
fn ring_nodes_that_make_no_sense() {
    let refused: [(&str, Option<&str>, Misdeed); 12] = [
        ("ring-ref", None, Misdeed::Missing("ring-ref")),
        ("ring-ref", Some("-8"), Misdeed::BadNumber("ring-ref")),
        ("ring-ref", Some("4294967296"), Misdeed::BadNumber("ring-ref")),
        ("ring-ref", Some(""), Misdeed::BadNumber("ring-ref")),
        ("event-channel", None, Misdeed::Missing("event-channel")),
        ("event-channel", Some("0"), Misdeed::BadNumber("event-channel")),
        ("event-channel", Some("0x9"), Misdeed::BadNumber("event-channel")),
        ("protocol", Some("sparc-abi"), Misdeed::UnknownProtocol),
        ("multi-queue-num-queues", Some("0"), Misdeed::Queues(0)),
        ("num-ring-pages", Some("0"), Misdeed::RingPages(0)),
        ("ring-page-order", Some("many"), Misdeed::BadNumber("ring-page-order")),
        ("num-ring-pages", Some("99999999999"), Misdeed::BadNumber("num-ring-pages")),
    ];
    for (name, value, misdeed) in refused {
        let mut host = ready();
        host.ring(8, 9);
        match value {
            Some(value) => host.put(FE, name, value),
            None => host.remove(FE, name),
        }
        host.fe(3);
        assert_eq!(host.took(), "close, 6", "{name} {value:?}");
        assert_eq!(host.be("error"), Some(misdeed.to_string().as_str()));
        assert_eq!(host.be("hotplug-status"), Some("connected"), "that is long over");
        assert_eq!(host.notices, [Notice::Misbehaved(misdeed)]);
        host.fe(3).fe(4);
        assert_eq!(host.took(), "", "said once");
        host.fe(6).fe(1);
        host.remove(FE, "multi-queue-num-queues");
        host.remove(FE, "num-ring-pages");
        host.remove(FE, "ring-page-order");
        host.ring(8, 9).fe(3);
        assert_eq!(host.took(), "open /dev/vg/a, 2, connect [8]/9, 4");
        assert_eq!(host.be("error"), None);
    }
}

#[test]
fn nodes_of_any_length_and_any_bytes() {
    for junk in
        [vec![0xff; 4096], vec![b'9'; 4096], vec![0], b"8\0".to_vec(), b" 8".to_vec(), b"8\n".to_vec()]
    {
        for name in ["ring-ref", "event-channel", "protocol", "ring-page-order", "multi-queue-num-queues"] {
            let mut host = ready();
            host.ring(8, 9).put_bytes(FE, name, &junk);
            host.fe(3);
            assert_eq!(host.took(), "close, 6", "{name}");
        }
    }
}

#[test]
fn both_spellings_of_a_ring_of_one_page() {
    let table: [(&[(&str, &str)], u32); 7] = [
        (&[("ring-ref", "8")], 8),
        (&[("ring-ref0", "9")], 9),
        (&[("ring-page-order", "0"), ("ring-ref0", "9")], 9),
        (&[("ring-page-order", "0"), ("ring-ref", "8")], 8),
        (&[("ring-page-order", "0"), ("ring-ref", "8"), ("ring-ref0", "9")], 9),
        (&[("num-ring-pages", "1"), ("ring-ref0", "9"), ("multi-queue-num-queues", "1")], 9),
        (&[("ring-ref", "8"), ("ring-ref0", "9")], 8),
    ];
    for (nodes, grant) in table {
        let mut host = ready();
        host.ring(8, 9).remove(FE, "ring-ref");
        for (name, value) in nodes {
            host.put(FE, name, value);
        }
        host.fe(3);
        assert_eq!(host.connected.as_ref().unwrap().ring.queues[0].ring_refs, [grant], "{nodes:?}");
    }
}

#[test]
fn what_an_earlier_frontend_left_behind_does_not_count_against_a_plain_ring() {
    let mut host = ready();
    for (name, value) in [("ring-page-order", "4"), ("ring-ref0", "100"), ("multi-queue-num-queues", "4")] {
        host.put(FE, name, value);
    }
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "connect [8]/9, 4");
    let mut host = ready();
    host.ring(8, 9).remove(FE, "ring-ref");
    host.put(FE, "multi-queue-num-queues", "4");
    host.fe(3);
    assert_eq!(host.notices, [Notice::Misbehaved(Misdeed::Queues(4))]);
}

#[test]
fn a_frontend_without_protocol_speaks_the_default() {
    for abi in [Abi::X86_32, Abi::X86_64] {
        let mut host = Host::new(DRIVER);
        host.config.default_abi = abi;
        host.ring(8, 9).remove(FE, "protocol");
        host.fe(3);
        assert_eq!(host.connected.as_ref().unwrap().ring.abi, abi);
    }
}

#[test]
fn a_grant_that_cannot_be_mapped() {
    let mut host = ready();
    host.connect_error = Some(bad_grant());
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "connect [8]/9, close, 6");
    assert_eq!(host.be("error"), Some(Misdeed::BadGrant(8).to_string().as_str()));
    host.connect_error = None;
    host.fe(3);
    assert_eq!(host.took(), "", "not again with the same nodes");
    host.ring(20, 21).fe(3);
    assert_eq!(host.took(), "open /dev/vg/a, connect [20]/21, 4", "but with others");
}

#[test]
fn a_connect_that_fails_for_a_reason_of_ours_is_tried_again() {
    let mut host = ready();
    host.connect_error = Some(ConnectError::Failed("no memory".into()));
    host.ring(8, 9).fe(3).fire(Timer::Retry);
    assert_eq!(host.took(), "connect [8]/9, connect [8]/9");
    host.connect_error = None;
    host.fire(Timer::Retry);
    assert_eq!(host.took(), "connect [8]/9, 4");
}

#[test]
fn a_broken_ring_waits_for_the_frontend() {
    let mut host = Host::connected(DRIVER);
    host.give(Event::RingBroken(Misdeed::Ring("too many requests".into())));
    host.run();
    assert_eq!((host.took().as_str(), host.state()), ("note", 4));
    assert_eq!(host.be("error"), Some("too many requests"));
    host.give(Event::RingBroken(Misdeed::Ring("again".into())));
    host.run();
    assert_eq!((host.took().as_str(), host.notices.len()), ("", 1));
    host.fe(6).fe(1).fe(3);
    assert_eq!(host.took(), "drain, close, 6, open /dev/vg/a, 2, connect [8]/9, 4");
    assert_eq!(host.be("error"), None);
}

// --- what toolstacks and hosts get wrong -----------------------------------------------------------------------------------

#[test]
fn an_image_that_cannot_be_opened() {
    let mut host = Host::new(DRIVER);
    host.open_error = Some("/dev/vg/a: no such file: create it".into());
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, 6");
    for name in ["error", "hotplug-error"] {
        assert_eq!(host.be(name), Some("/dev/vg/a: no such file: create it"));
    }
    assert_eq!(host.be("hotplug-status"), Some("error"));
    host.changed = true;
    host.run();
    assert_eq!(host.took(), "");
    host.unplug().fire(Timer::Linger);
    assert_eq!(host.took(), "6, remove, forget");
}

#[test]
fn what_fails_is_not_tried_for_ever_whatever_the_frontend_shows() {
    for state in 0..9 {
        let mut host = Host::new(DRIVER);
        host.open_error = Some("no such file".into());
        host.fe(state);
        assert_eq!(host.took(), "open /dev/vg/a, 6", "frontend in {state}");
    }
}

#[test]
fn an_error_text_is_bounded_and_one_line() {
    let mut host = Host::new(DRIVER);
    host.open_error = Some(format!("a\nb{}", "é".repeat(5000)));
    host.run();
    let text = host.be("error").unwrap();
    assert!(text.len() <= 250 && text.starts_with("a bé"), "{text}");
}

#[test]
fn nodes_of_the_toolstack_that_make_no_sense() {
    for (name, value, says) in [
        ("frontend", "/local/domain/8/device/vbd/51712", "frontend"),
        ("frontend", "/local/domain/7/device/vbd/51713", "frontend"),
        ("frontend-id", "8", "frontend-id"),
        ("params", "qcow2:/a", "qcow2"),
        ("params", "", "no medium"),
        ("params", "../a", "absolute"),
        ("mode", "x", "mode"),
        ("mode", "", "mode"),
    ] {
        let mut host = Host::new(DRIVER);
        host.put(BE, name, value);
        host.run();
        assert_eq!(host.took(), "6", "{name} {value}");
        assert!(host.be("error").unwrap().contains(says), "{name}: {:?}", host.be("error"));
        host.put(BE, "frontend", "/local/domain/7/device/vbd/51712");
        host.put(BE, "frontend-id", "7");
        host.put(BE, "params", "/dev/vg/a");
        host.put(BE, "mode", "w");
        host.run();
        assert_eq!(
            (host.took().as_str(), host.be("error")),
            ("open /dev/vg/a, 2", None),
            "once it is put right"
        );
        assert_eq!((host.be("hotplug-status"), host.be("hotplug-error")), (Some("connected"), None));
    }
}

#[test]
fn a_device_of_another_specification_is_left_alone() {
    let mut host = Host::new(DRIVER);
    host.put(BE, "specification", "virtio");
    host.run();
    assert_eq!((host.took().as_str(), host.state()), ("forget", 1));
}

#[test]
fn modes_and_device_types() {
    for (mode, device_type, removable, info, open) in [
        ("w", "disk", "0", "0", "open /dev/vg/a"),
        ("w!", "disk", "1", "2", "open /dev/vg/a"),
        ("r", "disk", "0", "4", "open /dev/vg/a ro"),
        ("r", "cdrom", "1", "7", "open /dev/vg/a ro"),
        ("w", "floppy", "0", "0", "open /dev/vg/a"),
    ] {
        let mut host = Host::new(DRIVER);
        host.put(BE, "mode", mode);
        host.put(BE, "device-type", device_type);
        host.put(BE, "removable", removable);
        host.run();
        assert_eq!(host.took(), format!("{open}, 2"));
        assert_eq!(host.be("info"), Some(info), "{mode} {device_type}");
        let (request, _) = host.vbd.as_ref().unwrap().open_image().unwrap();
        assert_eq!((request.read_only, request.forced), (mode == "r", mode == "w!"));
    }
}

#[test]
fn an_empty_drive_is_there_and_refuses_a_ring() {
    let mut host = Host::new(DRIVER);
    host.put(BE, "device-type", "cdrom");
    host.put(BE, "params", "");
    host.run().fire(Timer::Settle);
    assert_eq!((host.took().as_str(), host.be("hotplug-status")), ("2", Some("connected")));
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "6");
    assert!(host.be("error").unwrap().contains("no medium"));
    assert_eq!(host.be("hotplug-status"), Some("connected"));
}

#[test]
fn an_image_that_is_changed_is_used_from_the_next_ring_on() {
    let mut host = Host::connected(DRIVER);
    host.put(BE, "params", "/dev/vg/b");
    host.run();
    assert_eq!(host.took(), "");
    host.fe(1);
    assert_eq!(host.took(), "drain, close, open /dev/vg/b, 2");
}

#[test]
fn a_quota_that_is_exceeded() {
    let mut host = Host::new(DRIVER);
    host.publish_error = Some("EQUOTA".into());
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, publish fails");
    host.changed = true;
    host.run();
    assert_eq!(host.took(), "", "not before the timer");
    host.fire(Timer::Republish);
    host.publish_error = None;
    host.fire(Timer::Republish);
    assert_eq!(host.took(), "publish fails, 2");
}

#[test]
fn a_frontend_that_changes_its_mind_all_the_time_cannot_hold_up_an_unplug() {
    let mut host = ready();
    host.hold = vec!["Publish"];
    host.unplug();
    host.fe(6).fe(1);
    host.hold.clear();
    host.run();
    assert_eq!(host.took(), "close, 6");
}

// --- restarts ------------------------------------------------------------------------------------------------------------

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
        if host.timers.contains(&Timer::Settle) {
            host.fire(Timer::Settle);
        }
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
    host.put(BE, "params", "qcow2:/a");
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
    host.geometry = Geometry { sectors: 4096, physical_sector_bytes: 512 };
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
