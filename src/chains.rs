//! Opening an image with all that it is built on: the leaf, its parent, the parent's parent.
//!
//! Which file a name leads to is for a [`Library`] to say; what the file holds is read here, through a [`Medium`] that
//! answers at once. So everything here may block, and runs where that is allowed: on an opener's thread, or in a tool.
//!
//! The format of the leaf is named by the caller, that of a parent by its child. Nothing is probed. Only the leaf is
//! ever opened for writing.

use std::fmt::Display;

use formats::qcow2::check::{Fix, check};
use formats::qcow2::header::LAZY_REFCOUNTS;
use formats::qcow2::{Header, Options, Qcow2, Repair};
use formats::vhd::check::check_parent;
use formats::vhd::{Headers, Kind, Vhd, read_headers};
use formats::{Facts, Medium, Raw, Unsupported};

use crate::params::{Format, Image};
use crate::storage::{Identity, OpenError};

/// Images of a chain at most, the leaf among them.
pub const DEPTH_MAX: usize = 64;

/// What a name led to.
#[derive(Debug)]
pub struct Found<M> {
    /// The file, open.
    pub medium: M,
    /// Which file it really is.
    pub identity: Identity,
    /// It can be made longer: a file, not a device.
    pub grows: bool,
}

/// Who finds files.
pub trait Library {
    /// An open file.
    type File: Medium;

    /// Opens what an absolute path names.
    ///
    /// # Errors
    /// The operator's sentence.
    fn open(&mut self, path: &str, writable: bool) -> Result<Found<Self::File>, OpenError>;

    /// Metadata of a file that a process which was killed had changed and not written: they are written before the file is
    /// opened for writing. Where in the file, in bytes, and what.
    fn left(&mut self, found: &Found<Self::File>) -> Vec<(u64, Vec<u8>)> {
        let _ = found;
        Vec::new()
    }
}

/// One image of a chain.
#[derive(Debug)]
pub struct Link<M> {
    /// Its format and path.
    pub image: Image,
    /// Its file.
    pub medium: M,
    /// Which file it really is.
    pub identity: Identity,
    /// The open image.
    pub format: Box<dyn formats::Format>,
}

/// What to do on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The leaf is to be written.
    pub writable: bool,
    /// Go on to the parents.
    pub parents: bool,
}

/// Opens an image and all its parents, leaf first.
///
/// A QCOW2 leaf that is to be written and was not closed is repaired first, which takes a time that its metadata bound.
///
/// # Errors
/// The operator's sentence, about the image that could not be opened, with the one that names it.
pub fn open<L: Library>(library: &mut L, leaf: &Image, wish: Wish) -> Result<Vec<Link<L::File>>, OpenError> {
    let mut chain: Vec<Link<L::File>> = Vec::new();
    let mut next = Some((Parent::Named(leaf.clone()), wish.writable));
    while let Some((parent, writable)) = next.take() {
        if chain.len() == DEPTH_MAX {
            return Err(within(&chain, refuse(&leaf.path, format!("it has more than {DEPTH_MAX} images"))));
        }
        if let Parent::Unreadable(error) = parent {
            return Err(error);
        }
        let (image, mut found) =
            find(library, &chain, parent, writable).map_err(|error| within(&chain, error))?;
        if chain.iter().any(|link| link.identity == found.identity) {
            let error = refuse(&image.path, "it is its own parent: the chain of images is a loop");
            return Err(within(&chain, error));
        }
        if writable {
            let left = library.left(&found);
            put_back(&image, &mut found.medium, &left).map_err(|why| unsupported(&image.path, why))?;
        }
        let child = chain.last().map(|link| link.image.format);
        let (link, parent) = read(image, found, writable, child).map_err(|error| within(&chain, error))?;
        chain.push(link);
        if wish.parents {
            next = parent.map(|parent| (parent, false));
        }
    }
    Ok(chain)
}

/// A parent, as its child names it.
enum Parent {
    /// By format and path.
    Named(Image),
    /// By the paths of a VHD's locators, best first; and what the child says of it.
    Located { paths: Vec<String>, child: Box<Headers> },
    /// In a way that cannot be followed.
    Unreadable(OpenError),
}

fn refuse(path: &str, reason: impl Into<String>) -> OpenError {
    OpenError { path: path.into(), reason: reason.into() }
}

/// Says of an error which image led there.
fn within<M>(chain: &[Link<M>], error: OpenError) -> OpenError {
    match chain.last() {
        Some(child) => OpenError {
            reason: format!("{} (it is the parent of {})", error.reason, child.image.path),
            path: error.path,
        },
        None => error,
    }
}

fn unsupported(path: &str, why: impl Display) -> OpenError {
    refuse(path, why.to_string())
}

/// Opens the file of a parent.
fn find<L: Library>(
    library: &mut L,
    chain: &[Link<L::File>],
    parent: Parent,
    writable: bool,
) -> Result<(Image, Found<L::File>), OpenError> {
    let directory = chain.last().map_or("/", |child| directory(&child.image.path));
    match parent {
        Parent::Named(image) => {
            // The leaf's own name is the caller's. What an image names is a path, whatever it looks like.
            let path = if chain.is_empty() { image.path.clone() } else { beside(directory, &image.path) };
            let found = library.open(&path, writable)?;
            Ok((Image { path, ..image }, found))
        }
        Parent::Located { paths, child } => {
            let mut first = None;
            for path in paths {
                match located(library, &beside(directory, &path), &child) {
                    Ok(found) => return Ok(found),
                    Err(error) => first = first.or(Some(error)),
                }
            }
            let nothing =
                || refuse("(no path)", "the VHD names no parent that can be read; say it with rebase -u");
            Err(first.unwrap_or_else(nothing))
        }
        Parent::Unreadable(error) => Err(error),
    }
}

/// Tries one path to a VHD's parent.
fn located<L: Library>(
    library: &mut L,
    path: &str,
    child: &Headers,
) -> Result<(Image, Found<L::File>), OpenError> {
    let mut found = library.open(path, false)?;
    let is_raw = child.parent_uuid() == Some(None);
    let format = if is_raw { Format::Raw } else { Format::Vhd };
    let headers = if is_raw { None } else { Some(read_headers(&mut found.medium)) };
    let headers = headers.transpose().map_err(|why| unsupported(path, why))?;
    check_parent(child, headers.as_ref()).map_err(|why| unsupported(path, why))?;
    Ok((Image { format, path: path.into() }, found))
}

type Read<M> = (Link<M>, Option<Parent>);

/// Writes what a process that was killed had changed in memory only: the image is then as its guest knows it.
fn put_back<M: Medium>(image: &Image, medium: &mut M, left: &[(u64, Vec<u8>)]) -> Result<(), Unsupported> {
    if left.is_empty() {
        return Ok(());
    }
    let is_open = match image.format {
        Format::Qcow2 => Repair::of(&Header::read(medium)?) != Repair::NotNeeded,
        Format::Raw => false,
        Format::Vhd => true,
    };
    let (path, count) = (&image.path, left.len());
    if !is_open {
        log::warn!(
            "{path}: {count} changed pages of metadata are kept of it, but it was closed since: not written"
        );
        return Ok(());
    }
    // The data that the pages name, which are in the kernel's hands, must not come after them.
    medium.sync()?;
    for (offset_bytes, bytes) in left {
        medium.write(*offset_bytes, bytes)?;
    }
    medium.sync()?;
    log::info!(
        "{path}: {count} pages of metadata were written that its last user, who was killed, had changed"
    );
    Ok(())
}

/// Reads what an open file holds.
fn read<M: Medium>(
    image: Image,
    mut found: Found<M>,
    writable: bool,
    child: Option<Format>,
) -> Result<Read<M>, OpenError> {
    let medium = &mut found.medium;
    let facts = Facts {
        length_bytes: medium.length_bytes(),
        grows: found.grows,
        // A file system gives no byte of another file; a device holds whatever was there.
        new_space_is_zero: found.grows,
    };
    let path = image.path.as_str();
    let (format, parent): (Box<dyn formats::Format>, _) = match image.format {
        Format::Raw => (Box::new(raw(path, facts.length_bytes)?), None),
        Format::Qcow2 => {
            let (qcow2, header) = qcow2(path, medium, facts, writable)?;
            (Box::new(qcow2), parent_of_qcow2(path, &header))
        }
        Format::Vhd => {
            let headers = read_headers(medium).map_err(|why| unsupported(path, why))?;
            let opened = if writable { Vhd::open_to_write(medium, facts) } else { Vhd::open(medium) };
            let vhd = opened.map_err(|why| unsupported(path, why))?;
            if child == Some(Format::Qcow2) && !vhd.may_be_below_qcow2() {
                let reason =
                    "is a differencing VHD, and qemu would read it below a QCOW2 image as something else";
                return Err(refuse(path, reason));
            }
            (Box::new(vhd), parent_of_vhd(headers))
        }
    };
    Ok((Link { image, medium: found.medium, identity: found.identity, format }, parent))
}

fn raw(path: &str, length_bytes: u64) -> Result<Raw, OpenError> {
    Raw::open(length_bytes).map_err(|_| refuse(path, "is smaller than one sector of 512 bytes"))
}

fn qcow2<M: Medium>(
    path: &str,
    medium: &mut M,
    facts: Facts,
    writable: bool,
) -> Result<(Qcow2, Header), OpenError> {
    let header = Header::read(medium).map_err(|why| unsupported(path, why))?;
    if writable && Repair::of(&header) == Repair::Needed {
        repair(path, medium, &header)?;
    }
    let (grows, new_space_is_zero) = (facts.grows, facts.new_space_is_zero);
    let options = Options { writable, grows, new_space_is_zero, ..Options::default() };
    Qcow2::open(medium, options).map_err(|why| unsupported(path, why))
}

/// Mends what whoever had the image open last, and did not close it, has left.
fn repair<M: Medium>(path: &str, medium: &mut M, header: &Header) -> Result<(), OpenError> {
    // Ours and qemu's own writes leave leaks. Lazy refcounts may be too low as well.
    let fix = if header.compatible & LAZY_REFCOUNTS == 0 { Fix::Leaks } else { Fix::All };
    let report = check(medium, fix).map_err(|why| unsupported(path, why))?;
    let (leaks, mended) = (report.leaks_repaired, report.corruptions_repaired);
    if report.corruptions > mended {
        let first = report.findings.first().map(ToString::to_string).unwrap_or_default();
        let count = report.corruptions - mended;
        return Err(refuse(
            path,
            format!(
                "was not closed by its last user, and is damaged in {count} places, first: {first}; look at it with \
                 vbdd image check, or open it for reading only"
            ),
        ));
    }
    log::info!(
        "{path} was not closed by its last user: {leaks} lost clusters and {mended} refcounts were mended"
    );
    Ok(())
}

fn parent_of_qcow2(path: &str, header: &Header) -> Option<Parent> {
    let backing = header.backing.as_ref()?;
    let name = backing.name.as_str();
    let reason = match backing.format.as_deref() {
        Some("raw") => return named(Format::Raw, name),
        Some("qcow2") => return named(Format::Qcow2, name),
        Some("vpc" | "vhd") => return named(Format::Vhd, name),
        Some(other) => format!("its parent {name} is said to be {other}, which cannot be read"),
        None => format!(
            "it does not say of which format its parent {name} is, and formats are never guessed; say it with \
             vbdd image rebase -u -b {name} -F FORMAT {path}"
        ),
    };
    Some(Parent::Unreadable(refuse(path, reason)))
}

fn named(format: Format, path: &str) -> Option<Parent> {
    Some(Parent::Named(Image { format, path: path.into() }))
}

fn parent_of_vhd(headers: Headers) -> Option<Parent> {
    let is_differencing = headers.footer.kind() == Kind::Differencing;
    let located = || Parent::Located { paths: headers.parent_paths(), child: Box::new(headers) };
    is_differencing.then(located)
}

/// The directory that an absolute path lies in.
fn directory(path: &str) -> &str {
    match path.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((directory, _)) => directory,
    }
}

/// A name as seen from a directory, without `.` and `..`.
fn beside(directory: &str, name: &str) -> String {
    let whole = if name.starts_with('/') { String::from(name) } else { format!("{directory}/{name}") };
    let mut words: Vec<&str> = Vec::new();
    for word in whole.split('/') {
        match word {
            "" | "." => {}
            ".." => {
                words.pop();
            }
            word => words.push(word),
        }
    }
    format!("/{}", words.join("/"))
}

#[cfg(test)]
mod tests;
