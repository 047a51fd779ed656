//! What an image says about itself, for operators; what is wrong with it, and mending what can be mended.

use alloc::string::String;
use alloc::vec::Vec;

use super::Vhd;
use super::footer::{Flaw, Footer, Kind};
use super::headers::{Batmap, Headers, read_headers};
use super::layout::{BLOCK_BYTES, FOOTER_BYTES, Header, NO_BLOCK, batmap_used_bytes};
use super::open::{Layout, for_each_entry};
use crate::SECTOR_BYTES;
use crate::bytes::{index, put};
use crate::error::{Corruption, Unsupported};
use crate::medium::Medium;

/// Findings that are kept; more are only counted.
const FINDINGS_MAX: usize = 64;

/// Places that blocks of a file can have at most, each with 4 bytes of memory. Blocks of 2 MiB have a million, as a BAT reaches no farther.
const PLACES_MAX: u64 = 4 << 20;

/// What `vhd-util query` and `scan` tell of an image, and a little more. Depth is the chain's, so whoever opens the chain knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Which kind.
    pub kind: Kind,
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Length of the file or device.
    pub image_bytes: u64,
    /// Identity.
    pub uuid: [u8; 16],
    /// The parent's identity, of a differencing image; `Some(None)` where it is raw.
    pub parent_uuid: Option<Option<[u8; 16]>>,
    /// The parent's base name.
    pub parent_name: String,
    /// Paths to the parent in the order in which to try them: absolute ones first, relative ones to the child's directory.
    pub parent_paths: Vec<String>,
    /// Only a parent, for storage managers.
    pub hidden: bool,
    /// The marker byte of blktap's batmap.
    pub marker: Option<u8>,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Blocks that are there.
    pub allocated_blocks: u64,
    /// Largest disk for which there is room in the metadata: growing up to it moves nothing.
    pub room_bytes: u64,
    /// Four letters of who made it.
    pub creator: [u8; 4],
    /// Seconds since 1970.
    pub created_seconds: u64,
    /// The footer at the end is missing or another than the copy: it was not closed.
    pub unclean: bool,
}

/// Describes an image. The BAT is read to count blocks.
///
/// # Errors
/// [`Unsupported`].
pub fn info(medium: &mut dyn Medium) -> Result<Info, Unsupported> {
    let headers = read_headers(medium)?;
    let mut allocated_blocks = 0;
    let mut parent_name = String::new();
    if let Some(header) = &headers.header {
        parent_name = header.parent_name();
        for_each_entry(medium, header.table_bytes(), headers.blocks(), |_, start| {
            allocated_blocks += u64::from(start != NO_BLOCK);
            Ok(())
        })?;
    }
    let fixed = headers.footer.kind() == Kind::Fixed;
    let entries = headers.header.as_ref().map_or(0, Header::entries);
    let room_bytes = (u64::from(entries) * headers.block_bytes()).min(super::DISK_BYTES_MAX);
    Ok(Info {
        kind: headers.footer.kind(),
        disk_bytes: headers.disk_bytes,
        image_bytes: headers.length_bytes,
        uuid: headers.footer.uuid(),
        parent_uuid: headers.parent_uuid(),
        parent_name,
        parent_paths: headers.parent_paths(),
        hidden: headers.footer.hidden(),
        marker: headers.batmap.as_ref().map(|batmap| batmap.header.marker()),
        block_bytes: headers.block_bytes(),
        allocated_blocks,
        room_bytes: if fixed { headers.disk_bytes } else { room_bytes },
        creator: headers.footer.creator(),
        created_seconds: u64::from(headers.footer.timestamp()) + super::layout::EPOCH,
        unclean: !fixed && headers.footers.stale(),
    })
}

impl Headers {
    /// Paths to the parent, absolute ones first, each once.
    #[must_use]
    pub fn parent_paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = Vec::new();
        for absolute in [true, false] {
            let known = self.parents.iter().filter_map(|parent| parent.path.as_ref());
            for path in known.filter(|path| path.starts_with('/') == absolute) {
                let bare = path.strip_prefix("./").unwrap_or(path);
                if !bare.is_empty() && !paths.iter().any(|other| other == bare) {
                    paths.push(String::from(bare));
                }
            }
        }
        paths
    }
}

/// Whether a parent is the one that a child names. Time stamps do not count: hiding and merging change them.
///
/// # Errors
/// [`Unsupported::Refused`], with the reason.
pub fn check_parent(child: &Headers, parent: Option<&Headers>) -> Result<(), Unsupported> {
    match (child.parent_uuid(), parent) {
        (None, None) => Ok(()),
        (None, Some(_)) => Err(Unsupported::Refused("only a differencing VHD has a parent")),
        (Some(None), None) => Ok(()),
        (Some(None), Some(_)) => Err(Unsupported::Refused("the VHD's parent is a raw image, not a VHD")),
        (Some(Some(_)), None) => Err(Unsupported::Refused("the VHD's parent is a VHD, not a raw image")),
        (Some(Some(uuid)), Some(parent)) if uuid == parent.footer.uuid() => Ok(()),
        (Some(Some(_)), Some(_)) => {
            Err(Unsupported::Refused("the parent is another VHD than the child names (UUID)"))
        }
    }
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Contradictions that nothing can mend without guessing.
    pub corruptions: u64,
    /// What repair mends: footers, the batmap.
    pub flaws: u64,
    /// Of them, how many were mended.
    pub repaired: u64,
    /// Blocks that are there.
    pub allocated_blocks: u64,
    /// Room between blocks that no block takes; it is used again.
    pub gap_bytes: u64,
    /// The first findings.
    pub findings: Vec<Corruption>,
}

impl Report {
    fn note(&mut self, what: &'static str, at_bytes: u64) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Corruption { what, at_bytes });
        }
    }

    fn corrupt(&mut self, what: &'static str, at_bytes: u64) {
        self.corruptions += 1;
        self.note(what, at_bytes);
    }

    fn flaw(&mut self, what: &'static str, at_bytes: u64) {
        self.flaws += 1;
        self.note(what, at_bytes);
    }
}

/// Takes back what a tool did to disable an image: the cookie `v_poison`.
///
/// # Errors
/// What the medium says.
pub fn enable(medium: &mut dyn Medium) -> Result<bool, Unsupported> {
    let length_bytes = medium.length_bytes();
    let mut enabled = false;
    for at_bytes in [0, length_bytes.saturating_sub(FOOTER_BYTES)] {
        let mut bytes = [0; 512];
        medium.read(at_bytes, &mut bytes)?;
        if Footer::parse(bytes) == Err(Flaw::Poisoned) {
            let footer = Footer::enabled(bytes);
            medium.write(at_bytes, &footer.0)?;
            enabled = true;
        }
    }
    medium.sync()?;
    Ok(enabled)
}

/// Looks at all metadata of an image; with `repair`, mends what can be mended without guessing. Nothing is written to an image that
/// contradicts itself.
///
/// # Errors
/// [`Unsupported`] where not even the headers can be read.
pub fn check(medium: &mut dyn Medium, grows: bool, repair: bool) -> Result<Report, Unsupported> {
    let headers = read_headers(medium)?;
    let mut report = Report::default();
    let end_at = headers.length_bytes - FOOTER_BYTES;
    let kind = headers.footer.kind();
    if kind == Kind::Fixed {
        return Ok(report);
    }
    if !headers.footers.copy {
        report.flaw("the copy of the footer at byte 0 is not valid", 0);
    }
    if !headers.footers.end {
        report.flaw("no footer at the end: the image was not closed", end_at);
    } else if headers.footers.copy && !headers.footers.equal {
        report.flaw("the two footers differ", end_at);
    } else if headers.footers.short {
        report.flaw("the footer at the end lacks its last byte", end_at);
    }
    let layout = check_table(medium, &headers, grows, &mut report)?;
    let map = match &headers.batmap {
        Some(batmap) => check_batmap(medium, &headers, batmap, &mut report)?,
        None => None,
    };
    if repair && report.flaws > 0 && report.corruptions == 0 && headers.block_bytes() == BLOCK_BYTES {
        if let (Some(map), Some(batmap)) = (map, &headers.batmap) {
            let mut header = batmap.header;
            header.set_map(header.map_bytes(), &map);
            medium.write(header.map_bytes(), &map)?;
            medium.write(batmap.at_bytes, &header.0)?;
        }
        write_footers(
            medium,
            &headers.footer,
            if grows { Some(layout.end_sector * SECTOR_BYTES) } else { None },
        )?;
        report.repaired = report.flaws;
    }
    Ok(report)
}

/// Writes the copy, then the footer at the end: behind the last block, or in the last sector of a device. The copy counts, so it is
/// durable first.
pub(super) fn write_footers(
    medium: &mut dyn Medium,
    footer: &Footer,
    end_bytes: Option<u64>,
) -> Result<(), Unsupported> {
    if footer.kind() != Kind::Fixed {
        medium.write(0, &footer.0)?;
        medium.sync()?;
    }
    let length_bytes = medium.length_bytes();
    let at_bytes = end_bytes.unwrap_or(length_bytes.saturating_sub(FOOTER_BYTES));
    medium.write(at_bytes, &footer.0)?;
    medium.set_length(at_bytes + FOOTER_BYTES)?;
    medium.sync()?;
    Ok(())
}

/// Looks at every entry of the BAT.
fn check_table(
    medium: &mut dyn Medium,
    headers: &Headers,
    grows: bool,
    report: &mut Report,
) -> Result<Layout, Unsupported> {
    let vhd = Vhd::of_headers(headers);
    if headers.length_bytes / SECTOR_BYTES / vhd.stride() > PLACES_MAX {
        return Err(Unsupported::Refused("it is too large to be checked, for the size of its blocks"));
    }
    let mut layout = Layout::new(vhd.stride(), headers.end_of_metadata().div_ceil(SECTOR_BYTES));
    let limit = if grows { u64::MAX } else { headers.length_bytes - FOOTER_BYTES };
    for_each_entry(medium, vhd.table_bytes, headers.blocks(), |block, start| {
        if start == NO_BLOCK {
            return Ok(());
        }
        report.allocated_blocks += 1;
        let end = (u64::from(start) + vhd.stride()) * SECTOR_BYTES;
        let what = vhd.contradiction(start).or_else(|| layout.take(start));
        match what.or_else(|| (end > limit).then_some("a block that reaches into the footer")) {
            Some(what) => report.corrupt(what, vhd.entry_bytes(block)),
            None if end > headers.length_bytes && headers.footers.end => {
                report.flaw("a block that ends behind the image", vhd.entry_bytes(block));
            }
            None => {}
        }
        Ok(())
    })?;
    let taken = report.allocated_blocks * vhd.stride();
    let first = headers.end_of_metadata().div_ceil(SECTOR_BYTES);
    report.gap_bytes = layout.end_sector.saturating_sub(first).saturating_sub(taken) * SECTOR_BYTES;
    Ok(layout)
}

/// Compares the batmap with BAT and bitmaps. Returns what it should be, if that is not what it is.
fn check_batmap(
    medium: &mut dyn Medium,
    headers: &Headers,
    batmap: &Batmap,
    report: &mut Report,
) -> Result<Option<Vec<u8>>, Unsupported> {
    let mut map = batmap.map.clone();
    map.resize(index(batmap_used_bytes(headers.footer.current_bytes())), 0);
    let before = report.flaws;
    if batmap.map.is_empty() {
        report.flaw("a batmap with a wrong checksum", batmap.at_bytes);
    }
    let table_bytes = headers.header.as_ref().map_or(0, Header::table_bytes);
    let mut claims = Vec::new();
    for_each_entry(medium, table_bytes, headers.blocks(), |block, start| {
        if map.get(block as usize / 8).is_some_and(|byte| byte << (block % 8) & 0x80 != 0) {
            claims.push((block, start));
        }
        Ok(())
    })?;
    for (block, start) in claims {
        let at_bytes = u64::from(start) * SECTOR_BYTES;
        let mut bitmap = [0; 512];
        if start != NO_BLOCK {
            medium.read(at_bytes, &mut bitmap)?;
        }
        if bitmap.iter().any(|&byte| byte != 0xff) {
            report.flaw("a batmap that calls a block full which is not", batmap.at_bytes);
            let at = block as usize / 8;
            let cleared = map.get(at).map_or(0, |byte| byte & !(0x80 >> (block % 8)));
            put(&mut map, at, &[cleared]);
        }
    }
    Ok((report.flaws > before).then_some(map))
}
