//! The C functions we define in libvirt's place, and the one border every call crosses.
//!
//! Each body converts pointers, asks the room that decides, and converts back. A panic behind the border becomes
//! a libvirt error of this one call.

mod define;
mod event;
mod exec;
mod job;
mod kill;
mod migration;
mod native;
mod open;
mod save;
mod start;

use crate::libvirt::Error;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;

/// Runs what is behind the border; `failure` is what C gets where it fails, the thread's libvirt error set.
fn border<T>(failure: T, decide: impl FnOnce() -> Result<T, Error>) -> T {
    guarded(failure, || {
        crate::cold::recovery::at_first_call();
        decide()
    })
}

/// [`border`] for what comes before the daemon has become one: a thread that is started then is lost.
fn guarded<T>(failure: T, decide: impl FnOnce() -> Result<T, Error>) -> T {
    let decided = catch_unwind(AssertUnwindSafe(|| {
        speak_up();
        decide().map_err(Error::raise)
    }));
    match decided {
        Ok(Ok(value)) => value,
        Ok(Err(())) => failure,
        Err(_) => {
            // Raising an error may panic as well where the cause was, say, the log.
            let _ = catch_unwind(|| {
                Error::failed("a defect in the plug-in was caught; see the daemon's log").raise()
            });
            failure
        }
    }
}

/// The plug-in logs to the daemon's standard error: the journal, where systemd runs it.
fn speak_up() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let filter = tracing_subscriber::EnvFilter::try_from_env("VIRT_FERRY_LOG");
        let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_writer(std::io::stderr);
        // A second plug-in in this process could have set one; ours then logs through it.
        let _ = subscriber.try_init();
    });
}
