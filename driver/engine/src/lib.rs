//! The virt-ferry engine.

pub mod memory;
pub mod qemu;
