//! Workers of the daemon's for the guests that leave.
//!
//! A Perform holds one of the daemon's ordinary workers from the first byte to the last, so that max_workers of them (20
//! unless libvirtd.conf says otherwise) leave nobody to tell of a job or to abort one: as libvirt's own migrations do, each
//! for much longer. While many guests leave through the engine, the pool may have more workers, set as an administrator
//! would set it: by virt-admin. Not by libvirt-admin's library, whose classes are the daemon's own: loaded into it, they
//! are registered twice, which ends it (libvirt 11.3).

use ferry_host as host;
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
/// What the pool has been given for them.
static LENT: Mutex<Loan> = Mutex::new(Loan { own: 0, lent: 0 });

/// Workers of a pool.
struct Loan {
    /// Its limit without us, read before anything is lent.
    own: u32,
    /// On top of that.
    lent: u32,
}

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
            let mut loan = LENT.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = wanted(LEAVING.load(Ordering::Relaxed));
            if wanted == loan.lent {
                return;
            }
            if let Err(why) = resize(&mut loan, wanted) {
                tracing::warn!(
                    "many guests are leaving, and each takes a worker of the daemon's: set max_workers to more than \
                     leave at once, or others will have to wait. More cannot be lent: {why}"
                );
            }
        });
}

/// Lets this daemon's pool have so many workers on top of its own.
fn resize(loan: &mut Loan, wanted: u32) -> Result<(), String> {
    let program = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let daemon = program
        .file_name()
        .map(Path::new)
        .unwrap_or(&program)
        .display()
        .to_string();
    // An upgrade has replaced it.
    let daemon = daemon.trim_end_matches(" (deleted)");
    let admin = |arguments: &[&str]| {
        let mut command = Command::new("virt-admin");
        command
            .env("LC_ALL", "C")
            .args(["--connect", &format!("{daemon}:///system")])
            .args(arguments);
        let told = host::run(&mut command, ANSWER);
        told.map(|told| String::from_utf8_lossy(&told).into_owned())
            .map_err(|why| format!("virt-admin {}: {why}", arguments.join(" ")))
    };
    if loan.lent == 0 {
        let told = admin(&["server-threadpool-info", daemon])?;
        loan.own = limit(&told).ok_or("virt-admin does not tell maxWorkers")?;
    }
    // A daemon without a pool never may have one.
    if loan.own == 0 {
        return Ok(());
    }
    // Noted first: a change that was not heard of in time may have been made, and the next is made from the same limit.
    loan.lent = wanted;
    let limit = loan.own.saturating_add(wanted).to_string();
    admin(&["server-threadpool-set", daemon, "--max-workers", &limit]).map(drop)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_guests_need_nothing_and_more_are_lent_for_in_steps() {
        assert_eq!([0, STEP, STEP + 1, 2 * STEP, 20].map(wanted), [0, 0, 16, 16, 24]);
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
