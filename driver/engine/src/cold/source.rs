//! The source's engine: the guest is ours until the destination has asked for it, has everything, and nothing has changed.
//!
//! ```text
//!   ColdServe ─▶ prepared ──Commit──▶ committed ──Owned──▶ owned-there ──ColdDelete──▶ gone
//!                   │                     ├──Keep──▶ aborted ──Abort──▶ gone
//!                   │                     └──Abort──▶ gone
//!                   └── ColdAbort, the end of the plug-in, nobody there for too long ──▶ gone, or aborted
//! ```

use super::deletion::delete;
use super::door::{linger, listen, refusal};
use super::files::{self, Source};
use super::journal::{Claim, Kept};
use super::machine;
use super::messages::{Answer, Ask, RUNS};
use super::nonce::Nonces;
use super::ownership::Ownership;
use super::record::Recorder;
use super::serve::Shelf;
use super::Error;
use crate::control::{Control, Meter};
use crate::live::destination::bind;
use crate::live::signals::Signals;
use crate::report::Outcome;
use crate::wire::{message, Connection, Identity, Listener, Protection, Purpose, Security, Token};
use ferry_contract::cold::journal::{self, Entry, Fate, Journal, Role, State};
use ferry_contract::cold::{Definition, Digest, Inventory, Kind, Serve};
use ferry_contract::control::{Reply, Request};
use ferry_contract::cookie::ColdOffer;
use ferry_contract::session::Encryption;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
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
                Some(_) => tracing::warn!("a request out of turn"),
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
    let Some(earlier) = earlier else { return Ok(()) };
    let (name, peer) = (&earlier.guest.name, &earlier.peer);
    match (earlier.role, earlier.state) {
        (_, State::Aborted | State::Prepared | State::Pulling) => Ok(()),
        // Another journal in its place, and that host would never hear it.
        (Role::Destination, State::Owned) => Err(Error::Other(format!(
            "host {peer}, which guest {name} came from, has not heard yet that it is here: run \"virt-ferry recover {name}\" on \
             both hosts, or, if {peer} is lost for good, \"virt-ferry recover --lost {peer} {name}\" here"
        ))),
        (role, state) => Err(Error::Other(format!(
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
        peer_machine: None,
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
        definition: Some(serve.xml.clone()),
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
                    machine: machine::this(),
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
                // Over NFS they are the server's: the guest could not be started there.
                self.shelf.files.iter().for_each(Source::lift);
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
