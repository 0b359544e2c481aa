//! Live migration: a guest's memory goes over in rounds while it runs, then it stops, the rest follows, and the
//! destination takes over.
//!
//! ```text
//!   source                                                            destination
//!   Inspect   look at QEMU and its RAM files
//!                                                                     Reserve   room?  (nothing started yet)
//!                                                                     Attach    take hold of the incoming QEMU, listen
//!   Precopy   arm ▸ drain ▸ first pass  ════ data streams ══════════▶ land
//!             scan ▸ drain ▸ send, again and again
//!   Switchover: libvirt lets QEMU migrate into our socket
//!             relay what QEMU says before it stops  ───────────────▶  relay at once
//!             STOP, pre-switchover: scan ▸ send  ═══════════════════▶ land
//!             QEMU writes device state, which is not read yet:
//!             last scan ▸ send  ════════════════════════════════════▶ land
//!             relay device state (held)  ──────────────────────────▶  withhold
//!             Commit: counts and digests  ─────────────────────────▶  compare; committed: let device state through
//!   Performed x-ignore-shared off                                     Finish    QEMU has loaded; x-ignore-shared off
//!   Conclude  timeline                                                Conclude  guest runs; timeline
//! ```
//!
//! The order in every round is scan, then drain, then copy. A page pinned for direct I/O before a scan is protected
//! by it, and what the device writes after it sets no bit; once the I/O that was in flight at the scan has drained,
//! such a page has its final content and is copied; I/O that begins later faults and is in the next scan.
//!
//! [`source`] and [`destination`] mirror each other; [`copy`] and [`land`] too.

mod auto_converge;
mod brake;
pub mod copy;
pub mod destination;
mod error;
pub mod inspect;
pub mod land;
pub mod messages;
pub mod pace;
pub mod precopy;
mod protection;
mod queue;
pub mod relay;
pub mod reserve;
pub mod rounds;
pub mod signals;
pub mod source;
pub mod verify;
pub mod watch;
pub mod working_set;

pub use error::Error;
#[cfg(test)]
mod replay;
#[cfg(test)]
mod simulation;
