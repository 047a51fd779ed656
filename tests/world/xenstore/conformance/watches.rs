//! Watches: when they fire, and with which path.

use ::xenstore::wire::MessageType;
use ::xenstore::{Access, Edit, ErrorCode, Job, Outcome, Permission, WatchToken};
use std::time::{Duration, Instant};

use super::bench::Bench;
use super::{Check, Verdict, ensure, same};

type Result = std::result::Result<Verdict, String>;

const TOKEN: WatchToken = WatchToken(77);

pub(super) const CHECKS: &[Check] = &[
    ("a watch fires at registration", registration),
    ("a watch on a missing node fires when it is made", missing),
    ("a watch fires for the node, its children and grandchildren", below),
    ("a watch fires again for the same value", same_value),
    ("a watch does not fire for a node of a longer name", longer_name),
    ("a watch fires when permissions change", permissions),
    ("removing a parent fires with the watched path", parent_removed),
    ("two watches on a node both fire", two),
    ("an ended watch is silent", ended),
    ("events of another connection's changes arrive", others),
    ("a relative watch fires with relative paths", relative),
    ("the same watch twice is EEXIST, an unknown one ENOENT", twice),
    ("a flood of events comes through, merged", flood),
];

fn registration(bench: &mut Bench) -> Result {
    let at = bench.scratch.clone();
    bench.watch(&at, TOKEN)?;
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn missing(bench: &mut Bench) -> Result {
    let at = bench.at("not/yet")?;
    bench.watch(&at, TOKEN)?;
    bench.write("not/yet", "now")?;
    same!(bench.event(TOKEN)?, at);
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn below(bench: &mut Bench) -> Result {
    let at = bench.at("a")?;
    bench.watch(&at, TOKEN)?;
    for name in ["a", "a/b", "a/c/d/e"] {
        bench.write(name, "")?;
        same!(bench.event(TOKEN)?, bench.at(name)?);
    }
    bench.remove("a/b")?;
    let events = bench.events(TOKEN, &at)?;
    ensure!(events.contains(&bench.at("a/b")?), "removal gave {events:?}");
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn same_value(bench: &mut Bench) -> Result {
    bench.write("a", "4")?;
    let at = bench.at("a")?;
    bench.watch(&at, TOKEN)?;
    bench.write("a", "4")?;
    same!(bench.event(TOKEN)?, at);
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn longer_name(bench: &mut Bench) -> Result {
    let at = bench.at("a")?;
    bench.write("a", "")?;
    bench.watch(&at, TOKEN)?;
    bench.write("ab", "")?;
    bench.write("ab/c", "")?;
    same!(bench.events(TOKEN, &at)?, []);
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn permissions(bench: &mut Bench) -> Result {
    bench.write("a", "")?;
    let at = bench.at("a")?;
    bench.watch(&at, TOKEN)?;
    let list = vec![Permission { domain: bench.domain, access: Access::Read }];
    same!(bench.run(Job::Edit(Edit::SetPermissions(at.clone(), list)))?, Outcome::Done);
    same!(bench.event(TOKEN)?, at);
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn parent_removed(bench: &mut Bench) -> Result {
    bench.write("a/b/state", "4")?;
    let at = bench.at("a/b/state")?;
    bench.watch(&at, TOKEN)?;
    bench.remove("a")?;
    same!(bench.event(TOKEN)?, at);
    same!(bench.read("a/b/state")?, Err(ErrorCode::Missing));
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn two(bench: &mut Bench) -> Result {
    let (at, other) = (bench.at("a")?, WatchToken(78));
    bench.watch(&at, TOKEN)?;
    bench.watch(&at, other)?;
    bench.write("a/b", "")?;
    same!(bench.event(TOKEN)?, bench.at("a/b")?);
    same!(bench.event(other)?, bench.at("a/b")?);
    bench.unwatch(&at, TOKEN);
    bench.write("a/c", "")?;
    same!(bench.event(other)?, bench.at("a/c")?);
    bench.unwatch(&at, other);
    Ok(Verdict::Good)
}

fn ended(bench: &mut Bench) -> Result {
    let (at, other) = (bench.at("a")?, WatchToken(78));
    bench.watch(&at, TOKEN)?;
    bench.unwatch(&at, TOKEN);
    bench.watch(&at, other)?;
    bench.write("a", "")?;
    same!(bench.event(other)?, at);
    bench.unwatch(&at, other);
    bench.watch(&at, TOKEN)?;
    same!(bench.events(TOKEN, &at)?, []);
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn others(bench: &mut Bench) -> Result {
    let at = bench.at("a")?;
    bench.watch(&at, TOKEN)?;
    bench.raw.write(&at, "from elsewhere")?;
    same!(bench.event(TOKEN)?, at);
    same!(bench.read("a")?, Ok("from elsewhere".to_owned()));
    bench.unwatch(&at, TOKEN);
    Ok(Verdict::Good)
}

fn relative(bench: &mut Bench) -> Result {
    let home = format!("/local/domain/{}/", bench.domain);
    let at = bench.at("a")?;
    let Some(short) = at.as_str().strip_prefix(&home).map(str::to_owned) else {
        return Err("no relative spelling".to_owned());
    };
    let mut raw = bench.another()?;
    match raw.ask(MessageType::Watch, 0, format!("{short}\0tok\0").as_bytes())? {
        Err(ErrorCode::Invalid) if bench.socket => {
            return Ok(Verdict::Skipped("this socket takes no relative paths"));
        }
        reply => same!(reply, Ok(b"OK\0".to_vec())),
    }
    bench.write("a/b", "")?;
    let wanted = format!("{short}/b\0tok\0").into_bytes();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let Some((_, payload)) = raw.next(deadline)? else { return Err("no event".to_owned()) };
        if payload == wanted {
            return Ok(Verdict::Good);
        }
        same!(payload, format!("{short}\0tok\0").into_bytes());
    }
}

fn twice(bench: &mut Bench) -> Result {
    if !bench.socket {
        return Ok(Verdict::Skipped("the kernel keeps the watches of its device"));
    }
    let mut raw = bench.another()?;
    let payload = format!("{}\0tok\0", bench.scratch);
    same!(raw.ask(MessageType::Watch, 0, payload.as_bytes())?, Ok(b"OK\0".to_vec()));
    same!(raw.ask(MessageType::Watch, 0, payload.as_bytes())?, Err(ErrorCode::Exists));
    same!(raw.ask(MessageType::Unwatch, 0, payload.as_bytes())?, Ok(b"OK\0".to_vec()));
    same!(raw.ask(MessageType::Unwatch, 0, payload.as_bytes())?, Err(ErrorCode::Missing));
    Ok(Verdict::Good)
}

fn flood(bench: &mut Bench) -> Result {
    let at = bench.scratch.clone();
    bench.watch(&at, TOKEN)?;
    for round in 0..100 {
        let node = bench.at(&format!("n{}", round % 50))?;
        bench.raw.write(&node, "")?;
    }
    let last = bench.at("n49")?;
    loop {
        let event = bench.event(TOKEN)?;
        // Either event stands for the last node: its own, or the one that all were merged into.
        if event == last || event == at {
            break;
        }
    }
    bench.unwatch(&at, TOKEN);
    same!(bench.read("n49")?, Ok(String::new()));
    Ok(Verdict::Good)
}
