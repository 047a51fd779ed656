//! One fault at a time, and what the caller is told.
#![allow(missing_docs, clippy::unwrap_used)]

mod storage_support;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use storage_support::faulty::{Faulty, Plan};
use storage_support::{Directory, Rig, on_disk, options};
use vbdd::buffers::Span;
use vbdd::storage::engine::{Action, EngineChoice};
use vbdd::storage::linux::{Alignment, LinuxStorage, Options};
use vbdd::storage::uring::Uring;
use vbdd::storage::{Access, FileId, IoKind, Storage, StorageError};

struct Faults {
    rig: Rig,
    plan: Rc<RefCell<Plan>>,
    file: FileId,
    path: String,
    _directory: Directory,
}

fn faults(name: &str, block: u32) -> Faults {
    let directory = on_disk(name);
    let path = directory.file("image", &vec![0x11; 64 * 1024]);
    let plan = Rc::new(RefCell::new(Plan::default()));
    let engine = Faulty::new(Box::new(Uring::new().unwrap()), &plan, 99);
    let least = Some(Alignment { block_bytes: block, memory_bytes: 512 });
    let options = Options { alignment: least, ..options(&directory.0, EngineChoice::Auto) };
    let mut rig = Rig::with_engine(&options, Box::new(engine));
    let opened = rig.open(&path, Access::ReadWrite).unwrap();
    assert!(opened.direct);
    Faults { rig, plan, file: opened.file, path, _directory: directory }
}

impl Faults {
    fn fail_next(&self, action: Action, errno: i32) {
        self.plan.borrow_mut().next.push((action, errno));
    }
}

fn os(errno: i32) -> Result<(), StorageError> {
    Err(StorageError::Os(errno))
}

#[test]
fn errors_come_through_once() {
    let mut f = faults("once", 512);
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::ENOMEM] {
        f.fail_next(Action::Write, errno);
        assert_eq!(f.rig.write(f.file, 0, &[1; 512]), os(errno));
        f.fail_next(Action::Read, errno);
        assert_eq!(f.rig.read(f.file, 0, 512), Err(StorageError::Os(errno)));
    }
    f.rig.write(f.file, 0, &[1; 512]).unwrap();
    assert_eq!(f.rig.read(f.file, 0, 512).unwrap(), [1; 512]);
}

#[test]
fn interruptions_are_not_told_until_they_do_not_end() {
    let mut f = faults("eintr", 512);
    for errno in [libc::EINTR, libc::EAGAIN] {
        for _ in 0..10 {
            f.fail_next(Action::Write, errno);
            f.fail_next(Action::Sync, errno);
        }
        f.rig.write(f.file, 512, &[2; 1024]).unwrap();
        f.rig.flush(f.file).unwrap();
        for _ in 0..100 {
            f.fail_next(Action::Write, errno);
        }
        assert_eq!(f.rig.write(f.file, 0, &[3; 512]), os(errno), "16 tries, and no more");
        assert!(f.plan.borrow().next.len() > 80);
        f.plan.borrow_mut().next.clear();
    }
}

#[test]
fn every_flush_says_how_it_ended_itself() {
    // That a later flush cannot make good what an earlier one lost is for the owner of the disk to remember.
    let mut f = faults("flush", 512);
    f.rig.write(f.file, 0, &[1; 512]).unwrap();
    f.fail_next(Action::Sync, libc::EIO);
    assert_eq!(f.rig.flush(f.file), os(libc::EIO));
    f.rig.flush(f.file).unwrap();
    assert_eq!(f.rig.read(f.file, 0, 512).unwrap(), [1; 512]);
}

/// Queues 16 adjacent transfers of a block each, submits once; how each ended.
fn adjacent(f: &mut Faults, kind: IoKind) -> Vec<Result<(), StorageError>> {
    let spans: Vec<Span> = (0..16).map(|_| f.rig.alloc(4096)).collect();
    let mut tokens = Vec::new();
    for (at, span) in spans.iter().enumerate() {
        f.rig.storage.buffers().bytes_mut(*span).fill(0xa0 + u8::try_from(at).unwrap());
        tokens.push(f.rig.queue(f.file, kind, at as u64 * 4096, *span));
    }
    let results = tokens.iter().map(|token| f.rig.finish(*token)).collect();
    spans.iter().for_each(|span| assert!(f.rig.storage.buffers().free(*span)));
    results
}

#[test]
fn adjacent_transfers_are_one_and_an_error_meets_only_its_own() {
    let mut f = faults("merged", 512);
    assert!(adjacent(&mut f, IoKind::Write).iter().all(Result::is_ok));
    assert_eq!((f.rig.storage.merged(), f.plan.borrow().pushed), (15, 1));
    for kind in [IoKind::Write, IoKind::Read] {
        f.plan.borrow_mut().bad = Some(9 * 4096 + 700);
        for (at, result) in adjacent(&mut f, kind).into_iter().enumerate() {
            assert_eq!(result, if at == 9 { os(libc::EIO) } else { Ok(()) }, "{kind:?} {at}");
        }
        f.plan.borrow_mut().bad = None;
    }
    let bytes = std::fs::read(&f.path).unwrap();
    for (at, block) in bytes.chunks(4096).enumerate() {
        assert_eq!(block, [0xa0 + u8::try_from(at).unwrap(); 4096]);
    }
    // Neither a hole nor a change of direction is bridged.
    let (a, b) = (f.rig.alloc(4096), f.rig.alloc(4096));
    for (first, second, offset) in [
        (IoKind::Read, IoKind::Read, 8192),
        (IoKind::Read, IoKind::Write, 4096),
        (IoKind::Read, IoKind::Read, 0),
    ] {
        let before = f.rig.storage.merged();
        let one = f.rig.queue(f.file, first, 0, a);
        let two = f.rig.queue(f.file, second, offset, b);
        assert_eq!((f.rig.finish(one), f.rig.finish(two)), (Ok(()), Ok(())));
        assert_eq!(f.rig.storage.merged(), before);
    }
}

#[test]
fn direct_refused_after_all() {
    let mut f = faults("demoted", 4096);
    f.fail_next(Action::Write, libc::EINVAL);
    f.rig.write(f.file, 4096, &[7; 4096]).unwrap();
    f.rig.write(f.file, 512, &[8; 1024]).unwrap();
    f.rig.flush(f.file).unwrap();
    assert_eq!(f.rig.read(f.file, 0, 512).unwrap(), [0x11; 512]);
    let bytes = std::fs::read(&f.path).unwrap();
    assert_eq!((&bytes[512..1536], &bytes[4096..8192]), (&[8; 1024][..], &[7; 4096][..]));
    assert_eq!(bytes.len(), 64 * 1024);
}

#[test]
fn a_read_modify_write_that_fails_lets_the_next_one_go() {
    for action in [Action::Read, Action::Write] {
        let mut f = faults("rmw", 4096);
        f.fail_next(action, libc::EIO);
        let spans: Vec<Span> = (0..3).map(|_| f.rig.alloc(512)).collect();
        let tokens: Vec<u64> = (0..3u64)
            .map(|at| {
                let span = spans[usize::try_from(at).unwrap()];
                f.rig.storage.buffers().bytes_mut(span).fill(0xa0 + u8::try_from(at).unwrap());
                f.rig.queue(f.file, IoKind::Write, at * 512, span)
            })
            .collect();
        assert_eq!(f.rig.finish(tokens[0]), os(libc::EIO));
        f.rig.finish(tokens[1]).unwrap();
        f.rig.finish(tokens[2]).unwrap();
        let bytes = std::fs::read(&f.path).unwrap();
        assert_eq!((bytes[512], bytes[1024], bytes[1536]), (0xa1, 0xa2, 0x11));
    }
}

#[test]
fn zeroes_that_cannot_be_written_are_an_error_and_harm_nothing_else() {
    for block in [512, 4096] {
        let mut f = faults("zeroes", block);
        // Short ones are written.
        for (offset, length_bytes) in [(512, 1024), (0, 65536), (512, 65536 - 512)] {
            let kind = IoKind::Zero { length_bytes };
            for errno in [libc::ENOSPC, libc::EIO] {
                f.fail_next(Action::Write, errno);
                let token = f.rig.queue(f.file, kind, offset, Span::EMPTY);
                assert_eq!(f.rig.finish(token), os(errno), "{block} {offset}");
            }
            let token = f.rig.queue(f.file, kind, offset, Span::EMPTY);
            f.rig.finish(token).unwrap();
            let from = usize::try_from(offset).unwrap();
            let bytes = std::fs::read(&f.path).unwrap();
            assert!(bytes[from..from + usize::try_from(length_bytes).unwrap()].iter().all(|byte| *byte == 0));
        }
        let token = f.rig.queue(f.file, IoKind::SetLength, 512 << 10, Span::EMPTY);
        f.rig.finish(token).unwrap();
        f.rig.write(f.file, 128 << 10, &vec![5; 256 << 10]).unwrap();
        // The first ragged end fails, then the last: what lies between is zeroed by a call, and need not be seen.
        let (offset, length_bytes) = ((128 << 10) + 512, (200 << 10) + 512);
        f.fail_next(Action::Write, libc::ENOSPC);
        let token = f.rig.queue(f.file, IoKind::Zero { length_bytes }, offset, Span::EMPTY);
        assert_eq!(f.rig.finish(token), os(libc::ENOSPC));
        assert_eq!(f.rig.read(f.file, 128 << 10, 256 << 10).unwrap(), vec![5; 256 << 10]);
        let token = f.rig.queue(f.file, IoKind::Zero { length_bytes }, offset, Span::EMPTY);
        f.rig.finish(token).unwrap();
        let got = f.rig.read(f.file, 128 << 10, 256 << 10).unwrap();
        let end = 512 + usize::try_from(length_bytes).unwrap();
        assert!(got[512..end].iter().all(|byte| *byte == 0));
        assert!(got[..512].iter().chain(&got[end..]).all(|byte| *byte == 5));
        assert_eq!(f.rig.storage.in_flight(), 0);
    }
}

#[test]
fn a_file_closed_early_stays_until_its_requests_are_done() {
    let mut f = faults("early", 512);
    f.plan.borrow_mut().late = 90;
    let span = f.rig.alloc(4096);
    f.rig.storage.buffers().bytes_mut(span).fill(9);
    let write = f.rig.queue(f.file, IoKind::Write, 0, span);
    f.rig.storage.close(f.file);
    let late = f.rig.queue(f.file, IoKind::Read, 0, span);
    assert_eq!(f.rig.finish(late), os(libc::EBADF));
    f.rig.finish(write).unwrap();
    assert_eq!(f.rig.read(f.file, 0, 512), Err(StorageError::Os(libc::EBADF)));
    assert_eq!(std::fs::read(&f.path).unwrap()[..4096], [9; 4096]);
    // The place is used again, and the old handle does not reach it.
    let again = f.rig.open(&f.path, Access::ReadWrite).unwrap();
    assert_ne!(again.file, f.file);
    assert_eq!(f.rig.write(f.file, 0, &[1; 512]), os(libc::EBADF));
}

#[test]
fn more_than_there_is_room_for() {
    let mut f = faults("room", 512);
    f.plan.borrow_mut().late = 100;
    let span = f.rig.alloc(512);
    let mut refused = 0;
    for at in 0..20_000u64 {
        f.rig.queue(f.file, IoKind::Read, (at % 128) * 512, span);
    }
    f.rig.storage.submit();
    let mut done = 0;
    let mut take = |f: &mut Faults| {
        while let Some(answer) = f.rig.storage.done() {
            done += 1;
            if let Err(error) = answer.result {
                assert_eq!(error, StorageError::Os(libc::ENOBUFS));
                refused += 1;
            }
        }
        done
    };
    assert_eq!(take(&mut f), 20_000 - 16 * 1024);
    f.plan.borrow_mut().late = 0;
    while take(&mut f) < 20_000 {
        f.rig.wait(Duration::from_secs(1));
    }
    assert_eq!(refused, 20_000 - 16 * 1024);
}

#[test]
fn idle_storage_wakes_nobody() {
    let directory = on_disk("idle");
    let path = directory.file("image", &vec![0; 64 * 1024]);
    for engine in [EngineChoice::Uring, EngineChoice::Aio] {
        let mut rig = Rig::new(&options(&directory.0, engine));
        let opened = rig.open(&path, Access::ReadWrite).unwrap();
        rig.write(opened.file, 0, &[1; 4096]).unwrap();
        rig.flush(opened.file).unwrap();
        rig.storage.submit();
        // What is left over from before is quiet after one look.
        rig.wait(Duration::from_millis(10));
        assert!(rig.storage.done().is_none() && rig.storage.opened().is_none());
        assert!(!rig.wait(Duration::from_millis(500)), "{engine:?}");
    }
}

#[test]
fn engines_say_what_they_are() {
    let directory = on_disk("says");
    let texts: Vec<String> = [EngineChoice::Auto, EngineChoice::Uring, EngineChoice::Aio]
        .map(|engine| LinuxStorage::new(&options(&directory.0, engine)).unwrap().engine_text().to_string())
        .to_vec();
    assert!(texts[0].contains("io_uring") && texts[0].contains("the kernel offers"), "{}", texts[0]);
    assert!(texts[1].contains("as --engine uring asks"), "{}", texts[1]);
    assert!(texts[2].contains("Linux AIO") && texts[2].contains("as --engine aio asks"), "{}", texts[2]);
    assert!("libaio".parse::<EngineChoice>().unwrap_err().contains("say auto, uring or aio"));
    assert_eq!("aio".parse(), Ok(EngineChoice::Aio));
}
