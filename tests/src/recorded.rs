//! The timelines that the engines leave on a host.

use std::fs;

use anyhow::{Context, Result};
use ferry_engine::report::{self, Timeline};

use crate::host::Host;

/// All timelines on a host, the oldest first.
///
/// # Errors
/// If one cannot be read.
pub fn timelines(host: &Host) -> Result<Vec<Timeline>> {
    let directory = host.logs().join("virt-ferry");
    let mut found = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            found.push(report::load(&path)?);
        }
    }
    found.sort_by_key(|timeline: &Timeline| timeline.monotonic_base_us);
    Ok(found)
}
