//! Whose the guest is, as the source's journal has it: every step from one owner to the other, and none but these.

use super::hash;
use super::journal::Kept;
use super::Error;
use ferry_contract::cold::journal::{Fate, Journal, State};
use ferry_contract::cold::Digest;
use ferry_contract::control::FailureKind;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Whose the guest is, as this host's journal has it. `None` once the session is over.
pub struct Ownership {
    kept: Mutex<Option<Kept>>,
    changed: Condvar,
    /// Why it was given up.
    cause: OnceLock<(FailureKind, String)>,
}

impl Ownership {
    /// As this journal has it.
    pub fn new(kept: Kept) -> Self {
        Self {
            kept: Mutex::new(Some(kept)),
            changed: Condvar::new(),
            cause: OnceLock::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far it is.
    pub fn state(&self) -> Option<State> {
        self.lock().as_ref().map(|kept| kept.state)
    }

    /// Why the session was given up.
    pub fn cause(&self) -> Error {
        match self.cause.get() {
            Some((FailureKind::Cancelled, _)) => Error::Ended(crate::live::Error::Cancelled),
            Some((_, cause)) => Error::Other(cause.clone()),
            None => Error::Other("this migration is over".into()),
        }
    }

    /// Waits until the state is another one than this, for so long at most.
    pub fn wait_while(&self, state: State, limit: Duration) -> Option<State> {
        let same = |kept: &mut Option<Kept>| kept.as_ref().is_some_and(|kept| kept.state == state);
        let waited = self.changed.wait_timeout_while(self.lock(), limit, same);
        let (kept, _) = waited.unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().map(|kept| kept.state)
    }

    /// Lets go of the guest, which has this manifest, if `check` finds nothing against it.
    pub fn commit(&self, manifest: Digest, check: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let mut kept = self.lock();
        let Some(kept) = kept.as_mut() else {
            return Err(self.cause());
        };
        match (kept.state, kept.manifest) {
            (_, known) if known != Some(manifest) => Err(Error::Other(
                "the files there are not those that were verified".into(),
            )),
            (State::Prepared, _) => {
                check()?;
                kept.enter(State::Committed, |_| {})
            }
            (State::Committed | State::OwnedThere, _) => Ok(()),
            _ => Err(self.cause()),
        }?;
        self.changed.notify_all();
        Ok(())
    }

    /// The destination says that the guest is registered there.
    pub fn owned(&self) -> Result<(), Error> {
        let mut kept = self.lock();
        match kept.as_mut().map(|kept| (kept.state, kept)) {
            Some((State::Committed, kept)) => kept.enter(State::OwnedThere, |_| {})?,
            Some((State::OwnedThere, _)) => {}
            _ => return Err(Error::Other("this host has not let go of the guest".into())),
        }
        self.changed.notify_all();
        Ok(())
    }

    /// The destination would give the guest up, and removes what it has once it knows that this host has it: it does, and
    /// that stays written down for as long as the destination may have to ask again.
    pub fn keep(&self, kind: FailureKind, cause: String) -> Result<(), Error> {
        let mut kept = self.lock();
        match kept.as_mut().map(|kept| (kept.state, kept)) {
            Some((State::Prepared | State::Committed, kept)) => {
                let _ = self.cause.set((kind, cause));
                kept.enter(State::Aborted, |_| {})?;
                kept.loosen();
            }
            Some((State::Aborted, _)) => {}
            // Given up, and nothing was left to be told.
            None if self.cause.get().is_some() => {}
            _ => return Err(Error::Other("the guest was said to be registered there".into())),
        }
        self.changed.notify_all();
        Ok(())
    }

    /// The destination says that it will never own the guest: it is ours, and nothing is left to be asked.
    pub fn given_back(&self, kind: FailureKind, cause: String) -> Result<(), Error> {
        let mut kept = self.lock();
        match kept.as_ref().map(|kept| kept.state) {
            Some(State::OwnedThere) => {
                return Err(Error::Other("the guest was said to be registered there".into()))
            }
            None => return Ok(()),
            Some(_) => {}
        }
        // It may not be possible to remove it. What says so already is not written again: a later session's journal may be
        // in its place by now.
        if let Some(kept) = kept.as_mut().filter(|kept| kept.state != State::Aborted) {
            kept.enter(State::Aborted, |_| {})?;
        }
        let _ = self.cause.set((kind, cause));
        kept.take().map_or(Ok(()), Kept::remove)?;
        self.changed.notify_all();
        Ok(())
    }

    /// Gives the session up from here, as long as the guest has not been let go of; says whether that was so.
    pub fn give_up(&self, cause: &Error) -> Result<bool, Error> {
        let mut guard = self.lock();
        let Some(kept) = guard.as_mut() else {
            return Ok(true);
        };
        match kept.state {
            State::Prepared => {
                let _ = self.cause.set((cause.failure("").kind, cause.to_string()));
                // A destination that has everything may be about to ask: after a crash it still has to hear it.
                match kept.manifest.is_some() {
                    true => {
                        kept.enter(State::Aborted, |_| {})?;
                        kept.loosen();
                    }
                    false => guard.take().map_or(Ok(()), Kept::remove)?,
                }
            }
            State::Aborted => kept.loosen(),
            _ => return Ok(false),
        }
        self.changed.notify_all();
        Ok(true)
    }

    /// What a destination was found to have.
    ///
    /// # Errors
    /// It is too late for that, or the journal cannot be written.
    pub fn note(
        &self,
        digests: &[Option<Digest>],
        fates: &[Fate],
        peer: &str,
        certificate: Option<&Vec<u8>>,
    ) -> Result<(), Error> {
        let mut kept = self.lock();
        let Some(kept) = kept.as_mut().filter(|kept| kept.state == State::Prepared) else {
            return Err(self.cause());
        };
        kept.note(|journal| {
            journal.manifest = Some(hash::manifest(digests.iter().copied()));
            journal.peer = peer.to_owned();
            journal.peer_certificate = certificate.cloned();
            for ((entry, digest), fate) in journal.entries.iter_mut().zip(digests).zip(fates) {
                (entry.digest, entry.fate) = (*digest, *fate);
            }
        })
    }

    /// What is written down.
    pub fn journal(&self) -> Option<Journal> {
        self.lock().as_ref().map(|kept| Journal::clone(kept))
    }

    /// Ends the session, which nothing is left of. A journal that stays all the same is a recovery's, which finds
    /// everything done.
    pub fn forget(&self) {
        if let Some(Err(error)) = self.lock().take().map(Kept::remove) {
            tracing::warn!("{error}");
        }
    }
}
