//! Medians of what was seen.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{json, Value};

use crate::way::{Case, Comparison, Leg, Way};

/// One way's medians; none where no move came to its end.
#[derive(Clone, Debug, Serialize)]
pub struct Medians {
    /// Moves that were measured.
    pub migrations: usize,
    /// Of them, those that came to their end.
    pub finished: usize,
    /// By the figures' keys.
    #[serde(flatten)]
    figures: BTreeMap<&'static str, f64>,
}

impl Medians {
    fn new(legs: &[&Leg]) -> Self {
        let mut values = BTreeMap::<_, Vec<_>>::new();
        for leg in legs.iter().filter(|leg| leg.finished) {
            for (key, value) in &leg.figures {
                values.entry(*key).or_default().push(*value);
            }
        }
        let medians = values.into_iter();
        Medians {
            migrations: legs.len(),
            finished: legs.iter().filter(|leg| leg.finished).count(),
            figures: medians
                .filter_map(|(key, values)| Some((key, median(values)?)))
                .collect(),
        }
    }
}

/// The middle one; of an even number, the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// One case's medians.
pub struct Summary {
    /// What was compared.
    pub comparison: &'static Comparison,
    /// The case.
    pub case: Case,
    /// How often each way took its turn.
    pub turns: u32,
    medians: BTreeMap<&'static str, Medians>,
}

impl Summary {
    /// Of all legs of a case, each with its way's key.
    pub fn new(comparison: &'static Comparison, case: &Case, turns: u32, legs: &[(&str, Leg)]) -> Self {
        let of = |way: &Way| {
            let its = legs.iter().filter(|(key, _)| *key == way.key);
            Medians::new(&its.map(|(_, leg)| leg).collect::<Vec<_>>())
        };
        Summary {
            comparison,
            case: *case,
            turns,
            medians: comparison.ways.iter().map(|way| (way.key, of(way))).collect(),
        }
    }

    /// A way's medians.
    pub fn of(&self, way: &Way) -> Option<&Medians> {
        self.medians.get(way.key)
    }

    /// A figure of a way.
    pub fn get(&self, way: &Way, key: &str) -> Option<f64> {
        self.of(way)?.figures.get(key).copied()
    }
}

/// All of it as JSON.
pub fn document(summaries: &[Summary]) -> Value {
    let cases = summaries.iter().map(|summary| {
        json!({
            "name": summary.case.name,
            "what": summary.case.what,
            "turns": summary.turns,
            "limit_s": summary.case.limit.as_secs(),
            "paths": summary.medians,
        })
    });
    json!({ "cases": cases.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::way::figure;
    use std::time::Duration;

    static COMPARISON: Comparison = Comparison {
        ways: &[
            Way {
                key: "theirs",
                name: "theirs",
            },
            Way {
                key: "ours",
                name: "ours",
            },
        ],
        figures: &[figure("total_ms", "total time", "s", 1000.0)],
    };
    const CASE: Case = Case {
        name: "case",
        what: "a guest",
        turns: 3,
        limit: Duration::from_secs(1),
    };

    fn leg(finished: bool, total: f64) -> Leg {
        Leg {
            finished,
            figures: vec![("total_ms", total), ("besides", 1.0)],
        }
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn each_way_has_the_medians_of_what_came_to_its_end() {
        let legs = [
            ("ours", leg(true, 3000.0)),
            ("theirs", leg(false, 9000.0)),
            ("ours", leg(true, 1000.0)),
        ];
        let summary = Summary::new(&COMPARISON, &CASE, 2, &legs);
        let [theirs, ours] = COMPARISON.ways else {
            unreachable!()
        };
        assert_eq!(summary.get(ours, "total_ms"), Some(2000.0));
        assert_eq!(summary.get(ours, "besides"), Some(1.0));
        assert_eq!(summary.get(theirs, "total_ms"), None);
        let json = document(&[summary]);
        let paths = &json["cases"][0]["paths"];
        assert_eq!(paths["ours"]["total_ms"], 2000.0);
        assert_eq!(
            paths["theirs"],
            serde_json::json!({ "migrations": 1, "finished": 0 })
        );
    }

    #[test]
    fn ratios_come_first() {
        let legs = [("ours", leg(true, 3000.0)), ("theirs", leg(true, 6000.0))];
        let summaries = [Summary::new(&COMPARISON, &CASE, 1, &legs)];
        let table = crate::report::markdown(&summaries);
        assert!(table.contains("| | of theirs | theirs | ours | |"), "{table}");
        assert!(
            table.contains("| total time | **0.50** | 6.00 | 3.00 | s |"),
            "{table}"
        );
        let picture = crate::chart::render(&summaries);
        assert!(
            picture.contains(">6.00 s<") && picture.contains(">ours<"),
            "{picture}"
        );
    }
}
