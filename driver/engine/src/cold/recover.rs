//! After a crash: what a journal says is brought to an end with the other host.
//!
//! | this host's journal | what happens |
//! |---|---|
//! | source, prepared | the guest stays: nobody else can have it |
//! | source, committed | the door is opened again, where it was: the destination says owned, or aborted; the operator may say aborted for it |
//! | source, owned-there | the guest leaves: undefine and delete |
//! | source, aborted | the door is opened: a destination that still asks is told no |
//! | destination, pulling or ready | undone, with all that was pulled: the source cannot have let go |
//! | destination, committing | the source is asked: it let go (go on), or says no (undo) |
//! | destination, placed | the guest is to be registered |
//! | destination, owned or aborted | the source is told |
//!
//! Where the operator says that the other host is lost for good ([`Wish::Own`]), nobody is asked: the source keeps the
//! guest as long as its own files are what they were, the destination takes what has come as a whole.
//! | within, any | see [`within`](super::within::recover) |

use super::destination::{self, Link};
use super::journal::Kept;
use super::messages::{Answer, Ask};
use super::pull::Peer;
use super::source::{delete, is_whole, linger, listen, refusal, Ownership};
use super::{nonce, place, within, Error};
use crate::control::{Control, Meter};
use crate::live::destination::bind;
use crate::live::signals::Signals;
use crate::wire::{message, Identity, Protection, Purpose, Security};
use ferry_contract::cold::journal::{Journal, Role, State};
use ferry_contract::cold::{Deleted, Recovered, Wish};
use ferry_contract::control::{Reply, Request};
use ferry_contract::session::Encryption;
use std::net::ToSocketAddrs;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long the plug-in may take between its requests: libvirt may be starting.
const UNTIL_ASKED: Duration = Duration::from_secs(5 * 60);
/// How long the other host is waited for.
const PATIENCE: Duration = Duration::from_secs(45);

/// Serves one plug-in, or a person's command, from its first request to its end.
pub fn run(control: &Control, _: &Arc<Meter>, signals: &Arc<Signals>) -> Result<(), crate::live::Error> {
    let Some(Request::ColdRecover { journal, wish, .. }) =
        signals.next_request(Some(Instant::now() + UNTIL_ASKED))
    else {
        return Ok(());
    };
    let host = nix::unistd::gethostname().unwrap_or_default();
    let host = host.to_string_lossy();
    let fail = |error: &Error| control.reply(Reply::Failed(error.failure(&host)));
    let kept = match Kept::open(&journal) {
        Ok(kept) => kept,
        Err(error) => {
            fail(&error);
            return Ok(());
        }
    };
    let span =
        tracing::info_span!("recovery", guest = kept.guest.name, role = ?kept.role, state = ?kept.state);
    let _entered = span.enter();
    let outcome = match kept.role {
        Role::Source => source(kept, wish, control, signals),
        Role::Destination => arriving(kept, wish, control, signals),
        Role::Within => within::recover(kept, control, signals),
    };
    if let Err(error) = outcome {
        tracing::error!("{error}");
        fail(&error);
    }
    Ok(())
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
    let state = kept.state;
    let ownership = Arc::new(Ownership::new(kept));
    match state {
        State::Prepared | State::Aborted => {
            let anew = "the source's host or engine was started anew";
            ownership.give_up(&Error::Other(anew.into()))?;
        }
        State::Committed if wish == Wish::GiveUp => {
            let operator = "the operator gave the migration up at the source";
            ownership.take_back(&Error::Other(operator.into()))?;
        }
        _ => {}
    }
    let connected = Arc::<AtomicUsize>::default();
    let state = match ownership.state() {
        Some(State::OwnedThere) => Some(State::OwnedThere),
        Some(waiting) => {
            open_door(&journal, &ownership, &connected)?;
            match waiting {
                // The guest is ours whoever asks: only the tombstone waits, and not for ever.
                State::Aborted => {
                    control.reply(Reply::ColdRecovered(Recovered::Stays));
                    ownership.wait_while(State::Aborted, PATIENCE);
                    linger(&connected);
                    return Ok(());
                }
                waiting => ownership.wait_while(waiting, PATIENCE),
            }
        }
        None => None,
    };
    match state {
        None => control.reply(Reply::ColdRecovered(Recovered::Stays)),
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
    let listener = bind(None, journal.port..=journal.port)?;
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

fn arriving(mut kept: Kept, wish: Wish, control: &Control, signals: &Signals) -> Result<(), Error> {
    if wish == Wish::Own {
        return take(kept, control, signals);
    }
    let addresses = (kept.address.as_str(), kept.port).to_socket_addrs();
    let peer = Peer {
        addresses: addresses.map(Iterator::collect).unwrap_or_default(),
        security: security(&kept),
    };
    let mut link = Link::new(peer, &kept.host);
    let undone = |control: &Control| control.reply(Reply::ColdRecovered(Recovered::Undone));
    match kept.state {
        State::Owned => {
            return match destination::owned(&mut kept, &mut link, signals)? {
                true => {
                    kept.remove()?;
                    control.reply(Reply::ColdRecovered(Recovered::Arrived));
                    Ok(())
                }
                false => {
                    control.reply(unknown(&Error::Other(
                        "the guest is here, but the source cannot be told; it may be started here".into(),
                    )));
                    Ok(())
                }
            }
        }
        // The source cannot have let go. A next attempt that begins before this takes up what was pulled.
        State::Pulling | State::Ready => {
            place::undo(&kept);
            kept.remove()?;
            undone(control);
            return Ok(());
        }
        State::Aborted => {
            let before = "the destination gave the migration up before a crash";
            destination::abort(kept, link, &Error::Other(before.into()))?;
            undone(control);
            return Ok(());
        }
        _ if wish == Wish::GiveUp => {
            let operator = "the operator gave the migration up";
            destination::abort(kept, link, &Error::Other(operator.into()))?;
            undone(control);
            return Ok(());
        }
        State::Placed => {}
        _ => match destination::commit(&mut kept, &mut link, signals, PATIENCE) {
            Ok(()) => {}
            Err(refused @ Error::Refused { .. }) => {
                destination::abort(kept, link, &refused)?;
                undone(control);
                return Ok(());
            }
            Err(error @ (Error::Wire(_) | Error::Ended(_))) => {
                control.reply(unknown(&error));
                return Ok(());
            }
            Err(error) => return Err(error),
        },
    }
    control.reply(Reply::ColdRecovered(Recovered::Define));
    match signals.next_request(Some(Instant::now() + UNTIL_ASKED)) {
        Some(Request::ColdOwned) => {
            let told = destination::owned(&mut kept, &mut link, signals)?;
            if told {
                kept.remove()?;
            }
            control.reply(Reply::ColdOwned { told });
        }
        Some(Request::ColdAbort) => {
            let libvirt = "libvirt cannot register the guest at the destination";
            destination::abort(kept, link, &Error::Other(libvirt.into()))?;
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
        State::Ready | State::Committing => {
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
