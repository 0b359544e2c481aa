//! Shapes and text as SVG, and how wide a text is without asking a font.

use std::fmt::Write;

use crate::report::text::cut;

/// A growing SVG document. Coordinates are pixels from the top left.
pub struct Canvas {
    width: f64,
    body: String,
}

impl Canvas {
    pub fn new(width: f64) -> Self {
        Canvas {
            width,
            body: String::new(),
        }
    }

    /// The document, with a title and description for those who cannot see it.
    pub fn finish(self, height: f64, description: &[String]) -> String {
        let title = description.first().map(|line| escape(line)).unwrap_or_default();
        let description = escape(&description.get(1..).unwrap_or_default().join("\n"));
        format!(
            concat!(
                "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" width=\"{w}\" height=\"{h:.0}\" ",
                "viewBox=\"0 0 {w} {h:.0}\" font-family=\"'DejaVu Sans', 'Segoe UI', Verdana, sans-serif\">\n",
                "<title>{title}</title>\n<desc>{description}</desc>\n",
                "<rect width=\"{w}\" height=\"{h:.0}\" fill=\"#ffffff\"/>\n{body}</svg>\n"
            ),
            w = self.width,
            h = height,
            title = title,
            description = description,
            body = self.body,
        )
    }

    pub fn text(&mut self, x: f64, y: f64, text: &str, font: Font) {
        if text.is_empty() {
            return;
        }
        let weight = if font.bold { " font-weight=\"bold\"" } else { "" };
        let anchor = match font.anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        self.push(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{}\" fill=\"{}\"{weight}{anchor} xml:space=\"preserve\">{}</text>",
            font.size,
            font.fill,
            escape(text)
        ));
    }

    pub fn rect(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), fill: &str) {
        self.push(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" fill=\"{fill}\"/>"
        ));
    }

    /// A rectangle that says more when the mouse rests on it.
    pub fn rect_with_hint(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), fill: &str, hint: &str) {
        self.push(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" fill=\"{fill}\"><title>{}</title></rect>",
            escape(hint)
        ));
    }

    pub fn rounded(&mut self, x: f64, y: f64, w: f64, h: f64, fill: &str) {
        self.push(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" rx=\"{:.1}\" fill=\"{fill}\"/>",
            h / 2.0
        ));
    }

    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), stroke: &str, width: f64) {
        self.push(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{stroke}\" stroke-width=\"{width}\"/>"
        ));
    }

    pub fn dashed(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), stroke: &str) {
        self.push(format_args!(
            concat!(
                "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{}\" stroke-width=\"1.5\" ",
                "stroke-dasharray=\"5 4\"/>"
            ),
            x1, y1, x2, y2, stroke
        ));
    }

    pub fn polygon(&mut self, points: &[(f64, f64)], fill: &str, opacity: f64) {
        self.push(format_args!(
            "<polygon points=\"{}\" fill=\"{fill}\" fill-opacity=\"{opacity}\"/>",
            join(points)
        ));
    }

    pub fn polyline(&mut self, points: &[(f64, f64)], stroke: &str, width: f64) {
        self.push(format_args!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"{width}\" stroke-linejoin=\"round\"/>",
            join(points)
        ));
    }

    pub fn dot(&mut self, (x, y): (f64, f64), radius: f64, fill: &str) {
        self.push(format_args!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{fill}\"/>"
        ));
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.body, "{element}");
    }
}

fn join(points: &[(f64, f64)]) -> String {
    points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// XML text: markup escaped, and what XML 1.0 does not allow at all replaced.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[derive(Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks.
#[derive(Clone, Copy)]
pub struct Font<'a> {
    size: f64,
    bold: bool,
    fill: &'a str,
    anchor: Anchor,
}

impl<'a> Font<'a> {
    pub fn new(size: f64) -> Self {
        Font {
            size,
            bold: false,
            fill: super::INK,
            anchor: Anchor::Start,
        }
    }

    pub fn bold(self) -> Self {
        Font { bold: true, ..self }
    }

    pub fn fill(self, fill: &'a str) -> Self {
        Font { fill, ..self }
    }

    pub fn middle(self) -> Self {
        Font {
            anchor: Anchor::Middle,
            ..self
        }
    }

    pub fn end(self) -> Self {
        Font {
            anchor: Anchor::End,
            ..self
        }
    }

    /// The width of a text in pixels, on the safe side: DejaVu Sans is wider than what most systems show.
    pub fn width(&self, text: &str) -> f64 {
        let em: f64 = text.chars().map(advance).sum();
        em * self.size * if self.bold { 1.13 } else { 1.0 }
    }

    /// The text, shortened to fit into `room` pixels.
    pub fn fit(&self, text: &str, room: f64) -> String {
        if self.width(text) <= room {
            return text.to_owned();
        }
        let mut used = self.width("…");
        let mut kept = 0;
        for c in text.chars() {
            used += self.width(c.encode_utf8(&mut [0; 4]));
            if used > room {
                break;
            }
            kept += 1;
        }
        cut(text, kept + 1)
    }

    /// The text in at most `most` lines of `room` pixels, broken between words; the last one is shortened.
    pub fn wrap(&self, text: &str, room: f64, most: usize) -> Vec<String> {
        let mut lines = vec![String::new()];
        for word in text.split(' ') {
            let lines_so_far = lines.len();
            let Some(line) = lines.last_mut() else { break };
            let longer = if line.is_empty() {
                word.to_owned()
            } else {
                format!("{line} {word}")
            };
            if line.is_empty() || lines_so_far == most || self.width(&longer) <= room {
                *line = longer;
            } else {
                lines.push(word.to_owned());
            }
        }
        lines.iter().map(|line| self.fit(line, room)).collect()
    }
}

/// Advance widths of DejaVu Sans in em, rounded up, by class of character.
fn advance(c: char) -> f64 {
    match c {
        'i' | 'j' | 'l' | 'I' | 'J' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' | ' ' | '·' => 0.33,
        'f' | 'r' | 't' | '-' | '(' | ')' | '[' | ']' | '/' => 0.42,
        'm' | 'M' | 'W' | '@' | '%' | '…' | '\u{fffd}' => 1.03,
        'w' | '+' | '=' | '<' | '>' | '~' | '→' | '#' | '&' => 0.85,
        'A'..='Z' => 0.79,
        '0'..='9' | 'a'..='z' | '_' | '–' => 0.64,
        '\u{0}'..='\u{24f}' => 0.8,
        _ => 1.1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_and_forbidden_characters_are_harmless() {
        assert_eq!(
            escape("<a b='c\"&\u{0}\u{ffff}>"),
            "&lt;a b=&#39;c&quot;&amp;\u{fffd}\u{fffd}&gt;"
        );
    }

    #[test]
    fn fitted_text_fits() {
        let font = Font::new(12.0);
        for room in [0.0, 5.0, 50.0, 500.0] {
            let fitted = font.fit(&"WM→i漢".repeat(30), room);
            assert!(font.width(&fitted) <= room.max(font.width("…")), "{fitted}");
        }
        assert_eq!(font.fit("short", 500.0), "short");
    }

    #[test]
    fn wrapped_text_keeps_its_words_and_its_limit() {
        let font = Font::new(12.0);
        let text = "one two three four five six seven eight nine ten eleven twelve thirteen";
        assert_eq!(font.wrap(text, 200.0, 99).join(" "), text);
        let cut = font.wrap(text, 200.0, 2);
        assert_eq!(cut.len(), 2);
        assert!(cut[1].ends_with('…'));
        assert_eq!(font.wrap("", 200.0, 2), [""]);
    }
}
