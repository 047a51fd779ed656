//! The two ways to resolve a path agree.

use super::*;
use std::os::unix::fs::symlink;

#[test]
fn the_walk_of_old_kernels_resolves_as_openat2_does() {
    let top = std::env::temp_dir().join(format!("vbdd-walk-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&top);
    std::fs::create_dir_all(top.join("root/a/b")).unwrap();
    std::fs::create_dir_all(top.join("outside")).unwrap();
    for file in ["root/file", "root/a/file", "root/a/b/file", "outside/file"] {
        std::fs::write(top.join(file), "x").unwrap();
    }
    for (target, link) in [
        ("file", "link"),
        ("../outside/file", "out"),
        ("a", "adir"),
        ("../outside", "odir"),
        ("loop", "loop"),
    ] {
        symlink(target, top.join("root").join(link)).unwrap();
    }
    symlink("b", top.join("root/a/bdir")).unwrap();
    symlink("/", top.join("root/slash")).unwrap();
    let roots = Roots::new(&[top.join("root")]).unwrap();
    let directory = &roots.roots[0].directory;
    let mut compared = 0;
    for path in [
        "file",
        "./file",
        "a",
        "a/file",
        "a/b/file",
        "a/./b//file",
        "link",
        "out",
        "adir",
        "adir/file",
        "odir/file",
        "a/bdir/file",
        "a/bdir",
        "loop",
        "loop/x",
        "slash",
        "slash/etc/passwd",
        "file/x",
        "missing",
        "missing/x",
        "a/b/missing",
        "..",
        "../outside/file",
        "a/../file",
        "a/../../outside/file",
        "/etc/passwd",
    ] {
        for flags in [OFlags::RDONLY | OFlags::NOFOLLOW, OFlags::PATH | OFlags::NOFOLLOW] {
            let flags = flags | OFlags::CLOEXEC;
            let outcome = |result: Result<OwnedFd, Errno>| {
                result.map(|fd| rustix::fs::fstat(&fd).map(|stat| (stat.st_ino, stat.st_mode)).unwrap())
            };
            let new = outcome(roots.open_below(0, Path::new(path), flags));
            let old = outcome(walk(directory.as_fd(), Path::new(path), flags));
            // Words that go up are refused before either is asked; the walk refuses all of them.
            if path.contains("..") {
                assert_eq!(old, Err(Errno::XDEV), "{path}");
            } else {
                assert_eq!(new, old, "{path} {flags:?}");
            }
            compared += 1;
        }
    }
    assert!(compared > 50);
    std::fs::remove_dir_all(&top).unwrap();
}

#[test]
fn links_are_made_plain() {
    for (from, to) in [
        ("/dev/mapper/../dm-0", "/dev/dm-0"),
        ("/a/./b//c", "/a/b/c"),
        ("/../../x", "/x"),
        ("/a/b/../..", "/"),
    ] {
        assert_eq!(plain(Path::new(from)), PathBuf::from(to));
    }
}

#[test]
fn junk_in_paths_stays_out_of_the_log() {
    let error = refuse("/a\u{1b}[2J\nb\r", "no");
    assert_eq!(error.path, "/a\\u{1b}[2J\\nb\\r");
    assert!(printable(&"x".repeat(10_000)).len() <= PATH_BYTES_MAX);
}
