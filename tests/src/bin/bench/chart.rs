//! The medians as a picture: one panel a case, one group of bars a figure, the longest bar of each group the full width.

use std::fmt::Write;

use crate::summary::Summary;

const WIDTH: f64 = 860.0;
/// Where bars begin and how long the longest is.
const BAR_X: f64 = 250.0;
const BAR_WIDTH: f64 = 420.0;
const BAR_HEIGHT: f64 = 9.0;
const PANEL_HEAD: f64 = 48.0;
const HEAD: f64 = 40.0;
/// Of the ways that ours is compared with.
const COLOURS: [&str; 3] = ["#9aa5b1", "#627d98", "#b8a398"];
const OURS: &str = "#d9822b";

/// An SVG that stands alone, for light and dark pages.
pub fn render(summaries: &[Summary]) -> String {
    let Some(comparison) = summaries.first().map(|summary| summary.comparison) else {
        return String::new();
    };
    let ways = comparison.ways;
    let others = COLOURS.into_iter().cycle().take(ways.len().saturating_sub(1));
    let coloured: Vec<_> = ways.iter().zip(others.chain([OURS])).collect();
    let group = ways.len() as f64 * BAR_HEIGHT + 14.0;
    let panel = PANEL_HEAD + group * comparison.figures.len() as f64;
    let height = HEAD + panel * summaries.len() as f64 + 10.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>text{{fill:#222}}@media(prefers-color-scheme:dark){{text{{fill:#ddd}}}}</style>\n"
    );
    for (n, (way, colour)) in coloured.iter().enumerate() {
        let x = BAR_X + 150.0 * n as f64;
        // Writing to a string does not fail.
        let _ = writeln!(
            svg,
            "<rect fill=\"{colour}\" x=\"{x}\" y=\"14\" width=\"12\" height=\"12\"/><text x=\"{}\" y=\"24\">{}</text>",
            x + 18.0,
            way.name
        );
    }
    for (n, summary) in summaries.iter().enumerate() {
        let top = HEAD + panel * n as f64;
        let _ = writeln!(
            svg,
            "<text x=\"12\" y=\"{}\" font-size=\"15\" font-weight=\"bold\">{}</text><text x=\"12\" y=\"{}\">{}</text>",
            top + 18.0,
            summary.case.name,
            top + 36.0,
            summary.case.what
        );
        for (row, figure) in comparison.figures.iter().enumerate() {
            let y = top + PANEL_HEAD + group * row as f64;
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                BAR_X - 10.0,
                y + ways.len() as f64 * BAR_HEIGHT / 2.0 + 4.0,
                figure.name
            );
            let values = coloured
                .iter()
                .map(|(way, colour)| (colour, summary.get(way, figure.key)));
            let most = values.clone().filter_map(|(_, value)| value).fold(0.0, f64::max);
            for (bar, (colour, value)) in values.enumerate() {
                let y = y + BAR_HEIGHT * bar as f64;
                let (length, label) = match value {
                    Some(value) if most > 0.0 => (
                        BAR_WIDTH * value / most,
                        format!("{:.2} {}", value / figure.scale, figure.unit),
                    ),
                    Some(_) => (0.0, "0".to_owned()),
                    None => (0.0, "did not come to an end".to_owned()),
                };
                let _ = writeln!(
                    svg,
                    "<rect fill=\"{colour}\" x=\"{BAR_X}\" y=\"{y}\" width=\"{length:.1}\" height=\"{}\"/>\
                     <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"9\">{label}</text>",
                    BAR_HEIGHT - 1.0,
                    BAR_X + length + 4.0,
                    y + BAR_HEIGHT - 1.0
                );
            }
        }
    }
    svg + "</svg>\n"
}
