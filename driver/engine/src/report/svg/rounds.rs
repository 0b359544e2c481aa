//! Pre-copy round by round: what each sent, and how fast the guest wrote meanwhile.
//!
//! Every round has a slot of the same width, as the later ones are too short to be seen on a time axis; the last slot
//! is the copy of the stopped guest. Of more rounds than there are slots, neighbours share one, which shows their mean.

use super::canvas::{Canvas, Font};
use super::scale::Scale;
use super::{sane, title, GRID, MARGIN, MUTED, PLOT_LEFT, PLOT_RIGHT, PRE_COPY, STOPPED, WIDTH};
use crate::report::text;
use crate::report::timeline::{Round, Timeline};

const BYTES_HEIGHT: f64 = 150.0;
const RATE_HEIGHT: f64 = 70.0;
/// More slots than this would be narrower than four pixels.
const SLOTS: usize = 220;
/// Slots as wide as this say their figure above the bar.
const FIGURES: f64 = 58.0;
/// The widest bar.
const WIDEST: f64 = 64.0;
const ZEROS: &str = "#c9def2";
const RATE: &str = "#8b4fb0";

struct Slot {
    label: String,
    data: f64,
    /// Data and zeros.
    all: f64,
    /// Pages per second; none where nothing was measured.
    rate: Option<f64>,
    colour: &'static str,
    hint: String,
}

fn slots(timeline: &Timeline) -> Vec<Slot> {
    let share = timeline.rounds.len().div_ceil(SLOTS).max(1);
    let mut slots: Vec<_> = timeline.rounds.chunks(share).map(slot).collect();
    if let Some(downtime) = &timeline.downtime {
        let bytes = downtime.last_copy_bytes as f64;
        slots.push(Slot {
            label: "last".into(),
            data: bytes,
            all: bytes,
            rate: None,
            colour: STOPPED,
            hint: format!(
                "last copy, guest stopped: {} pages, {}",
                text::count(downtime.last_copy_pages as f64),
                text::bytes(bytes)
            ),
        });
    }
    slots
}

/// One slot for some neighbouring rounds (at least one).
fn slot(rounds: &[Round]) -> Slot {
    let mean = |value: fn(&Round) -> f64| {
        rounds.iter().map(|round| sane(value(round), 1e18)).sum::<f64>() / rounds.len() as f64
    };
    let data = mean(|round| round.data_bytes as f64);
    let zeros = mean(|round| round.zero_bytes as f64);
    let rate = mean(|round| round.dirty_rate);
    let number = rounds[0].number;
    let hint = format!(
        "round {number}: {} pages, {} data, {} zeros, {} holes, {} pages held back; scan {}, drain {}, send {}; {} pages/s written",
        text::count(mean(|round| round.pages as f64)),
        text::bytes(data),
        text::bytes(zeros),
        text::bytes(mean(|round| round.hole_bytes as f64)),
        text::count(mean(|round| round.deferred_pages as f64)),
        text::time(mean(|round| round.scan_ms)),
        text::time(mean(|round| round.drain_ms)),
        text::time(mean(|round| round.send_ms)),
        text::count(rate),
    );
    Slot {
        label: number.to_string(),
        data,
        all: data + zeros,
        rate: (number > 0).then_some(rate),
        colour: PRE_COPY,
        hint,
    }
}

/// Draws both plots from `y` down; returns where they end.
pub fn draw(canvas: &mut Canvas, timeline: &Timeline, y: f64) -> f64 {
    let slots = slots(timeline);
    if timeline.rounds.is_empty() {
        title(canvas, y, "Rounds", "no round was completed", WIDTH - MARGIN);
        return y;
    }
    let width = (PLOT_RIGHT - PLOT_LEFT) / slots.len() as f64;
    let centre = |n: usize| PLOT_LEFT + width * (n as f64 + 0.5);
    let bottom = bytes(canvas, timeline, &slots, y, width, &centre);
    rates(canvas, &slots, bottom + 24.0, &centre)
}

fn bytes(
    canvas: &mut Canvas,
    timeline: &Timeline,
    slots: &[Slot],
    y: f64,
    width: f64,
    centre: &dyn Fn(usize) -> f64,
) -> f64 {
    let top = y + 30.0;
    let floor = top + BYTES_HEIGHT;
    let values = slots.iter().flat_map(|slot| [slot.data, slot.all]);
    let scale = Scale::fitting(values, floor, top);
    let share = timeline.rounds.len().div_ceil(SLOTS).max(1);
    let mut remark = format!(
        "bytes per round, {} scale",
        if scale.is_log() { "logarithmic" } else { "linear" }
    );
    if share > 1 {
        remark += &format!("; a bar is the mean of {share} rounds");
    }
    if timeline.omitted > 0 {
        remark += &format!("; {} rounds or notes not kept", timeline.omitted);
    }
    let end = legend(canvas, slots, y);
    title(canvas, y, "Rounds", &remark, end);
    axis(canvas, &scale, &scale.byte_ticks(5), floor);

    let bar = (width * 0.72).min(WIDEST);
    for (n, slot) in slots.iter().enumerate() {
        let x = centre(n) - bar / 2.0;
        for (value, colour) in [(slot.all, ZEROS), (slot.data, slot.colour)] {
            let height = floor - scale.at(value);
            if height > 0.0 {
                canvas.rect_with_hint((x, floor - height), (bar, height), colour, &slot.hint);
            }
        }
        if width >= FIGURES {
            let font = Font::new(11.0).fill(MUTED).middle();
            canvas.text(centre(n), scale.at(slot.all) - 5.0, &text::bytes(slot.data), font);
        }
    }
    numbers(canvas, slots, floor + 16.0, width, centre);
    floor + 16.0
}

/// The numbers of the rounds, as many as have room. The last slot always has its label.
fn numbers(canvas: &mut Canvas, slots: &[Slot], y: f64, width: f64, centre: &dyn Fn(usize) -> f64) {
    let font = Font::new(11.0).fill(MUTED).middle();
    let widest = slots
        .iter()
        .map(|slot| font.width(&slot.label))
        .fold(0.0, f64::max);
    let every = ((widest + 12.0) / width).ceil().max(1.0) as usize;
    let last = slots.len() - 1;
    for (n, slot) in slots.iter().enumerate() {
        if n == last || n % every == 0 && last - n >= every {
            canvas.text(centre(n), y, &slot.label, font);
        }
    }
}

/// Draws the legend at the right; returns where it begins.
fn legend(canvas: &mut Canvas, slots: &[Slot], y: f64) -> f64 {
    let zeros = slots.iter().any(|slot| slot.all > slot.data);
    let last = slots.iter().any(|slot| slot.colour == STOPPED);
    let entries = [
        (true, PRE_COPY, "data"),
        (zeros, ZEROS, "zero pages"),
        (last, STOPPED, "last copy, guest stopped"),
    ];
    let font = Font::new(12.0).fill(MUTED);
    let mut x = WIDTH - MARGIN;
    for (_, colour, name) in entries.into_iter().rev().filter(|entry| entry.0) {
        x -= font.width(name);
        canvas.text(x, y, name, font);
        x -= 17.0;
        canvas.rect((x, y - 10.0), (11.0, 11.0), colour);
        x -= 18.0;
    }
    x
}

fn rates(canvas: &mut Canvas, slots: &[Slot], y: f64, centre: &dyn Fn(usize) -> f64) -> f64 {
    let rates: Vec<_> = slots
        .iter()
        .enumerate()
        .filter_map(|(n, slot)| Some((n, slot.rate?)))
        .collect();
    if rates.is_empty() {
        return y - 24.0;
    }
    let top = y + 26.0;
    let floor = top + RATE_HEIGHT;
    let scale = Scale::fitting(rates.iter().map(|(_, rate)| *rate), floor, top);
    let remark = format!(
        "pages per second the guest wrote, {} scale",
        if scale.is_log() { "logarithmic" } else { "linear" }
    );
    title(canvas, y + 8.0, "Dirty rate", &remark, WIDTH - MARGIN);
    axis(canvas, &scale, &scale.count_ticks(3), floor);
    let points: Vec<_> = rates
        .iter()
        .map(|(n, rate)| (centre(*n), scale.at(*rate)))
        .collect();
    canvas.polyline(&points, RATE, 2.0);
    if points.len() <= 60 {
        for point in &points {
            canvas.dot(*point, 3.2, RATE);
        }
    }
    floor
}

/// Horizontal grid lines with their values.
fn axis(canvas: &mut Canvas, scale: &Scale, ticks: &[(f64, String)], floor: f64) {
    for (value, label) in ticks {
        let y = scale.at(*value);
        canvas.line((PLOT_LEFT, y), (PLOT_RIGHT, y), GRID, 1.0);
        canvas.text(
            PLOT_LEFT - 10.0,
            y + 4.0,
            label,
            Font::new(11.0).fill(MUTED).end(),
        );
    }
    canvas.line((PLOT_LEFT, floor), (PLOT_RIGHT, floor), MUTED, 1.0);
}
