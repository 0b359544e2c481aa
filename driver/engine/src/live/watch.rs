//! The private monitor, shared: commands from any thread, and QEMU's events noted the moment they come.

use super::signals::{End, Seen, Signals};
use super::Error;
use crate::qemu::monitor::{Event, Monitor, MonitorError};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// For commands that QEMU answers at once; its main loop may be held up by a slow disk.
pub const COMMAND: Duration = Duration::from_secs(30);

/// Events noted at a time: a QEMU that floods us must not keep the monitor for itself.
const MOST_EVENTS: usize = 4096;

/// A QEMU under watch.
pub struct Watch {
    monitor: Mutex<Monitor>,
    signals: Arc<Signals>,
}

impl Watch {
    /// Connects to the private monitor and begins to note its events.
    pub fn open(path: &Path, signals: Arc<Signals>) -> Result<Arc<Self>, Error> {
        let mut monitor = Monitor::connect(path, deadline(COMMAND))?;
        // Also while a command waits: QEMU answers none while it writes device state, and says before that it will.
        let noted = Arc::clone(&signals);
        monitor.listen(move |event| note(&noted, event));
        let descriptor = monitor
            .as_fd()
            .try_clone_to_owned()
            .map_err(Error::system("watch QEMU's monitor"))?;
        let watch = Arc::new(Self {
            monitor: Mutex::new(monitor),
            signals,
        });
        let pump = Arc::downgrade(&watch);
        let run = move || {
            while let Some(watch) = wait_readable(&descriptor).then(|| pump.upgrade()).flatten() {
                if let Err(error) = watch.command(|_| Ok(())) {
                    // On the source after the guest has moved, and on either side when QEMU dies.
                    watch.signals.saw(|seen| seen.gone = true);
                    watch.signals.end(End::Failed(error.to_string()));
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("events".into()).spawn(run);
        thread.map_err(Error::system("start a thread"))?;
        Ok(watch)
    }

    /// Runs commands on the monitor, then notes the events that came with the answers.
    pub fn command<T>(&self, run: impl FnOnce(&mut Monitor) -> Result<T, MonitorError>) -> Result<T, Error> {
        let mut monitor = self.lock();
        let result = run(&mut monitor)?;
        monitor.hear(MOST_EVENTS)?;
        Ok(result)
    }

    /// Notes what QEMU has said so far; false where another thread has the monitor, which notes it while it waits.
    pub fn hear(&self) -> Result<bool, Error> {
        match self.monitor.try_lock() {
            Ok(mut monitor) => monitor.hear(MOST_EVENTS).map(|()| true).map_err(Error::from),
            Err(_) => Ok(false),
        }
    }

    /// Waits until no block I/O is in flight: QEMU's answer to an empty transaction (QEMU 7.2 to 10.0, `blockdev.c`).
    /// A slow disk is waited for, one that does not answer is not, and neither is a migration that ends. Once QEMU has
    /// stopped the guest, and has drained for that, its answer is not waited for either: it may not answer before its
    /// device state is read, which waits for the last copy. Nor is a thread that has asked it something, or either once the
    /// migration has ended.
    pub fn drain(&self) -> Result<Duration, Error> {
        let began = Instant::now();
        // QEMU queues 8 commands of a monitor: each slice asks anew, and the answer to the first answers all.
        let drained = || self.signals.seen().drained.is_some();
        let moot = || drained() || self.signals.check().is_err();
        for slice in [1, 2, 4, 8, 16, 32, 64] {
            self.signals.check()?;
            let end = deadline(Duration::from_secs(slice));
            let asked = match self.lock_unless(end, moot) {
                Some(mut monitor) => monitor.drain(end, moot),
                None if drained() => return Ok(began.elapsed()),
                None => continue,
            };
            match asked {
                Err(MonitorError::Timeout { .. }) if drained() => return Ok(began.elapsed()),
                Err(MonitorError::Timeout { .. }) => {}
                outcome => return Ok(outcome.map(|()| began.elapsed())?),
            }
        }
        Err(Error::Elsewhere(format!(
            "the guest's disk I/O in flight did not end within {} s; is its storage reachable?",
            began.elapsed().as_secs()
        )))
    }

    /// Whether QEMU answers within so long. It does not while it writes device state, nor while it waits for block I/O: its
    /// main loop then waits for its big lock.
    pub fn answers(&self, limit: Duration) -> Result<bool, Error> {
        let end = deadline(limit);
        // A thread that has the monitor waits for an answer, too.
        let Some(mut monitor) = self.lock_unless(end, || false) else {
            return Ok(false);
        };
        match monitor.migration_status(end) {
            Ok(_) => Ok(true),
            Err(MonitorError::Timeout { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether QEMU's own migration is still before its switch-over.
    pub fn before_switchover(&self) -> Result<bool, Error> {
        use crate::qemu::MigrationStatus::{Active, Setup};
        let status = self.command(|monitor| monitor.migration_status(deadline(COMMAND)))?;
        Ok(matches!(status, Setup | Active))
    }

    /// Turns x-ignore-shared on, which QEMU accepts while it does not migrate.
    pub fn ignore_shared(&self) -> Result<(), Error> {
        self.command(|monitor| monitor.set_ignore_shared(true, deadline(COMMAND)))
    }

    /// Turns it off: a save while it is on would have no RAM in it. Waits for QEMU's migration to end, and for
    /// libvirt to end it.
    pub fn honour_shared(&self, limit: Duration) -> Result<(), Error> {
        let end = deadline(limit);
        loop {
            match self.command(|monitor| monitor.set_ignore_shared(false, end)) {
                Err(Error::Monitor(MonitorError::Refused { .. })) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                outcome => return outcome,
            }
        }
    }

    fn lock_unless(&self, end: Instant, moot: impl Fn() -> bool) -> Option<MutexGuard<'_, Monitor>> {
        while !moot() && Instant::now() < end {
            if let Ok(monitor) = self.monitor.try_lock() {
                return Some(monitor);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, Monitor> {
        self.monitor.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn note(signals: &Signals, event: &Event) {
    let now = Instant::now();
    let status = event
        .data
        .get("status")
        .and_then(|status| status.as_str())
        .unwrap_or_default();
    tracing::trace!(event = event.name, status, "from QEMU");
    signals.saw(|seen| saw(seen, &event.name, status, now));
}

/// What an event, with its status where it has one, adds to what has been seen.
fn saw(seen: &mut Seen, event: &str, status: &str, now: Instant) {
    match (event, status) {
        ("STOP", _) => seen.stopped = seen.stopped.or(Some(now)),
        // Of a guest that was suspended while its memory moved, the pause that counts is still to come.
        ("RESUME", _) => (seen.stopped, seen.resumed) = (None, Some(now)),
        ("MIGRATION", "setup" | "active") => seen.migrating = true,
        ("MIGRATION", "pre-switchover") => seen.drained = seen.drained.or(Some(now)),
        ("MIGRATION", "device") => seen.switched = seen.switched.or(Some(now)),
        ("MIGRATION", "completed") => seen.completed = Some(now),
        ("MIGRATION", "failed" | "cancelled") => seen.failed = true,
        _ => {}
    }
}

/// Waits a little for something to read; also true when nothing came, so that the caller looks whether it is
/// still wanted. False where the descriptor is of no use.
fn wait_readable(descriptor: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
    match poll(&mut polled, PollTimeout::from(500u16)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => true,
        Err(_) => false,
    }
}

/// A time limit from now.
pub fn deadline(limit: Duration) -> Instant {
    Instant::now() + limit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_the_last_one() {
        let (mut seen, began) = (Seen::default(), Instant::now());
        let at = |minute: u64| began + Duration::from_secs(60 * minute);
        saw(&mut seen, "STOP", "", at(1));
        saw(&mut seen, "RESUME", "", at(5));
        assert_eq!((seen.stopped, seen.resumed), (None, Some(at(5))));
        saw(&mut seen, "STOP", "", at(6));
        // QEMU says so again of a guest that stands still already.
        saw(&mut seen, "STOP", "", at(7));
        saw(&mut seen, "MIGRATION", "pre-switchover", at(8));
        assert_eq!((seen.stopped, seen.drained), (Some(at(6)), Some(at(8))));
    }
}
