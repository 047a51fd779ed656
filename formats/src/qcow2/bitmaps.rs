//! Persistent bitmaps, as far as operators ask for them.

use alloc::string::String;
use alloc::vec::Vec;

use crate::bytes::{be16, be32, index};
use crate::error::Unsupported;
use crate::medium::Medium;
use crate::qcow2::header::{Header, bitmap_entries};

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes of the disk that one bit is about.
    pub granularity_bytes: u64,
    /// It was in use and not saved: not to be trusted.
    pub in_use: bool,
    /// It records while the disk is in use.
    pub auto: bool,
}

/// Reads the directory of bitmaps.
///
/// # Errors
/// What is wrong with it, or what the medium says.
pub fn bitmaps(medium: &mut dyn Medium, header: &Header) -> Result<Vec<Bitmap>, Unsupported> {
    let Some(known) = header.bitmaps else { return Ok(Vec::new()) };
    let mut directory = alloc::vec![0; index(known.directory_bytes)];
    medium.read(known.directory_offset, &mut directory)?;
    let entries = bitmap_entries(&directory, known.count, known.directory_offset)?;
    let bitmap = |(at, length): (usize, usize)| {
        let name_at = at + 24 + be32(&directory, at + 20) as usize;
        let name =
            directory.get(name_at..(name_at + usize::from(be16(&directory, at + 18))).min(at + length));
        let flags = be32(&directory, at + 12);
        let bits = u32::from(directory.get(at + 17).copied().unwrap_or(0)).min(63);
        Bitmap {
            name: String::from_utf8_lossy(name.unwrap_or_default()).into_owned(),
            granularity_bytes: 1 << bits,
            in_use: flags & 1 != 0,
            auto: flags & 2 != 0,
        }
    };
    Ok(entries.into_iter().map(bitmap).collect())
}
