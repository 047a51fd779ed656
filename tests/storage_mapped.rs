//! Files on tmpfs, mapped: grant copies that go straight to their pages. The grant copy is played by `pread` and `pwrite`
//! of another file, whose memory operand is looked up by the kernel in the same way.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod storage_support;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use storage_support::{Dice, Directory, Rig, in_memory, on_disk, options};
use vbdd::buffers::Span;
use vbdd::limits::MAPPED_CHUNKS_MAX;
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::{Access, FileId, IoKind, Storage};

const CHUNK: u64 = 2 << 20;

fn rig(directory: &Directory) -> Rig {
    Rig::new(&options(&directory.0, EngineChoice::Aio))
}

/// The guest's page: a file in memory.
struct Guest(File);

impl Guest {
    fn new(directory: &Directory) -> Guest {
        let path = directory.path("guest");
        Guest(File::options().create(true).truncate(true).read(true).write(true).open(path).unwrap())
    }

    /// The guest writes: `bytes` are copied to `span`.
    fn writes(&self, span: Span, bytes: &[u8]) -> rustix::io::Result<()> {
        self.0.write_all_at(bytes, 0).unwrap();
        assert_eq!(span.length_bytes() as usize, bytes.len());
        // SAFETY: only the kernel writes there, and answers EFAULT where it cannot.
        let target = unsafe { std::slice::from_raw_parts_mut(span.address(), bytes.len()) };
        let moved = rustix::io::pread(self.0.as_fd(), target, 0)?;
        if moved == bytes.len() { Ok(()) } else { Err(rustix::io::Errno::FAULT) }
    }

    /// The guest reads: the bytes of `span`.
    fn reads(&self, span: Span) -> rustix::io::Result<Vec<u8>> {
        // SAFETY: only the kernel reads there.
        let source = unsafe { std::slice::from_raw_parts(span.address(), span.length_bytes() as usize) };
        let moved = rustix::io::pwrite(self.0.as_fd(), source, 0)?;
        let mut bytes = vec![0; moved];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        if moved == source.len() { Ok(bytes) } else { Err(rustix::io::Errno::FAULT) }
    }
}

fn blocks(path: &str) -> u64 {
    std::fs::metadata(path).unwrap().blocks()
}

fn direct(rig: &mut Rig, file: FileId, kind: IoKind, offset: u64, length: usize) -> Option<Span> {
    rig.storage.direct(file, kind, offset, length as u32)
}

#[test]
fn written_bytes_are_reached_both_ways() {
    let directory = in_memory("mapped-both");
    let bytes: Vec<u8> = (0..3 * CHUNK as usize).map(|at| (at / 5 % 253) as u8).collect();
    let path = directory.file("image", &bytes);
    let (mut rig, guest) = (rig(&directory), Guest::new(&directory));
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    for (offset, length) in
        [(0, 4096), (512, 4096), (4608, 1024), (CHUNK - 512, 1024), (CHUNK - 4096, 1 << 20)]
    {
        let span = direct(&mut rig, file, IoKind::Read, offset, length).unwrap();
        let from = offset as usize;
        assert_eq!(guest.reads(span).unwrap(), bytes[from..from + length], "{offset} {length}");
        let new: Vec<u8> = (0..length).map(|at| (at * 7 + from) as u8).collect();
        let span = direct(&mut rig, file, IoKind::Write, offset, length).unwrap();
        guest.writes(span, &new).unwrap();
        assert_eq!(rig.read(file, offset, length).unwrap(), new);
        rig.write(file, offset, &bytes[from..from + length]).unwrap();
    }
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn what_is_not_whole_pages_of_the_file_goes_the_usual_way() {
    let directory = in_memory("mapped-ends");
    let path = directory.file("image", &[7; 10_000]);
    let small = directory.file("small", &[7; 4095]);
    let mut rig = rig(&directory);
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    assert!(direct(&mut rig, file, IoKind::Read, 4096, 4096).is_some());
    for (offset, length) in [(8192, 512), (7680, 1024), (1 << 40, 512), (u64::MAX - 511, 512), (0, 0)] {
        assert!(direct(&mut rig, file, IoKind::Read, offset, length).is_none(), "{offset} {length}");
    }
    let file = rig.open(&small, Access::ReadWrite).unwrap().file;
    assert!(direct(&mut rig, file, IoKind::Read, 0, 512).is_none());
    let file = rig.open(&path, Access::ReadOnly).unwrap().file;
    assert!(direct(&mut rig, file, IoKind::Read, 0, 512).is_some());
    assert!(direct(&mut rig, file, IoKind::Write, 0, 512).is_none());
    rig.storage.close(file);
    assert!(direct(&mut rig, file, IoKind::Read, 0, 512).is_none());
    let disk = on_disk("mapped-not");
    let path = disk.file("image", &[7; 8192]);
    let mut rig = self::rig(&disk);
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    assert!(direct(&mut rig, file, IoKind::Read, 0, 4096).is_none());
}

#[test]
fn holes_are_read_without_being_filled() {
    let directory = in_memory("mapped-holes");
    let path = directory.path("image");
    File::create(&path).unwrap().set_len(8 * CHUNK).unwrap();
    let (mut rig, guest) = (rig(&directory), Guest::new(&directory));
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    for page in 0..512 {
        assert!(direct(&mut rig, file, IoKind::Read, page * 4096, 4096).is_none());
        assert!(direct(&mut rig, file, IoKind::Write, page * 4096, 4096).is_none());
        assert_eq!(rig.read(file, page * 4096, 4096).unwrap(), [0; 4096]);
    }
    assert_eq!(blocks(&path), 0);
    // A page that was written has its neighbours' holes untouched.
    rig.write(file, 512, &[5; 512]).unwrap();
    assert_eq!(blocks(&path), 8);
    let span = direct(&mut rig, file, IoKind::Read, 0, 4096).unwrap();
    assert_eq!(guest.reads(span).unwrap()[512..1024], [5; 512]);
    assert!(direct(&mut rig, file, IoKind::Read, 0, 4608).is_none());
    assert_eq!(blocks(&path), 8);
    // What was given back is a hole again.
    let token = rig.queue(file, IoKind::Discard { length_bytes: 4096 }, 0, Span::EMPTY);
    rig.finish(token).unwrap();
    assert_eq!(blocks(&path), 0);
    assert!(direct(&mut rig, file, IoKind::Read, 0, 512).is_none());
    // What others have filled is found after a while.
    let other = File::options().write(true).open(&path).unwrap();
    other.write_all_at(&[9; 4096], 40960).unwrap();
    let found = (0..100).any(|_| direct(&mut rig, file, IoKind::Read, 40960, 4096).is_some());
    assert!(found);
}

#[test]
fn a_file_cut_short_is_an_error_of_the_copy_and_no_signal() {
    let directory = in_memory("mapped-cut");
    let path = directory.file("image", &vec![3; 64 << 10]);
    let (mut rig, guest) = (rig(&directory), Guest::new(&directory));
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    assert!(direct(&mut rig, file, IoKind::Read, 32 << 10, 4096).is_some());
    File::options().write(true).open(&path).unwrap().set_len(16 << 10).unwrap();
    let span = direct(&mut rig, file, IoKind::Read, 32 << 10, 4096).unwrap();
    assert_eq!(guest.reads(span), Err(rustix::io::Errno::FAULT));
    let span = direct(&mut rig, file, IoKind::Write, 32 << 10, 4096).unwrap();
    assert_eq!(guest.writes(span, &[1; 4096]), Err(rustix::io::Errno::FAULT));
    rig.storage.not_direct(file);
    assert!(direct(&mut rig, file, IoKind::Read, 0, 4096).is_none());
    assert!(rig.read(file, 32 << 10, 4096).is_err());
    assert_eq!(rig.storage.page_tables_bytes(), 0);
}

#[test]
fn mappings_are_bounded_and_given_back() {
    let directory = in_memory("mapped-bound");
    let path = directory.path("image");
    let image = File::create(&path).unwrap();
    let chunks = MAPPED_CHUNKS_MAX as u64 + 40;
    image.set_len(chunks * CHUNK).unwrap();
    for chunk in 0..chunks {
        image.write_all_at(&chunk.to_le_bytes(), chunk * CHUNK).unwrap();
    }
    let (mut rig, guest) = (rig(&directory), Guest::new(&directory));
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    let mut dice = Dice(0x5eed);
    let (mut hits, mut late) = (0, 0);
    for turn in 0..40_000 {
        let chunk = if turn < chunks { turn } else { dice.below(chunks) };
        if let Some(span) = direct(&mut rig, file, IoKind::Read, chunk * CHUNK, 512) {
            assert_eq!(guest.reads(span).unwrap()[..8], chunk.to_le_bytes());
            hits += 1;
            late += u64::from(turn > chunks && chunk >= MAPPED_CHUNKS_MAX as u64);
        }
        assert!(rig.storage.page_tables_bytes() <= MAPPED_CHUNKS_MAX * 4096);
        rig.pump();
    }
    assert!(hits > 30_000, "{hits}");
    assert!(late > 0, "no chunk took the place of another");
    rig.storage.trim();
    assert_eq!(rig.storage.page_tables_bytes(), 0);
    let span = direct(&mut rig, file, IoKind::Read, 5 * CHUNK, 512).unwrap();
    assert_eq!(guest.reads(span).unwrap()[..8], 5_u64.to_le_bytes());
    rig.storage.close(file);
    assert_eq!(rig.storage.page_tables_bytes(), 0);
}

#[test]
fn a_chunk_that_is_handed_out_keeps_its_place_in_this_turn() {
    let directory = in_memory("mapped-turn");
    let path = directory.path("image");
    let image = File::create(&path).unwrap();
    let chunks = MAPPED_CHUNKS_MAX as u64;
    image.set_len((chunks + 1) * CHUNK).unwrap();
    for chunk in 0..=chunks {
        image.write_all_at(&[1], chunk * CHUNK).unwrap();
    }
    let mut rig = rig(&directory);
    let file = rig.open(&path, Access::ReadWrite).unwrap().file;
    for chunk in 0..chunks {
        assert!(direct(&mut rig, file, IoKind::Read, chunk * CHUNK, 512).is_some());
    }
    for _ in 0..1000 {
        assert!(direct(&mut rig, file, IoKind::Read, chunks * CHUNK, 512).is_none());
    }
    rig.pump();
    rig.pump();
    assert!((0..1000).any(|_| direct(&mut rig, file, IoKind::Read, chunks * CHUNK, 512).is_some()));
}
