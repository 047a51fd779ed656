//! How images come into the table of open files: threads open them, one after another of what they found is installed.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::chained::{Opener, PreparedChain};
use super::engine::Engine;
use super::files::{FILES_MAX, File, Files};
use super::linux::{Alignment, LinuxStorage};
use super::medium::{Path, Prepared};
use super::remote::Servers;
use super::workers::{Bell, Workers};
use super::zeroes::Way;
use super::{Access, DiscardUnit, Identity, Layer, OpenError, Opened, Storage};
use crate::images::Roots;
use crate::keep::Left;
use crate::params::Image;

/// Threads that open and close files. A dead file server holds one for each path that is tried; the rest go on.
const OPENERS_MAX: usize = 4;

/// A job for an opener.
pub(super) enum Errand {
    Open { token: u64, image: Image, access: Access, left: Left },
    Close(Box<File>),
}

impl std::fmt::Debug for Errand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Errand::Open { image, .. } => write!(f, "Open({})", image.path),
            Errand::Close(_) => f.write_str("Close"),
        }
    }
}

pub(super) type OpenAnswer = (u64, Result<PreparedChain, OpenError>, Image);

/// The threads, that start with the first errand.
pub(super) fn start(
    bell: &Arc<Bell>,
    roots: Arc<Roots>,
    servers: Arc<Servers>,
    (direct, least): (bool, Option<Alignment>),
) -> Workers<Errand, OpenAnswer> {
    Workers::new("vbdd-open", OPENERS_MAX, Arc::clone(bell), move |errand| match errand {
        Errand::Open { token, image, access, left } => {
            let mut opener = Opener { roots: &roots, servers: &servers, left: &left, access, direct, least };
            Some((token, opener.open(&image), image))
        }
        Errand::Close(file) => {
            drop(file);
            None
        }
    })
}

/// Whether the engine should know a file by number. Not a device: the kernel lets go of registered files late, and the claim
/// on a device ends with its open file.
fn registers(entry: &File) -> bool {
    entry.path != Path::Memory && matches!(entry.identity, Identity::File { .. })
}

impl LinuxStorage {
    pub(super) fn refuse_open(&mut self, token: u64, path: String, reason: &str) {
        let error = OpenError { path, reason: reason.into() };
        self.refused_opens.push_back((token, Err(error)));
        // The caller is told as of any other open.
        self.bell.ring();
    }

    /// Puts the files of an image into the table.
    pub(super) fn install_all(&mut self, image: Image, chain: PreparedChain) -> Result<Opened, OpenError> {
        let mut opened = self.install(&image.path, chain.leaf)?;
        if chain.formats.is_empty() {
            return Ok(opened);
        }
        let (mut layers, mut formats) = (Vec::new(), chain.formats.into_iter());
        let mut add = |file, identity| {
            layers.extend(formats.next().map(|format| Layer { file, identity, format }));
        };
        add(opened.file, opened.identity);
        let mut failed = None;
        for prepared in chain.parents {
            match self.install(&image.path, prepared) {
                Ok(parent) => add(parent.file, parent.identity),
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            layers.iter().for_each(|layer| self.close(layer.file));
            return Err(error);
        }
        if let Some(leaf) = layers.first() {
            opened.size_bytes = leaf.format.geometry().sectors * formats::SECTOR_BYTES;
            let granularity_bytes = u32::try_from(leaf.format.unit_bytes()).unwrap_or(u32::MAX);
            opened.discard = opened.discard.map(|_| DiscardUnit { granularity_bytes, alignment_bytes: 0 });
        }
        self.layers.push((opened.file, layers));
        Ok(opened)
    }

    fn install(&mut self, path: &str, prepared: Prepared) -> Result<Opened, OpenError> {
        let path = path.to_owned();
        let (locked, mut prepared) = (prepared.locked, prepared);
        let connected = prepared.remote.take();
        let Some(file) = self.files.insert(prepared) else {
            let reason = format!("{FILES_MAX} files are open already; detach disks that are not needed");
            return Err(OpenError { path, reason });
        };
        let index = Files::place(file);
        let Some(entry) = self.files.at(file) else {
            return Err(OpenError {
                path,
                reason: String::from("the table of files is broken (a bug in vbdd)"),
            });
        };
        if let (Some(connected), Some(remotes)) = (connected, &mut self.remotes) {
            if !connected.can_zero() {
                entry.zeroing = Way::Writing;
            }
            entry.remote = Some(remotes.insert(*connected));
        }
        if registers(entry) && self.engine.attach(index, entry.fd.as_fd()) {
            entry.attached = Some(index);
        }
        Ok(Opened {
            file,
            identity: entry.identity,
            size_bytes: entry.shape.size,
            physical_block_bytes: entry.physical_block_bytes,
            direct: entry.path == Path::Direct,
            discard: entry.discard,
            locked,
        })
    }
}
