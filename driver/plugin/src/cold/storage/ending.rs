//! The end of a move within one host, also after a crash: libvirt's definition says which files are the guest's, and the
//! others go.

use crate::cold::definition::{Definition, Source};
use crate::cold::destination::redefine;
use crate::cold::recovery::Standing;
use crate::cold::{durable, here, inventory, pools, unexpected, DELETED, LOCAL, SETTLED};
use crate::engine::Engine;
use crate::libvirt::{Connection, Error};
use ferry_contract::cold::journal::{Entry, Journal};
use ferry_contract::cold::{Deleted, Kept, Metadata, Part, Recovered, TO_STAY};
use ferry_contract::control::{Reply, Request};
use ferry_contract::session::Guest;
use ferry_host as host;
use std::collections::HashSet;
use std::path::PathBuf;

/// The guest's definition names the new files: so shall its snapshots and checkpoints, and the old files go. Where libvirt
/// does not take one of those, the old files stay, to which it would go back.
///
/// # Errors
/// What is not done; the guest has its new files all the same.
pub fn conclude(
    connection: Connection,
    guest: &Guest,
    engine: &Engine,
    metadata: &[Metadata],
    keep: bool,
) -> Result<Deleted, Error> {
    let told = connection
        .domain(guest.uuid)
        .and_then(|domain| redefine(domain.get(), metadata));
    let owned = durable::definitions(&guest.name).and_then(|()| own(engine));
    let cleared = owned.and_then(|()| clear(connection, guest, engine, keep || told.is_err()));
    let outcome = told.and(cleared);
    outcome.map_err(|error| {
        Error::operation(format_args!(
            "guest {} has its new disks, and the old ones are still there on host {}: {error}",
            guest.name,
            host::name()
        ))
    })
}

/// From here on a recovery only deletes.
fn own(engine: &Engine) -> Result<(), Error> {
    match engine.ask(&Request::ColdOwned, Some(LOCAL))? {
        Reply::ColdOwned { .. } => Ok(()),
        reply => Err(unexpected(&reply)),
    }
}

/// The guest's definition names the old files, and will: the new ones go.
pub fn give_up(guest: &Guest, engine: &Engine) {
    match engine.ask(&Request::ColdAbort, Some(SETTLED)) {
        Ok(Reply::ColdAborted) => {}
        // A recovery does it.
        Ok(reply) => tracing::warn!(guest = guest.name, "{}", unexpected(&reply)),
        Err(failure) => tracing::warn!(guest = guest.name, %failure, "the copies were not removed"),
    }
}

/// Removes the old files, but for those that a guest still refers to, this one included.
///
/// # Errors
/// The engine's; the guest has its new files.
pub fn clear(connection: Connection, guest: &Guest, engine: &Engine, keep: bool) -> Result<Deleted, Error> {
    let mut keep = keep.then(|| TO_STAY.to_owned());
    let in_use = match keep {
        Some(_) => Vec::new(),
        None => in_use(connection, guest).unwrap_or_else(|why| {
            tracing::warn!(
                guest = guest.name,
                "the files that moved stay at their old places, too: {why}"
            );
            keep = Some(why);
            Vec::new()
        }),
    };
    match engine.ask(&Request::ColdDelete { keep, in_use }, Some(DELETED))? {
        Reply::ColdDeleted(deleted) => {
            pools::refresh(connection, deleted.deleted.iter().map(PathBuf::as_path));
            Ok(deleted)
        }
        reply => Err(unexpected(&reply)),
    }
}

fn in_use(connection: Connection, guest: &Guest) -> Result<Vec<Kept>, String> {
    let mut used = inventory::others(connection, guest.uuid)?;
    let domain = connection.domain(guest.uuid).map_err(|error| error.to_string())?;
    used.extend(inventory::of(domain.get(), &guest.name)?);
    Ok(used)
}

/// Which files the guest's definition names.
#[derive(Debug, PartialEq, Eq)]
pub enum Names {
    /// Those that it had.
    Old,
    /// Those that were copied.
    New,
    /// Some of both, or none: somebody has edited it since.
    Unclear,
}

/// Does what is left to do after a crash, in which the engine has found this.
///
/// # Errors
/// libvirt's, or the engine's.
pub fn recovered(
    connection: Connection,
    journal: &Journal,
    engine: &Engine,
    found: Recovered,
) -> Result<Standing, Error> {
    const UNDONE: &str = "an interrupted move of storage was undone: its disks are where they were";
    const MOVED: &str = "an interrupted move of storage was ended: its disks have moved";
    let guest = &journal.guest;
    let keep = journal.options.keep;
    Ok(Standing::Ended(match found {
        Recovered::Undone => UNDONE,
        Recovered::Define => match names(
            connection,
            guest,
            &tops(journal, &journal.former),
            &tops(journal, &journal.entries),
        )? {
            Names::Old => {
                give_up(guest, engine);
                UNDONE
            }
            Names::New => {
                conclude(connection, guest, engine, &journal.inventory.metadata, keep)?;
                MOVED
            }
            Names::Unclear => {
                own(engine)?;
                clear(connection, guest, engine, true)?;
                "after an interrupted move of storage its definition names neither what it had nor all that was copied: nothing \
                 is deleted; remove by hand what it does not need"
            }
        },
        Recovered::Leaves => {
            clear(connection, guest, engine, keep)?;
            MOVED
        }
        Recovered::Unknown { cause } => return Ok(Standing::Open(cause)),
        other => {
            return Err(here(format!(
                "the engine found what cannot be within one host ({other:?})"
            )))
        }
    }))
}

/// The images of these that guests write to.
fn tops(journal: &Journal, entries: &[Entry]) -> Vec<PathBuf> {
    let parts = journal.inventory.files.iter().map(|file| &file.part);
    let tops = entries.iter().zip(parts).filter(|(_, part)| is_top(part));
    tops.map(|(entry, _)| entry.path.clone()).collect()
}

/// Whether it is an image that a guest writes to.
pub fn is_top(part: &Part) -> bool {
    matches!(part, Part::Disk { layer: 0, .. })
}

/// Which of these images the guest's definition names now.
///
/// # Errors
/// libvirt's.
pub fn names(
    connection: Connection,
    guest: &Guest,
    old: &[PathBuf],
    new: &[PathBuf],
) -> Result<Names, Error> {
    let domain = match connection.domain(guest.uuid) {
        Ok(domain) => domain,
        Err(error) if error.is_no_domain() => return Ok(Names::Unclear),
        Err(error) => return Err(error),
    };
    let definition = Definition::read(&domain.get().definition()?).map_err(here)?;
    let mut named = HashSet::new();
    for disk in &definition.disks {
        let path = match pools::path_of(connection, &disk.source) {
            Ok(path) => path,
            Err(why) if may_be(&disk.source, old.iter().chain(new)) => {
                return Err(here(format!("disk {}: {why}", disk.target)))
            }
            Err(_) => continue,
        };
        // One that may be another file is none of these.
        named.extend(path.map(|path| inventory::certain(&path).unwrap_or(path)));
    }
    Ok(judge(&named, old, new))
}

/// Whether a disk can have one of these files, as far as that is known without its pool, which may not be active: a volume
/// that is a file has the file's name.
fn may_be<'a>(source: &Source, mut files: impl Iterator<Item = &'a PathBuf>) -> bool {
    match source {
        Source::Volume { volume, .. } => files.any(|file| file.file_name() == Some(volume.as_ref())),
        _ => true,
    }
}

/// By the images that guests write to: each disk that moved has one.
fn judge(named: &HashSet<PathBuf>, old: &[PathBuf], new: &[PathBuf]) -> Names {
    let has = |path: &PathBuf| named.contains(path);
    match (old.iter().any(has), new.iter().any(has)) {
        (false, true) if new.iter().all(has) => Names::New,
        (true, false) if old.iter().all(has) => Names::Old,
        _ => Names::Unclear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_needed_for_what_moved() {
        let of = |volume: &str| Source::Volume {
            pool: "p".into(),
            volume: volume.into(),
        };
        let files = ["/a/x", "/b/x"].map(PathBuf::from);
        let may_be = |source| may_be(&source, files.iter());
        assert!(may_be(of("x")) && may_be(Source::File("/c".into())));
        assert!(!may_be(of("x.iso")) && !may_be(of("a")));
    }

    #[test]
    fn the_definition_decides() {
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
        let (old, new) = (paths(&["/a/x", "/a/y"]), paths(&["/b/x", "/b/y"]));
        let judged = |named: &[&str]| judge(&paths(named).into_iter().collect(), &old, &new);
        assert_eq!(judged(&["/a/x", "/a/y", "/cd"]), Names::Old);
        assert_eq!(judged(&["/b/x", "/b/y", "/cd"]), Names::New);
        for odd in [
            &["/a/x", "/b/y"][..],
            &["/a/x"],
            &["/b/x"],
            &[],
            &["/a/x", "/a/y", "/b/x", "/b/y"],
        ] {
            assert_eq!(judged(odd), Names::Unclear, "{odd:?}");
        }
    }
}
