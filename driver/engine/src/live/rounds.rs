//! When to stop copying: the policy of iterative pre-copy (Clark et al., NSDI 2005).
//!
//! Pre-copy sends memory in rounds while the guest runs; each round sends what was written during the one before.
//! Rounds get shorter until either almost nothing is left, or the guest writes as fast as we send. Then the guest
//! is stopped and the rest moves in one go: that rest, divided by the bandwidth, is the pause the policy decides on.
//!
//! ```text
//!   expected pause                                  what the policy does
//!   ▲
//!   │  beyond the target        ───────────────────  goes on, whatever happens (unless forced)
//!   ├─ downtime target (libvirt's max downtime, 300 ms)
//!   │  local minimum            ───────────────────  stops once `patience` rounds brought no improvement
//!   ├─ aim (a tenth of it)
//!   │  fits the aim             ───────────────────  stops when two rounds brought no improvement
//!   ├─ negligible (a tenth of the aim)
//!   │  nothing worth a round    ───────────────────  stops at once
//! ```
//!
//! # A guest that writes faster than the link
//! QEMU (10.0, `migration_iteration_run`) goes on for ever as long as the pause would exceed `downtime-limit`, and
//! libvirt's users rely on that: a pause longer than agreed breaks the guest's clients, a long migration does not.
//! So does this policy: **it never answers `StopAndCopy` with an expected pause above the downtime target**, unless
//! [`Policy::force`] was called. After [`Limits::max_rounds`] rounds it gives up hoping for a better moment: it takes
//! the first one that meets the target at all. While none does, it says so ([`Decision::Continue`] with `converging:
//! false`), which is the caller's cue to report it, to throttle the guest (auto-converge) or to hold hot pages back
//! ([`WorkingSet`](super::working_set::WorkingSet)), and asks for idle time between rounds: sending the same pages at
//! full speed again and again only takes the link and the host from the guest's neighbours. Somebody ends it in the
//! end: the guest calms down, the administrator raises the target ([`Policy::set_downtime_target`]: `virsh
//! migrate-setmaxdowntime`), forces it, or cancels.
//!
//! The pause meant here is that of the last copy, as in QEMU's own estimate. Stopping the vCPUs, the last scan and the
//! device state come on top; they are the same whenever the guest is stopped, so they cannot help to choose the moment.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

/// How much shorter the expected pause must become to count as an improvement: by a quarter. Less is noise: on a busy
/// host, two rounds of a guest that does the same thing differ by about 10 %.
const IMPROVED: f64 = 0.75;

/// How far above the shortest pause of the latest rounds a moment may lie and still be taken for the local minimum.
const NEAR_BEST: f64 = 1.25;

/// Rounds without improvement that end the search for a shorter pause within the aim: one may be bad luck, and a round
/// this short costs little.
const CONFIRMED: u32 = 2;

/// The aim is this fraction of the downtime target, and a pause of the same fraction of the aim is negligible.
const AIM_FRACTION: f64 = 0.1;

/// The longest idle time asked for between two rounds of a guest that does not converge: short enough to notice
/// within a second that the guest has calmed down.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Rounds that sent less than this say more about latency than about bandwidth.
const SAMPLE_BYTES: u64 = 1 << 20;

/// The weight of the newest round in the measured bandwidth.
const SAMPLE_WEIGHT: f64 = 0.5;

/// What the policy has to respect.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// The longest pause of the guest the administrator accepts: libvirt's max downtime. Never exceeded unless forced.
    pub downtime_target: Duration,
    /// Rounds without improvement after which a moment near the best one is taken, if it meets the target.
    pub patience: u32,
    /// Rounds after which any moment that meets the target is taken.
    pub max_rounds: u32,
    /// Bytes of a page, as counted in [`Observation`].
    pub page_size: u64,
}

impl Default for Limits {
    /// QEMU's and libvirt's 300 ms, 4 KiB pages, and Xen's 30 rounds (`DEF_MAX_ITERS` of its first `xc_domain_save.c`).
    fn default() -> Self {
        Limits {
            downtime_target: Duration::from_millis(300),
            patience: 4,
            max_rounds: 30,
            page_size: 4096,
        }
    }
}

/// What is known right after a scan, before the pages it reported are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Pages written during the round just sent: what the scan reported.
    pub dirty_pages: u64,
    /// Pages the last round would have to send if the guest stopped now: `dirty_pages` and those held back earlier.
    /// A smaller value than `dirty_pages` is taken to be `dirty_pages`.
    pub pending_pages: u64,
    /// Bytes of page data (not of holes or zero pages) the round just sent put on the wire.
    pub sent_bytes: u64,
    /// How long the round took, from the scan that opened it to the scan that closed it.
    pub elapsed: Duration,
    /// Bytes per second the streams can do, where somebody knows better (`virsh migrate-setspeed`). Without it the
    /// policy measures: `sent_bytes` over `elapsed`, smoothed, leaving out rounds too small to tell.
    pub bandwidth: Option<u64>,
}

/// Why the guest is to be stopped now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nothing, or nothing worth another round, is left.
    NothingLeft,
    /// The rest fits the internal aim, and the latest rounds did not make it noticeably smaller.
    FitsAim,
    /// The rest no longer shrinks, this is about as small as it gets, and it meets the downtime target.
    LocalMinimum,
    /// The rounds are used up, and this moment meets the downtime target.
    RoundsUsedUp,
    /// Somebody asked for it: see [`Policy::force`].
    Forced,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Why::NothingLeft => "nothing worth another round is left",
            Why::FitsAim => "the rest is small and no longer shrinks",
            Why::LocalMinimum => "the rest no longer shrinks and meets the downtime target",
            Why::RoundsUsedUp => "the rounds are used up, and the rest meets the downtime target",
            Why::Forced => "forced",
        })
    }
}

/// The policy's answer to an [`Observation`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Send what the scan reported, wait, scan again.
    Continue {
        /// What the guest would suffer if it were stopped now; `Duration::MAX` if no bandwidth is known.
        expected_pause: Duration,
        /// False once [`Limits::patience`] rounds brought no improvement.
        converging: bool,
        /// Idle time before the next scan; zero while there is hope.
        wait: Duration,
    },
    /// Stop the guest and send the rest.
    StopAndCopy {
        /// The reason, for the log.
        why: Why,
        /// What the last copy is expected to take.
        expected_pause: Duration,
        /// True only if forced: the pause will be longer than agreed.
        exceeds_target: bool,
    },
}

/// The memory of one migration's rounds.
#[derive(Clone, Debug)]
pub struct Policy {
    limits: Limits,
    forced: bool,
    rounds: u32,
    /// Bytes per second, measured; `None` before the first round that sent anything.
    measured: Option<f64>,
    /// The pauses (seconds) of the last `patience` rounds.
    recent: VecDeque<f64>,
    /// The pause (seconds) of the round before.
    previous: f64,
    /// The pause to beat (seconds): that of the last noticeable improvement; once patience has run out, the shortest
    /// of `recent`, so that a guest that changes its ways is judged by what it does now.
    milestone: f64,
    /// Rounds since the last noticeable improvement.
    stalled: u32,
    /// The bandwidth the newest decision was based on.
    bandwidth: Option<f64>,
}

impl Policy {
    /// A policy for one migration. A page size of 0 is taken as 1.
    pub fn new(limits: Limits) -> Self {
        Policy {
            limits: Limits {
                page_size: limits.page_size.max(1),
                ..limits
            },
            forced: false,
            rounds: 0,
            measured: None,
            recent: VecDeque::new(),
            previous: f64::INFINITY,
            milestone: f64::INFINITY,
            stalled: 0,
            bandwidth: None,
        }
    }

    /// Changes the downtime target of a migration under way (`virsh migrate-setmaxdowntime`).
    pub fn set_downtime_target(&mut self, target: Duration) {
        self.limits.downtime_target = target;
    }

    /// Makes the next decision `StopAndCopy`, however long the pause (`virsh migrate --timeout … --timeout-suspend`).
    pub fn force(&mut self) {
        self.forced = true;
    }

    /// How many pages may be held back for the last round: what the aim leaves room for at the bandwidth the newest
    /// decision was based on. Zero before the first decision, and while the bandwidth is unknown.
    pub fn deferral_budget(&self) -> u64 {
        let bytes = self.bandwidth.unwrap_or(0.0) * self.target() * AIM_FRACTION;
        bytes as u64 / self.limits.page_size // `as` saturates
    }

    /// Takes in a round and decides.
    pub fn decide(&mut self, seen: &Observation) -> Decision {
        self.rounds = self.rounds.saturating_add(1);
        self.measure(seen);
        let pause = self.pause(seen.dirty_pages.max(seen.pending_pages));
        self.compare(pause);
        match self.reason_to_stop(pause) {
            Some(why) => Decision::StopAndCopy {
                why,
                expected_pause: duration(pause),
                exceeds_target: pause > self.target(),
            },
            None => Decision::Continue {
                expected_pause: duration(pause),
                converging: self.stalled < self.limits.patience,
                wait: self.wait(seen.elapsed),
            },
        }
    }

    /// Is this better than what was there?
    fn compare(&mut self, pause: f64) {
        let patience = self.limits.patience.max(1);
        self.previous = self.recent.back().copied().unwrap_or(f64::INFINITY);
        self.recent.push_back(pause);
        if self.recent.len() > patience as usize {
            self.recent.pop_front();
        }
        if pause <= self.milestone * IMPROVED {
            self.milestone = pause;
            self.stalled = 0;
            return;
        }
        self.stalled = self.stalled.saturating_add(1);
        if self.stalled >= patience {
            self.milestone = self.recent.iter().copied().fold(f64::INFINITY, f64::min);
        }
    }

    fn reason_to_stop(&self, pause: f64) -> Option<Why> {
        let target = self.target();
        let aim = target * AIM_FRACTION;
        if self.forced {
            Some(Why::Forced)
        } else if pause > target {
            None
        } else if pause <= aim * AIM_FRACTION {
            Some(Why::NothingLeft)
        } else if pause <= aim && self.stalled >= CONFIRMED {
            Some(Why::FitsAim)
        } else if self.rounds >= self.limits.max_rounds {
            Some(Why::RoundsUsedUp)
        } else if self.at_local_minimum(pause) {
            Some(Why::LocalMinimum)
        } else {
            None
        }
    }

    /// Patience has run out, and it has been about as good as this for a while. While a burst is ebbing away the next
    /// round is likely to be better still; but a guest that goes up and down all the time is not waited for for ever.
    fn at_local_minimum(&self, pause: f64) -> bool {
        let ebbing = pause <= self.previous * IMPROVED;
        let patience = self.limits.patience;
        self.stalled >= patience
            && pause <= self.milestone * NEAR_BEST
            && (!ebbing || self.stalled >= patience.saturating_mul(2))
    }

    /// As long a rest as the round was work, once the rounds are used up and nothing improves.
    fn wait(&self, elapsed: Duration) -> Duration {
        if self.rounds >= self.limits.max_rounds && self.stalled >= self.limits.patience {
            elapsed.min(LONGEST_WAIT)
        } else {
            Duration::ZERO
        }
    }

    fn measure(&mut self, seen: &Observation) {
        let seconds = seen.elapsed.as_secs_f64();
        if seen.sent_bytes > 0 && seconds > 0.0 {
            let sample = seen.sent_bytes as f64 / seconds;
            self.measured = match self.measured {
                None => Some(sample),
                Some(old) if seen.sent_bytes >= SAMPLE_BYTES => Some(old + (sample - old) * SAMPLE_WEIGHT),
                old => old,
            };
        }
        self.bandwidth = match seen.bandwidth {
            Some(0) | None => self.measured,
            Some(known) => Some(known as f64),
        };
    }

    /// Seconds the last copy of `pages` would take. Nothing takes no time, whatever the bandwidth.
    fn pause(&self, pages: u64) -> f64 {
        match self.bandwidth {
            _ if pages == 0 => 0.0,
            Some(bandwidth) => pages as f64 * self.limits.page_size as f64 / bandwidth,
            None => f64::INFINITY,
        }
    }

    fn target(&self) -> f64 {
        self.limits.downtime_target.as_secs_f64()
    }
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GBIT: u64 = 125_000_000;

    /// A round of a migration over 1 Gbit/s that takes as long as sending takes.
    fn round(dirty_pages: u64, sent_pages: u64) -> Observation {
        let sent_bytes = sent_pages * 4096;
        Observation {
            dirty_pages,
            pending_pages: dirty_pages,
            sent_bytes,
            elapsed: Duration::from_micros(1000 + sent_bytes / (GBIT / 1_000_000)),
            bandwidth: Some(GBIT),
        }
    }

    fn continues(decision: Decision) -> bool {
        matches!(decision, Decision::Continue { .. })
    }

    #[test]
    fn shrinking_rounds_go_on_below_the_aim() {
        let mut policy = Policy::new(Limits::default());
        // 33 ms, 16 ms, 6.6 ms: all but the first within the aim of 30 ms, but each half the one before.
        for (dirty, sent) in [(1000, 100_000), (500, 1000), (200, 500)] {
            assert!(continues(policy.decide(&round(dirty, sent))), "{dirty}");
        }
        assert!(continues(policy.decide(&round(190, 200))));
        let decision = policy.decide(&round(185, 190));
        assert!(matches!(
            decision,
            Decision::StopAndCopy {
                why: Why::FitsAim,
                exceeds_target: false,
                ..
            }
        ));
    }

    #[test]
    fn the_target_can_be_raised_under_way_and_force_overrides_it() {
        let mut policy = Policy::new(Limits::default());
        for _ in 0..200 {
            assert!(continues(policy.decide(&round(100_000, 100_000))));
        }
        let mut raised = policy.clone();
        raised.set_downtime_target(Duration::from_secs(5));
        assert!(matches!(
            raised.decide(&round(100_000, 100_000)),
            Decision::StopAndCopy {
                why: Why::RoundsUsedUp,
                exceeds_target: false,
                ..
            }
        ));
        policy.force();
        let Decision::StopAndCopy {
            why,
            expected_pause,
            exceeds_target,
        } = policy.decide(&round(100_000, 100_000))
        else {
            panic!("not forced")
        };
        assert_eq!((why, exceeds_target), (Why::Forced, true));
        assert_eq!(expected_pause.as_millis(), 3276);
    }

    #[test]
    fn one_that_does_not_converge_is_reported_and_left_idle_time() {
        let mut policy = Policy::new(Limits::default());
        let mut waits = Vec::new();
        let mut reports = Vec::new();
        for _ in 0..40 {
            let Decision::Continue { converging, wait, .. } = policy.decide(&round(100_000, 100_000)) else {
                panic!("stopped beyond the target")
            };
            waits.push(wait);
            reports.push(converging);
        }
        assert_eq!(reports.iter().take_while(|&&converging| converging).count(), 4);
        assert!(reports[4..].iter().all(|converging| !converging));
        assert!(waits[..29].iter().all(Duration::is_zero));
        assert!(waits[29..].iter().all(|&wait| wait == LONGEST_WAIT));
        // It calms down: hope, and no more waiting.
        let Decision::Continue {
            converging: true,
            wait,
            ..
        } = policy.decide(&round(20_000, 100_000))
        else {
            panic!("no hope")
        };
        assert!(wait.is_zero());
    }

    #[test]
    fn a_guest_that_changes_its_ways_is_judged_by_what_it_does_now() {
        let mut policy = Policy::new(Limits::default());
        policy.decide(&round(20_000, 200_000));
        for _ in 0..20 {
            policy.decide(&round(300_000, 300_000));
        }
        // Still worse than the 20 000 pages of old, but much better than of late.
        assert!(matches!(
            policy.decide(&round(150_000, 300_000)),
            Decision::Continue { converging: true, .. }
        ));
    }

    #[test]
    fn bandwidth_is_measured_where_nobody_knows_it() {
        let mut policy = Policy::new(Limits::default());
        assert_eq!(policy.deferral_budget(), 0);
        let unknown = Observation {
            dirty_pages: 1,
            ..Observation::default()
        };
        assert!(matches!(
            policy.decide(&unknown),
            Decision::Continue {
                expected_pause: Duration::MAX,
                ..
            }
        ));
        policy.decide(&Observation {
            bandwidth: None,
            ..round(10_000, 100_000)
        });
        let measured = policy.deferral_budget();
        assert!(
            (900..=916).contains(&measured),
            "30 ms at 1 Gbit/s are 915 pages, not {measured}"
        );
        // A tiny round full of latency does not count.
        policy.decide(&Observation {
            sent_bytes: 4096,
            elapsed: Duration::from_secs(1),
            bandwidth: None,
            ..round(10_000, 1)
        });
        assert_eq!(policy.deferral_budget(), measured);
    }

    prop_compose! {
        fn any_observation()(
            dirty_pages in prop_oneof![0..10u64, 0..1_000_000u64, any::<u64>()],
            pending_pages in prop_oneof![0..10u64, 0..1_000_000u64, any::<u64>()],
            sent_bytes in any::<u64>(),
            micros in prop_oneof![Just(0), 0..10_000_000u64, any::<u64>()],
            bandwidth in proptest::option::of(prop_oneof![Just(0), 1..10_000_000_000u64, any::<u64>()]),
        ) -> Observation {
            Observation {
                dirty_pages,
                pending_pages,
                sent_bytes,
                elapsed: Duration::from_micros(micros),
                bandwidth,
            }
        }
    }

    prop_compose! {
        fn any_limits()(
            target in prop_oneof![0..1_000u64, any::<u64>()],
            patience in 0..10u32,
            max_rounds in 0..50u32,
            page_size in prop_oneof![Just(4096), Just(2 << 20), any::<u64>()],
        ) -> Limits {
            Limits { downtime_target: Duration::from_millis(target), patience, max_rounds, page_size }
        }
    }

    proptest! {
        #[test]
        fn never_stops_beyond_the_target_unforced(
            limits in any_limits(),
            seen in proptest::collection::vec(any_observation(), 1..100),
        ) {
            let mut policy = Policy::new(limits);
            for observation in &seen {
                if let Decision::StopAndCopy { expected_pause, exceeds_target, why } = policy.decide(observation) {
                    prop_assert!(!exceeds_target && why != Why::Forced);
                    prop_assert!(expected_pause <= limits.downtime_target);
                }
            }
        }

        #[test]
        fn stops_when_nothing_is_written_any_more(
            limits in any_limits(),
            seen in proptest::collection::vec(any_observation(), 0..50),
            last in any_observation(),
        ) {
            let mut policy = Policy::new(limits);
            for observation in &seen {
                policy.decide(observation);
            }
            let idle = Observation { dirty_pages: 0, pending_pages: 0, ..last };
            let stopped = matches!(policy.decide(&idle), Decision::StopAndCopy { exceeds_target: false, .. });
            prop_assert!(stopped);
        }

        #[test]
        fn stops_soon_at_any_steady_rest_within_the_target(
            rest in 0..9_000u64, // 295 ms at 1 Gbit/s
            seen in proptest::collection::vec(any_observation(), 0..50),
        ) {
            let limits = Limits::default();
            let mut policy = Policy::new(limits);
            for observation in &seen {
                policy.decide(observation);
            }
            let rounds = (0..).find(|_| !continues(policy.decide(&round(rest, rest))));
            prop_assert!(rounds.is_some_and(|rounds| rounds <= 2 * limits.patience));
        }
    }
}
