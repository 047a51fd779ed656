//! Rings of several pages and queues, in every spelling, and what earlier frontends left beside them.

use vbdd::vbd::{FURTHER_KEYS_MAX, Misdeed, Notice, RingPlan, further_keys};

use crate::host::{BE, FE, Host, bad_grant, ready};

fn put(host: &mut Host, nodes: &[(&str, &str)]) {
    for (name, value) in nodes {
        host.put(FE, name, value);
    }
}

/// What is connected after the frontend wrote `nodes` and 3.
fn connected(nodes: &[(&str, &str)]) -> String {
    let mut host = ready();
    put(&mut host, nodes);
    host.put(FE, "protocol", "x86_64-abi");
    host.fe(3);
    host.took()
}

const TWO_QUEUES: [(&str, &str); 5] = [
    ("multi-queue-num-queues", "2"),
    ("queue-0/ring-ref", "20"),
    ("queue-0/event-channel", "21"),
    ("queue-1/ring-ref", "22"),
    ("queue-1/event-channel", "23"),
];

#[test]
fn a_ring_of_several_pages_in_both_spellings() {
    for count in [("ring-page-order", "2"), ("num-ring-pages", "4")] {
        let pages = [("ring-ref0", "8"), ("ring-ref1", "9"), ("ring-ref2", "10"), ("ring-ref3", "11")];
        let mut nodes = vec![count, ("event-channel", "5")];
        nodes.extend(pages);
        assert_eq!(connected(&nodes), "connect [8, 9, 10, 11]/5, 4");
        // FreeBSD writes both.
        nodes.extend([("ring-page-order", "2"), ("num-ring-pages", "4")]);
        assert_eq!(connected(&nodes), "connect [8, 9, 10, 11]/5, 4");
    }
    let names: Vec<String> = (0..16).map(|page| format!("ring-ref{page}")).collect();
    let values: Vec<String> = (0..16).map(|page| (100 + page).to_string()).collect();
    let mut nodes: Vec<(&str, &str)> =
        names.iter().zip(&values).map(|(name, value)| (name.as_str(), value.as_str())).collect();
    nodes.extend([("ring-page-order", "4"), ("event-channel", "5")]);
    let all: Vec<u32> = (100..116).collect();
    assert_eq!(connected(&nodes), format!("connect {all:?}/5, 4"));
}

#[test]
fn several_queues_with_one_page_or_more() {
    assert_eq!(connected(&TWO_QUEUES), "connect [20]/21+[22]/23, 4");
    let mut spelled = TWO_QUEUES.to_vec();
    spelled.push(("ring-page-order", "0"));
    assert_eq!(connected(&spelled), "connect [20]/21+[22]/23, 4");
    let pages = [
        ("multi-queue-num-queues", "2"),
        ("ring-page-order", "1"),
        ("queue-0/ring-ref0", "20"),
        ("queue-0/ring-ref1", "21"),
        ("queue-0/event-channel", "5"),
        ("queue-1/ring-ref0", "22"),
        ("queue-1/ring-ref1", "23"),
        ("queue-1/event-channel", "6"),
    ];
    assert_eq!(connected(&pages), "connect [20, 21]/5+[22, 23]/6, 4");
    // Windows says that it uses one.
    let one = [("multi-queue-num-queues", "1"), ("ring-ref", "8"), ("event-channel", "9")];
    assert_eq!(connected(&one), "connect [8]/9, 4");
}

#[test]
fn more_than_was_offered_or_none_is_refused_and_said() {
    let table: [(&[(&str, &str)], Misdeed); 9] = [
        (&[("multi-queue-num-queues", "0")], Misdeed::Queues(0)),
        (&[("multi-queue-num-queues", "5")], Misdeed::Queues(5)),
        (&[("multi-queue-num-queues", "4294967295")], Misdeed::Queues(u32::MAX)),
        (&[("ring-page-order", "5")], Misdeed::RingPages(32)),
        (&[("ring-page-order", "32")], Misdeed::RingPages(u32::MAX)),
        (&[("num-ring-pages", "3")], Misdeed::RingPages(3)),
        (&[("num-ring-pages", "0")], Misdeed::RingPages(0)),
        (&[("multi-queue-num-queues", "2")], Misdeed::Missing("queue-0/ring-ref".into())),
        (&[("ring-page-order", "1"), ("ring-ref0", "8")], Misdeed::Missing("ring-ref1".into())),
    ];
    for (nodes, misdeed) in table {
        let mut host = ready();
        put(&mut host, nodes);
        host.put(FE, "event-channel", "9");
        host.fe(3);
        assert_eq!(host.took(), "close, 6", "{nodes:?}");
        assert_eq!(host.be("error"), Some(misdeed.to_string().as_str()));
        assert_eq!(host.notices, [Notice::Misbehaved(misdeed)]);
    }
    let mut host = ready();
    put(&mut host, &TWO_QUEUES);
    host.remove(FE, "queue-1/event-channel");
    host.fe(3);
    assert_eq!(host.notices, [Notice::Misbehaved(Misdeed::Missing("queue-1/event-channel".into()))]);
}

#[test]
fn less_is_offered_to_a_disk_whose_options_say_so() {
    let mut host = ready();
    host.put(BE, "vbdd", "max-queues=1 max-ring-page-order=0");
    host.fe(6).fe(1);
    assert_eq!(host.took(), "close, 6, open /dev/vg/a, 2");
    for name in ["multi-queue-max-queues", "max-ring-page-order", "max-ring-pages"] {
        assert_eq!(host.be(name), None, "{name}");
    }
    put(&mut host, &TWO_QUEUES);
    host.fe(3);
    assert_eq!(host.took(), "close, 6");
    assert_eq!(host.be("error"), Some(Misdeed::Queues(2).to_string().as_str()));
}

#[test]
fn options_that_make_no_sense_refuse_a_new_disk_and_spare_a_connected_one() {
    let mut host = Host::connected(crate::host::DRIVER);
    host.put(BE, "vbdd", "fast");
    host.run();
    assert_eq!(host.took(), "");
    host.fe(6).fe(1);
    assert_eq!(host.took(), "drain, close, 6, 6", "the second says why");
    assert!(host.be("error").unwrap_or_default().contains("\"fast\""), "{:?}", host.be("error"));
}

#[test]
fn options_change_nothing_for_a_ring_that_is_up() {
    let mut host = ready();
    put(&mut host, &TWO_QUEUES);
    host.remove(FE, "protocol");
    host.fe(3).fe(4);
    assert_eq!(host.took(), "connect [20]/21+[22]/23, 4");
    host.put(BE, "vbdd", "max-queues=1 protocol=x86_32-abi");
    host.run();
    assert_eq!(host.took(), "");
}

#[test]
fn what_cannot_be_meant_beside_a_plain_ring_is_an_earlier_frontends() {
    let table: [&[(&str, &str)]; 4] = [
        &[("ring-page-order", "4"), ("ring-ref0", "100")],
        &[("multi-queue-num-queues", "4")],
        &[("multi-queue-num-queues", "100")],
        &[("multi-queue-num-queues", "2"), ("queue-0/ring-ref", "1"), ("queue-0/event-channel", "2")],
    ];
    for nodes in table {
        let mut host = ready();
        put(&mut host, nodes);
        host.ring(8, 9).fe(3);
        assert_eq!(host.took(), "connect [8]/9, 4", "{nodes:?}");
    }
}

/// Two frontends before: four pages in two queues; one before: a plain ring; now: four queues of one page.
#[test]
fn pages_of_one_and_queues_of_another_frontend() {
    let mut host = ready();
    put(&mut host, &[("ring-page-order", "1"), ("multi-queue-num-queues", "3")]);
    for queue in 0..2 {
        for node in ["ring-ref0", "ring-ref1", "event-channel"] {
            host.put(FE, &format!("queue-{queue}/{node}"), "50");
        }
    }
    host.ring(8, 9);
    for queue in 0..3 {
        host.put(FE, &format!("queue-{queue}/ring-ref"), &(20 + queue).to_string());
        host.put(FE, &format!("queue-{queue}/event-channel"), &(30 + queue).to_string());
    }
    host.fe(3);
    assert_eq!(host.took(), "connect [20]/30+[21]/31+[22]/32 or [8]/9, 4");
    // Each number may be the stale one.
    put(&mut host, &[("queue-2/ring-ref0", "60"), ("queue-2/ring-ref1", "61")]);
    put(&mut host, &[("ring-ref0", "70"), ("ring-ref1", "71")]);
    host.run();
    let all = "drain, connect [50, 50]/30+[50, 50]/31+[60, 61]/32 or [20]/30+[21]/31+[22]/32 or [70, 71]/9 or [8]/9, 4";
    assert_eq!(host.took(), all);
}

#[test]
fn the_most_nodes_that_a_frontend_can_have_fit_into_one_read() {
    let mut host = ready();
    put(&mut host, &[("ring-page-order", "4"), ("multi-queue-num-queues", "8"), ("state", "3")]);
    let keys = further_keys(&host.world());
    assert_eq!(keys.len(), FURTHER_KEYS_MAX);
}

fn rings(host: &Host) -> &[RingPlan] {
    &host.connected.as_ref().unwrap().rings
}

#[test]
fn two_ways_to_read_the_nodes_are_both_tried() {
    for which in [0, 1] {
        let mut host = ready();
        put(&mut host, &TWO_QUEUES);
        host.which = which;
        host.ring(8, 9).fe(3).fe(4);
        assert_eq!(host.took(), "connect [20]/21+[22]/23 or [8]/9, 4");
        assert!(!rings(&host)[0].is_plain() && rings(&host)[1].is_plain());
        host.changed = true;
        host.run();
        assert_eq!(host.took(), "", "the same nodes are the same ring");
        host.put(FE, "ring-ref", "10");
        host.run();
        assert!(host.took().starts_with("drain, connect"), "others are another");
    }
    let mut host = ready();
    put(&mut host, &TWO_QUEUES);
    host.connect_error = Some(bad_grant());
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "connect [20]/21+[22]/23 or [8]/9, close, 6");
}

/// A crash kernel with one processor: it finds the nodes of two queues, writes a plain ring and leaves them.
#[test]
fn queues_that_were_given_up_count_less_than_a_plain_ring_beside_them() {
    let mut host = ready();
    put(&mut host, &TWO_QUEUES);
    host.fe(3).fe(4);
    assert_eq!(host.took(), "connect [20]/21+[22]/23, 4");
    host.fe(5).fe(6).fe(1);
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "5, drain, close, 6, open /dev/vg/a, 2, connect [8]/9 or [20]/21+[22]/23, 4");
    host.fe(4);
    assert_eq!(host.took(), "");
    // Queues of new numbers are meant.
    host.fe(6).fe(1);
    put(&mut host, &[("queue-0/ring-ref", "30")]);
    host.fe(3);
    assert_eq!(host.took(), "drain, close, 6, open /dev/vg/a, 2, connect [30]/21+[22]/23 or [8]/9, 4");
}

#[test]
fn a_successor_that_offers_less_still_takes_over_what_its_predecessor_gave() {
    let mut host = ready();
    put(&mut host, &TWO_QUEUES);
    host.fe(3).fe(4);
    host.took();
    host.killed();
    host.config.terms.offered.queues_max = 1;
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, connect [20]/21+[22]/23 resume");
    host.changed = true;
    host.run();
    assert_eq!(host.took(), "");
}
