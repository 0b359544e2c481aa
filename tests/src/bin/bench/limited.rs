//! A command that is called off when it takes too long.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_tests::host::Host;

/// Runs a command in a host, interrupted as by Ctrl-C at the limit; whether it came to its end by itself.
///
/// # Errors
/// What it said, where it failed.
pub fn run(host: &Host, limit: Duration, command: &[&str]) -> Result<bool> {
    ended(host.command("timeout"), limit, command)
}

/// Runs a command beside the lab, which must come to its end.
///
/// # Errors
/// What it said, where it failed.
pub fn outside(limit: Duration, command: &[&str]) -> Result<()> {
    let ended = ended(Command::new("timeout"), limit, command)?;
    ensure!(ended, "{} took longer than {limit:?}", command.join(" "));
    Ok(())
}

fn ended(mut timeout: Command, limit: Duration, command: &[&str]) -> Result<bool> {
    let output = timeout
        .args(["--signal=INT", "--kill-after=30", &limit.as_secs().to_string()])
        .args(command)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| command.join(" "))?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Ok(true),
        Some(124) => Ok(false),
        _ => anyhow::bail!(
            "{} failed ({}): {}",
            command.join(" "),
            output.status,
            said.trim()
        ),
    }
}
