//! Why a cold migration fails, in words for an administrator.

use ferry_contract::control::{Failure, FailureKind};
use std::path::{Path, PathBuf};

/// Why a cold migration fails on this host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operator, the plug-in or another thread ended it.
    #[error(transparent)]
    Ended(#[from] crate::live::Error),
    /// The other engine's connection.
    #[error(transparent)]
    Wire(#[from] crate::wire::Error),
    /// Everything that is in the way, one a line.
    #[error("{}", .0.join("\n"))]
    Problems(Vec<String>),
    /// A file.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The content of a file here is not what the source read.
    #[error(
        "{} is damaged: at {offset} it is not what {} holds at the source; the copy was removed, try again, and look at \
         the disks and memory of both hosts if it happens again",
        path.display(),
        from.display()
    )]
    Damaged {
        /// The file on this host.
        path: PathBuf,
        /// The source's.
        from: PathBuf,
        /// Where, bytes.
        offset: u64,
    },
    /// The other host's engine says no.
    #[error("{cause}")]
    Refused {
        /// For this kind of reason.
        kind: FailureKind,
        /// In these words.
        cause: String,
        /// On this host.
        host: String,
    },
    /// Something else, in these words.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// For `map_err`: what was tried with a file when the system refused.
    pub fn file<'a>(what: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> Self + Copy + 'a {
        move |source| Self::File {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// As the plug-in hears it.
    pub fn failure(&self, host: &str) -> Failure {
        match self {
            Self::Ended(error) => error.failure(host),
            Self::Refused { kind, host, cause } => Failure {
                kind: *kind,
                host: host.clone(),
                cause: cause.clone(),
            },
            error => Failure {
                kind: FailureKind::Failed,
                host: host.to_owned(),
                cause: error.to_string(),
            },
        }
    }
}
