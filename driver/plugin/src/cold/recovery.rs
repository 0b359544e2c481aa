//! What a crash left between two hosts, brought to an end: each journal without a session has an engine ask the other
//! host, and libvirt does what is left for it to do.
//!
//! Until then nobody starts the guest: libvirt's hook reads the same journal. One thread a daemon, and only while there is
//! something to bring to an end; it is woken by the first call after the daemon's start, and by whatever finds a journal.

use super::destination::{complete, own_it, unregister, withdraw};
use super::source::{leave, Left};
use super::{here, sessions, storage, unexpected};
use crate::awake;
use crate::engine::Engine;
use crate::libvirt::{Connection, Error, OwnedConnection};
use ferry_contract::cold::journal::{self, Journal, Role, State};
use ferry_contract::cold::{Recovered, Wish};
use ferry_contract::config::Config;
use ferry_contract::control::{Reply, Request};
use ferry_contract::session::Guest;
use ferry_host as host;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// For an engine to find the other host's, which may be on its way up itself.
const ASKED: Duration = Duration::from_secs(150);
/// The first and the longest pause between two attempts.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// Attempts without a call that wakes us: about an hour.
const ATTEMPTS: u32 = 60;

/// Guests that somebody is dealing with.
static HELD: Mutex<Option<HashSet<Uuid>>> = Mutex::new(None);

fn held() -> MutexGuard<'static, Option<HashSet<Uuid>>> {
    // A set is changed in one step.
    HELD.lock().unwrap_or_else(|e| e.into_inner())
}

/// The right to deal with a guest's migration, until this is dropped.
pub struct Hold(Uuid);

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(set) = held().as_mut() {
            set.remove(&self.0);
        }
    }
}

fn try_hold(uuid: Uuid) -> Option<Hold> {
    let is_free = held().get_or_insert_default().insert(uuid);
    // Made only where it is ours: dropped, it gives the right back.
    is_free.then(|| Hold(uuid))
}

/// The right to deal with a guest's migration.
///
/// # Errors
/// If somebody has it.
pub fn hold(uuid: Uuid) -> Result<Hold, Error> {
    try_hold(uuid)
        .ok_or_else(|| here("another migration of this guest is under way, or is being ended; try again"))
}

/// Whether a migration of this guest is written down on this host, or may be.
pub fn is_pending(uuid: Uuid) -> bool {
    let state = host::state_directory();
    state.map_or(true, |state| {
        journal::path(&state, uuid).symlink_metadata().is_ok()
    })
}

/// Whether a migration of this guest keeps it from being started: it has not been given up by both hosts.
pub fn is_fenced(uuid: Uuid) -> bool {
    let Ok(state) = host::state_directory() else {
        return true;
    };
    let fence = read(&journal::path(&state, uuid)).map(|journal| journal.fence().is_some());
    fence.unwrap_or_else(|_| is_pending(uuid))
}

/// Brings an earlier migration of this guest to an end, so that another can begin, in which this host has this role.
///
/// # Errors
/// If the other host has to be asked and does not answer.
pub fn settle(connection: Connection, role: Role, guest: &Guest, config: &Config) -> Result<(), Error> {
    let path = journal::path(&config.state_directory, guest.uuid);
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let pulled = |journal: &Journal| {
        journal.role == Role::Destination && matches!(journal.state, State::Pulling | State::Ready)
    };
    if role == Role::Destination && read(&path).is_ok_and(|journal| pulled(&journal)) {
        // A recovery would remove what the engine takes up.
        return Ok(());
    }
    match recover(connection, &path, config, Wish::Settle) {
        Ok(None) => Ok(()),
        // The other host may never come back to hear whose the guest is; that is settled without it.
        Ok(Some(_)) | Err(_) if read(&path).is_ok_and(|journal| journal.fence().is_none()) => {
            tracing::warn!(
                guest = guest.name,
                "the other host of an earlier migration has not heard how it ended: virt-ferry recover --abort there, if it waits"
            );
            Ok(())
        }
        Err(error) => Err(error),
        Ok(Some(cause)) => {
            watch(connection);
            Err(here(format!(
                "an earlier migration of guest {} has not come to its end: {cause}. It is tried again until the other host \
                 answers; virt-ferry recover {} says how it stands, and with --abort gives it up",
                guest.name, guest.name
            )))
        }
    }
}

/// Ends a guest's migration as the operator wants it.
///
/// # Errors
/// Why that cannot be done now.
pub fn by_hand(connection: Connection, uuid: Uuid, wish: Wish) -> Result<(), Error> {
    let config = host::config().map_err(here)?;
    let path = journal::path(&config.state_directory, uuid);
    let deadline = Instant::now() + ASKED;
    let _held = loop {
        match hold(uuid) {
            Ok(hold) => break hold,
            // An attempt of our own thread's.
            Err(_) if !sessions::is_under_way(uuid) && Instant::now() < deadline => {
                std::thread::sleep(PAUSES[0]);
            }
            Err(error) => return Err(error),
        }
    };
    if sessions::is_under_way(uuid) {
        return Err(here(
            "its migration is under way: virsh domjobabort GUEST at its source ends it",
        ));
    }
    if path.symlink_metadata().is_err() {
        // An attempt of our own thread's has ended it, and not as wanted where the guest is not here.
        return match wish {
            Wish::Own => connection.domain(uuid).map(drop),
            Wish::GiveUp | Wish::Settle => Ok(()),
        };
    }
    let journal = read(&path).map_err(here)?;
    let arrives = journal.role == Role::Destination;
    if wish == Wish::GiveUp && arrives && matches!(journal.state, State::Committing | State::Placed) {
        // Before its files go.
        unregister(connection, &journal.guest)?;
    }
    let open = recover(connection, &path, &config, wish)?;
    open.map_or(Ok(()), |cause| {
        Err(here(format!("that cannot be done now: {cause}")))
    })
}

/// One attempt; `Some` says why it is still open.
fn recover(
    connection: Connection,
    path: &Path,
    config: &Config,
    wish: Wish,
) -> Result<Option<String>, Error> {
    let journal = read(path).map_err(here)?;
    let engine = Engine::start(config, "cold-recover", &host::name()).map_err(here)?;
    let request = Request::ColdRecover {
        journal: path.to_owned(),
        wish,
        settings: config.settings(),
    };
    let recovered = match engine.ask(&request, Some(ASKED))? {
        Reply::ColdRecovered(recovered) => recovered,
        reply => return Err(unexpected(&reply)),
    };
    if journal.role == Role::Within {
        return storage::ending::recovered(connection, &journal, &engine, recovered);
    }
    let guest = journal.guest.name.as_str();
    match recovered {
        Recovered::Stays => tracing::warn!(guest, "an interrupted migration was ended: the guest stays here"),
        Recovered::Undone => tracing::warn!(
            guest,
            "an interrupted migration was ended: the guest did not come here"
        ),
        Recovered::Arrived => tracing::warn!(guest, "an interrupted migration was ended: the guest is here"),
        Recovered::Leaves => {
            leaves(connection, &journal, &engine)?;
            tracing::warn!(
                guest,
                "an interrupted migration was ended: the guest is the other host's"
            );
        }
        Recovered::Define => {
            if !define(connection, &journal, &engine)? {
                return Ok(Some("its former host does not answer".into()));
            }
            tracing::warn!(guest, "an interrupted migration was ended: the guest is here now");
        }
        Recovered::Unknown { cause } => return Ok(Some(cause)),
    }
    Ok(None)
}

fn leaves(connection: Connection, journal: &Journal, engine: &Engine) -> Result<(), Error> {
    let options = journal.options;
    let left = Left {
        undefine: options.undefine,
        keep: options.keep || !options.undefine,
    };
    leave(connection, &journal.guest, engine, left)
}

/// Registers a guest whose files are in their places, as far as that has not happened. Whether its former host knows.
fn define(connection: Connection, journal: &Journal, engine: &Engine) -> Result<bool, Error> {
    let registered = || {
        let known = connection.domain(journal.guest.uuid);
        let domain = match known {
            Ok(domain) if domain.get().is_persistent()? => domain,
            _ => {
                let definition = journal.definition.as_deref();
                connection.define(definition.ok_or_else(|| here("the journal holds no definition"))?)?
            }
        };
        complete(domain.get(), &journal.inventory)
    };
    registered().inspect_err(|_| withdraw(connection, engine, &journal.guest))?;
    let places: Vec<PathBuf> = journal.entries.iter().map(|entry| entry.path.clone()).collect();
    Ok(own_it(connection, engine, &journal.guest, &places))
}

fn read(path: &Path) -> Result<Journal, String> {
    host::journal(path).map_err(|why| format!("the journal {} cannot be read: {why}", path.display()))
}

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
            // A panic here must not leave the post occupied.
            let _ = std::panic::catch_unwind(|| attendance(&uri));
            attendant().runs = false;
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
    let mut attempts = 0;
    while attempts < ATTEMPTS {
        attempts += 1;
        let config = match host::config() {
            Ok(config) => config,
            Err(reason) => return tracing::warn!("interrupted migrations are not attended to: {reason}"),
        };
        attendant().called = false;
        if open(&config.state_directory).is_empty() {
            return;
        }
        // A connection of its own each time: the daemon must be able to end.
        if let Ok(connection) = OwnedConnection::open(&crate::libvirt::c_string(uri)) {
            round(connection.get(), &config);
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

/// One attempt at each journal.
fn round(connection: Connection, config: &Config) {
    for (uuid, path) in open(&config.state_directory) {
        let Some(_hold) = try_hold(uuid) else {
            continue;
        };
        match recover(connection, &path, config, Wish::Settle) {
            Ok(None) => {}
            Ok(Some(cause)) => tracing::warn!("{} stays open: {cause}", path.display()),
            Err(error) => tracing::warn!("{} stays open: {error}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_deals_with_a_guest_at_a_time() {
        let uuid = Uuid::from_u128(77);
        let first = try_hold(uuid);
        assert!(first.is_some() && try_hold(uuid).is_none());
        assert!(try_hold(Uuid::from_u128(78)).is_some());
        drop(first);
        assert!(try_hold(uuid).is_some());
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
