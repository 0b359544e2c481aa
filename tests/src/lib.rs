//! What the end-to-end tests of virt-ferry stand on.
//!
//! ```text
//! tests/tests/*.rs   the tests
//!       │
//!   lab::Lab         several libvirt hosts (script tests/lab); gone when dropped, or when this process dies
//!   host::Host       one of them: commands, virsh, guests, logs, processes
//!   guest            guests that check their own memory
//!   cold             guests that are shut off, with files of all kinds
//!   clean            that a migration left nothing of virt-ferry on a host
//!   scene            a lab with a guest in it, moved and judged
//!   storage          moves within one host, watched, held up and disturbed
//!   underway         a migration while it runs
//!   link             a link made slow
//!   monitor          a guest's private monitor, in the engine's place
//!   timeline         what virt-ferry is told and tells on a host
//!   phases           a client that runs the phases of a migration one by one
//!   fault            slow and cut links, killed processes, and how a guest must come out of it
//!   checkout         its files, and the programs that look at them
//!   wait             waiting for a condition, never for a time
//! ```

pub mod authority;
pub mod checkout;
pub mod clean;
pub mod cold;
pub mod cold_scene;
pub mod fault;
pub mod guest;
pub mod host;
pub mod huge_pages;
pub mod lab;
pub mod link;
pub mod monitor;
pub mod phases;
pub mod scene;
pub mod storage;
pub mod timeline;
pub mod underway;
pub mod wait;

/// Says that this machine cannot run a test, and why; `tests/run` counts and shows it. Follow it by `return Ok(())`.
pub fn skipped(reason: &str) {
    println!("\nSKIPPED: {reason}");
}
