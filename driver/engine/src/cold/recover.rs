//! After a crash: what a journal says is brought to an end with the other host.
//!
//! | this host's journal | what happens |
//! |---|---|
//! | source, prepared | the guest stays: nobody else can have it |
//! | source, committed | the door is opened again, where it was: the destination says owned, or asks this host to keep it |
//! | source, owned-there | the guest leaves: undefine and delete |
//! | source, aborted | the door is opened: a destination that still asks is told no |
//! | destination, pulling | undone, with all that was pulled |
//! | destination, ready or returning | the source is asked to keep the guest; once it has said so, undone |
//! | destination, committing or placed | the source is asked: it let go (go on: rename, register), or says no (undo) |
//! | destination, owned or aborted | the source is told |
//! | within, any | see [`within`](super::within::recover) |
//!
//! A source that does not answer leaves a destination that has all of the guest as it is: there may be no other copy.
//!
//! Where the operator gives the migration up on this host ([`Wish::GiveUp`]), the destination undoes without an answer; a source
//! that has let go cannot. Where the operator says that the other host is lost for good ([`Wish::Own`]), the source keeps the
//! guest as long as its own files are what they were, and the destination, if the source does not answer, takes what has
//! come as a whole. For both words the engine of the session is ended, should it still wait for the other host.

use super::deletion::{delete, is_whole};
use super::door::{linger, listen, refusal};
use super::handover;
use super::journal::Kept;
use super::link::{Link, Peer};
use super::messages::{Answer, Ask};
use super::ownership::Ownership;
use super::undo::undo;
use super::{nonce, place, within, Error};
use crate::control::{Control, Meter};
use crate::live::destination::bind;
use crate::live::signals::Signals;
use crate::wire::{message, Identity, Protection, Purpose, Security};
use ferry_contract::cold::journal::{Journal, Role, State};
use ferry_contract::cold::{Deleted, Recovered, Wish};
use ferry_contract::control::{Reply, Request};
use ferry_contract::session::Encryption;
use ferry_host::Others;
use std::net::ToSocketAddrs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long the plug-in may take between its requests: libvirt may be starting.
const UNTIL_ASKED: Duration = Duration::from_secs(5 * 60);
/// How long the other host is waited for.
const PATIENCE: Duration = Duration::from_secs(45);
/// How long a host that is said to be lost is given to show that it is not.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Serves one plug-in, or a person's command, from its first request to its end.
pub fn run(control: &Control, _: &Arc<Meter>, signals: &Arc<Signals>) -> Result<(), crate::live::Error> {
    let Some(Request::ColdRecover {
        journal,
        wish,
        in_use,
        ..
    }) = signals.next_request(Some(Instant::now() + UNTIL_ASKED))
    else {
        return Ok(());
    };
    let host = nix::unistd::gethostname().unwrap_or_default();
    let host = host.to_string_lossy();
    let fail = |error: &Error| control.reply(Reply::Failed(error.failure(&host)));
    let kept = match open(&journal, wish) {
        Ok(kept) => kept,
        Err(error) => {
            fail(&error);
            return Ok(());
        }
    };
    let span =
        tracing::info_span!("recovery", guest = kept.guest.name, role = ?kept.role, state = ?kept.state);
    let _entered = span.enter();
    let others = Others::new(&in_use);
    let outcome = match kept.role {
        Role::Source => source(kept, wish, control, signals),
        Role::Destination => arriving(kept, wish, &others, control, signals),
        Role::Within => within::recover(kept, &others, control, signals),
    };
    if let Err(error) = outcome {
        // The plug-in knows whether it has been said before.
        tracing::debug!("{error}");
        fail(&error);
    }
    Ok(())
}

/// The journal, for what is wished of it.
fn open(path: &Path, wish: Wish) -> Result<Kept, Error> {
    let may = |journal: &Journal| match wish {
        Wish::GiveUp => journal.may_be_given_up().map_err(Error::Other),
        Wish::Own | Wish::Settle => Ok(()),
    };
    if wish == Wish::Settle {
        return Kept::open(path);
    }
    // Before an engine is ended for it.
    let found = Kept::look(path)?;
    may(&found)?;
    if (wish, found.role) == (Wish::Own, Role::Destination) {
        is_silent(&found)?;
    }
    let kept = Kept::take_over(path)?;
    may(&kept)?;
    Ok(kept)
}

/// Whether the source, which is said to be lost, does not answer.
///
/// # Errors
/// It does.
fn is_silent(journal: &Journal) -> Result<(), Error> {
    match peer(journal).connect(Purpose::Control, &Signals::default(), LAST_WORD) {
        Err(_) => Ok(()),
        Ok(_) => Err(Error::Other(format!(
            "host {peer} is not lost, it answers: run \"virt-ferry recover {name}\" on both hosts, or \"virt-ferry recover --abort \
             {name}\" here for the guest to stay at {peer}",
            peer = journal.peer,
            name = journal.guest.name
        ))),
    }
}

/// Where the source listens, or did.
fn peer(journal: &Journal) -> Peer {
    let addresses = (journal.address.as_str(), journal.port).to_socket_addrs();
    Peer {
        addresses: addresses.map(Iterator::collect).unwrap_or_default(),
        security: security(journal),
    }
}

fn unknown(error: &Error) -> Reply {
    let cause = error.to_string();
    Reply::ColdRecovered(Recovered::Unknown { cause })
}

/// This host's side of the session, as it was.
fn security(journal: &Journal) -> Security {
    let identity = Identity::kept(journal.certificate.clone(), journal.key.clone());
    let protection = match (journal.role, journal.encryption) {
        (Role::Source, encryption) => {
            let peer = OnceLock::new();
            if let Some(known) = &journal.peer_certificate {
                // New: nobody else has it.
                let _ = peer.set(known.clone());
            }
            Protection::Learned {
                identity,
                peer: Arc::new(peer),
                plain: encryption == Encryption::Never,
            }
        }
        (Role::Destination, Encryption::Always | Encryption::Certificates) => Protection::Encrypted {
            identity,
            peer: journal.peer_certificate.clone().unwrap_or_default(),
        },
        (Role::Destination, Encryption::Never) | (Role::Within, _) => Protection::Plain,
    };
    Security {
        session: journal.session,
        token: (*journal.token.bytes()).into(),
        protection,
    }
}

fn forget_nonces(journal: &Journal) {
    for entry in &journal.entries {
        let real = std::fs::canonicalize(&entry.path).unwrap_or_else(|_| entry.path.clone());
        if let Some(parent) = real.parent() {
            nonce::remove(parent, journal.session);
        }
    }
}

fn source(kept: Kept, wish: Wish, control: &Control, signals: &Signals) -> Result<(), Error> {
    let journal = Journal::clone(&kept);
    forget_nonces(&journal);
    if wish == Wish::Own && kept.state == State::OwnedThere {
        // The other host had it, and is lost: this is what there is of it. Nothing more is deleted.
        if let Some(gone) = journal.entries.iter().find(|entry| !is_whole(entry)) {
            return Err(Error::Other(format!(
                "the guest had left this host, and its files here are not what they were ({}): its definition and what is \
                 left of them stay as they are",
                gone.path.display()
            )));
        }
    }
    if wish == Wish::Own || kept.state == State::Prepared && journal.manifest.is_none() {
        kept.remove()?;
        control.reply(Reply::ColdRecovered(Recovered::Stays));
        return Ok(());
    }
    let ownership = Arc::new(Ownership::new(kept));
    let anew = "the source's host or engine was started anew";
    // Not where it has been let go of.
    ownership.give_up(&Error::Other(anew.into()))?;
    let connected = Arc::<AtomicUsize>::default();
    let mut state = ownership.state();
    if state == Some(State::Committed) {
        open_door(&journal, &ownership, &connected)?;
        state = ownership.wait_while(State::Committed, PATIENCE);
    } else if state == Some(State::Aborted) {
        // The engine of an attempt before may still listen there, and answers the same; or another migration has got the port.
        if let Err(error) = open_door(&journal, &ownership, &connected) {
            tracing::debug!("a destination that asks is not answered now: {error}");
            control.reply(Reply::ColdRecovered(Recovered::Stays));
            return Ok(());
        }
    }
    match state {
        None => control.reply(Reply::ColdRecovered(Recovered::Stays)),
        // The guest is ours whoever asks: only the tombstone waits, and not for ever.
        Some(State::Aborted) => {
            control.reply(Reply::ColdRecovered(Recovered::Stays));
            ownership.wait_while(State::Aborted, PATIENCE);
        }
        Some(State::OwnedThere) => {
            control.reply(Reply::ColdRecovered(Recovered::Leaves));
            if let Some(Request::ColdDelete { keep, in_use }) =
                signals.next_request(Some(Instant::now() + UNTIL_ASKED))
            {
                let journal = ownership.journal();
                let deleted = journal.map_or_else(Deleted::default, |journal| {
                    delete(&journal, keep.as_deref(), &in_use)
                });
                ownership.forget();
                control.reply(Reply::ColdDeleted(deleted));
            }
        }
        Some(_) => {
            let host = &journal.peer;
            control.reply(unknown(&Error::Other(format!(
                "host {host} has not said within {} s whether it has the guest: run \"virt-ferry recover\" there, too",
                PATIENCE.as_secs()
            ))));
        }
    }
    linger(&connected);
    Ok(())
}

/// Listens where the session's engine did, and answers what a destination can still want to know.
fn open_door(
    journal: &Journal,
    ownership: &Arc<Ownership>,
    connected: &Arc<AtomicUsize>,
) -> Result<(), Error> {
    let port = journal.port;
    let listener = bind(None, port..=port).map_err(|error| match error {
        crate::live::Error::Wire(crate::wire::Error::NoFreePort { .. }) => Error::Other(format!(
            "host {} asks at TCP port {port} of this host, which another process has now (ss -ltnp 'sport = {port}'): once that \
             has ended, it is asked there again",
            journal.peer
        )),
        error => error.into(),
    })?;
    let (ownership, connected, host) = (Arc::clone(ownership), Arc::clone(connected), journal.host.clone());
    listen(listener, security(journal), move |purpose, mut connection| {
        if purpose != Purpose::Control {
            return;
        }
        connected.fetch_add(1, Relaxed);
        while let Ok(ask) = message::receive::<Ask>(&mut connection) {
            let no = || Error::Other("this migration was interrupted and is only brought to its end".into());
            let answer = match ask {
                Ask::Commit { manifest } => ownership
                    .commit(manifest, || Err(no()))
                    .map(|()| Answer::Committed),
                Ask::Owned => ownership.owned().map(|()| Answer::OwnedThere),
                Ask::Keep { kind, cause } => ownership.keep(kind, cause).map(|()| Answer::Keeps),
                Ask::Abort { kind, cause } => ownership.given_back(kind, cause).map(|()| Answer::Aborted),
                _ => Err(no()),
            };
            let answer = answer.unwrap_or_else(|error| refusal(&error, &host));
            if message::send(&mut connection, &answer).is_err() {
                break;
            }
        }
        connected.fetch_sub(1, Relaxed);
    })
}

fn arriving(
    mut kept: Kept,
    wish: Wish,
    others: &Others,
    control: &Control,
    signals: &Signals,
) -> Result<(), Error> {
    if wish == Wish::Own {
        return take(kept, control, signals);
    }
    let mut link = Link::new(peer(&kept), &kept.host);
    let undone = |_told| control.reply(Reply::ColdRecovered(Recovered::Undone));
    let other = |cause: &str| Error::Other(cause.to_owned());
    match kept.state {
        State::Owned => {
            let told = handover::owned(&mut kept, &mut link, signals)?;
            if told {
                kept.remove()?;
            }
            control.reply(match told {
                true => Reply::ColdRecovered(Recovered::Arrived),
                false => unknown(&other(
                    "the guest is here, but the source cannot be told; it may be started here",
                )),
            });
            return Ok(());
        }
        // Not all of it is here. A next attempt that begins before this takes up what was pulled.
        State::Pulling => {
            undo(&kept, others);
            kept.remove()?;
            undone(true);
            return Ok(());
        }
        State::Aborted => {
            let before = other("the destination gave the migration up before a crash");
            return handover::give_up(kept, link, &before, others).map(undone);
        }
        _ if wish == Wish::GiveUp => {
            let operator = other("the operator gave the migration up");
            return handover::give_up(kept, link, &operator, others).map(undone);
        }
        // The client that was to go on has gone, or was told that it failed.
        State::Ready | State::Returning => {
            let interrupted = other("the migration was interrupted at the destination");
            match handover::hand_back(kept, link, &interrupted, others) {
                Ok(told) => undone(told),
                Err(error) => control.reply(unknown(&error)),
            }
            return Ok(());
        }
        _ => match handover::commit(&mut kept, &mut link, signals, PATIENCE) {
            Ok(()) => {}
            // libvirt may know it here already: that goes first, and by the operator's word.
            Err(refused @ Error::Refused { .. }) if kept.state == State::Placed => {
                control.reply(unknown(&other(&format!(
                    "host {} has the guest again ({refused}): \"virt-ferry recover --abort {}\" removes what has come here",
                    kept.peer, kept.guest.name
                ))));
                return Ok(());
            }
            Err(refused @ Error::Refused { .. }) => {
                return handover::give_up(kept, link, &refused, others).map(undone);
            }
            Err(error @ (Error::Wire(_) | Error::Ended(_))) => {
                control.reply(unknown(&handover::silent(&kept, &error)));
                return Ok(());
            }
            Err(error) => return Err(error),
        },
    }
    control.reply(Reply::ColdRecovered(Recovered::Define));
    match signals.next_request(Some(Instant::now() + UNTIL_ASKED)) {
        Some(Request::ColdOwned) => {
            let told = handover::owned(&mut kept, &mut link, signals)?;
            if told {
                kept.remove()?;
            }
            control.reply(Reply::ColdOwned { told });
        }
        Some(Request::ColdAbort) => {
            let libvirt = Error::Other("the guest is not registered at the destination".into());
            handover::hand_back(kept, link, &libvirt, others)?;
            control.reply(Reply::ColdAborted);
        }
        // It stays placed: the next recovery asks again.
        _ => {}
    }
    Ok(())
}

/// The source is lost for good: whatever is here as a whole is this host's, without asking anybody.
fn take(mut kept: Kept, control: &Control, signals: &Signals) -> Result<(), Error> {
    match kept.state {
        State::Owned => {
            kept.remove()?;
            control.reply(Reply::ColdRecovered(Recovered::Arrived));
            return Ok(());
        }
        // Given up here before, and nobody is left to be told.
        State::Aborted => {
            kept.remove()?;
            control.reply(Reply::ColdRecovered(Recovered::Undone));
            return Ok(());
        }
        State::Ready | State::Committing | State::Returning => {
            // Also where the files have got their places already, but nothing was written down of it.
            kept.enter(State::Committing, |_| {})?;
            place::put_in_place(&kept)?;
            kept.enter(State::Placed, |_| {})?;
        }
        State::Placed => {}
        _ => {
            return Err(Error::Other(
                "not all of the guest's files have come here: there is nothing that this host could take for its own"
                    .into(),
            ))
        }
    }
    control.reply(Reply::ColdRecovered(Recovered::Define));
    match signals.next_request(Some(Instant::now() + UNTIL_ASKED)) {
        Some(Request::ColdOwned) => {
            kept.enter(State::Owned, |_| {})?;
            kept.remove()?;
            // There is nobody to tell.
            control.reply(Reply::ColdOwned { told: true });
        }
        // Nothing is removed: this may be all there is of the guest.
        Some(Request::ColdAbort) => control.reply(Reply::ColdAborted),
        // It stays placed: the next recovery asks again.
        _ => {}
    }
    Ok(())
}
