//! Workers of the daemon's for the guests that leave.
//!
//! A Perform holds one of the daemon's ordinary workers from the first byte to the last, so that max_workers of them (20
//! unless libvirtd.conf says otherwise) leave nobody to tell of a job or to abort one: as libvirt's own migrations do, each
//! for much longer. While many guests leave through the engine, the pool may have more workers, set as an administrator
//! would set it: by virt-admin. Not by libvirt-admin's library, whose classes are the daemon's own: loaded into it, they
//! are registered twice, which ends it (libvirt 11.3).

use crate::engine::{run, RunError};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// So many guests may leave before the daemon is lent anything, and then as many at a time: each change is two commands.
const STEP: u32 = 8;
/// For virt-admin to be answered.
const ANSWER: Duration = Duration::from_secs(10);

/// Guests that are leaving.
static LEAVING: AtomicU32 = AtomicU32::new(0);
/// Workers that the pool has been given for them.
static LENT: Mutex<u32> = Mutex::new(0);

/// A guest that is leaving, for as long as this lives.
pub struct Leaving(());

/// A guest is leaving. The pool is told soon, on a thread of its own: no migration waits for it.
pub fn leaving() -> Leaving {
    settle(LEAVING.fetch_add(1, Ordering::Relaxed) + 1);
    Leaving(())
}

impl Drop for Leaving {
    fn drop(&mut self) {
        settle(LEAVING.fetch_sub(1, Ordering::Relaxed) - 1);
    }
}

/// What the pool needs on top of its own.
fn wanted(leaving: u32) -> u32 {
    match leaving {
        0..=STEP => 0,
        _ => leaving.next_multiple_of(STEP),
    }
}

fn settle(leaving: u32) {
    if wanted(leaving) == wanted(leaving.saturating_sub(1)) && wanted(leaving) == wanted(leaving + 1) {
        return;
    }
    // Without the thread the pool stays as it is, as it is without us.
    let _ = std::thread::Builder::new()
        .name("ferry-workers".into())
        .spawn(|| {
            // Held while the daemon answers, but only threads like this one want it.
            let mut lent = LENT.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = wanted(LEAVING.load(Ordering::Relaxed));
            if wanted == *lent {
                return;
            }
            match resize(i64::from(wanted) - i64::from(*lent)) {
                Ok(()) => *lent = wanted,
                Err(why) => tracing::warn!(
                    "many guests are leaving, and each takes a worker of the daemon's: set max_workers to more than \
                     leave at once, or others will have to wait. More cannot be lent: {why}"
                ),
            }
        });
}

/// Lets this daemon's pool have so many workers more, or fewer.
fn resize(change: i64) -> Result<(), String> {
    let program = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let daemon = program
        .file_name()
        .map(Path::new)
        .unwrap_or(&program)
        .display()
        .to_string();
    let admin = |arguments: &[&str]| {
        let mut command = Command::new("virt-admin");
        command
            .env("LC_ALL", "C")
            .args(["--connect", &format!("{daemon}:///system")])
            .args(arguments);
        run(&mut command, ANSWER).map_err(|error| match error {
            RunError::Start(error) => format!("cannot start virt-admin: {error}"),
            RunError::Ended(how) => format!("virt-admin {}: {how}", arguments.join(" ")),
        })
    };
    let told = admin(&["server-threadpool-info", &daemon])?;
    let limit = limit(&told).ok_or("virt-admin does not tell maxWorkers")?;
    match resized(limit, change) {
        Some(wanted) => {
            let wanted = wanted.to_string();
            admin(&["server-threadpool-set", &daemon, "--max-workers", &wanted]).map(drop)
        }
        None => Ok(()),
    }
}

/// The limit among the lines of `virt-admin server-threadpool-info`.
fn limit(told: &str) -> Option<u32> {
    let of = |line: &str| {
        line.trim()
            .strip_prefix("maxWorkers")?
            .trim_start()
            .strip_prefix(':')?
            .trim()
            .parse()
            .ok()
    };
    told.lines().find_map(of)
}

/// The pool's new limit. One of 0 has no pool, and never may have.
fn resized(limit: u32, change: i64) -> Option<u32> {
    let wanted = u32::try_from(i64::from(limit) + change).unwrap_or(1).max(1);
    (limit > 0 && wanted != limit).then_some(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_guests_need_nothing_and_more_are_lent_for_in_steps() {
        assert_eq!([0, STEP, STEP + 1, 2 * STEP, 20].map(wanted), [0, 0, 16, 16, 24]);
    }

    #[test]
    fn a_pool_grows_and_shrinks_and_never_vanishes() {
        assert_eq!(resized(20, 3), Some(23));
        assert_eq!(resized(23, -3), Some(20));
        assert_eq!(resized(20, 0), None);
        assert_eq!(resized(2, -3), Some(1));
        assert_eq!(resized(0, 3), None);
    }

    #[test]
    fn virt_admin_tells_the_limit() {
        // libvirt 11.3.
        let told = "minWorkers     : 5\nmaxWorkers     : 20\nnWorkers       : 6\n";
        assert_eq!(limit(told), Some(20));
        assert_eq!(limit("maxWorkers     : many\n"), None);
        assert_eq!(limit(""), None);
    }
}
