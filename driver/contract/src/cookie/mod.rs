//! Our element in libvirt's migration cookie: how two plug-ins find each other.
//!
//! libvirt carries an XML cookie, `<qemu-migration>`, from each phase to the next. It ignores child elements it
//! does not know (libvirt 9.0 and 11.3, `qemu_migration_cookie.c`: one XPath a known element), so ours, in a
//! namespace of its own, reaches the other plug-in, and does nothing to a host that has none. Never use
//! `<feature>` there: an unknown one is fatal.
//!
//! The cookie's length includes its final NUL, and the parser demands one.

mod element;
mod libvirts;
#[cfg(test)]
mod tests;

pub use libvirts::{text_of, with_figures};

use crate::cold::{Inventory, Malformed};
use crate::session::{Block, Encryption, Token, VERSION};
use element::Element;
use libvirts::insert;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The namespace of our elements; the last part is the version of their shape.
pub const NAMESPACE: &str = "https://virt-ferry.org/xmlns/migration/1";

/// libvirt's own limit on a cookie, in bytes (REMOTE_MIGRATE_COOKIE_MAX, libvirt 9.0 and 11.3).
pub const MAX_COOKIE: usize = 4 << 20;

/// RAM blocks in one guest: NUMA cells and DIMMs; QEMU allows 256 memory slots.
pub const MAX_BLOCKS: usize = 512;

/// What the source's Begin says: this guest can move through the engines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// This migration.
    pub session: Uuid,
    /// The secret every connection of this migration shows.
    pub token: Token,
    /// What the source wants; the destination's answer decides.
    pub encryption: Encryption,
    /// The source's certificate for this session, DER; empty where libvirt's own are used.
    pub certificate: Vec<u8>,
    /// What will be moved.
    pub blocks: Vec<Block>,
}

/// What the destination's Prepare answers: its engine listens here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The session of the offer.
    pub session: Uuid,
    /// Whether this session is encrypted: with libvirt's certificates where the migration asks for them; else always,
    /// unless both hosts say never.
    pub encryption: Encryption,
    /// The destination's certificate for this session, DER; empty where libvirt's own are used.
    pub certificate: Vec<u8>,
    /// The host to connect to, a name or an address as in the migration URI.
    pub host: String,
    /// The TCP port of the destination's engine.
    pub port: u16,
}

/// What the source's Begin says of a guest that is shut off: its engine serves the guest's files here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdOffer {
    /// This migration.
    pub session: Uuid,
    /// The secret every connection of this migration shows.
    pub token: Token,
    /// What the source wants; the destination connects encrypted unless both hosts say never.
    pub encryption: Encryption,
    /// The source's certificate for this session, DER.
    pub certificate: Vec<u8>,
    /// The host to connect to, a name or an address.
    pub host: String,
    /// The TCP port of the source's engine.
    pub port: u16,
    /// What the guest owns.
    pub inventory: Inventory,
}

/// What the destination's Prepare answers a cold offer: all of the guest's files are there, verified. Peer-to-peer only:
/// `virsh` throws this cookie away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdAnswer {
    /// The session of the offer.
    pub session: Uuid,
}

/// A cookie with an element of ours that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a libvirt cookie at all.
    #[error("the migration cookie is malformed: {0}")]
    Cookie(String),
    /// Ours, but not as our schema has it.
    #[error("the virt-ferry element of the migration cookie is malformed: {0}")]
    Element(String),
    /// The other host speaks another version.
    #[error("the other host's virt-ferry speaks version {theirs}, this one {}", VERSION)]
    Version {
        /// The other host's version.
        theirs: u16,
    },
}

/// Adds an offer to the cookie of the real Begin.
pub fn with_offer(cookie: &[u8], offer: &Offer) -> Result<Vec<u8>, Error> {
    insert(cookie, &offer.element())
}

/// Adds an answer to the cookie of the real Prepare.
pub fn with_answer(cookie: &[u8], answer: &Answer) -> Result<Vec<u8>, Error> {
    insert(cookie, &answer.element())
}

/// The offer in a cookie; `None` where there is none.
pub fn offer(cookie: &[u8]) -> Result<Option<Offer>, Error> {
    Element::find(cookie, "offer")?.map(Offer::read).transpose()
}

/// The answer in a cookie; `None` where there is none.
pub fn answer(cookie: &[u8]) -> Result<Option<Answer>, Error> {
    Element::find(cookie, "answer")?.map(Answer::read).transpose()
}

/// Adds a cold offer to the cookie of the real Begin.
pub fn with_cold_offer(cookie: &[u8], offer: &ColdOffer) -> Result<Vec<u8>, Error> {
    insert(cookie, &offer.element()?)
}

/// Adds a cold answer to the cookie of the real Prepare.
pub fn with_cold_answer(cookie: &[u8], answer: ColdAnswer) -> Result<Vec<u8>, Error> {
    insert(cookie, &answer.element())
}

/// The cold offer in a cookie; `None` where there is none.
pub fn cold_offer(cookie: &[u8]) -> Result<Option<ColdOffer>, Error> {
    Element::find(cookie, "cold-offer")?
        .map(ColdOffer::read)
        .transpose()
}

/// The cold answer in a cookie; `None` where there is none.
pub fn cold_answer(cookie: &[u8]) -> Result<Option<ColdAnswer>, Error> {
    Element::find(cookie, "cold-answer")?
        .map(ColdAnswer::read)
        .transpose()
}

/// The cookie that asks a peer whether it has the plug-in, sent to Prepare with no parameters: libvirt itself
/// refuses such a Prepare before it does anything ("no domain XML passed"), a plug-in answers with [`is_probe`]'s
/// cookie again.
pub fn probe() -> Vec<u8> {
    format!("<qemu-migration><ferry:probe xmlns:ferry='{NAMESPACE}' version='{VERSION}'/></qemu-migration>\0")
        .into_bytes()
}

/// Whether a cookie is a peer's probe, or the answer to ours, in our version.
pub fn is_probe(cookie: &[u8]) -> bool {
    matches!(Element::find(cookie, "probe"), Ok(Some(_)))
}

impl From<Malformed> for Error {
    fn from(Malformed(what): Malformed) -> Self {
        Self::Element(what)
    }
}
