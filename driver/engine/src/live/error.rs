//! Why a live migration fails, in words for an administrator.

use super::reserve::NoRoom;
use crate::memory::{FileError, TrackError};
use crate::qemu::inject::InjectError;
use crate::qemu::{DiscoverError, MonitorError, NarrowError, ProcessError};
use ferry_contract::control::{Failure, FailureKind};

/// Why a live migration fails on this host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operator gave it up.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The plug-in let go of this engine.
    #[error("libvirt's daemon gave the migration up")]
    Abandoned,
    /// libvirt's own part failed first; its error says why.
    #[error("libvirt's own part of the migration failed")]
    Libvirt,
    /// Another thread failed, in these words; or a rule was broken that no other kind names.
    #[error("{0}")]
    Elsewhere(String),
    /// The other host's engine ended it.
    #[error("{cause}")]
    Refused {
        /// In these words.
        cause: String,
        /// On this host.
        host: String,
    },
    /// The private monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// QEMU's process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Making QEMU wait with its device state.
    #[error(transparent)]
    Narrow(#[from] NarrowError),
    /// Finding the guest's RAM.
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    /// Making the userfaultfd in QEMU.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Tracking writes.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Reading or writing RAM files.
    #[error(transparent)]
    File(#[from] FileError),
    /// The other engine.
    #[error(transparent)]
    Wire(#[from] crate::wire::Error),
    /// Reservation.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The system.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// For `map_err`: what was tried when the system refused.
    pub fn system(what: &'static str) -> impl Fn(std::io::Error) -> Self + Copy {
        move |source| Self::System { what, source }
    }

    /// As the plug-in hears it.
    pub fn failure(&self, host: &str) -> Failure {
        let kind = match self {
            Self::Cancelled => FailureKind::Cancelled,
            Self::Libvirt => FailureKind::Libvirt,
            _ => FailureKind::Failed,
        };
        let host = match self {
            Self::Refused { host, .. } => host,
            _ => host,
        };
        Failure {
            kind,
            host: host.to_owned(),
            cause: self.to_string(),
        }
    }
}
