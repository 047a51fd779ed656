//! `vbdd image check`.

use formats::bytes::{index, wide};
use formats::qcow2::Header;
use formats::qcow2::check as qcow2;
use formats::qcow2::check::Fix;
use formats::vhd::check as vhd;
use formats::{Corruption, Medium};

use super::file::{ImageFile, Lock, Shell};
use super::json::{Object, array};
use super::out::Progress;
use super::words::{self, Options, Words};
use super::{Command, Failed, trouble};
use crate::cli::print;
use crate::error::Error;
use crate::params::{Format, Image};

pub(super) const COMMAND: Command = Command {
    name: "check",
    help: HELP,
    options: Options { values: &["f", "repair"], flags: &["U", "p"] },
    run,
};

const HELP: &str = "\
vbdd image check looks for contradictions in an image's metadata, and repairs them. Images below it are not looked at.

Usage: vbdd image check [-f FORMAT] [--repair[=leaks|all]] FORMAT:PATH

  -f FORMAT        qcow2 or vhd, where PATH does not say it
  -r, --repair[=WHAT]
                   leaks (what a crash leaves: space that is lost; footers and batmap of a VHD), or
                   all (QCOW2: refcounts that are too low, missing refcount blocks, marks; VHD: a disabled image, too)
  -U               look at an image that others have open; what they are changing looks damaged
  -p               accepted
  --json           the report as JSON

Exit code: 0 nothing is wrong, or all of it was repaired; 1 the check itself failed; 2 damaged; 3 leaks only (of a VHD: what
repair mends); 63 a raw image has nothing to check.
";

/// What was found, in the same words for all formats.
#[derive(Debug, Default)]
struct Found {
    corruptions: u64,
    leaks: u64,
    corruptions_fixed: u64,
    leaks_fixed: u64,
    findings: Vec<Corruption>,
    /// Of the format's own.
    numbers: Vec<(&'static str, u64)>,
}

fn run(words: &Words) -> Result<u8, Failed> {
    let [path] = words.exactly("check", ["PATH"])?;
    let image = words::image(path, words.format("f")?)?;
    let repair = match words.value("repair") {
        None => Fix::Nothing,
        Some("leaks") => Fix::Leaks,
        Some("all") => Fix::All,
        Some(other) => return Err(words::misuse(format!("--repair {other}: leaks or all"), "check")),
    };
    if image.format == Format::Raw {
        let what = format!("{}: a raw image has no metadata to check", image.path);
        return Err(Failed::from(Error::new(what, "")).with_code(63));
    }
    let lock = if words.has("U") { Lock::None } else { Lock::Shared };
    let opened = Shell { lock }.open_file(&image.path, repair != Fix::Nothing);
    let (mut file, _) = opened.map_err(|error| super::opening(error, &image))?;
    if image.format == Format::Qcow2 {
        let total = to_be_read(&mut file).map_err(|why| trouble(&image, &file, &why))?;
        file.show(Progress::new("check", total, words.has("q")));
    }
    let found = match image.format {
        Format::Vhd => check_vhd(&mut file, repair),
        _ => check_qcow2(&mut file, repair),
    };
    let found = found.map_err(|why| trouble(&image, &file, &why))?;
    let end = file.length_bytes();
    print(&if words.has("json") { json(&image, &found, end) } else { text(&image, &found, repair) })?;
    Ok(match () {
        () if found.corruptions > found.corruptions_fixed => 2,
        () if found.leaks > found.leaks_fixed => 3,
        () => 0,
    })
}

/// About what a check reads: the L2 tables, twice for each window of clusters.
fn to_be_read(file: &mut ImageFile) -> Result<u64, formats::Unsupported> {
    let header = Header::read(file)?;
    let mut table = vec![0; index(u64::from(header.l1_entries) * 8)];
    file.read(header.l1_offset, &mut table)?;
    let tables = table.chunks_exact(8).filter(|entry| entry.iter().any(|byte| *byte != 0)).count();
    let windows = (file.length_bytes() / header.shape.cluster_bytes()).div_ceil(qcow2::WINDOW).max(1);
    Ok(wide(tables) * header.shape.cluster_bytes() * windows * 2)
}

fn check_qcow2(file: &mut ImageFile, repair: Fix) -> Result<Found, formats::Unsupported> {
    let report = qcow2::check(file, repair)?;
    Ok(Found {
        corruptions: report.corruptions,
        leaks: report.leaks,
        corruptions_fixed: report.corruptions_repaired,
        leaks_fixed: report.leaks_repaired,
        findings: report.findings,
        numbers: vec![("total-clusters", report.clusters), ("allocated-clusters", report.used)],
    })
}

fn check_vhd(file: &mut ImageFile, repair: Fix) -> Result<Found, formats::Unsupported> {
    let mut found = Found::default();
    if repair == Fix::All && vhd::enable(file)? {
        found.leaks += 1;
        found.leaks_fixed += 1;
    }
    let grows = !file.is_device();
    let report = vhd::check(file, grows, repair != Fix::Nothing)?;
    found.corruptions = report.corruptions;
    found.leaks += report.flaws;
    found.leaks_fixed += report.repaired;
    found.findings = report.findings;
    found.numbers = vec![("allocated-blocks", report.allocated_blocks), ("gap-bytes", report.gap_bytes)];
    Ok(found)
}

fn json(image: &Image, found: &Found, end: u64) -> String {
    let findings: Vec<String> = found
        .findings
        .iter()
        .map(|finding| Object::new().text("what", finding.what).number("offset", finding.at_bytes).end())
        .collect();
    let mut object = Object::new()
        .text("filename", &image.path)
        .text("format", image.format.name())
        .number("check-errors", 0)
        .number("image-end-offset", end)
        .number("corruptions", found.corruptions - found.corruptions_fixed)
        .number("leaks", found.leaks - found.leaks_fixed)
        .number("corruptions-fixed", found.corruptions_fixed)
        .number("leaks-fixed", found.leaks_fixed);
    for (name, number) in &found.numbers {
        object = object.number(name, *number);
    }
    object.raw("findings", &array(&findings)).end() + "\n"
}

fn text(image: &Image, found: &Found, repair: Fix) -> String {
    let mut out = String::new();
    for finding in &found.findings {
        out.push_str(&format!("{finding}\n"));
    }
    let mut mended = Vec::new();
    if found.corruptions_fixed > 0 {
        mended.push(format!("{} damaged places", found.corruptions_fixed));
    }
    if found.leaks_fixed > 0 {
        let what = if image.format == Format::Vhd { "flaws" } else { "lost clusters" };
        mended.push(format!("{} {what}", found.leaks_fixed));
    }
    if !mended.is_empty() {
        out.push_str(&format!("Repaired: {}.\n", mended.join(", ")));
    }
    let (corrupt, leaks) = (found.corruptions - found.corruptions_fixed, found.leaks - found.leaks_fixed);
    if corrupt > 0 {
        let hint = match repair {
            Fix::All => "this cannot be repaired: copy what can be read with vbdd image convert",
            _ if image.format == Format::Vhd => "this cannot be repaired without guessing",
            _ => "vbdd image check --repair=all repairs what can be",
        };
        out.push_str(&format!("Damaged in {corrupt} places; {hint}.\n"));
    }
    if leaks > 0 {
        let what = match image.format {
            Format::Vhd => "flaws, which do no harm",
            _ => "clusters are lost, which does no harm",
        };
        out.push_str(&format!("{leaks} {what}; vbdd image check --repair mends that.\n"));
    }
    if corrupt + leaks == 0 {
        out.push_str("Nothing is wrong with the image.\n");
    }
    for (name, number) in &found.numbers {
        out.push_str(&format!("{name}: {number}\n"));
    }
    out
}
