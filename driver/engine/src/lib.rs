//! The virt-ferry engine.

pub mod live;
pub mod report;
