//! Random waiting times, so that two parties whose transactions clash do not clash again in step.

use super::limits::{BACKOFF_FIRST_MS, BACKOFF_MS_MAX};

/// SplitMix64: small, and good enough to spread waiting times.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Milliseconds to wait after the `attempts`-th attempt failed: at least 1, at most the window of that attempt.
    pub(super) fn delay_ms(&mut self, attempts: u32) -> u64 {
        let window = BACKOFF_FIRST_MS
            .checked_shl(attempts.saturating_sub(1))
            .filter(|shifted| shifted >> attempts.saturating_sub(1).min(63) == BACKOFF_FIRST_MS)
            .map_or(BACKOFF_MS_MAX, |window| window.min(BACKOFF_MS_MAX));
        1 + self.next() % window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_cap_and_are_never_zero() {
        let mut rng = Rng::new(1);
        for attempts in 1..200 {
            let exponent = attempts.min(20) - 1;
            let window = (BACKOFF_FIRST_MS << exponent).min(BACKOFF_MS_MAX);
            let delays: alloc::vec::Vec<u64> = (0..200).map(|_| rng.delay_ms(attempts)).collect();
            assert!(delays.iter().all(|d| (1..=window).contains(d)), "attempt {attempts}");
            assert!(delays.iter().max() > delays.iter().min(), "attempt {attempts} has no jitter");
        }
    }
}
