//! A device or file opened past the page cache, and memory aligned for it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;

/// Alignment and unit of all transfers, in bytes.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// A buffer that O_DIRECT takes: a multiple of [`BLOCK_BYTES`] long and aligned to it.
#[derive(Debug)]
pub(crate) struct Buffer {
    store: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// `length_bytes` of zeroes, rounded up to whole blocks.
    pub(crate) fn new(length_bytes: usize) -> Buffer {
        let length = length_bytes.next_multiple_of(BLOCK_BYTES);
        let store = vec![0u8; length + BLOCK_BYTES];
        let start = store.as_ptr().align_offset(BLOCK_BYTES);
        Buffer { store, start, length }
    }

    /// Its bytes.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.store[self.start..self.start + self.length]
    }
}

/// Opens `path` with O_DIRECT, without it where the file system has none (tmpfs before Linux 6.6). Returns its size too.
///
/// # Errors
/// When it cannot be opened or its size not be found.
pub(crate) fn open(path: &str, write: bool) -> Result<(File, u64), String> {
    use std::io::{Seek, SeekFrom};
    let open = |flags| OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    let mut file = open(libc::O_DIRECT).or_else(|_| open(0)).map_err(|e| format!("{path}: {e}"))?;
    let size = file.seek(SeekFrom::End(0)).map_err(|e| format!("{path}: {e}"))?;
    Ok((file, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_long_enough() {
        for length in [1, 4096, 4097, 131_072] {
            let mut buffer = Buffer::new(length);
            assert_eq!(buffer.bytes().as_ptr().align_offset(BLOCK_BYTES), 0);
            assert!(buffer.bytes().len() >= length);
        }
    }
}
