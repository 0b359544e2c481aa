//! The medians as Markdown: ratios first.

use std::fmt::Write;

use crate::case::Route;
use crate::summary::{Summary, FIGURES};

/// A case's table.
pub fn markdown(summary: &Summary) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write!(text, "\n## {}\n{}.\n\n", summary.case.name, summary.case.what);
    text += "| | of native | of native --parallel | native | native --parallel | virt-ferry | |\n";
    text += "|---|--:|--:|--:|--:|--:|---|\n";
    for figure in &FIGURES {
        let of = |route| summary.get(route, figure.key);
        let ours = of(Route::Ferry);
        let ratio = |other: Option<f64>| match (ours, other) {
            (Some(ours), Some(other)) if other > 0.0 => format!("**{:.2}**", ours / other),
            _ => "–".to_owned(),
        };
        let value = |value: Option<f64>| value.map_or("–".to_owned(), |value| short(value / figure.scale));
        let (native, parallel) = (of(Route::Native), of(Route::NativeParallel));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} |",
            figure.name,
            ratio(native),
            ratio(parallel),
            value(native),
            value(parallel),
            value(ours),
            figure.unit
        );
    }
    for (route, medians) in &summary.paths {
        if medians.finished < medians.migrations {
            let _ = writeln!(
                text,
                "\n{}: {} of {} migrations had not come to their end after {} s and were called off.",
                route.name(),
                medians.migrations - medians.finished,
                medians.migrations,
                summary.case.limit.as_secs()
            );
        }
    }
    let _ = writeln!(text, "\nMedians of {} turns.", summary.turns);
    text
}

/// Three digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
