//! What a crash left between two hosts, brought to an end: each journal without a session has an engine ask the other
//! host, and libvirt does what is left for it to do.
//!
//! Until then nobody starts the guest: libvirt's hook reads the same journal.
//!
//! ```text
//!   settle    a new migration of the guest  ─┐             ┌─ attempt   make way, ask, define
//!   by_hand   virt-ferry recover             ├─ hold ──────┤
//!   attendant the daemon's own thread       ─┘  one a guest└─ standing  what the journal says
//! ```

mod attempt;
mod attendant;
mod hold;
mod standing;

pub use attempt::Standing;
pub use attendant::{at_first_call, watch};
pub use hold::{hold, hold_soon};
pub use standing::{is_fenced, is_pending, Departing};

use super::sessions::Session;
use super::{here, sessions};
use crate::libvirt::{Connection, Error};
use attempt::recover;
use ferry_contract::cold::journal::{self, Journal, Role, State};
use ferry_contract::cold::Wish;
use ferry_contract::config::Config;
use ferry_contract::session::Guest;
use ferry_host as host;
use hold::try_hold;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// For an engine to find the other host's, which may be on its way up itself.
const ASKED: Duration = Duration::from_secs(150);
/// How long a host that is said to be lost is given to show that it is not: to a migration that is at its end.
const LAST_WORD: Duration = Duration::from_secs(10);
/// Between two looks whether a migration that was told to end has.
const LOOK: Duration = Duration::from_millis(200);

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

fn read(path: &Path) -> Result<Journal, String> {
    host::journal(path).map_err(|why| format!("the journal {} cannot be read: {why}", path.display()))
}
