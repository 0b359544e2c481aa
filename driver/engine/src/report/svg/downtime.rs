//! The guest's pause, enlarged: what it was made of.

use ferry_contract::stage::Stage;

use super::canvas::{Canvas, Font};
use super::scale::Scale;
use super::stages::Panel;
use super::{sane_ms, title, GRID, MARGIN, MUTED, PLOT_LEFT, PLOT_RIGHT, STOPPED, WIDTH};
use crate::report::text;
use crate::report::timeline::{Downtime, Timeline};

/// The space between the panel above and the bar, which the zoom lines cross.
const GAP: f64 = 46.0;
const BAR: f64 = 26.0;

struct Part {
    name: &'static str,
    detail: String,
    ms: f64,
    colour: &'static str,
}

fn parts(downtime: &Downtime) -> Vec<Part> {
    let last_copy = format!(
        "{} pages, {}",
        text::count(downtime.last_copy_pages as f64),
        text::bytes(downtime.last_copy_bytes as f64)
    );
    let mut parts = vec![
        Part {
            name: "stop",
            detail: "until block I/O has drained".into(),
            ms: downtime.stop_ms,
            colour: "#f2b38f",
        },
        Part {
            name: "last copy",
            detail: last_copy,
            ms: downtime.last_copy_ms,
            colour: STOPPED,
        },
        Part {
            name: "device state",
            detail: "beyond the last copy".into(),
            ms: downtime.device_state_ms,
            colour: "#d9a520",
        },
        Part {
            name: "resume",
            detail: "until the guest runs".into(),
            ms: downtime.resume_ms,
            colour: "#3f9c6d",
        },
    ];
    for part in &mut parts {
        part.ms = sane_ms(part.ms);
    }
    let rest = sane_ms(downtime.total_ms) - parts.iter().map(|part| part.ms).sum::<f64>();
    // Below that it is rounding.
    if rest > 0.01 * sane_ms(downtime.total_ms) {
        parts.push(Part {
            name: "other",
            detail: "not seen from here".into(),
            ms: rest,
            colour: "#c3ccd5",
        });
    }
    parts
}

/// Draws the panel below `above`; returns where it ends.
pub fn draw(canvas: &mut Canvas, timeline: &Timeline, above: &Panel) -> f64 {
    let y = above.bottom + GAP - 16.0;
    let Some(downtime) = &timeline.downtime else {
        title(
            canvas,
            y,
            "Downtime",
            "none was recorded at this end",
            WIDTH - MARGIN,
        );
        return y;
    };
    let parts = parts(downtime);
    let sum: f64 = parts.iter().map(|part| part.ms).sum();
    let total = sane_ms(downtime.total_ms).max(sum).max(0.1);
    let top = y + 14.0;
    wedge(canvas, timeline, above, total, top);
    title(
        canvas,
        y,
        "Downtime",
        &text::time(sane_ms(downtime.total_ms)),
        WIDTH - MARGIN,
    );

    let time = Scale::linear(total, PLOT_LEFT, PLOT_RIGHT);
    let mut at = 0.0;
    for part in &parts {
        let (x, end) = (time.at(at), time.at(at + part.ms));
        let hint = format!("{}: {}", part.name, text::time(part.ms));
        canvas.rect_with_hint((x, top), (end - x, BAR), part.colour, &hint);
        at += part.ms;
    }
    let axis = top + BAR + 5.0;
    for (value, label) in time.time_ticks() {
        let x = time.at(value);
        canvas.line((x, top + BAR), (x, axis), GRID, 1.0);
        canvas.text(x, axis + 12.0, &label, Font::new(11.0).fill(MUTED).middle());
    }

    let legend = axis + 40.0;
    let column = (PLOT_RIGHT + 90.0 - PLOT_LEFT) / parts.len() as f64;
    for (n, part) in parts.iter().enumerate() {
        let x = PLOT_LEFT + column * n as f64;
        canvas.rect((x, legend - 10.0), (11.0, 11.0), part.colour);
        let room = column - 28.0;
        let font = Font::new(13.0).bold();
        let figure = if part.ms > 0.0 {
            text::time(part.ms)
        } else {
            "–".to_owned()
        };
        canvas.text(
            x + 18.0,
            legend,
            &font.fit(&format!("{} {figure}", part.name), room),
            font,
        );
        let font = Font::new(12.0).fill(MUTED);
        canvas.text(x + 18.0, legend + 18.0, &font.fit(&part.detail, room), font);
    }
    legend + 24.0
}

/// A band that marks the pause in the lanes above, and opens from the time axis to the enlarged bar.
fn wedge(canvas: &mut Canvas, timeline: &Timeline, above: &Panel, total: f64, top: f64) {
    let Some(stop) = timeline
        .stages
        .iter()
        .find(|span| span.stage == Stage::StopAndCopy)
    else {
        return;
    };
    let begin = sane_ms(stop.begin_ms);
    let (left, right) = (above.time.at(begin), above.time.at(begin + total));
    let right = right.max(left + 1.0);
    let band = [
        (left, above.stop_y),
        (right, above.stop_y),
        (right, above.floor),
        (PLOT_RIGHT, top),
        (PLOT_LEFT, top),
        (left, above.floor),
    ];
    canvas.polygon(&band, STOPPED, 0.12);
}
