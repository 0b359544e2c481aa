//! Each way takes its turn, over and over: whatever else the machine does, it does to all of them.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};

use crate::report;
use crate::summary::Summary;
use crate::way::{Case, Comparison, Leg, Way};

/// One move of many.
pub struct Turn {
    /// Which of the ways.
    pub number: usize,
    /// It only warms up.
    pub first: bool,
}

/// Runs one case: a turn to warm up, of which only what does not come to an end is kept, and the turns.
///
/// # Errors
/// Those of a move.
pub fn run(
    comparison: &'static Comparison,
    case: &Case,
    turns: u32,
    mut go: impl FnMut(&Turn) -> Result<Leg>,
) -> Result<Summary> {
    let ways = comparison.ways;
    let mut legs: Vec<(&str, Leg)> = Vec::new();
    let total = (turns as usize + 1) * ways.len();
    for n in 0..total {
        let turn = n / ways.len();
        // Each way is once the first and once the last.
        let number = (n + turn) % ways.len();
        let way = &ways[number];
        show(case, way, n, total);
        // What does not come to an end costs its limit each time: once is enough.
        if legs.iter().any(|(key, leg)| *key == way.key && !leg.finished) {
            continue;
        }
        let first = turn == 0;
        let leg = go(&Turn { number, first }).with_context(|| format!("{}, {}", case.name, way.name))?;
        if !first || !leg.finished {
            legs.push((way.key, leg));
        }
    }
    show_done();
    let summary = Summary::new(comparison, case, turns, &legs);
    // At once: what fails later must not cost what has been measured.
    println!("{}", report::markdown(std::slice::from_ref(&summary)));
    Ok(summary)
}

fn show(case: &Case, way: &Way, done: usize, total: usize) {
    if std::io::stderr().is_terminal() {
        let width = 24;
        let bar = "#".repeat(done * width / total);
        let name = format!("{}, {}", case.name, way.name);
        eprint!("\r\x1b[K  [{bar:<24}] {:>3} %  {name}", done * 100 / total);
    } else {
        eprintln!("  {}, {} of {total}: {}", case.name, done + 1, way.name);
    }
    // Only a terminal's line is incomplete.
    let _ = std::io::stderr().flush();
}

fn show_done() {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}
