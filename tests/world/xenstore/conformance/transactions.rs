//! Transactions: nothing is seen before the commit, all of it after; clashes are told and redone.

use ::xenstore::wire::MessageType;
use ::xenstore::{Edit, ErrorCode, Failure, Guard, Job, Outcome, WatchToken};

use super::bench::Bench;
use super::{Check, Verdict, ensure, same};

type Result = std::result::Result<Verdict, String>;

const TOKEN: WatchToken = WatchToken(79);

pub(super) const CHECKS: &[Check] = &[
    ("a transaction is seen by nobody before its commit", isolation),
    ("a discarded transaction leaves nothing", discard),
    ("watches fire after the commit and not before", watch_after_commit),
    ("a commit after a change of what was read is EAGAIN", conflict),
    ("a commit after a node that was missing has come is EAGAIN", conflict_missing),
    ("a write outside does not disturb a transaction elsewhere", no_conflict),
    ("a clash is redone by the client until it holds", redone),
    ("guards that hold let the edits through", guards_hold),
    ("guards that fail leave everything as it was", guards_fail),
    ("a refused edit leaves everything as it was", refused_edit),
    ("removing and writing anew in one transaction", remove_and_write),
    ("several transactions may be open at once", several),
    ("an unknown transaction is ENOENT", unknown),
    ("a transaction inside a transaction is EBUSY", nested),
];

fn isolation(bench: &mut Bench) -> Result {
    bench.write("a", "old")?;
    let at = bench.at("a")?;
    let number = bench.raw.start()?;
    let write = format!("{at}\0new");
    same!(bench.raw.ask(MessageType::Write, number, write.as_bytes())?, Ok(b"OK\0".to_vec()));
    same!(bench.raw.ask(MessageType::Read, number, format!("{at}\0").as_bytes())?, Ok(b"new".to_vec()));
    same!(bench.read("a")?, Ok("old".to_owned()));
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"T\0")?, Ok(b"OK\0".to_vec()));
    same!(bench.read("a")?, Ok("new".to_owned()));
    Ok(Verdict::Good)
}

fn discard(bench: &mut Bench) -> Result {
    bench.write("a", "old")?;
    let number = bench.raw.start()?;
    for name in ["a", "b/c"] {
        let write = format!("{}\0new", bench.at(name)?);
        same!(bench.raw.ask(MessageType::Write, number, write.as_bytes())?, Ok(b"OK\0".to_vec()));
    }
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"F\0")?, Ok(b"OK\0".to_vec()));
    same!(bench.read("a")?, Ok("old".to_owned()));
    same!(bench.read("b")?, Err(ErrorCode::Missing));
    Ok(Verdict::Good)
}

fn watch_after_commit(bench: &mut Bench) -> Result {
    let watched = bench.at("w")?;
    bench.write("w", "")?;
    bench.watch(&watched, TOKEN)?;
    let number = bench.raw.start()?;
    let node = bench.at("w/a")?;
    same!(bench.raw.ask(MessageType::Write, number, format!("{node}\0x").as_bytes())?, Ok(b"OK\0".to_vec()));
    // Waiting for the end of the events changes the watched node, which the commit below must not depend on.
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"F\0")?, Ok(b"OK\0".to_vec()));
    same!(bench.events(TOKEN, &watched)?, []);
    let number = bench.raw.start()?;
    same!(bench.raw.ask(MessageType::Write, number, format!("{node}\0x").as_bytes())?, Ok(b"OK\0".to_vec()));
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"T\0")?, Ok(b"OK\0".to_vec()));
    let events = bench.events(TOKEN, &watched)?;
    ensure!(events.contains(&node), "after the commit: {events:?}");
    bench.unwatch(&watched, TOKEN);
    Ok(Verdict::Good)
}

fn conflict(bench: &mut Bench) -> Result {
    bench.write("a", "1")?;
    let read = format!("{}\0", bench.at("a")?);
    let number = bench.raw.start()?;
    same!(bench.raw.ask(MessageType::Read, number, read.as_bytes())?, Ok(b"1".to_vec()));
    bench.write("a", "2")?;
    let write = format!("{}\0x", bench.at("b")?);
    same!(bench.raw.ask(MessageType::Write, number, write.as_bytes())?, Ok(b"OK\0".to_vec()));
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"T\0")?, Err(ErrorCode::Again));
    same!(bench.read("b")?, Err(ErrorCode::Missing));
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"T\0")?, Err(ErrorCode::Missing));
    Ok(Verdict::Good)
}

fn conflict_missing(bench: &mut Bench) -> Result {
    let read = format!("{}\0", bench.at("a")?);
    let number = bench.raw.start()?;
    same!(bench.raw.ask(MessageType::Read, number, read.as_bytes())?, Err(ErrorCode::Missing));
    bench.write("a", "2")?;
    let write = format!("{}\0x", bench.at("b")?);
    same!(bench.raw.ask(MessageType::Write, number, write.as_bytes())?, Ok(b"OK\0".to_vec()));
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"T\0")?, Err(ErrorCode::Again));
    Ok(Verdict::Good)
}

fn no_conflict(bench: &mut Bench) -> Result {
    bench.write("a/x", "")?;
    bench.write("b/x", "")?;
    let number = bench.raw.start()?;
    let write = format!("{}\0new", bench.at("a/x")?);
    same!(bench.raw.ask(MessageType::Write, number, write.as_bytes())?, Ok(b"OK\0".to_vec()));
    bench.write("b/x", "meanwhile")?;
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"T\0")?, Ok(b"OK\0".to_vec()));
    same!(bench.read("a/x")?, Ok("new".to_owned()));
    Ok(Verdict::Good)
}

/// Changes the guarded node after the client has read it and before it commits, for its first three attempts: in
/// between the client reads but does not write.
fn redone(bench: &mut Bench) -> Result {
    bench.write("g", "0")?;
    let (guarded, target) = (bench.at("g")?, bench.at("t")?);
    let guards = vec![(guarded.clone(), Guard::Exists)];
    let edits = vec![Edit::Write(target, b"done".to_vec())];
    let id = bench.submit(Job::Transaction { guards, edits })?;
    let before = bench.xenbus.session().statistics().transactions_redone;
    for round in 0..60 {
        // Each reply lets the client take one step: start, guard, edit, end.
        if bench.xenbus.timeout().is_some() {
            break;
        }
        bench.wait_readable()?;
        bench.raw.write(&guarded, &round.to_string())?;
        let now_ms = bench.now_ms();
        bench.xenbus.handle_readable(now_ms);
    }
    let outcome = bench.outcome(id)?;
    let Outcome::Committed { attempts } = outcome else { return Err(format!("{outcome:?}")) };
    ensure!(attempts > 1, "committed at once although what it read had changed");
    same!(bench.xenbus.session().statistics().transactions_redone - before, u64::from(attempts) - 1);
    same!(bench.read("t")?, Ok("done".to_owned()));
    Ok(Verdict::Good)
}

fn guards_hold(bench: &mut Bench) -> Result {
    bench.write("a", "1")?;
    let guards = vec![
        (bench.at("a")?, Guard::Equals(b"1".to_vec())),
        (bench.at("a")?, Guard::Exists),
        (bench.at("b")?, Guard::Absent),
    ];
    let edits = vec![Edit::Write(bench.at("a")?, b"2".to_vec()), Edit::Mkdir(bench.at("b")?)];
    let outcome = bench.run(Job::Transaction { guards, edits })?;
    ensure!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    same!(bench.read("a")?, Ok("2".to_owned()));
    same!(bench.read("b")?, Ok(String::new()));
    Ok(Verdict::Good)
}

fn guards_fail(bench: &mut Bench) -> Result {
    bench.write("a", "1")?;
    let (there, missing) = (bench.at("a")?, bench.at("b")?);
    let one = || Ok(b"1".to_vec());
    for (at, guard, found) in [
        (&there, Guard::Absent, one()),
        (&there, Guard::Equals(b"2".to_vec()), one()),
        (&missing, Guard::Exists, Err(ErrorCode::Missing)),
        (&missing, Guard::Equals(vec![]), Err(ErrorCode::Missing)),
    ] {
        let edits = vec![Edit::Write(there.clone(), b"changed".to_vec())];
        let job = Job::Transaction { guards: vec![(at.clone(), guard)], edits };
        same!(bench.run(job)?, Outcome::GuardFailed { path: at.clone(), found });
        same!(bench.read("a")?, Ok("1".to_owned()));
    }
    Ok(Verdict::Good)
}

fn refused_edit(bench: &mut Bench) -> Result {
    bench.write("a", "1")?;
    let missing = bench.at("no/such/node")?;
    let list = vec![::xenstore::Permission { domain: bench.domain, access: ::xenstore::Access::None }];
    let edits = vec![
        Edit::Write(bench.at("a")?, b"2".to_vec()),
        Edit::SetPermissions(missing.clone(), list),
        Edit::Write(bench.at("b")?, vec![]),
    ];
    let refused = Failure::Refused { path: Some(missing), code: ErrorCode::Missing };
    same!(bench.run(Job::Transaction { guards: vec![], edits })?, Outcome::Failed(refused));
    same!(bench.read("a")?, Ok("1".to_owned()));
    same!(bench.read("b")?, Err(ErrorCode::Missing));
    Ok(Verdict::Good)
}

fn remove_and_write(bench: &mut Bench) -> Result {
    bench.write("a/old", "1")?;
    let edits = vec![Edit::Remove(bench.at("a")?), Edit::Write(bench.at("a/new")?, b"2".to_vec())];
    let outcome = bench.run(Job::Transaction { guards: vec![], edits })?;
    ensure!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    same!(bench.list("a")?, Ok(vec!["new".to_owned()]));
    same!(bench.read("a/old")?, Err(ErrorCode::Missing));
    Ok(Verdict::Good)
}

fn several(bench: &mut Bench) -> Result {
    let mut ids = Vec::new();
    for round in 0..8 {
        let name = format!("d{round}/n");
        let edits = vec![Edit::Write(bench.at(&name)?, b"x".to_vec())];
        ids.push((name, bench.submit(Job::Transaction { guards: vec![], edits })?));
    }
    let wanted: Vec<_> = ids.iter().map(|(_, id)| *id).collect();
    let mut left = wanted.len();
    bench.until(|_, event| match event {
        ::xenstore::Event::Job { id, outcome: Outcome::Committed { .. } } if wanted.contains(id) => {
            left -= 1;
            (left == 0).then_some(())
        }
        _ => None,
    })?;
    for (name, _) in ids {
        same!(bench.read(&name)?, Ok("x".to_owned()));
    }
    Ok(Verdict::Good)
}

fn unknown(bench: &mut Bench) -> Result {
    let read = format!("{}\0", bench.scratch);
    same!(bench.raw.ask(MessageType::Read, 0x00ab_cdef, read.as_bytes())?, Err(ErrorCode::Missing));
    same!(bench.raw.ask(MessageType::TransactionEnd, 0x00ab_cdef, b"T\0")?, Err(ErrorCode::Missing));
    Ok(Verdict::Good)
}

fn nested(bench: &mut Bench) -> Result {
    if !bench.socket {
        return Ok(Verdict::Skipped("the kernel's device looks into starts itself"));
    }
    let number = bench.raw.start()?;
    same!(bench.raw.ask(MessageType::TransactionStart, number, b"\0")?, Err(ErrorCode::Busy));
    same!(bench.raw.ask(MessageType::TransactionEnd, number, b"F\0")?, Ok(b"OK\0".to_vec()));
    Ok(Verdict::Good)
}
