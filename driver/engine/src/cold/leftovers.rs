//! What an earlier session of the guest's has left at the destination: taken up, or removed, and who may.

use super::identity::is_ours;
use super::journal::Claim;
use super::link::Opened;
use super::undo::undo;
use super::Error;
use ferry_contract::cold::journal::{Entry, Journal, Role, State};
use ferry_host::Others;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// What an attempt that was cut off by a crash left of a file.
#[derive(Debug, Clone)]
pub struct Left {
    /// Under which name it was written.
    pub temporary: PathBuf,
    /// Which file that is.
    pub entry: Entry,
}

/// What such an attempt left of files with these places.
pub fn leftovers(earlier: Option<&Journal>, places: &[PathBuf]) -> BTreeMap<PathBuf, Left> {
    let entries = earlier.into_iter().flat_map(|journal| &journal.entries);
    let useful = entries.filter_map(|entry| {
        let (temporary, entry) = (entry.temporary.clone()?, entry.clone());
        let useful = places.contains(&entry.path) && is_ours(&temporary, &entry);
        useful.then(|| (entry.path.clone(), Left { temporary, entry }))
    });
    useful.collect()
}

/// Whether a session has all of the guest, and waits for its source to say whose it is.
pub fn waits(journal: &Journal) -> bool {
    journal.role == Role::Destination
        && matches!(journal.state, State::Ready | State::Committing | State::Returning)
}

/// Whether a new session may take the place of one that waits. A source that offers the guest anew has it: it begins none
/// before it knows that. Another machine, also one of its name, has another copy, and does not know which one is the guest. Files
/// that have their names already may be what other guests stand on by now: a recovery looks at that.
///
/// # Errors
/// It may not.
pub fn follow(waiting: &Journal, source: &Opened) -> Result<(), Error> {
    let same =
        waiting.peer == source.host && waiting.peer_machine == source.machine && source.machine.is_some();
    if same && !waiting.entries.iter().any(|entry| is_ours(&entry.path, entry)) {
        return Ok(());
    }
    let (name, peer) = (&waiting.guest.name, &waiting.peer);
    if same {
        return Err(Error::Other(format!(
            "what came of guest {name} before has its place here still, though {peer} has the guest: \"virt-ferry recover --abort \
             {name}\" here removes what no other guest needs; then again"
        )));
    }
    Err(Error::Other(format!(
        "all of guest {name} has come here from {peer} before, which has not said whose it is: \"virt-ferry recover --abort \
         {name}\" here removes that copy, \"virt-ferry recover --lost {peer} {name}\" makes it the guest"
    )))
}

fn in_state(journal: &Journal, state: State) -> Journal {
    Journal {
        state,
        ..journal.clone()
    }
}

/// Removes what an earlier session left and this one does not take up.
///
/// # Errors
/// The journal cannot be written: nothing is removed.
pub fn remove_useless(
    claim: &Claim,
    earlier: Option<&Journal>,
    left: &BTreeMap<PathBuf, Left>,
) -> Result<(), Error> {
    let Some(earlier) = earlier else { return Ok(()) };
    if waits(earlier) {
        // All of the guest is not here any more.
        claim.note(&in_state(earlier, State::Pulling))?;
    }
    let used: BTreeSet<_> = left.values().map(|left| &left.temporary).collect();
    let mut useless = earlier.clone();
    useless.entries.retain(|entry| {
        !entry
            .temporary
            .as_ref()
            .is_some_and(|temporary| used.contains(temporary))
    });
    useless.directories.clear();
    undo(&useless, &Others::default());
    Ok(())
}
