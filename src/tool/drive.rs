//! A disk that is changed, with nobody else about: work is done at once, in the order in which it comes.

use formats::bytes::index;
use formats::{
    Disk, Extent, Failure, Limits, Medium, Op, Pages, Payload, Request, SECTOR_BYTES, Work, WorkKind,
};

use super::file::ImageFile;
use super::file::Shell;
use super::{Failed, failure};
use crate::chains::{self, Link, Wish};
use crate::params::Image;

/// Metadata that are kept.
const CACHE_BYTES: usize = 8 << 20;
/// The most that one request zeroes.
const ZERO_SECTORS: u64 = (1 << 30) / SECTOR_BYTES;

/// An open disk. To be closed: dropped without, a QCOW2 image stays marked as open, which is repaired when it is opened next.
#[derive(Debug)]
pub(super) struct Drive {
    disk: Disk,
    pages: Pages,
    files: Vec<(Image, ImageFile)>,
    scratch: Vec<u8>,
    failed: Option<Failure>,
    open: usize,
}

impl Drive {
    /// Opens an image and its parents.
    ///
    /// # Errors
    /// The operator's sentence.
    pub(super) fn open(image: &Image, mut shell: Shell, writable: bool) -> Result<Drive, Failed> {
        let links = chains::open(&mut shell, image, Wish { writable, parents: true });
        Ok(Drive::of(links.map_err(|error| super::opening(error, image))?, writable))
    }

    /// A disk on images that are open.
    #[must_use]
    pub(super) fn of(links: Vec<Link<ImageFile>>, writable: bool) -> Drive {
        let (mut files, mut images) = (Vec::new(), Vec::new());
        for (number, link) in (0..).zip(links) {
            files.push((link.image, link.medium));
            images.push((number, link.format));
        }
        let limits = Limits { dirty_pages: 1024, ..Limits::default() };
        let disk = Disk::new(0, images, !writable, limits);
        Drive { disk, pages: Pages::new(CACHE_BYTES), files, scratch: Vec::new(), failed: None, open: 0 }
    }

    /// Size of the disk.
    #[must_use]
    pub(super) fn sectors(&self) -> u64 {
        self.disk.geometry().sectors
    }

    /// The leaf's file.
    #[must_use]
    pub(super) fn leaf(&mut self) -> Option<&mut ImageFile> {
        self.files.first_mut().map(|(_, file)| file)
    }

    /// Hands a request over. Its token is where its memory begins within `memory`.
    ///
    /// # Errors
    /// What became of it, or of an earlier one.
    pub(super) fn submit(&mut self, request: Request, memory: &mut [u8]) -> Result<(), Failed> {
        while !self.disk.submit(&mut self.pages, request) {
            if !self.work(memory) {
                return Err(self.say(Failure::Io(0)));
            }
        }
        self.open += 1;
        Ok(())
    }

    /// Works until every request has ended.
    ///
    /// # Errors
    /// What became of one of them.
    pub(super) fn settle(&mut self, memory: &mut [u8]) -> Result<(), Failed> {
        while self.open > 0 {
            if !self.work(memory) {
                return Err(self.say(Failure::Io(0)));
            }
        }
        match self.failed.take() {
            Some(failure) => Err(self.say(failure)),
            None => Ok(()),
        }
    }

    /// One request, to its end.
    ///
    /// # Errors
    /// What became of it.
    pub(super) fn run(&mut self, op: Op, extent: Extent, memory: &mut [u8]) -> Result<(), Failed> {
        self.submit(Request { token: 0, op, extent }, memory)?;
        self.settle(memory)
    }

    /// Makes a range read as zero, or (`op` is a discard) drops it.
    ///
    /// # Errors
    /// What became of it.
    pub(super) fn clear(&mut self, op: Op, from: u64, to: u64) -> Result<(), Failed> {
        let mut sector = from;
        while sector < to {
            let sectors = (to - sector).min(ZERO_SECTORS);
            self.run(op, Extent { sector, sectors }, &mut [])?;
            sector += sectors;
        }
        Ok(())
    }

    /// Leaves the image clean and durable.
    ///
    /// # Errors
    /// What failed.
    pub(super) fn close(&mut self) -> Result<(), Failed> {
        self.disk.close(&mut self.pages);
        while self.disk.closed().is_none() {
            if !self.work(&mut []) {
                return Err(self.say(Failure::Io(0)));
            }
        }
        match self.disk.closed() {
            Some(Err(failure)) => Err(self.say(failure)),
            _ => Ok(()),
        }
    }

    /// Whose failure it is: that of the file where something failed, or of the leaf.
    fn say(&self, why: Failure) -> Failed {
        let troubled = self.files.iter().find(|(_, file)| file.trouble().is_some());
        match troubled.or(self.files.first()) {
            Some((image, file)) => failure(image, file, why),
            None => crate::error::Error::new(why.to_string(), "").into(),
        }
    }

    /// Does what is to be done. False where nothing was.
    fn work(&mut self, memory: &mut [u8]) -> bool {
        let mut did = false;
        while let Some(work) = self.disk.next_work() {
            let result = self.carry_out(&work, memory);
            let read = if work.kind == WorkKind::Read && work.payload == Payload::Own {
                self.scratch.as_slice()
            } else {
                &[]
            };
            self.disk.done(&mut self.pages, work.id, result, read);
            did = true;
        }
        while let Some(outcome) = self.disk.next_outcome() {
            self.open = self.open.saturating_sub(1);
            self.failed = self.failed.or(outcome.result.err());
            did = true;
        }
        did
    }

    fn carry_out(&mut self, work: &Work, memory: &mut [u8]) -> Result<(), Failure> {
        let Some((_, file)) = self.files.get_mut(index(work.image.into())) else {
            return Err(Failure::Io(0));
        };
        let (at, length) = (work.offset_bytes, work.length_bytes);
        let place = match work.payload {
            Payload::Guest { token, offset_bytes } => {
                let from = index(token.saturating_add(offset_bytes));
                memory.get_mut(from..from.saturating_add(index(length)))
            }
            _ => None,
        };
        match (work.kind, place) {
            (WorkKind::Read, Some(place)) => file.read(at, place),
            (WorkKind::Read, None) => {
                self.scratch.resize(index(length), 0);
                file.read(at, &mut self.scratch)
            }
            (WorkKind::Write, Some(place)) => file.write(at, place),
            (WorkKind::Write, None) => file.write(at, self.disk.bytes(work.id)),
            (WorkKind::Zero, _) => file.zero(at, length),
            (WorkKind::Punch, _) => {
                file.punch(at, length);
                Ok(())
            }
            (WorkKind::SetLength, _) => file.set_length(at),
            (WorkKind::Sync, _) => file.sync(),
            (WorkKind::ZeroGuest, Some(place)) => {
                place.fill(0);
                Ok(())
            }
            (WorkKind::CopyToGuest, Some(place)) => {
                let bytes = self.disk.bytes(work.id);
                if bytes.len() != place.len() {
                    return Err(Failure::Io(0));
                }
                place.copy_from_slice(bytes);
                Ok(())
            }
            (WorkKind::Yield, _) => Ok(()),
            (WorkKind::ZeroGuest | WorkKind::CopyToGuest, None) => Err(Failure::Io(0)),
        }
    }
}
