//! Axes: where a value lies, and which values deserve a tick.

use crate::report::text;

/// A range of values laid along a range of pixels.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
    log: bool,
}

/// The largest to smallest value from which a linear scale hides the small ones.
const LOG_FROM: f64 = 30.0;
/// The widest range a logarithmic scale shows.
const LOG_UP_TO: f64 = 1e12;

impl Scale {
    /// From 0 to `most` (at least a little more than 0).
    pub fn linear(most: f64, start: f64, end: f64) -> Self {
        Scale {
            from: 0.0,
            to: most.max(1e-9),
            start,
            end,
            log: false,
        }
    }

    /// From 0 to the largest of `values`; logarithmic if they are too far apart, then from below the smallest one.
    pub fn fitting(values: impl Iterator<Item = f64> + Clone, start: f64, end: f64) -> Self {
        let most = values.clone().fold(0.0, f64::max);
        let least = values.filter(|&value| value > 0.0).fold(f64::INFINITY, f64::min);
        if most / least < LOG_FROM || most <= 0.0 {
            return Scale::linear(most, start, end);
        }
        // Begin at a power of two below the smallest value, so that it still has a bar.
        let from = (least.max(most / LOG_UP_TO) / 2.0).log2().floor().exp2();
        Scale {
            from,
            to: most,
            start,
            end,
            log: true,
        }
    }

    pub fn is_log(&self) -> bool {
        self.log
    }

    /// The pixel of a value; values beyond the ends lie at the ends.
    pub fn at(&self, value: f64) -> f64 {
        let part = if self.log {
            (value.max(self.from) / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.start + (self.end - self.start) * part.clamp(0.0, 1.0)
    }

    /// Ticks of an axis in milliseconds: at most 11.
    pub fn time_ticks(&self) -> Vec<(f64, String)> {
        const MINUTE: f64 = 60_000.0;
        const HOUR: f64 = 60.0 * MINUTE;
        let step = [
            15_000.0,
            30_000.0,
            MINUTE,
            2.0 * MINUTE,
            5.0 * MINUTE,
            10.0 * MINUTE,
            30.0 * MINUTE,
            HOUR,
        ]
        .into_iter()
        .find(|step| self.to > 100_000.0 && self.to / step <= 10.0)
        .unwrap_or_else(|| match self.to > HOUR {
            true => step(self.to / HOUR, 10.0) * HOUR,
            false => step(self.to, 10.0),
        });
        let (unit, name) = match step {
            s if s >= HOUR => (HOUR, "h"),
            s if s >= MINUTE => (MINUTE, "min"),
            s if s >= 1000.0 || self.to > 2000.0 => (1000.0, "s"),
            _ => (1.0, "ms"),
        };
        multiples(step, self.to)
            .map(|value| (value, format!("{} {name}", short(value / unit))))
            .collect()
    }

    /// Ticks of an axis in bytes: powers of two on a logarithmic scale, multiples of one on a linear one.
    pub fn byte_ticks(&self, most: usize) -> Vec<(f64, String)> {
        let label = |value: f64| (value, short_unit(&text::bytes(value)));
        if self.log {
            let (first, last) = (self.from.log2().ceil(), self.to.log2().floor());
            let stride = [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0]
                .into_iter()
                .find(|stride| (last - first) / stride < most as f64)
                .unwrap_or(40.0);
            let first = (first / stride).ceil() as i32;
            let last = (last / stride).floor() as i32;
            return (first..=last)
                .map(|n| label((f64::from(n) * stride).exp2()))
                .collect();
        }
        let step = (self.to / most as f64).max(1.0).log2().ceil().exp2();
        multiples(step, self.to).map(label).collect()
    }

    /// Ticks of an axis in counts.
    pub fn count_ticks(&self, most: usize) -> Vec<(f64, String)> {
        let label = |value: f64| (value, short_unit(&text::count(value)));
        if self.log {
            let (first, last) = (
                self.from.log10().ceil().max(0.0) as i32,
                self.to.log10().floor() as i32,
            );
            let stride = ((last - first) / most as i32 + 1).max(1) as usize;
            return (first..=last)
                .step_by(stride)
                .map(|n| label(10f64.powi(n)))
                .collect();
        }
        let step = step(self.to, most as f64).max(1.0);
        multiples(step, self.to).map(label).collect()
    }
}

/// 0, `step`, twice … up to `to`.
fn multiples(step: f64, to: f64) -> impl Iterator<Item = f64> {
    (0..=20)
        .map(move |n| f64::from(n) * step)
        .take_while(move |&value| value <= to * 1.000_001)
}

/// The smallest 1, 2 or 5 times a power of ten that divides `span` into at most `most` parts.
fn step(span: f64, most: f64) -> f64 {
    let power = 10f64.powf((span / most).log10().floor());
    [1.0, 2.0, 5.0]
        .into_iter()
        .map(|n| n * power)
        .find(|step| span / step <= most * 1.000_001)
        .unwrap_or(10.0 * power)
}

/// A number without needless decimals.
fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// `1.00 MiB` as `1 MiB`.
fn short_unit(text: &str) -> String {
    match text.split_once(' ') {
        Some((number, unit)) if number.contains('.') => {
            format!("{} {unit}", number.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(ticks: Vec<(f64, String)>) -> Vec<String> {
        ticks.into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn time_ticks_are_round_and_few() {
        let ticks = |ms| labels(Scale::linear(ms, 0.0, 900.0).time_ticks());
        assert_eq!(ticks(399.0).last().unwrap(), "350 ms");
        assert_eq!(
            ticks(9.1),
            ["0 ms", "1 ms", "2 ms", "3 ms", "4 ms", "5 ms", "6 ms", "7 ms", "8 ms", "9 ms"]
        );
        assert_eq!(ticks(300_000.0).last().unwrap(), "300 s");
        assert_eq!(ticks(1_200_000.0)[1], "2 min");
        assert_eq!(ticks(0.0)[0], "0 ms");
        let mut ms = 1e-9;
        while ms < 1e13 {
            let n = ticks(ms).len();
            assert!((2..=11).contains(&n), "{n} ticks for {ms} ms");
            ms *= 1.7;
        }
    }

    #[test]
    fn a_wide_range_becomes_logarithmic() {
        let values = [4096.0, 1e9, 0.0];
        let scale = Scale::fitting(values.into_iter(), 100.0, 0.0);
        assert!(scale.is_log());
        assert_eq!(scale.at(1e9), 0.0);
        assert!(scale.at(4096.0) < 100.0, "the smallest value has a bar");
        assert_eq!(scale.at(0.0), 100.0);
        let ticks = labels(scale.byte_ticks(6));
        assert!(
            ticks.len() <= 6 && ticks.contains(&"1 MiB".to_owned()),
            "{ticks:?}"
        );
        assert!(!Scale::fitting([1.0, 2.0].into_iter(), 0.0, 1.0).is_log());
        assert!(!Scale::fitting([0.0].into_iter(), 0.0, 1.0).is_log());
        assert!(!Scale::fitting([7.0].into_iter(), 0.0, 1.0).is_log());
    }

    #[test]
    fn any_range_has_few_ticks() {
        for most in [0.0, 1.0, 17.0, 4096.0, 1e9, u64::MAX as f64] {
            for values in [vec![most], vec![1.0, most]] {
                let scale = Scale::fitting(values.into_iter(), 0.0, 100.0);
                assert!(scale.byte_ticks(6).len() <= 7, "{most} {:?}", scale.byte_ticks(6));
                assert!(
                    scale.count_ticks(4).len() <= 6,
                    "{most} {:?}",
                    scale.count_ticks(4)
                );
            }
        }
    }
}
