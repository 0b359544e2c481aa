//! The timeline as a picture.

use super::timeline::Timeline;

/// Draws a timeline.
pub fn render(timeline: &Timeline) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\"><title>{}</title></svg>\n",
        timeline.migration.session
    )
}
