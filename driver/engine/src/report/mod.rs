//! The timeline of one migration, as seen from one end.
//!
//! ```text
//!  Recorder ──finish──▶ Timeline ─┬─ summary::lines  a few lines for the log
//!                                 ├─ page::lines     a page for a terminal
//!                                 ├─ write::save     <guest>-<session>-<role>.json, and beside it
//!                                 └─ svg::render     <guest>-<session>-<role>.svg
//! ```
//!
//! Source and destination each record their own; `started` and, on one machine, `monotonic_base_us` align the two.
//! Nothing here can fail a migration: a recorder does no I/O, and a report that cannot be written is only an error
//! to log.

pub mod summary;
pub mod svg;
pub mod timeline;
pub mod write;

mod page;
mod read;
mod text;

pub use ferry_contract::stage::Stage;
pub use read::{command, load, ReportError};
pub use text::{bytes as bytes_text, printable, rfc3339_now, time as time_text};
pub use timeline::{
    millis, Clock, Downtime, Event, Guest, Migration, Outcome, Ram, Recorder, Role, Round, StageSpan,
    Timeline, Totals,
};
pub use write::{keep, publish, save};
