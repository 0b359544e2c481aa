//! Live migration: libvirt's native path, the same with `--parallel`, and virt-ferry.

mod case;
mod leg;

use anyhow::Result;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::Scene;

use crate::summary::Summary;
use crate::turns;
use crate::way::{figure, Comparison, Figure};
use case::{Guest, Route, GUESTS};

/// The guest's number in the guests' network.
const NUMBER: u8 = 1;

static COMPARISON: Comparison = Comparison {
    ways: &[Route::ALL[0].way(), Route::ALL[1].way(), Route::ALL[2].way()],
    figures: &FIGURES,
};

const FIGURES: [Figure; 8] = [
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

/// Measures the cases with `wanted` in their names, each in a lab of its own.
///
/// # Errors
/// If a guest does not arrive whole, goes another way than told, or cannot be watched.
pub fn run(quick: bool, turns: Option<u32>, wanted: &str) -> Result<Vec<Summary>> {
    let guests = GUESTS.iter().take(if quick { 1 } else { GUESTS.len() });
    let guests = guests.filter(|guest| guest.case.name.contains(wanted));
    let measured = guests.map(|guest| {
        let turns = turns.unwrap_or(if quick { 2 } else { guest.case.turns });
        Lab::with(Options::default(), |lab| measure(lab, guest, turns))
    });
    measured.collect()
}

fn measure(lab: &Lab, guest: &Guest, turns: u32) -> Result<Summary> {
    let scene = Scene::start(lab, lab.host(1), (guest.guest)(), NUMBER)?;
    let listener = lab.witness()?;
    let (one, two) = (lab.host(1), lab.host(2));
    turns::run(&COMPARISON, &guest.case, turns, |turn| {
        let route = Route::ALL[turn.number];
        let slow = guest.link_mbit.map(|mbit| Slow::to(lab, two, mbit)).transpose()?;
        let leg = leg::run(&scene, listener, one, two, route, guest.case.limit)?;
        drop(slow);
        if leg.finished {
            // Always by the same way, so that each path finds the guest as the others do.
            two.configure(Route::Ferry.configuration())?;
            one.configure(Route::Ferry.configuration())?;
            scene.move_to(two, one, &[])?;
        }
        Ok(leg)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_seen() {
        let seen = leg::Seen {
            memory_ms: Some(0.0),
            ..leg::Seen::default()
        };
        let seen = seen.into_leg();
        for figure in FIGURES {
            assert!(
                seen.figures.iter().any(|(key, _)| *key == figure.key),
                "{}",
                figure.key
            );
        }
    }
}
