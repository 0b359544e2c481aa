//! Waiting for a condition: bounded, and never for a fixed time.

use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

/// How often a condition is looked at: short beside what a person notices, long beside what looking costs.
const INTERVAL: Duration = Duration::from_millis(20);

/// Calls `condition` until it gives a value, which is returned.
///
/// `what` completes the sentence "waited in vain for …".
///
/// # Errors
/// `condition`'s own error at once, or one naming `what` when `limit` has passed.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = condition().with_context(|| format!("while waiting for {what}"))? {
            return Ok(value);
        }
        if Instant::now() >= end {
            bail!("waited {limit:?} in vain for {what}");
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Calls `condition` until it is true; otherwise as [`wait_for`].
///
/// # Errors
/// As [`wait_for`].
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_for(what, limit, || Ok(condition()?.then_some(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_value_once_it_is_there() {
        let mut calls = 0;
        let got = wait_for("three calls", Duration::from_secs(10), || {
            calls += 1;
            Ok((calls == 3).then_some(calls))
        });
        assert_eq!(got.unwrap(), 3);
    }

    #[test]
    fn gives_up_and_names_what_it_waited_for() {
        let error = wait_until("the moon", Duration::ZERO, || Ok(false)).unwrap_err();
        assert!(error.to_string().contains("in vain for the moon"), "{error}");
    }

    #[test]
    fn an_error_ends_the_wait() {
        let error = wait_until("x", Duration::from_secs(10), || bail!("broken")).unwrap_err();
        assert!(format!("{error:#}").contains("broken"), "{error:#}");
    }
}
