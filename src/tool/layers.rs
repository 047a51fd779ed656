//! A chain of images as one disk: where each of its bytes lies, run by run.

use formats::bytes::narrow;
use formats::map::{Cursor, follows};
use formats::qcow2::map::Tree;
use formats::qcow2::snapshots;
use formats::qcow2::{Compression, Header};
use formats::vhd::map::Blocks;
use formats::vhd::{Headers, Kind, read_headers};
use formats::{Extent, Medium, Place, Run, SECTOR_BYTES, Unsupported};

use super::Failed;
use super::file::{ImageFile, Shell};
use super::trouble;
use crate::chains::{self, Link, Wish};
use crate::params::{Format, Image};

/// Shorter data are read without asking the file system for holes in them.
const HOLES_FROM_SECTORS: u64 = (1 << 20) / SECTOR_BYTES;

/// What an image of a chain says about itself.
#[derive(Debug)]
pub(super) enum Facts {
    /// Nothing.
    Raw,
    /// Its header.
    Qcow2(Box<Header>),
    /// Its headers.
    Vhd(Box<Headers>),
}

#[derive(Debug)]
enum Source {
    /// The file itself, as long as it is sparse or not.
    Flat,
    Tree(Tree),
    Blocks(Box<Blocks>),
}

/// One image of a chain.
#[derive(Debug)]
pub(super) struct Layer {
    /// The open image.
    pub(super) link: Link<ImageFile>,
    /// What it says about itself.
    pub(super) facts: Facts,
    /// Size of its disk.
    pub(super) sectors: u64,
    source: Source,
}

/// A part of the disk that lies in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// First sector on the disk.
    pub(super) sector: u64,
    /// How many.
    pub(super) sectors: u64,
    /// Where.
    pub(super) place: Place,
    /// In which image, counted from the leaf. For [`Place::Parent`]: nowhere, down to that one.
    pub(super) depth: usize,
}

impl Piece {
    /// Whether it reads as zero by what metadata say.
    #[must_use]
    pub(super) fn is_zero(&self) -> bool {
        matches!(self.place, Place::Zero | Place::Parent)
    }
}

/// A disk that is read.
#[derive(Debug)]
pub(super) struct Chain {
    /// The images, leaf first.
    pub(super) layers: Vec<Layer>,
    /// Size of the disk.
    pub(super) sectors: u64,
    /// Holes of the files below data of QCOW2 and VHD are looked for, too.
    pub(super) deep: bool,
}

impl Layer {
    fn new(mut link: Link<ImageFile>) -> Result<Layer, Failed> {
        let sectors = link.format.geometry().sectors;
        let (path, medium) = (&link.image, &mut link.medium);
        let (facts, source) = match link.image.format {
            Format::Raw => (Facts::Raw, Source::Flat),
            Format::Qcow2 => {
                let header = Header::read(medium).map_err(|why| trouble(path, medium, &why))?;
                let tree = Tree::active(medium, &header).map_err(|why| trouble(path, medium, &why))?;
                (Facts::Qcow2(Box::new(header)), Source::Tree(tree))
            }
            Format::Vhd => {
                let headers = read_headers(medium).map_err(|why| trouble(path, medium, &why))?;
                let is_fixed = headers.footer.kind() == Kind::Fixed;
                let source =
                    if is_fixed { Source::Flat } else { Source::Blocks(Box::new(Blocks::new(&headers))) };
                (Facts::Vhd(Box::new(headers)), source)
            }
        };
        Ok(Layer { link, facts, sectors, source })
    }

    /// Reads an internal snapshot instead of the disk as it is.
    ///
    /// # Errors
    /// Where there is none of that name, or it is damaged.
    pub(super) fn use_snapshot(&mut self, which: &str) -> Result<(), Failed> {
        let medium = &mut self.link.medium;
        let Facts::Qcow2(header) = &self.facts else {
            return Err(trouble(
                &self.link.image,
                medium,
                &Unsupported::Refused("only QCOW2 has internal snapshots"),
            ));
        };
        let tree = snapshots::list(medium, header).and_then(|list| {
            let found = snapshots::find(&list, which)?;
            let l1 = (found.l1_offset, found.l1_entries);
            Ok((Tree::of(medium, header.shape, l1, found.disk_bytes)?, found.disk_bytes))
        });
        let (tree, disk_bytes) = tree.map_err(|why| trouble(&self.link.image, &self.link.medium, &why))?;
        self.source = Source::Tree(tree);
        self.sectors = disk_bytes / SECTOR_BYTES;
        Ok(())
    }

    fn run(&mut self, extent: Extent, deep: bool) -> Result<Run, Failed> {
        let medium = &mut self.link.medium;
        let run = match &mut self.source {
            Source::Flat => Ok(Run {
                place: Place::Data { offset_bytes: extent.sector * SECTOR_BYTES },
                sectors: extent.sectors,
            }),
            Source::Tree(tree) => tree.run(medium, extent),
            Source::Blocks(blocks) => blocks.run(medium, extent),
        };
        let run = run.map_err(|why| trouble(&self.link.image, medium, &why))?;
        let is_flat = matches!(self.source, Source::Flat);
        match run.place {
            Place::Data { offset_bytes } if is_flat || deep && run.sectors >= HOLES_FROM_SECTORS => {
                Ok(without_hole(medium, offset_bytes, run.sectors))
            }
            _ => Ok(run),
        }
    }

    /// What is needed to unpack its compressed clusters: how they are packed, and their size.
    #[must_use]
    pub(super) fn packing(&self) -> (Compression, u32) {
        match &self.facts {
            Facts::Qcow2(header) => (header.compression, narrow(header.shape.cluster_bytes())),
            _ => (Compression::Zlib, 0),
        }
    }
}

/// The first part of data that is a hole of the file, or none; in whole sectors.
fn without_hole(medium: &ImageFile, offset_bytes: u64, sectors: u64) -> Run {
    let data = Place::Data { offset_bytes };
    let end = offset_bytes + sectors * SECTOR_BYTES;
    match medium.hole(offset_bytes, end) {
        (true, to) if to - offset_bytes >= SECTOR_BYTES => {
            Run { place: Place::Zero, sectors: (to - offset_bytes) / SECTOR_BYTES }
        }
        // A hole that is smaller than a sector belongs to the data behind it.
        (true, _) => Run { place: data, sectors: 1 },
        (false, to) => Run { place: data, sectors: (to - offset_bytes).div_ceil(SECTOR_BYTES).min(sectors) },
    }
}

impl Chain {
    /// Opens an image, with its parents or without, for reading.
    ///
    /// # Errors
    /// The operator's sentence.
    pub(super) fn open(image: &Image, mut shell: Shell, parents: bool) -> Result<Chain, Failed> {
        let links = chains::open(&mut shell, image, Wish { writable: false, parents });
        let links = links.map_err(|error| super::opening(error, image))?;
        Chain::of(links)
    }

    /// A chain whose images are open.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub(super) fn of(links: Vec<Link<ImageFile>>) -> Result<Chain, Failed> {
        let mut layers = links.into_iter().map(Layer::new).collect::<Result<Vec<_>, _>>()?;
        // A disk that is copied does not lose the part of a sector at its end, as a disk that is served does.
        if let Some(Layer { facts: Facts::Raw, link, sectors, .. }) = layers.first_mut() {
            *sectors = link.medium.length_bytes().div_ceil(SECTOR_BYTES);
        }
        let sectors = layers.first().map_or(0, |leaf| leaf.sectors);
        Ok(Chain { layers, sectors, deep: false })
    }

    /// Where the first part of an extent lies.
    ///
    /// # Errors
    /// What is wrong with an image, and what the system says.
    pub(super) fn piece(&mut self, extent: Extent) -> Result<Piece, Failed> {
        self.piece_from(0, extent)
    }

    /// The same, as if the images above `first` were not there.
    ///
    /// # Errors
    /// See [`Chain::piece`].
    pub(super) fn piece_from(&mut self, first: usize, extent: Extent) -> Result<Piece, Failed> {
        let Extent { sector, mut sectors } = extent;
        let nowhere = self.layers.len().saturating_sub(1);
        for (depth, layer) in self.layers.iter_mut().enumerate().skip(first) {
            if sector >= layer.sectors {
                return Ok(Piece { sector, sectors, place: Place::Parent, depth });
            }
            sectors = sectors.min(layer.sectors - sector);
            let run = layer.run(Extent { sector, sectors }, self.deep)?;
            sectors = run.sectors;
            if run.place != Place::Parent {
                return Ok(Piece { sector, sectors, place: run.place, depth });
            }
        }
        Ok(Piece { sector, sectors, place: Place::Parent, depth: nowhere })
    }

    /// Calls `found` for every piece of the disk in turn, as long as possible.
    ///
    /// # Errors
    /// See [`Chain::piece`], and what `found` says.
    pub(super) fn for_each(
        &mut self,
        range: (u64, u64),
        found: &mut dyn FnMut(&Chain, Piece) -> Result<(), Failed>,
    ) -> Result<(), Failed> {
        let (mut at, end) = range;
        let mut known: Option<Piece> = None;
        while at < end {
            let piece = self.piece(Extent { sector: at, sectors: end - at })?;
            match &mut known {
                Some(known)
                    if known.depth == piece.depth && follows(&known.place, known.sectors, &piece.place) =>
                {
                    known.sectors += piece.sectors;
                }
                _ => {
                    if let Some(piece) = known.replace(piece) {
                        found(self, piece)?;
                    }
                }
            }
            at += piece.sectors.max(1);
        }
        match known {
            Some(piece) => found(self, piece),
            None => Ok(()),
        }
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub(super) fn bytes(&self) -> u64 {
        self.sectors * SECTOR_BYTES
    }
}
