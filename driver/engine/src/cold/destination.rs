//! The destination's engine: everything is here and verified before the source is asked to let go.
//!
//! ```text
//!   ColdPull ─▶ pulling ─▶ ready ──ColdCommit──▶ committing ──the source let go──▶ placed ──ColdOwned──▶ owned ──told──▶ gone
//!                  └── failure, ColdAbort,     └──────────────┬───────────────────────────┘
//!                      the end of the plug-in ──▶ gone        └─▶ returning ──the source keeps it──▶ aborted ──told──▶ gone
//! ```
//!
//! From `ready` on, what is here may be all that is left of the guest: it is removed once the source has said that it keeps
//! the guest, or the operator says so. As long as neither has, it stays, and nobody starts the guest here.

use super::acl::Acl;
use super::chunks::union;
use super::handover;
use super::hash::manifest;
use super::journal::{Claim, Kept};
use super::leftovers::{follow, leftovers, remove_useless, waits, Left};
use super::link::{peer, Link, Opened, Peer, RECONNECT};
use super::messages::{Ask, Looked};
use super::place::{self, is_device, Target};
use super::pull::{Incoming, Pull};
use super::reader::{self, Reader};
use super::record::Recorder;
use super::reserve::{survey, There};
use super::source::refuse_unfinished;
use super::undo::undo;
use super::users::Owner;
use super::{extents, users, Error};
use crate::control::{Control, Meter};
use crate::live::signals::Signals;
use crate::report::{self, Outcome};
use crate::wire::Identity;
use ferry_contract::cold::journal::{self, Entry, Fate, Journal, Role, State};
use ferry_contract::cold::{Digest, Kind, Options, Pull as Order};
use ferry_contract::control::{FailureKind, Reply, Request};
use ferry_contract::session::Encryption;
use ferry_host::Others;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the plug-in may take with its first request.
const UNTIL_ASKED: Duration = Duration::from_secs(60);
/// How long libvirt may take between its phases.
const UNTIL_FINISHED: Duration = Duration::from_secs(15 * 60);
/// How long the source may take, all together, to say what its files are like.
const LOOKED: Duration = Duration::from_secs(10 * 60);
/// Runs of all files that are kept apart, 16 bytes each: a disk of 8 TiB, every other block of it empty. Of more, the
/// gaps are asked for, too.
const MAX_RUNS: usize = 4 << 20;
/// Bytes of all files' attributes.
const MAX_ATTRIBUTES: usize = 64 << 20;
/// Data connections, unless the operator says how many. Each waits for both hosts' disks in turn (with two of them, the
/// source's threads spent half of their time in reads), so more than there are processors can be of use. How much, has not been
/// measured on a machine without other work.
const STREAMS: u16 = 4;

/// Serves one plug-in, from its first request to its end.
pub fn run(control: &Control, meter: &Arc<Meter>, signals: &Arc<Signals>) -> Result<(), crate::live::Error> {
    let Some(Request::ColdPull(pull)) = signals.next_request(Some(Instant::now() + UNTIL_ASKED)) else {
        return Ok(());
    };
    let span = tracing::info_span!("cold migration", guest = pull.guest.name, role = "destination");
    let _entered = span.enter();
    let host = pull.host.clone();
    let mut told = Told {
        recorder: Recorder::default(),
        meter,
        directory: &pull.settings.log_directory,
    };
    match arrive(&pull, &mut told, signals) {
        Ok(arrived) => {
            told.recorder.enter("registration");
            control.reply(Reply::ColdPulled);
            arrived.conclude(control, &mut told, signals);
        }
        Err(error) => {
            tracing::error!("{error}");
            control.reply(Reply::Failed(error.failure(&host)));
        }
    }
    Ok(())
}

/// What is to be told of the migration afterwards.
struct Told<'a> {
    recorder: Recorder,
    meter: &'a Arc<Meter>,
    directory: &'a Path,
}

impl Told<'_> {
    fn ended(&mut self, journal: &Journal, error: Option<&Error>) {
        let outcome = match error {
            None => Outcome::Completed,
            Some(error) if error.failure("").kind == FailureKind::Cancelled => Outcome::Cancelled,
            Some(error) => Outcome::Failed {
                stage: None,
                error: error.to_string(),
            },
        };
        self.recorder
            .publish(journal, self.meter, outcome, self.directory);
    }
}

/// What ended the session says more than a connection that was broken off for it.
fn signals_cause(error: Error, signals: &Signals) -> Error {
    match error {
        Error::Wire(crate::wire::Error::BrokenOff { .. }) => signals.check().err().map_or(error, Error::from),
        error => error,
    }
}

/// All files are here, under temporary names.
struct Arrived {
    kept: Kept,
    link: Link,
}

/// Reserves, pulls and verifies; whatever fails leaves nothing behind, here or at the source.
fn arrive(pull: &Order, told: &mut Told<'_>, signals: &Arc<Signals>) -> Result<Arrived, Error> {
    let claim = Claim::take(&pull.settings.state_directory, pull.guest.uuid)?;
    let earlier = claim.find()?;
    // Of one that waits for its source, it decides who the source is.
    if !earlier.as_ref().is_some_and(waits) {
        refuse_unfinished(earlier.as_ref())?;
    }
    let earlier = earlier.filter(|journal| journal.role == Role::Destination);
    let inventory = &pull.offer.inventory;
    if pull.plan.places.len() != inventory.files.len() {
        return Err(Error::Other("the plan does not place every file".into()));
    }
    // Always, unless both hosts say never.
    let encryption = match (pull.settings.encryption, pull.offer.encryption) {
        (Encryption::Never, Encryption::Never) => Encryption::Never,
        _ => Encryption::Always,
    };
    let identity = Identity::generate(pull.offer.session)?;
    let key = identity.expose_key().to_vec();
    let certificate = identity.certificate().to_vec();
    let mut link = Link::new(peer(&pull.offer, encryption, identity)?, &pull.host);
    let mut arriving = Arriving {
        pull,
        told,
        signals,
        kept: None,
    };
    let outcome = arriving.run(&mut link, claim, earlier, |source, entries| Journal {
        version: journal::VERSION,
        role: Role::Destination,
        state: State::Pulling,
        session: pull.offer.session,
        guest: pull.guest.clone(),
        host: pull.host.clone(),
        peer: source.host,
        peer_machine: source.machine,
        address: pull.offer.host.clone(),
        port: pull.offer.port,
        token: pull.offer.token.clone(),
        encryption,
        certificate: certificate.clone(),
        key: key.clone(),
        peer_certificate: Some(pull.offer.certificate.clone()),
        inventory: inventory.clone(),
        entries,
        directories: Vec::new(),
        manifest: None,
        options: Options::default(),
        definition: Some(pull.plan.definition.clone()),
        former: Vec::new(),
    });
    match (outcome, arriving.kept) {
        (Ok(()), Some(kept)) => Ok(Arrived { kept, link }),
        (outcome, kept) => {
            let error = outcome
                .err()
                .unwrap_or_else(|| Error::Other("nothing was pulled".into()));
            let error = signals_cause(error, signals);
            if let Some(kept) = kept {
                undo(&kept, &Others::default());
                told.ended(&kept, Some(&error));
                kept.remove()?;
            }
            // It frees the guest sooner; the source notices by itself, too.
            link.limit(None);
            if let Err(untold) = link.abort(&error, Duration::from_secs(3)) {
                tracing::warn!("the source could not be told: {untold}");
            }
            Err(error)
        }
    }
}

/// What the stages of an arrival share.
struct Arriving<'a, 'b> {
    pull: &'a Order,
    told: &'a mut Told<'b>,
    signals: &'a Arc<Signals>,
    kept: Option<Kept>,
}

impl Arriving<'_, '_> {
    fn run(
        &mut self,
        link: &mut Link,
        claim: Claim,
        earlier: Option<Journal>,
        journal: impl FnOnce(Opened, Vec<Entry>) -> Journal,
    ) -> Result<(), Error> {
        let (pull, signals) = (self.pull, self.signals);
        let inventory = &pull.offer.inventory;
        self.told.recorder.enter("reservation");
        // Until the transfer, at which people can look, and which they can end.
        link.limit(Some(LOOKED));
        let source = link.open(signals)?;
        if let Some(waiting) = earlier.as_ref().filter(|earlier| waits(earlier)) {
            follow(waiting, &source)?;
        }
        let (mut looked, mut attributes) = (Vec::new(), 0);
        for (number, file) in inventory.files.iter().enumerate() {
            let found = link.look(number as u32, signals)?;
            if found.size != file.size || found.kind != file.kind {
                return Err(Error::Other(format!(
                    "{} is another file than was offered",
                    file.path.display()
                )));
            }
            let length = |(name, value): &(String, Vec<u8>)| name.len() + value.len();
            attributes += found.attributes.iter().map(length).sum::<usize>();
            attributes += found.acl.as_ref().map_or(0, Acl::length);
            if attributes > MAX_ATTRIBUTES || found.acl.as_ref().is_some_and(Acl::is_too_long) {
                return Err(Error::Other("the source's files have too many attributes".into()));
            }
            looked.push(found);
        }
        let left = leftovers(earlier.as_ref(), &pull.plan.places);
        let there = There {
            session: pull.offer.session,
            inventory,
            looked: &looked,
            nonce: &source.nonce,
            elsewhere: "give the disk another path with --xml",
        };
        let (fates, problems) = survey(
            &there,
            &pull.plan,
            &left.values().map(|left| left.temporary.clone()).collect(),
        );
        if !problems.is_empty() {
            return Err(Error::Problems(problems));
        }
        let entries = self.entries(&fates, &left);
        // From here on a crash leaves a trace; one of an earlier attempt that is of no use any more goes first.
        remove_useless(&claim, earlier.as_ref(), &left)?;
        let mut journal = journal(source, entries);
        journal.directories = earlier.map(|earlier| earlier.directories).unwrap_or_default();
        let kept = Kept::new(claim, journal)?;
        let kept = self.kept.insert(kept);
        for (path, like) in place::directories(inventory, &pull.plan.places) {
            if place::make_directory(&path, like)? {
                kept.note(|journal| journal.directories.insert(0, path))?;
            }
        }
        link.note(&Ask::Fates { fates: fates.clone() }, signals)?;
        let files = self.open(link, looked, &fates, &left)?;
        link.limit(None);
        let kept = self
            .kept
            .as_mut()
            .ok_or_else(|| Error::Other("no journal".into()))?;
        kept.note(|journal| {
            for file in &files {
                let entry = journal.entries.get_mut(file.number as usize);
                let identity = file.target.as_ref().and_then(Target::identity);
                if let (Some(entry), Some(identity)) = (entry, identity) {
                    identity.note(entry);
                }
            }
        })?;
        self.told.recorder.enter("transfer");
        let meter = self.told.meter;
        let digests = transfer(link, files, pull.streams, signals, meter, inventory.files.len())?;
        link.note(
            &Ask::Ready {
                digests: digests.clone(),
            },
            signals,
        )?;
        kept.enter(State::Ready, |journal| {
            journal.manifest = Some(manifest(digests.iter().copied()));
            for (entry, digest) in journal.entries.iter_mut().zip(&digests) {
                entry.digest = *digest;
            }
        })
    }

    fn entries(&self, fates: &[Fate], left: &BTreeMap<PathBuf, Left>) -> Vec<Entry> {
        let files = self.pull.offer.inventory.files.iter();
        let planned = files.zip(&self.pull.plan.places).zip(fates);
        planned
            .map(|((file, path), fate)| {
                let device = is_device(path);
                let temporary = || match left.get(path) {
                    Some(left) => left.temporary.clone(),
                    None => place::temporary(path, self.pull.offer.session),
                };
                Entry {
                    source: file.path.clone(),
                    path: path.clone(),
                    temporary: (*fate == Fate::Moves && !device).then(temporary),
                    kind: if device { Kind::Block } else { Kind::File },
                    size: file.size,
                    fate: *fate,
                    digest: None,
                    identity: None,
                    lasting: None,
                    modified: None,
                }
            })
            .collect()
    }

    /// Makes or takes up every file that is to be filled, and asks where it has data.
    fn open(
        &self,
        link: &mut Link,
        looked: Vec<Looked>,
        fates: &[Fate],
        left: &BTreeMap<PathBuf, Left>,
    ) -> Result<Vec<Incoming>, Error> {
        let (mut files, mut most) = (Vec::new(), MAX_RUNS);
        let inventory = &self.pull.offer.inventory;
        let planned = inventory.files.iter().zip(&self.pull.plan.places).zip(fates);
        // All of them, before the first is written to.
        let devices = self.pull.plan.places.iter().zip(fates).zip(&looked);
        let trouble = devices.filter_map(|((path, fate), looked)| {
            (*fate == Fate::Moves && is_device(path)).then(|| one_device(path, looked))?
        });
        let trouble: Vec<String> = trouble.collect();
        if !trouble.is_empty() {
            return Err(Error::Problems(trouble));
        }
        for (number, (((file, path), fate), looked)) in planned.zip(looked).enumerate() {
            let number = number as u32;
            let size = looked.size;
            let data =
                |file: &File, path| extents::data_blocks(file, size).map_err(Error::file("look at", path));
            let (target, reader, have) = match fate {
                Fate::Shared => continue,
                Fate::Present => {
                    let failed = Error::file("open", path);
                    let there = File::open(path).map_err(failed)?;
                    if there.metadata().map_err(failed)?.len() != size {
                        return Err(Error::Other(format!(
                            "{} is not as long as {} at the source: they are not the same base",
                            path.display(),
                            file.path.display()
                        )));
                    }
                    let have = data(&there, path)?;
                    (None, Some(Reader::new(there, path)), have)
                }
                Fate::Moves if is_device(path) => {
                    (Some(Target::device(path, size, self.signals)?), None, Vec::new())
                }
                Fate::Moves => {
                    let (target, have) = match left.get(path) {
                        Some(left) => {
                            let target = Target::left(&left.temporary, size, &left.entry)?;
                            let have = data(target.reader().file(), &left.temporary)?;
                            (target, have)
                        }
                        None => {
                            let fresh = place::temporary(path, self.pull.offer.session);
                            (Target::file(&fresh, size)?, Vec::new())
                        }
                    };
                    (Some(target), None, have)
                }
            };
            let runs = link.runs(number, size, most.max(1), self.signals)?;
            most = most.saturating_sub(runs.len());
            let runs = union(&runs, &have);
            files.push(Incoming {
                number,
                source: file.path.clone(),
                path: path.clone(),
                looked,
                target,
                reader,
                runs,
                have,
                blocks: Mutex::default(),
            });
        }
        Ok(files)
    }
}

/// Pulls everything; the digests of all files of the inventory.
fn transfer(
    link: &mut Link,
    files: Vec<Incoming>,
    streams: Option<u16>,
    signals: &Arc<Signals>,
    meter: &Arc<Meter>,
    count: usize,
) -> Result<Vec<Option<Digest>>, Error> {
    let streams = streams.unwrap_or(STREAMS).clamp(1, 16);
    let data = Peer {
        addresses: link.peer().addresses.clone(),
        security: link.peer().security.clone(),
    };
    let pull = Pull::new(&data, files, signals, meter);
    pull.run(streams, |bytes| link.note(&Ask::Verified { bytes }, signals))?;
    let mut digests = vec![None; count];
    for file in pull.files {
        if let Some(target) = &file.target {
            let like = &file.looked;
            let acl = like.acl.as_ref().map(|acl| acl_here(acl, &file.path));
            target.complete(like, Owner::from_elsewhere(&like.owner, &like.group), acl)?;
        }
        let blocks = file.blocks.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(digest) = digests.get_mut(file.number as usize) {
            *digest = Some(blocks.digest(file.looked.size));
        }
    }
    Ok(digests)
}

/// A file's access control list, by this host's numbers.
fn acl_here(acl: &Acl<String>, path: &Path) -> Acl<u32> {
    let (acl, lost) = acl.here(users::named_user_id, users::named_group_id);
    if !lost.is_empty() {
        tracing::warn!(
            path = %path.display(),
            "not known on this host, and without the access that its list gave them: {}",
            // In the other host's words.
            report::printable(&lost.join(", "), 500)
        );
    }
    acl
}

/// Why this device must not be written to: it may be the source's own, which both hosts have. Then filling it would empty it.
fn one_device(path: &Path, looked: &Looked) -> Option<String> {
    let theirs = looked.sample?;
    let shown = path.display();
    let found = File::open(path).and_then(|file| reader::sample(&Reader::new(file, path), looked.size));
    match found {
        Ok(ours) if ours != theirs => None,
        Ok(_) => Some(format!(
            "{shown} holds what the source's device holds: it may be the same storage, which both hosts see. If it is, \
             leave the disk out (--migrate-disks); if it is not, empty its beginning first (wipefs --all, or dd)"
        )),
        Err(error) => Some(format!("cannot read {shown}: {error}")),
    }
}

impl Arrived {
    /// Does what the plug-in asks until the guest is one host's.
    fn conclude(mut self, control: &Control, record: &mut Told<'_>, signals: &Signals) {
        let deadline = Instant::now() + UNTIL_FINISHED;
        let host = self.kept.host.clone();
        loop {
            let request = signals.next_request(Some(deadline));
            let outcome = match request {
                Some(Request::ColdCommit) => self.commit(signals).map(|()| Reply::ColdPlaced),
                Some(Request::ColdOwned) => match self.owned(record, signals) {
                    Ok(told) => return control.reply(Reply::ColdOwned { told }),
                    Err((arrived, error)) => {
                        self = *arrived;
                        Err(error)
                    }
                },
                Some(Request::ColdAbort) => {
                    match self.abort(record, signals, "libvirt or the operator gave it up") {
                        Ok(()) => return control.reply(Reply::ColdAborted),
                        Err(error) => return control.reply(Reply::Failed(error.failure(&host))),
                    }
                }
                Some(_) => {
                    tracing::warn!("a request out of turn");
                    continue;
                }
                // The plug-in has gone. Once the source has been asked, it may have let go: a recovery finds out, and does
                // libvirt's part.
                None => {
                    if self.kept.state == State::Ready {
                        if let Err(error) =
                            self.abort(record, signals, "the destination's daemon gave the migration up")
                        {
                            tracing::error!("{error}");
                        }
                    }
                    return;
                }
            };
            match outcome {
                Ok(reply) => control.reply(reply),
                Err(error) => {
                    tracing::error!("{error}");
                    control.reply(Reply::Failed(error.failure(&host)));
                }
            }
        }
    }

    /// Takes the guest over from the source and puts its files in place.
    fn commit(&mut self, signals: &Signals) -> Result<(), Error> {
        if self.kept.state == State::Placed {
            return Ok(());
        }
        signals.check()?;
        handover::commit(&mut self.kept, &mut self.link, signals, RECONNECT).map_err(|error| match error {
            Error::Wire(_) => handover::silent(&self.kept, &error),
            error => error,
        })
    }

    /// The guest is registered here; says whether the source knows.
    fn owned(mut self, record: &mut Told<'_>, signals: &Signals) -> Result<bool, (Box<Self>, Error)> {
        let told = handover::owned(&mut self.kept, &mut self.link, signals);
        if told.is_ok() {
            record.ended(&self.kept, None);
        }
        match told {
            Ok(true) => match self.kept.remove() {
                Ok(()) => Ok(true),
                // It says that the guest is here, which is true.
                Err(error) => {
                    tracing::warn!("{error}");
                    Ok(true)
                }
            },
            Ok(false) => Ok(false),
            Err(error) => Err((Box::new(self), error)),
        }
    }

    fn abort(self, record: &mut Told<'_>, signals: &Signals, cause: &str) -> Result<(), Error> {
        let cause = signals
            .check()
            .map_or_else(Error::from, |()| Error::Other(cause.to_owned()));
        record.ended(&self.kept, Some(&cause));
        if !handover::hand_back(self.kept, self.link, &cause, &Others::default())? {
            tracing::warn!("the source could not be told that nothing is left here");
        }
        Ok(())
    }
}
