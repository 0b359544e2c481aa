//! The timeline as a picture one would rather look at than read.
//!
//! ```text
//!  guest   source → destination                         [completed]   header
//!  total   downtime   data sent   memory   rounds   throughput
//!  pre-migration  ▌                                          12 ms    stages.rs: lanes over one time axis
//!  pre-copy        ▐███████████████████████▌                312 ms
//!  stop-and-copy                            ▌                9.1 ms
//!  guest          on the source            ╱▌╲ there
//!                                    ╱         ╲
//!  downtime       ███▓▓▓▓▓▓▓▓▓▓▓▓▓▒▒▒▒▒▒▒▒▒▒▒▒░░░░                    downtime.rs: the pause, enlarged
//!  bytes          █ ▆ ▄ ▂ ▁                                           rounds.rs: one slot a round
//!  dirty rate     ╲__.__.__
//!  notes, sums                                                        footer
//! ```
//!
//! Nothing is measured by a renderer and nothing is loaded: text widths are estimated on the safe side (canvas.rs),
//! each label has a place of its own, and all text is escaped. Every number in a timeline may be nonsense; it is
//! brought into the picture's range first.

mod canvas;
mod cold;
mod downtime;
mod rounds;
mod scale;
mod stages;

use canvas::{Canvas, Font};

pub use cold::render as render_cold;

use super::summary;
use super::text;
use super::timeline::{Outcome, Role, Timeline};

/// The picture's width and margins, in pixels; its height follows from what there is to show.
const WIDTH: f64 = 1200.0;
const MARGIN: f64 = 40.0;
/// Where the plots begin (names stand to the left) and end (figures stand to the right).
const PLOT_LEFT: f64 = 160.0;
const PLOT_RIGHT: f64 = 1070.0;

/// Colours, on white.
const INK: &str = "#1f2933";
const MUTED: &str = "#66727f";
const GRID: &str = "#e3e8ed";
const GOOD: &str = "#2f8f5b";
const BAD: &str = "#c53030";
const OTHER: &str = "#8a6d00";
const PRE_COPY: &str = "#3b7fc4";
const STOPPED: &str = "#de6428";

/// Notes listed under the picture.
const NOTES: usize = 6;

/// Draws a timeline as a stand-alone SVG document.
pub fn render(timeline: &Timeline) -> String {
    let mut canvas = Canvas::new(WIDTH);
    let mut y = header(&mut canvas, timeline);
    y = tiles(&mut canvas, timeline, y);
    let panel = stages::draw(&mut canvas, timeline, y + 30.0);
    y = downtime::draw(&mut canvas, timeline, &panel);
    if timeline.migration.role == Role::Source || !timeline.rounds.is_empty() {
        y = rounds::draw(&mut canvas, timeline, y + 34.0);
    }
    y = footer(&mut canvas, timeline, y + 34.0);
    canvas.finish(y + 10.0, &summary::lines(timeline))
}

/// A finite number between 0 and `most`; what is not a number counts as 0.
fn sane(value: f64, most: f64) -> f64 {
    value.max(0.0).min(most)
}

/// The longest time shown, in milliseconds (about 30 years).
const LONGEST: f64 = 1e12;

fn sane_ms(ms: f64) -> f64 {
    sane(ms, LONGEST)
}

/// What every picture begins with.
struct Heading<'a> {
    guest: &'a str,
    hosts: (String, String),
    outcome: &'a Outcome,
    /// Circumstances, in one line.
    line: String,
}

fn heading(canvas: &mut Canvas, heading: &Heading<'_>) -> f64 {
    let right = WIDTH - MARGIN;
    let (word, colour) = match heading.outcome {
        Outcome::Completed => ("completed", GOOD),
        Outcome::Failed { .. } => ("failed", BAD),
        Outcome::Cancelled => ("cancelled", OTHER),
    };
    const BADGE: f64 = 110.0;
    canvas.rounded(right - BADGE, 32.0, BADGE, 28.0, colour);
    canvas.text(
        right - BADGE / 2.0,
        51.0,
        word,
        Font::new(14.0).bold().fill("#ffffff").middle(),
    );

    let font = Font::new(24.0).bold();
    let room = right - BADGE - 24.0 - MARGIN;
    canvas.text(
        MARGIN,
        55.0,
        &font.fit(&text::printable(heading.guest, 64), room),
        font,
    );
    let font = Font::new(17.0).fill(MUTED);
    let (room, arrow) = (right - MARGIN, " → ");
    let half = (room - font.width(arrow)) / 2.0;
    let (from, to) = &heading.hosts;
    let hosts = format!("{}{arrow}{}", font.fit(from, half), font.fit(to, half));
    canvas.text(MARGIN, 82.0, &hosts, font);
    let small = Font::new(13.0).fill(MUTED);
    canvas.text(MARGIN, 107.0, &small.fit(&heading.line, room), small);

    let mut y = 110.0;
    if let Outcome::Failed { stage, error } = heading.outcome {
        let place = match stage {
            Some(stage) => format!("Failed in {stage}: "),
            None => "Failed: ".to_owned(),
        };
        let font = Font::new(14.0).fill(BAD);
        for line in font.wrap(&(place + &text::printable(error, 400)), room, 3) {
            y += 22.0;
            canvas.text(MARGIN, y, &line, font);
        }
    }
    y
}

fn header(canvas: &mut Canvas, timeline: &Timeline) -> f64 {
    let m = &timeline.migration;
    let encryption = match &m.encryption {
        Some(suite) => text::printable(suite, 64),
        None => "not encrypted".to_owned(),
    };
    let started = text::printable(&timeline.started, 32);
    let streams = match m.streams {
        1 => "1 stream".to_owned(),
        n => format!("{n} streams"),
    };
    let heading_of = Heading {
        guest: &m.guest.name,
        hosts: summary::hosts(timeline),
        outcome: &timeline.outcome,
        line: format!(
            "seen from the {}  ·  {started}  ·  {streams}  ·  {encryption}",
            m.role.name()
        ),
    };
    heading(canvas, &heading_of)
}

/// The figures everybody asks for first.
fn tiles(canvas: &mut Canvas, timeline: &Timeline, y: f64) -> f64 {
    let totals = &timeline.totals;
    let seconds = sane_ms(timeline.total_ms) / 1000.0;
    let downtime = timeline
        .downtime
        .map(|downtime| text::time(sane_ms(downtime.total_ms)));
    // Rounds are the source's; the destination sees bytes come.
    let rounds = match (timeline.migration.role, timeline.rounds.last()) {
        (_, Some(last)) => (u64::from(last.number) + 1).to_string(),
        (Role::Source, None) => "0".to_owned(),
        (Role::Destination, None) => "–".to_owned(),
    };
    let throughput = match seconds {
        s if s > 0.0 => text::bytes(totals.wire_bytes as f64 / s) + "/s",
        _ => "–".to_owned(),
    };
    let tiles = [
        ("total", text::time(sane_ms(timeline.total_ms)), INK),
        ("downtime", downtime.unwrap_or_else(|| "–".to_owned()), STOPPED),
        ("data moved", text::bytes(totals.data_bytes as f64), INK),
        (
            "guest memory, resident",
            format!(
                "{} / {}",
                text::bytes(timeline.ram.bytes as f64),
                text::bytes(timeline.ram.resident as f64)
            ),
            INK,
        ),
        ("rounds", rounds, INK),
        ("throughput", throughput, INK),
    ];
    row_of_tiles(canvas, &tiles, y)
}

/// Six figures, each with a label above it.
fn row_of_tiles(canvas: &mut Canvas, tiles: &[(&str, String, &str); 6], y: f64) -> f64 {
    const WIDTHS: [f64; 6] = [165.0, 165.0, 165.0, 265.0, 165.0, 195.0];
    let mut x = MARGIN;
    for ((label, value, colour), width) in tiles.iter().zip(WIDTHS) {
        canvas.text(x, y + 34.0, label, Font::new(12.0).fill(MUTED));
        let font = Font::new(20.0).bold().fill(colour);
        canvas.text(x, y + 60.0, &font.fit(value, width - 12.0), font);
        x += width;
    }
    canvas.line((MARGIN, y + 78.0), (WIDTH - MARGIN, y + 78.0), GRID, 1.0);
    y + 78.0
}

/// A panel's title, and a remark that ends before `end`.
fn title(canvas: &mut Canvas, y: f64, title: &str, remark: &str, end: f64) {
    let font = Font::new(15.0).bold();
    canvas.text(MARGIN, y, title, font);
    let small = Font::new(12.0).fill(MUTED);
    let x = MARGIN + font.width(title) + 14.0;
    canvas.text(x, y, &small.fit(remark, end - x), small);
}

fn footer(canvas: &mut Canvas, timeline: &Timeline, mut y: f64) -> f64 {
    let room = WIDTH - 2.0 * MARGIN;
    let font = Font::new(12.0).fill(INK);
    if !timeline.events.is_empty() {
        let remark = match timeline.events.len() {
            n if n > NOTES => format!("the newest {NOTES} of {n}"),
            _ => String::new(),
        };
        title(canvas, y, "Notes", &remark, WIDTH - MARGIN);
        y += 24.0;
        for event in &timeline.events[timeline.events.len().saturating_sub(NOTES)..] {
            let at = Font::new(12.0).fill(MUTED).end();
            canvas.text(MARGIN + 90.0, y, &text::time(sane_ms(event.at_ms)), at);
            canvas.text(
                MARGIN + 102.0,
                y,
                &font.fit(&text::printable(&event.text, 200), room - 102.0),
                font,
            );
            y += 18.0;
        }
        y += 8.0;
    }
    let (m, totals) = (&timeline.migration, &timeline.totals);
    let small = Font::new(11.0).fill(MUTED);
    canvas.line((MARGIN, y - 10.0), (WIDTH - MARGIN, y - 10.0), GRID, 1.0);
    let sums = format!(
        "{} frames, {} on the wire: {} data, {} zeros (not sent)  ·  {}",
        text::count(totals.frames as f64),
        text::bytes(totals.wire_bytes as f64),
        text::bytes(totals.data_bytes as f64),
        text::bytes(totals.zero_bytes as f64),
        match &totals.digest {
            Some(digest) => format!("digest {}", text::printable(digest, 64)),
            None => "no digest compared".to_owned(),
        }
    );
    let names = format!("session {}  ·  guest {}  ·  virt-ferry", m.session, m.guest.uuid);
    for line in [sums, names] {
        y += 10.0;
        canvas.text(MARGIN, y, &small.fit(&line, room), small);
        y += 8.0;
    }
    y
}

#[cfg(test)]
mod tests;
