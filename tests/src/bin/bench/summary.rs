//! Medians of what was seen.

use serde::Serialize;
use serde_json::{json, Value};

use crate::case::{Case, Route};
use crate::leg::Leg;

/// A figure of a path, and how to show it.
pub struct Figure {
    /// As it is known in the JSON.
    pub key: &'static str,
    /// As a person reads it.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// What to divide the JSON's value by for that unit.
    pub scale: f64,
}

/// The figures that are compared, in order of what matters to the guest's owner.
pub const FIGURES: [Figure; 8] = [
    figure("stall_ms", "longest stall", "ms", 1.0),
    figure("total_ms", "total time", "ms", 1.0),
    figure("memory_ms", "of it, moving memory", "ms", 1.0),
    figure("wire_bytes", "on the wire", "MiB", 1048576.0),
    figure("source_cpu_s", "CPU, source", "s", 1.0),
    figure("destination_cpu_s", "CPU, destination", "s", 1.0),
    figure(
        "resident_destination_kib",
        "resident at the destination",
        "MiB",
        1024.0,
    ),
    figure("work_ratio", "work while moving, of that before", "", 1.0),
];

const fn figure(key: &'static str, name: &'static str, unit: &'static str, scale: f64) -> Figure {
    Figure {
        key,
        name,
        unit,
        scale,
    }
}

/// One path's medians; none where no migration came to its end.
#[derive(Clone, Debug, Serialize)]
pub struct Medians {
    /// Migrations that were measured.
    pub migrations: usize,
    /// Of them, those that came to their end.
    pub finished: usize,
    total_ms: Option<f64>,
    memory_ms: Option<f64>,
    stall_ms: Option<f64>,
    wire_bytes: Option<u64>,
    source_cpu_s: Option<f64>,
    destination_cpu_s: Option<f64>,
    resident_source_kib: Option<u64>,
    resident_destination_kib: Option<u64>,
    work_ratio: Option<f64>,
    /// The guest's work a second before, while and after.
    work_per_s: [Option<f64>; 3],
}

impl Medians {
    fn new(legs: &[&Leg]) -> Self {
        let ended: Vec<_> = legs.iter().filter(|leg| leg.finished).collect();
        let of = |value: &dyn Fn(&Leg) -> f64| median(ended.iter().map(|leg| value(leg)).collect());
        let whole = |value: &dyn Fn(&Leg) -> u64| of(&|leg| value(leg) as f64).map(|median| median as u64);
        Medians {
            migrations: legs.len(),
            finished: ended.len(),
            total_ms: of(&|leg| leg.total_ms),
            memory_ms: median(ended.iter().filter_map(|leg| leg.memory_ms).collect()),
            stall_ms: of(&|leg| leg.stall_ms),
            wire_bytes: whole(&|leg| leg.wire_bytes),
            source_cpu_s: of(&|leg| leg.source_cpu_s),
            destination_cpu_s: of(&|leg| leg.destination_cpu_s),
            resident_source_kib: whole(&|leg| leg.resident_source_kib),
            resident_destination_kib: whole(&|leg| leg.resident_destination_kib),
            work_ratio: of(&|leg| leg.work[1] / leg.work[0]),
            work_per_s: [0, 1, 2].map(|n| of(&|leg| leg.work[n])),
        }
    }

    /// A figure by its key.
    pub fn get(&self, key: &str) -> Option<f64> {
        let value = serde_json::to_value(self).ok()?;
        value.get(key)?.as_f64()
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
    /// The case.
    pub case: &'static Case,
    /// How often each path took its turn.
    pub turns: u32,
    /// Each path's.
    pub paths: Vec<(Route, Medians)>,
}

impl Summary {
    /// Of all legs of a case.
    pub fn new(case: &'static Case, turns: u32, legs: &[Leg]) -> Self {
        let of = |route| {
            legs.iter()
                .filter(move |leg| leg.route == route)
                .collect::<Vec<_>>()
        };
        Summary {
            case,
            turns,
            paths: Route::ALL.map(|route| (route, Medians::new(&of(route)))).into(),
        }
    }

    /// A figure of a path.
    pub fn get(&self, route: Route, key: &str) -> Option<f64> {
        let (_, medians) = self.paths.iter().find(|(other, _)| *other == route)?;
        medians.get(key)
    }
}

/// All of it as JSON.
pub fn document(summaries: &[Summary]) -> Value {
    let cases = summaries.iter().map(|summary| {
        let paths = summary
            .paths
            .iter()
            .map(|(route, medians)| (route.name(), json!(medians)));
        json!({
            "name": summary.case.name,
            "what": summary.case.what,
            "turns": summary.turns,
            "limit_s": summary.case.limit.as_secs(),
            "paths": paths.collect::<std::collections::BTreeMap<_, _>>(),
        })
    });
    json!({ "cases": cases.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn every_figure_is_in_the_medians() {
        let leg = Leg {
            route: Route::Ferry,
            finished: true,
            total_ms: 1.0,
            memory_ms: Some(1.0),
            stall_ms: 1.0,
            wire_bytes: 1,
            source_cpu_s: 1.0,
            destination_cpu_s: 1.0,
            resident_source_kib: 1,
            resident_destination_kib: 1,
            work: [1.0; 3],
        };
        let summary = Summary::new(&crate::case::CASES[0], 1, &[leg]);
        for figure in FIGURES {
            assert_eq!(summary.get(Route::Ferry, figure.key), Some(1.0), "{}", figure.key);
            assert_eq!(summary.get(Route::Native, figure.key), None);
        }
    }
}
