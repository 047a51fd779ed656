//! Ranges of zeroes and lengths, on every sort of file: what images with metadata ask for.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::print_stdout
)]

mod storage_support;

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use storage_support::{Dice, Directory, Rig, everywhere, in_memory, on_disk, options, pattern};
use vbdd::buffers::Span;
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::linux::{Alignment, Options};
use vbdd::storage::{Access, FileId, IoKind, Storage, StorageError};

fn zero(rig: &mut Rig, file: FileId, offset: u64, length_bytes: u64) -> Result<(), StorageError> {
    let token = rig.queue(file, IoKind::Zero { length_bytes }, offset, Span::EMPTY);
    rig.finish(token)
}

fn set_length(rig: &mut Rig, file: FileId, length_bytes: u64) -> Result<(), StorageError> {
    let token = rig.queue(file, IoKind::SetLength, length_bytes, Span::EMPTY);
    rig.finish(token)
}

#[test]
fn ranges_read_as_zero_and_nothing_else_does() {
    everywhere("zeroes", |rig, directory, case| {
        let before = pattern(3 << 20, 3);
        let path = directory.file("image", &before);
        let file = rig.open(&path, Access::ReadWrite).unwrap().file;
        let mut expected = before.clone();
        for (offset, length) in [
            (0, 512),
            (512, 4096),
            (65536, 65536),
            (200 * 1024 + 512, 65536 + 512),
            (400 * 1024 - 512, 300 * 1024 + 1024),
            (900 * 1024, 1 << 20),
            (2100 * 1024 + 1536, (512 << 10) - 512),
            ((3 << 20) - 512, 512),
        ] {
            zero(rig, file, offset, length).unwrap_or_else(|error| panic!("{case} {offset}: {error:?}"));
            expected[offset as usize..(offset + length) as usize].fill(0);
        }
        for (part, want) in expected.chunks(1 << 20).enumerate() {
            assert!(rig.read(file, (part as u64) << 20, 1 << 20).unwrap() == want, "{case}, part {part}");
        }
        assert!(std::fs::read(&path).unwrap() == expected, "{case}");
        rig.flush(file).unwrap();
        // Written again, wherever it was.
        rig.write(file, 900 * 1024, &pattern(1 << 20, 9)).unwrap();
        assert!(rig.read(file, 900 * 1024, 1 << 20).unwrap() == pattern(1 << 20, 9), "{case}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 << 20, "{case}");
    });
}

#[test]
fn a_long_range_moves_no_data() {
    everywhere("zeroes-long", |rig, directory, case| {
        let path = directory.path("image");
        std::fs::File::create(&path).unwrap().set_len(8 << 30).unwrap();
        let file = rig.open(&path, Access::ReadWrite).unwrap().file;
        rig.write(file, 4 << 30, &[7; 4096]).unwrap();
        let token = rig.queue(file, IoKind::Zero { length_bytes: (8 << 30) - 1024 }, 512, Span::EMPTY);
        // What does not overlap goes on meanwhile.
        rig.write(file, 0, &[1; 512]).unwrap();
        rig.finish(token).unwrap();
        assert_eq!(rig.read(file, 4 << 30, 4096).unwrap(), [0; 4096], "{case}");
        assert_eq!(rig.read(file, 0, 1024).unwrap(), [[1; 512], [0; 512]].concat(), "{case}");
        if case.contains("memory") {
            assert!(std::fs::metadata(&path).unwrap().blocks() <= 16, "{case}: it takes memory");
        }
        std::fs::remove_file(&path).unwrap();
    });
}

#[test]
fn lengths_follow_and_new_space_is_zero() {
    everywhere("lengths", |rig, directory, case| {
        let path = directory.file("image", &pattern(8192, 2));
        let file = rig.open(&path, Access::ReadWrite).unwrap().file;
        assert_eq!(rig.write(file, 8192, &[1; 512]), Err(StorageError::PastEnd), "{case}");
        set_length(rig, file, 65536).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 65536, "{case}");
        assert_eq!(rig.read(file, 8192, 8192).unwrap(), [0; 8192], "{case}");
        rig.write(file, 61440, &[5; 4096]).unwrap();
        assert_eq!(rig.write(file, 65536, &[1; 512]), Err(StorageError::PastEnd), "{case}");
        // Cut, and longer again: what was cut off does not come back.
        set_length(rig, file, 4096 + 512).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4608, "{case}");
        assert_eq!(rig.write(file, 4608, &[1; 512]), Err(StorageError::PastEnd), "{case}");
        assert_eq!(zero(rig, file, 4096, 1024), Err(StorageError::PastEnd), "{case}");
        let mut expected = pattern(8192, 2);
        expected[4608..].fill(0);
        assert_eq!(rig.read(file, 0, 8192).unwrap(), expected, "{case}");
        set_length(rig, file, 65536 - 512).unwrap();
        expected.resize(65536, 0);
        assert_eq!(rig.read(file, 0, 65536).unwrap(), expected, "{case}");
        rig.write(file, 65536 - 1024, &[6; 512]).unwrap();
        rig.flush(file).unwrap();
        expected.truncate(65536 - 512);
        expected[65536 - 1024..].fill(6);
        assert!(std::fs::read(&path).unwrap() == expected, "{case}");
        assert_eq!(rig.storage.measure(file), Some(65536 - 512), "{case}");
    });
}

#[test]
fn what_cannot_be_is_refused() {
    everywhere("lengths-refused", |rig, directory, case| {
        let path = directory.file("image", &pattern(8192, 2));
        let file = rig.open(&path, Access::ReadWrite).unwrap().file;
        assert_eq!(set_length(rig, file, 100), Err(StorageError::Os(libc::EINVAL)), "{case}");
        // Longer than a file can be, where there is such a thing: tmpfs takes anything.
        if !case.contains("memory") {
            let far = (i64::MAX as u64) & !511;
            assert_eq!(set_length(rig, file, far), Err(StorageError::Os(libc::EFBIG)), "{case}");
        }
        assert_eq!(rig.write(file, 8192, &[1; 512]), Err(StorageError::PastEnd), "{case}");
        for (offset, length, error) in [
            (0, 8192 + 512, StorageError::PastEnd),
            (u64::MAX - 511, 512, StorageError::PastEnd),
            (100, 512, StorageError::Os(libc::EINVAL)),
            (512, 0, StorageError::Os(libc::EINVAL)),
        ] {
            assert_eq!(zero(rig, file, offset, length), Err(error), "{case} {offset} {length}");
        }
        rig.storage.close(file);
        let file = rig.open(&path, Access::ReadOnly).unwrap().file;
        assert_eq!(set_length(rig, file, 16384), Err(StorageError::Os(libc::EROFS)), "{case}");
        assert_eq!(zero(rig, file, 0, 512), Err(StorageError::Os(libc::EROFS)), "{case}");
        assert_eq!(std::fs::read(&path).unwrap(), pattern(8192, 2), "{case}");
    });
}

/// Random operations, one after the other, against a model.
fn shadow(rig: &mut Rig, path: &str, seed: u64, rounds: u32, case: &str) {
    const MOST: u64 = 1 << 20;
    let file = rig.open(path, Access::ReadWrite).unwrap().file;
    let mut dice = Dice(seed);
    let mut model = std::fs::read(path).unwrap();
    for round in 0..rounds {
        let sectors = model.len() as u64 / 512;
        let short = 1 + dice.below(40);
        let long = 1 + dice.below(1200);
        match dice.below(8) {
            0 => {
                let length = 512 * (1 + dice.below(MOST / 512));
                set_length(rig, file, length).unwrap();
                model.resize(length as usize, 0);
            }
            // Little by little, so that ragged ends come and go.
            1 => {
                let length = (model.len() as u64 + 512 * dice.below(16)).clamp(512 * 17, MOST);
                let length = length - 512 * dice.below(16);
                set_length(rig, file, length).unwrap();
                model.resize(length as usize, 0);
            }
            what => {
                let from = dice.below(sectors);
                let count = if dice.below(4) == 0 { long } else { short }.min(sectors - from);
                let (offset, length) = (from * 512, count * 512);
                let range = offset as usize..(offset + length) as usize;
                if what < 4 {
                    zero(rig, file, offset, length).unwrap();
                    model[range].fill(0);
                } else if what < 6 {
                    let bytes: Vec<u8> = (0..length).map(|_| dice.next() as u8 | 1).collect();
                    rig.write(file, offset, &bytes).unwrap();
                    model[range].copy_from_slice(&bytes);
                } else {
                    let got = rig.read(file, offset, length as usize).unwrap();
                    assert!(
                        got == model[range],
                        "{case}: round {round}, {count} sectors at {from} of {sectors}"
                    );
                }
            }
        }
    }
    rig.flush(file).unwrap();
    assert!(std::fs::read(path).unwrap() == model, "{case}: on disk");
    rig.storage.close(file);
}

#[test]
fn random_zeroes_and_lengths_against_a_model() {
    let seed = std::env::var("VBDD_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x5eed_0002);
    everywhere("lengths-random", |rig, directory, case| {
        let path = directory.file("image", &pattern(100 * 1024, 3));
        shadow(rig, &path, seed, 1500, case);
    });
    for engine in [EngineChoice::Uring, EngineChoice::Aio] {
        for memory_bytes in [512, 4096] {
            let directory = on_disk("lengths-random");
            let alignment = Some(Alignment { block_bytes: 4096, memory_bytes });
            let mut rig = Rig::new(&Options { alignment, ..options(&directory.0, engine) });
            let path = directory.file("image", &pattern(100 * 1024 + 512, 3));
            shadow(
                &mut rig,
                &path,
                seed,
                1500,
                &format!("{engine:?}, blocks of 4096, memory {memory_bytes}"),
            );
        }
    }
}

/// Zeroes of ranges whose ends share blocks with writes that run at the same time.
#[test]
fn writes_beside_zeroes_on_large_blocks_lose_nothing() {
    for engine in [EngineChoice::Uring, EngineChoice::Aio] {
        let directory = on_disk("zeroes-beside");
        let alignment = Some(Alignment { block_bytes: 4096, memory_bytes: 512 });
        let mut rig = Rig::new(&Options { alignment, ..options(&directory.0, engine) });
        let mut expected = pattern(512 * 1024, 3);
        let path = directory.file("image", &expected);
        let file = rig.open(&path, Access::ReadWrite).unwrap().file;
        let mut dice = Dice(77);
        for round in 0..60u8 {
            let (from, to) = (1 + dice.below(8), 200 + dice.below(700));
            let (span_a, span_b) = (rig.alloc(512), rig.alloc(512));
            rig.storage.buffers().bytes_mut(span_a).fill(round | 1);
            rig.storage.buffers().bytes_mut(span_b).fill(round | 1);
            let tokens = [
                rig.queue(file, IoKind::Write, (from - 1) * 512, span_a),
                rig.queue(file, IoKind::Zero { length_bytes: (to - from) * 512 }, from * 512, Span::EMPTY),
                rig.queue(file, IoKind::Write, to * 512, span_b),
            ];
            tokens.iter().for_each(|token| rig.finish(*token).unwrap());
            expected[from as usize * 512..to as usize * 512].fill(0);
            for at in [from - 1, to] {
                expected[at as usize * 512..at as usize * 512 + 512].fill(round | 1);
            }
            assert!(rig.storage.buffers().free(span_a) && rig.storage.buffers().free(span_b));
            assert!(std::fs::read(&path).unwrap() == expected, "{engine:?} round {round}");
        }
    }
}

#[test]
fn a_mapped_file_that_grows_is_mapped_further_and_one_that_is_cut_no_more() {
    let directory = in_memory("lengths-mapped");
    let path = directory.file("image", &vec![3; 4 << 20]);
    let mut rig = Rig::new(&options(&directory.0, EngineChoice::Aio));
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    assert!(rig.storage.direct(file, IoKind::Read, 0, 4096).is_some());
    let first = rig.storage.direct(file, IoKind::Write, 0, 4096).unwrap();
    // Within what is kept for growth, and far beyond it.
    for length in [6 << 20, 64 << 20, 65 << 20] {
        set_length(&mut rig, file, length).unwrap();
        let last = length - 4096;
        assert!(rig.storage.direct(file, IoKind::Read, last, 4096).is_none(), "a hole");
        rig.write(file, last, &[9; 4096]).unwrap();
        let found = (0..10).any(|_| {
            rig.pump();
            rig.storage.direct(file, IoKind::Read, last, 4096).is_some()
        });
        assert!(found, "{length}");
        assert!(rig.storage.direct(file, IoKind::Read, 0, 4096).is_some());
    }
    assert_eq!(first.length_bytes(), 4096);
    set_length(&mut rig, file, 2 << 20).unwrap();
    assert!(rig.storage.direct(file, IoKind::Read, 3 << 20, 4096).is_none());
    assert!(rig.storage.direct(file, IoKind::Read, (2 << 20) - 4096, 8192).is_none());
    assert!(rig.storage.direct(file, IoKind::Read, (2 << 20) - 4096, 4096).is_some());
    // Longer again: a hole, where there were pages.
    set_length(&mut rig, file, 4 << 20).unwrap();
    assert!(rig.storage.direct(file, IoKind::Read, 3 << 20, 4096).is_none());
    assert_eq!(rig.read(file, 3 << 20, 4096).unwrap(), [0; 4096]);
    // Zeroed pages are holes, not pages to be read past their end.
    zero(&mut rig, file, 0, 1 << 20).unwrap();
    assert!(rig.storage.direct(file, IoKind::Read, 4096, 4096).is_none());
    assert_eq!(rig.read(file, 4096, 4096).unwrap(), [0; 4096]);
    rig.storage.close(file);
    assert_eq!(rig.storage.page_tables_bytes(), 0);
}

#[test]
fn a_file_system_that_is_full_says_so() {
    // A mount of our own, as small as can be. Without the right to mount there is nothing to fill.
    let directory = in_memory("lengths-full");
    let Some(mount) = Mount::new(&directory, &["-t", "tmpfs", "-o", "size=1m", "tmpfs"]) else { return };
    let path = format!("{}/image", mount.0);
    std::fs::write(&path, vec![1; 256 << 10]).unwrap();
    let mut rig = Rig::new(&options(&directory.0, EngineChoice::Auto));
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    // A length is no promise of space.
    set_length(&mut rig, file, 4 << 20).unwrap();
    let mut results = Vec::new();
    for at in 0..16 {
        results.push(rig.write(file, (256 << 10) * at, &vec![2; 256 << 10]));
    }
    assert!(results.contains(&Err(StorageError::Os(libc::ENOSPC))), "{results:?}");
    // Zeroes need none, and what they let go of can be used.
    zero(&mut rig, file, 0, 1 << 20).unwrap();
    rig.write(file, 3 << 20, &vec![4; 256 << 10]).unwrap();
}

/// File systems that know no holes (ramfs), and one that knows no ranges of zeroes (ext2).
#[test]
fn where_the_file_system_does_not_help_zeroes_are_written() {
    let directory = on_disk("zeroes-plain");
    let ramfs = ["-t", "ramfs", "ramfs"];
    for (name, make) in [("ramfs", None), ("ext2", Some("mkfs.ext2"))] {
        let backing = directory.path(name);
        let mount = match make {
            None => Mount::new(&directory, &ramfs),
            Some(make) => {
                std::fs::File::create(&backing).unwrap().set_len(64 << 20).unwrap();
                let made = Command::new(make).arg(&backing).output().is_ok_and(|out| out.status.success());
                if !made {
                    println!("SKIPPED: there is no {make} here");
                    continue;
                }
                Mount::new(&directory, &["-o", "loop", &backing])
            }
        };
        let Some(mount) = mount else { return };
        for engine in [EngineChoice::Uring, EngineChoice::Aio] {
            let mut rig = Rig::new(&options(&directory.0, engine));
            let path = format!("{}/image", mount.0);
            std::fs::write(&path, pattern(8 << 20, 3)).unwrap();
            let file = rig.open(&path, Access::ReadWrite).unwrap().file;
            let mut expected = pattern(8 << 20, 3);
            for (offset, length) in [(512, 4096), (1 << 20, 900 << 10), (2 << 20, (5 << 20) + 1536)] {
                zero(&mut rig, file, offset, length).unwrap_or_else(|error| panic!("{name}: {error:?}"));
                expected[offset as usize..(offset + length) as usize].fill(0);
            }
            assert!(std::fs::read(&path).unwrap() == expected, "{name}, {engine:?}");
            rig.storage.close(file);
            std::fs::write(&path, pattern(100 * 1024, 3)).unwrap();
            shadow(&mut rig, &path, 0x5eed_0003, 300, &format!("{name}, {engine:?}"));
            std::fs::remove_file(&path).unwrap();
        }
    }
}

/// A file system of the test's own.
struct Mount(String);

impl Mount {
    fn new(directory: &Directory, arguments: &[&str]) -> Option<Mount> {
        let path = directory.path("mounted");
        std::fs::create_dir_all(&path).unwrap();
        let made = Command::new("mount").args(arguments).arg(&path).status();
        if !made.is_ok_and(|status| status.success()) {
            println!("SKIPPED: nothing can be mounted here (root is needed)");
            return None;
        }
        Some(Mount(path))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", &self.0]).status();
    }
}
