//! What the engines say on the control connection of a cold migration: the destination asks, the source answers.

use super::acl::Acl;
use ferry_contract::cold::journal::Fate;
use ferry_contract::cold::{Digest, Kind};
use ferry_contract::control::FailureKind;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Runs of blocks in one answer: far below the longest message.
pub const RUNS: usize = 8192;

/// From the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// Here I am, perhaps again.
    Open {
        /// The destination host's name.
        host: String,
    },
    /// What is this file like?
    Look {
        /// Its number.
        file: u32,
    },
    /// Where has it data?
    Runs {
        /// Its number.
        file: u32,
        /// From this block on.
        from: u64,
    },
    /// What becomes of each file; the bytes that will move follow from it.
    Fates {
        /// In the inventory's order.
        fates: Vec<Fate>,
    },
    /// So many bytes have been read back and compared.
    Verified {
        /// All files together.
        bytes: u64,
    },
    /// All files are here, with these digests.
    Ready {
        /// In the inventory's order; none where a file is shared.
        digests: Vec<Option<Digest>>,
    },
    /// Let go of the guest: it has this manifest.
    Commit {
        /// Over all digests.
        manifest: Digest,
    },
    /// The guest is registered here.
    Owned,
    /// This host would give the guest up: does the source keep it? Until it has said so, this may be all there is of it.
    Keep {
        /// Whether the operator cancelled it.
        kind: FailureKind,
        /// Why.
        cause: String,
    },
    /// The guest is not here and never will be by this session.
    Abort {
        /// Whether the operator cancelled it.
        kind: FailureKind,
        /// Why.
        cause: String,
    },
}

/// From the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// To `open`.
    Opened {
        /// The source host's name.
        host: String,
        /// What our file beside each of the guest's says, to whoever can see it.
        nonce: String,
        /// Which machine the source is, where it can be told from others.
        #[serde(default)]
        machine: Option<Digest>,
    },
    /// To `look`.
    Looked(Looked),
    /// To `runs`.
    Runs {
        /// Blocks that may hold data, ascending.
        runs: Vec<Range<u64>>,
        /// There are more; ask from here.
        next: Option<u64>,
    },
    /// To `fates`, `verified`, `ready`.
    Noted,
    /// To `commit`: the source has let go.
    Committed,
    /// To `owned`: and knows.
    OwnedThere,
    /// To `keep`: the guest is the source's, and stays so.
    Keeps,
    /// To `abort`: and has the guest again.
    Aborted,
    /// To anything: no.
    Refused {
        /// What kind of failure it is.
        kind: FailureKind,
        /// Why.
        cause: String,
        /// The source host's name.
        host: String,
    },
}

/// A file of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Looked {
    /// Its length, bytes.
    pub size: u64,
    /// A file or a device.
    pub kind: Kind,
    /// Permissions.
    pub mode: u32,
    /// The owner's name, or number.
    pub owner: String,
    /// The group's.
    pub group: String,
    /// `user.*` attributes.
    pub attributes: Vec<(String, Vec<u8>)>,
    /// Its access control list, where it has one.
    #[serde(default)]
    pub acl: Option<Acl<String>>,
    /// The name it really has, symbolic links followed.
    pub name: String,
    /// Our file lies beside it.
    pub has_nonce: bool,
    /// What some blocks of a device hold, by which the destination tells it from its own.
    pub sample: Option<Digest>,
}
