//! A file or device that answers at once: what tools and opening need. The data path goes through [`crate::Disk`] instead.

use crate::error::Failure;

/// Bytes at offsets. Reads past the end give zeroes; writes past the end extend a file, and fail on a device.
pub trait Medium {
    /// Length in bytes.
    fn length_bytes(&mut self) -> u64;

    /// Fills `bytes` from `offset_bytes` on.
    ///
    /// # Errors
    /// What the system says.
    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure>;

    /// Writes `bytes` at `offset_bytes`.
    ///
    /// # Errors
    /// What the system says.
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure>;

    /// Makes a range read as zero, and gives its space back where the medium can.
    ///
    /// # Errors
    /// What the system says.
    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure>;

    /// Makes the file this long; new bytes read as zero. A device accepts any length that it has.
    ///
    /// # Errors
    /// What the system says.
    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure>;

    /// Makes durable what was done before: `fdatasync`.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&mut self) -> Result<(), Failure>;
}
