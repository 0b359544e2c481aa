//! Migration measured: virt-ferry and what else there is, in turns. Started by `tests/bench`.
//!
//! ```text
//!   live  libvirt's native path, the same with --parallel, virt-ferry: `virsh migrate` of a guest that runs
//!   cold  rsync, qemu-img over NBD, scp, virt-ferry: the disks of a guest that is shut off
//!     └── turns: each way once from host1 to host2, over and over
//!           └── summary: medians ── report: Markdown ── chart: SVG ── JSON
//! ```
//!
//! All ways move the same guest in the same lab, in turns: whatever else the machine does, it does to all of them.
//! Compare ratios; milliseconds are this machine's.

mod chart;
mod cold;
mod limited;
mod live;
mod report;
mod summary;
mod turns;
mod usage;
mod way;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;

#[derive(Parser)]
#[command(
    name = "tests/bench",
    about = "Measures migration: libvirt's own live paths, or tools that copy disks, and virt-ferry, in turns",
    after_help = "Examples:\n  tests/bench --quick\n  tests/bench --json figures.json\n  tests/bench half-steady --turns 3\n  \
                  tests/bench --cold"
)]
struct Cli {
    /// The first case only, or with --cold smaller disks, in under 3 minutes
    #[arg(long)]
    quick: bool,
    /// A guest that is shut off, against rsync, qemu-img over NBD, and scp
    #[arg(long)]
    cold: bool,
    /// Writes the medians to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Turns of each case; the more, the steadier the medians
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: Option<u32>,
    /// Live cases whose names have this in them
    #[arg(conflicts_with = "cold")]
    case: Option<String>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let out = out.canonicalize().context("target/bench")?;

    let (name, summaries) = match cli.cold {
        true => ("cold.svg", cold::run(cli.quick, cli.turns)?),
        false => {
            let wanted = cli.case.as_deref().unwrap_or_default();
            ("bench.svg", live::run(cli.quick, cli.turns, wanted)?)
        }
    };

    let picture = out.join(name);
    std::fs::write(&picture, chart::render(&summaries)).with_context(|| picture.display().to_string())?;
    println!("Picture: {}", picture.display());
    if let Some(file) = cli.json {
        let json = serde_json::to_string_pretty(&summary::document(&summaries))?;
        std::fs::write(&file, json + "\n").with_context(|| file.display().to_string())?;
        println!("Figures: {}", file.display());
    }
    Ok(())
}
