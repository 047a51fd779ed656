//! Closing and coming back.

use crate::host::{DRIVER, FE, Host, ready};
use rings::Abi;

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
    assert_eq!(host.connected.as_ref().unwrap().rings[0].abi, Abi::X86_32);
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
