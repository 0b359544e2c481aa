//! A running QEMU that we did not start: asking it (monitor), looking at it (process, RAM), and the one thing that has
//! to be done inside of it (inject), or to it (throttle).
//!
//! ```text
//!   private QMP socket ──▶ Monitor ──┬─▶ ram::discover ──▶ Vec<RamBlock> or the reason why not
//!                  │                 └─▶ drain, capabilities, events
//!              peer_pid ──▶ Process ──▶ injector::userfaultfd ──▶ memory::WriteTracker
//! ```
//!
//! What QEMU says is checked as if it were an enemy: a guest that broke out of its QEMU must not get further here.

pub mod cgroup;
mod commands;
mod devices;
pub mod inject;
pub mod injector;
pub mod monitor;
mod narrow;
pub mod nested;
pub mod process;
pub mod ram;
pub mod throttle;

pub use commands::{MigrationStatus, Version};
pub use monitor::{Event, Monitor, MonitorError};
pub use narrow::{stands, Devices, Narrow, NarrowError};
pub use process::{Process, ProcessError, Vma};
pub use ram::{discover, tracked_ranges, DiscoverError, Ineligible, RamBlock};
pub use throttle::Throttle;
