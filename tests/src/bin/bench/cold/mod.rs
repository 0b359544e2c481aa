//! Cold migration: the disks of a guest that is shut off, by rsync, qemu-img over NBD, scp, and virt-ferry.
//!
//! All of them begin with the source's disks on the disk only, none of them in the page cache, and all of them end with
//! the copies on the destination's disk: whoever deletes the source has to know that.

mod disks;
mod route;

use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::timeline::Role;

use crate::summary::Summary;
use crate::turns::{self, Turn};
use crate::usage::{children_cpu_seconds, cpu_seconds, link_bytes};
use crate::way::{figure, Case, Comparison, Figure, Leg};
use disks::Disks;
use route::{Route, Servers};

/// The guest.
const GUEST: &str = "measured";

static COMPARISON: Comparison = Comparison {
    ways: &[
        Route::ALL[0].way(),
        Route::ALL[1].way(),
        Route::ALL[2].way(),
        Route::ALL[3].way(),
    ],
    figures: &FIGURES,
};

const FIGURES: [Figure; 6] = [
    figure("total_ms", "total time, until it is on the disk", "s", 1000.0),
    figure("command_ms", "until the command ends", "s", 1000.0),
    figure("wire_bytes", "on the wire", "MiB", 1048576.0),
    figure("source_cpu_s", "CPU, source", "s", 1.0),
    figure("destination_cpu_s", "CPU, destination", "s", 1.0),
    figure(
        "allocated_ratio",
        "taken up, of what the source's take up",
        "",
        1.0,
    ),
];

/// What a guest's disks are like, in MiB.
#[derive(Clone, Copy)]
pub struct Sizes {
    /// The guest sees a qcow2 image of this size, whose file is as long and sparse...
    pub image: u64,
    /// ... and this much of it in use.
    pub data: u64,
    /// A raw file, full.
    pub raw: u64,
}

const LIMIT: Duration = Duration::from_secs(600);

const FULL: (Sizes, Case) = (
    Sizes {
        image: 20 << 10,
        data: 4 << 10,
        raw: 2 << 10,
    },
    Case {
        name: "shut-off",
        what: "a sparse qcow2 file of 20 GiB, 4 GiB of it data, and a raw file of 2 GiB",
        turns: 5,
        limit: LIMIT,
    },
);

const QUICK: (Sizes, Case) = (
    Sizes {
        image: 4 << 10,
        data: 768,
        raw: 384,
    },
    Case {
        name: "shut-off-quick",
        what: "a sparse qcow2 file of 4 GiB, 768 MiB of it data, and a raw file of 384 MiB",
        turns: 2,
        limit: LIMIT,
    },
);

/// Measures the guest's move.
///
/// # Errors
/// If there is no room for the disks, a tool is missing, or a copy is not like its source.
pub fn run(quick: bool, turns: Option<u32>) -> Result<Vec<Summary>> {
    let (sizes, case) = if quick { QUICK } else { FULL };
    let turns = turns.unwrap_or(case.turns);
    let measured = Lab::with(Options::default(), |lab| measure(lab, sizes, &case, turns));
    Ok(vec![measured?])
}

fn measure(lab: &Lab, sizes: Sizes, case: &Case, turns: u32) -> Result<Summary> {
    let servers = Servers::start(lab)?;
    let disks = Disks::make(lab, sizes)?;
    turns::run(&COMPARISON, case, turns, |turn| {
        let leg = leg(lab, &servers, &disks, case, turn)?;
        disks.forget_copies()?;
        Ok(leg)
    })
}

/// One copy, and what it took.
fn leg(lab: &Lab, servers: &Servers<'_>, disks: &Disks<'_>, case: &Case, turn: &Turn) -> Result<Leg> {
    let (one, two) = (lab.host(1), lab.host(2));
    let route = Route::ALL[turn.number];
    servers.ready(route)?;
    disks.forget_cache()?;
    let bytes = link_bytes(lab, two)?;
    let (source, destination) = (cpu_seconds(one)?, cpu_seconds(two)?);
    // The command that is run there, counted where it runs.
    let command = children_cpu_seconds()?;

    let start = Instant::now();
    let finished = servers.copy(route, case.limit)?;
    let command_ms = start.elapsed().as_secs_f64() * 1000.0;
    if finished {
        disks.sync_copies()?;
    }
    let total_ms = start.elapsed().as_secs_f64() * 1000.0;

    let command = children_cpu_seconds()? - command;
    let (at_source, at_destination) = match route {
        Route::Ferry => (command, 0.0),
        Route::Rsync | Route::Nbd | Route::Scp => (0.0, command),
    };
    let seen = Seen {
        finished,
        total_ms,
        command_ms,
        wire_bytes: link_bytes(lab, two)? - bytes,
        source_cpu_s: cpu_seconds(one)? - source + at_source,
        destination_cpu_s: cpu_seconds(two)? - destination + at_destination,
        allocated: disks.allocated()?,
        allocated_copies: disks.allocated_copies()?,
    };
    if finished && turn.first {
        disks.compare(case.limit)?;
    }
    if route == Route::Ferry {
        let record = one.last_cold_record(Role::Source)?;
        ensure!(record.encryption.is_some(), "virt-ferry did not encrypt");
    }
    Ok(seen.into_leg())
}

/// What was seen of one copy.
#[derive(Default)]
struct Seen {
    finished: bool,
    /// Until the copies were on the disk.
    total_ms: f64,
    /// Until the command said that it is done.
    command_ms: f64,
    /// Both ways.
    wire_bytes: u64,
    /// CPU seconds of all processes.
    source_cpu_s: f64,
    destination_cpu_s: f64,
    /// Bytes that the disks take up at the source, and their copies.
    allocated: u64,
    allocated_copies: u64,
}

impl Seen {
    fn into_leg(self) -> Leg {
        Leg {
            finished: self.finished,
            figures: vec![
                ("total_ms", self.total_ms),
                ("command_ms", self.command_ms),
                ("wire_bytes", self.wire_bytes as f64),
                ("source_cpu_s", self.source_cpu_s),
                ("destination_cpu_s", self.destination_cpu_s),
                ("allocated_source_bytes", self.allocated as f64),
                ("allocated_destination_bytes", self.allocated_copies as f64),
                (
                    "allocated_ratio",
                    self.allocated_copies as f64 / self.allocated as f64,
                ),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_seen() {
        let seen = Seen::default().into_leg();
        for figure in FIGURES {
            assert!(
                seen.figures.iter().any(|(key, _)| *key == figure.key),
                "{}",
                figure.key
            );
        }
    }

    #[test]
    fn the_whole_comparison_fits_where_it_says() {
        let needed = disks::room(FULL.0);
        assert!((26 << 30..36 << 30).contains(&needed), "{needed}");
    }
}
