//! `vbdd image compare`.

use std::collections::VecDeque;

use formats::SECTOR_BYTES;
use formats::bytes::{index, wide};

use super::file::{Lock, Shell};
use super::json::Object;
use super::layers::Chain;
use super::out::Progress;
use super::read::{Fill, Job, Pool, What, stretch};
use super::words::{self, Options, Words};
use super::{Command, Failed};
use crate::cli::print;

pub(super) const COMMAND: Command = Command {
    name: "compare",
    help: HELP,
    options: Options { values: &["f", "F"], flags: &["s", "U", "p"] },
    run: compare,
};

const HELP: &str = "\
vbdd image compare tells whether two disks hold the same, whatever their formats.

Usage: vbdd image compare [-f FORMAT] [-F FORMAT] [-s] FORMAT:PATH FORMAT:PATH

  -f FORMAT  of the first image, where it does not say it
  -F FORMAT  of the second
  -s         strict: their sizes are the same, too. Else what is longer must be zero behind the other's end
  -U         read images that others have open for writing
  -p         accepted
  --json     the result as JSON

Exit code: 0 the same; 1 different; 2 they could not be compared.
";

/// Two stretches of the same sectors.
#[derive(Debug)]
pub(super) enum Pair {
    /// Both are zero.
    Zero,
    /// Bytes of either; no fills where one is zero.
    Data(Vec<Fill>, Vec<Fill>),
}

/// The next stretch of two disks. Behind its end a disk is zero.
pub(super) fn pair(one: &mut Chain, other: &mut Chain, from: u64, end: u64) -> Result<(Pair, u64), Failed> {
    let next = |chain: &mut Chain, end: u64| {
        if from >= chain.sectors {
            Ok((What::Absent, end - from))
        } else {
            stretch(chain, from, end.min(chain.sectors))
        }
    };
    let (mut first, ours) = next(one, end)?;
    let (mut second, theirs) = next(other, end)?;
    let sectors = ours.min(theirs);
    let is_data = matches!(first, What::Data(_)) || matches!(second, What::Data(_));
    if !is_data {
        return Ok((Pair::Zero, sectors));
    }
    if ours > sectors {
        first = next(one, from + sectors)?.0;
    }
    if theirs > sectors {
        second = next(other, from + sectors)?.0;
    }
    let fills = |what| if let What::Data(fills) = what { fills } else { Vec::new() };
    Ok((Pair::Data(fills(first), fills(second)), sectors))
}

fn compare(words: &Words) -> Result<u8, Failed> {
    compared(words).map_err(|failed| failed.with_code(2))
}

fn compared(words: &Words) -> Result<u8, Failed> {
    let [one, other] = words.exactly("compare", ["PATH", "PATH"])?;
    let first = words::image(one, words.format("f")?)?;
    let second = words::image(other, words.format("F")?)?;
    let lock = if words.has("U") { Lock::None } else { Lock::Shared };
    let mut one = Chain::open(&first, Shell { lock }, true)?;
    let mut other = Chain::open(&second, Shell { lock }, true)?;
    (one.deep, other.deep) = (true, true);
    let (sizes_differ, end) = (one.sectors != other.sectors, one.sectors.max(other.sectors));
    let found = if sizes_differ && words.has("s") {
        None
    } else {
        Some(first_difference(&mut one, &mut other, end, words.has("q"))?)
    };
    let verdict = match found {
        None => format!("Strict mode: the sizes differ, {} and {} bytes.\n", one.bytes(), other.bytes()),
        Some(Some(at)) => format!("Content mismatch at offset {at}!\n"),
        Some(None) if sizes_differ => {
            "The sizes differ, but what is longer is zero there.\nImages are identical.\n".into()
        }
        Some(None) => "Images are identical.\n".into(),
    };
    let same = found == Some(None);
    if words.has("json") {
        let mut object = Object::new().flag("identical", same).flag("sizes-differ", sizes_differ);
        if let Some(Some(at)) = found {
            object = object.number("offset", at);
        }
        print(&(object.end() + "\n"))?;
    } else if !words.has("q") {
        print(&verdict)?;
    }
    Ok(u8::from(!same))
}

/// The first byte in which two disks differ.
fn first_difference(
    one: &mut Chain,
    other: &mut Chain,
    end: u64,
    quiet: bool,
) -> Result<Option<u64>, Failed> {
    let mut progress = Progress::new("compare", end * SECTOR_BYTES, quiet);
    let pool = Pool::new()?;
    let mut begins = VecDeque::new();
    let mut at = 0;
    while at < end || !begins.is_empty() {
        if at < end && !pool.is_full() {
            let (found, sectors) = pair(one, other, at, end)?;
            if let Pair::Data(fills, others) = found {
                let length = index(sectors * SECTOR_BYTES);
                pool.give(Job { fills, others: Some(others), length, part: Vec::new() });
                begins.push_back(at * SECTOR_BYTES);
            }
            at += sectors;
            progress.done(at * SECTOR_BYTES);
            continue;
        }
        let begin = begins.pop_front().unwrap_or(0);
        if let (_, Some(found)) = pool.take()? {
            return Ok(Some(begin + wide(found)));
        }
    }
    Ok(None)
}
