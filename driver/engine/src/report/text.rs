//! Words and figures for people: units, dates, and strings that may come from anywhere.

use std::time::Duration;

/// `text` cut to `longest` characters, with an ellipsis if something is missing.
pub fn cut(text: &str, longest: usize) -> String {
    match text.char_indices().nth(longest) {
        None => text.to_owned(),
        Some(_) => text
            .chars()
            .take(longest.saturating_sub(1))
            .chain(['…'])
            .collect(),
    }
}

/// `text` on one line, without anything that could forge a log line, drive a terminal or turn the writing direction,
/// cut to `longest` characters.
pub fn printable(text: &str, longest: usize) -> String {
    let clean: String = text
        .chars()
        .take(longest.saturating_add(1))
        .map(|c| match c {
            '\n' | '\r' | '\t' | '\u{2028}' | '\u{2029}' => ' ',
            c if c.is_control() || is_invisible(c) => '\u{fffd}',
            c => c,
        })
        .collect();
    cut(&clean, longest)
}

/// Marks that change the direction of writing, zero-width characters, and what XML 1.0 forbids.
fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}')
}

/// Bytes with a binary unit and about three digits: `0 B`, `1.50 MiB`, `232 MiB`.
pub fn bytes(bytes: f64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes.max(0.0);
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{value:.0} B"),
        _ => format!("{} {}", digits(value), UNITS[unit]),
    }
}

/// A count with a decimal unit and about three digits: `17`, `57.2 k`, `1.20 M`.
pub fn count(count: f64) -> String {
    const UNITS: [&str; 7] = ["", " k", " M", " G", " T", " P", " E"];
    let mut value = count.max(0.0);
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{value:.0}"),
        _ => format!("{}{}", digits(value), UNITS[unit]),
    }
}

/// Milliseconds in the unit a person would choose: `0.35 ms`, `9.1 ms`, `399 ms`, `5.02 s`, `5 min 03 s`, `2 h 05 min`.
pub fn time(ms: f64) -> String {
    let ms = ms.max(0.0);
    if ms < 0.995 {
        format!("{ms:.2} ms")
    } else if ms < 99.95 {
        format!("{ms:.1} ms")
    } else if ms < 999.5 {
        format!("{ms:.0} ms")
    } else if ms < 99_950.0 {
        format!("{} s", digits(ms / 1000.0))
    } else {
        let seconds = (ms / 1000.0).round().min(1e15) as u64;
        match seconds {
            ..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
            _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
        }
    }
}

/// Three digits.
fn digits(value: f64) -> String {
    let decimals = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

/// A moment since 1970-01-01T00:00:00Z as RFC 3339 in UTC with milliseconds.
pub fn rfc3339(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let ms = since_epoch.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// This moment, so.
pub fn rfc3339_now() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    // A clock before 1970 is not set.
    rfc3339(now.unwrap_or_default())
}

/// Days since 1970-01-01 to a date of the Gregorian calendar (Howard Hinnant, "chrono-compatible low-level date
/// algorithms": eras of 400 years that begin on 1 March, so that the leap day is the last of its year).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        ..10 => (0, month + 3),
        _ => (1, month - 9),
    };
    (era * 400 + year_of_era + year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn units() {
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(1023.0), "1.00 KiB");
        assert_eq!(bytes(232.4 * 1024.0 * 1024.0), "232 MiB");
        assert_eq!(bytes(f64::MAX), format!("{:.0} EiB", f64::MAX / 1024f64.powi(6)));
        assert_eq!(count(57_221.0), "57.2 k");
        assert_eq!(count(999_700.0), "1.00 M");
        assert_eq!(time(9.1234), "9.1 ms");
        assert_eq!(time(398.7), "399 ms");
        assert_eq!(time(5018.0), "5.02 s");
        assert_eq!(time(303_000.0), "5 min 03 s");
        assert_eq!(time(7_500_000.0), "2 h 05 min");
        assert_eq!(time(-1.0), "0.00 ms");
    }

    #[test]
    fn hostile_text_is_tamed() {
        assert_eq!(
            printable("a\nb\u{1b}[31m\u{202e}c", 64),
            "a b\u{fffd}[31m\u{fffd}c"
        );
        assert_eq!(printable(&"é".repeat(100), 5), "éééé…");
        assert_eq!(cut("abcde", 5), "abcde");
        assert_eq!(cut("abc", 0), "…");
    }
}
