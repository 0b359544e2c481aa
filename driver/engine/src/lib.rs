//! The virt-ferry engine: moves a guest's memory from RAM file to RAM file while the guest runs.
//!
//! ```text
//!   plug-in ◀─ requests, figures ─▶ control
//!                                      │
//!                                live, cold ───────── report   (timeline: JSON, SVG, log lines)
//!                          ┌───────────┼───────────┐
//!                        qemu        memory       wire ◀════▶ the other host's engine
//!              (monitor, discovery,  (RAM files,  (connections, frames,
//!                  injection)      write tracker)  digests)
//! ```
//!
//! The engine knows nothing of libvirt and may die at any moment without harm: the kernel then lifts the write
//! tracking, closes its connections, and the plug-in clears the one capability it set in QEMU.

pub mod cold;
pub mod control;
pub mod live;
pub mod memory;
pub mod qemu;
pub mod report;
pub mod wire;
