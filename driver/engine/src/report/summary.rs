//! The timeline in a few lines for the log.

use super::text;
use super::timeline::{Outcome, Role, Timeline};

/// Three to eight lines, each without a line break or control character.
pub fn lines(timeline: &Timeline) -> Vec<String> {
    let mut lines = vec![headline(timeline), circumstances(timeline)];
    if !timeline.stages.is_empty() {
        let stages: Vec<_> = timeline
            .stages
            .iter()
            .take(12)
            .map(|span| format!("{} {}", span.stage, text::time(span.ms())))
            .collect();
        lines.push(format!("stages: {}", stages.join(", ")));
    }
    lines.push(memory(timeline));
    lines.extend(rounds(timeline));
    lines.extend(downtime(timeline));
    lines.extend(events(timeline));
    lines
}

/// How it ended, in a sentence.
pub(super) fn headline(timeline: &Timeline) -> String {
    let m = &timeline.migration;
    let (from, to) = hosts(timeline);
    let guest = text::printable(&m.guest.name, 64);
    let total = text::time(timeline.total_ms);
    match &timeline.outcome {
        Outcome::Completed => {
            let pause = match timeline.downtime {
                Some(downtime) => format!(", standing still for {}", text::time(downtime.total_ms)),
                None => String::new(),
            };
            format!("{guest} moved from {from} to {to} in {total}{pause}")
        }
        Outcome::Failed { stage, error } => {
            let stage = match stage {
                Some(stage) => format!("in {stage}"),
                None => "before its first stage".to_owned(),
            };
            let error = text::printable(error, 400);
            format!("{guest} did not move from {from} to {to}: failed {stage} after {total}: {error}")
        }
        Outcome::Cancelled => format!("{guest} did not move from {from} to {to}: cancelled after {total}"),
    }
}

/// Names of source and destination host.
pub(super) fn hosts(timeline: &Timeline) -> (String, String) {
    let m = &timeline.migration;
    let local = text::printable(&m.local_host, 64);
    let peer = text::printable(&m.peer_host, 64);
    match m.role {
        Role::Source => (local, peer),
        Role::Destination => (peer, local),
    }
}

/// Who recorded it, when, and how it was carried.
pub(super) fn circumstances(timeline: &Timeline) -> String {
    let m = &timeline.migration;
    let encryption = match &m.encryption {
        Some(suite) => text::printable(suite, 64),
        None => "not encrypted".to_owned(),
    };
    let started = text::printable(&timeline.started, 32);
    let plural = if m.streams == 1 { "" } else { "s" };
    format!(
        "session {}, seen from the {}, started {started}, {} stream{plural}, {encryption}",
        m.session,
        m.role.name(),
        m.streams
    )
}

/// How much memory there was and how much was sent.
pub(super) fn memory(timeline: &Timeline) -> String {
    let (ram, totals) = (&timeline.ram, &timeline.totals);
    let rate = match timeline.total_ms {
        ms if ms > 0.0 => {
            format!(
                ", {}/s overall",
                text::bytes(totals.wire_bytes as f64 / ms * 1000.0)
            )
        }
        _ => String::new(),
    };
    format!(
        "memory: {} guest, {} resident; sent {} data and {} zeros as {} on the wire{rate}",
        text::bytes(ram.bytes as f64),
        text::bytes(ram.resident as f64),
        text::bytes(totals.data_bytes as f64),
        text::bytes(totals.zero_bytes as f64),
        text::bytes(totals.wire_bytes as f64),
    )
}

fn rounds(timeline: &Timeline) -> Option<String> {
    let (first, last) = (timeline.rounds.first()?, timeline.rounds.last()?);
    let deferred = match last.deferred_pages {
        0 => String::new(),
        pages => format!(", {} pages held back as hot", text::count(pages as f64)),
    };
    let number = u64::from(last.number) + 1;
    let (first_pages, last_pages) = (text::count(first.pages as f64), text::count(last.pages as f64));
    let rate = text::count(last.dirty_rate);
    Some(match number {
        1 => format!("rounds: 1, {first_pages} pages{deferred}"),
        _ => format!(
            "rounds: {number}, from {first_pages} to {last_pages} pages; at last the guest wrote {rate} pages/s{deferred}"
        ),
    })
}

fn downtime(timeline: &Timeline) -> Option<String> {
    let d = timeline.downtime?;
    Some(format!(
        "downtime: {} = stop {} + last copy {} ({} pages, {}) + device state {} + resume {}",
        text::time(d.total_ms),
        text::time(d.stop_ms),
        text::time(d.last_copy_ms),
        text::count(d.last_copy_pages as f64),
        text::bytes(d.last_copy_bytes as f64),
        text::time(d.device_state_ms),
        text::time(d.resume_ms),
    ))
}

fn events(timeline: &Timeline) -> Option<String> {
    let last = timeline.events.last()?;
    let more = match timeline.events.len() {
        1 => String::new(),
        n => format!(" (the last of {n})"),
    };
    Some(format!(
        "noted at {}{more}: {}",
        text::time(last.at_ms),
        text::printable(&last.text, 200)
    ))
}

#[cfg(test)]
mod tests {
    use ferry_contract::stage::Stage;

    use super::*;
    use crate::report::timeline::{tests::migration, Downtime, Recorder, Round};

    fn check(timeline: &Timeline) -> Vec<String> {
        let lines = lines(timeline);
        assert!((3..=8).contains(&lines.len()), "{lines:#?}");
        for line in &lines {
            assert!(
                !line.contains(char::is_control) && line.chars().count() < 800,
                "{line:?}"
            );
        }
        lines
    }

    #[test]
    fn a_completed_migration() {
        let mut recorder = Recorder::new(migration("web-01"));
        for stage in Stage::ALL {
            recorder.enter(stage);
        }
        recorder.round(Round {
            pages: 59_221,
            ..Round::default()
        });
        recorder.round(Round {
            number: 1,
            pages: 12,
            dirty_rate: 1000.0,
            ..Round::default()
        });
        recorder.note("stream 2 was cut off, connecting again");
        recorder.downtime(Downtime {
            total_ms: 9.124,
            last_copy_pages: 92,
            ..Downtime::default()
        });
        let mut timeline = recorder.finish(Outcome::Completed);
        timeline.total_ms = 399.412;
        let lines = check(&timeline);
        assert_eq!(
            lines[0],
            "web-01 moved from kvm-a to kvm-b in 399 ms, standing still for 9.1 ms"
        );
        assert!(
            lines
                .iter()
                .any(|line| line.starts_with("rounds: 2, from 59.2 k to 12 pages")),
            "{lines:#?}"
        );
        assert!(lines.last().unwrap().contains("stream 2"));
    }

    #[test]
    fn the_destination_names_the_hosts_in_the_order_of_the_journey() {
        let m = crate::report::Migration {
            role: Role::Destination,
            ..migration("web-01")
        };
        let lines = check(&Recorder::new(m).finish(Outcome::Cancelled));
        assert!(
            lines[0].starts_with("web-01 did not move from kvm-b to kvm-a: cancelled after"),
            "{lines:#?}"
        );
    }

    #[test]
    fn failure_before_any_stage_with_hostile_text() {
        let name = "a\nFeb 30 libvirtd: all is well\u{1b}[2J".repeat(100);
        let lines = check(&Recorder::new(migration(&name)).fail("x\r\ny\u{202e}".repeat(1000)));
        assert!(lines[0].contains("failed before its first stage"), "{lines:#?}");
    }
}
