//! Several clients against the simulated server, with everything that the protocol allows going wrong: bytes in any
//! pieces, replies out of order, late, doubled and spurious events, clashes, lost connections.
//!
//! Replay one run with `XENSTORE_SEED=n`, run more of them with `XENSTORE_RUNS=n`.
// Helpers of tests may fail loudly, as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

pub mod world;

use std::collections::{BTreeMap, BTreeSet};

use ::xenstore::wire::DEVICE_PAYLOAD_BYTES_MAX;
use ::xenstore::{
    Access, Config, Edit, ErrorCode, Event, Failure, Guard, Job, JobId, Outcome, Path, Permission,
    WatchToken, limits,
};
use vbdd::xenbus::Session;
use world::rng::Rng;
use world::xenstore::{ConnectionId, Faults, Planted, XenstoreServer};

const TURNS: usize = 4_000;
const BUMPS_PER_ACTOR: usize = 60;
const SHARED: WatchToken = WatchToken(1);

/// What a job was for.
#[derive(Debug)]
enum Errand {
    ReadCounter,
    Bump { ledger: String },
    List,
    Copy(Vec<String>),
    Scribble,
}

/// How an actor reaches the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Socket,
    /// The kernel's device, used as [`vbdd::xenbus::Xenbus`] does.
    Device,
    /// The device, used as if it were a socket: a bug that must be found.
    DeviceMisused,
}

/// A domain with a session: it counts a shared counter up, keeps a copy of a shared directory, and scribbles there.
struct Actor {
    domain: u16,
    way: Way,
    session: Session,
    connection: Option<ConnectionId>,
    errands: BTreeMap<JobId, Errand>,
    ready: bool,
    counting: bool,
    bumps: usize,
    committed: BTreeSet<String>,
    unknown: BTreeSet<String>,
    dirty: bool,
    copying: bool,
    copy: BTreeMap<String, Vec<u8>>,
    submitted: usize,
    completed: usize,
    lost: usize,
}

struct World {
    server: XenstoreServer,
    actors: Vec<Actor>,
    rng: Rng,
    now_ms: u64,
    calm: bool,
}

fn path(text: &str) -> Path {
    Path::parse(text).unwrap()
}

impl Actor {
    fn new(domain: u16, way: Way, seed: u64) -> Actor {
        let config = match way {
            Way::Socket => Config { seed, ..Config::default() },
            Way::Device => Config { seed, payload_bytes_max: DEVICE_PAYLOAD_BYTES_MAX, requests_max: 1 },
            Way::DeviceMisused => {
                Config { seed, payload_bytes_max: DEVICE_PAYLOAD_BYTES_MAX, ..Config::default() }
            }
        };
        let mut session = Session::new(config);
        session.watch(&path("/shared"), SHARED).unwrap();
        Actor {
            domain,
            way,
            session,
            connection: None,
            errands: BTreeMap::new(),
            ready: false,
            counting: false,
            bumps: 0,
            committed: BTreeSet::new(),
            unknown: BTreeSet::new(),
            dirty: false,
            copying: false,
            copy: BTreeMap::new(),
            submitted: 0,
            completed: 0,
            lost: 0,
        }
    }

    fn submit(&mut self, job: Job, errand: Errand) {
        let id = self.session.submit(job).unwrap();
        self.submitted += 1;
        assert!(self.errands.insert(id, errand).is_none(), "a job's name was used twice");
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Reset => {
                assert_eq!(self.session.domain(), Some(self.domain));
                self.ready = true;
                self.dirty = true;
            }
            Event::Watch { token, path: at } => {
                assert!(self.ready, "a watch event before the first reset");
                assert!(token == SHARED && at.is_within(&path("/shared")), "{at} of {token:?}");
                self.dirty = true;
            }
            Event::WatchFailed { code, .. } => panic!("the watch was refused: {code}"),
            Event::Job { id, outcome } => {
                self.completed += 1;
                let errand = self.errands.remove(&id).expect("one completion per job");
                self.done(errand, outcome);
            }
        }
    }

    fn done(&mut self, errand: Errand, outcome: Outcome) {
        if let Outcome::Failed(Failure::ConnectionLost { maybe_applied }) = &outcome {
            self.lost += 1;
            match errand {
                Errand::Bump { ledger } => {
                    self.counting = false;
                    if *maybe_applied {
                        self.unknown.insert(ledger);
                    }
                }
                Errand::ReadCounter => self.counting = false,
                Errand::List | Errand::Copy(_) => (self.copying, self.dirty) = (false, true),
                Errand::Scribble => {}
            }
            return;
        }
        match (errand, outcome) {
            (Errand::ReadCounter, Outcome::Read(values)) => {
                let old = values[0].clone().expect("the counter exists");
                let new = std::str::from_utf8(&old).unwrap().parse::<u64>().unwrap() + 1;
                let ledger = format!("/ledger/{}-{}", self.domain, self.bumps);
                self.bumps += 1;
                let guards = vec![
                    (path("/counter"), Guard::Equals(old)),
                    (path(&ledger), Guard::Absent),
                    (path("/ledger"), Guard::Exists),
                ];
                let edits = vec![
                    Edit::Write(path("/counter"), new.to_string().into_bytes()),
                    Edit::Remove(path("/ledger/nowhere/at/all")),
                    Edit::Write(path(&ledger), b"".to_vec()),
                ];
                self.submit(Job::Transaction { guards, edits }, Errand::Bump { ledger });
            }
            (Errand::Bump { ledger }, outcome) => {
                self.counting = false;
                match outcome {
                    Outcome::Committed { .. } => drop(self.committed.insert(ledger)),
                    Outcome::GuardFailed { path: at, .. } => assert_eq!(at, path("/counter")),
                    Outcome::Failed(Failure::Conflict { .. }) => {}
                    other => panic!("{other:?}"),
                }
            }
            (Errand::List, Outcome::Listed(names)) => {
                let paths = names.iter().map(|name| path(&format!("/shared/{name}"))).collect();
                self.submit(Job::Read(paths), Errand::Copy(names));
            }
            (Errand::Copy(names), Outcome::Read(values)) => {
                assert_eq!(names.len(), values.len());
                self.copying = false;
                let pairs = names.into_iter().zip(values);
                self.copy = pairs.filter_map(|(name, value)| Some((name, value.ok()?))).collect();
            }
            (
                Errand::Scribble,
                Outcome::Done | Outcome::Committed { .. } | Outcome::Failed(Failure::Conflict { .. }),
            ) => {}
            (errand, outcome) => panic!("{errand:?} ended with {outcome:?}"),
        }
    }

    /// Starts what is to be started.
    fn act(&mut self, rng: &mut Rng, calm: bool) {
        if !self.ready {
            return;
        }
        if !self.counting && self.bumps < BUMPS_PER_ACTOR && !calm && rng.chance(1, 3) {
            self.counting = true;
            self.submit(Job::Read(vec![path("/counter")]), Errand::ReadCounter);
        }
        if self.dirty && !self.copying {
            (self.dirty, self.copying) = (false, true);
            self.submit(Job::List(path("/shared")), Errand::List);
        }
        if !calm && rng.chance(1, 20) && self.errands.len() < 60 {
            let at = path(&format!("/shared/{}", rng.below(12)));
            let value = vec![b'a'; rng.below(300)];
            let job = match rng.below(4) {
                0 => Job::Edit(Edit::Remove(at)),
                1 => Job::Edit(Edit::Mkdir(at)),
                2 => Job::Transaction {
                    guards: vec![],
                    edits: vec![Edit::Remove(at.clone()), Edit::Write(at, value)],
                },
                _ => Job::Edit(Edit::Write(at, value)),
            };
            self.submit(job, Errand::Scribble);
        }
    }
}

impl World {
    fn new(seed: u64, planted: Planted, ways: [Way; 3]) -> World {
        let mut rng = Rng::new(seed);
        let mut server = XenstoreServer::new(rng.draw());
        server.faults = Faults::MANY;
        server.planted = planted;
        server.write(0, "/counter", b"0").unwrap();
        for directory in ["/shared", "/ledger", "/counter"] {
            server.mkdir(0, directory).unwrap();
            let everybody = Permission { domain: 0, access: Access::Both };
            server.set_permissions(0, directory, &[everybody]).unwrap();
        }
        let mut actors = Vec::new();
        for (domain, way) in [0, 5, 7].into_iter().zip(ways) {
            actors.push(Actor::new(domain, way, rng.draw()));
        }
        server.introduce_domain(5);
        server.introduce_domain(7);
        World { server, actors, rng, now_ms: 0, calm: false }
    }

    fn turn(&mut self, who: usize) {
        let World { server, actors, rng, now_ms, calm } = self;
        let (actor, calm) = (&mut actors[who], *calm);
        let Some(connection) = actor.connection else {
            if calm || rng.chance(1, 5) {
                actor.connection = Some(server.connect(actor.domain));
                actor.session.connected();
            }
            return;
        };
        if !calm && rng.chance(1, 400) {
            assert!(server.outstanding_max_seen(connection) <= limits::REQUESTS_OUTSTANDING_MAX);
            server.disconnect(connection);
            actor.connection = None;
            actor.session.disconnected();
            return;
        }
        for _ in 0..=rng.below(4) {
            let Some(bytes) = actor.session.transmit() else { break };
            if actor.way != Way::Socket {
                match server.write_device(connection, bytes) {
                    Ok(written) => actor.session.transmitted(written),
                    Err(code) => actor.session.refused(code).unwrap(),
                }
                continue;
            }
            let some = if calm { bytes.len() } else { 1 + rng.below(bytes.len()) };
            server.receive(connection, &bytes[..some]);
            actor.session.transmitted(some);
        }
        for _ in 0..rng.below(4) {
            server.step();
        }
        assert!(server.transactions_open(connection) <= limits::TRANSACTIONS_OPEN_MAX);
        let most = if rng.chance(1, 3) { rng.below(40) } else { rng.below(5000) };
        let bytes = server.transmit(connection, most);
        actor.session.receive(&bytes).expect("the server keeps to the protocol");
        assert!(!server.is_closed(connection), "the client broke the protocol");
        *now_ms += u64::try_from(rng.below(6)).unwrap();
        actor.session.handle_time(*now_ms);
        for _ in 0..rng.below(6) {
            let Some(event) = actor.session.event() else { break };
            actor.event(event);
        }
        actor.act(rng, calm);
    }

    /// Lets everything come to rest: no more faults, no new work, and all that was begun ends.
    fn rest(&mut self) {
        self.calm = true;
        self.server.faults = Faults::NONE;
        for _ in 0..20_000 {
            for who in 0..self.actors.len() {
                self.turn(who);
            }
            self.server.settle();
            let idle = |actor: &Actor| {
                actor.connection.is_some() && actor.errands.is_empty() && !actor.dirty && actor.ready
            };
            if self.actors.iter().all(idle) && !self.anything_on_its_way() {
                return;
            }
        }
        panic!("the world does not come to rest");
    }

    fn anything_on_its_way(&mut self) -> bool {
        let mut any = false;
        for actor in &mut self.actors {
            let Some(connection) = actor.connection else { return true };
            let bytes = self.server.transmit(connection, usize::MAX);
            any |= !bytes.is_empty();
            actor.session.receive(&bytes).unwrap();
            while let Some(event) = actor.session.event() {
                any = true;
                actor.event(event);
            }
        }
        any
    }

    fn judge(&mut self) -> Result<(), String> {
        let value = self.server.read(0, "/counter").unwrap();
        let counter: usize = std::str::from_utf8(&value).unwrap().parse().unwrap();
        let ledger: BTreeSet<String> = self
            .server
            .store()
            .nodes()
            .map(|(p, _)| p.to_owned())
            .filter(|p| p.starts_with("/ledger/"))
            .collect();
        if counter != ledger.len() {
            return Err(format!("the counter says {counter}, the ledger {}", ledger.len()));
        }
        for actor in &self.actors {
            let own = format!("/ledger/{}-", actor.domain);
            let mine: BTreeSet<String> = ledger.iter().filter(|p| p.starts_with(&own)).cloned().collect();
            let all: BTreeSet<String> = actor.committed.union(&actor.unknown).cloned().collect();
            if !actor.committed.is_subset(&mine) || !mine.is_subset(&all) {
                return Err(format!("domain {}: a commit was lost, or a failure was none", actor.domain));
            }
            if actor.submitted != actor.completed {
                return Err(format!("{} jobs, {} completions", actor.submitted, actor.completed));
            }
            let real: BTreeMap<String, Vec<u8>> = self
                .server
                .store()
                .nodes()
                .filter_map(|(p, node)| Some((p.strip_prefix("/shared/")?.to_owned(), node.value.clone())))
                .collect();
            if actor.copy != real {
                return Err(format!("domain {}: its copy is stale", actor.domain));
            }
        }
        Ok(())
    }
}

/// Says how to repeat the run that failed.
struct Sign(u64);

impl Drop for Sign {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("replay with XENSTORE_SEED={}", self.0);
        }
    }
}

const WAYS: [Way; 3] = [Way::Socket, Way::Device, Way::Socket];

fn run(seed: u64, planted: Planted) -> (Result<(), String>, World) {
    run_by(seed, planted, WAYS)
}

fn run_by(seed: u64, planted: Planted, ways: [Way; 3]) -> (Result<(), String>, World) {
    let _sign = Sign(seed);
    let mut world = World::new(seed, planted, ways);
    for _ in 0..TURNS {
        let who = world.rng.below(world.actors.len());
        world.turn(who);
    }
    world.rest();
    (world.judge(), world)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn clients_agree_with_the_server_whatever_happens() {
    let seeds: Vec<u64> = match number("XENSTORE_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("XENSTORE_RUNS").unwrap_or(25)).collect(),
    };
    let (mut jobs, mut commits, mut clashes, mut lost) = (0, 0, 0, 0);
    for seed in seeds {
        let (verdict, world) = run(seed, Planted::Nothing);
        if let Err(why) = verdict {
            panic!("{why}; replay with XENSTORE_SEED={seed}");
        }
        clashes += world.server.clashes;
        for actor in &world.actors {
            jobs += actor.completed;
            commits += actor.committed.len();
            lost += actor.lost;
        }
    }
    println!("{jobs} jobs, {commits} commits, {clashes} clashes, {lost} jobs lost with their connection");
    assert!(commits > 0 && clashes > 0 && lost > 0, "the run was too tame");
}

#[test]
fn a_seed_replays_its_run() {
    let (a, b) = (run(3, Planted::Nothing).1, run(3, Planted::Nothing).1);
    assert!(a.server.store().nodes().eq(b.server.store().nodes()));
    assert_eq!((a.now_ms, a.server.clashes), (b.now_ms, b.server.clashes));
}

#[test]
fn planted_bugs_are_found() {
    for planted in [Planted::IgnoresClashes, Planted::LosesEvents] {
        let found = (0..30).any(|seed| run(seed, planted).0.is_err());
        assert!(found, "{planted:?} went unnoticed");
    }
}

#[test]
fn a_device_used_like_a_socket_is_found() {
    let misused = [Way::Socket, Way::DeviceMisused, Way::Socket];
    let run = || run_by(1, Planted::Nothing, misused).0.is_err();
    // Mixed-up requests may also show as an answer that makes no sense, on which an actor panics.
    assert!(std::panic::catch_unwind(run).unwrap_or(true), "the mix-up went unnoticed");
}

/// Drives one session and the server until nothing moves any more.
fn pump(server: &mut XenstoreServer, session: &mut Session, connection: ConnectionId) {
    loop {
        let mut moved = false;
        while let Some(bytes) = session.transmit() {
            server.receive(connection, bytes);
            let length = bytes.len();
            session.transmitted(length);
            moved = true;
        }
        server.settle();
        let bytes = server.transmit(connection, usize::MAX);
        session.receive(&bytes).unwrap();
        if !moved && bytes.is_empty() {
            return;
        }
    }
}

fn session(server: &mut XenstoreServer, domain: u16) -> (Session, ConnectionId) {
    let connection = server.connect(domain);
    let mut session = Session::new(Config::default());
    session.connected();
    pump(server, &mut session, connection);
    assert_eq!(session.event(), Some(Event::Reset));
    assert_eq!(session.domain(), Some(domain));
    (session, connection)
}

#[test]
fn the_death_of_a_domain_is_seen_as_its_nodes_missing() {
    let mut server = XenstoreServer::new(1);
    server.introduce_domain(3);
    server.mkdir(0, "/local/domain/3/device").unwrap();
    let frontend = "/local/domain/3/device/vbd/51712";
    server.write(0, &format!("{frontend}/state"), b"4").unwrap();
    let list =
        [Permission { domain: 3, access: Access::None }, Permission { domain: 0, access: Access::Read }];
    server.set_permissions(0, &format!("{frontend}/state"), &list).unwrap();
    let (mut session, connection) = session(&mut server, 0);
    session.watch(&path("@releaseDomain"), WatchToken(9)).unwrap();
    pump(&mut server, &mut session, connection);
    assert!(session.event().is_some());
    server.release_domain(3);
    pump(&mut server, &mut session, connection);
    assert_eq!(session.event(), Some(Event::Watch { token: WatchToken(9), path: path("@releaseDomain") }));
    let state = path(&format!("{frontend}/state"));
    session.submit(Job::Read(vec![state])).unwrap();
    pump(&mut server, &mut session, connection);
    let Some(Event::Job { outcome, .. }) = session.event() else { panic!() };
    assert_eq!(outcome, Outcome::Read(vec![Err(ErrorCode::Missing)]));
}

#[test]
fn quotas_are_told_by_their_names() {
    let mut server = XenstoreServer::new(1);
    server.introduce_domain(3);
    server.quotas.nodes = 5;
    server.quotas.watches = 2;
    server.mkdir(0, "/mine").unwrap();
    server.set_permissions(0, "/mine", &[Permission { domain: 3, access: Access::None }]).unwrap();
    let (mut session, connection) = session(&mut server, 3);
    let mut ask = |server: &mut XenstoreServer, job| {
        session.submit(job).unwrap();
        pump(server, &mut session, connection);
        match session.event() {
            Some(Event::Job { outcome, .. }) => outcome,
            other => panic!("{other:?}"),
        }
    };
    let write = |name: &str, bytes| Job::Edit(Edit::Write(path(name), vec![0; bytes]));
    let refused = |name: &str, code| Outcome::Failed(Failure::Refused { path: Some(path(name)), code });
    assert_eq!(ask(&mut server, write("/mine/a/b/c/d", 1)), Outcome::Done);
    assert_eq!(ask(&mut server, write("/mine/e", 1)), refused("/mine/e", ErrorCode::NoSpace));
    assert_eq!(ask(&mut server, write("/mine/a", 2048)), refused("/mine/a", ErrorCode::NoSpace));
    let many = vec![Permission { domain: 3, access: Access::None }; 6];
    let set = Job::Edit(Edit::SetPermissions(path("/mine"), many));
    assert_eq!(ask(&mut server, set), refused("/mine", ErrorCode::NoSpace));
    for token in 0..3 {
        session.watch(&path("/mine"), WatchToken(token)).unwrap();
    }
    pump(&mut server, &mut session, connection);
    let failed = Event::WatchFailed { token: WatchToken(2), path: path("/mine"), code: ErrorCode::TooBig };
    assert_eq!(session.event(), Some(failed));
}
