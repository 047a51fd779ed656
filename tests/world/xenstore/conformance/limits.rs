//! Sizes and numbers: what fits, and what happens to what does not.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ::xenstore::wire::{DEVICE_PAYLOAD_BYTES_MAX, MessageType, PAYLOAD_BYTES_MAX};
use ::xenstore::{Edit, ErrorCode, Failure, Job, Outcome, PATH_BYTES_MAX, SubmitError, WatchToken};

use super::bench::Bench;
use super::{Check, Verdict, ensure, same};

type Result = std::result::Result<Verdict, String>;

pub(super) const CHECKS: &[Check] = &[
    ("a hundred reads in one job come back in order", many_reads),
    ("sixteen requests at once are all answered", pipeline),
    ("a directory of more than 4096 bytes is listed", big_directory),
    ("a message of the greatest size goes through", greatest_message),
    ("a message past the greatest size is not sent", too_great_message),
    ("a payload of 4097 bytes ends the connection", overlong_payload),
    ("a node past its quota is ENOSPC", node_quota),
    ("a path of 2048 bytes below the own directory works, a longer one is EINVAL", longest_path),
    ("twenty watches on as many nodes", many_watches),
    ("a request of unknown type is ENOSYS", unknown_type),
];

fn payload_bytes_max(bench: &Bench) -> usize {
    if bench.socket { PAYLOAD_BYTES_MAX } else { DEVICE_PAYLOAD_BYTES_MAX }
}

fn many_reads(bench: &mut Bench) -> Result {
    for number in 0..20 {
        bench.write(&format!("n{number}"), &number.to_string())?;
    }
    let names = (0..100).map(|number| format!("n{}", number % 25));
    let paths: std::result::Result<Vec<_>, String> = names.map(|name| bench.at(&name)).collect();
    let wanted = (0..100).map(|number| match number % 25 {
        known @ 0..20 => Ok(known.to_string().into_bytes()),
        _ => Err(ErrorCode::Missing),
    });
    same!(bench.run(Job::Read(paths?))?, Outcome::Read(wanted.collect()));
    Ok(Verdict::Good)
}

fn pipeline(bench: &mut Bench) -> Result {
    if !bench.socket {
        return Ok(Verdict::Skipped("the kernel's device takes one request at a time"));
    }
    let mut asked = BTreeMap::new();
    for number in 0..16 {
        let name = format!("n{number}");
        bench.write(&name, &name)?;
        asked.insert(name, 0);
    }
    for (name, request) in &mut asked {
        let payload = format!("{}/{name}\0", bench.scratch);
        *request = bench.raw.send(MessageType::Read.number(), 0, payload.as_bytes())?;
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while !asked.is_empty() {
        let Some((header, payload)) = bench.raw.next(deadline)? else {
            return Err(format!("no reply to {asked:?}"));
        };
        let value = String::from_utf8_lossy(&payload).into_owned();
        same!((&value, asked.remove(&value)), (&value, Some(header.request)));
    }
    Ok(Verdict::Good)
}

fn big_directory(bench: &mut Bench) -> Result {
    if !bench.privileged() {
        return Ok(Verdict::Skipped("the quota of 2048 bytes a node covers the names of its children"));
    }
    let mut wanted = Vec::new();
    for number in 0..130 {
        let name = format!("{number:03}{}", "n".repeat(60));
        let edit = Edit::Mkdir(bench.at(&format!("big/{name}"))?);
        same!(bench.run(Job::Edit(edit))?, Outcome::Done);
        wanted.push(name);
    }
    let payload = format!("{}\0", bench.at("big")?);
    same!(bench.raw.ask(MessageType::Directory, 0, payload.as_bytes())?, Err(ErrorCode::TooBig));
    same!(bench.list("big")?, Ok(wanted));
    Ok(Verdict::Good)
}

fn greatest_message(bench: &mut Bench) -> Result {
    if !bench.privileged() {
        return Ok(Verdict::Skipped("the quota of 2048 bytes a node is lower"));
    }
    let at = bench.at("a")?;
    let value = vec![b'v'; payload_bytes_max(bench) - at.as_str().len() - 1];
    same!(bench.run(Job::Edit(Edit::Write(at.clone(), value.clone())))?, Outcome::Done);
    same!(bench.run(Job::Read(vec![at]))?, Outcome::Read(vec![Ok(value)]));
    Ok(Verdict::Good)
}

fn too_great_message(bench: &mut Bench) -> Result {
    let at = bench.at("a")?;
    let value = vec![b'v'; payload_bytes_max(bench) - at.as_str().len()];
    let job = Job::Edit(Edit::Write(at.clone(), value));
    same!(bench.xenbus.session().submit(job), Err(SubmitError::TooBig(at)));
    Ok(Verdict::Good)
}

fn overlong_payload(bench: &mut Bench) -> Result {
    if !bench.socket {
        return Ok(Verdict::Skipped("the kernel's device does not let it through"));
    }
    let mut raw = bench.another()?;
    let at = bench.at("a")?;
    let payload = format!("{at}\0{}", "x".repeat(4096 - at.as_str().len()));
    same!(payload.len(), 4097);
    // Either the server closes the connection, or it never answers on it again.
    let sent = raw.send(MessageType::Write.number(), 0, payload.as_bytes());
    if sent.is_ok() {
        let answer = raw.next(Instant::now() + Duration::from_millis(500));
        ensure!(!matches!(answer, Ok(Some(_))), "it was answered: {answer:?}");
    }
    same!(bench.read("a")?, Err(ErrorCode::Missing));
    Ok(Verdict::Good)
}

fn node_quota(bench: &mut Bench) -> Result {
    if bench.privileged() {
        return Ok(Verdict::Skipped("domain 0 has no quota"));
    }
    let at = bench.at("a")?;
    let refused = Outcome::Failed(Failure::Refused { path: Some(at.clone()), code: ErrorCode::NoSpace });
    same!(bench.run(Job::Edit(Edit::Write(at.clone(), vec![b'v'; 2048])))?, refused);
    same!(bench.run(Job::Edit(Edit::Write(at, vec![b'v'; 1900])))?, Outcome::Done);
    Ok(Verdict::Good)
}

fn longest_path(bench: &mut Bench) -> Result {
    if !bench.privileged() {
        return Ok(Verdict::Skipped("the quota of 2048 bytes a node covers the names of its children"));
    }
    let home = format!("/local/domain/{}/", bench.domain);
    let room = home.len() + PATH_BYTES_MAX - bench.scratch.as_str().len() - 1;
    let name = "p".repeat(room);
    bench.write(&name, "x")?;
    same!(bench.read(&name)?, Ok("x".to_owned()));
    let too_long = format!("{}/{name}p\0", bench.scratch);
    same!(bench.raw.ask(MessageType::Read, 0, too_long.as_bytes())?, Err(ErrorCode::Invalid));
    let elsewhere = format!("/{}\0", "p".repeat(PATH_BYTES_MAX - 1));
    same!(bench.raw.ask(MessageType::Read, 0, elsewhere.as_bytes())?, Err(ErrorCode::Missing));
    let too_long = format!("/{}\0", "p".repeat(PATH_BYTES_MAX));
    same!(bench.raw.ask(MessageType::Read, 0, too_long.as_bytes())?, Err(ErrorCode::Invalid));
    Ok(Verdict::Good)
}

fn many_watches(bench: &mut Bench) -> Result {
    for number in 0..20 {
        let at = bench.at(&format!("w{number}"))?;
        bench.watch(&at, WatchToken(1000 + number))?;
    }
    for number in 0..20 {
        bench.write(&format!("w{number}/x"), "")?;
    }
    for number in 0..20 {
        let at = bench.at(&format!("w{number}"))?;
        same!(bench.event(WatchToken(1000 + number))?, bench.at(&format!("w{number}/x"))?);
        bench.unwatch(&at, WatchToken(1000 + number));
    }
    Ok(Verdict::Good)
}

fn unknown_type(bench: &mut Bench) -> Result {
    if !bench.socket {
        return Ok(Verdict::Skipped("the kernel's device looks at types itself"));
    }
    let mut raw = bench.another()?;
    raw.send(200, 0, b"\0")?;
    let Some((header, payload)) = raw.next(Instant::now() + Duration::from_secs(10))? else {
        return Err("no reply".to_owned());
    };
    same!(header.kind, MessageType::Error.number());
    same!(ErrorCode::from_payload(&payload), ErrorCode::Unsupported);
    Ok(Verdict::Good)
}
