//! libvirt as the rest of the plug-in sees it: the only room that handles its pointers.
//!
//! The types here borrow or own what C gave us and give it back in the way C expects; what is above them is
//! ordinary Rust.

mod cookie;
mod definition;
mod domain;
pub mod ending;
mod error;
mod host;
pub mod job;
mod params;
pub mod phase;
pub mod real;
mod storage;

pub use cookie::Cookie;
pub use definition::Metadata;
pub use domain::{c_string, Connection, Domain, OwnedConnection, OwnedDomain};
pub use error::Error;
pub use params::{entries, Params};
pub use storage::{Pool, Storage};
