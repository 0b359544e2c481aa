//! The virt-ferry engine.
