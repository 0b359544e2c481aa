//! The lab from the tests' side.

pub mod guest;
