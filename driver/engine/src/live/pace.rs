//! The most bytes a second that all streams together may take: `virsh migrate --bandwidth`, `virsh migrate-setspeed`.
//!
//! Each stream books what it has sent, and waits until the bytes booked before it would have gone at the allowed rate.
//! The rate may change at any moment; whoever waits looks again every [`LOOK`].

use super::signals::Signals;
use super::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The longest a stream sleeps before it looks whether the rate has changed or the migration has ended.
const LOOK: Duration = Duration::from_millis(20);

/// The allowed rate and what has been booked against it.
#[derive(Debug, Default)]
pub struct Pace {
    /// Bytes a second; 0 is no limit.
    limit: AtomicU64,
    /// Nothing is limited any more.
    lifted: AtomicBool,
    /// Bytes booked and not yet paid for by time, as of the instant.
    debt: Mutex<Option<(f64, Instant)>>,
}

impl Pace {
    /// From now on, this many bytes a second; 0 is no limit.
    pub fn set(&self, limit: u64) {
        self.limit.store(limit, Relaxed);
    }

    /// The allowed rate, where there is one.
    pub fn limit(&self) -> Option<u64> {
        match self.limit.load(Relaxed) {
            0 => None,
            _ if self.lifted.load(Relaxed) => None,
            limit => Some(limit),
        }
    }

    /// From now on and for good no limit holds: a guest that stands still is not kept waiting for the sake of the link.
    pub fn lift(&self) {
        self.lifted.store(true, Relaxed);
    }

    /// Books bytes that have been sent, and returns when more may be.
    pub fn spend(&self, bytes: u64, signals: &Signals) -> Result<(), Error> {
        let mut booked = bytes;
        while let Some(wait) = self.book(booked, Instant::now()) {
            booked = 0;
            signals.check()?;
            std::thread::sleep(wait.min(LOOK));
        }
        Ok(())
    }

    /// Books at this instant; how long the debt then lasts at the present rate, `None` where there is none.
    fn book(&self, bytes: u64, now: Instant) -> Option<Duration> {
        let mut debt = self.debt.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(limit) = self.limit() else {
            *debt = None;
            return None;
        };
        let left = match *debt {
            Some((left, since)) => left - now.saturating_duration_since(since).as_secs_f64() * limit as f64,
            None => 0.0,
        };
        let owed = left.max(0.0) + bytes as f64;
        *debt = Some((owed, now));
        let wait = Duration::try_from_secs_f64(owed / limit as f64).unwrap_or(LOOK);
        (!wait.is_zero()).then_some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debts_last_as_long_as_the_bytes_take() {
        let pace = Pace::default();
        let start = Instant::now();
        assert_eq!(pace.book(1 << 30, start), None);
        pace.set(1000);
        assert_eq!(pace.book(500, start), Some(Duration::from_millis(500)));
        // Another stream waits for both.
        assert_eq!(pace.book(500, start), Some(Duration::from_secs(1)));
        let later = start + Duration::from_millis(750);
        assert_eq!(pace.book(0, later), Some(Duration::from_millis(250)));
        // A higher rate pays it off sooner, and idle time is not saved up.
        pace.set(2000);
        assert_eq!(pace.book(0, later), Some(Duration::from_millis(125)));
        let idle = later + Duration::from_secs(60);
        assert_eq!(pace.book(2000, idle), Some(Duration::from_secs(1)));
        pace.set(0);
        assert_eq!(pace.book(2000, idle), None);
    }

    #[test]
    fn an_ended_migration_is_not_waited_for() {
        let pace = Pace::default();
        pace.set(1);
        let signals = Signals::default();
        signals.end(super::super::signals::End::Cancelled);
        assert!(matches!(pace.spend(1 << 40, &signals), Err(Error::Cancelled)));
    }
}
