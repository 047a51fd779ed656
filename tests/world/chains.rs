//! Images with formats in the simulated world: what opening reads and repairs is there at once, and durable.

use std::rc::Rc;

use formats::{Failure, Medium};
use vbdd::chains::{self, Found, Library, Wish};
use vbdd::params::Image;
use vbdd::storage::{Access, FileId, Identity, Layer, OpenError};

use super::Shared;
use super::storage::SECTOR;

/// Files by the paths under which the world knows its images.
pub struct Shelf(pub Rc<Shared>);

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
}

/// Opens an image with a format: its layers, leaf first. `open` gives an image a handle.
pub fn open(
    shared: &Rc<Shared>,
    image: &Image,
    access: Access,
    mut open: impl FnMut(usize) -> FileId,
) -> Result<Vec<Layer>, OpenError> {
    let wish = Wish { writable: access != Access::ReadOnly, parents: true };
    let links = chains::open(&mut Shelf(shared.clone()), image, wish)?;
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
        Ok(())
    }
}
