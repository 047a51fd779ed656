//! Which files may be images: those below the roots that the operator named, and nothing else.
//!
//! Whoever writes xenstore names a path; the operator's `--root` says how far that reaches. A path is taken apart by
//! words, then resolved by the kernel relative to the root's descriptor, without following any symbolic link. Only a
//! link in the last place is followed, by hand, and its target must again lie below a root.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::storage::{Access, Identity, OpenError};

/// Roots that may be named: each costs a descriptor, and each path is held against all.
pub const ROOTS_MAX: usize = 64;

/// Symbolic links in last place that are followed, one after the other: device-mapper and by-id names need one.
const LINKS_MAX: u32 = 4;

/// The longest path in bytes (`PATH_MAX` without its zero).
const PATH_BYTES_MAX: usize = 4095;

/// How often a resolution that the kernel gave up because of a rename elsewhere is tried.
const RACES_MAX: u32 = 16;

/// One directory below which images may lie.
#[derive(Debug)]
struct Root {
    /// As the operator wrote it.
    asked: PathBuf,
    /// Without symbolic links.
    real: PathBuf,
    directory: OwnedFd,
}

/// The directories below which images may lie.
#[derive(Debug)]
pub struct Roots {
    roots: Vec<Root>,
    /// The option that names them.
    option: &'static str,
}

/// A file or block device that may be opened as an image. Nothing of it was opened yet.
#[derive(Debug)]
pub struct Image {
    root: usize,
    relative: PathBuf,
    kind: FileType,
    /// Which file it really is.
    pub identity: Identity,
}

/// What a path has led to.
struct Node {
    root: usize,
    relative: PathBuf,
    node: OwnedFd,
    stat: Stat,
}

impl Image {
    /// Whether it is a block device; otherwise it is a regular file.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.kind == FileType::BlockDevice
    }
}

fn refuse(path: &str, reason: impl Into<String>) -> OpenError {
    OpenError { path: printable(path), reason: reason.into() }
}

/// A path from outside as it may stand in a log: control characters escaped, and not longer than a path can be.
fn printable(path: &str) -> String {
    let cut: String = path.chars().take(PATH_BYTES_MAX).collect();
    cut.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

impl Roots {
    /// Opens the directories. None at all is allowed: then nothing can be opened.
    ///
    /// # Errors
    /// For a root that is not an absolute path of an existing directory, and for more than [`ROOTS_MAX`].
    pub fn new(paths: &[PathBuf]) -> Result<Roots, OpenError> {
        Self::of_option("--root", paths)
    }

    /// The same for directories that another option names.
    ///
    /// # Errors
    /// As [`Roots::new`].
    pub fn of_option(option: &'static str, paths: &[PathBuf]) -> Result<Roots, OpenError> {
        let mut roots = Vec::new();
        for asked in paths {
            let text = asked.to_string_lossy();
            if roots.len() == ROOTS_MAX {
                return Err(refuse(&text, format!("is one {option} too many: {ROOTS_MAX} are allowed")));
            }
            if !asked.is_absolute() {
                return Err(refuse(&text, format!("{option} must be an absolute path")));
            }
            let real = asked
                .canonicalize()
                .map_err(|error| refuse(&text, format!("{option} cannot be used: {}", error.kind())))?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(&real, flags, Mode::empty()).map_err(|errno| {
                let why = if errno == Errno::NOTDIR { "is not a directory" } else { "cannot be opened" };
                refuse(&text, format!("{option} {why} ({errno})"))
            })?;
            roots.push(Root { asked: asked.clone(), real, directory });
        }
        Ok(Roots { roots, option })
    }

    /// Finds out what `path` is, without opening it: no device driver and no FIFO notices.
    ///
    /// # Errors
    /// When it is not below a root, does not exist, or is neither a regular file nor a block device.
    pub fn locate(&self, path: &str) -> Result<Image, OpenError> {
        let Node { root, relative, stat, .. } = self.node(path)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        Ok(Image { root, relative, kind, identity: identity(path, kind, &stat)? })
    }

    /// Finds a Unix socket. The descriptor only names it.
    ///
    /// # Errors
    /// When it is not below a root, does not exist, or is no socket.
    pub fn socket(&self, path: &str) -> Result<OwnedFd, OpenError> {
        let node = self.node(path)?;
        match FileType::from_raw_mode(node.stat.st_mode) {
            FileType::Socket => Ok(node.node),
            _ => Err(refuse(path, "is no socket")),
        }
    }

    /// What a path leads to.
    fn node(&self, path: &str) -> Result<Node, OpenError> {
        check_words(path)?;
        let mut current = PathBuf::from(path);
        for _ in 0..=LINKS_MAX {
            let (root, relative) = self.below(path, &current)?;
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let node = self.open_below(root, &relative, flags).map_err(|errno| explain(path, errno, None))?;
            let stat = rustix::fs::fstat(&node).map_err(|errno| explain(path, errno, None))?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
                return Ok(Node { root, relative, node, stat });
            }
            let target =
                rustix::fs::readlinkat(&node, "", Vec::new()).map_err(|errno| explain(path, errno, None))?;
            let target = PathBuf::from(String::from_utf8_lossy(target.as_bytes()).into_owned());
            let parent = self.roots.get(root).map_or(PathBuf::new(), |found| found.real.join(&relative));
            current = plain(&parent.parent().unwrap_or(Path::new("/")).join(target));
        }
        Err(refuse(
            path,
            format!("more than {LINKS_MAX} symbolic links lead on from here; name the file itself"),
        ))
    }

    /// Opens an image that was located, and makes sure that it still is the same file.
    ///
    /// `extra` are flags beyond those of `access`, such as `O_DIRECT`. A block device that is opened for writing is claimed
    /// (`O_EXCL`), so that one which is mounted or belongs to a volume group is refused.
    ///
    /// # Errors
    /// The system's errno; `ESTALE` when the path leads to another file by now.
    pub fn open(&self, image: &Image, access: Access, extra: OFlags) -> Result<OwnedFd, Errno> {
        let mut flags = extra | OFlags::NOFOLLOW | OFlags::NOCTTY;
        flags |= match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite | Access::ReadWriteShared => OFlags::RDWR,
        };
        if image.is_device() {
            if access == Access::ReadWrite {
                flags |= OFlags::EXCL;
            }
        } else {
            // Should the file have become a FIFO by now, this open must not wait for its other end.
            flags |= OFlags::NONBLOCK;
        }
        let fd = self.open_below(image.root, &image.relative, flags)?;
        let stat = rustix::fs::fstat(&fd)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if identity("", kind, &stat).ok() != Some(image.identity) {
            return Err(Errno::STALE);
        }
        if flags.contains(OFlags::NONBLOCK) {
            // io_uring takes the flag for "answer EAGAIN rather than wait".
            rustix::fs::fcntl_setfl(&fd, extra & (OFlags::DIRECT | OFlags::DSYNC))?;
        }
        Ok(fd)
    }

    /// The root that `path` lies below, and the rest of the path. The longest root wins.
    fn below(&self, asked: &str, path: &Path) -> Result<(usize, PathBuf), OpenError> {
        let found = self
            .roots
            .iter()
            .enumerate()
            .flat_map(|(index, root)| {
                [&root.asked, &root.real].into_iter().filter_map(move |prefix| {
                    let rest = path.strip_prefix(prefix).ok()?;
                    Some((index, prefix.components().count(), rest))
                })
            })
            .max_by_key(|(_, depth, _)| *depth);
        match found {
            Some((_, _, rest)) if rest.as_os_str().is_empty() => {
                Err(refuse(asked, format!("is a {} directory, not an image", self.option)))
            }
            Some((root, _, rest)) => Ok((root, rest.to_path_buf())),
            None if self.roots.is_empty() => {
                Err(refuse(asked, format!("no {} was given, so no image may be opened", self.option)))
            }
            None if path == Path::new(asked) => Err(refuse(
                asked,
                format!(
                    "lies below none of the directories given with {0}; move it there, or add a {0}",
                    self.option
                ),
            )),
            None => {
                let target = printable(&path.to_string_lossy());
                Err(refuse(
                    asked,
                    format!(
                        "is a symbolic link to {target}, which lies below no {}; add one that holds it",
                        self.option
                    ),
                ))
            }
        }
    }

    fn open_below(&self, root: usize, relative: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let root = self.roots.get(root).ok_or(Errno::BADF)?;
        let flags = flags | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..RACES_MAX {
            match rustix::fs::openat2(&root.directory, relative, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN) => {}
                // Kernels before 5.6, and seccomp filters that do not know the call.
                Err(Errno::NOSYS | Errno::PERM) => return walk(root.directory.as_fd(), relative, flags),
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }
}

/// What can be said of a path before anything is looked up.
fn check_words(path: &str) -> Result<(), OpenError> {
    if path.is_empty() {
        return Err(refuse(path, "the path is empty"));
    }
    if path.contains('\0') {
        return Err(refuse(path, "the path contains a zero byte"));
    }
    if path.len() > PATH_BYTES_MAX {
        return Err(refuse(path, format!("the path is longer than {PATH_BYTES_MAX} bytes")));
    }
    if !path.starts_with('/') {
        return Err(refuse(path, "the path must be absolute (start with '/')"));
    }
    if Path::new(path).components().any(|part| part == Component::ParentDir) {
        return Err(refuse(path, "'..' is not allowed in an image's path; write the path out"));
    }
    Ok(())
}

/// A link's target without `.` and `..`. It starts from a directory that was reached without symbolic links, so that
/// dropping a word means going up.
fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::Normal(word) => out.push(word),
            _ => {}
        }
    }
    out
}

/// What `openat2` does, step by step, for kernels without it.
fn walk(root: BorrowedFd<'_>, relative: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let mut words: Vec<_> = Vec::new();
    for part in relative.components() {
        match part {
            Component::Normal(word) => words.push(word),
            Component::CurDir => {}
            _ => return Err(Errno::XDEV),
        }
    }
    let last = words.pop().ok_or(Errno::ISDIR)?;
    let step = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut held: Option<OwnedFd> = None;
    for word in words {
        let directory = held.as_ref().map_or(root, AsFd::as_fd);
        let next = rustix::fs::openat(directory, word, step, Mode::empty())?;
        match FileType::from_raw_mode(rustix::fs::fstat(&next)?.st_mode) {
            FileType::Directory => held = Some(next),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NOTDIR),
        }
    }
    let directory = held.as_ref().map_or(root, AsFd::as_fd);
    rustix::fs::openat(directory, last, flags | OFlags::NOFOLLOW, Mode::empty())
}

fn identity(path: &str, kind: FileType, stat: &Stat) -> Result<Identity, OpenError> {
    let what = match kind {
        FileType::RegularFile => {
            return Ok(Identity::File { device: stat.st_dev, inode: stat.st_ino });
        }
        FileType::BlockDevice => return Ok(Identity::Device { number: stat.st_rdev }),
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO (named pipe)",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        _ => "of an unknown type",
    };
    Err(refuse(path, format!("is {what}; an image must be a regular file or a block device")))
}

/// The operator's sentence for an errno. `access` is what was asked for, where opening and not finding failed.
pub(crate) fn explain(path: &str, errno: Errno, access: Option<Access>) -> OpenError {
    let writing = matches!(access, Some(Access::ReadWrite | Access::ReadWriteShared));
    let reason = match errno {
        Errno::NOENT => String::from("does not exist; check the path"),
        Errno::NOTDIR => String::from("something on the way to it is not a directory; check the path"),
        Errno::LOOP => String::from(
            "a directory on the way to it is a symbolic link, which is not followed; write the real path",
        ),
        Errno::XDEV => String::from("leads out of its directory, which was allowed"),
        Errno::NAMETOOLONG => String::from("a part of the path is longer than a file name can be"),
        Errno::ACCESS | Errno::PERM if writing => String::from(
            "may not be opened for writing by vbdd: it, or its device, is protected; change that, or attach it read-only (mode r)",
        ),
        Errno::ACCESS | Errno::PERM => String::from("may not be opened by vbdd; check its permissions"),
        Errno::ROFS => String::from(
            "is on a read-only file system or device; make that writable, or attach it read-only (mode r)",
        ),
        Errno::BUSY => String::from(
            "is in use on this host (mounted, part of a volume group or RAID, or attached writable); release it first",
        ),
        Errno::TXTBSY => String::from("is in use on this host as swap space or as a running program"),
        Errno::MFILE | Errno::NFILE => {
            String::from("cannot be opened: too many open files; raise the limit of open files (LimitNOFILE)")
        }
        Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM => {
            format!("the device behind it is not there ({errno})")
        }
        Errno::STALE => String::from("was replaced by another file while it was opened; try again"),
        other => format!("cannot be opened: {other}"),
    };
    refuse(path, reason)
}

#[cfg(test)]
mod tests;
