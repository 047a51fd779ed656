//! Big-endian numbers in byte slices, and casts between sizes, without panics.

/// The bytes `at..at + N`, or zeroes where the slice is shorter.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(found) = at.checked_add(N).and_then(|end| bytes.get(at..end)) {
        out.copy_from_slice(found);
    }
    out
}

/// Big-endian u16 at a byte offset; zero where the slice is shorter.
#[must_use]
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

/// Big-endian u32 at a byte offset; zero where the slice is shorter.
#[must_use]
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

/// Big-endian u64 at a byte offset; zero where the slice is shorter.
#[must_use]
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}

/// Writes bytes at an offset; nothing where they do not fit.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = at.checked_add(value.len()).and_then(|end| bytes.get_mut(at..end)) {
        place.copy_from_slice(value);
    }
}

/// A length in memory; saturates, and what saturates is refused by the slice that it is used on.
#[must_use]
pub fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A length as a file offset.
#[must_use]
pub fn wide(value: usize) -> u64 {
    value as u64
}

/// A number that was bounded before; saturates.
#[must_use]
pub fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
