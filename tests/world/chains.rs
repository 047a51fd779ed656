//! Images with formats in the simulated world: what opening reads and repairs is there at once, and durable.

use std::rc::Rc;

use formats::qcow2::check::{Fix, check};
use formats::{Disk, Extent, Failure, Limits, Medium, Op, Pages, Payload, Request, WorkKind};
use vbdd::chains::{self, Found, Library, Wish};
use vbdd::keep::Left;
use vbdd::params::{Format, Image};
use vbdd::storage::{Access, FileId, Identity, Layer, OpenError};

use super::Shared;
use super::storage::SECTOR;

/// Files by the paths under which the world knows its images.
pub struct Shelf(pub Rc<Shared>, pub Left);

/// One image's bytes.
#[derive(Clone)]
pub struct Bytes {
    shared: Rc<Shared>,
    pub image: usize,
}

impl Bytes {
    pub fn new(shared: Rc<Shared>, image: usize) -> Bytes {
        Bytes { shared, image }
    }
}

impl Library for Shelf {
    type File = Bytes;

    fn open(&mut self, path: &str, writable: bool) -> Result<Found<Bytes>, OpenError> {
        let found = self.0.media.borrow().find(path);
        match found {
            Some((_, true)) if writable => {
                Err(OpenError { path: path.into(), reason: "is read-only".into() })
            }
            Some((image, _)) => Ok(Found {
                medium: Bytes::new(self.0.clone(), image),
                identity: Identity::File { device: 1, inode: image as u64 },
                grows: true,
            }),
            None => Err(OpenError { path: path.into(), reason: "does not exist".into() }),
        }
    }

    fn left(&mut self, found: &Found<Bytes>) -> Vec<(u64, Vec<u8>)> {
        self.1.of(found.identity).pages
    }
}

/// Opens an image with a format: its layers, leaf first. `open` gives an image a handle.
pub fn open(
    shared: &Rc<Shared>,
    image: &Image,
    access: Access,
    left: Left,
    mut open: impl FnMut(usize) -> FileId,
) -> Result<Vec<Layer>, OpenError> {
    let wish = Wish { writable: access != Access::ReadOnly, parents: true };
    let links = chains::open(&mut Shelf(shared.clone(), left), image, wish)?;
    let layer = |link: chains::Link<Bytes>| Layer {
        file: open(link.medium.image),
        identity: link.identity,
        format: link.format,
    };
    Ok(links.into_iter().map(layer).collect())
}

impl Medium for Bytes {
    fn length_bytes(&mut self) -> u64 {
        (self.shared.media.borrow().sectors(self.image) * SECTOR) as u64
    }

    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        let media = self.shared.media.borrow();
        let all = media.bytes(self.image);
        let from = usize::try_from(offset_bytes).unwrap_or(usize::MAX).min(all.len());
        let length = bytes.len().min(all.len() - from);
        bytes.fill(0);
        bytes[..length].copy_from_slice(&all[from..from + length]);
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        let end = offset_bytes + bytes.len() as u64;
        if end > self.length_bytes() {
            self.set_length(end)?;
        }
        self.shared.media.borrow_mut().overwrite(self.image, offset_bytes as usize, bytes);
        Ok(())
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        self.write(offset_bytes, &vec![0; length_bytes as usize])
    }

    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        let sectors = (length_bytes as usize).div_ceil(SECTOR);
        self.shared.media.borrow_mut().resize(self.image, sectors);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        self.shared.media.borrow_mut().sync(self.image);
        Ok(())
    }
}

/// An image of a format over a raw one that has the model's first content (a VHD has copied it).
pub fn create(shared: &Rc<Shared>, path: &str, sectors: usize, format: Format) -> usize {
    shared.media.borrow_mut().create(&format!("{path}.base"), sectors, true);
    let image = shared.media.borrow_mut().create(path, 1, false);
    let mut medium = Bytes::new(shared.clone(), image);
    let size_bytes = (sectors * SECTOR) as u64;
    if format == Format::Qcow2 {
        let mut what = formats::qcow2::create::Create::new(size_bytes);
        what.shape.cluster_bits = [9, 10, 12][shared.index(3)];
        what.backing = Some((format!("{path}.base"), "raw".into()));
        formats::qcow2::create::create(&mut medium, &what).unwrap();
    } else {
        let uuid = [image as u8 + 1; 16];
        let what = formats::vhd::create::Create::snapshot_of_raw(size_bytes, format!("{path}.base"), uuid, 0);
        formats::vhd::create::create(&mut medium, &what).unwrap();
    }
    shared.media.borrow_mut().formats.insert(image, format);
    image
}

/// What somebody reads who opens an image now; of one with a format also whether it is sound.
pub fn contents(shared: &Rc<Shared>, image: usize) -> Result<Vec<[u8; SECTOR]>, String> {
    let named = shared.media.borrow().image(image);
    if named.format == Format::Raw {
        return Ok(shared.media.borrow().bytes(image).as_chunks().0.to_vec());
    }
    if named.format == Format::Qcow2 {
        let report =
            check(&mut Bytes::new(shared.clone(), image), Fix::Nothing).map_err(|why| why.to_string())?;
        if report.corruptions > 0 {
            return Err(format!("{}: {report:?}", named.path));
        }
    }
    let wish = Wish { writable: false, parents: true };
    let links = chains::open(&mut Shelf(shared.clone(), Left::default()), &named, wish)
        .map_err(|error| error.to_string())?;
    let (mut files, mut layers) = (Vec::new(), Vec::new());
    for (number, link) in (0..).zip(links) {
        files.push(link.medium);
        layers.push((number, link.format));
    }
    let (mut disk, mut pages) = (Disk::new(1, layers, true, Limits::default()), Pages::of_pages(64));
    let sectors = disk.geometry().sectors;
    let mut memory = vec![0; sectors as usize * SECTOR];
    let extent = Extent { sector: 0, sectors };
    disk.submit(&mut pages, Request { token: 0, op: Op::Read, extent });
    while let Some(work) = disk.next_work() {
        let mut bytes = vec![0; work.length_bytes as usize];
        if work.kind == WorkKind::Read {
            files[work.image as usize].read(work.offset_bytes, &mut bytes).unwrap();
        }
        if let Payload::Guest { offset_bytes, .. } = work.payload {
            memory[offset_bytes as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        disk.done(&mut pages, work.id, Ok(()), &bytes);
    }
    match disk.next_outcome().map(|outcome| outcome.result) {
        Some(Ok(())) => Ok(memory.as_chunks().0.to_vec()),
        other => Err(format!("{} cannot be read: {other:?}", named.path)),
    }
}
