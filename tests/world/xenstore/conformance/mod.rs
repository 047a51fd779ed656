//! What vbdd relies on in a xenstored, as checks that run against any: the real one in a Xen machine (through the example
//! `xenstore_conformance`) and the simulated one (through the test of the same name). Both must pass the same list, so
//! the simulated world cannot drift from the real one unnoticed.
//!
//! All nodes are made below one scratch directory, which is removed at the end.

mod bench;
mod limits;
mod nodes;
mod transactions;
mod watches;

use std::path::Path;

use bench::Bench;

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Cannot be checked here, and why.
    Skipped(&'static str),
}

/// One line of the report.
#[derive(Clone, Debug)]
pub struct Line {
    /// What was checked.
    pub name: &'static str,
    /// How it went; `Err` says what was wrong.
    pub result: Result<Verdict, String>,
}

type Check = (&'static str, fn(&mut Bench) -> Result<Verdict, String>);

/// Fails the check unless both are equal.
macro_rules! same {
    ($found:expr, $wanted:expr) => {{
        let (found, wanted) = (&$found, &$wanted);
        if found != wanted {
            return Err(format!("{} is {found:?} instead of {wanted:?}", stringify!($found)));
        }
    }};
}

/// Fails the check unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($words:tt)+) => {
        if !$condition {
            return Err(format!($($words)+));
        }
    };
}

use {ensure, same};

/// Runs all checks against the xenstored at `place`, or the one found by the usual search. The error says why there was
/// nothing to check.
pub fn run(place: Option<&Path>, mut report: impl FnMut(&Line)) -> Result<Vec<Line>, String> {
    let mut bench = Bench::open(place)?;
    let mut lines = Vec::new();
    let lists: [&[Check]; 4] = [nodes::CHECKS, watches::CHECKS, transactions::CHECKS, limits::CHECKS];
    for (name, check) in lists.into_iter().flatten() {
        let result = bench.fresh().and_then(|()| check(&mut bench));
        let line = Line { name, result };
        report(&line);
        lines.push(line);
    }
    bench.clean();
    Ok(lines)
}
