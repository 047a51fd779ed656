//! Kernels without `openat2`, `statx` and io_uring (4.19 is still in use as dom0): a seccomp filter takes the calls away
//! from one thread and the threads that it starts.
#![allow(missing_docs, clippy::unwrap_used)]

mod storage_support;

use std::cell::RefCell;
use std::os::unix::fs::symlink;
use std::rc::Rc;

use storage_support::faulty::{Faulty, Plan};
use storage_support::{Rig, in_memory, on_disk, options};
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::linux::{LinuxStorage, Options};
use vbdd::storage::uring::Uring;
use vbdd::storage::{Access, Storage, StorageError};

/// Runs `test` on a thread where `calls` answer `errno`.
fn without(calls: &[libc::c_long], errno: i32, test: impl FnOnce() + Send + 'static) {
    let mut program = vec![filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for call in calls {
        // Equal: the next instruction; else skip it.
        program.push(filter(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            u32::try_from(*call).unwrap(),
        ));
        let answer = libc::SECCOMP_RET_ERRNO | u32::try_from(errno).unwrap();
        program.push(filter(libc::BPF_RET | libc::BPF_K, 0, 0, answer));
    }
    program.push(filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    let thread = std::thread::spawn(move || {
        let program =
            libc::sock_fprog { len: u16::try_from(program.len()).unwrap(), filter: program.as_mut_ptr() };
        // SAFETY: plain numbers.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
        // SAFETY: the kernel copies the program, which lives until the end of the thread.
        let set = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, std::ptr::from_ref(&program))
        };
        assert_eq!(set, 0);
        test();
    });
    thread.join().unwrap();
}

fn filter(code: u32, yes: u8, no: u8, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap(), jt: yes, jf: no, k: value }
}

#[test]
fn a_kernel_of_4_19() {
    let calls = [libc::SYS_openat2, libc::SYS_statx, libc::SYS_io_uring_setup];
    without(&calls, libc::ENOSYS, || {
        let directory = on_disk("old");
        let path = directory.file("image", &[4; 10_000]);
        let outside = on_disk("old-outside");
        outside.file("secret", &[1; 512]);
        symlink(outside.path("secret"), directory.path("out")).unwrap();
        symlink(&outside.0, directory.path("outdir")).unwrap();
        let mut rig = Rig::new(&options(&directory.0, EngineChoice::Auto));
        let text = rig.storage.engine_text().to_string();
        assert!(text.contains("Linux AIO") && text.contains("this kernel has no io_uring"), "{text}");
        let opened = rig.open(&path, Access::ReadWrite).unwrap();
        assert!(opened.direct);
        rig.write(opened.file, 512, &[9; 8192]).unwrap();
        rig.flush(opened.file).unwrap();
        assert_eq!(rig.read(opened.file, 512, 8192).unwrap(), vec![9; 8192]);
        assert_eq!(rig.read(opened.file, 9728, 512).unwrap()[..272], [4; 272]);
        for (name, reason) in
            [("out", "which lies below no --root"), ("outdir/secret", "which is not followed")]
        {
            let error = rig.open(&directory.path(name), Access::ReadOnly).unwrap_err();
            assert!(error.reason.contains(reason), "{error}");
        }
        let error = LinuxStorage::new(&options(&directory.0, EngineChoice::Uring)).unwrap_err();
        assert!(error.contains("this kernel has no io_uring") && error.contains("--engine aio"), "{error}");
    });
}

#[test]
fn io_uring_forbidden() {
    without(&[libc::SYS_io_uring_setup], libc::EPERM, || {
        let directory = on_disk("forbidden");
        let rig = Rig::new(&options(&directory.0, EngineChoice::Auto));
        let text = rig.storage.engine_text().to_string();
        assert!(text.contains("Linux AIO") && text.contains("it is forbidden here"), "{text}");
    });
}

#[test]
fn no_engine_at_all() {
    without(&[libc::SYS_io_uring_setup, libc::SYS_io_setup], libc::EAGAIN, || {
        let directory = on_disk("none");
        let error = LinuxStorage::new(&options(&directory.0, EngineChoice::Auto)).unwrap_err();
        assert!(error.contains("no engine can be used") && error.contains("fs.aio-max-nr"), "{error}");
    });
}

#[test]
fn helpers_do_what_an_engine_cannot() {
    for (memory, direct) in [(false, true), (false, false), (true, true)] {
        let directory = if memory { in_memory("helpers") } else { on_disk("helpers") };
        let path = directory.file("image", &vec![4; 20_000]);
        let plan = Rc::new(RefCell::new(Plan { old: true, ..Plan::default() }));
        let engine = Faulty::new(Box::new(Uring::new().unwrap()), &plan, 3);
        let options = Options { direct, ..options(&directory.0, EngineChoice::Auto) };
        let mut rig = Rig::with_engine(&options, Box::new(engine));
        let opened = rig.open(&path, Access::ReadWrite).unwrap();
        for at in 0..30 {
            rig.write(opened.file, at * 512, &[u8::try_from(at).unwrap(); 512]).unwrap();
        }
        rig.flush(opened.file).unwrap();
        assert_eq!(rig.read(opened.file, 512, 512).unwrap(), [1; 512]);
        assert_eq!(rig.write(opened.file, 40 * 512, &[0; 512]), Err(StorageError::PastEnd));
        assert_eq!(rig.read(opened.file, 39 * 512, 512).unwrap()[32..], [0; 480]);
        assert_eq!(std::fs::read(&path).unwrap()[29 * 512..30 * 512], [29; 512]);
        let pushed = plan.borrow().pushed;
        assert_eq!(pushed > 0, direct && !memory, "{pushed}");
        rig.storage.close(opened.file);
    }
}
