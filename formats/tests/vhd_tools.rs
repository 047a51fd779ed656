//! Tools for VHDs: create, info, check, repair, grow, parents, hiding; and crashes in the middle of each.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]
#![allow(clippy::cast_possible_truncation)]

mod support;
mod vhd_support;

use std::collections::HashMap;

use formats::vhd::change::{grow, set_hidden, set_parent};
use formats::vhd::check::{check, check_parent, enable, info};
use formats::vhd::create::{Create, Parent, create};
use formats::vhd::{Kind, Vhd, read_headers};
use formats::{Disk, Extent, Failure, Format, Limits, Medium, Op, Pages, Unsupported};
use support::driver::Driver;
use support::rng::Rng;
use vhd_support::model::{Found, Model};
use vhd_support::sparse::Sparse;
use vhd_support::world::{BLOCK, blank};

const MIB: u64 = 1 << 20;

fn parent(path: &str) -> Parent {
    Parent { uuid: Some([5; 16]), timestamp: 77, path: path.into() }
}

fn what(kind: Kind, disk_bytes: u64) -> Create {
    let parent = (kind == Kind::Differencing).then(|| parent("base.vhd"));
    Create { kind, disk_bytes, room_bytes: 0, uuid: [9; 16], seconds: 1_000_000_000, parent }
}

/// Writes a sector of each block.
fn fill(mut medium: Sparse, blocks: &[u64]) -> Sparse {
    let facts = medium.facts();
    let image = Vhd::open_to_write(&mut medium, facts).unwrap();
    let disk = Disk::new(1, vec![(0, Box::new(image) as Box<dyn Format>)], false, Limits::default());
    let mut driver = Driver::new(disk, Pages::of_pages(64), HashMap::from([(0, medium)]), 1);
    for &block in blocks {
        let extent = Extent { sector: block * BLOCK + 7, sectors: 1 };
        driver.run(Op::Write, extent, vec![block as u8 + 1; 512]).0.unwrap();
    }
    driver.close().unwrap();
    driver.media.remove(&0).unwrap()
}

fn holds(medium: &Sparse, blocks: &[u64]) {
    let model = Model::new(medium);
    for block in 0..model.blocks {
        let value = if blocks.contains(&block) { block as u8 + 1 } else { 0 };
        assert_eq!(model.sector(block * BLOCK + 7), Found::Here([value; 512]), "block {block}");
    }
}

#[test]
fn info_says_what_create_was_told() {
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Differencing] {
        let mut medium = Sparse::file();
        let size =
            create(&mut medium, &Create { room_bytes: 100 * MIB, ..what(kind, 7 * MIB + 512) }).unwrap();
        assert_eq!(size, if kind == Kind::Fixed { 7 * MIB + 512 } else { 8 * MIB });
        let info = info(&mut medium).unwrap();
        assert_eq!((info.kind, info.disk_bytes, info.hidden, info.unclean), (kind, size, false, false));
        assert_eq!((info.uuid, info.created_seconds, info.allocated_blocks), ([9; 16], 1_000_000_000, 0));
        if kind == Kind::Differencing {
            assert_eq!(info.parent_uuid, Some(Some([5; 16])));
            assert_eq!(
                (info.parent_name.as_str(), info.parent_paths),
                ("base.vhd", vec!["base.vhd".to_owned()])
            );
        }
        if kind != Kind::Fixed {
            assert_eq!((info.room_bytes, info.marker), (100 * MIB, Some(0)));
            Model::new(&medium).check_closed();
        }
        assert_eq!(check(&mut medium, true, false).unwrap(), formats::vhd::check::Report::default());
    }
}

#[test]
fn what_the_format_cannot_be_is_refused_by_name() {
    let refuse = |what: &Create| match create(&mut Sparse::file(), what) {
        Err(Unsupported::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    assert!(refuse(&what(Kind::Dynamic, (2040 << 30) + 1)).contains("2040 GiB"));
    assert!(refuse(&what(Kind::Fixed, u64::MAX)).contains("2040 GiB"));
    assert!(refuse(&what(Kind::Dynamic, 0)).contains("sector"));
    let orphan = Create { parent: None, ..what(Kind::Differencing, MIB) };
    assert!(refuse(&orphan).contains("parent"));
    let long = Create { parent: Some(parent(&"x".repeat(9000))), ..what(Kind::Differencing, MIB) };
    assert!(refuse(&long).contains("too long"));
    create(&mut Sparse::file(), &what(Kind::Dynamic, 2040 << 30)).unwrap();
}

#[test]
fn parents_are_told_apart_by_uuid() {
    let mut base = blank(Kind::Dynamic, 2, 0, None, false, None);
    let base = read_headers(&mut base).unwrap();
    let mut child = blank(Kind::Differencing, 2, 0, None, false, Some(Parent::of(&base, "p.vhd".into())));
    let child = read_headers(&mut child).unwrap();
    check_parent(&child, Some(&base)).unwrap();
    check_parent(&child, None).unwrap_err();
    check_parent(&base, Some(&child)).unwrap_err();
    let raw = Parent { uuid: None, ..parent("disk.img") };
    let mut over_raw = blank(Kind::Differencing, 2, 0, None, false, Some(raw));
    let over_raw = read_headers(&mut over_raw).unwrap();
    check_parent(&over_raw, None).unwrap();
    check_parent(&over_raw, Some(&base)).unwrap_err();
    let mut other = blank(Kind::Differencing, 2, 0, None, false, Some(parent("p.vhd")));
    let other = read_headers(&mut other).unwrap();
    assert!(check_parent(&other, Some(&base)).unwrap_err().to_string().contains("UUID"));
}

/// A medium that fails for good after so many changes.
struct Dying {
    inner: Sparse,
    left: u64,
}

impl Dying {
    fn live(&mut self) -> Result<(), Failure> {
        self.left = self.left.checked_sub(1).ok_or(Failure::Io(5))?;
        Ok(())
    }
}

impl Medium for Dying {
    fn length_bytes(&mut self) -> u64 {
        self.inner.length_bytes()
    }
    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        self.inner.read(offset_bytes, bytes)
    }
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.live()?;
        self.inner.write(offset_bytes, bytes)
    }
    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        self.live()?;
        self.inner.zero(offset_bytes, length_bytes)
    }
    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        self.live()?;
        self.inner.set_length(length_bytes)
    }
    fn sync(&mut self) -> Result<(), Failure> {
        self.live()?;
        self.inner.sync()
    }
}

/// Runs a change up to every point, crashes there in several ways, and looks at what is left. Says how many points there were.
fn crash_everywhere(
    start: &Sparse,
    change: impl Fn(&mut dyn Medium) -> Result<(), Unsupported>,
    look: impl Fn(&mut Sparse),
) -> u64 {
    let mut points = 0;
    for left in 0.. {
        let mut medium = Dying { inner: start.clone(), left };
        let ended = change(&mut medium).is_ok();
        for seed in 0..6 {
            let mut after = medium.inner.crash(&mut Rng::new(left * 100 + seed), &[]).medium();
            look(&mut after);
            points += 1;
        }
        if ended {
            assert_eq!(medium.inner.unsynced(), 0, "what was done is durable");
            return points;
        }
    }
    points
}

fn usable(medium: &mut Sparse, blocks: &[u64]) {
    holds(medium, blocks);
    Model::new(medium).check(false);
    let report = check(medium, true, true).unwrap();
    assert_eq!((report.corruptions, report.flaws), (0, report.repaired));
    Model::new(medium).check_closed();
    let facts = medium.facts();
    Vhd::open_to_write(medium, facts).unwrap();
}

#[test]
fn growing_on_a_device_has_the_room_before_its_footer() {
    for (room, to, length) in [(0, 6, 24 * MIB), (10, 6, 24 * MIB), (0, 900, 64 * MIB)] {
        let image = fill(blank(Kind::Dynamic, 4, room, Some(length), false, None), &[0, 2]);
        let size = to * 2 * MIB;
        crash_everywhere(
            &image,
            |medium| grow(medium, false, size).map(drop),
            |after| {
                let disk = info(after).unwrap().disk_bytes;
                assert!(disk == 8 * MIB || disk == size);
                holds(after, &[0, 2]);
                assert_eq!(check(after, false, false).unwrap().corruptions, 0);
                let facts = after.facts();
                Vhd::open_to_write(after, facts).unwrap();
            },
        );
    }
    let mut full = fill(blank(Kind::Dynamic, 4, 0, Some(9 * MIB), false, None), &[0, 1, 2, 3]);
    let error = grow(&mut full, false, 2000 * 2 * MIB).unwrap_err();
    assert!(error.to_string().contains("no space left"), "{error}");
    holds(&full, &[0, 1, 2, 3]);
}

#[test]
fn growing_within_the_room_and_beyond_survives_crashes() {
    for (blocks, room, to) in [(3, 10, 9), (3, 0, 5), (4, 0, 5000), (2, 0, 300_000)] {
        let full: Vec<u64> = (0..blocks).step_by(2).collect();
        let image = fill(blank(Kind::Dynamic, blocks, room, None, false, None), &full);
        let size = to * 2 * MIB;
        let points = crash_everywhere(
            &image,
            |medium| grow(medium, true, size).map(drop),
            |after| {
                let disk = info(after).unwrap().disk_bytes;
                assert!(disk == blocks * 2 * MIB || disk == size);
                if to < 10_000 {
                    usable(after, &full);
                }
            },
        );
        let mut done = image.clone();
        assert_eq!(grow(&mut done, true, size).unwrap(), size);
        usable(&mut done, &full);
        let last = fill(done, &[to - 1]);
        let model = Model::new(&last);
        assert_eq!(model.sector((to - 1) * BLOCK + 7), Found::Here([(to - 1) as u8 + 1; 512]));
        model.check_closed();
        println!("{blocks} blocks to {to}: {points} points");
    }
    let mut image = blank(Kind::Dynamic, 3, 0, None, false, None);
    assert!(grow(&mut image, true, MIB).unwrap_err().to_string().contains("smaller"));
    assert!(grow(&mut image, true, 2041 << 30).unwrap_err().to_string().contains("2040 GiB"));
}

#[test]
fn fixed_images_grow() {
    let mut image = Sparse::file();
    create(&mut image, &what(Kind::Fixed, MIB)).unwrap();
    image.write(MIB - 512, &[3; 512]).unwrap();
    assert_eq!(grow(&mut image, true, 2 * MIB).unwrap(), 2 * MIB);
    assert_eq!(info(&mut image).unwrap().disk_bytes, 2 * MIB);
    assert_eq!((image.sector(2047), image.sector(2048)), ([3; 512], [0; 512]));
}

#[test]
fn a_new_parent_survives_crashes() {
    let image = blank(Kind::Differencing, 3, 0, None, false, Some(parent("old.vhd")));
    let image = fill(image, &[]);
    let mut medium = image.clone();
    let facts = medium.facts();
    let leaf = Vhd::open_to_write(&mut medium, facts).unwrap();
    let disk = Disk::new(1, vec![(0, Box::new(leaf) as Box<dyn Format>)], false, Limits::default());
    let mut driver = Driver::new(disk, Pages::of_pages(64), HashMap::from([(0, medium)]), 1);
    driver.run(Op::Write, Extent { sector: 9, sectors: 1 }, vec![8; 512]).0.unwrap();
    driver.close().unwrap();
    let mut image = driver.media.remove(&0).unwrap();
    // Often enough that the room beside the metadata is used again and again, with names of any length.
    for (turn, name) in ["b", &"long/".repeat(300), "c.vhd", &"x".repeat(200), "d"].iter().enumerate() {
        let path = format!("{name}{turn}.vhd");
        let new = Parent { uuid: Some([turn as u8 + 1; 16]), timestamp: 1, path: path.clone() };
        let before = info(&mut image).unwrap();
        let points = crash_everywhere(
            &image,
            |medium| set_parent(medium, true, &new),
            |after| {
                let found = info(after).unwrap();
                let whole = found.parent_uuid == before.parent_uuid
                    && found.parent_paths == before.parent_paths
                    || found.parent_uuid == Some(Some([turn as u8 + 1; 16]))
                        && found.parent_paths == [path.clone()];
                assert!(whole, "{found:?}");
                assert_eq!(Model::new(after).sector(9), Found::Here([8; 512]));
                assert_eq!(check(after, true, false).unwrap().corruptions, 0);
            },
        );
        set_parent(&mut image, true, &new).unwrap();
        Model::new(&image).check_closed();
        assert_eq!(info(&mut image).unwrap().parent_paths, [path]);
        println!("{points} points");
    }
}

#[test]
fn hiding_survives_crashes() {
    let image = fill(blank(Kind::Dynamic, 3, 0, None, false, None), &[1]);
    crash_everywhere(&image, |medium| set_hidden(medium, true), |after| usable(after, &[1]));
    let mut image = image.clone();
    set_hidden(&mut image, true).unwrap();
    assert!(info(&mut image).unwrap().hidden);
    Model::new(&image).check_closed();
    set_hidden(&mut image, false).unwrap();
    assert!(!info(&mut image).unwrap().hidden);
    let mut fixed = Sparse::file();
    create(&mut fixed, &what(Kind::Fixed, MIB)).unwrap();
    set_hidden(&mut fixed, true).unwrap();
    assert!(info(&mut fixed).unwrap().hidden);
    assert_eq!(fixed.length(), MIB + 512);
}

#[test]
fn repair_mends_footers_and_the_batmap() {
    let good = fill(blank(Kind::Dynamic, 3, 0, None, false, None), &[0, 2]);
    let end = good.length() - 512;
    type Harm = fn(&mut Sparse, u64);
    let breakages: [(&str, Harm); 5] = [
        ("no footer", |medium, end| medium.write(end, &[0xc7; 512]).unwrap()),
        ("copy", |medium, _| medium.write(0, &[0; 512]).unwrap()),
        ("cut", |medium, end| medium.set_length(end).unwrap()),
        ("batmap", |medium, _| {
            let at = read_headers(medium).unwrap().batmap.unwrap().header.map_bytes();
            medium.write(at, &[0xff; 512]).unwrap();
        }),
        ("stale", |medium, end| {
            let mut footer = read_headers(medium).unwrap().footer;
            footer.set_disk_bytes(2 * MIB);
            medium.write(end, &footer.0).unwrap();
        }),
    ];
    for (name, harm) in breakages {
        let mut image = good.clone();
        harm(&mut image, end);
        let found = check(&mut image, true, false).unwrap();
        assert!(found.flaws > 0 && found.corruptions == 0, "{name}: {found:?}");
        assert_eq!(check(&mut image, true, true).unwrap().repaired, found.flaws);
        assert_eq!(check(&mut image, true, false).unwrap().flaws, 0, "{name}");
        usable(&mut image, &[0, 2]);
    }
}

#[test]
fn poisoned_images_are_refused_until_enabled() {
    let mut image = fill(blank(Kind::Dynamic, 2, 0, None, false, None), &[1]);
    for at in [0, image.length() - 512] {
        let mut footer = image.sector(at / 512);
        let sum = u32::from_be_bytes(footer[64..68].try_into().unwrap());
        let old: u32 = footer[..8].iter().map(|&byte| u32::from(byte)).sum();
        footer[..8].copy_from_slice(b"v_poison");
        let new: u32 = footer[..8].iter().map(|&byte| u32::from(byte)).sum();
        footer[64..68].copy_from_slice(&(sum.wrapping_add(old).wrapping_sub(new)).to_be_bytes());
        image.write(at, &footer).unwrap();
    }
    assert!(read_headers(&mut image).unwrap_err().to_string().contains("v_poison"));
    assert!(enable(&mut image).unwrap());
    usable(&mut image, &[1]);
}

/// Bits of a batmap behind the disk's last block say nothing, and must not come to say something when the disk grows.
#[test]
fn what_a_batmap_says_behind_the_disk_is_forgotten_when_it_grows() {
    for room_bytes in [0, 100 * MIB] {
        let mut medium = Sparse::file();
        create(&mut medium, &Create { room_bytes, ..what(Kind::Dynamic, 8 * MIB) }).unwrap();
        let mut medium = fill(medium, &[1]);
        let headers = read_headers(&mut medium).unwrap();
        let batmap = headers.batmap.unwrap();
        let mut map = batmap.map.clone();
        map[0] |= 0x0f;
        map[1] = 0xff;
        let mut header = batmap.header;
        header.set_map(header.map_bytes(), &map);
        medium.write(header.map_bytes(), &map).unwrap();
        medium.write(batmap.at_bytes, &header.0).unwrap();
        grow(&mut medium, true, 32 * MIB).unwrap();
        let report = check(&mut medium, true, false).unwrap();
        assert_eq!((report.corruptions, report.flaws), (0, 0), "{report:?}");
        holds(&medium, &[1]);
    }
}
