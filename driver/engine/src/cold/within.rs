//! A guest that is shut off stays on its host, and its disks go to another data store there.
//!
//! ```text
//!   ColdMove ─▶ pulling ─▶ committing ─▶ placed ──ColdOwned──▶ owned ──ColdDelete──▶ gone
//!                  └──────────┴────────────┴── failure, cancelled, ColdAbort ──▶ gone
//! ```
//!
//! One process, one journal, and one that decides: libvirt's definition. Up to `placed` it names the old files, and
//! whatever was made is removed; in `placed`, after a crash, the plug-in looks at it; from `owned` on it names the new ones.

use super::copy::{self, Pair};
use super::deletion::delete;
use super::files::{self, Source};
use super::hash::manifest;
use super::journal::{Claim, Kept};
use super::messages::Looked;
use super::place::{self, Target};
use super::record::Recorder;
use super::reserve::{survey, There};
use super::source::is_same_definition;
use super::undo::undo;
use super::users::Owner;
use super::{extents, header, Error};
use crate::control::{Control, Meter};
use crate::live::signals::Signals;
use crate::report::Outcome;
use ferry_contract::cold::journal::{self, Entry, Fate, Journal, Role, State};
use ferry_contract::cold::storage::Relocate;
use ferry_contract::cold::{File, Inventory, Item, Kind, Options, Plan, Recovered};
use ferry_contract::control::{Reply, Request};
use ferry_contract::session::{Encryption, Token};
use ferry_host::Others;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long the plug-in may take with its first request.
const UNTIL_ASKED: Duration = Duration::from_secs(60);
/// How long libvirt may take to define the guest, and the plug-in to look at all others'.
const UNTIL_FINISHED: Duration = Duration::from_secs(15 * 60);

/// Serves one plug-in, from its first request to its end.
pub fn run(control: &Control, meter: &Arc<Meter>, signals: &Arc<Signals>) -> Result<(), crate::live::Error> {
    let Some(Request::ColdMove(order)) = signals.next_request(Some(Instant::now() + UNTIL_ASKED)) else {
        return Ok(());
    };
    let span = tracing::info_span!("move of storage", guest = order.guest.name);
    let _entered = span.enter();
    let fail = |error: &Error| {
        tracing::error!("{error}");
        control.reply(Reply::Failed(error.failure(&order.host)));
    };
    let session = match Session::begin(&order, control, meter) {
        Ok(Some(session)) => session,
        Ok(None) => {
            control.reply(Reply::ColdPlanned);
            return Ok(());
        }
        Err(error) => {
            fail(&error);
            return Ok(());
        }
    };
    match session.copy(&order, meter, signals) {
        Ok((kept, sources, mut recorder)) => {
            recorder.enter("registration");
            control.reply(Reply::ColdPlaced);
            let ended = conclude(
                kept,
                &sources,
                &Others::default(),
                &mut recorder,
                control,
                signals,
            );
            if let Some(journal) = ended {
                recorder.publish(&journal, meter, Outcome::Completed, &order.settings.log_directory);
            }
        }
        Err(error) => fail(&error),
    }
    Ok(())
}

/// Nothing is in the way, all files are fenced, and the journal says that they are being copied.
struct Session {
    kept: Kept,
    sources: Vec<Source>,
}

impl Session {
    /// Looks whether anything is in the way; `None` where that was all.
    fn begin(order: &Relocate, control: &Control, meter: &Meter) -> Result<Option<Self>, Error> {
        let claim = Claim::take(&order.settings.state_directory, order.guest.uuid)?;
        if claim
            .find()?
            .is_some_and(|earlier| earlier.state != State::Aborted)
        {
            return Err(Error::Other(format!(
                "an earlier move of this guest has not come to its end: run \"virt-ferry recover {}\" first",
                order.guest.name
            )));
        }
        let mut problems = in_the_way(order);
        let sources = match files::open(&order.items) {
            Ok((sources, _)) => sources,
            Err(Error::Problems(more)) => {
                problems.extend(more);
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        if !problems.is_empty() {
            return Err(Error::Problems(problems));
        }
        if order.places.len() != sources.len() {
            return Err(Error::Other("the plan does not place every file".into()));
        }
        if order.dry_run {
            return Ok(None);
        }
        // Who looks on sees at once how much there is.
        let total = sources
            .iter()
            .map(|source| extents::bytes(&source.runs, source.size))
            .sum();
        meter.total.store(total, Relaxed);
        meter.remaining.store(total, Relaxed);
        control.report();
        let kept = Kept::new(claim, journal_of(order, &sources))?;
        Ok(Some(Self { kept, sources }))
    }

    /// Copies, verifies and names; whatever fails leaves nothing behind.
    fn copy(
        mut self,
        order: &Relocate,
        meter: &Arc<Meter>,
        signals: &Signals,
    ) -> Result<(Kept, Vec<Source>, Recorder), Error> {
        let mut recorder = Recorder::default();
        let sources = std::mem::take(&mut self.sources);
        match place_all(&mut self.kept, sources, order, meter, signals, &mut recorder) {
            Ok(sources) => Ok((self.kept, sources, recorder)),
            Err(error) => {
                undo(&self.kept, &Others::default());
                let outcome = match &error {
                    Error::Ended(crate::live::Error::Cancelled) => Outcome::Cancelled,
                    error => Outcome::Failed {
                        stage: None,
                        error: error.to_string(),
                    },
                };
                recorder.publish(&self.kept, meter, outcome, &order.settings.log_directory);
                self.kept.remove()?;
                Err(error)
            }
        }
    }
}

fn place_all(
    kept: &mut Kept,
    sources: Vec<Source>,
    order: &Relocate,
    meter: &Arc<Meter>,
    signals: &Signals,
    recorder: &mut Recorder,
) -> Result<Vec<Source>, Error> {
    recorder.enter("copy");
    let mut pairs = Vec::new();
    for (source, entry) in sources.into_iter().zip(&kept.entries) {
        let temporary = entry.temporary.as_deref().unwrap_or(&entry.path);
        let target = Target::file(temporary, source.size)?;
        pairs.push(Pair::new(source, target));
    }
    kept.note(|journal| {
        for (entry, pair) in journal.entries.iter_mut().zip(&pairs) {
            if let Some(identity) = pair.to.identity() {
                identity.note(entry);
            }
        }
    })?;
    copy::all(&pairs, signals, meter)?;
    for pair in &pairs {
        let like = pair.from.looked(false)?;
        let owner = Owner::from_here(&like.owner, &like.group);
        pair.to.complete(&like, owner, pair.from.acl()?)?;
    }
    signals.check()?;
    pairs.iter().try_for_each(|pair| pair.from.check())?;
    if let Some(definition) = &order.definition {
        is_same_definition(definition)?;
    }
    kept.enter(State::Committing, |journal| {
        let digests: Vec<_> = pairs.iter().map(|pair| Some(pair.digest())).collect();
        journal.manifest = Some(manifest(digests.iter().copied()));
        let entries = journal.entries.iter_mut().zip(&mut journal.former);
        for ((new, old), digest) in entries.zip(digests) {
            (new.digest, old.digest) = (digest, digest);
        }
    })?;
    place::put_in_place(kept)?;
    order.renames.iter().try_for_each(header::rename)?;
    // The last moment at which it can be ended.
    signals.check()?;
    kept.enter(State::Placed, |_| {})?;
    Ok(pairs.into_iter().map(|pair| pair.from).collect())
}

/// Does what the plug-in asks until the guest's definition names one set of files and the other is gone. What is
/// left by a plug-in that goes before is a recovery's. `Some` is what has come to its good end.
fn conclude(
    mut kept: Kept,
    sources: &[Source],
    others: &Others,
    recorder: &mut Recorder,
    control: &Control,
    signals: &Signals,
) -> Option<Journal> {
    let deadline = Instant::now() + UNTIL_FINISHED;
    let host = kept.host.clone();
    let fail = |error: &Error| control.reply(Reply::Failed(error.failure(&host)));
    loop {
        match (signals.next_request(Some(deadline)), kept.state) {
            (Some(Request::ColdOwned), State::Placed) => match kept.enter(State::Owned, |_| {}) {
                Ok(()) => control.reply(Reply::ColdOwned { told: true }),
                Err(error) => fail(&error),
            },
            (Some(Request::ColdAbort), State::Placed) => {
                undo(&kept, others);
                match kept.remove() {
                    Ok(()) => control.reply(Reply::ColdAborted),
                    Err(error) => fail(&error),
                }
                return None;
            }
            (Some(Request::ColdDelete { keep, in_use }), State::Owned) => {
                // Whoever holds a lock on them now is somebody else.
                sources.iter().for_each(Source::lift);
                let journal = Journal::clone(&kept);
                let former = Journal {
                    entries: journal.former.clone(),
                    ..journal.clone()
                };
                let deleted = delete(&former, keep.as_deref(), &in_use);
                recorder.left(&deleted);
                if let Err(error) = kept.remove() {
                    // It says that the guest has the new files, which is true.
                    tracing::warn!("{error}");
                }
                control.reply(Reply::ColdDeleted(deleted));
                return Some(journal);
            }
            (Some(_), state) => {
                tracing::warn!(?state, "a request out of turn");
                fail(&Error::Other(format!("this cannot be done in state {state:?}")));
            }
            (None, _) => return None,
        }
    }
}

/// After a crash: what was made is removed, unless the definition may name it, or others need it by now.
pub fn recover(kept: Kept, others: &Others, control: &Control, signals: &Signals) -> Result<(), Error> {
    let found = match kept.state {
        State::Placed => Recovered::Define,
        State::Owned => Recovered::Leaves,
        _ => {
            undo(&kept, others);
            kept.remove()?;
            control.reply(Reply::ColdRecovered(Recovered::Undone));
            return Ok(());
        }
    };
    control.reply(Reply::ColdRecovered(found));
    conclude(kept, &[], others, &mut Recorder::default(), control, signals);
    Ok(())
}

/// Everything that is in the way of the copies.
fn in_the_way(order: &Relocate) -> Vec<String> {
    let inventory = inventory(order, order.items.iter().map(described).collect());
    let looked: Vec<_> = inventory.files.iter().map(unshared).collect();
    let there = There {
        session: Uuid::nil(),
        inventory: &inventory,
        looked: &looked,
        nonce: "",
        elsewhere: "choose another directory",
    };
    let plan = Plan {
        places: order.places.clone(),
        media: Vec::new(),
        incremental: false,
        definition: String::new(),
    };
    let (_, mut problems) = survey(&there, &plan, &BTreeSet::new());
    let devices = order.places.iter().filter(|place| place::is_device(place));
    problems.extend(devices.map(|place| format!("{} is a device, no place for a file", place.display())));
    // What is wrong with a directory is so for each file in it.
    let mut said = BTreeSet::new();
    problems.retain(|problem| said.insert(problem.clone()));
    problems
}

/// A file as it looks from outside; one that cannot be looked at is a problem of those who open it.
fn described(item: &Item) -> File {
    let found = std::fs::metadata(&item.path).ok();
    File {
        path: item.path.clone(),
        part: item.part.clone(),
        kind: Kind::File,
        size: found.as_ref().map_or(0, |found| found.len()),
        allocated: found.map_or(0, |found| found.blocks() * 512),
    }
}

/// On one host, no other host sees a file.
fn unshared(file: &File) -> Looked {
    Looked {
        size: file.size,
        kind: file.kind,
        mode: 0,
        owner: String::new(),
        group: String::new(),
        attributes: Vec::new(),
        acl: None,
        name: String::new(),
        has_nonce: false,
        sample: None,
    }
}

fn inventory(order: &Relocate, files: Vec<File>) -> Inventory {
    Inventory {
        guest: order.guest.clone(),
        autostart: false,
        files,
        directories: Vec::new(),
        media: Vec::new(),
        metadata: order.metadata.clone(),
    }
}

fn journal_of(order: &Relocate, sources: &[Source]) -> Journal {
    let session = Uuid::new_v4();
    let directory = order
        .places
        .first()
        .and_then(|place| place.parent())
        .unwrap_or(Path::new("/"));
    let former = |source: &Source| Entry {
        source: source.path.clone(),
        path: source.path.clone(),
        temporary: None,
        kind: source.kind,
        size: source.size,
        fate: Fate::Moves,
        digest: None,
        identity: Some(source.identity.number),
        lasting: source.identity.lasting.clone(),
        modified: Some(source.modified),
    };
    let entry = |(source, place): (&Source, &PathBuf)| Entry {
        path: place.clone(),
        temporary: Some(place::temporary(place, session)),
        kind: Kind::File,
        identity: None,
        lasting: None,
        modified: None,
        ..former(source)
    };
    Journal {
        version: journal::VERSION,
        role: Role::Within,
        state: State::Pulling,
        session,
        guest: order.guest.clone(),
        host: order.host.clone(),
        peer: format!("{}:{}", order.host, directory.display()),
        peer_machine: None,
        address: String::new(),
        port: 0,
        // Nobody connects.
        token: Token::new([0; Token::LENGTH]),
        encryption: Encryption::Never,
        certificate: Vec::new(),
        key: Vec::new(),
        peer_certificate: None,
        inventory: inventory(order, sources.iter().map(Source::owned).collect()),
        entries: sources.iter().zip(&order.places).map(entry).collect(),
        directories: Vec::new(),
        manifest: None,
        options: Options {
            keep: order.keep,
            ..Options::default()
        },
        definition: None,
        former: sources.iter().map(former).collect(),
    }
}
