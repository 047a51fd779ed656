//! Every reachable state of a vbd in an abstract world, and every step from each: no rule broken, and from each state the
//! right end is reached once the world leaves the vbd alone. `docs/design/vbd.md` explains the rules.

// A test that meets the unexpected must stop, also in its helpers; clippy knows only #[test] functions.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

#[path = "vbd_explore/faults.rs"]
mod faults;
#[path = "vbd_explore/model.rs"]
mod model;
#[path = "vbd_explore/rules.rs"]
mod rules;
#[path = "vbd_explore/store.rs"]
mod store;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Instant;

use faults::Fault;
use model::{Freedom, Image, Label, Model, Ring, State};
use store::{Backend, Frontend, Medium, RingNodes};
use vbdd::vbd::{Place, Script};

/// More steps than any way to rest takes.
const STEPS_TO_REST: usize = 60;

const EVERY_RING: &[RingNodes] = &[RingNodes::None, RingNodes::A, RingNodes::B, RingNodes::Malformed];

/// Multiply and rotate: the states are small and the table is large.
#[derive(Default)]
struct Mixer(u64);

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_isize(&mut self, value: isize) {
        self.write_u64(value.unsigned_abs() as u64);
    }
}

/// What an exploration came to.
struct Found {
    states: usize,
    transitions: usize,
    vbds: usize,
    longest_way_to_rest: usize,
    broken: Option<String>,
}

struct Explorer {
    model: Model,
    known: HashMap<State, u32, BuildHasherDefault<Mixer>>,
    states: Vec<State>,
    from: Vec<(u32, Label)>,
    transitions: usize,
}

impl Explorer {
    fn new(model: Model) -> Explorer {
        Explorer { model, known: HashMap::default(), states: Vec::new(), from: Vec::new(), transitions: 0 }
    }

    fn run(mut self) -> Found {
        let rest = match self.explore() {
            Some(broken) => Err(broken),
            None => self.all_come_to_rest(true).and_then(|_| self.all_come_to_rest(false)),
        };
        Found {
            states: self.states.len(),
            transitions: self.transitions,
            vbds: self.model.distinct_vbds(),
            longest_way_to_rest: *rest.as_ref().unwrap_or(&0),
            broken: rest.err(),
        }
    }

    /// Breadth first, so that a trace to a broken rule is a shortest one.
    fn explore(&mut self) -> Option<String> {
        let start = self.model.start();
        self.add(start, 0, Label::Start);
        let mut steps = Vec::new();
        let mut at = 0;
        while at < self.states.len() {
            let state = self.states[at];
            self.model.steps(&state, &mut steps);
            self.transitions += steps.len();
            for (label, outcome) in &steps {
                match outcome {
                    Ok(next) => self.add(*next, at, *label),
                    Err(rule) => return Some(self.told(at, &format!("{label:?}: {rule}"))),
                }
            }
            at += 1;
        }
        None
    }

    fn add(&mut self, state: State, from: usize, label: Label) {
        let number = u32::try_from(self.states.len()).unwrap();
        if let std::collections::hash_map::Entry::Vacant(place) = self.known.entry(state) {
            place.insert(number);
            self.states.push(state);
            self.from.push((u32::try_from(from).unwrap(), label));
        }
    }

    /// The shortest way to a state, and what is wrong there.
    fn told(&self, at: usize, what: &str) -> String {
        let mut way = Vec::new();
        let mut here = at;
        while here != 0 {
            let (from, label) = self.from[here];
            way.push(format!("{label:?}"));
            here = from as usize;
        }
        way.reverse();
        let state = self.states[at];
        format!("{what}\n  after {}\n  in {state:?}\n  with {:?}", way.join(", "), self.model.vbd(&state))
    }

    /// From each state, with nobody acting but the daemon: rest. With the daemon answering well, the right one; with
    /// `failing`, any: at least nothing is tried for ever. Returns the longest of those ways, in steps.
    fn all_come_to_rest(&mut self, failing: bool) -> Result<usize, String> {
        const UNKNOWN: u8 = u8::MAX;
        if failing && !self.model.freedom.failures {
            return Ok(0);
        }
        let mut steps_left = vec![UNKNOWN; self.states.len()];
        let mut longest = 0;
        let mut way = Vec::new();
        for first in 0..self.states.len() {
            let mut here = first;
            way.clear();
            while steps_left[here] == UNKNOWN {
                way.push(here);
                if way.len() > STEPS_TO_REST {
                    return Err(self.told(first, "no rest"));
                }
                let state = self.states[here];
                let step =
                    if failing { self.model.failing_step(&state) } else { self.model.quiet_step(&state) };
                match step {
                    None if failing => {
                        way.pop();
                        steps_left[here] = 0;
                    }
                    None => {
                        let rested = at_rest(&self.model, &state).and_then(|()| self.stays(&state));
                        if let Err(rule) = rested {
                            return Err(self.told(here, &rule));
                        }
                        way.pop();
                        steps_left[here] = 0;
                    }
                    Some((label, Err(rule))) => return Err(self.told(here, &format!("{label:?}: {rule}"))),
                    Some((_, Ok(next))) => here = self.known[&next] as usize,
                }
            }
            let mut steps = steps_left[here];
            for passed in way.iter().rev() {
                steps += 1;
                steps_left[*passed] = steps;
            }
            longest = longest.max(usize::from(steps));
        }
        Ok(longest)
    }

    /// An event without a change makes no difference to what is at rest.
    fn stays(&mut self, state: &State) -> Result<(), String> {
        let mut now = State { changed: true, ..*state };
        for _ in 0..3 {
            if let Some((_, next)) = self.model.quiet_step(&now) {
                now = next?;
            }
        }
        if now == *state {
            Ok(())
        } else {
            Err(format!("at rest: an event without a change leads to {now:?}"))
        }
    }
}

/// What must be true when nothing is outstanding.
fn at_rest(model: &Model, s: &State) -> Result<(), String> {
    let held = s.ring != Ring::Down || s.image != Image::Closed;
    let must = |holds: bool, text: &str| if holds { Ok(()) } else { Err(format!("at rest: {text}")) };
    let Some(backend) = s.store.backend else {
        return must(s.vbd == 0 && !held, "a device is gone and not forgotten");
    };
    must(s.vbd != 0, "a device is not looked after")?;
    let front = s.store.frontend.unwrap_or(Frontend { state: 9, ring: RingNodes::None });
    let refused = backend.state == 6 && backend.error != 0;
    must(backend.state != 6 || !held, "6 is visible and something is held")?;
    if !backend.online {
        must(model.config.place == Place::Dom0 || backend.state != 6, "the directory was not removed")?;
        return match front.state {
            3..=5 => must(matches!(backend.state, 5 | 6), "offline, and the frontend was not told"),
            _ => must(backend.state == 6 && !held, "offline, and not closed"),
        };
    }
    must(backend.state != 1 || front.state == 9, "the toolstack did not get to see 2")?;
    match front.state {
        9 => must(!held && matches!(backend.state, 1 | 6), "the frontend is gone, and something is held"),
        6 => must(backend.state == 6, "the frontend is closed, and the backend is not"),
        5 => must(matches!(backend.state, 5 | 6), "the frontend closes, and gets no answer"),
        1 => {
            must(backend.state == 2 || refused, "the frontend waits for 2")?;
            must(s.ring == Ring::Down, "the frontend has no ring, and it is mapped")
        }
        3 | 4 => {
            let same = matches!(s.ring, Ring::Up(nodes) | Ring::Broken(nodes) if nodes == front.ring);
            let kept = matches!(s.ring, Ring::Up(_) | Ring::Broken(_))
                && matches!(front.ring, RingNodes::None | RingNodes::Malformed);
            must(
                refused || (backend.state == 4 && backend.sized > 0 && (same || kept)),
                "the frontend waits for 4",
            )?;
            right_medium(model, s, backend)?;
            let broken = matches!(s.ring, Ring::Broken(_));
            must(!broken || backend.error != 0, "a broken ring, and no word about it")
        }
        _ => Ok(()),
    }
}

/// What must be true of the image at rest, for a frontend that uses it.
fn right_medium(model: &Model, s: &State, backend: Backend) -> Result<(), String> {
    let Image::Open(medium) = s.image else { return Ok(()) };
    if backend.state != 4 {
        return Ok(());
    }
    let must = |holds: bool, text: &str| if holds { Ok(()) } else { Err(format!("at rest: {text}")) };
    must(backend.sized == medium.size(s.grown), "the frontend was told another size")?;
    let drive = !model.freedom.media.is_empty();
    let bad = medium == Medium::Empty && backend.error != 0;
    must(!drive || medium == backend.medium || bad, "the wrong medium is in the drive")
}

fn explored(name: &str, place: Place, script: Script, freedom: Freedom, fault: Fault) -> Found {
    let began = Instant::now();
    let found = Explorer::new(Model::new(place, script, freedom, fault)).run();
    println!(
        "{name}, fault {fault:?}: {} states, {} transitions, {} distinct vbds, at most {} steps to rest, {:.1} s",
        found.states,
        found.transitions,
        found.vbds,
        found.longest_way_to_rest,
        began.elapsed().as_secs_f64()
    );
    found
}

fn assert_sound(name: &str, place: Place, script: Script, freedom: Freedom) {
    let found = explored(name, place, script, freedom, Fault::None);
    if let Some(told) = found.broken {
        panic!("{name}: {told}");
    }
}

const ALL: Freedom = Freedom {
    script: false,
    torn_reads: false,
    restarts: true,
    failures: true,
    media: &[],
    grows: false,
    frontend_states: &[0, 1, 3, 4, 5, 6],
    rings: EVERY_RING,
};

/// Everything goes well but for the frontend, the toolstack and restarts.
const NO_FAILURES: Freedom = Freedom {
    failures: false,
    frontend_states: &[1, 3, 4, 5, 6],
    rings: &[RingNodes::A, RingNodes::B],
    ..ALL
};

/// Everything goes wrong, with a frontend of little fantasy.
const NO_RESTARTS: Freedom =
    Freedom { restarts: false, frontend_states: &[1, 4, 6], rings: &[RingNodes::A], ..ALL };

const TORN: Freedom = Freedom {
    torn_reads: true,
    failures: false,
    restarts: false,
    frontend_states: &[1, 3, 6],
    rings: &[RingNodes::None, RingNodes::A],
    ..ALL
};

/// A small world that still has every planted bug in it.
const SMALL: Freedom =
    Freedom { failures: false, frontend_states: &[1, 4, 6], rings: &[RingNodes::A], ..ALL };

#[test]
fn a_driver_domain_restarted() {
    assert_sound("driver domain, restarts", Place::DriverDomain, Script::Ours, NO_FAILURES);
}

#[test]
fn a_driver_domain_where_things_fail() {
    assert_sound("driver domain, failures", Place::DriverDomain, Script::Ours, NO_RESTARTS);
}

#[test]
fn dom0_with_the_toolstacks_script() {
    let restarts =
        Freedom { script: true, frontend_states: &[0, 1, 4, 5, 6], rings: &[RingNodes::A], ..NO_FAILURES };
    assert_sound("dom0, script, restarts", Place::Dom0, Script::AsTheNodeSays, restarts);
    let failures = Freedom { script: true, ..NO_RESTARTS };
    assert_sound("dom0, script, failures", Place::Dom0, Script::AsTheNodeSays, failures);
}

#[test]
fn reads_that_are_torn() {
    assert_sound("driver domain, torn reads", Place::DriverDomain, Script::Ours, TORN);
}

/// Two queues, alone or beside the ring of an earlier frontend.
const TWO_QUEUES: &[RingNodes] = &[RingNodes::A, RingNodes::Two, RingNodes::TwoAndA];

#[test]
fn two_queues_restarted() {
    let freedom = Freedom { frontend_states: &[1, 3, 4, 6], rings: TWO_QUEUES, ..NO_FAILURES };
    assert_sound("driver domain, two queues, restarts", Place::DriverDomain, Script::Ours, freedom);
}

#[test]
fn two_queues_where_things_fail() {
    let freedom = Freedom { rings: &[RingNodes::TwoAndA], ..NO_RESTARTS };
    assert_sound("driver domain, two queues, failures", Place::DriverDomain, Script::Ours, freedom);
}

#[test]
fn a_drive_whose_medium_is_changed() {
    let restarts = Freedom {
        media: &[Medium::A, Medium::B],
        failures: false,
        frontend_states: &[1, 4, 5, 6],
        rings: &[RingNodes::A],
        ..ALL
    };
    assert_sound("driver domain, media, restarts", Place::DriverDomain, Script::Ours, restarts);
}

/// `cargo test --release --test vbd_explore -- --ignored --nocapture a_drive`
#[test]
#[ignore = "minutes and gigabytes; run by name"]
fn a_drive_where_things_fail() {
    let failures = Freedom { media: &[Medium::A, Medium::Empty], frontend_states: &[1, 4], ..NO_RESTARTS };
    assert_sound("driver domain, media, failures", Place::DriverDomain, Script::Ours, failures);
}

#[test]
fn a_disk_that_grows() {
    let freedom = Freedom { grows: true, ..SMALL };
    assert_sound("driver domain, growing", Place::DriverDomain, Script::Ours, freedom);
    let script = Freedom { script: true, frontend_states: &[1, 4], ..freedom };
    assert_sound("dom0, script, growing", Place::Dom0, Script::AsTheNodeSays, script);
}

#[test]
fn every_planted_bug_is_found() {
    let two = Freedom { rings: &[RingNodes::Two], ..SMALL };
    for (name, freedom) in [("small", SMALL), ("small, two queues", two)] {
        let sound = explored(name, Place::DriverDomain, Script::Ours, freedom, Fault::None);
        assert_eq!(sound.broken, None);
        for fault in Fault::ALL {
            let found = explored(name, Place::DriverDomain, Script::Ours, freedom, fault);
            let told = found.broken.unwrap_or_else(|| panic!("{fault:?} was not found"));
            println!("  {}", told.lines().take(2).collect::<Vec<_>>().join(" "));
        }
    }
}

/// All freedoms at once: some minutes and gigabytes. `cargo test --release --test vbd_explore -- --ignored --nocapture`
#[test]
#[ignore = "minutes and gigabytes; run by name"]
fn everything_at_once() {
    let all = Freedom { frontend_states: &[1, 3, 4, 5, 6], rings: &[RingNodes::A, RingNodes::B], ..ALL };
    assert_sound("driver domain, everything", Place::DriverDomain, Script::Ours, all);
    let script = Freedom { script: true, rings: &[RingNodes::A], ..all };
    assert_sound("dom0, script, everything", Place::Dom0, Script::AsTheNodeSays, script);
    let torn = Freedom { torn_reads: true, failures: false, rings: &[RingNodes::A], ..all };
    assert_sound("driver domain, torn reads, restarts", Place::DriverDomain, Script::Ours, torn);
}
