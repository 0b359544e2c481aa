//! The record of a guest that moved while it was shut off, as a picture.
//!
//! ```text
//!  guest   source → destination                         [completed]   heading
//!  total   data   sent   …                                            tiles
//!  what it was at  ▌                                         12 ms    lanes over one time axis
//!                   ▐███████████████████████▌                312 ms
//!  a file          ███████████████   20.0 GiB   digest                the files, by length
//! ```

use super::canvas::{Canvas, Font};
use super::scale::Scale;
use super::{
    heading, row_of_tiles, sane_ms, title, Heading, BAD, GOOD, GRID, INK, MARGIN, MUTED, PLOT_LEFT,
    PLOT_RIGHT, PRE_COPY, WIDTH,
};
use crate::cold::record::{FileRecord, Record};
use crate::report::{text, Outcome};
use ferry_contract::cold::journal::Fate;

const LANE: f64 = 27.0;
const BAR: f64 = 17.0;
/// Bars are at least this wide.
const NARROWEST: f64 = 2.5;
/// Lanes and files shown; those of a guest's can be many.
const LANES: usize = 16;
const FILES: usize = 24;

/// Draws a record as a stand-alone SVG document.
pub fn render(record: &Record) -> String {
    let mut canvas = Canvas::new(WIDTH);
    let encryption = record.encryption.as_deref().unwrap_or("not encrypted");
    let y = heading(
        &mut canvas,
        &Heading {
            guest: &record.guest.name,
            hosts: record.hosts(),
            outcome: &record.outcome,
            line: format!(
                "shut off  ·  seen from the {}  ·  {}  ·  {}",
                record.role.name(),
                text::printable(&record.started, 32),
                text::printable(encryption, 64)
            ),
        },
    );
    let y = tiles(&mut canvas, record, y);
    let y = lanes(&mut canvas, record, y + 30.0);
    let y = files(&mut canvas, &record.files, y + 34.0);
    let small = Font::new(11.0).fill(MUTED);
    let names = format!(
        "session {}  ·  guest {}  ·  virt-ferry",
        record.session, record.guest.uuid
    );
    canvas.text(MARGIN, y + 34.0, &small.fit(&names, WIDTH - 2.0 * MARGIN), small);
    canvas.finish(y + 50.0, &record.lines())
}

fn tiles(canvas: &mut Canvas, record: &Record, y: f64) -> f64 {
    let moved = record
        .files
        .iter()
        .filter(|file| file.fate == Fate::Moves)
        .count();
    let seconds = sane_ms(record.total_ms) / 1000.0;
    let throughput = match seconds {
        s if s > 0.0 => text::bytes(record.sent_bytes as f64 / s) + "/s",
        _ => "–".to_owned(),
    };
    let sizes: f64 = record.files.iter().map(|file| file.size as f64).sum();
    let tiles = [
        ("total", text::time(sane_ms(record.total_ms)), INK),
        ("data sent", text::bytes(record.sent_bytes as f64), PRE_COPY),
        ("on the wire", text::bytes(record.wire_bytes as f64), INK),
        (
            "files, length / data",
            format!(
                "{} / {}",
                text::bytes(sizes),
                text::bytes(record.data_bytes as f64)
            ),
            INK,
        ),
        ("moved", format!("{moved} of {}", record.files.len()), INK),
        ("throughput", throughput, INK),
    ];
    row_of_tiles(canvas, &tiles, y)
}

fn lanes(canvas: &mut Canvas, record: &Record, y: f64) -> f64 {
    title(canvas, y, "Stages", "", WIDTH - MARGIN);
    let spans = &record.spans[..record.spans.len().min(LANES)];
    let ends = spans.iter().map(|span| sane_ms(span.end_ms));
    let time = Scale::linear(
        ends.fold(sane_ms(record.total_ms).max(1.0), f64::max),
        PLOT_LEFT,
        PLOT_RIGHT,
    );
    let top = y + 16.0;
    let floor = top + LANE * spans.len() as f64 + 4.0;
    for (value, label) in time.time_ticks() {
        let x = time.at(value);
        canvas.line((x, top), (x, floor), GRID, 1.0);
        canvas.text(x, floor + 16.0, &label, Font::new(11.0).fill(MUTED).middle());
    }
    canvas.line((PLOT_LEFT, floor), (PLOT_RIGHT, floor), MUTED, 1.0);
    for (n, span) in spans.iter().enumerate() {
        let lane = top + LANE * n as f64 + (LANE - BAR) / 2.0 + 2.0;
        let name = Font::new(13.0).end();
        let what = name.fit(&text::printable(&span.what, 40), PLOT_LEFT - 14.0 - MARGIN);
        canvas.text(PLOT_LEFT - 14.0, lane + BAR - 4.0, &what, name);
        let (begin, end) = (time.at(sane_ms(span.begin_ms)), time.at(sane_ms(span.end_ms)));
        let width = (end - begin).max(NARROWEST);
        canvas.rect((begin.min(PLOT_RIGHT - width), lane), (width, BAR), PRE_COPY);
        let took = text::time(sane_ms(span.end_ms - span.begin_ms));
        canvas.text(
            PLOT_RIGHT + 12.0,
            lane + BAR - 4.0,
            &took,
            Font::new(12.0).fill(MUTED),
        );
    }
    if !matches!(record.outcome, Outcome::Completed) {
        let x = time.at(sane_ms(record.total_ms));
        canvas.dashed((x, top - 4.0), (x, floor), BAD);
    }
    floor + 24.0
}

fn files(canvas: &mut Canvas, files: &[FileRecord], mut y: f64) -> f64 {
    let remark = match files.len() {
        n if n > FILES => format!("the first {FILES} of {n}; bars: their lengths"),
        _ => "bars: their lengths".to_owned(),
    };
    title(canvas, y, "Files", &remark, WIDTH - MARGIN);
    let longest = files.iter().map(|file| file.size).max().unwrap_or(0).max(1) as f64;
    const BARS: f64 = 260.0;
    for file in files.iter().take(FILES) {
        y += 24.0;
        let (word, colour) = match file.fate {
            Fate::Moves => ("moves", GOOD),
            Fate::Shared => ("shared by both hosts", MUTED),
            Fate::Present => ("was there already", MUTED),
        };
        let width = (BARS * file.size as f64 / longest).max(NARROWEST);
        canvas.rect((MARGIN, y - 11.0), (width, 13.0), colour);
        let font = Font::new(12.0);
        let x = MARGIN + BARS + 14.0;
        canvas.text(
            x + 70.0,
            y,
            &text::bytes(file.size as f64),
            font.fill(MUTED).end(),
        );
        let path = text::printable(&file.source.to_string_lossy(), 200);
        canvas.text(x + 84.0, y, &font.fit(&path, 440.0), font.fill(INK));
        let digest = file.digest.map(|digest| digest.to_string());
        let proof = match digest {
            Some(digest) => format!("{word}, BLAKE3 {}…", digest.chars().take(16).collect::<String>()),
            None => format!("{word}, not compared"),
        };
        let small = Font::new(11.0).fill(MUTED);
        canvas.text(
            x + 540.0,
            y,
            &small.fit(&proof, WIDTH - MARGIN - x - 540.0),
            small,
        );
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cold::record::{Span, VERSION};
    use crate::report::{Guest, Role};
    use uuid::Uuid;

    fn record() -> Record {
        let file = |source: &str, size, fate| FileRecord {
            source: source.into(),
            path: source.into(),
            size,
            fate,
            digest: None,
            kept: None,
        };
        Record {
            version: VERSION,
            cold: true,
            session: Uuid::from_u128(1),
            role: Role::Source,
            guest: Guest {
                name: "we<b".into(),
                uuid: Uuid::from_u128(2),
            },
            local_host: "kvm-a".into(),
            peer_host: "kvm-b".into(),
            encryption: None,
            started: "2026-11-26T00:00:00Z".into(),
            total_ms: 100.0,
            outcome: Outcome::Completed,
            spans: vec![Span {
                what: "copy".into(),
                begin_ms: 10.0,
                end_ms: 90.0,
            }],
            files: vec![
                file("/a&b.qcow2", 20 << 30, Fate::Moves),
                file("/shared.raw", 1, Fate::Shared),
            ],
            data_bytes: 1 << 30,
            sent_bytes: 1 << 29,
            wire_bytes: 1 << 29,
        }
    }

    #[test]
    fn it_shows_stages_and_files_and_escapes_names() {
        let picture = render(&record());
        for part in [
            "<svg ",
            "we&lt;b",
            "kvm-a → kvm-b",
            "copy",
            "80.0 ms",
            "/a&amp;b.qcow2",
            "20.0 GiB",
            "1 of 2",
            "</svg>",
        ] {
            assert!(picture.contains(part), "no {part} in {picture}");
        }
        assert!(!picture.contains("we<b") && !picture.contains("a&b"));
    }

    #[test]
    fn nonsense_stays_in_the_picture() {
        let mut record = record();
        record.total_ms = f64::NAN;
        record.spans[0].begin_ms = f64::MAX;
        record.spans[0].end_ms = f64::NEG_INFINITY;
        let many = vec![record.files[0].clone(); 1000];
        record.files = many;
        record.files[0].size = u64::MAX;
        record.outcome = Outcome::Failed {
            stage: None,
            error: "x".repeat(10_000),
        };
        let picture = render(&record);
        assert!(!picture.contains("NaN") && !picture.contains("inf"), "{picture}");
        assert!(picture.len() < 64 << 10, "{}", picture.len());
    }
}
