//! What the guest has seen, and the lines that say so.

use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ferry_guest::line::{Status, PREFIX};
use ferry_guest::page::Damage;

use crate::{clock, Guest};

/// So many errors are told one by one; the rest is only counted, so that a ruined memory does not drown the console.
const TOLD: u64 = 16;

/// Counters that the guest's threads share.
#[derive(Default)]
pub struct Report {
    pub errors: AtomicU64,
    pub passes: AtomicU64,
    pub beats: AtomicU64,
    pub blocks: AtomicU64,
    /// Longest gap since the last status line, ns.
    pub stall: AtomicU64,
    /// Longest gap since the start or `reset`, ns.
    pub worst: AtomicU64,
    /// Real time lost since the start, µs.
    pub lost: AtomicU64,
    /// `lost` at the last `reset`, µs.
    pub lost_before: AtomicU64,
}

impl Report {
    /// Counts damage, and tells the first few at once.
    pub fn error(&self, area: &str, page: u64, expected: u64, damage: Damage) {
        if self.errors.fetch_add(1, Ordering::Relaxed) < TOLD {
            say(format_args!(
                "error area={area} page={page} expected={expected} {damage}"
            ));
        }
    }

    /// Begins the measurement of stalls and lost time anew; errors stay.
    pub fn reset(&self) {
        self.worst.store(0, Ordering::Relaxed);
        self.lost_before
            .store(self.lost.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// Says one line on the console, whole: lines of several threads do not mix.
pub fn say(words: fmt::Arguments<'_>) {
    // A guest without a console is still pinged and asked over UDP.
    let _ = std::io::stdout().write_all(format!("{PREFIX}{words}\n").as_bytes());
}

/// The guest's state now; `rate` is what the caller counted.
pub fn status(guest: &Guest, rate: u64, stall: u64) -> Status {
    let report = &guest.report;
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let lost = read(&report.lost).saturating_sub(read(&report.lost_before));
    Status {
        t: clock::monotonic().as_secs_f64(),
        seq: guest.area.sequence(),
        pages: guest.area.pages(),
        set: guest.load.set(),
        checked: read(&report.passes),
        errors: read(&report.errors),
        stall_ms: stall as f64 / 1e6,
        worst_ms: read(&report.worst) as f64 / 1e6,
        lost_ms: lost as f64 / 1e3,
        rate,
        disk: read(&report.blocks),
        beats: read(&report.beats),
    }
}

/// Says the guest's state once a second, for ever.
pub fn every_second(guest: &Guest) -> ! {
    let mut due = clock::monotonic();
    let mut before = (guest.area.sequence(), due);
    loop {
        let now = clock::monotonic();
        let sequence = guest.area.sequence();
        let seconds = (now - before.1).as_secs_f64().max(1e-3);
        let rate = (sequence - before.0) as f64 / seconds;
        let stall = guest.report.stall.swap(0, Ordering::Relaxed);
        before = (sequence, now);
        // The status line has its own prefix.
        let line = status(guest, rate.round() as u64, stall).to_string();
        say(format_args!("{}", line.trim_start_matches(PREFIX)));
        due = (due + Duration::from_secs(1)).max(now);
        clock::sleep_until(due);
    }
}
