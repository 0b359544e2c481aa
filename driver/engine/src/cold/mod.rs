//! Cold migration: a guest that is shut off goes over with all of its files, pulled by the destination.
//!
//! ```text
//!   source (serves)                                                   destination (pulls)
//!   ColdServe   look at the files, fence them, journal: prepared
//!                                                                     ColdPull    reserve; journal: pulling
//!               read a block, hash it, leave out zeros  ═══════════▶  write it beside the target
//!               (or: the hash is the one you have)                    sync, read back, hash, compare; journal: ready
//!               compare the digests of all files        ◀──Ready───
//!                                                                     ColdCommit  journal: committing
//!               nothing has changed? journal: committed ◀──Commit──
//!                                                       ───────────▶  rename; journal: placed   (libvirt defines)
//!               journal: owned-there                    ◀──Owned───   ColdOwned   journal: owned, then gone
//!   ColdDelete  delete; journal gone
//! ```
//!
//! | room | what it is for |
//! |---|---|
//! | [`hash`] | what a file's content is, as a digest: holes and zeros count alike |
//! | [`files`] | the source's files: look, fence, read; [`extents`] where they have data |
//! | [`frame`], [`messages`] | what goes over data and control connections |
//! | [`source`], [`serve`] | the source's sequence, and one data connection of it |
//! | `ownership`, `door`, `deletion` | whose the guest is by the source's journal; where it listens; what it deletes in the end |
//! | [`reserve`] | everything that is in the way at the destination, at once |
//! | [`place`], `undo` | the destination's files: temporary and final; gone again |
//! | [`acl`] | who may use a file beside those that its mode speaks of |
//! | [`destination`], [`pull`] | the destination's sequence, and all files on their way; `puller` one data connection of it, `chunks` what is copied together |
//! | [`link`], `handover`, `leftovers` | how it speaks to the source; how the guest becomes its own or is given back; what an earlier session left |
//! | [`within`], [`copy`], [`header`] | disks that go to another data store of the same host |
//! | [`record`] | what is told of a migration afterwards |
//! | [`journal`], [`recover`] | what survives a crash, and what is made of it; `identity` which files it speaks of |

pub mod acl;
mod chunks;
pub mod copy;
mod deletion;
pub mod destination;
mod door;
mod error;
pub mod extents;
pub mod files;
pub mod frame;
mod handover;
pub mod hash;
pub mod header;
mod identity;
pub mod journal;
mod leftovers;
pub mod link;
pub mod locks;
mod machine;
pub mod messages;
mod nonce;
mod ownership;
mod pinned;
pub mod place;
pub mod pull;
mod puller;
pub mod reader;
pub mod record;
pub mod recover;
pub mod reserve;
pub mod serve;
pub mod source;
mod undo;
mod users;
pub mod within;

pub use error::Error;
