//! `libvirt_driver_ferry.so`: preloaded into libvirtd or virtqemud, it gives eligible migrations to the engine.
//!
//! ```text
//!  libvirt's dispatcher
//!        │ virConnectOpenAuth, virDomainMigrate…3Params, virDomainGetJob…, virDomainSave…, …, execve, kill
//!  ┌─────▼──────┐   not ours    ┌─────────────────┐
//!  │ interpose/ │ ────────────▶ │ the real libvirt│
//!  └─────┬──────┘               └────────▲────────┘
//!  ┌─────▼──────┐  phases (libvirt/)     │
//!  │ live/ cold/│ ───────────────────────┘
//!  └─────┬──────┘
//!  ┌─────▼──────┐  one engine process a migration
//!  │   engine   │ ═══════▶ virt-ferry-engine
//!  └────────────┘
//! ```
//!
//! Rules of this house: catch every panic at the border, bound every wait, hold no lock while waiting, fall
//! through when in doubt. The plug-in decides and delegates; it never copies a page.

mod awake;
mod cold;
mod engine;
mod guest_memory;
mod interpose;
mod libvirt;
mod live;
mod load;
mod mark;
mod sessions;
mod turns;
mod workers;
