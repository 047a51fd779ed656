//! Memory for data in flight: page-aligned, bounded, never handed out twice.
//!
//! The arena is made of chunks that are mapped when first needed and stay mapped for the life of the process, so that a
//! [`Span`] can be given to the kernel without a lifetime: at worst a mistake mixes up data, it never touches foreign
//! memory. Pages of spans that are free may be given back to the system.

/// A piece of the arena: where, and how long. Made only by [`Pool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    address: *mut u8,
    length_bytes: u32,
}

impl Span {
    /// The span without bytes.
    pub const EMPTY: Span = Span { address: std::ptr::null_mut(), length_bytes: 0 };

    /// First byte.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> u32 {
        self.length_bytes
    }

    /// The part of this span from `from`, `length` bytes long, or `None` where it would reach past the end.
    #[must_use]
    pub fn part(&self, from: u32, length: u32) -> Option<Span> {
        if from.checked_add(length)? > self.length_bytes {
            return None;
        }
        Some(Span { address: self.address.wrapping_add(from as usize), length_bytes: length })
    }
}

/// The arena and what of it is free.
#[derive(Debug)]
pub struct Pool {}
