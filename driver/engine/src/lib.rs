//! The virt-ferry engine.

pub mod memory;
pub mod qemu;
pub mod wire;
pub mod live;
pub mod report;
