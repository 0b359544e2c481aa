//! The timeline as a page for a terminal: what `virt-ferry-engine report` prints.
//!
//! ```text
//!  stage                      0 ms                                  812 ms
//!  pre-copy           701 ms    ██████████████████████████████████▊
//!
//!  round   pages held back       data   zeros      took   guest writes
//!      0  24.6 k         0   96.2 MiB     0 B    610 ms                    ████████████████████
//!      1  2.10 k        12   8.20 MiB     0 B   52.1 ms   3.40 k pages/s   █▋
//!   last      12         0   48.0 KiB     0 B    6.1 ms   stands still     ▏
//!
//!  standing still   19.2 ms
//!    last copy       6.1 ms   ██████
//! ```
//!
//! Figures stand in columns of fixed width, and bars of two tables never mean different things: along the rows of
//! stages and of the pause they are time, along the rounds they are bytes.

use super::summary;
use super::text::{self, bytes, count, time};
use super::timeline::{Downtime, Round, Timeline};

/// Characters of a bar that is as long as it can be.
const BAR: usize = 40;
/// Rounds shown from the beginning and from the end, where there are more than both.
const ROUNDS: usize = 12;
/// Notes shown; the newest.
const NOTES: usize = 8;

/// All lines, without a line break or control character in them.
pub fn lines(timeline: &Timeline) -> Vec<String> {
    let mut lines = vec![
        summary::headline(timeline),
        summary::circumstances(timeline),
        summary::memory(timeline),
    ];
    stages(&mut lines, timeline);
    rounds(&mut lines, timeline);
    if let Some(downtime) = &timeline.downtime {
        pause(&mut lines, downtime);
    }
    notes(&mut lines, timeline);
    lines
}

fn stages(lines: &mut Vec<String>, timeline: &Timeline) {
    if timeline.stages.is_empty() {
        return;
    }
    lines.push(String::new());
    lines.push(format!(
        "{:<15}{:>9}   0 ms{:>width$}",
        "stage",
        "took",
        time(timeline.total_ms),
        width = BAR - 4
    ));
    for span in &timeline.stages {
        let bar = stretch(span.begin_ms, span.end_ms, timeline.total_ms);
        lines.push(format!("{:<15}{:>9}   {bar}", span.stage.name(), time(span.ms())));
    }
}

fn rounds(lines: &mut Vec<String>, timeline: &Timeline) {
    let all = &timeline.rounds;
    if all.is_empty() {
        return;
    }
    lines.push(String::new());
    lines.push(format!(
        "{:<5}{:>9}{:>10}{:>11}{:>11}{:>10}   {}",
        "round", "pages", "held back", "data", "zeros", "took", "guest writes"
    ));
    let last = timeline.downtime.map(|downtime| Round {
        pages: downtime.last_copy_pages,
        data_bytes: downtime.last_copy_bytes,
        send_ms: downtime.last_copy_ms,
        ..Round::default()
    });
    let most = all.iter().chain(&last).map(|round| round.data_bytes).max();
    let most = most.unwrap_or_default() as f64;
    let hidden = all.len().saturating_sub(2 * ROUNDS);
    for (n, round) in all.iter().enumerate() {
        if hidden > 0 && n == ROUNDS {
            lines.push(format!("    … {hidden} more …"));
        }
        if hidden > 0 && (ROUNDS..ROUNDS + hidden).contains(&n) {
            continue;
        }
        let rate = match round.number {
            0 => String::new(),
            _ => format!("{} pages/s", count(round.dirty_rate)),
        };
        lines.push(row(&round.number.to_string(), round, &rate, most));
    }
    if let Some(last) = last {
        lines.push(row("last", &last, "stands still", most));
    }
}

fn row(name: &str, round: &Round, rate: &str, most: f64) -> String {
    let line = format!(
        "{name:>5}{:>9}{:>10}{:>11}{:>11}{:>10}   {rate:<15} {}",
        count(round.pages as f64),
        count(round.deferred_pages as f64),
        bytes(round.data_bytes as f64),
        bytes(round.zero_bytes as f64),
        time(round.ms()),
        stretch(0.0, round.data_bytes as f64, most * BAR as f64 / 24.0),
    );
    line.trim_end().to_owned()
}

fn pause(lines: &mut Vec<String>, downtime: &Downtime) {
    lines.push(String::new());
    lines.push(format!("{:<15}{:>9}", "standing still", time(downtime.total_ms)));
    let mut at = 0.0;
    for (name, ms) in [
        ("stop", downtime.stop_ms),
        ("last copy", downtime.last_copy_ms),
        ("device state", downtime.device_state_ms),
        ("resume", downtime.resume_ms),
    ] {
        let bar = stretch(at, at + ms, downtime.total_ms);
        lines.push(format!("  {name:<13}{:>9}   {bar}", time(ms)));
        at += ms;
    }
}

fn notes(lines: &mut Vec<String>, timeline: &Timeline) {
    if timeline.events.is_empty() && timeline.omitted == 0 {
        return;
    }
    lines.push(String::new());
    if timeline.omitted > 0 {
        lines.push(format!(
            "{} rounds or notes were too many to keep",
            timeline.omitted
        ));
    }
    for event in &timeline.events[timeline.events.len().saturating_sub(NOTES)..] {
        let what = text::printable(&event.text, 200);
        lines.push(format!("at {}: {what}", time(event.at_ms)));
    }
}

/// What lies between `from` and `to` on a line from 0 to `whole`, in eighths of a character; never nothing.
fn stretch(from: f64, to: f64, whole: f64) -> String {
    const EIGHTHS: [char; 8] = ['█', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    // What is not a number becomes 0.
    let place = |value: f64| ((value / whole).clamp(0.0, 1.0) * (BAR * 8) as f64).round() as usize;
    let (from, to) = (place(from), place(to));
    // There is no character that is blank on its left; a bar begins where its first character does.
    let begin = (from / 8).min(BAR - 1);
    let length = to.saturating_sub(begin * 8).max(1);
    let mut bar = " ".repeat(begin);
    bar.extend(std::iter::repeat_n('█', length / 8));
    if length % 8 > 0 {
        bar.push(EIGHTHS[length % 8]);
    }
    bar
}

#[cfg(test)]
mod tests {
    use ferry_contract::stage::Stage;

    use super::*;
    use crate::report::timeline::{tests::migration, Recorder, StageSpan};
    use crate::report::Outcome;

    fn moved(rounds: u32) -> Timeline {
        let mut recorder = Recorder::new(migration("web\u{1b}[2J"));
        for number in 0..rounds {
            recorder.round(Round {
                number,
                pages: 1 << (16 - number.min(16)),
                data_bytes: 4096 << (16 - number.min(16)),
                send_ms: 10.0,
                dirty_rate: 1000.0,
                ..Round::default()
            });
        }
        recorder.downtime(Downtime {
            total_ms: 20.0,
            stop_ms: 5.0,
            last_copy_ms: 5.0,
            device_state_ms: 5.0,
            resume_ms: 5.0,
            last_copy_pages: 7,
            last_copy_bytes: 7 * 4096,
        });
        recorder.note("two\nlines");
        let mut timeline = recorder.finish(Outcome::Completed);
        timeline.total_ms = 100.0;
        timeline.stages = vec![
            StageSpan {
                stage: Stage::PreCopy,
                begin_ms: 0.0,
                end_ms: 75.0,
            },
            StageSpan {
                stage: Stage::Activation,
                begin_ms: 75.0,
                end_ms: 100.0,
            },
        ];
        timeline
    }

    #[test]
    fn a_page_shows_stages_rounds_and_the_pause() {
        let page = lines(&moved(3));
        let line = |start: &str| {
            let found = page.iter().find(|line| line.trim_start().starts_with(start));
            found.unwrap_or_else(|| panic!("no {start} in {page:#?}"))
        };
        assert_eq!(line("pre-copy").matches('█').count(), 30);
        let activation = line("activation");
        assert!(
            activation.ends_with(&format!("{}{}", " ".repeat(30), "█".repeat(10))),
            "{activation}"
        );
        assert!(line("0   65.5 k").contains("256 MiB"), "{page:#?}");
        assert!(line("1   32.8 k").contains("1.00 k pages/s"), "{page:#?}");
        assert!(line("last        7").contains("stands still ") && line("last ").ends_with('▏'));
        assert_eq!(line("stop ").matches('█').count(), 10);
    }

    #[test]
    fn the_middle_of_very_many_rounds_is_left_out() {
        let page = lines(&moved(400));
        assert!(page.len() < 60, "{}", page.len());
        assert!(page.iter().any(|line| line.contains("376 more")), "{page:#?}");
        assert!(page.iter().any(|line| line.starts_with("  399 ")), "{page:#?}");
    }

    #[test]
    fn nonsense_stays_on_its_lines() {
        let mut timeline = moved(4);
        timeline.total_ms = f64::NAN;
        timeline.stages[0].begin_ms = f64::NEG_INFINITY;
        timeline.stages[1].end_ms = f64::MAX;
        timeline.rounds[1].data_bytes = u64::MAX;
        timeline.rounds[2].dirty_rate = f64::NAN;
        timeline.downtime = Some(Downtime {
            total_ms: -1.0,
            stop_ms: f64::INFINITY,
            ..Downtime::default()
        });
        for line in lines(&timeline) {
            assert!(
                !line.contains(char::is_control) && line.chars().count() < 300,
                "{line:?}"
            );
        }
    }

    #[test]
    fn bars_are_never_nothing_and_never_too_long() {
        assert_eq!(stretch(0.0, 0.0, 100.0), "▏");
        assert_eq!(stretch(100.0, 100.0, 100.0).chars().count(), BAR);
        assert_eq!(stretch(0.0, 1e9, 100.0), "█".repeat(BAR));
        assert_eq!(stretch(50.0, 40.0, 100.0).trim_start(), "▏");
        assert_eq!(stretch(0.0, 1.0, 0.0).chars().count(), BAR);
    }
}
