//! Byte layouts of the ring's entries.
//!
//! ```text
//! shared header   0 req_prod  4 req_event  8 rsp_prod  12 rsp_event  16..63 unused   64 first entry
//!
//!                     x86_64, arm (stride 112)             x86_32 (stride 108)
//! read/write/flush    op 0, nseg 1, handle 2, id 8,        op 0, nseg 1, handle 2, id 4,
//!                     sector 16, seg[11] at 24             sector 12, seg[11] at 20
//! discard             op 0, flag 1, id 8, sector 16,       op 0, flag 1, id 4, sector 12,
//!                     count 24                             count 20
//! indirect            op 0, inner 1, nseg 2 (u16), id 8,   op 0, inner 1, nseg 2 (u16), id 4,
//!                     sector 16, handle 24, gref[8] at 28  sector 12, handle 20, gref[8] at 24
//! segment (8 bytes)   gref 0 (u32), first 4, last 5, two bytes of padding
//! response            id 0, op 8, status 10; 16 bytes      id 0, op 8, status 10; 12 bytes
//! ```

/// A page of the ring, in bytes: 4096 whatever the guest's own page size.
pub const RING_PAGE_BYTES: usize = 4096;

/// Where the entries start, behind the indices.
pub(crate) const ENTRIES_AT: usize = 64;

/// The largest entry of any ABI, in bytes.
pub const LARGEST_STRIDE: usize = 112;

/// The dialect that a frontend writes in its `protocol` node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Abi {
    /// `x86_64-abi`
    X86_64,
    /// `x86_32-abi`
    X86_32,
    /// `arm-abi`: the same bytes as x86_64.
    Arm,
}

/// Offsets within an entry, in bytes.
pub(crate) struct Layout {
    pub(crate) stride: usize,
    pub(crate) id: usize,
    pub(crate) sector: usize,
    pub(crate) segments: usize,
    pub(crate) discard_count: usize,
    pub(crate) indirect_grants: usize,
    pub(crate) response_bytes: usize,
}

const LAYOUT_64: Layout = Layout {
    stride: 112,
    id: 8,
    sector: 16,
    segments: 24,
    discard_count: 24,
    indirect_grants: 28,
    response_bytes: 16,
};

const LAYOUT_32: Layout = Layout {
    stride: 108,
    id: 4,
    sector: 12,
    segments: 20,
    discard_count: 20,
    indirect_grants: 24,
    response_bytes: 12,
};

impl Abi {
    /// The ABI of a `protocol` node's text, or `None` for a text that names none.
    #[must_use]
    pub fn from_protocol(text: &str) -> Option<Abi> {
        match text {
            "x86_64-abi" => Some(Abi::X86_64),
            "x86_32-abi" => Some(Abi::X86_32),
            "arm-abi" => Some(Abi::Arm),
            _ => None,
        }
    }

    /// The text of the `protocol` node.
    #[must_use]
    pub fn protocol(self) -> &'static str {
        match self {
            Abi::X86_64 => "x86_64-abi",
            Abi::X86_32 => "x86_32-abi",
            Abi::Arm => "arm-abi",
        }
    }

    pub(crate) fn layout(self) -> &'static Layout {
        match self {
            Abi::X86_64 | Abi::Arm => &LAYOUT_64,
            Abi::X86_32 => &LAYOUT_32,
        }
    }

    /// How many entries a ring of `pages` pages has: the largest power of two that fits behind the header.
    #[must_use]
    pub fn entries(self, pages: usize) -> u32 {
        let room = pages.saturating_mul(RING_PAGE_BYTES).saturating_sub(ENTRIES_AT);
        match u32::try_from(room / self.layout().stride) {
            Ok(0) | Err(_) => 0,
            Ok(fit) => 1 << (31 - fit.leading_zeros()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_sizes_are_those_of_the_header_in_every_abi() {
        for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
            let sizes = [1, 2, 4, 8, 16].map(|pages| abi.entries(pages));
            assert_eq!(sizes, [32, 64, 128, 256, 512], "{abi:?}");
            assert_eq!(abi.entries(0), 0);
        }
    }

    #[test]
    fn protocol_texts_are_read_back() {
        for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
            assert_eq!(Abi::from_protocol(abi.protocol()), Some(abi));
        }
        for junk in ["", "x86_64", "x86_64-abi ", "X86_64-ABI", "powerpc64-abi"] {
            assert_eq!(Abi::from_protocol(junk), None, "{junk:?}");
        }
    }
}
