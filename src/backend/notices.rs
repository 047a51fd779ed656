//! What goes to the log about a guest, at a bounded rate (XSA-180).

use std::time::Duration;

use super::Backend;
use crate::hypervisor::Hypervisor;
use crate::limits::{NOTICE_INTERVAL, NOTICES_BURST};
use crate::storage::Storage;
use crate::vbd::Address;

/// Bounds how often something happens: a burst, then one each interval.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bucket {
    /// When the bucket will be empty again. Behind the clock: it is empty.
    filled_until: Duration,
}

impl Bucket {
    /// Takes one of what the bucket allows.
    ///
    /// # Errors
    /// When the next may be taken.
    pub(super) fn take(&mut self, now: Duration, burst: u32, interval: Duration) -> Result<(), Duration> {
        let from = self.filled_until.max(now);
        let full = now + interval * burst.saturating_sub(1);
        if from > full {
            return Err(now + (from - full));
        }
        self.filled_until = from + interval;
        Ok(())
    }

    /// Takes `count` more than were asked for: what was taken has turned out to be larger.
    pub(super) fn charge(&mut self, now: Duration, count: u32, interval: Duration) {
        self.filled_until = self.filled_until.max(now) + interval * count;
    }
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    /// Logs a line about a device, unless it had too many of late; those are counted.
    pub(super) fn notice(&mut self, address: Address, level: log::Level, text: &str) {
        let now = self.now;
        let Some(device) = self.devices.get_mut(&address) else { return };
        if device.notices.take(now, NOTICES_BURST, NOTICE_INTERVAL).is_err() {
            device.notices_dropped += 1;
            return;
        }
        let dropped = std::mem::take(&mut device.notices_dropped);
        let text = printable(text);
        if dropped > 0 {
            log::log!(level, "{address}: {text} ({dropped} other lines about this disk were dropped)");
        } else {
            log::log!(level, "{address}: {text}");
        }
    }
}

/// One line of printable characters: texts may carry what a guest wrote.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_a_burst_and_then_its_rate() {
        let mut bucket = Bucket::default();
        let second = Duration::from_secs(1);
        let taken = (0..100).filter(|_| bucket.take(second, 10, second).is_ok()).count();
        assert_eq!(taken, 10);
        assert_eq!(bucket.take(second, 10, second), Err(second * 2));
        assert_eq!(bucket.take(second * 2, 10, second), Ok(()));
        assert!(bucket.take(second * 2, 10, second).is_err());
        let later = second * 1000;
        let taken = (0..100).filter(|_| bucket.take(later, 10, second).is_ok()).count();
        assert_eq!(taken, 10, "no more than a burst was saved up");
    }
}
