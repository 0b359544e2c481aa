//! The medians as Markdown: ratios first.

use std::fmt::Write;

use crate::summary::Summary;

/// The table of every case.
pub fn markdown(summaries: &[Summary]) -> String {
    let mut text = String::new();
    for summary in summaries {
        let ways = summary.comparison.ways;
        let Some((ours, others)) = ways.split_last() else {
            continue;
        };
        let head = others.iter().map(|way| format!("of {}", way.name));
        let head = head.chain(ways.iter().map(|way| way.name.to_owned()));
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "\n## {}\n{}.\n\n| | {} | |\n|---|{}---|\n",
            summary.case.name,
            summary.case.what,
            head.collect::<Vec<_>>().join(" | "),
            "--:|".repeat(others.len() + ways.len())
        );
        for figure in summary.comparison.figures {
            let of = |way| summary.get(way, figure.key);
            let ratio = |other| match (of(ours), of(other)) {
                (Some(ours), Some(other)) if other > 0.0 => format!("**{:.2}**", ours / other),
                _ => "–".to_owned(),
            };
            let value = |way| of(way).map_or("–".to_owned(), |value| short(value / figure.scale));
            let cells = others.iter().map(ratio).chain(ways.iter().map(value));
            let cells = cells.collect::<Vec<_>>().join(" | ");
            let _ = writeln!(text, "| {} | {cells} | {} |", figure.name, figure.unit);
        }
        for way in ways {
            if let Some(medians) = summary.of(way).filter(|of| of.finished < of.migrations) {
                let _ = writeln!(
                    text,
                    "\n{}: {} of {} migrations had not come to their end after {} s and were called off.",
                    way.name,
                    medians.migrations - medians.finished,
                    medians.migrations,
                    summary.case.limit.as_secs()
                );
            }
        }
        let _ = writeln!(text, "\nMedians of {} turns.", summary.turns);
    }
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
