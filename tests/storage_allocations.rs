//! At steady state a request allocates nothing: counted by the allocator, on every path a request can take.
#![allow(missing_docs, clippy::unwrap_used)]

mod counting;
mod storage_support;

use std::time::Duration;

use storage_support::servers::Server;
use storage_support::{Dice, Directory, Rig, in_memory, on_disk, options};
use vbdd::buffers::Span;
use vbdd::nbd::client::Allowed;
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::linux::{Alignment, Options};
use vbdd::storage::{Access, FileId, Io, IoKind, Storage};

const DEPTH: usize = 32;

/// Sends `requests` through, each with a span of its own from the pool.
fn load(rig: &mut Rig, file: FileId, requests: u64, aligned: bool, dice: &mut Dice) {
    let mut spans = [Span::EMPTY; DEPTH];
    let mut free: [usize; DEPTH] = std::array::from_fn(|at| at);
    let (mut free_count, mut started, mut ended) = (DEPTH, 0, 0);
    while ended < requests {
        while free_count > 0 && started < requests {
            free_count -= 1;
            let at = free[free_count];
            let kind = match started % 50 {
                49 => IoKind::Flush,
                odd if odd % 2 == 1 => IoKind::Write,
                _ => IoKind::Read,
            };
            let mut offset_bytes = dice.below(100) * 4096;
            if kind != IoKind::Flush {
                spans[at] = rig.storage.buffers().alloc(8192).unwrap();
                if !aligned {
                    offset_bytes += 512 * dice.below(8);
                }
            }
            let span = if kind == IoKind::Flush { Span::EMPTY } else { spans[at] };
            rig.storage.queue(Io { token: at as u64, file, kind, offset_bytes, span });
            started += 1;
        }
        rig.storage.submit();
        let before = ended;
        while let Some(done) = rig.storage.done() {
            done.result.unwrap();
            let at = usize::try_from(done.token).unwrap();
            if spans[at] != Span::EMPTY {
                assert!(rig.storage.buffers().free(spans[at]));
                spans[at] = Span::EMPTY;
            }
            free[free_count] = at;
            free_count += 1;
            ended += 1;
        }
        if ended == before {
            let mut fds = [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; 3];
            for (place, fd) in fds.iter_mut().zip(rig.storage.fds()) {
                place.fd = fd;
            }
            let timeout = i32::try_from(Duration::from_secs(5).as_millis()).unwrap();
            // SAFETY: the array is ours and three long.
            unsafe { libc::poll(fds.as_mut_ptr(), 3, timeout) };
            rig.storage.ready();
        }
    }
}

#[test]
fn nothing_is_allocated_for_a_request() {
    let coarse = Some(Alignment { block_bytes: 4096, memory_bytes: 4096 });
    for engine in [EngineChoice::Uring, EngineChoice::Aio] {
        for (case, memory, direct, alignment, aligned) in [
            ("direct", false, true, None, true),
            ("direct, read-modify-write", false, true, coarse, false),
            ("page cache", false, false, None, true),
            ("in memory", true, true, None, true),
        ] {
            let directory = if memory { in_memory("allocations") } else { on_disk("allocations") };
            let path = directory.file("image", &vec![5; 1 << 20]);
            let mut rig = Rig::new(&Options { direct, alignment, ..options(&directory.0, engine) });
            let opened = rig.open(&path, Access::ReadWrite).unwrap();
            let mut dice = Dice(7);
            load(&mut rig, opened.file, 2000, aligned, &mut dice);
            let before = counting::allocations();
            load(&mut rig, opened.file, 4000, aligned, &mut dice);
            let count = counting::allocations() - before;
            assert!(before > 100, "the counter counts");
            assert_eq!(count, 0, "{engine:?}, {case}: allocations for 4000 requests");
        }
    }
    let directory = Directory::new("/tmp", "allocations");
    let server = Server::nbdkit(&directory, &["memory", "1M"]);
    let servers = vec![Allowed::Sockets(directory.0.clone())];
    let mut rig = Rig::new(&Options { servers, ..options(&directory.0, EngineChoice::Auto) });
    let file = rig.open(&server.uri(), Access::ReadWrite).unwrap().file;
    let mut dice = Dice(7);
    // The writes that are kept until a flush covers them take what they take soon.
    load(&mut rig, file, 20_000, true, &mut dice);
    let before = counting::allocations();
    load(&mut rig, file, 4000, true, &mut dice);
    let count = counting::allocations() - before;
    assert!(count <= 2, "on a server: {count} allocations for 4000 requests");
}
