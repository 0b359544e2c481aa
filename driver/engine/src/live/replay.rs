//! The policy against traces: what it decides, round by round, for observations that are given.
//!
//! A trace is a text file in `traces/`. Empty lines and what follows a `#` are ignored. First settings (`name value`),
//! then a line for each round: what an [`Observation`] holds.
//!
//! ```text
//! page_size 4096
//! downtime_target_ms 300
//! expect stop 3 fits-aim      # or: expect go-on
//! # dirty  pending  sent bytes  elapsed µs  bandwidth bytes/s (0: to be measured)
//!   30000  30000    268435456   2150000     0
//! ```
//!
//! A timeline (`report`) holds the same figures, so a migration that went wrong can become a test.

use std::time::Duration;

use super::rounds::{Decision, Limits, Observation, Policy, Why};

/// What a trace's author expects.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The policy stops the guest after this many rounds.
    Stop(usize, String),
    /// It never does.
    GoOn,
}

struct Trace {
    limits: Limits,
    expect: Verdict,
    rounds: Vec<Observation>,
}

fn parse(text: &str) -> Trace {
    let mut trace = Trace {
        limits: Limits::default(),
        expect: Verdict::GoOn,
        rounds: Vec::new(),
    };
    for line in text.lines() {
        let words: Vec<_> = line.split('#').next().unwrap().split_whitespace().collect();
        let number = |i: usize| -> u64 {
            words[i]
                .parse()
                .unwrap_or_else(|_| panic!("not a number: {line}"))
        };
        match words.as_slice() {
            [] => {}
            ["page_size", _] => trace.limits.page_size = number(1),
            ["downtime_target_ms", _] => trace.limits.downtime_target = Duration::from_millis(number(1)),
            ["expect", "go-on"] => trace.expect = Verdict::GoOn,
            ["expect", "stop", _, why] => trace.expect = Verdict::Stop(number(2) as usize, (*why).to_owned()),
            [_, _, _, _, _] => trace.rounds.push(Observation {
                dirty_pages: number(0),
                pending_pages: number(1),
                sent_bytes: number(2),
                elapsed: Duration::from_micros(number(3)),
                bandwidth: Some(number(4)),
            }),
            _ => panic!("not understood: {line}"),
        }
    }
    trace
}

fn replay(trace: &Trace) -> Verdict {
    let mut policy = Policy::new(trace.limits);
    for (round, observation) in trace.rounds.iter().enumerate() {
        if let Decision::StopAndCopy {
            why, exceeds_target, ..
        } = policy.decide(observation)
        {
            assert!(!exceeds_target);
            return Verdict::Stop(round + 1, name(why).to_owned());
        }
    }
    Verdict::GoOn
}

fn name(why: Why) -> &'static str {
    match why {
        Why::NothingLeft => "nothing-left",
        Why::FitsAim => "fits-aim",
        Why::LocalMinimum => "local-minimum",
        Why::RoundsUsedUp => "rounds-used-up",
        Why::Forced => "forced",
    }
}

macro_rules! traces {
    ($($test:ident: $file:literal,)*) => {$(
        #[test]
        fn $test() {
            let trace = parse(include_str!(concat!("traces/", $file)));
            assert!(!trace.rounds.is_empty());
            assert_eq!(replay(&trace), trace.expect);
        }
    )*};
}

traces! {
    idle_guest: "idle.trace",
    web_server: "web-server.trace",
    database_checkpoint: "database-checkpoint.trace",
    sort_job: "sort-job.trace",
    faster_than_the_link: "faster-than-the-link.trace",
    small_guest_under_load: "small-guest-under-load.trace",
}
