//! The test guest: what runs inside it, and the words it shares with the tests outside.
//!
//! ```text
//!   inside the guest (the binary)                       outside (package ferry-tests)
//!   config ── load: writer, checker ── area of pages    judges RAM files by the same `page`
//!             disk: reader, writer   ─┘                 reads the serial log by the same `line`
//!   clock:  stall meter, lost time                      starts the guest with the same `config`
//!   beat:   UDP heartbeat ─────────────────────────────> measures the longest silence
//!   command: UDP and serial <──────────────────────────  check, rate, set, quit
//! ```
//!
//! `page`, `line`, `files` and `config` do no I/O and are the contract between the two sides.

pub mod config;
pub mod files;
pub mod line;
pub mod page;
