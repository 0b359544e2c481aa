//! What each host writes down of a cold migration before it does what cannot be taken back.
//!
//! ```text
//!   source       prepared ──commit?──▶ committed ──owned──▶ owned-there ──▶ (files deleted, journal gone)
//!                   └─▶ (gone, or:) aborted ◀─┘ the destination asks it to keep the guest
//!   destination  pulling ──▶ ready ──▶ committing ──committed──▶ placed ──defined──▶ owned ──source knows──▶ (gone)
//!                   └─▶ (gone) └────────────┴──────────────────────┴─▶ returning ──source keeps it──▶ aborted ──source knows──▶ (gone)
//!   within       pulling ──▶ committing ──▶ placed ──defined──▶ owned ──▶ (old files deleted, journal gone)
//!                   └────────────┴────────────┴──▶ (gone)
//! ```
//!
//! The source owns the guest in `prepared` and the destination in `owned`; in every pair of states in between, no host
//! starts it ([`Journal::fence`]) and the one of both that cannot decide alone asks the other. `aborted` is kept for as
//! long as the other host may still have to ask.
//!
//! `committed` decides once: from there the guest goes back only at the destination's word, or where the operator knows that
//! host to be lost. From `ready` to `returning`, the destination removes nothing before the source has said that it keeps the
//! guest: should the source be lost, this is all there is of it.

use super::{Digest, Inventory, Kind, Options};
use crate::session::{Encryption, Guest, Token};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Where the journals are, below the state directory.
pub const DIRECTORY: &str = "cold";

/// The version of this file's shape.
pub const VERSION: u16 = 1;

/// The longest journal accepted, bytes: a cookie's inventory and what is said of each file.
pub const MAX_LENGTH: u64 = 16 << 20;

/// Which end of a migration a host is, or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The guest leaves.
    Source,
    /// The guest arrives.
    Destination,
    /// The guest stays, and its disks go to another data store of this host.
    Within,
}

/// How far a host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Source: the guest is being copied, and is still ours.
    Prepared,
    /// Source: the destination may take the guest; only it knows whether it has.
    Committed,
    /// Source: the guest is the destination's.
    OwnedThere,
    /// Destination, within: files are coming.
    Pulling,
    /// Destination: all files are here, complete and verified, under temporary names.
    Ready,
    /// Destination: the source has been asked, or is about to be. Within: files are getting their names.
    Committing,
    /// Destination: the source has let go. Destination, within: all files are where they belong.
    Placed,
    /// Destination: the guest is ours. Within: its definition names the new files.
    Owned,
    /// Destination: the guest is to stay at the source, which has not said yet that it does. All files are still here.
    Returning,
    /// Both: this session is given up. The other host has not heard of it yet.
    Aborted,
}

/// One file of the migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// At the source, as the inventory names it.
    pub source: PathBuf,
    /// On this host.
    pub path: PathBuf,
    /// Destination: under which name it is written.
    pub temporary: Option<PathBuf>,
    /// A file or a device.
    pub kind: Kind,
    /// Its length, bytes.
    pub size: u64,
    /// What becomes of it.
    pub fate: Fate,
    /// What both hosts found in it.
    pub digest: Option<Digest>,
    /// Its device and inode, so that nothing else is ever deleted in its place.
    pub identity: Option<(u64, u64)>,
    /// What the kernel knows it by beyond a reboot, as the engine writes it; where there is something, it decides.
    #[serde(default)]
    pub lasting: Option<String>,
    /// Source: when it was last changed, nanoseconds since 1970. A number of an inode may come back, with another file.
    #[serde(default)]
    pub modified: Option<i64>,
}

/// What becomes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It is copied, and deleted at the source once the destination owns the guest.
    Moves,
    /// Both hosts see one and the same file: neither copied nor deleted.
    Shared,
    /// The destination has it already, with the same content.
    Present,
}

/// A host's view of one cold migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// See [`VERSION`].
    pub version: u16,
    /// Which end this host is.
    pub role: Role,
    /// How far it is.
    pub state: State,
    /// The migration.
    pub session: Uuid,
    /// The guest, by its name on this host.
    pub guest: Guest,
    /// This host's name.
    pub host: String,
    /// The other's, once known.
    pub peer: String,
    /// Destination: which machine that is, as its engine says.
    #[serde(default)]
    pub peer_machine: Option<Digest>,
    /// Where the source's engine listens, also in a recovery.
    pub address: String,
    /// Its port.
    pub port: u16,
    /// The secret of the session.
    pub token: Token,
    /// Whether its connections are encrypted.
    pub encryption: Encryption,
    /// This host's certificate, DER.
    pub certificate: Vec<u8>,
    /// Its private key, PKCS #8 DER.
    pub key: Vec<u8>,
    /// The other host's certificate, DER, once known.
    pub peer_certificate: Option<Vec<u8>>,
    /// What the guest owns.
    pub inventory: Inventory,
    /// What becomes of each file, in the inventory's order.
    pub entries: Vec<Entry>,
    /// Directories that this host made, the deepest first.
    pub directories: Vec<PathBuf>,
    /// The digest over all files' names and digests, from `ready` and `committed` on.
    pub manifest: Option<Digest>,
    /// Source: what the operator asked.
    pub options: Options,
    /// The definition that libvirt is to register: at the destination, and at the source should the destination be lost.
    pub definition: Option<String>,
    /// Within: the files as they were, in the inventory's order.
    #[serde(default)]
    pub former: Vec<Entry>,
}

/// Where the journal of a guest is, in this state directory.
pub fn path(state_directory: &Path, guest: Uuid) -> PathBuf {
    state_directory.join(DIRECTORY).join(format!("{guest}.json"))
}

/// Whose journal a file is, by its name; `None` for what is no journal.
pub fn guest(path: &Path) -> Option<Uuid> {
    path.file_name()?.to_str()?.strip_suffix(".json")?.parse().ok()
}

/// A journal that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not ours, or damaged.
    #[error("it is not a journal of virt-ferry: {0}")]
    Syntax(String),
    /// Of another release.
    #[error("it is of version {0}, this release knows {VERSION}")]
    Version(u16),
}

impl Journal {
    /// Reads a journal's text.
    ///
    /// # Errors
    /// What is wrong with it. A guest with such a journal must not be started.
    pub fn parse(text: &[u8]) -> Result<Self, Unreadable> {
        let journal: Self =
            serde_json::from_slice(text).map_err(|error| Unreadable::Syntax(error.to_string()))?;
        match journal.version {
            VERSION if journal.entries.len() == journal.inventory.files.len() => Ok(journal),
            VERSION => Err(Unreadable::Syntax("not every file has its entry".into())),
            other => Err(Unreadable::Version(other)),
        }
    }

    /// Whether an operator may give this session up on this host, whatever the other one says.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn may_be_given_up(&self) -> Result<(), String> {
        let (name, peer) = (&self.guest.name, &self.peer);
        match (self.role, self.state) {
            (Role::Source, State::Committed) => Err(format!(
                "guest {name} has been let go of, and only host {peer} knows whether it has it: run \"virt-ferry recover {name}\" \
                 there, or \"virt-ferry recover --abort {name}\" if it is not to have it; if {peer} is lost for good, \"virt-ferry \
                 recover --lost {peer} {name}\" here makes it this host's again"
            )),
            (Role::Source, State::OwnedThere) => Err(format!("guest {name} is host {peer}'s")),
            _ => Ok(()),
        }
    }

    /// Why the guest may not be started on this host now; `None`: it may.
    pub fn fence(&self) -> Option<String> {
        if self.role == Role::Within {
            return match self.state {
                State::Owned | State::Aborted => None,
                _ => Some(format!(
                    "its disks are being moved to another place (virsh domjobinfo {name}); run \"virt-ferry recover {name}\" if \
                     nothing is under way",
                    name = self.guest.name
                )),
            };
        }
        let peer = match self.peer.as_str() {
            "" => "another host",
            peer => peer,
        };
        let recover = format!("run \"virt-ferry recover {}\" on both hosts", self.guest.name);
        match self.state {
            State::Prepared => Some(format!(
                "it is being moved to {peer}; end that migration first, or {recover} if nothing is under way"
            )),
            State::Committed => Some(format!(
                "it was being moved to {peer} and may belong to that host already; {recover}; if {peer} is lost for good, \
                 \"virt-ferry recover --lost {peer} {}\" makes it this host's again",
                self.guest.name
            )),
            State::OwnedThere => Some(format!("it has been moved to {peer}: start it there")),
            State::Pulling => Some(format!(
                "it is being moved here from {peer} and is not here yet; {recover} if nothing is under way"
            )),
            State::Ready | State::Committing | State::Placed | State::Returning => Some(format!(
                "it is being moved here from {peer}, which has not said yet whose it is; {recover} if nothing is under way; if \
                 {peer} is lost for good, \"virt-ferry recover --lost {peer} {name}\" makes it this host's, and \"virt-ferry \
                 recover --abort {name}\" removes all of it that has come",
                name = self.guest.name
            )),
            State::Owned | State::Aborted => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pair of states that the two hosts can be in at one instant.
    #[test]
    fn never_may_both_start_it() {
        use State::*;
        let fenced = |state| Journal { state, ..a_journal() }.fence().is_some();
        // The destination may start it in one state only, and reaches that from `placed`, which the source's `committed` precedes.
        for state in [Pulling, Ready, Committing, Placed, Returning] {
            assert!(fenced(state), "{state:?}");
        }
        assert!(!fenced(Owned));
        for state in [Prepared, Committed, OwnedThere] {
            assert!(fenced(state), "{state:?}");
        }
        assert!(!fenced(Aborted));
        // Within one host, the definition is not to be trusted until it is known to have been changed.
        let fenced = |state| {
            Journal {
                state,
                role: Role::Within,
                ..a_journal()
            }
            .fence()
            .is_some()
        };
        assert!([Pulling, Ready, Committing, Placed].map(fenced) == [true; 4] && !fenced(Owned));
    }

    #[test]
    fn a_journal_is_its_guests_by_name() {
        let uuid = Uuid::from_u128(5);
        let path = path(Path::new("/state"), uuid);
        assert_eq!(guest(&path), Some(uuid));
        for other in ["/state/cold/x.json", "/state/cold", "/"].map(PathBuf::from) {
            assert_eq!(guest(&other), None, "{other:?}");
        }
        assert_eq!(guest(&path.with_extension("json.part")), None);
    }

    #[test]
    fn what_waits_for_the_other_host_says_both_ways_out() {
        for state in [State::Ready, State::Committing, State::Placed, State::Returning] {
            let waiting = Journal {
                state,
                role: Role::Destination,
                peer: "host1".into(),
                ..a_journal()
            };
            let fence = waiting.fence().unwrap();
            for way in ["--lost host1 g", "--abort g"] {
                assert!(
                    fence.contains(&format!("\"virt-ferry recover {way}\"")),
                    "{fence}"
                );
            }
            assert_eq!(waiting.may_be_given_up(), Ok(()));
        }
    }

    #[test]
    fn what_was_let_go_of_is_not_given_up_without_the_other_host() {
        let may = |state| {
            let peer = "host2".into();
            Journal {
                state,
                peer,
                ..a_journal()
            }
            .may_be_given_up()
        };
        assert!(may(State::Prepared).is_ok() && may(State::Aborted).is_ok());
        assert!(may(State::Committed).is_err_and(|why| why.contains("--lost host2 g")));
        assert!(may(State::OwnedThere).is_err());
    }

    #[test]
    fn a_journal_survives_its_text_and_another_version_is_named() {
        let journal = a_journal();
        let text = serde_json::to_vec(&journal).unwrap();
        assert_eq!(Journal::parse(&text), Ok(journal.clone()));
        let other = serde_json::to_vec(&Journal {
            version: 9,
            ..journal
        })
        .unwrap();
        assert_eq!(Journal::parse(&other), Err(Unreadable::Version(9)));
        for length in 0..text.len() {
            assert!(
                matches!(Journal::parse(&text[..length]), Err(Unreadable::Syntax(_))),
                "{length}"
            );
        }
    }

    fn a_journal() -> Journal {
        let guest = Guest {
            name: "g".into(),
            uuid: Uuid::from_u128(5),
        };
        Journal {
            version: VERSION,
            role: Role::Source,
            state: State::Prepared,
            session: Uuid::from_u128(7),
            guest: guest.clone(),
            host: "host1".into(),
            peer: String::new(),
            peer_machine: None,
            address: "192.0.2.1".into(),
            port: 49152,
            token: Token::new([3; 32]),
            encryption: Encryption::Always,
            certificate: vec![1],
            key: vec![2],
            peer_certificate: None,
            inventory: Inventory {
                guest,
                autostart: false,
                files: Vec::new(),
                directories: Vec::new(),
                media: Vec::new(),
                metadata: Vec::new(),
            },
            entries: Vec::new(),
            directories: Vec::new(),
            manifest: Some(Digest([9; 32])),
            options: Options::default(),
            definition: None,
            former: Vec::new(),
        }
    }
}
