//! The source's engine: the guest is ours until the destination has asked for it, has everything, and nothing has changed.
//!
//! ```text
//!   ColdServe ─▶ prepared ──Commit──▶ committed ──Owned──▶ owned-there ──ColdDelete──▶ gone
//!                   │                     ├──Keep──▶ aborted ──Abort──▶ gone
//!                   │                     └──Abort──▶ gone
//!                   └── ColdAbort, the end of the plug-in, nobody there for too long ──▶ gone, or aborted
//! ```

use super::files::{self, Source};
use super::hash;
use super::identity::is_ours;
use super::journal::{Claim, Kept};
use super::messages::{Answer, Ask, RUNS};
use super::nonce::{self, Nonces};
use super::place::is_device;
use super::record::Recorder;
use super::serve::Shelf;
use super::Error;
use crate::control::{Control, Meter};
use crate::live::destination::bind;
use crate::live::signals::Signals;
use crate::report::Outcome;
use crate::wire::{message, Connection, Identity, Listener, Protection, Purpose, Security, Token};
use ferry_contract::cold::journal::{self, Entry, Fate, Journal, Role, State};
use ferry_contract::cold::{Definition, Deleted, Digest, Inventory, Kept as KeptFile, Kind, Serve};
use ferry_contract::control::{Failure, FailureKind, Reply, Request};
use ferry_contract::cookie::ColdOffer;
use ferry_contract::session::Encryption;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long the plug-in may take with its first request.
const UNTIL_ASKED: Duration = Duration::from_secs(60);
/// How long the destination may take to connect for the first time.
const UNTIL_CONNECTED: Duration = Duration::from_secs(15 * 60);
/// How long it may be away. It tries again for a little less.
const AWAY: Duration = Duration::from_secs(60);
/// How long a guest that has been let go of is waited for: after that a recovery asks.
const UNTIL_OWNED: Duration = Duration::from_secs(10 * 60);
/// How long a plug-in that wants to know waits for a destination that is still to say.
const UNTIL_CONFIRMED: Duration = Duration::from_secs(30);
/// How long a session that was given up can still be asked about.
const LINGER: Duration = Duration::from_secs(5);
/// How often the waiting looks around.
const LOOK: Duration = Duration::from_millis(250);

/// Serves one plug-in, from its first request to its end.
pub fn run(control: &Control, meter: &Arc<Meter>, signals: &Arc<Signals>) -> Result<(), crate::live::Error> {
    let Some(Request::ColdServe(serve)) = signals.next_request(Some(Instant::now() + UNTIL_ASKED)) else {
        return Ok(());
    };
    let span = tracing::info_span!("cold migration", guest = serve.guest.name, role = "source");
    let _entered = span.enter();
    let host = serve.host.clone();
    if let Err(error) = Session::open(*serve, meter, signals).and_then(|session| session.serve(control)) {
        tracing::error!("{error}");
        control.reply(Reply::Failed(error.failure(&host)));
    }
    Ok(())
}

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
    fn note(
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

/// One migration, served.
struct Session {
    host: String,
    offer: ColdOffer,
    shared: Arc<Shared>,
    listener: Listener,
    security: Security,
    /// As it was at first, for what is told of a migration that failed.
    journal: Journal,
    log_directory: PathBuf,
}

/// What the threads of the connections share.
struct Shared {
    host: String,
    shelf: Shelf,
    nonces: Nonces,
    definition: Option<Definition>,
    ownership: Ownership,
    fates: Mutex<Vec<Fate>>,
    peer: Mutex<String>,
    certificate: Arc<OnceLock<Vec<u8>>>,
    verified: AtomicU64,
    /// Connections that are open.
    connected: AtomicUsize,
    /// When the last one came or went; none before the first.
    seen: Mutex<Option<Instant>>,
}

impl Session {
    fn open(serve: Serve, meter: &Arc<Meter>, signals: &Arc<Signals>) -> Result<Self, Error> {
        let claim = Claim::take(&serve.settings.state_directory, serve.guest.uuid)?;
        refuse_unfinished(claim.find()?.as_ref())?;
        let (files, directories) = files::open(&serve.items)?;
        let session = Uuid::new_v4();
        let parents = files.iter().filter(|file| file.kind == Kind::File);
        let parents = parents.filter_map(|file| file.real.parent().map(ToOwned::to_owned));
        let nonces = Nonces::make(parents, session)?;
        let inventory = Inventory {
            guest: serve.guest.clone(),
            autostart: serve.autostart,
            files: files.iter().map(Source::owned).collect(),
            directories,
            media: serve.media.clone(),
            metadata: serve.metadata.clone(),
        };
        let identity = Identity::generate(session)?;
        let token = Token::generate()?;
        let (first, last) = serve.settings.ports;
        let listener = bind(serve.listen.as_deref(), first..=last)?;
        let offer = ColdOffer {
            session,
            token: ferry_contract::session::Token::new(*token.expose()),
            encryption: serve.settings.encryption,
            certificate: identity.certificate().to_vec(),
            host: serve.address.clone(),
            port: listener.address().port(),
            inventory,
        };
        // What no cookie can carry is better known now.
        offer
            .inventory
            .to_xml()
            .map_err(|error| Error::Other(error.to_string()))?;
        let journal = journal_of(&serve, &offer, &files, identity.expose_key());
        let kept = Kept::new(claim, journal.clone())?;
        let certificate = Arc::<OnceLock<Vec<u8>>>::default();
        let security = security(&offer, identity, Arc::clone(&certificate));
        signals.pace.set(serve.options.bandwidth);
        let shared = Shared {
            host: serve.host.clone(),
            shelf: Shelf {
                blocks: files.iter().map(|_| Mutex::default()).collect(),
                files,
                compression: serve.options.compression,
                answered: AtomicU64::new(0),
                signals: Arc::clone(signals),
                meter: Arc::clone(meter),
            },
            nonces,
            definition: serve.definition,
            ownership: Ownership::new(kept),
            fates: Mutex::default(),
            peer: Mutex::default(),
            certificate,
            verified: AtomicU64::new(0),
            connected: AtomicUsize::new(0),
            seen: Mutex::new(None),
        };
        Ok(Self {
            host: serve.host,
            offer,
            shared: Arc::new(shared),
            listener,
            security,
            journal,
            log_directory: serve.settings.log_directory,
        })
    }

    /// Answers the plug-in and then both it and the destination, until the guest is one host's for good.
    fn serve(self, control: &Control) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let outcome = self.run(control);
        // The door's thread holds them, too: they do not go by themselves.
        shared.nonces.remove();
        outcome
    }

    fn run(self, control: &Control) -> Result<(), Error> {
        let (shared, host) = (self.shared, self.host);
        let door = Arc::clone(&shared);
        let opened = listen(self.listener, self.security, move |purpose, connection| {
            door.welcome(purpose, connection)
        });
        if let Err(error) = opened {
            shared.ownership.give_up(&error)?;
            return Err(error);
        }
        control.reply(Reply::ColdOffer(Box::new(self.offer)));
        let signals = Arc::clone(&shared.shelf.signals);
        let began = Instant::now();
        let mut recorder = Recorder::default();
        recorder.enter("transfer");
        let (mut first, log_directory) = (self.journal, self.log_directory);
        let (mut told, mut concluded) = (false, false);
        let fail = |cause: &str| control.reply(Reply::Failed(Error::Other(cause.to_owned()).failure(&host)));
        loop {
            let request = signals.next_request(Some(Instant::now() + LOOK));
            shared.measure();
            match request {
                Some(Request::ColdConfirm) => match shared.ownership.wait_while(State::Committed, UNTIL_CONFIRMED) {
                    Some(State::OwnedThere) => control.reply(Reply::ColdOwnedThere),
                    Some(State::Committed) => fail(
                        "the destination does not say whether the guest is registered there: it stays fenced here until \
                         \"virt-ferry recover\" has asked",
                    ),
                    _ => {
                        let early = Error::Other("the migration did not get to its end".into());
                        shared.ownership.give_up(&early)?;
                        let mut failure = shared.ownership.cause().failure(&host);
                        failure.cause = format!("the guest stays here: {}", failure.cause);
                        control.reply(Reply::Failed(failure));
                    }
                },
                Some(Request::ColdDelete { keep, in_use }) => match shared.ownership.state() {
                    Some(State::OwnedThere) => {
                        recorder.enter("deletion");
                        // Whoever holds a lock on them now is somebody else.
                        shared.shelf.files.iter().for_each(Source::lift);
                        let journal = shared.ownership.journal().unwrap_or(first);
                        let deleted = delete(&journal, keep.as_deref(), &in_use);
                        shared.ownership.forget();
                        recorder.left(&deleted);
                        recorder.publish(&journal, &shared.shelf.meter, Outcome::Completed, &log_directory);
                        control.reply(Reply::ColdDeleted(deleted));
                        return Ok(());
                    }
                    _ => fail("nothing is deleted: the guest is not the destination's"),
                },
                Some(Request::ColdAbort) => {
                    let cause = Error::Other("the operator or libvirt gave the migration up".into());
                    let given_up = shared.ownership.give_up(&cause)?;
                    let state = shared.ownership.wait_while(State::Committed, UNTIL_CONFIRMED);
                    // Meanwhile the destination may have said that the guest is to be kept.
                    match given_up || !matches!(state, Some(State::Committed | State::OwnedThere)) {
                        true => {
                            control.reply(Reply::ColdAborted);
                            concluded = true;
                        }
                        false => fail(
                            "the guest has been let go of: whether the destination has registered it is not known here",
                        ),
                    }
                }
                Some(other) => tracing::warn!(?other, "a request out of turn"),
                None => {}
            }
            // The operator's end, and the plug-in's: as long as nobody else owns the guest, it is ours alone to decide.
            let ended = signals.check().err().map(Error::from);
            let ended = ended.or_else(|| shared.nobody_there(began).map(Error::Other));
            if let Some(cause) = ended {
                shared.ownership.give_up(&cause)?;
            }
            if !told && matches!(shared.ownership.state(), None | Some(State::Aborted)) {
                told = true;
                first.peer = shared.peer();
                let outcome = match shared.ownership.cause() {
                    Error::Ended(crate::live::Error::Cancelled) => Outcome::Cancelled,
                    _ => Outcome::Failed {
                        stage: None,
                        error: shared.ownership.cause().to_string(),
                    },
                };
                recorder.publish(&first, &shared.shelf.meter, outcome, &log_directory);
            }
            if concluded {
                // A destination under way hears it from us, as long as it asks soon.
                linger(&shared.connected);
                return Ok(());
            }
            if signals.is_let_go() {
                match shared.ownership.state() {
                    Some(State::Committed) if began.elapsed() < UNTIL_OWNED => {
                        shared.ownership.wait_while(State::Committed, UNTIL_OWNED);
                    }
                    // What is left is for libvirt, and for a recovery.
                    Some(State::OwnedThere | State::Committed) => return Ok(()),
                    _ => {
                        linger(&shared.connected);
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// A journal of an earlier session that is not at its end must not be lost.
pub fn refuse_unfinished(earlier: Option<&Journal>) -> Result<(), Error> {
    match earlier.map(|journal| (journal.role, journal.state)) {
        None | Some((_, State::Aborted | State::Prepared | State::Pulling)) => Ok(()),
        Some((role, state)) => Err(Error::Other(format!(
            "an earlier migration of this guest has not come to its end on this host ({role:?}, {state:?}): run \"virt-ferry \
             recover\" on both hosts first"
        ))),
    }
}

fn journal_of(serve: &Serve, offer: &ColdOffer, files: &[Source], key: &[u8]) -> Journal {
    let entry = |file: &Source| Entry {
        source: file.path.clone(),
        path: file.path.clone(),
        temporary: None,
        kind: file.kind,
        size: file.size,
        fate: Fate::Moves,
        digest: None,
        identity: Some(file.identity.number),
        lasting: file.identity.lasting.clone(),
        modified: Some(file.modified),
    };
    Journal {
        version: journal::VERSION,
        role: Role::Source,
        state: State::Prepared,
        session: offer.session,
        guest: serve.guest.clone(),
        host: serve.host.clone(),
        peer: String::new(),
        address: offer.host.clone(),
        port: offer.port,
        token: offer.token.clone(),
        encryption: offer.encryption,
        certificate: offer.certificate.clone(),
        key: key.to_vec(),
        peer_certificate: None,
        inventory: offer.inventory.clone(),
        entries: files.iter().map(entry).collect(),
        directories: Vec::new(),
        manifest: None,
        options: serve.options,
        definition: None,
        former: Vec::new(),
    }
}

fn security(offer: &ColdOffer, identity: Identity, peer: Arc<OnceLock<Vec<u8>>>) -> Security {
    Security {
        session: offer.session,
        token: (*offer.token.bytes()).into(),
        protection: Protection::Learned {
            identity,
            peer,
            plain: offer.encryption == Encryption::Never,
        },
    }
}

/// No, and why.
pub fn refusal(error: &Error, host: &str) -> Answer {
    let Failure { kind, host, cause } = error.failure(host);
    Answer::Refused { kind, cause, host }
}

/// Opens the door: each connection that comes gets a thread of its own.
pub fn listen(
    listener: Listener,
    security: Security,
    welcome: impl Fn(Purpose, Connection) + Send + Sync + 'static,
) -> Result<(), Error> {
    let span = tracing::Span::current();
    let welcome = Arc::new(welcome);
    let door = move || {
        let _entered = span.enter();
        loop {
            match listener.accept(&security, Instant::now() + UNTIL_CONNECTED) {
                Ok((purpose, connection)) => {
                    let (welcome, span) = (Arc::clone(&welcome), span.clone());
                    let thread = std::thread::Builder::new().name(purpose.to_string().replace(' ', "-"));
                    // Without a thread the connection closes, and is tried again.
                    let _ = thread.spawn(move || span.in_scope(|| welcome(purpose, connection)));
                }
                Err(crate::wire::Error::NobodyCame { .. }) => {}
                Err(error) => return tracing::error!("{error}"),
            }
        }
    };
    let started = std::thread::Builder::new().name("door".into()).spawn(door);
    started
        .map(drop)
        .map_err(|error| Error::Other(format!("cannot start a thread: {error}")))
}

impl Shared {
    fn welcome(&self, purpose: Purpose, connection: Connection) {
        self.connected.fetch_add(1, Relaxed);
        self.see();
        let outcome = match purpose {
            Purpose::Control => self.talk(connection),
            Purpose::Data(_) if self.ownership.state() == Some(State::Prepared) => {
                self.shelf.signals.watch(connection.breaker());
                self.shelf.serve(connection)
            }
            _ => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::warn!(%purpose, "{error}");
        }
        self.connected.fetch_sub(1, Relaxed);
        self.see();
    }

    /// The destination host's name.
    fn peer(&self) -> String {
        self.peer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn see(&self) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Why the destination is taken for gone.
    fn nobody_there(&self, began: Instant) -> Option<String> {
        if self.connected.load(Relaxed) > 0 {
            return None;
        }
        let seen = *self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match seen {
            None if began.elapsed() > UNTIL_CONNECTED => Some(format!(
                "the destination has not connected within {} s",
                UNTIL_CONNECTED.as_secs()
            )),
            Some(seen) if seen.elapsed() > AWAY => {
                Some(format!("the destination has been away for {} s", AWAY.as_secs()))
            }
            _ => None,
        }
    }

    /// The statistics: half of the work on a byte is to send it, the other half to find it verified.
    fn measure(&self) {
        let meter = &self.shelf.meter;
        let total = meter.total.load(Relaxed);
        let left = |done: &AtomicU64| total.saturating_sub(done.load(Relaxed));
        let remaining = (left(&self.shelf.answered) + left(&self.verified)) / 2;
        meter.remaining.store(remaining, Relaxed);
    }

    /// One control connection, to its end.
    fn talk(&self, mut connection: Connection) -> Result<(), Error> {
        loop {
            let ask = match message::receive::<Ask>(&mut connection) {
                Ok(ask) => ask,
                Err(crate::wire::Error::PeerGone { .. }) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let answer = self.answer(ask).unwrap_or_else(|error| {
                tracing::warn!("refused: {error}");
                refusal(&error, &self.host)
            });
            message::send(&mut connection, &answer)?;
        }
    }

    fn answer(&self, ask: Ask) -> Result<Answer, Error> {
        let file = |number: u32| {
            let index = usize::try_from(number).ok();
            let file = index.and_then(|index| self.shelf.files.get(index));
            file.ok_or_else(|| Error::Other(format!("there is no file number {number}")))
        };
        let running = || match self.ownership.state() {
            Some(State::Prepared) => Ok(()),
            _ => Err(self.ownership.cause()),
        };
        match ask {
            Ask::Open { host } => {
                running()?;
                tracing::info!(destination = host, "connected");
                *self.peer.lock().unwrap_or_else(PoisonError::into_inner) = host;
                Ok(Answer::Opened {
                    host: self.host.clone(),
                    nonce: self.nonces.text.clone(),
                })
            }
            Ask::Look { file: number } => {
                let file = file(number)?;
                let beside = file.real.parent().is_some_and(|parent| self.nonces.is_in(parent));
                Ok(Answer::Looked(file.looked(beside)?))
            }
            Ask::Runs { file: number, from } => {
                let runs = file(number)?.runs.iter().filter(|run| run.end > from);
                let mut found: Vec<_> = runs.take(RUNS + 1).cloned().collect();
                let next = found.get(RUNS).map(|run| run.start);
                found.truncate(RUNS);
                Ok(Answer::Runs { runs: found, next })
            }
            Ask::Fates { fates } => {
                let matching = fates.len() == self.shelf.files.len();
                if !matching {
                    return Err(Error::Other("not every file has its fate".into()));
                }
                let moving = self
                    .shelf
                    .files
                    .iter()
                    .zip(&fates)
                    .filter(|(_, fate)| **fate != Fate::Shared);
                let total = moving
                    .map(|(file, _)| super::extents::bytes(&file.runs, file.size))
                    .sum();
                self.shelf.meter.total.store(total, Relaxed);
                *self.fates.lock().unwrap_or_else(PoisonError::into_inner) = fates;
                Ok(Answer::Noted)
            }
            Ask::Verified { bytes } => {
                running()?;
                self.verified.store(bytes, Relaxed);
                Ok(Answer::Noted)
            }
            Ask::Ready { digests } => self.ready(&digests).map(|()| Answer::Noted),
            Ask::Commit { manifest } => {
                self.ownership.commit(manifest, || self.unchanged())?;
                tracing::info!("the destination has everything: the guest is let go of");
                Ok(Answer::Committed)
            }
            Ask::Owned => {
                self.ownership.owned()?;
                tracing::info!("the guest is registered at the destination");
                Ok(Answer::OwnedThere)
            }
            Ask::Keep { kind, cause } => {
                tracing::info!(
                    "the destination would give the migration up, and is told that the guest stays here"
                );
                self.ownership.keep(kind, cause)?;
                Ok(Answer::Keeps)
            }
            Ask::Abort { kind, cause } => {
                tracing::warn!("the destination gave the migration up: {cause}");
                self.ownership.given_back(kind, cause)?;
                Ok(Answer::Aborted)
            }
        }
    }

    /// Compares what the destination has with what was read here.
    fn ready(&self, digests: &[Option<Digest>]) -> Result<(), Error> {
        let fates = self.fates.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let count = self.shelf.files.len();
        if (digests.len(), fates.len()) != (count, count) {
            return Err(Error::Other("not every file has its digest".into()));
        }
        let files = self.shelf.files.iter().zip(&self.shelf.blocks);
        for ((file, blocks), (digest, fate)) in files.zip(digests.iter().zip(&fates)) {
            let blocks = blocks.lock().unwrap_or_else(PoisonError::into_inner);
            let is_there = *fate == Fate::Shared;
            // Who asks for little agrees on the digest of little.
            if !is_there && !blocks.has(&file.runs) {
                return Err(Error::Other(format!(
                    "the destination has not asked for all of {}: it has no copy",
                    file.path.display()
                )));
            }
            let expected = (!is_there).then(|| blocks.digest(file.size));
            if *digest != expected {
                return Err(Error::Other(format!(
                    "the copy of {} is not what was read here: it is damaged",
                    file.path.display()
                )));
            }
        }
        let peer = self.peer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.ownership
            .note(digests, &fates, &peer, self.certificate.get())
    }

    /// Nothing that was copied, and not the definition, has changed since.
    fn unchanged(&self) -> Result<(), Error> {
        self.shelf.signals.check()?;
        self.shelf.files.iter().try_for_each(Source::check)?;
        self.definition.as_ref().map_or(Ok(()), is_same_definition)
    }
}

/// Whether libvirt's definition file is still the one that was read.
///
/// # Errors
/// It is not.
pub fn is_same_definition(definition: &Definition) -> Result<(), Error> {
    let path = &definition.path;
    let found = std::fs::metadata(path).map_err(Error::file("look at", path))?;
    match (found.ino(), found.len(), files::modified(&found))
        == (definition.inode, definition.size, definition.modified)
    {
        true => Ok(()),
        false => Err(Error::Other(
            "the guest's definition was changed while its files were copied: try again".into(),
        )),
    }
}

/// A session that is over: who still asks is told, for a short time, and an answer under way gets there.
pub fn linger(connected: &AtomicUsize) {
    let end = Instant::now() + LINGER;
    while Instant::now() < end && connected.load(Relaxed) > 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Deletes what has moved: exactly that, none that somebody else needs, and nothing that has taken its place since. What
/// is gone already was deleted before a crash.
pub fn delete(journal: &Journal, keep: Option<&str>, in_use: &[KeptFile]) -> Deleted {
    let mut outcome = Deleted::default();
    let real = |path: &PathBuf| std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    let others: HashMap<_, _> = in_use
        .iter()
        .map(|kept| (real(&kept.path), &kept.reason))
        .collect();
    for entry in &journal.entries {
        let real = real(&entry.path);
        let reason = match (entry.fate, entry.kind, keep, others.get(&real)) {
            (_, _, Some(why), _) => why.to_owned(),
            (Fate::Shared, ..) => "both hosts use it".to_owned(),
            (Fate::Present, ..) => "the destination had it before".to_owned(),
            _ if entry.digest.is_none() => "its copy was not verified".to_owned(),
            (_, Kind::Block, ..) => {
                "it is a volume: remove it where it was made, if nothing needs it".to_owned()
            }
            (.., Some(why)) => (*why).clone(),
            _ if is_gone(&real) => {
                outcome.deleted.push(entry.path.clone());
                continue;
            }
            _ if !is_ours(&real, entry) => "it is not the file that was moved".to_owned(),
            _ if is_changed(&real, entry) => "it was changed after it was copied".to_owned(),
            _ if files::is_held(&real) => "another process uses it".to_owned(),
            _ => match remove(&entry.path, &real) {
                Ok(()) => {
                    tracing::info!(path = %entry.path.display(), "deleted: it has moved");
                    outcome.deleted.push(entry.path.clone());
                    continue;
                }
                Err(error) => error.to_string(),
            },
        };
        tracing::info!(path = %entry.path.display(), reason, "not deleted");
        let path = entry.path.clone();
        outcome.kept.push(KeptFile { path, reason });
    }
    if keep.is_none() {
        for directory in journal.inventory.directories.iter().rev() {
            // Not empty: somebody else's too.
            let _ = std::fs::remove_dir(&directory.path);
        }
    }
    for entry in &journal.entries {
        if let Some(parent) = entry.path.parent() {
            nonce::remove(parent, journal.session);
        }
    }
    outcome
}

fn is_gone(path: &Path) -> bool {
    let found = path.symlink_metadata();
    found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Whether a file that was to be deleted is still there, as it was when it was copied. What does not move is not looked at.
/// A device is never deleted: it has to be there, and its node is another one after a reboot.
pub fn is_whole(entry: &Entry) -> bool {
    let real = std::fs::canonicalize(&entry.path).unwrap_or_else(|_| entry.path.clone());
    match (entry.fate, entry.kind) {
        (Fate::Moves, Kind::File) => is_ours(&real, entry) && !is_changed(&real, entry),
        (Fate::Moves, Kind::Block) => is_device(&real) && holds(&real, entry.size),
        (Fate::Shared | Fate::Present, _) => true,
    }
}

/// Whether a device can be read, and has so many bytes.
fn holds(device: &Path, size: u64) -> bool {
    let length = std::fs::File::open(device)
        .and_then(|device| files::length(&device, &device.metadata()?, Kind::Block));
    length.is_ok_and(|length| length >= size)
}

/// Whether it has another length or time than the file that was copied.
fn is_changed(path: &Path, entry: &Entry) -> bool {
    let found = std::fs::metadata(path).ok();
    let found = found.map(|found| (found.len(), files::modified(&found)));
    found != entry.modified.map(|modified| (entry.size, modified))
}

/// The file, and the symbolic link that named it.
fn remove(path: &Path, real: &Path) -> std::io::Result<()> {
    std::fs::remove_file(real)?;
    match path.symlink_metadata() {
        Ok(link) if link.is_symlink() => std::fs::remove_file(path),
        _ => Ok(()),
    }
}
