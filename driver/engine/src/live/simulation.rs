//! Policy and working set together, against a guest and a link that exist only as arithmetic.
//!
//! The simulated guest counts the writes to each page, the simulated destination remembers which count it got. A
//! migration is right if both agree in the end; that it is also short and quiet is what the tests of the different
//! guests say. Time is simulated too: nothing here sleeps.

use std::time::Duration;

use super::rounds::{Decision, Limits, Observation, Policy, Why};
use super::working_set::{Deferral, WorkingSet};

const PAGE: u64 = 4096;
/// Scanning and draining, each round.
const OVERHEAD: Duration = Duration::from_millis(1);
/// The guest's writes are played in steps of this length.
const STEP: Duration = Duration::from_micros(250);

/// What a guest writes: pages of its memory, from `begin` to `end` (simulated time).
type Writes = Box<dyn FnMut(Duration, Duration, &mut dyn FnMut(usize))>;

/// A guest writing `rate` pages a second, one after the other, over and over, to the first `set` pages, whenever
/// `busy` says so.
fn writer(set: usize, rate: u64, busy: impl Fn(Duration) -> bool + 'static) -> Writes {
    let mut next = 0u64;
    let mut credit = 0f64;
    Box::new(move |begin, end, write| {
        if !busy(begin) {
            return;
        }
        credit += rate as f64 * (end - begin).as_secs_f64();
        while credit >= 1.0 {
            credit -= 1.0;
            write((next % set as u64) as usize);
            next += 1;
        }
    })
}

/// How a simulated migration ended.
#[derive(Debug)]
struct Report {
    rounds: u32,
    /// `None`: the simulation was over before the policy stopped the guest.
    why: Option<Why>,
    /// The real length of the last copy, from what was really left.
    pause: Duration,
    total: Duration,
    sent_pages: u64,
    deferred_at_most: u64,
    not_converging: u32,
}

struct Simulation {
    pages: usize,
    /// Bytes per second.
    link: u64,
    defer: bool,
    limits: Limits,
    /// Simulated time after which the administrator cancels.
    patience: Duration,
}

impl Default for Simulation {
    /// A guest of 256 MiB over 1 Gbit/s.
    fn default() -> Self {
        Simulation {
            pages: 65_536,
            link: 125_000_000,
            defer: true,
            limits: Limits::default(),
            patience: Duration::from_secs(600),
        }
    }
}

impl Simulation {
    fn sending(&self, pages: u64) -> Duration {
        Duration::from_secs_f64((pages * PAGE) as f64 / self.link as f64)
    }

    fn run(&self, mut guest: Writes) -> Report {
        let mut written = vec![1u32; self.pages];
        let mut arrived = written.clone();
        let mut policy = Policy::new(self.limits);
        let mut set = WorkingSet::new(self.pages);
        let mut send = Vec::new();
        let mut now = Duration::ZERO;
        let mut report = Report {
            rounds: 0,
            why: None,
            pause: Duration::ZERO,
            total: Duration::ZERO,
            sent_pages: self.pages as u64,
            deferred_at_most: 0,
            not_converging: 0,
        };
        // The first pass: everything, while the guest writes.
        let mut length = OVERHEAD + self.sending(self.pages as u64);
        let mut sent_pages = self.pages as u64;
        loop {
            let mut dirty = vec![0u64; self.pages.div_ceil(64)];
            let end = now + length;
            while now < end {
                let step = STEP.min(end - now);
                guest(now, now + step, &mut |page| {
                    written[page] += 1;
                    dirty[page / 64] |= 1 << (page % 64);
                });
                now += step;
            }
            set.absorb(&dirty).unwrap();
            report.rounds += 1;
            let decision = policy.decide(&Observation {
                dirty_pages: dirty.iter().map(|word| u64::from(word.count_ones())).sum(),
                pending_pages: set.pending_pages(),
                sent_bytes: sent_pages * PAGE,
                elapsed: length,
                bandwidth: None,
            });
            let wait = match decision {
                Decision::Continue { converging, wait, .. } => {
                    report.not_converging += u32::from(!converging);
                    wait
                }
                Decision::StopAndCopy {
                    why, exceeds_target, ..
                } => {
                    assert!(!exceeds_target);
                    report.why = Some(why);
                    break;
                }
            };
            if now > self.patience {
                break;
            }
            let deferral = match self.defer {
                true => Deferral::choose(std::slice::from_ref(&set), policy.deferral_budget()),
                false => Deferral::Nothing,
            };
            let split = set.take(deferral, &mut send);
            deliver(&send, &written, &mut arrived);
            sent_pages = split.sent;
            report.sent_pages += split.sent;
            report.deferred_at_most = report.deferred_at_most.max(split.deferred);
            length = OVERHEAD + self.sending(split.sent) + wait;
        }
        report.total = now;
        report.pause = self.sending(set.pending_pages());
        deliver(&set.into_last(), &written, &mut arrived);
        assert_eq!(written, arrived, "a page was lost");
        report
    }
}

fn deliver(pages: &[u64], written: &[u32], arrived: &mut [u32]) {
    for page in 0..written.len() {
        if pages[page / 64] >> (page % 64) & 1 == 1 {
            arrived[page] = written[page];
        }
    }
}

fn always(_: Duration) -> bool {
    true
}

#[test]
fn idle_guest() {
    let report = Simulation::default().run(writer(1, 0, always));
    assert_eq!(
        (report.rounds, report.why),
        (1, Some(Why::NothingLeft)),
        "{report:?}"
    );
    assert!(report.pause.is_zero());
}

#[test]
fn steady_small_set() {
    // 2 MiB written all the time: a pause of 17 ms is as short as it gets, and no round sends the set in vain.
    let report = Simulation::default().run(writer(500, 1_000_000, always));
    assert_eq!(report.why, Some(Why::FitsAim), "{report:?}");
    assert!(
        report.rounds <= 4 && report.pause < Duration::from_millis(17),
        "{report:?}"
    );
}

#[test]
fn steady_large_set() {
    // 16 MiB written all the time: 134 ms, beyond the aim but within the target.
    let report = Simulation::default().run(writer(4096, 1_000_000, always));
    assert_eq!(report.why, Some(Why::LocalMinimum), "{report:?}");
    assert!(
        report.rounds <= 6 && report.pause < Duration::from_millis(135),
        "{report:?}"
    );
}

#[test]
fn a_slow_writer_converges_geometrically() {
    // Half the speed of the link, anywhere in memory: each round is half as long as the one before.
    let report = Simulation::default().run(writer(65_536, 15_000, always));
    assert!(report.pause < Duration::from_millis(5), "{report:?}");
    assert!(report.rounds > 5 && report.not_converging == 0, "{report:?}");
}

#[test]
fn bursts_are_waited_out() {
    // Every 200 ms, 80 ms of writing 10 MiB as fast as the link can carry them.
    let busy = |now: Duration| now.as_millis() % 200 < 80;
    let report = Simulation::default().run(writer(2560, 60_000, busy));
    assert!(
        report.pause < Duration::from_millis(30),
        "stopped in a burst: {report:?}"
    );
    assert!(report.total < Duration::from_secs(5), "{report:?}");
}

#[test]
fn a_writer_faster_than_the_link_is_never_stopped_beyond_the_target() {
    let report = Simulation::default().run(writer(50_000, 1_000_000, always));
    assert_eq!(report.why, None, "{report:?}");
    assert!(report.not_converging > 100, "{report:?}");
    assert_eq!(
        report.deferred_at_most, 0,
        "deferring what overruns the aim does not help: {report:?}"
    );
    // Idle time: at most two thirds of what the link could have carried.
    let link = report.total.as_secs_f64() * 125e6 / PAGE as f64;
    assert!((report.sent_pages as f64) < 0.7 * link, "{report:?}");
}

#[test]
fn a_writer_faster_than_the_link_that_calms_down_is_let_go() {
    let busy = |now: Duration| now < Duration::from_secs(300);
    let report = Simulation::default().run(writer(50_000, 1_000_000, busy));
    assert_eq!(report.why, Some(Why::NothingLeft), "{report:?}");
    assert!(report.total < Duration::from_secs(306), "{report:?}");
}

#[test]
fn holding_back_hot_pages_saves_traffic_and_costs_no_downtime() {
    // A hot set of 2.4 MiB beside a slow writer all over memory that needs many rounds.
    let guest = || {
        let (mut hot, mut cold) = (writer(600, 1_000_000, always), writer(65_536, 24_000, always));
        Box::new(move |begin, end, write: &mut dyn FnMut(usize)| {
            hot(begin, end, write);
            cold(begin, end, write);
        })
    };
    let with = Simulation::default().run(guest());
    let without = Simulation {
        defer: false,
        ..Simulation::default()
    }
    .run(guest());
    assert!(with.deferred_at_most >= 500, "{with:?}");
    assert!(with.sent_pages < without.sent_pages, "{with:?} {without:?}");
    assert!(with.total <= without.total, "{with:?} {without:?}");
    assert!(
        with.pause <= without.pause + Duration::from_millis(1),
        "{with:?} {without:?}"
    );
}
