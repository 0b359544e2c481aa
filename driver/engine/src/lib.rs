//! The virt-ferry engine.

pub mod wire;
