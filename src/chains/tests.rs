use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use formats::qcow2::create as qcow2;
use formats::vhd::create as vhd;
use formats::{Failure, Medium};

use super::*;

/// A file that others may have open too.
#[derive(Clone, Debug, Default)]
struct Bytes(Rc<RefCell<Vec<u8>>>);

impl Medium for Bytes {
    fn length_bytes(&mut self) -> u64 {
        self.0.borrow().len() as u64
    }

    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        let all = self.0.borrow();
        for (place, at) in bytes.iter_mut().zip(offset_bytes..) {
            *place = usize::try_from(at).ok().and_then(|at| all.get(at)).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        let mut all = self.0.borrow_mut();
        let from = usize::try_from(offset_bytes).unwrap();
        let length = all.len().max(from + bytes.len());
        all.resize(length, 0);
        all[from..from + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        let zeroes = vec![0; usize::try_from(length_bytes).unwrap()];
        self.write(offset_bytes, &zeroes)
    }

    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        self.0.borrow_mut().resize(usize::try_from(length_bytes).unwrap(), 0);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

#[derive(Default)]
struct Shelf {
    files: BTreeMap<String, Bytes>,
    /// What was opened, and whether for writing.
    opened: Vec<(String, bool)>,
}

impl Library for Shelf {
    type File = Bytes;

    fn open(&mut self, path: &str, writable: bool) -> Result<Found<Bytes>, OpenError> {
        self.opened.push((path.into(), writable));
        let place = self.files.keys().position(|known| known == path);
        let Some(place) = place else { return Err(refuse(path, "there is no such file")) };
        let identity = Identity::File { device: 1, inode: place as u64 };
        Ok(Found { medium: self.files[path].clone(), identity, grows: true })
    }
}

const DISK_BYTES: u64 = 64 << 20;

impl Shelf {
    fn raw(&mut self, path: &str) {
        let mut file = Bytes::default();
        file.set_length(DISK_BYTES).unwrap();
        self.files.insert(path.into(), file);
    }

    fn qcow2(&mut self, path: &str, backing: Option<(&str, Option<&str>)>) {
        let mut file = Bytes::default();
        let mut what = qcow2::Create::new(DISK_BYTES);
        what.backing = backing.map(|(name, format)| (name.into(), format.unwrap_or("raw").into()));
        qcow2::create(&mut file, &what).unwrap();
        if let Some((_, None)) = backing {
            // An extension that nobody knows, where the one that tells the format was.
            let mut bytes = file.0.borrow_mut();
            let at = bytes.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
            bytes[at] = 0x11;
        }
        self.files.insert(path.into(), file);
    }

    fn vhd(&mut self, path: &str, below: Option<(&str, &str)>) {
        let uuid = [u8::try_from(self.files.len()).unwrap() + 1; 16];
        let what = match below {
            None => vhd::Create {
                kind: Kind::Dynamic,
                disk_bytes: DISK_BYTES,
                room_bytes: 0,
                uuid,
                seconds: 800_000_000,
                parent: None,
            },
            Some((parent, name)) => match read_headers(&mut self.files[parent].clone()) {
                Ok(headers) => vhd::Create::snapshot(&headers, name.into(), uuid, 800_000_000),
                Err(_) => vhd::Create::snapshot_of_raw(DISK_BYTES, name.into(), uuid, 800_000_000),
            },
        };
        let mut file = Bytes::default();
        vhd::create(&mut file, &what).unwrap();
        self.files.insert(path.into(), file);
    }

    fn open_all(&mut self, format: Format, path: &str) -> Result<Vec<Link<Bytes>>, String> {
        let wish = Wish { writable: true, parents: true };
        open(self, &Image { format, path: path.into() }, wish).map_err(|error| error.to_string())
    }

    fn paths(&mut self, format: Format, path: &str) -> Vec<String> {
        let chain = self.open_all(format, path).unwrap();
        chain.into_iter().map(|link| format!("{}:{}", link.image.format.name(), link.image.path)).collect()
    }
}

#[test]
fn parents_are_found_from_where_their_child_lies_and_only_the_leaf_is_written() {
    let mut shelf = Shelf::default();
    shelf.raw("/t/base.img");
    shelf.qcow2("/t/b.qcow2", Some(("base.img", Some("raw"))));
    shelf.qcow2("/i/sub/a.qcow2", Some(("../../t/./b.qcow2", Some("qcow2"))));
    assert_eq!(
        shelf.paths(Format::Qcow2, "/i/sub/a.qcow2"),
        ["qcow2:/i/sub/a.qcow2", "qcow2:/t/b.qcow2", "raw:/t/base.img"]
    );
    let writable: Vec<bool> = shelf.opened.iter().map(|(_, writable)| *writable).collect();
    assert_eq!(writable, [true, false, false]);
}

#[test]
fn vhds_are_found_by_their_locators_and_must_be_who_the_child_means() {
    let mut shelf = Shelf::default();
    shelf.raw("/s/raw");
    shelf.vhd("/s/a.vhd", Some(("/s/raw", "raw")));
    shelf.vhd("/s/b.vhd", Some(("/s/a.vhd", "a.vhd")));
    assert_eq!(shelf.paths(Format::Vhd, "/s/b.vhd"), ["vhd:/s/b.vhd", "vhd:/s/a.vhd", "raw:/s/raw"]);
    shelf.vhd("/s/a.vhd", None);
    let error = shelf.open_all(Format::Vhd, "/s/b.vhd").unwrap_err();
    assert!(
        error.contains("/s/a.vhd: ") && error.contains("UUID") && error.contains("parent of /s/b.vhd"),
        "{error}"
    );
}

#[test]
fn a_qcow2_may_be_over_a_vhd_that_stands_alone() {
    let mut shelf = Shelf::default();
    shelf.raw("/s/raw");
    shelf.vhd("/s/alone.vhd", None);
    shelf.vhd("/s/child.vhd", Some(("/s/alone.vhd", "alone.vhd")));
    shelf.qcow2("/s/1", Some(("alone.vhd", Some("vpc"))));
    shelf.qcow2("/s/2", Some(("child.vhd", Some("vpc"))));
    assert_eq!(shelf.paths(Format::Qcow2, "/s/1"), ["qcow2:/s/1", "vhd:/s/alone.vhd"]);
    let error = shelf.open_all(Format::Qcow2, "/s/2").unwrap_err();
    assert!(error.starts_with("/s/child.vhd: is a differencing VHD"), "{error}");
}

#[test]
fn loops_and_endless_chains_are_refused() {
    let mut shelf = Shelf::default();
    shelf.qcow2("/a", Some(("/b", Some("qcow2"))));
    shelf.qcow2("/b", Some(("/a", Some("qcow2"))));
    let error = shelf.open_all(Format::Qcow2, "/a").unwrap_err();
    assert!(error.contains("loop") && error.contains("parent of /b"), "{error}");
    for number in 0..65 {
        let parent = format!("{}", number + 1);
        let backing = (number < 64).then_some((parent.as_str(), Some("qcow2")));
        shelf.qcow2(&format!("/{number}"), backing);
    }
    assert_eq!(shelf.open_all(Format::Qcow2, "/1").map(|chain| chain.len()), Ok(DEPTH_MAX));
    let error = shelf.open_all(Format::Qcow2, "/0").unwrap_err();
    assert!(error.contains("more than 64 images"), "{error}");
}

#[test]
fn what_a_parent_may_not_be() {
    let mut shelf = Shelf::default();
    shelf.raw("/raw");
    for (number, (backing, expected)) in [
        (("/raw", None), "does not say of which format"),
        (("/raw", Some("vmdk")), "vmdk, which cannot be read"),
        (("/none", Some("raw")), "no such file (it is the parent of /q"),
        (("/raw", Some("qcow2")), "no QCOW2 magic"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = format!("/q{number}");
        shelf.qcow2(&path, Some(backing));
        let error = shelf.open_all(Format::Qcow2, &path).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let alone = Wish { writable: false, parents: false };
    let leaf = Image { format: Format::Qcow2, path: "/q0".into() };
    assert_eq!(open(&mut shelf, &leaf, alone).map(|chain| chain.len()), Ok(1), "nobody asked for parents");
}

/// A crash leaves the dirty bit and leaks; opening to write mends them, opening to read leaves the image alone.
#[test]
fn an_image_that_was_not_closed_is_repaired_for_writing_only() {
    let mut shelf = Shelf::default();
    shelf.qcow2("/a", None);
    let file = shelf.files["/a"].clone();
    let dirty = {
        let mut bytes = file.0.borrow_mut();
        bytes[79] |= 1;
        bytes.clone()
    };
    let leaf = Image { format: Format::Qcow2, path: "/a".into() };
    open(&mut shelf, &leaf, Wish { writable: false, parents: true }).unwrap();
    assert!(*file.0.borrow() == dirty);
    let chain = shelf.open_all(Format::Qcow2, "/a").unwrap();
    assert_eq!(chain[0].format.geometry().sectors, DISK_BYTES / 512);
    assert_eq!(file.0.borrow()[79] & 1, 0);
}

#[test]
fn names_as_seen_from_a_directory() {
    for (directory, name, expected) in [
        ("/a", "b", "/a/b"),
        ("/a", "/b", "/b"),
        ("/a", "../../../b", "/b"),
        ("/", "x", "/x"),
        ("/a/b", "./../c//d", "/a/c/d"),
    ] {
        assert_eq!(beside(directory, name), expected);
    }
    assert_eq!((directory("/a"), directory("/a/b"), directory("a")), ("/", "/a", "/"));
}
