//! The stages as lanes over one time axis, and below them where the guest ran.

use ferry_contract::stage::Stage;

use super::canvas::{Canvas, Font};
use super::scale::Scale;
use super::{sane_ms, title, BAD, GRID, INK, MARGIN, MUTED, PLOT_LEFT, PLOT_RIGHT, PRE_COPY, STOPPED, WIDTH};
use crate::report::timeline::{Outcome, Role, Timeline};
use crate::report::{summary, text};

const LANE: f64 = 27.0;
const BAR: f64 = 17.0;
/// Bars are at least this wide: a stage of a millisecond in a migration of minutes is still seen.
const NARROWEST: f64 = 2.5;
/// Rounds closer together than this are not marked.
const ROUND_MARKS: f64 = 4.0;

/// What the panel below needs to know.
pub struct Panel {
    /// The time axis.
    pub time: Scale,
    /// The line of the time axis.
    pub floor: f64,
    /// Where the panel ends.
    pub bottom: f64,
    /// The lower edge of the stop-and-copy bar.
    pub stop_y: f64,
}

fn colour(stage: Stage) -> &'static str {
    match stage {
        Stage::PreMigration => "#8d99a6",
        Stage::Reservation => "#9a7fc7",
        Stage::PreCopy => PRE_COPY,
        Stage::StopAndCopy => STOPPED,
        Stage::Commitment => "#d9a520",
        Stage::Activation => "#3f9c6d",
    }
}

/// Draws the panel from `y` down.
pub fn draw(canvas: &mut Canvas, timeline: &Timeline, y: f64) -> Panel {
    title(canvas, y, "Stages", "", WIDTH - MARGIN);
    let ends = timeline.stages.iter().map(|span| sane_ms(span.end_ms));
    let time = Scale::linear(
        ends.fold(sane_ms(timeline.total_ms).max(1.0), f64::max),
        PLOT_LEFT,
        PLOT_RIGHT,
    );
    let top = y + 16.0;
    let stays = stays(timeline);
    let lanes = Stage::ALL.len() + usize::from(!stays.is_empty());
    let floor = top + LANE * lanes as f64 + 4.0;
    for (value, label) in time.time_ticks() {
        let x = time.at(value);
        canvas.line((x, top), (x, floor), GRID, 1.0);
        canvas.text(x, floor + 16.0, &label, Font::new(11.0).fill(MUTED).middle());
    }
    canvas.line((PLOT_LEFT, floor), (PLOT_RIGHT, floor), MUTED, 1.0);
    let mut stop_y = floor;
    for (n, stage) in Stage::ALL.into_iter().enumerate() {
        let bar_y = top + LANE * n as f64 + (LANE - BAR) / 2.0 + 2.0;
        if stage == Stage::StopAndCopy {
            stop_y = bar_y + BAR;
        }
        lane(canvas, timeline, stage, &time, bar_y);
    }
    guest(
        canvas,
        &stays,
        &time,
        floor - 4.0 - LANE + (LANE - BAR) / 2.0 + 2.0,
    );
    for event in &timeline.events {
        let x = time.at(sane_ms(event.at_ms));
        canvas.polygon(
            &[(x, floor), (x - 4.0, floor + 5.0), (x + 4.0, floor + 5.0)],
            INK,
            1.0,
        );
    }
    if let Outcome::Failed { .. } | Outcome::Cancelled = timeline.outcome {
        let x = time.at(sane_ms(timeline.total_ms));
        canvas.dashed((x, top - 4.0), (x, floor), BAD);
    }
    Panel {
        time,
        floor,
        bottom: floor + 24.0,
        stop_y,
    }
}

/// Where the guest was for some time: running on a host, or standing still.
struct Stay {
    begin: f64,
    end: f64,
    colour: &'static str,
    place: String,
}

/// The guest's stays, as far as this end saw them: the destination does not see when the guest was stopped.
fn stays(timeline: &Timeline) -> Vec<Stay> {
    let (from, to) = summary::hosts(timeline);
    let end = sane_ms(timeline.total_ms);
    let stay = |begin, end, colour, place| Stay {
        begin,
        end,
        colour,
        place,
    };
    let stop = timeline
        .stages
        .iter()
        .find(|span| span.stage == Stage::StopAndCopy);
    match (&timeline.outcome, stop, timeline.downtime) {
        _ if timeline.migration.role == Role::Destination => Vec::new(),
        (Outcome::Completed, Some(stop), Some(downtime)) => {
            let stop = sane_ms(stop.begin_ms).min(end);
            let resume = (stop + sane_ms(downtime.total_ms)).min(end);
            vec![
                stay(0.0, stop, "#d7e6f5", format!("runs on {from}")),
                stay(stop, resume, STOPPED, String::new()),
                stay(resume, end, "#d5ecdf", format!("runs on {to}")),
            ]
        }
        (Outcome::Completed, ..) => Vec::new(),
        // After the commitment it may be anywhere: the error says.
        (
            Outcome::Failed {
                stage: Some(Stage::Activation),
                ..
            },
            ..,
        ) => Vec::new(),
        // Whatever failed before, it runs on there; how long it may have stood still was not recorded.
        _ => vec![stay(0.0, end, "#d7e6f5", format!("stays on {from}"))],
    }
}

fn guest(canvas: &mut Canvas, stays: &[Stay], time: &Scale, y: f64) {
    if stays.is_empty() {
        return;
    }
    let baseline = y + BAR - 4.0;
    canvas.text(PLOT_LEFT - 14.0, baseline, "guest", Font::new(13.0).end());
    for stay in stays {
        let (x, end) = (time.at(stay.begin).min(PLOT_RIGHT - NARROWEST), time.at(stay.end));
        let width = (end - x).max(NARROWEST);
        let hint = match stay.place.as_str() {
            "" => format!("stands still for {}", text::time(stay.end - stay.begin)),
            place => place.to_owned(),
        };
        canvas.rect_with_hint((x, y), (width, BAR), stay.colour, &hint);
        let font = Font::new(11.0).middle();
        if font.width(&stay.place) + 8.0 <= width {
            canvas.text(x + width / 2.0, baseline, &stay.place, font);
        }
    }
}

fn lane(canvas: &mut Canvas, timeline: &Timeline, stage: Stage, time: &Scale, y: f64) {
    let baseline = y + BAR - 4.0;
    let mut total: Option<f64> = None;
    for span in timeline.stages.iter().filter(|span| span.stage == stage) {
        let (begin, end) = (sane_ms(span.begin_ms), sane_ms(span.end_ms));
        let length = (end - begin).max(0.0);
        *total.get_or_insert(0.0) += length;
        let x = time.at(begin).min(PLOT_RIGHT - NARROWEST);
        let width = (time.at(end) - x).max(NARROWEST);
        let hint = format!("{stage}: {} from {}", text::time(length), text::time(begin));
        canvas.rect_with_hint((x, y), (width, BAR), colour(stage), &hint);
    }
    if stage == Stage::PreCopy {
        rounds(canvas, timeline, time, y);
    }
    let name = Font::new(13.0)
        .end()
        .fill(if total.is_some() { INK } else { "#a4afba" });
    canvas.text(PLOT_LEFT - 14.0, baseline, stage.name(), name);
    let (figure, fill) = match total {
        Some(ms) => (text::time(ms), INK),
        None => ("–".to_owned(), "#a4afba"),
    };
    canvas.text(
        WIDTH - MARGIN,
        baseline,
        &figure,
        Font::new(13.0).end().fill(fill),
    );
}

/// White notches in the pre-copy bar where rounds begin, as far as they can be told apart.
fn rounds(canvas: &mut Canvas, timeline: &Timeline, time: &Scale, y: f64) {
    let mut last = f64::NEG_INFINITY;
    for round in timeline.rounds.iter().skip(1) {
        let x = time.at(sane_ms(round.begin_ms));
        if x - last >= ROUND_MARKS {
            canvas.line((x, y), (x, y + BAR), "#ffffff", 1.0);
            last = x;
        }
    }
}
