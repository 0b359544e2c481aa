//! How two engines speak: connections, and what may travel on each.
//!
//! Blocking threads, no async runtime, no `unsafe`. Every connection has one direction of bulk or is strict
//! request and response, so one thread owns it and no TLS session is ever split between two.
//!
//! ```text
//!   source engine                                              destination engine
//!                   Control       message: request ->, <- response         Listener
//!   connect() ====  Data(0..n)    data: frames ->, <- acknowledgements  ==== accept()
//!                   DeviceState   chunk: QEMU's stream ->
//!                   ReturnPath    chunk: <- QEMU's return path
//! ```
//!
//! | room | what it is for |
//! |---|---|
//! | [`identity`] | who may speak: one session's certificate, token and protection |
//! | [`certified`] | libvirt's own certificates in its place, where a migration asks for them |
//! | [`connection`] | one authenticated connection; [`listener`] is the door it comes in by |
//! | [`frame`] | the frames of a data stream: layout, parser, checks |
//! | [`data`] | sending and receiving guest memory with a window and a digest |
//! | [`message`] | control messages |
//! | [`chunk`] | QEMU's own stream, relayed |
//!
//! A connection opens the same way for every purpose:
//!
//! ```text
//!   connect                     TCP, then TLS 1.3 with both certificates checked (or plain)      accept
//!   Hello { magic, version, session, token, purpose }  ------------------------------------->
//!                                        <-----  Answer { magic, version, Welcome | why refused }
//! ```

#[cfg(test)]
#[path = "../../../../tests/src/authority.rs"]
mod authority;
pub mod certified;
pub mod chunk;
pub mod connection;
pub mod data;
mod error;
pub mod frame;
mod hello;
pub mod identity;
pub mod listener;
pub mod message;
mod socket;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tls;

pub use certified::Certified;
pub use connection::{connect, Connection};
pub use data::{Apply, DataReceiver, DataSender, Progress, Totals};
pub use error::{Error, Result};
pub use hello::{Purpose, Refusal, VERSION};
pub use identity::{Identity, Protection, Security, Token};
pub use listener::{Listener, Stopper};
pub use socket::Breaker;
