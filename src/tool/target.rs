//! Files that come to be whole or not at all: written under a temporary name beside the target, renamed when they are durable.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::Failed;
use super::file::{ImageFile, Lock, Shell};
use super::layers::Chain;
use crate::error::Error;
use crate::params::Image;
use crate::signals::{Signal, Signals};

/// What a signal removes before it ends the process.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A file in the making. Dropped before it is finished, it leaves nothing.
#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    temporary: PathBuf,
    finished: bool,
}

fn cannot(doing: &str, path: &Path, error: &std::io::Error) -> Failed {
    Error::new(format!("cannot {doing} {}: {error}", path.display()), "").into()
}

impl Target {
    /// Begins a file that will be at `path`, instead of what may be there. What is there must not be in use.
    ///
    /// # Errors
    /// Where it cannot be made, or what is there is no regular file, or locked.
    pub(super) fn begin(path: &str) -> Result<(Target, ImageFile), Failed> {
        catch_signals()?;
        // Through a symbolic link the file that it leads to is replaced, and not the link.
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
        let old = std::fs::metadata(&path).ok();
        if let Some(old) = &old {
            if !old.is_file() {
                let what = format!("{} is no regular file", path.display());
                return Err(Error::new(what, "to write to a device, use convert -n").into());
            }
            let file = OpenOptions::new().read(true).write(true).open(&path);
            let file = file.map_err(|error| cannot("write to", &path, &error))?;
            let exclusive = FlockOperation::NonBlockingLockExclusive;
            let is_locked = rustix::fs::flock(&file, exclusive).is_err();
            if is_locked
                || matches!(rustix::fs::fcntl_lock(&file, exclusive), Err(Errno::AGAIN | Errno::ACCESS))
            {
                let what = format!(
                    "{} is in use by another process, such as a running vbdd or qemu",
                    path.display()
                );
                return Err(Error::new(what, "end that first, or choose another name").into());
            }
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.vbdd-{}", std::process::id()));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        let mut unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        let file = options.open(&temporary).map_err(|error| cannot("create", &temporary, &error))?;
        unfinished.push(temporary.clone());
        drop(unfinished);
        if let Some(old) = old {
            let _ = file.set_permissions(old.permissions());
        }
        Ok((Target { path, temporary, finished: false }, ImageFile::new(file, false)))
    }

    /// The name that it has meanwhile.
    #[must_use]
    pub(super) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Sees, before it gets its name, that the image can be opened with all below it.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn opens(&self, image: &Image) -> Result<(), Failed> {
        let made = Image { format: image.format, path: self.temporary.to_string_lossy().into_owned() };
        Chain::open(&made, Shell { lock: Lock::None }, true).map(drop).map_err(|failed| {
            let what = failed.error.what.replace(&made.path, &image.path);
            Failed { error: Error { what, ..failed.error }, ..failed }
        })
    }

    /// Makes it durable, and gives it its name.
    ///
    /// # Errors
    /// What the system says; then the old file is still there.
    pub(super) fn finish(mut self, file: &File) -> Result<(), Failed> {
        file.sync_all().map_err(|error| cannot("sync", &self.temporary, &error))?;
        // From here on a signal waits until the name is changed.
        let mut unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        std::fs::rename(&self.temporary, &self.path)
            .map_err(|error| cannot("rename to", &self.path, &error))?;
        self.finished = true;
        unfinished.retain(|path| *path != self.temporary);
        drop(unfinished);
        let directory = self.path.parent().filter(|path| !path.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(|error| cannot("sync the directory", directory, &error))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.finished {
            let mut unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = std::fs::remove_file(&self.temporary);
            unfinished.retain(|path| *path != self.temporary);
        }
    }
}

/// From now on SIGINT and SIGTERM remove what is unfinished, whatever the process is doing, and end it.
fn catch_signals() -> Result<(), Failed> {
    static STARTED: OnceLock<()> = OnceLock::new();
    if STARTED.get().is_some() {
        return Ok(());
    }
    let mut signals = Signals::open()?;
    let watch = move || {
        loop {
            let _ = poll(&mut [PollFd::new(&signals.fd(), PollFlags::IN)], None);
            if signals.take() == Some(Signal::Stop) {
                let unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
                for path in unfinished.iter() {
                    let _ = std::fs::remove_file(path);
                }
                super::out::note("interrupted: nothing was changed");
                std::process::exit(130);
            }
        }
    };
    let started = std::thread::Builder::new().name("signals".into()).spawn(watch);
    started.map_err(|error| Error::new(format!("cannot start a thread: {error}"), ""))?;
    let _ = STARTED.set(());
    Ok(())
}
