//! The memory under test: pages, and what each of them must hold.
//!
//! ```text
//!   stripe 0   [ lock | sum ]  expected: [ 64 sequence numbers ]   pages: [ 64 pages ]
//!   stripe 1   …
//! ```
//!
//! A stripe's lock is held for one page at a time, by the writer as by the checker, so the checker never sees half a write and a
//! page that is not as expected is damaged: there are no false alarms. Sequence numbers, their sums and the pages lie in guest
//! memory alike, but in different pages of it: each vouches for the others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use ferry_guest::config::Rate;
use ferry_guest::page::{Damage, Page};

use crate::load::Pace;
use crate::report::Report;

/// Pages under one lock.
const STRIPE: u64 = 64;

struct Stripe {
    pages: Box<[Page]>,
    expected: Box<[u64]>,
    /// Sum of `expected`, kept by the writer beside it.
    sum: u64,
}

/// Pages and what they must hold.
pub struct Area {
    name: &'static str,
    stripes: Box<[Mutex<Stripe>]>,
    pages: u64,
    sequence: AtomicU64,
    report: Arc<Report>,
}

impl Area {
    /// Allocates `pages` and stamps each of them.
    pub fn fill(name: &'static str, pages: u64, report: Arc<Report>) -> Self {
        let stripes = (0..pages.div_ceil(STRIPE))
            .map(|stripe| {
                let places = stripe * STRIPE..pages.min((stripe + 1) * STRIPE);
                let expected: Box<[u64]> = places.clone().map(|place| place + 1).collect();
                Mutex::new(Stripe {
                    pages: places.map(|place| Page::stamped(place, place + 1)).collect(),
                    sum: expected.iter().sum(),
                    expected,
                })
            })
            .collect();
        Area {
            name,
            stripes,
            pages,
            sequence: AtomicU64::new(pages),
            report,
        }
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Number of the last write.
    pub fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    fn stripe(&self, place: u64) -> MutexGuard<'_, Stripe> {
        // A thread that panicked ends the guest, so there is nobody to be protected from a poisoned lock.
        self.stripes[(place / STRIPE) as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes page `place` anew, after a look at what it held: a write must not cover up that an earlier one was lost.
    pub fn write(&self, place: u64) {
        let mut stripe = self.stripe(place);
        let index = (place % STRIPE) as usize;
        self.judge(&stripe, place);
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let before = std::mem::replace(&mut stripe.expected[index], sequence);
        stripe.sum = stripe.sum.wrapping_sub(before).wrapping_add(sequence);
        stripe.pages[index].stamp(place, sequence);
    }

    /// Compares one page with what it must hold.
    fn judge(&self, stripe: &Stripe, place: u64) {
        let index = (place % STRIPE) as usize;
        let expected = stripe.expected[index];
        if let Err(damage) = stripe.pages[index].verify(place, expected) {
            self.report.error(self.name, place, expected, damage);
        }
    }

    fn check(&self, place: u64) {
        let stripe = self.stripe(place);
        self.judge(&stripe, place);
        if place.is_multiple_of(STRIPE) {
            let sum = stripe
                .expected
                .iter()
                .fold(0u64, |sum, sequence| sum.wrapping_add(*sequence));
            if sum != stripe.sum {
                self.report.error(self.name, place, stripe.sum, Damage::Ledger);
            }
        }
    }

    /// One complete pass, now.
    pub fn check_all(&self) {
        (0..self.pages).for_each(|place| self.check(place));
    }

    /// Passes without end, at `rate` pages a second; none at all at rate 0.
    pub fn check_for_ever(&self, rate: Rate) {
        if rate == Rate(0) || self.pages == 0 {
            return;
        }
        let mut pace = Pace::new();
        let mut place = 0;
        loop {
            for _ in 0..pace.due(rate) {
                self.check(place);
                place += 1;
                if place == self.pages {
                    place = 0;
                    self.report.passes.fetch_add(1, Ordering::Relaxed);
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 130 pages: two whole stripes and one of two pages.
    fn area() -> (Area, Arc<Report>) {
        let report = Arc::new(Report::default());
        (Area::fill("test", 2 * STRIPE + 2, Arc::clone(&report)), report)
    }

    fn errors(report: &Report) -> u64 {
        report.errors.load(Ordering::Relaxed)
    }

    #[test]
    fn what_is_written_is_right() {
        let (area, report) = area();
        (0..area.pages())
            .chain([0, 5, 129])
            .for_each(|place| area.write(place));
        area.check_all();
        assert_eq!((errors(&report), area.sequence()), (0, 2 * 130 + 3));
    }

    #[test]
    fn a_write_does_not_cover_up_a_lost_one() {
        let (area, report) = area();
        let old = area.stripe(129).pages[1].clone();
        area.write(129);
        area.stripe(129).pages[1] = old;
        area.write(129);
        assert_eq!(errors(&report), 1);
        area.check_all();
        assert_eq!(errors(&report), 1, "the page itself is right again");
    }

    #[test]
    fn a_page_that_went_back_together_with_its_expectation_is_seen() {
        let (area, report) = area();
        let old = area.stripe(70).pages[6].clone();
        let expected = area.stripe(70).expected[6];
        area.write(70);
        area.stripe(70).pages[6] = old;
        area.stripe(70).expected[6] = expected;
        area.check_all();
        assert_eq!(errors(&report), 1);
    }
}
