//! Interrupted cold migrations: the plug-in in the daemon brings them to an end, this makes it try and says how each stands.

use anyhow::{Context, Result};
use ferry_contract::cold::journal::{Journal, DIRECTORY, MAX_LENGTH};
use ferry_contract::cold::RECOVER;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};
use virt::connect::Connect;

/// For both hosts' engines to find each other.
const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// One migration that has not come to its end: the guest's name, and how it stands.
struct Open {
    guest: String,
    stands: String,
}

/// Has the daemon try, and waits until nothing of these guests is left open; `false` where something is.
///
/// # Errors
/// If libvirt or the journals cannot be asked.
pub fn run(uri: &str, guests: &[String]) -> Result<bool> {
    let concerned = || -> Result<Vec<Open>> {
        let mut open = open()?;
        open.retain(|open| guests.is_empty() || guests.contains(&open.guest));
        Ok(open)
    };
    if concerned()?.is_empty() {
        println!("no migration is open on this host");
        return Ok(true);
    }
    let libvirt = Connect::open(Some(uri)).with_context(|| format!("cannot ask libvirt at {uri}"))?;
    // Not a guest's definition, but the word at which the plug-in looks: libvirt itself refuses it.
    let _ = libvirt.define_domain_xml(RECOVER);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let open = concerned()?;
        if open.is_empty() {
            println!("nothing is open any more");
            return Ok(true);
        }
        if Instant::now() > deadline {
            for Open { guest, stands } in open {
                println!("{guest}  {stands}");
            }
            return Ok(false);
        }
        std::thread::sleep(LOOK);
    }
}

/// What the journals of this host say.
fn open() -> Result<Vec<Open>> {
    let directory = ferry_host::config()
        .unwrap_or_default()
        .state_directory
        .join(DIRECTORY);
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| directory.display().to_string()),
    };
    let mut open = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            open.extend(read(&path));
        }
    }
    open.sort_by(|a, b| a.guest.cmp(&b.guest));
    Ok(open)
}

/// `None` for one that has just gone.
fn read(path: &Path) -> Option<Open> {
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(MAX_LENGTH).read_to_end(&mut text));
    let unreadable = |why: &dyn std::fmt::Display| Open {
        guest: path.display().to_string(),
        stands: format!("cannot be read: {why}"),
    };
    Some(match (read, Journal::parse(&text)) {
        (Err(error), _) if error.kind() == std::io::ErrorKind::NotFound => return None,
        (Err(error), _) => unreadable(&error),
        (_, Err(error)) => unreadable(&error),
        (Ok(_), Ok(journal)) => Open {
            stands: match journal.fence() {
                Some(fence) => format!("cannot be started here: {fence}"),
                None => "is this host's; the other host has not heard it yet".into(),
            },
            guest: journal.guest.name,
        },
    })
}
