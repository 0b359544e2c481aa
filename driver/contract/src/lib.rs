//! The words plug-in, engine and two hosts share.

pub mod stage;
