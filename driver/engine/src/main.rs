//! The engine process of one migration on one host.
fn main() {}
