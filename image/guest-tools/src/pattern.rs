//! Bytes that both sides can make from a number, so that contents can be checked without a copy of them.

use std::io::Write;

/// A stream of pseudo-random bytes named by a seed (splitmix64: each output is a mix of seed + n · an odd constant).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern(u64);

impl Pattern {
    /// The stream of `seed`.
    pub(crate) fn new(seed: u64) -> Pattern {
        Pattern(seed)
    }

    /// The next eight bytes as a number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fills `bytes` (a multiple of eight long, or its rest stays as it was).
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

/// Writes `length_bytes` of the stream of `seed` to the standard output.
///
/// # Errors
/// When the output is closed or full.
pub(crate) fn print(seed: u64, length_bytes: u64) -> Result<(), String> {
    let mut pattern = Pattern::new(seed);
    let mut block = [0u8; 4096];
    let mut left = length_bytes;
    let mut out = std::io::stdout().lock();
    while left > 0 {
        pattern.fill(&mut block);
        let now = usize::try_from(left.min(4096)).map_err(|e| e.to_string())?;
        out.write_all(&block[..now]).map_err(|e| format!("writing the pattern: {e}"))?;
        left -= now as u64;
    }
    out.flush().map_err(|e| format!("writing the pattern: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_depends_on_the_seed_alone() {
        let (mut a, mut b, mut c) = ([0u8; 4096], [0u8; 4096], [0u8; 4096]);
        Pattern::new(7).fill(&mut a);
        Pattern::new(7).fill(&mut b);
        Pattern::new(8).fill(&mut c);
        assert_eq!(a, b);
        assert_ne!(a, c);
        // The first output of splitmix64 from seed 0, as its author publishes it.
        assert_eq!(Pattern::new(0).next(), 0xe220_a839_7b1d_cdaf);
    }
}
