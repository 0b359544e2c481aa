//! The first words on every connection.
//!
//! ```text
//! Hello, 64 bytes                                  Answer, 16 bytes
//!  0  magic     8  "FERRYWIR"                       0  magic     8  "FERRYWIR"
//!  8  version   2                                   8  version   2  the answerer's
//! 10  purpose   2  1 control, 2 data, ..           10  verdict   2  0 welcome, else why not
//! 12  stream    2  number of a data stream         12  zero      4
//! 14  zero      2
//! 16  session  16  UUID
//! 32  token    32
//! ```
//! Numbers are little-endian. Magic and version stay where they are in every version to come.

use std::fmt;

use uuid::Uuid;

use super::identity::{Security, Token};

/// The version of everything in [`wire`](super). Both sides must speak the same.
pub const VERSION: u16 = 1;

pub(super) const MAGIC: [u8; 8] = *b"FERRYWIR";
pub(super) const HELLO_LENGTH: usize = 64;
pub(super) const ANSWER_LENGTH: usize = 16;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Requests and responses between the engines.
    Control,
    /// Guest memory, source to destination; the number of the stream.
    Data(u16),
    /// QEMU's own stream, source to destination.
    DeviceState,
    /// QEMU's answers on its stream, destination to source.
    ReturnPath,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Purpose::Control => f.write_str("control"),
            Purpose::Data(stream) => write!(f, "data stream {stream}"),
            Purpose::DeviceState => f.write_str("device state"),
            Purpose::ReturnPath => f.write_str("return path"),
        }
    }
}

/// Why a connection was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Another wire version.
    #[error(
        "its wire version is {theirs}, not {VERSION}; install the same virt-ferry release on both hosts"
    )]
    Version {
        /// The version of whoever is on the other side of who reports this.
        theirs: u16,
    },
    /// Not this migration.
    #[error("the connection is for another migration; an engine of an earlier attempt may still be alive")]
    Session,
    /// The token is wrong.
    #[error("the session's token is wrong; whoever connected did not take part in the preparation of this migration")]
    Token,
    /// No such purpose.
    #[error("its purpose is unknown here")]
    Purpose,
    /// Not a greeting of ours.
    #[error("what came first was not virt-ferry's greeting")]
    Greeting,
    /// A reason a later version may have.
    #[error("reason number {0}")]
    Other(u16),
}

impl Refusal {
    fn code(self) -> u16 {
        match self {
            Refusal::Version { .. } => 1,
            Refusal::Session => 2,
            Refusal::Token => 3,
            Refusal::Purpose => 4,
            Refusal::Greeting => 5,
            Refusal::Other(code) => code,
        }
    }
}

/// The greeting of a connection for `purpose`.
pub(super) fn hello(security: &Security, purpose: Purpose) -> [u8; HELLO_LENGTH] {
    let (kind, stream) = match purpose {
        Purpose::Control => (1u16, 0),
        Purpose::Data(stream) => (2, stream),
        Purpose::DeviceState => (3, 0),
        Purpose::ReturnPath => (4, 0),
    };
    let mut bytes = [0; HELLO_LENGTH];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes[10..12].copy_from_slice(&kind.to_le_bytes());
    bytes[12..14].copy_from_slice(&stream.to_le_bytes());
    bytes[16..32].copy_from_slice(security.session.as_bytes());
    bytes[32..].copy_from_slice(security.token.expose());
    bytes
}

/// Judges a greeting.
pub(super) fn judge(bytes: &[u8; HELLO_LENGTH], security: &Security) -> Result<Purpose, Refusal> {
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    if bytes[..8] != MAGIC {
        return Err(Refusal::Greeting);
    }
    if u16_at(8) != VERSION {
        return Err(Refusal::Version { theirs: u16_at(8) });
    }
    let mut session = [0; 16];
    session.copy_from_slice(&bytes[16..32]);
    if Uuid::from_bytes(session) != security.session {
        return Err(Refusal::Session);
    }
    let mut token = [0; Token::LENGTH];
    token.copy_from_slice(&bytes[32..]);
    if Token::from(token) != security.token {
        return Err(Refusal::Token);
    }
    match (u16_at(10), u16_at(12), u16_at(14)) {
        (1, 0, 0) => Ok(Purpose::Control),
        (2, stream, 0) => Ok(Purpose::Data(stream)),
        (3, 0, 0) => Ok(Purpose::DeviceState),
        (4, 0, 0) => Ok(Purpose::ReturnPath),
        _ => Err(Refusal::Purpose),
    }
}

/// The answer to a greeting.
pub(super) fn answer(verdict: Result<(), Refusal>) -> [u8; ANSWER_LENGTH] {
    let mut bytes = [0; ANSWER_LENGTH];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    let code = verdict.err().map_or(0, Refusal::code);
    bytes[10..12].copy_from_slice(&code.to_le_bytes());
    bytes
}

/// Reads the answer to our greeting. `None`: it is no answer of ours at all.
pub(super) fn read_answer(bytes: &[u8; ANSWER_LENGTH]) -> Option<Result<(), Refusal>> {
    if bytes[..8] != MAGIC {
        return None;
    }
    let version = u16::from_le_bytes([bytes[8], bytes[9]]);
    let code = u16::from_le_bytes([bytes[10], bytes[11]]);
    if version != VERSION {
        return Some(Err(Refusal::Version { theirs: version }));
    }
    Some(match code {
        0 => Ok(()),
        2 => Err(Refusal::Session),
        3 => Err(Refusal::Token),
        4 => Err(Refusal::Purpose),
        5 => Err(Refusal::Greeting),
        other => Err(Refusal::Other(other)),
    })
}

/// Whether `bytes` begin a TLS record (handshake or alert), which a plain end never sends.
pub(super) fn looks_like_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x15 | 0x16, 0x03, ..])
}
