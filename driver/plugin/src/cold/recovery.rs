//! What a crash left between two hosts, brought to an end: each journal without a session has an engine ask the other
//! host, and libvirt does what is left for it to do.
//!
//! Until then nobody starts the guest: libvirt's hook reads the same journal. One thread a daemon, and only while there is
//! something to bring to an end; it is woken by the first call after the daemon's start, and by whatever finds a journal.

use super::destination::{complete, own_it, unregister, withdraw};
use super::sessions::Session;
use super::source::{leave, Left};
use super::{durable, ghost, here, inventory, sessions, storage, unexpected};
use crate::awake;
use crate::engine::Engine;
use crate::libvirt::{Connection, Error, OwnedConnection};
use ferry_contract::cold::journal::{self, Entry, Fate, Journal, Role, State};
use ferry_contract::cold::{Kept, Recovered, Wish};
use ferry_contract::config::Config;
use ferry_contract::control::{Reply, Request};
use ferry_contract::session::Guest;
use ferry_host as host;
use std::collections::{HashMap, HashSet};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// For an engine to find the other host's, which may be on its way up itself.
const ASKED: Duration = Duration::from_secs(150);
/// How long an attempt of our own thread's takes where the other host does not answer, and a little more.
const ATTEMPT: Duration = Duration::from_secs(60);
/// The first and the longest pause between two attempts.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// How long a host that is said to be lost is given to show that it is not: to a migration that is at its end.
const LAST_WORD: Duration = Duration::from_secs(10);
/// Between two looks whether a migration that was told to end has.
const LOOK: Duration = Duration::from_millis(200);
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

/// As [`hold`], once an attempt of our own thread's at an earlier one has ended: the source that it asks may have come with
/// this migration.
///
/// # Errors
/// As with [`hold`].
pub fn hold_soon(uuid: Uuid) -> Result<Hold, Error> {
    let deadline = Instant::now() + ATTEMPT;
    loop {
        match hold(uuid) {
            Err(_) if !sessions::is_under_way(uuid) && Instant::now() < deadline => std::thread::sleep(LOOK),
            outcome => return outcome,
        }
    }
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

/// How a guest that is to leave stands by its journal, which is large, and seldom another one.
#[derive(Debug, Default)]
pub struct Departing {
    /// What tells it from the next one.
    file: Option<(u64, i64, i64, u64)>,
    /// Whether something keeps the guest from being started here.
    pub is_fenced: bool,
    /// Whether it has left, and only its end here is missing.
    pub has_left: bool,
}

impl Departing {
    /// Looks again; reads only what it has not read.
    pub fn look(&mut self, uuid: Uuid) {
        let is_leaving = |journal: &Journal| {
            let has_left = (journal.role, journal.state) == (Role::Source, State::OwnedThere);
            (journal.fence().is_some(), has_left)
        };
        match host::state_directory() {
            Ok(state) => self.look_at(&journal::path(&state, uuid), |path| {
                read(path).as_ref().map(is_leaving).ok()
            }),
            Err(_) => (self.is_fenced, self.has_left) = (true, false),
        }
    }

    fn look_at(&mut self, path: &Path, read: impl FnOnce(&Path) -> Option<(bool, bool)>) {
        let identity = |file: Metadata| (file.ino(), file.mtime(), file.mtime_nsec(), file.len());
        // Before it is read: whoever writes it puts another file in its place.
        let file = path.symlink_metadata().map(identity).ok();
        if self.file.is_some() && self.file == file {
            return;
        }
        let found = read(path);
        self.file = file.filter(|_| found.is_some());
        (self.is_fenced, self.has_left) = found.unwrap_or_else(|| (path.symlink_metadata().is_ok(), false));
    }
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
        use State::{Committing, Pulling, Ready, Returning};
        journal.role == Role::Destination && matches!(journal.state, Pulling | Ready | Committing | Returning)
    };
    if role == Role::Destination && read(&path).is_ok_and(|journal| pulled(&journal)) {
        // A recovery would remove what the engine takes up, or ask a source that has come here with its guest by itself.
        return Ok(());
    }
    match recover(connection, &path, config, Wish::Settle) {
        Ok(Standing::Ended(how)) => {
            tracing::warn!(guest = guest.name, "{how}");
            Ok(())
        }
        // The other host may never come back to hear whose the guest is; that is settled without it.
        Ok(Standing::Open(_)) | Err(_) if read(&path).is_ok_and(|journal| journal.fence().is_none()) => {
            tracing::warn!(
                guest = guest.name,
                "the other host of an earlier migration has not heard how it ended: virt-ferry recover there, if it waits, says \
                 what to do"
            );
            Ok(())
        }
        Err(error) => Err(error),
        Ok(Standing::Open(cause)) => {
            watch(connection);
            Err(here(format!(
                "an earlier migration of guest {} has not come to its end: {cause}. It is tried again until the other host \
                 answers; virt-ferry recover {} says how it stands, and what to do if that host is lost",
                guest.name, guest.name
            )))
        }
    }
}

/// Ends a guest's migration as the operator wants it; one that is under way is told to end first.
///
/// # Errors
/// Why that cannot be done now.
pub fn by_hand(connection: Connection, uuid: Uuid, wish: Wish) -> Result<(), Error> {
    let config = host::config().map_err(here)?;
    let path = journal::path(&config.state_directory, uuid);
    if let (Wish::GiveUp, Ok(journal)) = (wish, read(&path)) {
        journal.may_be_given_up().map_err(here)?;
    }
    let began = Instant::now();
    let mut told = false;
    let _held = loop {
        match sessions::under_way(uuid) {
            Some(session) if !told => told = end(&session, &path, wish, began.elapsed()),
            Some(_) => {}
            // If not, an attempt of our own thread's is.
            None => {
                if let Some(hold) = try_hold(uuid) {
                    break hold;
                }
            }
        }
        if began.elapsed() > ASKED {
            return Err(here(format!(
                "its migration is under way and did not end within {} s: virsh domjobabort GUEST at its source ends it",
                ASKED.as_secs()
            )));
        }
        std::thread::sleep(LOOK);
    };
    if path.symlink_metadata().is_err() {
        // An attempt of our own thread's has ended it, and not as wanted where the guest is not here.
        return match wish {
            Wish::Own => connection.domain(uuid).map(drop),
            Wish::GiveUp | Wish::Settle => Ok(()),
        };
    }
    let journal = read(&path).map_err(here)?;
    match recover(connection, &path, &config, wish)? {
        Standing::Ended(how) => {
            tracing::warn!(guest = journal.guest.name, "{how}, as the operator wished");
            Ok(())
        }
        Standing::Open(cause) => Err(here(format!("that cannot be done now: {cause}"))),
    }
}

/// Has a session that is under way end, as the operator wants it; says whether it has been told. One that is given up ends
/// as with Ctrl-C. One whose other host is said to be lost notices that by itself, but for a source that has let go: its
/// engine waits for that host, and is let go of.
fn end(session: &Arc<Session>, path: &Path, wish: Wish, waited: Duration) -> bool {
    let has_let_go = || read(path).is_ok_and(|journal| journal.may_be_given_up().is_err());
    match wish {
        Wish::GiveUp => session.cancel(),
        Wish::Own if waited > LAST_WORD && has_let_go() => drop(sessions::take(session)),
        Wish::Own | Wish::Settle => return false,
    }
    true
}

/// How an attempt left a migration.
pub enum Standing {
    /// This way, as far as this host goes.
    Ended(&'static str),
    /// Open, for this reason.
    Open(String),
}

/// One attempt.
fn recover(connection: Connection, path: &Path, config: &Config, wish: Wish) -> Result<Standing, Error> {
    let journal = read(path).map_err(here)?;
    make_way(connection, &journal, wish)?;
    define_again(connection, &journal, wish)?;
    let engine = Engine::start(config, "cold-recover", &host::name()).map_err(here)?;
    let request = Request::ColdRecover {
        journal: path.to_owned(),
        wish,
        in_use: needed(connection, &journal, wish),
        settings: config.settings(),
    };
    let recovered = match engine.ask(&request, Some(ASKED))? {
        Reply::ColdRecovered(recovered) => recovered,
        reply => return Err(unexpected(&reply)),
    };
    if journal.role == Role::Within {
        return storage::ending::recovered(connection, &journal, &engine, recovered);
    }
    Ok(Standing::Ended(match recovered {
        Recovered::Stays => "an interrupted migration was ended: the guest stays here",
        Recovered::Undone => "an interrupted migration was ended: the guest did not come here",
        Recovered::Arrived => "an interrupted migration was ended: the guest is here",
        Recovered::Leaves => {
            leaves(connection, &journal, &engine)?;
            "an interrupted migration was ended: the guest is the other host's"
        }
        Recovered::Define => {
            if !define(connection, &journal, &engine)? {
                return Ok(Standing::Open("its former host does not answer".into()));
            }
            "an interrupted migration was ended: the guest is here now"
        }
        Recovered::Unknown { cause } => return Ok(Standing::Open(cause)),
    }))
}

/// What other guests of this host need of what has come, which may have lain here for days; all, where that is not known.
fn needed(connection: Connection, journal: &Journal, wish: Wish) -> Vec<Kept> {
    let keeps = journal.role == Role::Destination && wish == Wish::Own;
    if journal.role == Role::Source || keeps || !may_remove(journal) {
        return Vec::new();
    }
    inventory::others(connection, journal.guest.uuid).unwrap_or_else(|why| {
        let paths = journal.entries.iter().map(|entry| entry.path.clone());
        let stays = |path| Kept {
            path,
            reason: why.clone(),
        };
        paths.map(stays).collect()
    })
}

/// Whether giving it up can remove a file that others have come to need: one with its final name.
fn may_remove(journal: &Journal) -> bool {
    use State::{Aborted, Committing, Placed, Returning};
    let came = |entry: &Entry| entry.fate == Fate::Moves && entry.path.symlink_metadata().is_ok();
    matches!(journal.state, Committing | Placed | Returning | Aborted) && journal.entries.iter().any(came)
}

/// What libvirt knows here of an arriving guest and is not that guest goes before its files and its journal, which keeps it
/// from being started.
///
/// # Errors
/// It cannot be removed, or is the operator's.
fn make_way(connection: Connection, journal: &Journal, wish: Wish) -> Result<(), Error> {
    if journal.role != Role::Destination {
        return Ok(());
    }
    let guest = &journal.guest;
    let is_no_guest = is_no_guest(journal.role, journal.state, wish);
    let is_left = connection.domain(guest.uuid).and_then(|domain| {
        let domain = domain.get();
        domain
            .is_persistent()?
            .then(|| ghost::is_left(domain))
            .transpose()
    });
    let is_left = match is_left {
        Ok(is_left) => is_left,
        // Where it may be the guest, nobody need be allowed to see it.
        Err(error) if error.is_no_domain() || !is_no_guest => None,
        Err(error) => return Err(error),
    };
    match is_left {
        // An owner's definition is the guest's, whatever its source has written into it.
        Some(true) if journal.state != State::Owned => unregister(connection, guest),
        // So far, no migration has registered anything.
        Some(false) if is_no_guest && wish == Wish::Settle => Err(here(format!(
            "guest {name} is defined here, which its migration from {peer} has not done: neither that nor what has come is \
             touched. \"virsh undefine {name}\" lets {peer} be asked again; if {peer} is lost for good, \"virt-ferry recover \
             --lost {peer} {name}\" makes what has come the guest, as it is defined; \"virt-ferry recover --abort {name}\" \
             removes both",
            name = guest.name,
            peer = journal.peer
        ))),
        _ if is_no_guest => unregister(connection, guest),
        _ => Ok(()),
    }
}

/// Whether what libvirt knows here of an arriving guest is not that guest: only what a crash left of taking it back, or what
/// the operator gives up. Registered in earnest it is from `placed` on.
fn is_no_guest(role: Role, state: State, wish: Wish) -> bool {
    use State::{Committing, Placed, Ready, Returning};
    role == Role::Destination
        && match (wish, state) {
            (Wish::Own, _) => false,
            (_, Ready | Committing | Returning) => true,
            (Wish::GiveUp, Placed) => true,
            _ => false,
        }
}

fn leaves(connection: Connection, journal: &Journal, engine: &Engine) -> Result<(), Error> {
    let options = journal.options;
    let left = Left {
        undefine: options.undefine,
        keep: options.keep || !options.undefine,
    };
    leave(connection, &journal.guest, engine, left)
}

/// The guest had left, is this host's again by the operator's word, and may have been undefined here: it is defined before the
/// journal goes, which still has its definition. Should the rest fail, it stays defined: as long as there is a journal, that keeps
/// it from being started, and when there is none, this is the only definition.
///
/// # Errors
/// It cannot be defined: nothing has changed.
fn define_again(connection: Connection, journal: &Journal, wish: Wish) -> Result<(), Error> {
    if (journal.role, journal.state, wish) != (Role::Source, State::OwnedThere, Wish::Own) {
        return Ok(());
    }
    let guest = &journal.guest;
    match connection.domain(guest.uuid) {
        Err(error) if error.is_no_domain() => {}
        found => return found.map(drop),
    }
    let definition = journal.definition.as_deref().ok_or_else(|| {
        here(format!(
            "guest {} is not defined on this host any more, and an earlier release has not kept its definition: define it (virsh \
             define), then again",
            guest.name
        ))
    })?;
    let domain = connection.define(definition)?;
    let complete = complete(domain.get(), &journal.inventory);
    complete
        .and_then(|()| durable::definitions(&guest.name))
        .inspect_err(|_| take_back(connection, guest))?;
    Ok(())
}

/// Undefines a guest that is not this host's again after all; until that is done, its journal keeps it from being started.
fn take_back(connection: Connection, guest: &Guest) {
    if let Err(error) = unregister(connection, guest) {
        tracing::warn!(
            guest = guest.name,
            "it is defined again, and left this host: {error}"
        );
    }
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
        if let Ok(connection) = OwnedConnection::open(&crate::libvirt::c_string(uri)) {
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
    fn one_deals_with_a_guest_at_a_time() {
        let uuid = Uuid::from_u128(77);
        let first = try_hold(uuid);
        assert!(first.is_some() && try_hold(uuid).is_none());
        assert!(try_hold(Uuid::from_u128(78)).is_some());
        drop(first);
        assert!(try_hold(uuid).is_some());
    }

    #[test]
    fn what_was_registered_in_earnest_stays_unless_the_operator_gives_it_up() {
        use State::{Aborted, Committing, Owned, Placed, Pulling, Ready, Returning};
        for (wish, gone) in [
            (Wish::Settle, vec![Ready, Committing, Returning]),
            (Wish::GiveUp, vec![Ready, Committing, Returning, Placed]),
            (Wish::Own, vec![]),
        ] {
            let states = [Pulling, Ready, Committing, Returning, Placed, Owned, Aborted].into_iter();
            let found = states.filter(|state| is_no_guest(Role::Destination, *state, wish));
            assert_eq!(found.collect::<Vec<_>>(), gone, "{wish:?}");
            assert!(!is_no_guest(Role::Source, State::Committed, wish));
        }
    }

    #[test]
    fn a_journal_is_read_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.json");
        let (mut departing, mut reads) = (Departing::default(), 0);
        let mut look = |found| {
            departing.look_at(&path, |_| {
                reads += 1;
                found
            });
            (departing.is_fenced, departing.has_left, reads)
        };
        assert_eq!(look(None), (false, false, 1));
        std::fs::write(&path, "1").unwrap();
        let left = Some((true, true));
        assert_eq!(
            [look(None), look(left), look(left)],
            [(true, false, 2), (true, true, 3), (true, true, 3)]
        );
        let next = path.with_extension("part");
        std::fs::write(&next, "2").unwrap();
        std::fs::rename(&next, &path).unwrap();
        let given_up = Some((false, false));
        assert_eq!([look(given_up), look(left)], [(false, false, 4); 2]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(look(None), (false, false, 5));
    }

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
