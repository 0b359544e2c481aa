//! What virt-ferry's parts say to each other, and nothing that does I/O.
//!
//! ```text
//!   source libvirtd                                     destination libvirtd
//!   ┌──────────────┐   migration cookie: Offer, Answer  ┌──────────────┐
//!   │   plug-in    │ ─────────────────────────────────▶ │   plug-in    │
//!   └──────┬───────┘            [cookie]                └──────┬───────┘
//!          │ Request / Message [control]                       │
//!   ┌──────▼───────┐     frames (the engine's wire)     ┌──────▼───────┐
//!   │    engine    │ ═════════════════════════════════▶ │    engine    │
//!   └──────────────┘                                    └──────────────┘
//! ```
//!
//! Everything read here comes from another host, another process or a file, so each parser is total: it is
//! bounded, it checks, and it answers with a typed error.

pub mod cold;
pub mod config;
pub mod control;
pub mod cookie;
pub mod recover;
pub mod session;
pub mod stage;
mod xml;
