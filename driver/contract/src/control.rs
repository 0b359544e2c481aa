//! What a plug-in and the engine it started say to each other: one JSON object a line over a socket pair.
//!
//! The plug-in asks ([`Request`]) and waits for one [`Reply`], always with a time limit; the engine may send
//! [`Statistics`] at any moment. The end of the socket is the end of the session: an engine whose plug-in has
//! gone undoes what it did and exits; a plug-in whose engine has gone fails the migration.
//!
//! ```text
//!  source:       Inspect → Offer │ NotEligible    Precopy → Switchover    Performed → Committed    Conclude → Concluded │ RunsThere │ Unknown
//!  destination:  Reserve → Reserved               Attach  → Listening     Finish    → Committed    Conclude → Concluded
//!  cold source:       ColdServe → ColdOffer    ColdConfirm → ColdOwnedThere    ColdDelete → ColdDeleted    ColdAbort → ColdAborted
//!  cold destination:  ColdPull  → ColdPulled   ColdCommit  → ColdPlaced        ColdOwned  → ColdOwned      ColdAbort → ColdAborted
//!  cold, one host:    ColdMove  → ColdPlaced    ColdOwned   → ColdOwned         ColdDelete → ColdDeleted    ColdAbort → ColdAborted
//!  after a crash:     ColdRecover → ColdRecovered, then ColdDelete, ColdOwned or ColdAbort as it says
//!  anywhere:     Failed instead of the reply, or unasked: the engine has ended; Cancel ends what is under way with Failed(Cancelled)
//! ```

use crate::cold::storage::Relocate;
use crate::cold::{Deleted, Kept, Pull, Recovered, Serve, Wish};
use crate::cookie::{Answer, ColdOffer, Offer};
use crate::session::{Encryption, Guest};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// The longest line either side accepts, in bytes: an inventory of a cookie's size ([`MAX_COOKIE`]) twice as long in JSON,
/// and a definition.
///
/// [`MAX_COOKIE`]: crate::cookie::MAX_COOKIE
pub const MAX_LINE: usize = 16 << 20;

/// How long the destination's engine stays for the source to ask whether the guest runs there, once that is decided: whoever
/// runs the phases may have lost its connection to the destination, and notices late.
pub const LINGER: Duration = Duration::from_secs(60);

/// What the engine needs of the configuration, handed over so that one migration sees one configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// See [`Encryption`]; what this host's configuration says.
    pub encryption: Encryption,
    /// This migration is to be protected by libvirt's own certificates (`--tls`), which are these on this host.
    pub certificates: Option<Certificates>,
    /// Parallel streams for memory, 1 to 16.
    pub streams: u16,
    /// First and last TCP port the destination may listen on.
    pub ports: (u16, u16),
    /// Slow the vCPUs down where nothing else helps, also unasked.
    pub auto_converge: bool,
    /// Compare all of the guest's memory on both hosts, byte for byte, before the commitment (a test mode).
    pub verify_memory: bool,
    /// Where the engine makes its sockets.
    pub runtime_directory: PathBuf,
    /// Where the timelines go.
    pub log_directory: PathBuf,
    /// Where the journals of cold migrations are.
    pub state_directory: PathBuf,
}

impl Settings {
    /// What this host asks for in this migration.
    pub fn wanted(&self) -> Encryption {
        match self.certificates {
            Some(_) => Encryption::Certificates,
            None => self.encryption,
        }
    }
}

/// libvirt's own certificates for migrations, as this host's qemu.conf has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificates {
    /// The directory that holds `ca-cert.pem` and the others (`migrate_tls_x509_cert_dir`).
    pub directory: PathBuf,
    /// A destination wants to see the source's certificate (`migrate_tls_x509_verify`).
    pub verify: bool,
}

/// What the operator asked of one migration, beyond the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// The guest stands still from the first byte on (`virsh migrate` without `--live`).
    pub paused: bool,
    /// Most bytes a second, all streams together (`--bandwidth`, `migrate-setspeed`); 0 is no limit. The last copy, of
    /// a guest that stands still, is not held up by it, as in QEMU.
    pub bandwidth: u64,
    /// Streams for the memory, 1 to 16 (`--parallel`); without it, what the configuration says.
    pub streams: Option<u16>,
    /// zstd's level, 1 to 19, to compress memory with (`--compressed`); without it nothing is compressed.
    pub compression: Option<i32>,
    /// Slow the vCPUs down when rounds do not get anywhere (`--auto-converge`).
    pub auto_converge: Option<AutoConverge>,
    /// libvirt copies disks before it lets QEMU migrate (`--copy-storage-all`, `--copy-storage-inc`): long after the
    /// switch-over has been offered.
    pub storage: bool,
    /// The name that the destination's certificate must bear (`--tls-destination`); without it, that of the host the
    /// source connects to.
    pub tls_name: Option<String>,
}

/// How much slower the vCPUs become, in percent of their time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoConverge {
    /// At first, 1 to 99.
    pub initial: u8,
    /// More each time it does not help, 1 to 99.
    pub increment: u8,
}

impl Default for AutoConverge {
    /// QEMU's own (QEMU 10.0, `migration/options.c`).
    fn default() -> Self {
        Self {
            initial: 20,
            increment: 10,
        }
    }
}

/// What an engine finds when it is only asked to look (`virt-ferry-engine check`): one JSON object on standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// The guest can be moved; or, where no guest was asked about, this host's kernel can track writes.
    Eligible {
        /// The guest's memory, bytes.
        bytes: u64,
        /// Of it, what is no hole.
        resident: u64,
    },
    /// It cannot.
    NotEligible {
        /// Why, and where it helps, what to do.
        reason: String,
    },
}

/// What the plug-in asks of its engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Source, pre-migration: is this guest eligible, and what is to be moved?
    Inspect {
        /// The guest.
        guest: Guest,
        /// This host's name, for messages and the timeline.
        host: String,
        /// The private QMP monitor of the guest's QEMU.
        monitor: PathBuf,
        /// The configuration in force.
        settings: Settings,
    },
    /// Source, pre-copy: connect to the destination and copy until the rest is small.
    Precopy {
        /// What the destination answered.
        answer: Answer,
        /// What the operator asked of this migration.
        options: Options,
    },
    /// Source, at any moment: from now on at most this many bytes a second go over all streams together; 0 is no limit.
    /// Not answered.
    Limit {
        /// Bytes a second.
        bandwidth: u64,
    },
    /// Source: libvirt's Perform has returned.
    Performed {
        /// It returned success.
        success: bool,
    },
    /// Destination, reservation: would this guest fit?
    Reserve {
        /// The guest.
        guest: Guest,
        /// This host's name.
        host: String,
        /// What the source offered.
        offer: Offer,
        /// The directory that will hold the guest's RAM files.
        memory_directory: PathBuf,
        /// Bytes already promised to other migrations in flight and not yet resident.
        promised: u64,
        /// Bytes of huge pages promised to other migrations whose QEMU has not started yet.
        promised_huge: u64,
        /// The configuration in force.
        settings: Settings,
    },
    /// Destination, reservation: libvirt has started QEMU; take hold of it and listen.
    Attach {
        /// The private QMP monitor of the incoming QEMU.
        monitor: PathBuf,
        /// The unix socket on which QEMU awaits its stream.
        incoming: PathBuf,
        /// The name or address the source shall connect to.
        host: String,
        /// The address to listen on; all of them where the operator named none.
        listen: Option<String>,
    },
    /// Destination, commitment: libvirt is about to resume the guest here.
    Finish,
    /// Both: libvirt has ended its part.
    Conclude {
        /// The guest now belongs to the destination.
        success: bool,
    },
    /// Both, live or cold: the operator gave the migration up; what is under way ends soon.
    Cancel,
    /// Cold source, Begin: look at the guest's files, fence them and serve them.
    ColdServe(Box<Serve>),
    /// Cold source, Confirm: is the guest the destination's now?
    ColdConfirm,
    /// Cold source, after libvirt has undefined the guest: delete the files that moved. Ends the session.
    ColdDelete {
        /// Why nothing is deleted, where that is so ([`TO_STAY`](crate::cold::TO_STAY), or it is not known who needs them).
        keep: Option<String>,
        /// Files that somebody else needs, which stay, each with why.
        in_use: Vec<Kept>,
    },
    /// Cold destination, Prepare: reserve, pull and verify all files. Takes as long as it takes.
    ColdPull(Box<Pull>),
    /// Cold destination, Finish: ask the source to let go, and put the files where they belong.
    ColdCommit,
    /// Cold destination: libvirt has registered the guest. Ends the session.
    ColdOwned,
    /// Cold, within one host: fence, copy and verify the guest's files, and give the copies their names. Takes as long as
    /// it takes.
    ColdMove(Box<Relocate>),
    /// Cold, both: give the session up and remove everything it made. Ends the session. Refused once the source has
    /// let go and has not taken the guest back.
    ColdAbort,
    /// After a crash, of either role: bring the migration of this journal to an end with the other host.
    ColdRecover {
        /// The journal's file.
        journal: PathBuf,
        /// What the operator wants.
        wish: Wish,
        /// Destination, within: files that somebody else of this host needs, which stay, each with why.
        in_use: Vec<Kept>,
        /// The configuration in force.
        settings: Settings,
    },
}

/// What the engine answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// The guest is eligible; this goes into the cookie.
    Offer(Offer),
    /// The guest takes libvirt's own way, for this reason.
    NotEligible {
        /// For the log: what about the guest or host is in the way.
        reason: String,
    },
    /// Pre-copy is done: now let QEMU migrate into this socket.
    Switchover {
        /// The unix socket the engine relays to the destination's QEMU.
        socket: PathBuf,
    },
    /// The guest fits; the promise stands until the session ends.
    Reserved,
    /// The destination awaits the source's engine.
    Listening(Answer),
    /// The destination holds all of the guest and its QEMU no longer ignores shared memory.
    Committed,
    /// All is put away; the engine exits. Where the source asked with `success` false, the guest does not run at the
    /// destination and never will: it may go on at the source.
    Concluded,
    /// Source: the guest runs at the destination, whatever libvirt's client heard of it. It must not run here.
    RunsThere,
    /// Source: after the commitment, the destination does not say whether the guest runs there. It must not run here
    /// before somebody has looked.
    Unknown,
    /// The files are fenced and served; this goes into the cookie.
    ColdOffer(Box<ColdOffer>),
    /// All files are here, complete and verified, under temporary names.
    ColdPulled,
    /// The source has let go, and all files are where they belong: register the guest.
    ColdPlaced,
    /// Nothing is in the way of the files, and nothing has been done.
    ColdPlanned,
    /// The guest is this host's.
    ColdOwned {
        /// The source has heard it; otherwise a recovery tells it.
        told: bool,
    },
    /// The guest is the destination's: undefine it here if that was asked for.
    ColdOwnedThere,
    /// The session is given up and the guest stays at the source.
    ColdAborted,
    /// What became of the files.
    ColdDeleted(Deleted),
    /// What a recovery found.
    ColdRecovered(Recovered),
    /// It failed; everything done so far on this host is undone.
    Failed(Failure),
}

/// A line from the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", content = "content", rename_all = "kebab-case")]
pub enum Message {
    /// The answer to the plug-in's request.
    Reply(Reply),
    /// How far the memory is.
    Progress(Statistics),
}

/// Why an engine gave up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{cause} (on host {host})")]
pub struct Failure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// The host it happened on.
    pub host: String,
    /// What happened and what to do, in a sentence.
    pub cause: String,
}

/// What the plug-in must tell apart in a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The operator cancelled.
    Cancelled,
    /// libvirt's own part failed first, and its error says why.
    Libvirt,
    /// Everything else.
    Failed,
}

/// How far the memory is: what libvirt's job statistics say while the engine copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes of guest RAM the engine is responsible for.
    pub total: u64,
    /// Bytes whose newest content still has to be sent.
    pub remaining: u64,
    /// Bytes of page data sent, all rounds together.
    pub data: u64,
    /// Bytes of zero pages and holes told, all rounds together.
    pub zero: u64,
    /// Bytes on the wire.
    pub wire: u64,
    /// The round, counted from 1; 0 before the first.
    pub iteration: u64,
    /// Pages a second the guest dirtied in the last round.
    pub dirty_rate: u64,
    /// Bytes a second sent in the last round.
    pub bandwidth: u64,
    /// How much of their time the vCPUs are held, in percent.
    pub throttle: u64,
    /// The guest stands still, and its QEMU answers nobody until the last of the memory has been read.
    pub silent: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_a_line() {
        let failure = Failure {
            kind: FailureKind::Cancelled,
            host: "host1".into(),
            cause: "two\nlines".into(),
        };
        let line = serde_json::to_string(&Message::Reply(Reply::Failed(failure.clone()))).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(
            serde_json::from_str::<Message>(&line).unwrap(),
            Message::Reply(Reply::Failed(failure))
        );
    }

    /// Not every number survives a tagged enum: 128 bits do not.
    #[test]
    fn a_cold_request_survives_its_line() {
        let settings = crate::config::Config::default().settings();
        let serve = Serve {
            guest: Guest {
                name: "g".into(),
                uuid: uuid::Uuid::from_u128(1),
            },
            host: "host1".into(),
            address: "192.0.2.1".into(),
            listen: None,
            items: vec![crate::cold::Item {
                path: "/images/g.raw".into(),
                part: crate::cold::Part::Data {
                    target: "vda".into(),
                    layer: 1,
                    relative: true,
                },
            }],
            media: Vec::new(),
            metadata: Vec::new(),
            autostart: true,
            xml: "<domain/>".into(),
            definition: Some(crate::cold::Definition {
                path: "/etc/g.xml".into(),
                inode: u64::MAX,
                size: 1,
                modified: i64::MAX,
            }),
            options: crate::cold::Options::default(),
            settings,
        };
        let request = Request::ColdServe(Box::new(serve));
        let line = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
    }

    #[test]
    fn progress_round_trips() {
        let progress = Message::Progress(Statistics {
            total: 1 << 40,
            iteration: 3,
            ..Default::default()
        });
        let line = serde_json::to_string(&progress).unwrap();
        assert_eq!(serde_json::from_str::<Message>(&line).unwrap(), progress);
    }
}
