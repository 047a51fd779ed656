//! Which paths are opened, and what is said of those that are not.
#![allow(missing_docs, clippy::unwrap_used)]

mod storage_support;

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use storage_support::{Directory, Rig, on_disk, options};
use vbdd::images::Roots;
use vbdd::storage::engine::EngineChoice;
use vbdd::storage::linux::{LinuxStorage, Options};
use vbdd::storage::{Access, Identity, Storage};

/// Two roots, something beside them, and links of all sorts.
struct Tree {
    top: Directory,
    rig: Rig,
}

fn tree(name: &str) -> Tree {
    let top = on_disk(name);
    let at = |path: &str| top.0.join(path);
    for directory in ["images", "images/sub", "images/directory", "more", "outside"] {
        std::fs::create_dir(at(directory)).unwrap();
    }
    for file in ["images/a.raw", "images/sub/b.raw", "more/c.raw", "outside/secret", "images/locked"] {
        std::fs::write(at(file), [1; 4096]).unwrap();
    }
    std::fs::write(at("images/empty"), b"").unwrap();
    symlink("../outside/secret", at("images/out")).unwrap();
    symlink(at("outside/secret"), at("images/out-absolute")).unwrap();
    symlink("../more/c.raw", at("images/over")).unwrap();
    symlink("over", at("images/over2")).unwrap();
    symlink("sub/b.raw", at("images/near")).unwrap();
    symlink("../outside", at("images/outdir")).unwrap();
    symlink("sub", at("images/subdir")).unwrap();
    symlink("loop", at("images/loop")).unwrap();
    symlink("nowhere", at("images/dangling")).unwrap();
    symlink("/proc/self/fd/0", at("images/magic")).unwrap();
    symlink("../images", at("more/link-to-root")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("images/fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let _ = std::os::unix::net::UnixListener::bind(at("images/socket")).unwrap();
    symlink(at("images"), at("alias")).unwrap();
    let roots = vec![at("alias"), at("more"), PathBuf::from("/dev/pts/.."), PathBuf::from("/dev/shm")];
    let options = Options { roots, ..options(&top.0, EngineChoice::Auto) };
    let rig = Rig::new(&options);
    Tree { top, rig }
}

#[test]
fn what_is_refused_and_why() {
    let mut tree = tree("refused");
    let long = format!("/{}", "x/".repeat(3000));
    let wide = format!("images/{}", "y".repeat(300));
    let cases: &[(&str, &str)] = &[
        ("", "the path is empty"),
        ("relative.raw", "must be absolute"),
        ("images/../outside/secret", "'..' is not allowed"),
        ("images/sub/../a.raw", "'..' is not allowed"),
        ("images/a.raw\0.txt", "zero byte"),
        (&long, "longer than 4095 bytes"),
        (&wide, "longer than a file name can be"),
        ("outside/secret", "lies below none of the directories given with --root"),
        ("imagesX", "lies below none of the directories given with --root"),
        ("images", "is a --root directory, not an image"),
        ("images/missing.raw", "does not exist; check the path"),
        ("images/missing/deep.raw", "does not exist; check the path"),
        ("images/a.raw/b", "is not a directory; check the path"),
        ("images/directory", "is a directory; an image must be a regular file or a block device"),
        ("images/fifo", "is a FIFO (named pipe); an image must be"),
        ("images/socket", "is a socket; an image must be"),
        ("images/empty", "is empty (0 bytes)"),
        ("images/out", "outside/secret, which lies below no --root"),
        ("images/out-absolute", "outside/secret, which lies below no --root"),
        ("images/magic", "is a symbolic link to /proc/self/fd/0, which lies below no --root"),
        ("images/outdir/secret", "is a symbolic link, which is not followed"),
        ("images/subdir/b.raw", "is a symbolic link, which is not followed"),
        ("images/loop", "more than 4 symbolic links"),
        ("images/dangling", "does not exist"),
        ("more/link-to-root", "is a --root directory, not an image"),
        ("/dev/null", "is a character device; an image must be"),
        ("/dev/loop-control", "is a character device; an image must be"),
        ("/etc/passwd", "lies below none"),
    ];
    for (path, expected) in cases {
        let path = match *path {
            "" | "relative.raw" => (*path).to_string(),
            absolute if absolute.starts_with('/') => absolute.to_string(),
            relative => tree.top.path(relative),
        };
        let error = tree.rig.open(&path, Access::ReadOnly).unwrap_err();
        assert!(error.reason.contains(expected), "{path}: {error}");
        let sentence = error.to_string();
        assert!(!sentence.contains(['\0', '\n']) && sentence.len() < 5000, "{sentence:?}");
    }
    assert!(cases.len() > 20);
}

#[test]
fn what_is_opened() {
    let mut tree = tree("opened");
    let cases = [
        ("images/a.raw", "images/a.raw"),
        ("alias/a.raw", "images/a.raw"),
        ("images//sub/./b.raw", "images/sub/b.raw"),
        ("images/near", "images/sub/b.raw"),
        ("images/over", "more/c.raw"),
        ("alias/over2", "more/c.raw"),
    ];
    for (path, real) in cases {
        let opened = tree.rig.open(&tree.top.path(path), Access::ReadWrite).unwrap();
        let stat = rustix::fs::stat(tree.top.path(real)).unwrap();
        let identity = Identity::File { device: stat.st_dev, inode: stat.st_ino };
        assert_eq!(opened.identity, identity, "{path}");
        assert_eq!(opened.size_bytes, 4096);
        tree.rig.storage.close(opened.file);
    }
}

#[test]
fn permissions() {
    let mut tree = tree("permissions");
    let path = tree.top.path("images/locked");
    // The owner of all files may open this one anyway; an immutable one it may not, where the file system knows that.
    let immutable = std::process::Command::new("chattr").args(["+i", &path]).status();
    if immutable.is_ok_and(|status| status.success()) {
        let error = tree.rig.open(&path, Access::ReadWrite).unwrap_err();
        assert!(error.reason.contains("or attach it read-only (mode r)"), "{error}");
        let opened = tree.rig.open(&path, Access::ReadOnly).unwrap();
        tree.rig.storage.close(opened.file);
        assert!(std::process::Command::new("chattr").args(["-i", &path]).status().unwrap().success());
    }
}

#[test]
fn bad_roots() {
    let top = on_disk("roots");
    let file = top.file("file", b"x");
    for (root, expected) in [
        ("relative", "--root must be an absolute path"),
        (file.as_str(), "is not a directory"),
        ("/does/not/exist", "--root cannot be used"),
    ] {
        let error = Roots::new(&[PathBuf::from(root)]).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        let options = Options { roots: vec![PathBuf::from(root)], ..Options::default() };
        assert!(LinuxStorage::new(&options).unwrap_err().contains(root));
    }
    let many = vec![top.0.clone(); 65];
    assert!(Roots::new(&many).unwrap_err().reason.contains("one --root too many"));
    let error = Roots::new(&[]).unwrap().locate(&file).unwrap_err();
    assert!(error.reason.contains("no --root was given"), "{error}");
}

#[test]
fn many_opens_at_once_and_too_many() {
    let mut tree = tree("many");
    let path = tree.top.path("images/a.raw");
    for token in 0..1000 {
        tree.rig.storage.open(token, &path, Access::ReadOnly);
    }
    let (mut good, mut refused) = (0, 0);
    while good + refused < 1000 {
        match tree.rig.storage.opened() {
            Some((_, Ok(_))) => good += 1,
            Some((_, Err(error))) => {
                assert!(error.reason.contains("too many files wait to be opened"), "{error}");
                refused += 1;
            }
            None => {
                tree.rig.wait(std::time::Duration::from_secs(5));
            }
        }
    }
    assert!(good >= 256, "{good}");
}
