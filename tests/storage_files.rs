//! Files of all sorts through both engines: contents, ends, sizes.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod storage_support;

use storage_support::{everywhere, pattern};
use vbdd::buffers::Span;
use vbdd::storage::{Access, IoKind, Storage, StorageError};

#[test]
fn what_is_written_is_read_and_on_disk() {
    everywhere("contents", |rig, directory, case| {
        let path = directory.file("image", &pattern(256 * 1024, 3));
        let opened = rig.open(&path, Access::ReadWrite).unwrap();
        assert_eq!(opened.size_bytes, 256 * 1024, "{case}");
        assert_eq!(rig.read(opened.file, 4096, 8192).unwrap(), pattern(256 * 1024, 3)[4096..12288], "{case}");
        let bytes = pattern(12 * 1024, 5);
        rig.write(opened.file, 512 * 9, &bytes).unwrap();
        rig.flush(opened.file).unwrap();
        assert_eq!(rig.read(opened.file, 512 * 9, bytes.len()).unwrap(), bytes, "{case}");
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(whole[512 * 9..512 * 9 + bytes.len()], bytes, "{case}");
        assert_eq!(whole[..512 * 9], pattern(256 * 1024, 3)[..512 * 9], "{case}");
        rig.storage.close(opened.file);
        assert_eq!(rig.read(opened.file, 0, 512), Err(StorageError::Os(libc::EBADF)), "{case}");
    });
}

#[test]
fn odd_sizes() {
    everywhere("odd", |rig, directory, case| {
        for size in [1usize, 100, 511, 512, 513, 1000, 4095, 4097, 5000, 5632, 70_001] {
            let before = pattern(size, 7);
            let path = directory.file("odd", &before);
            let opened = rig.open(&path, Access::ReadWrite).unwrap();
            assert_eq!(opened.size_bytes, size as u64);
            let sectors = size.div_ceil(512);
            // All of it and beyond: zeroes behind the end.
            let mut expected = before.clone();
            expected.resize(sectors * 512 + 1024, 0);
            assert_eq!(rig.read(opened.file, 0, expected.len()).unwrap(), expected, "{case}, {size}");
            assert_eq!(rig.read(opened.file, (sectors as u64 + 100) * 512, 1024).unwrap(), vec![0; 1024]);
            // The last sector takes a whole write and keeps it; nothing goes further.
            let last = (sectors as u64 - 1) * 512;
            let bytes = pattern(512, 11);
            rig.write(opened.file, last, &bytes).unwrap();
            assert_eq!(rig.read(opened.file, last, 512).unwrap(), bytes, "{case}, {size}");
            assert_eq!(rig.write(opened.file, last, &pattern(1024, 1)), Err(StorageError::PastEnd));
            assert_eq!(rig.write(opened.file, last + 512, &bytes), Err(StorageError::PastEnd));
            rig.flush(opened.file).unwrap();
            let whole = std::fs::read(&path).unwrap();
            assert_eq!(whole.len(), sectors * 512, "{case}, {size}: only the last sector was filled up");
            let start = sectors * 512 - 512;
            assert_eq!(whole[start..], bytes);
            assert_eq!(whole[..start], before[..start]);
            rig.storage.close(opened.file);
        }
    });
}

#[test]
fn a_file_keeps_the_size_it_was_opened_with() {
    everywhere("growing", |rig, directory, case| {
        let path = directory.file("grows", &pattern(8192, 2));
        let opened = rig.open(&path, Access::ReadWrite).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(65536).unwrap();
        assert_eq!(rig.write(opened.file, 8192, &[1; 512]), Err(StorageError::PastEnd), "{case}");
        let read = rig.read(opened.file, 4096, 8192).unwrap();
        assert_eq!(read[..4096], pattern(8192, 2)[4096..], "{case}");
        assert_eq!(read[4096..], [0; 4096], "{case}");
        // Cut short: what is missing is an error, not zeroes.
        file.set_len(4096).unwrap();
        assert_eq!(rig.read(opened.file, 4096, 4096), Err(StorageError::Os(libc::EIO)), "{case}");
        assert_eq!(rig.read(opened.file, 0, 4096).unwrap(), pattern(8192, 2)[..4096], "{case}");
    });
}

#[test]
fn refused_requests() {
    everywhere("refused", |rig, directory, case| {
        let path = directory.file("image", &[0; 8192]);
        let opened = rig.open(&path, Access::ReadOnly).unwrap();
        assert_eq!(rig.write(opened.file, 0, &[1; 512]), Err(StorageError::Os(libc::EROFS)), "{case}");
        assert_eq!(rig.read(opened.file, 1, 512), Err(StorageError::Os(libc::EINVAL)), "{case}");
        assert_eq!(rig.read(opened.file, 0, 100), Err(StorageError::Os(libc::EINVAL)), "{case}");
        assert_eq!(rig.read(vbdd::storage::FileId(77), 0, 512), Err(StorageError::Os(libc::EBADF)), "{case}");
        rig.flush(opened.file).unwrap();
        let writable = rig.open(&path, Access::ReadWrite).unwrap();
        assert_eq!(writable.identity, opened.identity);
        assert_ne!(writable.file, opened.file);
        assert_eq!(rig.write(writable.file, u64::MAX - 511, &[1; 512]), Err(StorageError::PastEnd), "{case}");
        assert_eq!(std::fs::read(&path).unwrap(), [0; 8192]);
    });
}

#[test]
fn a_writable_image_that_somebody_else_has_locked_is_said_to_be() {
    everywhere("locked", |rig, directory, case| {
        let path = directory.file("image", &[0; 8192]);
        let opened = rig.open(&path, Access::ReadWrite).unwrap();
        assert!(opened.locked, "{case}");
        assert!(!rig.open(&path, Access::ReadWrite).unwrap().locked, "{case}: an open file keeps its lock");
        assert!(rig.open(&path, Access::ReadOnly).unwrap().locked, "{case}: readers ask for none");
        rig.storage.close(opened.file);
        let other = std::fs::File::open(directory.file("other", &[0; 8192])).unwrap();
        rustix::fs::flock(&other, rustix::fs::FlockOperation::NonBlockingLockShared).unwrap();
        let other_path = directory.path("other");
        assert!(!rig.open(&other_path, Access::ReadWrite).unwrap().locked, "{case}: another program's lock");
        drop(other);
        assert!(rig.open(&other_path, Access::ReadWrite).unwrap().locked, "{case}");
    });
}

#[test]
fn a_closed_image_can_be_opened_again_at_once() {
    everywhere("reopened", |rig, directory, case| {
        let path = directory.file("image", &[0; 8192]);
        for round in 0..5 {
            let opened = rig.open(&path, Access::ReadWrite).unwrap();
            assert!(opened.locked, "{case}, round {round}");
            rig.write(opened.file, 0, &[7; 4096]).unwrap();
            rig.storage.close(opened.file);
        }
    });
}

#[test]
fn discards_let_go_of_whole_units_and_of_nothing_else() {
    everywhere("discard", |rig, directory, case| {
        let before = pattern(256 * 1024, 3);
        let path = directory.file("image", &before);
        let opened = rig.open(&path, Access::ReadWrite).unwrap();
        let Some(unit) = opened.discard else { panic!("no holes on this file system, {case}") };
        assert_eq!((unit.granularity_bytes % 512, unit.alignment_bytes), (0, 0), "{case}");
        let mut expected = before.clone();
        let unit = u64::from(unit.granularity_bytes);
        for (offset, length) in [
            (0, 512),
            (unit - 512, 1024),
            (512, 2 * unit),
            (4 * unit, unit),
            (7 * unit - 512, 3 * unit + 1024),
        ] {
            let token = rig.queue(opened.file, IoKind::Discard { length_bytes: length }, offset, Span::EMPTY);
            assert_eq!(rig.finish(token), Ok(()), "{case} {offset} {length}");
            let (from, to) = (offset.next_multiple_of(unit), (offset + length) / unit * unit);
            if let Some(gone) = expected.get_mut(from as usize..to as usize) {
                gone.fill(0);
            }
        }
        let punched = expected.iter().zip(&before).any(|(after, before)| after != before);
        assert!(punched && unit <= 64 * 1024, "{case}: a unit of {unit} bytes shows nothing");
        assert_eq!(rig.read(opened.file, 0, before.len()).unwrap(), expected, "{case}");
        assert_eq!(std::fs::read(&path).unwrap(), expected, "{case}: the size stays");
        // Many at once, of one file, among writes elsewhere; all of it at last.
        let tokens: Vec<u64> = (0..20)
            .map(|_| rig.queue(opened.file, IoKind::Discard { length_bytes: 128 * 1024 }, 0, Span::EMPTY))
            .collect();
        rig.write(opened.file, 200 * 1024, &[7; 4096]).unwrap();
        tokens.iter().for_each(|token| rig.finish(*token).unwrap());
        let token = rig.queue(opened.file, IoKind::Discard { length_bytes: 256 * 1024 }, 0, Span::EMPTY);
        rig.finish(token).unwrap();
        rig.flush(opened.file).unwrap();
        assert_eq!(rig.read(opened.file, 0, before.len()).unwrap(), vec![0; before.len()], "{case}");
        use std::os::unix::fs::MetadataExt;
        assert_eq!(std::fs::metadata(&path).unwrap().blocks(), 0, "{case}: no space is taken any more");
    });
}

#[test]
fn discards_are_refused_out_of_range_and_read_only() {
    everywhere("no-discard", |rig, directory, case| {
        let path = directory.file("image", &pattern(64 * 1024, 3));
        let opened = rig.open(&path, Access::ReadWrite).unwrap();
        for (offset, length, error) in [
            (0, 64 * 1024 + 512, StorageError::PastEnd),
            (64 * 1024, 4096, StorageError::PastEnd),
            (512, u64::MAX - 511, StorageError::PastEnd),
            (512, 0, StorageError::Os(libc::EINVAL)),
            (100, 4096, StorageError::Os(libc::EINVAL)),
        ] {
            let token = rig.queue(opened.file, IoKind::Discard { length_bytes: length }, offset, Span::EMPTY);
            assert_eq!(rig.finish(token), Err(error), "{case} {offset} {length}");
        }
        rig.storage.close(opened.file);
        let opened = rig.open(&path, Access::ReadOnly).unwrap();
        assert_eq!(opened.discard, None, "{case}");
        let token = rig.queue(opened.file, IoKind::Discard { length_bytes: 4096 }, 0, Span::EMPTY);
        assert_eq!(rig.finish(token), Err(StorageError::Os(libc::EROFS)), "{case}");
        assert_eq!(std::fs::read(&path).unwrap(), pattern(64 * 1024, 3), "{case}");
    });
}
