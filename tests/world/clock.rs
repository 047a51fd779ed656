//! Virtual time: moves only when the world says so.

use std::cell::Cell;
use std::time::Duration;

/// The world's clock, in microseconds since the world began.
#[derive(Debug, Default)]
pub struct Clock {
    now_us: Cell<u64>,
}

impl Clock {
    pub fn now_us(&self) -> u64 {
        self.now_us.get()
    }

    pub fn now(&self) -> Duration {
        Duration::from_micros(self.now_us.get())
    }

    /// Never goes back.
    pub fn advance_to(&self, at_us: u64) {
        self.now_us.set(self.now_us.get().max(at_us));
    }
}
