//! The writer: how much it changes, how fast and in what order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ferry_guest::config::{Order, Rate};

use crate::area::Area;

/// A stall longer than this is not made up for: the load stays a rate and never becomes a burst.
const LONGEST_ARREARS: Duration = Duration::from_millis(50);
/// Pages between two looks at the clock and at the commands when there is no limit.
const UNLIMITED_BATCH: u64 = 256;

/// Turns a rate into how much is due since the last time.
pub struct Pace {
    last: Instant,
    /// What was due but no whole page, in nanoseconds times pages a second.
    remainder: u128,
}

impl Pace {
    const SECOND: u128 = 1_000_000_000;

    pub fn new() -> Self {
        Pace {
            last: Instant::now(),
            remainder: 0,
        }
    }

    /// How many are due now at `rate`.
    pub fn due(&mut self, rate: Rate) -> u64 {
        let now = Instant::now();
        let passed = now.duration_since(self.last).min(LONGEST_ARREARS);
        self.last = now;
        if rate == Rate::MAX {
            return UNLIMITED_BATCH;
        }
        let earned = self.remainder + passed.as_nanos() * u128::from(rate.0);
        self.remainder = earned % Self::SECOND;
        u64::try_from(earned / Self::SECOND).unwrap_or(u64::MAX)
    }
}

/// A pseudo-random sequence (xorshift64*), the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(stream: u64) -> Self {
        Random(0x2545_f491_4f6c_dd1d ^ stream << 32)
    }

    /// The next number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        // The upper bits are the better ones.
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

/// The load as it is now; commands change it while it runs.
pub struct Load {
    set: AtomicU64,
    rate: AtomicU64,
    order: Order,
}

impl Load {
    pub fn new(set: u64, rate: Rate, order: Order) -> Self {
        Load {
            set: AtomicU64::new(set),
            rate: AtomicU64::new(rate.0),
            order,
        }
    }

    /// Pages in the working set.
    pub fn set(&self) -> u64 {
        self.set.load(Ordering::Relaxed)
    }

    pub fn change_set(&self, pages: u64) {
        self.set.store(pages, Ordering::Relaxed);
    }

    pub fn change_rate(&self, rate: Rate) {
        self.rate.store(rate.0, Ordering::Relaxed);
    }

    /// Writes without end.
    pub fn write(&self, area: &Area) {
        let mut pace = Pace::new();
        let mut place = 0;
        let mut random = Random::new(0);
        loop {
            let rate = Rate(self.rate.load(Ordering::Relaxed));
            let set = self.set().min(area.pages());
            let due = if set == 0 { 0 } else { pace.due(rate) };
            for _ in 0..due {
                place = match self.order {
                    Order::Cyclic => (place + 1) % set,
                    Order::Random => random.below(set),
                };
                area.write(place);
            }
            match rate {
                Rate::MAX => thread::yield_now(),
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}
