//! What frontends get wrong.

use rings::Abi;
use vbdd::vbd::{ConnectError, Event, Misdeed, Notice, Timer};

use crate::host::{DRIVER, FE, Host, bad_grant, ready};

#[test]
fn ring_nodes_that_make_no_sense() {
    let refused: [(&str, Option<&str>, Misdeed); 12] = [
        ("ring-ref", None, Misdeed::Missing("ring-ref".into())),
        ("ring-ref", Some("-8"), Misdeed::BadNumber("ring-ref".into())),
        ("ring-ref", Some("4294967296"), Misdeed::BadNumber("ring-ref".into())),
        ("ring-ref", Some(""), Misdeed::BadNumber("ring-ref".into())),
        ("event-channel", None, Misdeed::Missing("event-channel".into())),
        ("event-channel", Some("0"), Misdeed::BadNumber("event-channel".into())),
        ("event-channel", Some("0x9"), Misdeed::BadNumber("event-channel".into())),
        ("protocol", Some("sparc-abi"), Misdeed::UnknownProtocol),
        ("multi-queue-num-queues", Some("0"), Misdeed::Queues(0)),
        ("num-ring-pages", Some("0"), Misdeed::RingPages(0)),
        ("ring-page-order", Some("many"), Misdeed::BadNumber("ring-page-order".into())),
        ("num-ring-pages", Some("99999999999"), Misdeed::BadNumber("num-ring-pages".into())),
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
        assert_eq!(host.connected.as_ref().unwrap().rings[0].queues[0].ring_refs, [grant], "{nodes:?}");
    }
}

#[test]
fn a_frontend_without_protocol_speaks_the_default() {
    for abi in [Abi::X86_32, Abi::X86_64] {
        let mut host = Host::new(DRIVER);
        host.config.terms.default_abi = abi;
        host.ring(8, 9).remove(FE, "protocol");
        host.fe(3);
        assert_eq!(host.connected.as_ref().unwrap().rings[0].abi, abi);
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
