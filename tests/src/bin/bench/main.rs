//! Live migration measured: libvirt's native path, the same with `--parallel`, and virt-ferry. Started by `tests/bench`.
//!
//! ```text
//!   case ── a guest and a link        leg ── one `virsh migrate`, watched from the guest, the switch and /proc
//!     └── turns: each path once from host1 to host2, and back by virt-ferry
//!           └── summary: medians ── report: Markdown ── chart: SVG ── JSON
//! ```
//!
//! All paths move the same guest in the same lab, in turns: whatever else the machine does, it does to all of them.
//! Compare ratios; milliseconds are this machine's.

mod case;
mod chart;
mod leg;
mod report;
mod summary;
mod usage;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::Scene;

use case::{Case, Route, CASES};
use leg::Leg;
use summary::Summary;

/// The guest's number in the guests' network.
const NUMBER: u8 = 1;

#[derive(Parser)]
#[command(
    name = "tests/bench",
    about = "Measures live migration: native, native --parallel and virt-ferry, in turns",
    after_help = "Examples:\n  tests/bench --quick\n  tests/bench --json figures.json\n  tests/bench half-steady --turns 3"
)]
struct Cli {
    /// The first case only, in under 3 minutes
    #[arg(long)]
    quick: bool,
    /// Writes the medians to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Turns of each case; the more, the steadier the medians
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: Option<u32>,
    /// Cases whose names have this in them
    case: Option<String>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let out = out.canonicalize().context("target/bench")?;

    let wanted = cli.case.as_deref().unwrap_or_default();
    let cases = CASES.iter().take(if cli.quick { 1 } else { CASES.len() });
    let mut summaries = Vec::new();
    for case in cases.filter(|case| case.name.contains(wanted)) {
        let turns = cli.turns.unwrap_or(if cli.quick { 2 } else { case.turns });
        let summary = Lab::with(Options::default(), |lab| run(lab, case, turns))?;
        println!("{}", report::markdown(&summary));
        summaries.push(summary);
    }

    let picture = out.join("bench.svg");
    std::fs::write(&picture, chart::render(&summaries)).with_context(|| picture.display().to_string())?;
    println!("Picture: {}", picture.display());
    if let Some(file) = cli.json {
        let json = serde_json::to_string_pretty(&summary::document(&summaries))?;
        std::fs::write(&file, json + "\n").with_context(|| file.display().to_string())?;
        println!("Figures: {}", file.display());
    }
    Ok(())
}

/// Runs one case: a turn to warm up, of which only what does not come to an end is kept, and the turns.
fn run(lab: &Lab, case: &'static Case, turns: u32) -> Result<Summary> {
    let scene = Scene::start(lab, lab.host(1), (case.guest)(), NUMBER)?;
    let listener = lab.witness()?;
    let (one, two) = (lab.host(1), lab.host(2));
    let mut legs: Vec<Leg> = Vec::new();
    let routes = Route::ALL.len() as u32;
    for n in 0..(turns + 1) * routes {
        let turn = n / routes;
        // Each path is once the first and once the last.
        let route = Route::ALL[((n + turn) % routes) as usize];
        show(case, route, n, (turns + 1) * routes);
        // What does not come to an end costs its limit each time: once is enough.
        if legs.iter().any(|leg| leg.route == route && !leg.finished) {
            continue;
        }
        let slow = case.link_mbit.map(|mbit| Slow::to(lab, two, mbit)).transpose()?;
        let leg = leg::run(&scene, listener, one, two, route, case.limit)
            .with_context(|| format!("{}, {}", case.name, route.name()))?;
        drop(slow);
        if leg.finished {
            // Always by the same way, so that each path finds the guest as the others do.
            two.configure(Route::Ferry.configuration())?;
            one.configure(Route::Ferry.configuration())?;
            scene.move_to(two, one, &[])?;
        }
        if turn > 0 || !leg.finished {
            legs.push(leg);
        }
    }
    show_done();
    Ok(Summary::new(case, turns, &legs))
}

fn show(case: &Case, route: Route, done: u32, total: u32) {
    if std::io::stderr().is_terminal() {
        let width = 24;
        let bar = "#".repeat((done * width / total) as usize);
        let name = format!("{}, {}", case.name, route.name());
        eprint!("\r\x1b[K  [{bar:<24}] {:>3} %  {name}", done * 100 / total);
    } else {
        eprintln!("  {}, {} of {total}: {}", case.name, done + 1, route.name());
    }
    // Only a terminal's line is incomplete.
    let _ = std::io::stderr().flush();
}

fn show_done() {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}
