//! The virt-ferry engine.

pub mod memory;
pub mod qemu;
pub mod wire;
