use std::collections::HashMap;

use super::*;

#[repr(align(4096))]
#[derive(Clone)]
struct Page {
    _bytes: [u8; 4096],
}

/// A state directory that outlives the processes of a test.
#[derive(Clone, Default)]
struct Directory(Rc<RefCell<HashMap<String, Box<[Page]>>>>);

impl JournalStore for Directory {
    fn open(&mut self, name: &str, length_bytes: usize) -> Option<Memory> {
        let mut files = self.0.borrow_mut();
        let pages = length_bytes.div_ceil(4096);
        let file = files.entry(name.into()).or_insert_with(|| vec![Page { _bytes: [0; 4096] }; pages].into());
        // SAFETY: aligned, as long as asked for, and the box stays where it is.
        Some(unsafe { Memory::new(file.as_mut_ptr().cast(), length_bytes) })
    }

    fn close(&mut self, name: &str, _: Memory, remove: bool) {
        if remove {
            self.0.borrow_mut().remove(name);
        }
    }
}

impl Directory {
    fn process(&self) -> Kept {
        let kept = Kept::new(Rc::new(RefCell::new(Box::new(self.clone()))));
        kept.name(3, Some(FILE));
        kept
    }

    fn left(&self) -> Vec<(u64, Vec<u8>)> {
        let mut pages = self.process().left().of(FILE).pages;
        pages.sort();
        pages
    }
}

const FILE: Identity = Identity::File { device: 1, inode: 2 };

fn key(offset_bytes: u64) -> Key {
    Key { disk: 3, image: 0, offset_bytes }
}

#[test]
fn a_successor_finds_the_latest_of_each_page_until_it_has_written_it() {
    let directory = Directory::default();
    let mut first = directory.process();
    first.keep(0, &key(4096), &[1; 4096]);
    first.keep(1, &key(512), &[2; 512]);
    for change in 3..8 {
        first.keep(0, &key(4096), &[change; 4096]);
    }
    first.keep(2, &key(8192), &[9; 4096]);
    first.release(2);
    // It is killed: nobody tidies up.
    let left = vec![(512, vec![2; 512]), (4096, vec![7; 4096])];
    assert_eq!(directory.left(), left);
    assert_eq!(directory.left(), left, "looking takes nothing away");
    let second = directory.process();
    assert!(second.left().of(FILE).kept_at_seconds > 0);
    assert!(second.left().of(Identity::Device { number: 2 }).pages.is_empty());
    second.written(FILE);
    assert_eq!(directory.left(), []);
    assert!(directory.0.borrow().is_empty(), "nothing is kept: no file is needed");
}

#[test]
fn what_is_kept_anew_stands_beside_what_others_left() {
    let directory = Directory::default();
    directory.process().keep(0, &key(0), &[1; 512]);
    let mut second = directory.process();
    let other = Identity::Device { number: 9 };
    second.name(4, Some(other));
    second.keep(0, &Key { disk: 4, image: 0, offset_bytes: 0 }, &[2; 512]);
    let third = directory.process();
    assert_eq!(third.left().of(FILE).pages, [(0, vec![1; 512])]);
    assert_eq!(third.left().of(other).pages, [(0, vec![2; 512])]);
}

#[test]
fn memory_is_bounded_and_a_page_without_room_is_not_kept() {
    let directory = Directory::default();
    let mut kept = directory.process();
    let most = u32::try_from(KEPT_CHUNKS_MAX * ENTRIES).unwrap();
    for slot in 0..most + 10 {
        kept.keep(slot, &key(u64::from(slot) * 4096), &[5; 4096]);
    }
    assert_eq!(directory.left().len(), most as usize);
    for slot in 0..most + 10 {
        kept.release(slot);
    }
    assert!(directory.0.borrow().is_empty());
}

/// A disk that nobody has named keeps nothing: its pages could not be told from another's.
#[test]
fn pages_of_no_known_file_are_not_kept() {
    let directory = Directory::default();
    let mut kept = directory.process();
    kept.name(3, None);
    kept.keep(0, &key(0), &[1; 512]);
    assert!(directory.0.borrow().is_empty());
}
