//! The guest becomes the destination's, or is given back: each step as its journal and the source's answers allow it, in a
//! session and in a recovery alike.

use super::journal::Kept;
use super::link::{Link, TELL};
use super::undo::undo_for_good;
use super::{place, Error};
use crate::live::signals::Signals;
use ferry_contract::cold::journal::{Journal, State};
use ferry_host::Others;
use std::time::Duration;

/// Asks the source to let go and puts the files in place; from the journal's `ready` or `committing`. In `placed` it asks
/// once more: the operator may have made the guest the source's again, for this host was taken for lost.
///
/// # Errors
/// [`Error::Refused`]: the source keeps the guest. Any other: it is not known whether it does, unless the state is `ready`.
pub fn commit(kept: &mut Kept, link: &mut Link, signals: &Signals, patience: Duration) -> Result<(), Error> {
    let manifest = match (kept.state, kept.manifest) {
        (State::Ready | State::Committing | State::Placed, Some(manifest)) => manifest,
        (state, _) => {
            return Err(Error::Other(format!(
                "the guest cannot be taken over in state {state:?}"
            )))
        }
    };
    if kept.state == State::Ready {
        kept.enter(State::Committing, |_| {})?;
    }
    link.commit(manifest, signals, patience)?;
    if kept.state == State::Placed {
        return Ok(());
    }
    place::put_in_place(kept)?;
    kept.enter(State::Placed, |_| {})
}

/// Notes that the guest is here and tells the source; says whether that has heard it.
///
/// # Errors
/// The guest's files are not in place, or the journal cannot be written.
pub fn owned(kept: &mut Kept, link: &mut Link, signals: &Signals) -> Result<bool, Error> {
    match kept.state {
        State::Placed => kept.enter(State::Owned, |_| {})?,
        State::Owned => {}
        state => {
            return Err(Error::Other(format!(
                "the guest cannot be owned in state {state:?}"
            )))
        }
    }
    let told = link.owned(signals);
    if let Err(error) = &told {
        tracing::debug!("the source could not be told that the guest is here: {error}");
    }
    Ok(told.is_ok())
}

/// Gives the guest up once its source has said that it keeps it; says whether that has heard that nothing is left here.
///
/// # Errors
/// The source does not answer, and all that has come stays; or as with [`give_up`].
pub fn hand_back(mut kept: Kept, mut link: Link, cause: &Error, others: &Others) -> Result<bool, Error> {
    if matches!(kept.state, State::Ready | State::Committing | State::Placed) {
        // Before it is asked: a question that is late must not find that this host has asked for the guest again.
        kept.enter(State::Returning, |_| {})?;
    }
    if kept.state == State::Returning {
        link.keep(cause, TELL).map_err(|error| silent(&kept, &error))?;
    }
    give_up(kept, link, cause, others)
}

/// The source has not answered, so that all that has come stays.
pub fn silent(waiting: &Journal, error: &Error) -> Error {
    Error::Other(format!(
        "host {} does not say whose guest {} is, so that all of it that has come to host {} stays there, and is not started: \
         {error}",
        waiting.peer, waiting.guest.name, waiting.host
    ))
}

/// Gives the guest up for good, removes everything, and tells the source; says whether that has heard it. The source keeps the
/// guest, or the operator says so.
///
/// # Errors
/// The guest is this host's already, or the journal cannot be written.
pub fn give_up(mut kept: Kept, mut link: Link, cause: &Error, others: &Others) -> Result<bool, Error> {
    let undone = Journal::clone(&kept);
    match kept.state {
        State::Owned => {
            return Err(Error::Other(
                "the guest is registered here: it cannot be given back".into(),
            ))
        }
        State::Aborted => {}
        // Before anything is removed, it is written down that this host never will own it.
        _ => kept.enter(State::Aborted, |_| {})?,
    }
    undo_for_good(&mut kept, &undone, others)?;
    match link.abort(cause, TELL) {
        Ok(()) => kept.remove().map(|()| true),
        // Also where it refuses: one that could not write it down has let go of the guest still.
        Err(error) => {
            tracing::debug!("the source could not be told that it keeps the guest: {error}");
            Ok(false)
        }
    }
}
