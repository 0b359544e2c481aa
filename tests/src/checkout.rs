//! This checkout: its files, and the programs that look at them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::skipped;

/// Its directory.
pub fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What a file of it says.
///
/// # Errors
/// If it cannot be read.
pub fn text(path: &str) -> Result<String> {
    fs::read_to_string(checkout().join(path)).with_context(|| path.to_owned())
}

/// All files below a directory, from there.
///
/// # Errors
/// If it cannot be listed.
pub fn files(directory: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            match path.is_dir() {
                true => open.push(path),
                false => found.push(path.strip_prefix(directory)?.display().to_string()),
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a program is there; if not, the test that needs it is skipped.
pub fn there_is(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        skipped(&format!("{program} is not installed (Debian: {package})"));
    }
    found
}
