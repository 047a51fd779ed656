//! Reading, writing, listing, removing; permissions and errors.

use ::xenstore::wire::MessageType;
use ::xenstore::{Access, Edit, ErrorCode, Failure, Job, Outcome, Permission};

use super::bench::{Bench, path};
use super::{Check, Verdict, ensure, same};

type Result = std::result::Result<Verdict, String>;

pub(super) const CHECKS: &[Check] = &[
    ("a value comes back as it was written", value),
    ("an empty value is a value", empty_value),
    ("a value may hold any bytes", binary_value),
    ("a write makes the missing parents, empty", implicit_parents),
    ("mkdir makes parents and leaves values alone", mkdir),
    ("the children of a node are listed", list),
    ("a node without children has an empty list", empty_list),
    ("a missing node is ENOENT", missing),
    ("removing takes all below along", remove),
    ("removing what is not there is no error", remove_missing),
    ("removing below what is not there is ENOENT", remove_below_missing),
    ("a badly spelt path is EINVAL", bad_path),
    ("a path without its NUL is refused", no_nul),
    ("permissions are kept and inherited", permissions),
    ("others' nodes are EACCES", denied),
    ("whether a hidden node exists is not told", hidden),
    ("only domain 0 gives nodes away", give_away),
    ("reads are answered in the order they were sent", read_order),
    ("relative paths start at the own directory", relative),
    ("GET_DOMAIN_PATH names the directory of a domain", domain_path),
];

fn value(bench: &mut Bench) -> Result {
    bench.write("a", "value")?;
    same!(bench.read("a")?, Ok("value".to_owned()));
    bench.write("a", "other")?;
    same!(bench.read("a")?, Ok("other".to_owned()));
    Ok(Verdict::Good)
}

fn empty_value(bench: &mut Bench) -> Result {
    bench.write("a", "")?;
    same!(bench.read("a")?, Ok(String::new()));
    Ok(Verdict::Good)
}

fn binary_value(bench: &mut Bench) -> Result {
    let bytes: Vec<u8> = (0..=255).collect();
    let at = bench.at("a")?;
    same!(bench.run(Job::Edit(Edit::Write(at.clone(), bytes.clone())))?, Outcome::Done);
    same!(bench.run(Job::Read(vec![at]))?, Outcome::Read(vec![Ok(bytes)]));
    Ok(Verdict::Good)
}

fn implicit_parents(bench: &mut Bench) -> Result {
    bench.write("a/b/c", "x")?;
    same!(bench.read("a")?, Ok(String::new()));
    same!(bench.read("a/b")?, Ok(String::new()));
    same!(bench.list("a")?, Ok(vec!["b".to_owned()]));
    Ok(Verdict::Good)
}

fn mkdir(bench: &mut Bench) -> Result {
    bench.write("a", "kept")?;
    let (known, new) = (bench.at("a")?, bench.at("b/c")?);
    same!(bench.run(Job::Edit(Edit::Mkdir(known)))?, Outcome::Done);
    same!(bench.read("a")?, Ok("kept".to_owned()));
    same!(bench.run(Job::Edit(Edit::Mkdir(new)))?, Outcome::Done);
    same!(bench.read("b/c")?, Ok(String::new()));
    Ok(Verdict::Good)
}

fn list(bench: &mut Bench) -> Result {
    for name in ["one", "two/deep", "three"] {
        bench.write(name, "")?;
    }
    bench.remove("three")?;
    let at = bench.scratch.clone();
    match bench.run(Job::List(at))? {
        Outcome::Listed(mut names) => {
            names.sort();
            same!(names, ["one", "two"]);
        }
        other => return Err(format!("{other:?}")),
    }
    Ok(Verdict::Good)
}

fn empty_list(bench: &mut Bench) -> Result {
    bench.write("a", "x")?;
    same!(bench.list("a")?, Ok(vec![]));
    Ok(Verdict::Good)
}

fn missing(bench: &mut Bench) -> Result {
    let at = bench.at("a")?;
    same!(bench.read("a")?, Err(ErrorCode::Missing));
    same!(bench.read("a/b/c")?, Err(ErrorCode::Missing));
    let refused = Outcome::Failed(Failure::Refused { path: Some(at.clone()), code: ErrorCode::Missing });
    same!(bench.list("a")?, Err(refused.clone()));
    same!(bench.run(Job::Permissions(at))?, refused);
    Ok(Verdict::Good)
}

fn remove(bench: &mut Bench) -> Result {
    bench.write("a/b/c", "x")?;
    bench.write("ab", "stays")?;
    bench.remove("a")?;
    same!(bench.read("a/b/c")?, Err(ErrorCode::Missing));
    same!(bench.read("a")?, Err(ErrorCode::Missing));
    same!(bench.read("ab")?, Ok("stays".to_owned()));
    Ok(Verdict::Good)
}

fn remove_missing(bench: &mut Bench) -> Result {
    let payload = format!("{}\0", bench.at("a")?);
    same!(bench.raw.ask(MessageType::Rm, 0, payload.as_bytes())?, Ok(b"OK\0".to_vec()));
    bench.remove("a")?;
    Ok(Verdict::Good)
}

fn remove_below_missing(bench: &mut Bench) -> Result {
    let payload = format!("{}\0", bench.at("a/b")?);
    same!(bench.raw.ask(MessageType::Rm, 0, payload.as_bytes())?, Err(ErrorCode::Missing));
    bench.remove("a/b")?;
    Ok(Verdict::Good)
}

fn bad_path(bench: &mut Bench) -> Result {
    for ending in ["/a b", "/a.b", "//a", "/a/", "/a%"] {
        let payload = format!("{}{ending}\0", bench.scratch);
        same!(
            (ending, bench.raw.ask(MessageType::Read, 0, payload.as_bytes())?),
            (ending, Err(ErrorCode::Invalid))
        );
    }
    let payload = format!("{}/a b\0x", bench.scratch);
    same!(bench.raw.ask(MessageType::Write, 0, payload.as_bytes())?, Err(ErrorCode::Invalid));
    Ok(Verdict::Good)
}

fn no_nul(bench: &mut Bench) -> Result {
    // The errno is left to chance by some servers.
    let payload = bench.scratch.to_string();
    for kind in [MessageType::Read, MessageType::Write, MessageType::Mkdir] {
        let reply = bench.raw.ask(kind, 0, payload.as_bytes())?;
        ensure!(reply.is_err(), "{kind:?} is {reply:?}");
    }
    Ok(Verdict::Good)
}

fn permissions(bench: &mut Bench) -> Result {
    bench.write("a", "")?;
    let mut list = vec![Permission { domain: bench.domain, access: Access::None }];
    list.extend(bench.peer.map(|domain| Permission { domain, access: Access::Read }));
    let at = bench.at("a")?;
    same!(bench.run(Job::Edit(Edit::SetPermissions(at.clone(), list.clone())))?, Outcome::Done);
    same!(bench.run(Job::Permissions(at.clone()))?, Outcome::Permissions(list.clone()));
    bench.write("a/b/c", "")?;
    let below = bench.at("a/b/c")?;
    same!(bench.run(Job::Permissions(below))?, Outcome::Permissions(list));
    Ok(Verdict::Good)
}

fn denied(bench: &mut Bench) -> Result {
    if bench.privileged() {
        return Ok(Verdict::Skipped("domain 0 may do anything"));
    }
    let at = path("/vbdd-check-not-ours")?;
    let refused = Outcome::Failed(Failure::Refused { path: Some(at.clone()), code: ErrorCode::Denied });
    same!(bench.run(Job::Edit(Edit::Write(at.clone(), vec![])))?, refused);
    same!(bench.run(Job::Edit(Edit::Mkdir(at.clone())))?, refused);
    let home = path(&format!("/local/domain/{}", bench.domain))?;
    let list = vec![Permission { domain: bench.domain, access: Access::None }];
    let refused = Outcome::Failed(Failure::Refused { path: Some(home.clone()), code: ErrorCode::Denied });
    same!(bench.run(Job::Edit(Edit::SetPermissions(home, list)))?, refused);
    Ok(Verdict::Good)
}

fn hidden(bench: &mut Bench) -> Result {
    if bench.privileged() {
        return Ok(Verdict::Skipped("nothing is hidden from domain 0"));
    }
    let at = path("/vbdd-check-no-such-node/below")?;
    same!(bench.run(Job::Read(vec![at]))?, Outcome::Read(vec![Err(ErrorCode::Denied)]));
    Ok(Verdict::Good)
}

fn give_away(bench: &mut Bench) -> Result {
    let Some(peer) = bench.peer else { return Ok(Verdict::Skipped("there is no other domain")) };
    bench.write("a", "")?;
    let at = bench.at("a")?;
    let list = vec![Permission { domain: peer, access: Access::None }];
    let outcome = bench.run(Job::Edit(Edit::SetPermissions(at.clone(), list.clone())))?;
    if bench.privileged() {
        same!(outcome, Outcome::Done);
        same!(bench.run(Job::Permissions(at))?, Outcome::Permissions(list));
    } else {
        same!(outcome, Outcome::Failed(Failure::Refused { path: Some(at), code: ErrorCode::NotOwner }));
    }
    Ok(Verdict::Good)
}

fn read_order(bench: &mut Bench) -> Result {
    bench.write("state", "1")?;
    bench.write("ring", "none")?;
    let (state, ring) = (bench.at("state")?, bench.at("ring")?);
    for round in 0..20 {
        let text = round.to_string();
        bench.raw.write(&ring, &text)?;
        let id = bench.submit(Job::Read(vec![state.clone(), ring.clone()]))?;
        bench.raw.write(&state, &text)?;
        let Outcome::Read(values) = bench.outcome(id)? else { return Err("no values".to_owned()) };
        let ring = values.get(1).and_then(|value| value.as_ref().ok());
        same!(ring, Some(&text.into_bytes()));
    }
    Ok(Verdict::Good)
}

fn relative(bench: &mut Bench) -> Result {
    let home = format!("/local/domain/{}/", bench.domain);
    bench.write("a", "x")?;
    let at = bench.at("a")?;
    let Some(relative) = at.as_str().strip_prefix(&home) else {
        return Err("no relative spelling".to_owned());
    };
    match bench.raw.ask(MessageType::Read, 0, format!("{relative}\0").as_bytes())? {
        Err(ErrorCode::Invalid) if bench.socket => {
            return Ok(Verdict::Skipped("this socket takes no relative paths"));
        }
        reply => same!(reply, Ok(b"x".to_vec())),
    }
    let payload = format!("{relative}\0y");
    same!(bench.raw.ask(MessageType::Write, 0, payload.as_bytes())?, Ok(b"OK\0".to_vec()));
    same!(bench.read("a")?, Ok("y".to_owned()));
    Ok(Verdict::Good)
}

fn domain_path(bench: &mut Bench) -> Result {
    let payload = format!("{}\0", bench.domain);
    let wanted = format!("/local/domain/{}\0", bench.domain).into_bytes();
    same!(bench.raw.ask(MessageType::GetDomainPath, 0, payload.as_bytes())?, Ok(wanted));
    Ok(Verdict::Good)
}
