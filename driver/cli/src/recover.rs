//! Interrupted cold migrations: the plug-in in the daemon brings them to an end, this makes it try and says how each stands.

use anyhow::{ensure, Context, Result};
use ferry_contract::cold::journal::{Journal, Role, State, DIRECTORY};
use ferry_contract::recover::Word;
use std::path::Path;
use std::time::{Duration, Instant};
use uuid::Uuid;
use virt::connect::Connect;

/// For both hosts' engines to find each other.
const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// One migration that has not come to its end: whose it is, and how it stands.
struct Open {
    guest: String,
    /// The guest's; none where the journal cannot be read.
    uuid: Option<Uuid>,
    /// The other host, where there is one.
    peer: Option<String>,
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
    let open = concerned()?;
    // A name that was mistyped must not look as if it were settled.
    for guest in guests
        .iter()
        .filter(|guest| open.iter().all(|open| open.guest != **guest))
    {
        println!("{}", none_of(guest));
    }
    if open.is_empty() {
        if guests.is_empty() {
            println!("no migration is open on this host");
        }
        return Ok(true);
    }
    let libvirt = Connect::open(Some(uri)).with_context(|| format!("cannot ask libvirt at {uri}"))?;
    // Not a guest's definition, but the word at which the plug-in looks: libvirt itself refuses it.
    let _ = libvirt.define_domain_xml(&Word::Recover.to_string());
    let deadline = Instant::now() + PATIENCE;
    loop {
        let open = concerned()?;
        if open.is_empty() {
            println!("nothing is open any more");
            return Ok(true);
        }
        if Instant::now() > deadline {
            for Open { guest, stands, .. } in open {
                println!("{guest}  {stands}");
            }
            return Ok(false);
        }
        std::thread::sleep(LOOK);
    }
}

/// Has the daemon give a guest's migration up; `false` where it is still open.
///
/// # Errors
/// If libvirt or the journals cannot be asked, or nothing of this guest is open.
pub fn abort(uri: &str, guest: &str) -> Result<bool> {
    by_hand(uri, guest, |open| open.uuid.map(Word::Abort))
}

/// Has the daemon take a guest for this host's, as the other one, `host`, is lost for good; `false` where it is still open.
///
/// # Errors
/// As with [`abort`], or if the other host is another one.
pub fn own(uri: &str, guest: &str, host: &str) -> Result<bool> {
    if let Some(Open { peer, .. }) = of_guest(guest)? {
        ensure!(
            peer.as_deref() == Some(host),
            "the other host of guest {guest} is {}, not {host}",
            peer.as_deref().unwrap_or("not known")
        );
    }
    by_hand(uri, guest, |open| open.uuid.map(Word::Own))
}

fn of_guest(guest: &str) -> Result<Option<Open>> {
    Ok(open()?.into_iter().find(|open| open.guest == guest))
}

fn none_of(guest: &str) -> String {
    format!("no migration of guest {guest} is open on this host")
}

fn by_hand(uri: &str, guest: &str, word: impl Fn(&Open) -> Option<Word>) -> Result<bool> {
    let word = of_guest(guest)?.as_ref().and_then(word);
    let word = word.with_context(|| none_of(guest))?;
    let libvirt = Connect::open(Some(uri)).with_context(|| format!("cannot ask libvirt at {uri}"))?;
    // It waits for the attempt, and then refuses the word as above, or says why it cannot be done.
    let said = libvirt.define_domain_xml(&word.to_string());
    let Some(Open { stands, .. }) = of_guest(guest)? else {
        println!("nothing is open any more");
        return Ok(true);
    };
    println!("{guest}  {stands}");
    if let Err(error) = said {
        println!("{error}");
    }
    Ok(false)
}

/// What the journals of this host say.
fn open() -> Result<Vec<Open>> {
    let state = ferry_host::state_directory().map_err(anyhow::Error::msg)?;
    let directory = state.join(DIRECTORY);
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

/// How a journal goes that is only kept for the other host to be told.
fn forget(journal: &Journal) -> String {
    let (peer, name) = (&journal.peer, &journal.guest.name);
    match peer.is_empty() {
        true => String::new(),
        false => format!(" (if {peer} is lost for good: \"virt-ferry recover --lost {peer} {name}\")"),
    }
}

/// `None` for one that has just gone.
fn read(path: &Path) -> Option<Open> {
    Some(match ferry_host::journal(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => Open {
            guest: path.display().to_string(),
            uuid: None,
            peer: None,
            stands: format!("cannot be read: {error}"),
        },
        Ok(journal) => Open {
            stands: match journal.fence() {
                Some(fence) => format!("cannot be started here: {fence}"),
                None if journal.role == Role::Within => {
                    "has its new disks; the old ones are to be deleted".into()
                }
                None if journal.role == Role::Destination && journal.state == State::Aborted => {
                    format!(
                        "did not come here; the other host has not heard it yet{}",
                        forget(&journal)
                    )
                }
                None => format!(
                    "is this host's; the other host has not heard it yet{}",
                    forget(&journal)
                ),
            },
            uuid: Some(journal.guest.uuid),
            peer: Some(journal.peer).filter(|peer| !peer.is_empty()),
            guest: journal.guest.name,
        },
    })
}
