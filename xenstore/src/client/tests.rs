//! The client against a server played by hand, request by request.

use super::*;
use crate::permissions::{Access, Permission};
use alloc::string::{String, ToString};
use alloc::vec;

fn path(text: &str) -> Path {
    Path::parse(text).unwrap()
}

fn client() -> Client {
    let mut client = Client::new(Config { seed: 7, ..Config::default() });
    client.connected();
    assert_eq!(client.event(), Some(Event::Reset));
    client
}

/// All that the client wants to send now, as (type, request, transaction, payload).
fn sent(client: &mut Client) -> Vec<(MessageType, u32, u32, String)> {
    let mut messages = vec![];
    while let Some(bytes) = client.transmit() {
        let (mut input, mut decoder) = (bytes, Decoder::default());
        let (header, payload) = decoder.next(&mut input).unwrap().expect("a whole message");
        assert!(input.is_empty(), "exactly one message");
        let length = bytes.len();
        client.transmitted(length);
        let kind = MessageType::from_number(header.kind).unwrap();
        messages.push((kind, header.request, header.transaction, String::from_utf8(payload).unwrap()));
    }
    messages
}

fn reply(client: &mut Client, kind: MessageType, request: u32, payload: &[u8]) {
    client.receive(&wire::encode(kind, request, 0, &[payload]).unwrap()).unwrap();
}

fn refuse(client: &mut Client, request: u32, name: &str) {
    reply(client, MessageType::Error, request, (name.to_string() + "\0").as_bytes());
}

/// Answers each thing sent so that it succeeds; the transaction's number is 9.
fn agree(client: &mut Client) -> Vec<(MessageType, u32, u32, String)> {
    let messages = sent(client);
    for (kind, request, ..) in &messages {
        let payload: &[u8] = if *kind == MessageType::TransactionStart { b"9\0" } else { b"OK\0" };
        reply(client, *kind, *request, payload);
    }
    messages
}

fn outcome(client: &mut Client, wanted: JobId) -> Outcome {
    match client.event() {
        Some(Event::Job { id, outcome }) if id == wanted => outcome,
        other => panic!("{other:?} instead of the outcome of {wanted:?}"),
    }
}

#[test]
fn reads_go_out_in_order_and_come_back_by_number() {
    let mut client = client();
    let id = client.submit(Job::Read(vec![path("/state"), path("/a"), path("/b")])).unwrap();
    let messages = sent(&mut client);
    let names: Vec<&str> = messages.iter().map(|m| m.3.as_str()).collect();
    assert_eq!(names, ["/state\0", "/a\0", "/b\0"]);
    reply(&mut client, MessageType::Read, messages[2].1, b"third");
    refuse(&mut client, messages[1].1, "ENOENT");
    assert_eq!(client.event(), None);
    reply(&mut client, MessageType::Read, messages[0].1, b"");
    let values = vec![Ok(vec![]), Err(ErrorCode::Missing), Ok(b"third".to_vec())];
    assert_eq!(outcome(&mut client, id), Outcome::Read(values));
}

#[test]
fn nothing_is_sent_before_a_connection_stands() {
    let mut client = Client::new(Config::default());
    let id = client.submit(Job::Edit(Edit::Mkdir(path("/a")))).unwrap();
    client.watch(&path("/w"), WatchToken(1)).unwrap();
    assert_eq!(client.transmit(), None);
    client.connected();
    assert_eq!(client.event(), Some(Event::Reset));
    let kinds: Vec<MessageType> = agree(&mut client).iter().map(|m| m.0).collect();
    assert_eq!(kinds, [MessageType::Watch, MessageType::Mkdir]);
    assert_eq!(outcome(&mut client, id), Outcome::Done);
}

#[test]
fn the_pipeline_is_bounded() {
    let mut client = client();
    let paths: Vec<Path> = (0..100).map(|n| path(&alloc::format!("/n{n}"))).collect();
    let id = client.submit(Job::Read(paths)).unwrap();
    let mut total = 0;
    loop {
        let messages = sent(&mut client);
        assert!(client.requests_outstanding() <= limits::REQUESTS_OUTSTANDING_MAX);
        if messages.is_empty() {
            break;
        }
        total += messages.len();
        for (kind, request, ..) in messages {
            reply(&mut client, kind, request, b"v");
        }
    }
    assert_eq!(total, 100);
    assert_eq!(outcome(&mut client, id), Outcome::Read(vec![Ok(b"v".to_vec()); 100]));
}

#[test]
fn what_does_not_fit_is_not_taken() {
    let mut client =
        Client::new(Config { payload_bytes_max: wire::DEVICE_PAYLOAD_BYTES_MAX, ..Config::default() });
    let write = |bytes: usize| Job::Edit(Edit::Write(path("/a"), vec![b'x'; bytes]));
    assert_eq!(client.submit(write(4078)), Err(SubmitError::TooBig(path("/a"))));
    assert!(client.submit(write(4077)).is_ok());
    let permissions = vec![Permission { domain: 60_000, access: Access::Read }; 600];
    let set = Job::Edit(Edit::SetPermissions(path("/a"), permissions));
    assert_eq!(client.submit(set), Err(SubmitError::TooBig(path("/a"))));
    let special = Job::List(path("@releaseDomain"));
    assert_eq!(client.submit(special), Err(SubmitError::NotANode(path("@releaseDomain"))));
    let many = Job::Read(vec![path("/a"); limits::NODES_PER_JOB_MAX + 1]);
    assert_eq!(client.submit(many), Err(SubmitError::TooManyNodes));
}

#[test]
fn jobs_are_bounded_until_their_completions_are_taken() {
    let mut client = client();
    for _ in 0..limits::JOBS_MAX {
        client.submit(Job::Read(vec![])).unwrap();
    }
    assert_eq!(client.submit(Job::Read(vec![])), Err(SubmitError::Full));
    assert!(client.event().is_some());
    assert!(client.submit(Job::Read(vec![])).is_ok());
}

#[test]
fn a_transaction_reads_guards_then_edits_then_commits() {
    let mut client = client();
    let guards = vec![
        (path("/g"), Guard::Equals(b"1".to_vec())),
        (path("/h"), Guard::Absent),
        (path("/i"), Guard::Exists),
    ];
    let edits = vec![Edit::Write(path("/a"), b"v".to_vec()), Edit::Remove(path("/b"))];
    let id = client.submit(Job::Transaction { guards, edits }).unwrap();
    let start = sent(&mut client);
    assert_eq!((start[0].0, start[0].2, start[0].3.as_str()), (MessageType::TransactionStart, 0, "\0"));
    reply(&mut client, MessageType::TransactionStart, start[0].1, b"9\0");
    let reads = sent(&mut client);
    assert!(reads.iter().all(|m| m.0 == MessageType::Read && m.2 == 9) && reads.len() == 3);
    reply(&mut client, MessageType::Read, reads[0].1, b"1");
    refuse(&mut client, reads[1].1, "ENOENT");
    assert!(sent(&mut client).is_empty(), "edits must wait for all guards");
    reply(&mut client, MessageType::Read, reads[2].1, b"");
    let edits = sent(&mut client);
    assert_eq!(edits[0].3, "/a\0v");
    assert_eq!((edits[1].0, edits[1].2), (MessageType::Rm, 9));
    reply(&mut client, MessageType::Write, edits[0].1, b"OK\0");
    assert!(sent(&mut client).is_empty(), "the commit must wait for all edits");
    refuse(&mut client, edits[1].1, "ENOENT");
    let end = sent(&mut client);
    assert_eq!((end[0].0, end[0].2, end[0].3.as_str()), (MessageType::TransactionEnd, 9, "T\0"));
    reply(&mut client, MessageType::TransactionEnd, end[0].1, b"OK\0");
    assert_eq!(outcome(&mut client, id), Outcome::Committed { attempts: 1 });
}

#[test]
fn a_guard_that_does_not_hold_discards() {
    for (guard, answer, found) in [
        (Guard::Equals(b"1".to_vec()), Some("2"), Ok(b"2".to_vec())),
        (Guard::Equals(b"1".to_vec()), None, Err(ErrorCode::Missing)),
        (Guard::Exists, None, Err(ErrorCode::Missing)),
        (Guard::Absent, Some(""), Ok(vec![])),
    ] {
        let mut client = client();
        let edits = vec![Edit::Mkdir(path("/a"))];
        let id = client.submit(Job::Transaction { guards: vec![(path("/g"), guard)], edits }).unwrap();
        agree(&mut client);
        let read = sent(&mut client);
        match answer {
            Some(value) => reply(&mut client, MessageType::Read, read[0].1, value.as_bytes()),
            None => refuse(&mut client, read[0].1, "ENOENT"),
        }
        let end = agree(&mut client);
        assert_eq!((end.len(), end[0].3.as_str()), (1, "F\0"));
        assert_eq!(outcome(&mut client, id), Outcome::GuardFailed { path: path("/g"), found });
    }
}

#[test]
fn an_absent_guard_does_not_take_a_denial_for_absence() {
    let mut client = client();
    let guards = vec![(path("/g"), Guard::Absent)];
    let id = client.submit(Job::Transaction { guards, edits: vec![] }).unwrap();
    agree(&mut client);
    let read = sent(&mut client);
    refuse(&mut client, read[0].1, "EACCES");
    agree(&mut client);
    let failed = Outcome::GuardFailed { path: path("/g"), found: Err(ErrorCode::Denied) };
    assert_eq!(outcome(&mut client, id), failed);
}

#[test]
fn a_refused_edit_discards_all() {
    let mut client = client();
    let edits = vec![Edit::Mkdir(path("/a")), Edit::Mkdir(path("/b"))];
    let id = client.submit(Job::Transaction { guards: vec![], edits }).unwrap();
    agree(&mut client);
    let edits = sent(&mut client);
    refuse(&mut client, edits[0].1, "ENOSPC");
    assert!(sent(&mut client).is_empty(), "the end must wait for the other edit");
    reply(&mut client, MessageType::Mkdir, edits[1].1, b"OK\0");
    assert_eq!(agree(&mut client)[0].3, "F\0");
    let failure = Failure::Refused { path: Some(path("/a")), code: ErrorCode::NoSpace };
    assert_eq!(outcome(&mut client, id), Outcome::Failed(failure));
}

#[test]
fn a_clash_is_redone_whole_after_a_pause_and_given_up_in_the_end() {
    let mut client = client();
    let guards = vec![(path("/g"), Guard::Exists)];
    let edits = vec![Edit::Mkdir(path("/a"))];
    let id = client.submit(Job::Transaction { guards, edits }).unwrap();
    let mut attempts = 0;
    let conflict = loop {
        attempts += 1;
        assert_eq!(agree(&mut client)[0].0, MessageType::TransactionStart);
        assert_eq!(agree(&mut client)[0].0, MessageType::Read);
        assert_eq!(agree(&mut client)[0].0, MessageType::Mkdir);
        let end = sent(&mut client);
        refuse(&mut client, end[0].1, "EAGAIN");
        if let Some(Event::Job { id: done, outcome }) = client.event() {
            assert_eq!(done, id);
            break outcome;
        }
        assert!(sent(&mut client).is_empty(), "there must be a pause");
        let at = client.timeout().expect("a time to try again");
        client.handle_time(at - 1);
        assert!(sent(&mut client).is_empty());
        client.handle_time(at);
    };
    assert!((8..=limits::TRANSACTION_ATTEMPTS_MAX).contains(&attempts), "{attempts} attempts");
    assert_eq!(conflict, Outcome::Failed(Failure::Conflict { attempts }));
    assert_eq!(client.timeout(), None);
}

#[test]
fn few_transactions_are_open_at_once_and_all_get_their_turn() {
    let mut client = client();
    let mut ids = vec![];
    for n in 0..10 {
        let edits = vec![Edit::Mkdir(path(&alloc::format!("/{n}")))];
        ids.push(client.submit(Job::Transaction { guards: vec![], edits }).unwrap());
    }
    let starts = sent(&mut client);
    assert_eq!(starts.len(), limits::TRANSACTIONS_OPEN_MAX);
    for (_, request, ..) in starts {
        reply(&mut client, MessageType::TransactionStart, request, b"9\0");
    }
    while !agree(&mut client).is_empty() {}
    for id in ids {
        assert_eq!(outcome(&mut client, id), Outcome::Committed { attempts: 1 });
    }
}

#[test]
fn the_quota_of_transactions_is_waited_for() {
    let mut client = client();
    let id = client.submit(Job::Transaction { guards: vec![], edits: vec![] }).unwrap();
    let start = sent(&mut client);
    refuse(&mut client, start[0].1, "ENOSPC");
    client.handle_time(client.timeout().unwrap());
    while !agree(&mut client).is_empty() {}
    assert_eq!(outcome(&mut client, id), Outcome::Committed { attempts: 2 });
}

#[test]
fn long_directories_come_in_parts_and_start_over_when_they_change() {
    let mut client = client();
    let id = client.submit(Job::List(path("/d"))).unwrap();
    let whole = sent(&mut client);
    refuse(&mut client, whole[0].1, "E2BIG");
    let mut part = |wanted: &str, payload: &[u8]| {
        let asked = sent(&mut client);
        assert_eq!((asked[0].0, asked[0].3.as_str()), (MessageType::DirectoryPart, wanted));
        reply(&mut client, MessageType::DirectoryPart, asked[0].1, payload);
    };
    part("/d\x000\0", b"5\0a\0bc\0");
    part("/d\x005\0", b"6\0d\0");
    part("/d\x000\0", b"6\0x\0");
    part("/d\x002\0", b"6\0y\0\0");
    assert_eq!(outcome(&mut client, id), Outcome::Listed(vec!["x".to_string(), "y".to_string()]));
    let id = client.submit(Job::List(path("/d"))).unwrap();
    let whole = sent(&mut client);
    reply(&mut client, MessageType::Directory, whole[0].1, b"");
    assert_eq!(outcome(&mut client, id), Outcome::Listed(vec![]));
}

#[test]
fn a_directory_that_never_holds_still_or_never_ends_is_given_up() {
    for (step, wanted) in [(1, Failure::ListKeepsChanging), (0, Failure::ListTooLong)] {
        let mut client = client();
        let id = client.submit(Job::List(path("/d"))).unwrap();
        let whole = sent(&mut client);
        refuse(&mut client, whole[0].1, "E2BIG");
        let mut generation = 0;
        let failed = loop {
            let Some((kind, request, ..)) = sent(&mut client).pop() else {
                break client.event();
            };
            generation += step;
            let payload = alloc::format!("{generation}\0{}\0", "n".repeat(4000));
            reply(&mut client, kind, request, payload.as_bytes());
        };
        assert_eq!(failed, Some(Event::Job { id, outcome: Outcome::Failed(wanted) }));
    }
}

#[test]
fn permissions_are_read_and_set() {
    let mut client = client();
    let id = client.submit(Job::Permissions(path("/a"))).unwrap();
    let asked = sent(&mut client);
    reply(&mut client, MessageType::GetPerms, asked[0].1, b"n0\0r7\0");
    let list =
        vec![Permission { domain: 0, access: Access::None }, Permission { domain: 7, access: Access::Read }];
    assert_eq!(outcome(&mut client, id), Outcome::Permissions(list.clone()));
    client.submit(Job::Edit(Edit::SetPermissions(path("/a"), list))).unwrap();
    assert_eq!(sent(&mut client)[0].3, "/a\0n0\0r7\0");
}

fn fire(client: &mut Client, path: &str, token: &str) {
    let payload = alloc::format!("{path}\0{token}\0");
    // The kernel puts junk into the header of watch events.
    reply(client, MessageType::WatchEvent, 0xdead_beef, payload.as_bytes());
}

#[test]
fn watch_events_before_the_reply_are_kept_and_twins_merged() {
    let mut client = client();
    client.watch(&path("/w"), WatchToken(3)).unwrap();
    let asked = sent(&mut client);
    assert_eq!(asked[0].3, "/w\x003\0");
    fire(&mut client, "/w", "3");
    fire(&mut client, "/w/a", "3");
    fire(&mut client, "/w/a", "3");
    fire(&mut client, "/elsewhere", "3");
    fire(&mut client, "/w", "4");
    fire(&mut client, "/w", "junk");
    reply(&mut client, MessageType::Watch, asked[0].1, b"OK\0");
    let event = |p: &str| Some(Event::Watch { token: WatchToken(3), path: path(p) });
    assert_eq!(client.event(), event("/w"));
    assert_eq!(client.event(), event("/w/a"));
    assert_eq!(client.event(), None);
    assert_eq!((client.statistics().events_coalesced, client.statistics().events_ignored), (1, 3));
    fire(&mut client, "/w/a", "3");
    assert_eq!(client.event(), event("/w/a"), "taken events may come again");
}

#[test]
fn a_flood_of_events_is_bounded_and_starves_nobody() {
    let mut client = client();
    client.watch(&path("/flood"), WatchToken(1)).unwrap();
    client.watch(&path("/calm"), WatchToken(2)).unwrap();
    agree(&mut client);
    fire(&mut client, "/flood/first", "1");
    fire(&mut client, "/calm", "2");
    for n in 0..100_000 {
        fire(&mut client, &alloc::format!("/flood/{n}"), "1");
    }
    let event = |p: &str, t| Some(Event::Watch { token: WatchToken(t), path: path(p) });
    assert_eq!(client.event(), event("/flood", 1), "all of them as one event for the watched path");
    assert_eq!(client.event(), event("/calm", 2));
    assert_eq!(client.event(), None);
    fire(&mut client, "/flood/again", "1");
    assert_eq!(client.event(), event("/flood/again", 1));
}

#[test]
fn long_paths_are_bounded_over_all_watches() {
    let mut client = client();
    let long = "x".repeat(2000);
    for token in 0..200 {
        client.watch(&path(&alloc::format!("/{token}")), WatchToken(token)).unwrap();
        agree(&mut client);
        for n in 0..limits::EVENTS_PER_WATCH_MAX {
            fire(&mut client, &alloc::format!("/{token}/{long}{n}"), &token.to_string());
        }
    }
    let mut bytes = 0;
    let mut seen = alloc::collections::BTreeSet::new();
    while let Some(Event::Watch { token, path }) = client.event() {
        bytes += path.as_str().len();
        seen.insert(token);
    }
    assert!(bytes <= limits::EVENT_BYTES_MAX + 200 * 4, "{bytes} bytes");
    assert_eq!(seen.len(), 200, "every watch must have fired");
}

#[test]
fn an_ended_watch_is_silent_and_can_be_taken_up_again() {
    let mut client = client();
    client.watch(&path("/w"), WatchToken(1)).unwrap();
    agree(&mut client);
    fire(&mut client, "/w", "1");
    client.unwatch(&path("/w"), WatchToken(1));
    fire(&mut client, "/w", "1");
    assert_eq!(client.event(), None);
    client.watch(&path("/w"), WatchToken(1)).unwrap();
    assert_eq!(client.event(), Some(Event::Watch { token: WatchToken(1), path: path("/w") }));
    let asked = sent(&mut client);
    assert_eq!(asked[0].0, MessageType::Unwatch);
    reply(&mut client, MessageType::Unwatch, asked[0].1, b"OK\0");
    assert_eq!(agree(&mut client)[0].0, MessageType::Watch);
    client.unwatch(&path("/w"), WatchToken(1));
    assert_eq!(agree(&mut client)[0].0, MessageType::Unwatch);
    assert!(sent(&mut client).is_empty());
}

#[test]
fn a_refused_watch_is_told_and_forgotten() {
    let mut client = client();
    client.watch(&path("@releaseDomain"), WatchToken(1)).unwrap();
    let asked = sent(&mut client);
    refuse(&mut client, asked[0].1, "EACCES");
    let failed =
        Event::WatchFailed { token: WatchToken(1), path: path("@releaseDomain"), code: ErrorCode::Denied };
    assert_eq!(client.event(), Some(failed));
    client.disconnected();
    client.connected();
    assert!(sent(&mut client).is_empty());
}

#[test]
fn a_lost_connection_fails_every_job_and_registers_every_watch_again() {
    let mut client = client();
    client.watch(&path("/w"), WatchToken(1)).unwrap();
    agree(&mut client);
    fire(&mut client, "/w/x", "1");
    let read = client.submit(Job::Read(vec![path("/a")])).unwrap();
    let write = client.submit(Job::Edit(Edit::Mkdir(path("/b")))).unwrap();
    let guarded =
        client.submit(Job::Transaction { guards: vec![], edits: vec![Edit::Mkdir(path("/c"))] }).unwrap();
    sent(&mut client);
    client.receive(&[2, 0, 0]).unwrap();
    client.disconnected();
    assert_eq!((client.transmit(), client.requests_outstanding()), (None, 0));
    for (id, maybe_applied) in [(read, false), (write, true), (guarded, false)] {
        assert_eq!(outcome(&mut client, id), Outcome::Failed(Failure::ConnectionLost { maybe_applied }));
    }
    assert_eq!(client.event(), None, "events of the old connection are covered by the reset");
    client.connected();
    client.submit(Job::Edit(Edit::Mkdir(path("/lost")))).unwrap();
    client.disconnected();
    let lost = client.event();
    assert!(matches!(lost, Some(Event::Job { .. })), "{lost:?}: the reset of an ended connection is void");
    let late = client.submit(Job::Edit(Edit::Mkdir(path("/d")))).unwrap();
    client.connected();
    assert_eq!(client.event(), Some(Event::Reset));
    let again = agree(&mut client);
    assert_eq!((again[0].0, again[1].0, again.len()), (MessageType::Watch, MessageType::Mkdir, 2));
    assert_eq!(outcome(&mut client, late), Outcome::Done);
}

#[test]
fn a_commit_on_its_way_is_told_from_one_that_was_not() {
    let mut client = client();
    let id =
        client.submit(Job::Transaction { guards: vec![], edits: vec![Edit::Mkdir(path("/c"))] }).unwrap();
    agree(&mut client);
    agree(&mut client);
    assert_eq!(sent(&mut client)[0].3, "T\0");
    client.disconnected();
    let lost = Failure::ConnectionLost { maybe_applied: true };
    assert_eq!(outcome(&mut client, id), Outcome::Failed(lost));
}

#[test]
fn a_server_that_breaks_the_protocol_is_dropped() {
    let ask = |client: &mut Client| {
        client.submit(Job::Read(vec![path("/a")])).unwrap();
        sent(client)[0].1
    };
    let raw = |kind: u32, request: u32, length: u32, payload: &[u8]| {
        let mut bytes = Header { kind, request, transaction: 0, length }.to_bytes().to_vec();
        bytes.extend_from_slice(payload);
        bytes
    };
    let cases: [(Vec<u8>, ProtocolError); 6] = [
        (raw(2, 1, 4097, b""), ProtocolError::PayloadTooLong(4097)),
        (raw(77, 1, 0, b""), ProtocolError::UnknownType(77)),
        (raw(2, 99, 0, b""), ProtocolError::UnknownRequest(99)),
        (
            raw(11, 1, 0, b""),
            ProtocolError::WrongType { asked: MessageType::Read, answered: MessageType::Write },
        ),
        (raw(15, 0, 2, b"/a"), ProtocolError::Malformed(MessageType::WatchEvent)),
        (raw(15, 0, 7, b"/a\x001\0x\0"), ProtocolError::Malformed(MessageType::WatchEvent)),
    ];
    for (bytes, error) in cases {
        let mut client = client();
        assert_eq!(ask(&mut client), 1);
        assert_eq!(client.receive(&bytes), Err(error));
        assert!(!client.is_connected());
        client.submit(Job::Read(vec![path("/b")])).unwrap();
        assert_eq!(client.transmit(), None);
        assert_eq!(client.receive(b""), Err(error), "the connection stays unusable");
        client.disconnected();
        client.connected();
        assert!(client.is_connected());
    }
}

#[test]
fn an_answer_to_a_request_not_yet_sent_breaks_the_protocol() {
    let mut client = client();
    client.submit(Job::Read(vec![path("/a")])).unwrap();
    let early = wire::encode(MessageType::Read, 1, 0, &[b"guess"]).unwrap();
    assert_eq!(client.receive(&early), Err(ProtocolError::UnknownRequest(1)));
}

#[test]
fn malformed_payloads_break_the_protocol() {
    type Case = (Job, MessageType, &'static [u8]);
    let transaction = || Job::Transaction { guards: vec![], edits: vec![] };
    let cases: [Case; 7] = [
        (Job::List(path("/a")), MessageType::Directory, b"name"),
        (Job::List(path("/a")), MessageType::Directory, b"a/b\0"),
        (Job::List(path("/a")), MessageType::Directory, b"a\0\0"),
        (Job::Permissions(path("/a")), MessageType::GetPerms, b""),
        (transaction(), MessageType::TransactionStart, b"9"),
        (transaction(), MessageType::TransactionStart, b"0\0"),
        (transaction(), MessageType::TransactionStart, b"4294967296\0"),
    ];
    for (job, kind, payload) in cases {
        let mut client = client();
        client.submit(job).unwrap();
        let request = sent(&mut client)[0].1;
        let bytes = wire::encode(kind, request, 0, &[payload]).unwrap();
        assert_eq!(client.receive(&bytes), Err(ProtocolError::Malformed(kind)), "{payload:?}");
    }
}

#[test]
fn a_message_refused_by_the_kernel_fails_what_it_was_for() {
    let mut client = client();
    client.watch(&path("/w"), WatchToken(1)).unwrap();
    let id = client.submit(Job::Edit(Edit::Mkdir(path("/a")))).unwrap();
    client.refused(ErrorCode::TooBig).unwrap();
    client.refused(ErrorCode::Io).unwrap();
    let refused = Failure::Refused { path: Some(path("/a")), code: ErrorCode::Io };
    assert_eq!(outcome(&mut client, id), Outcome::Failed(refused));
    let failed = Event::WatchFailed { token: WatchToken(1), path: path("/w"), code: ErrorCode::TooBig };
    assert_eq!(client.event(), Some(failed));
    assert_eq!(client.transmit(), None);
}

#[test]
fn writes_may_be_partial() {
    let mut client = client();
    client.submit(Job::Edit(Edit::Write(path("/a"), b"value".to_vec()))).unwrap();
    let mut bytes = vec![];
    while let Some(rest) = client.transmit() {
        let some = rest.len().min(3);
        bytes.extend_from_slice(&rest[..some]);
        client.transmitted(some);
    }
    assert_eq!(bytes, wire::encode(MessageType::Write, 1, 0, &[b"/a\0value"]).unwrap());
}

#[test]
fn request_numbers_wrap_around_those_in_use() {
    let mut client = client();
    client.last_request = u32::MAX - 1;
    client.submit(Job::Read(vec![path("/a"), path("/b"), path("/c")])).unwrap();
    let numbers: Vec<u32> = sent(&mut client).iter().map(|m| m.1).collect();
    assert_eq!(numbers, [u32::MAX, 1, 2]);
    client.last_request = 0;
    client.submit(Job::Read(vec![path("/d")])).unwrap();
    assert_eq!(sent(&mut client)[0].1, 3);
}
