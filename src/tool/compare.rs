//! `vbdd image compare`.

use formats::SECTOR_BYTES;
use formats::bytes::{index, wide};

use super::file::{Lock, Shell};
use super::json::Object;
use super::layers::Chain;
use super::out::Progress;
use super::read::{Fill, Pool, What, fill, stretch};
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

/// Where two parts begin to differ.
type Difference = Result<Option<u64>, Failed>;

struct Job {
    sector: u64,
    length: usize,
    fills: (Vec<Fill>, Vec<Fill>),
}

fn look(job: Job) -> Difference {
    let (mut one, mut other) = (Vec::new(), Vec::new());
    fill(&job.fills.0, job.length, &mut one)?;
    fill(&job.fills.1, job.length, &mut other)?;
    if one == other {
        return Ok(None);
    }
    let same = one.iter().zip(&other).take_while(|(one, other)| one == other).count();
    Ok(Some(job.sector * SECTOR_BYTES + wide(same)))
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

fn first_difference(one: &mut Chain, other: &mut Chain, end: u64, quiet: bool) -> Difference {
    let mut progress = Progress::new("compare", end * SECTOR_BYTES, quiet);
    let mut pool: Pool<Job, Difference> = Pool::new(look)?;
    let (mut at, mut open) = (0, 0);
    while at < end || open > 0 {
        if at < end && !pool.is_full() {
            let (found, sectors) = pair(one, other, at, end)?;
            if let Pair::Data(ours, theirs) = found {
                pool.give(Job { sector: at, length: index(sectors * SECTOR_BYTES), fills: (ours, theirs) })?;
                open += 1;
            }
            at += sectors;
            progress.done(at * SECTOR_BYTES);
            continue;
        }
        open -= 1;
        if let Some(found) = pool.take()?? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
