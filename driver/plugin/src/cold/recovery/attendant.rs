//! The daemon's thread that attends to journals without a session: one, and only while there is something to bring to an end; it is
//! woken by the first call after the daemon's start, and by whatever finds a journal.

use super::attempt::{recover, Standing};
use super::hold::try_hold;
use super::read;
use crate::awake;
use crate::cold::sessions;
use crate::libvirt::{c_string, Connection, OwnedConnection};
use ferry_contract::cold::journal;
use ferry_contract::cold::Wish;
use ferry_contract::config::Config;
use ferry_host as host;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, Once};
use std::time::Duration;
use uuid::Uuid;

/// The first and the longest pause between two attempts.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// Attempts without a call that wakes us: about an hour.
const ATTEMPTS: u32 = 60;

/// Journals of guests that nobody deals with.
fn open(state_directory: &Path) -> Vec<(Uuid, PathBuf)> {
    let directory = state_directory.join(journal::DIRECTORY);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if let Some(uuid) = journal::guest(&path) {
            if !sessions::is_under_way(uuid) {
                found.push((uuid, path));
            }
        }
    }
    found
}

/// The thread that attends to journals: whether it runs, and whether it is to look at once.
#[derive(Default)]
struct Attendant {
    runs: bool,
    called: bool,
}

static ATTENDANT: Mutex<Attendant> = Mutex::new(Attendant {
    runs: false,
    called: false,
});
static CALLED: Condvar = Condvar::new();

fn attendant() -> MutexGuard<'static, Attendant> {
    // Two flags, each written in one step.
    ATTENDANT.lock().unwrap_or_else(|e| e.into_inner())
}

/// Looks at the journals in the background, now and until all are brought to an end.
pub fn watch(connection: Connection) {
    if let Some(uri) = connection.uri() {
        attend(uri);
    }
}

/// At the first call after the daemon's start: an earlier one may have left something.
pub fn at_first_call() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Where it cannot be known, the hook says so at a guest's start.
        if host::state_directory().is_ok_and(|state| !open(&state).is_empty()) {
            attend("qemu:///system".into());
        }
    });
}

fn attend(uri: String) {
    let mut state = attendant();
    state.called = true;
    CALLED.notify_all();
    if state.runs {
        return;
    }
    let started = std::thread::Builder::new()
        .name("ferry-recovery".into())
        .spawn(move || {
            loop {
                // A panic here must not leave the post occupied.
                let ended = std::panic::catch_unwind(|| attendance(&uri));
                let mut state = attendant();
                // Whoever has called since the last look has found the post occupied, and waits for another one.
                if ended.is_err() || !state.called {
                    state.runs = false;
                    return;
                }
            }
        });
    match started {
        Ok(_) => state.runs = true,
        Err(error) => tracing::warn!("interrupted migrations are not attended to: {error}"),
    }
}

fn attendance(uri: &str) {
    // Also between attempts, when nobody calls: for about an hour.
    let _awake = awake::stay();
    let [mut pause, longest] = PAUSES;
    let (mut attempts, mut news) = (0, News::default());
    while attempts < ATTEMPTS {
        attempts += 1;
        attendant().called = false;
        let config = match host::config() {
            Ok(config) => config,
            Err(reason) => return tracing::warn!("interrupted migrations are not attended to: {reason}"),
        };
        if open(&config.state_directory).is_empty() {
            return;
        }
        // A connection of its own each time: the daemon must be able to end.
        if let Ok(connection) = OwnedConnection::open(&c_string(uri)) {
            round(connection.get(), &config, &mut news);
        }
        if open(&config.state_directory).is_empty() {
            return;
        }
        let (state, _) = CALLED
            .wait_timeout_while(attendant(), pause, |state| !state.called)
            .unwrap_or_else(|e| e.into_inner());
        pause = (pause * 2).min(longest);
        if state.called {
            (attempts, pause) = (0, PAUSES[0]);
        }
    }
    tracing::error!(
        "an interrupted migration is still open, and is not tried again by itself: virt-ferry recover"
    );
}

/// What was last told of each guest: an attempt that ends as the one before is no news.
#[derive(Default)]
struct News(HashMap<Uuid, String>);

impl News {
    fn is(&mut self, uuid: Uuid, said: &str) -> bool {
        self.0.insert(uuid, said.to_owned()).as_deref() != Some(said)
    }
}

/// One attempt at each journal.
fn round(connection: Connection, config: &Config, news: &mut News) {
    for (uuid, path) in open(&config.state_directory) {
        let Some(_hold) = try_hold(uuid) else {
            continue;
        };
        let guest = read(&path).map_or_else(|_| path.display().to_string(), |journal| journal.guest.name);
        let said = match recover(connection, &path, config, Wish::Settle) {
            Ok(Standing::Ended(how)) => how.to_owned(),
            Ok(Standing::Open(cause)) => format!("it stays open, and is tried again: {cause}"),
            Err(error) => format!("it stays open, and is tried again: {error}"),
        };
        if news.is(uuid, &said) {
            tracing::warn!(guest, "{said}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_change_is_news() {
        let (mut news, uuid) = (News::default(), Uuid::from_u128(7));
        assert!(news.is(uuid, "silent") && !news.is(uuid, "silent"));
        assert!(news.is(Uuid::from_u128(8), "silent"));
        assert!(news.is(uuid, "it answers") && news.is(uuid, "silent"));
    }

    #[test]
    fn only_journals_are_open() {
        let state = std::env::temp_dir().join(format!("ferry-journals-{}", std::process::id()));
        let directory = state.join(journal::DIRECTORY);
        std::fs::create_dir_all(&directory).unwrap();
        assert_eq!(open(&state), []);
        let uuid = Uuid::from_u128(5);
        for name in [
            format!("{uuid}.json"),
            format!("{uuid}.json.new"),
            "x.json".into(),
        ] {
            std::fs::write(directory.join(name), "{}").unwrap();
        }
        assert_eq!(open(&state), [(uuid, journal::path(&state, uuid))]);
        std::fs::remove_dir_all(&state).unwrap();
    }
}
