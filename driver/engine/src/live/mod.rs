//! Live migration of a running guest.
//!
//! `rounds` and `working_set` are pure policy: no I/O, no clock, no threads. Everything they know they are told,
//! so every decision of a real migration can be replayed in a test.
//!
//! ```text
//!  scan ──dirty──▶ WorkingSet ──pending──▶ Policy ──Continue──▶ WorkingSet::take ──▶ send, then scan again
//!                                            └──StopAndCopy──▶ stop the guest, scan, WorkingSet::into_last
//! ```

pub mod rounds;
pub mod working_set;

#[cfg(test)]
mod replay;
#[cfg(test)]
mod simulation;
