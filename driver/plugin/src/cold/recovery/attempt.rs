//! One attempt to bring what a crash left to an end: libvirt first takes away what is no guest, then an engine asks the other
//! host, then libvirt does what is left for it to do.

use super::{read, ASKED};
use crate::cold::destination::{complete, own_it, unregister, withdraw};
use crate::cold::source::{leave, Left};
use crate::cold::{durable, ghost, here, inventory, storage, unexpected};
use crate::engine::Engine;
use crate::libvirt::{Connection, Error};
use ferry_contract::cold::journal::{Entry, Fate, Journal, Role, State};
use ferry_contract::cold::{Kept, Recovered, Wish};
use ferry_contract::config::Config;
use ferry_contract::control::{Reply, Request};
use ferry_host as host;
use std::path::{Path, PathBuf};

/// How an attempt left a migration.
pub enum Standing {
    /// This way, as far as this host goes.
    Ended(&'static str),
    /// Open, for this reason.
    Open(String),
}

/// One attempt.
pub(super) fn recover(
    connection: Connection,
    path: &Path,
    config: &Config,
    wish: Wish,
) -> Result<Standing, Error> {
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
    let is_no_guest = is_no_guest(journal.state, wish);
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
fn is_no_guest(state: State, wish: Wish) -> bool {
    use State::{Committing, Placed, Ready, Returning};
    match (wish, state) {
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
        .inspect_err(|_| {
            if let Err(left) = unregister(connection, guest) {
                tracing::warn!(
                    guest = guest.name,
                    "it is defined again, without all it had, and not this host's yet: {left}"
                );
            }
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_registered_in_earnest_stays_unless_the_operator_gives_it_up() {
        use State::{Aborted, Committing, Owned, Placed, Pulling, Ready, Returning};
        for (wish, gone) in [
            (Wish::Settle, vec![Ready, Committing, Returning]),
            (Wish::GiveUp, vec![Ready, Committing, Returning, Placed]),
            (Wish::Own, vec![]),
        ] {
            let states = [Pulling, Ready, Committing, Returning, Placed, Owned, Aborted].into_iter();
            let found = states.filter(|state| is_no_guest(*state, wish));
            assert_eq!(found.collect::<Vec<_>>(), gone, "{wish:?}");
        }
    }
}
