//! The lab from the tests' side.
