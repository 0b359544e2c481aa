//! What can go wrong between two engines, in words for an administrator.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::certified;
use super::data::Totals;
use super::frame;
use super::hello::Refusal;

/// The result of everything in [`wire`](super).
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the wire. Each text names the peer and what to look at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The peer closed the connection, or it broke, where more was expected.
    #[error("{peer} ended the connection while {doing}; see the virt-ferry log on that host for its reason")]
    PeerGone {
        /// The other end.
        peer: SocketAddr,
        /// What this side was doing.
        doing: &'static str,
    },

    /// The peer, or the network to it, gave no sign of life for too long.
    #[error(
        "no answer from {peer} while {doing}; check the network between the two hosts and that the \
         virt-ferry engine there is alive"
    )]
    Timeout {
        /// The other end.
        peer: SocketAddr,
        /// What this side was doing.
        doing: &'static str,
    },

    /// This side broke the connection off with a [`Breaker`](super::Breaker).
    #[error("the connection with {peer} was broken off by this host while {doing}")]
    BrokenOff {
        /// The other end.
        peer: SocketAddr,
        /// What this side was doing.
        doing: &'static str,
    },

    /// The accepting side does not want this connection.
    #[error("{peer} refused the connection: {reason}")]
    Refused {
        /// The accepting engine.
        peer: SocketAddr,
        /// Its reason.
        reason: Refusal,
    },

    /// This side, accepting, does not want the peer's connection.
    #[error("refused a connection from {peer}: {reason}")]
    Turned {
        /// The stranger.
        peer: SocketAddr,
        /// Why it was turned away.
        reason: Refusal,
    },

    /// The certificate shown is not the one exchanged for this migration.
    #[error(
        "{shown_by} showed {checked_by} a certificate that is not the one exchanged for this migration; \
         something else answers at that address and port, or an engine of an earlier migration is still alive"
    )]
    WrongCertificate {
        /// Who showed it: an address or "this host".
        shown_by: Party,
        /// Who found it wrong.
        checked_by: Party,
    },

    /// The peer's certificate, which should be one of libvirt's, is not good.
    #[error("{peer} showed a certificate that is not accepted: {why}")]
    Distrusted {
        /// The other end.
        peer: SocketAddr,
        /// Why, and by which files.
        why: String,
    },

    /// The peer does not think this host's certificate good.
    #[error("{peer} does not accept this host's certificate: {why}")]
    NotAccepted {
        /// The other end.
        peer: SocketAddr,
        /// Why, and which file it is about.
        why: String,
    },

    /// libvirt's certificates of this host cannot be used.
    #[error(transparent)]
    Certificates(#[from] certified::Fault),

    /// TLS failed for another reason than a wrong certificate.
    #[error("TLS with {peer} failed: {what}")]
    Tls {
        /// The other end.
        peer: SocketAddr,
        /// What rustls says.
        what: String,
    },

    /// One side encrypts, the other does not.
    #[error(
        "this host's end is {ours} and {peer}'s is not; set the same transport encryption in virt-ferry's \
         configuration on both hosts"
    )]
    Protection {
        /// The other end.
        peer: SocketAddr,
        /// "encrypted" or "plain".
        ours: &'static str,
    },

    /// The engines speak different versions of the wire protocol.
    #[error(
        "{peer} speaks wire version {theirs}, this host {ours}; install the same virt-ferry release on both hosts"
    )]
    Version {
        /// The other end.
        peer: SocketAddr,
        /// The version of this engine.
        ours: u16,
        /// The version of the peer.
        theirs: u16,
    },

    /// The peer sent something the protocol does not allow.
    #[error("{peer} sent what the protocol does not allow: {what}; the migration cannot go on")]
    BadFrame {
        /// The other end.
        peer: SocketAddr,
        /// What is wrong with it.
        what: frame::Invalid,
    },

    /// A control message that does not parse, or is too long.
    #[error("bad control message with {peer}: {what}")]
    BadMessage {
        /// The other end.
        peer: SocketAddr,
        /// What is wrong with it.
        what: String,
    },

    /// This side could not write received memory.
    #[error("cannot write guest memory received from {peer} (block {block}, offset {offset:#x}): {source}")]
    Apply {
        /// The sending engine.
        peer: SocketAddr,
        /// RAM block number.
        block: u16,
        /// Offset in the block, bytes.
        offset: u64,
        /// What the system says.
        source: io::Error,
    },

    /// The receiver rejected the data stream.
    #[error("{peer} rejected the memory stream: {reason}")]
    Rejected {
        /// The receiving engine.
        peer: SocketAddr,
        /// Its reason.
        reason: frame::Rejection,
    },

    /// Both sides agree that all was sent, but not on what it was.
    #[error(
        "the memory stream from {peer} does not add up: it sent {theirs}, {ours} arrived; the guest must not \
         be started from this copy"
    )]
    Mismatch {
        /// The sending engine.
        peer: SocketAddr,
        /// What was received here.
        ours: Box<Totals>,
        /// What was sent there.
        theirs: Box<Totals>,
    },

    /// A caller of [`DataSender`](super::DataSender) passed what no frame can carry.
    #[error("not sendable: {what}")]
    Unsendable {
        /// What is wrong with it.
        what: frame::Invalid,
    },

    /// No port of the range can be bound.
    #[error(
        "no free TCP port for migration on {ip} in {first}-{last}; give more ports in virt-ferry.toml \
         or end what holds them (ss -ltnp)"
    )]
    NoFreePort {
        /// The address to listen on.
        ip: std::net::IpAddr,
        /// First port of the range.
        first: u16,
        /// Last port of the range.
        last: u16,
    },

    /// Nobody (acceptable) connected in time.
    #[error("no connection from the other host at {address} within {waited:.1?}{}", last_refused(.last))]
    NobodyCame {
        /// Where this side listened.
        address: SocketAddr,
        /// How long.
        waited: Duration,
        /// The last connection that was turned away, if there was one.
        last: Option<Box<Error>>,
    },

    /// The listener was stopped.
    #[error("listening at {address} was stopped by this host")]
    Stopped {
        /// Where this side listened.
        address: SocketAddr,
    },

    /// The caller gave no address.
    #[error("the other host gave no address to connect to; check migration_address in its virt-ferry configuration")]
    NoAddress,

    /// A session's certificate could not be made or used.
    #[error("cannot make or use this session's certificate: {what}")]
    Identity {
        /// What rcgen or rustls says.
        what: String,
    },

    /// The system refused something.
    #[error("{doing} failed ({with}): {source}")]
    Io {
        /// What this side was doing.
        doing: &'static str,
        /// The address concerned.
        with: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
}

fn last_refused(last: &Option<Box<Error>>) -> String {
    match last {
        Some(error) => format!(" (last turned away: {error})"),
        None => "; check that a firewall lets the port through".into(),
    }
}

/// Why a peer does not accept our certificate, as far as it says.
fn refusal(alert: rustls::AlertDescription) -> Option<&'static str> {
    use rustls::AlertDescription::*;
    match alert {
        UnknownCA => Some("none of the authorities it trusts (ca-cert.pem there) has signed it"),
        CertificateExpired => Some("it has expired by the clock there"),
        CertificateRevoked => Some("it has been revoked (ca-crl.pem there)"),
        CertificateRequired => Some("it wants to see one (migrate_tls_x509_verify there)"),
        BadCertificate => Some("it is not as it should be"),
        UnsupportedCertificate => Some("it is not meant for this end of a connection"),
        _ => None,
    }
}

/// One of the two ends, in an error's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// The host this runs on.
    ThisHost,
    /// The peer.
    Peer(SocketAddr),
}

impl std::fmt::Display for Party {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Party::ThisHost => f.write_str("this host"),
            Party::Peer(peer) => peer.fmt(f),
        }
    }
}

impl Error {
    /// Types what a socket or rustls reported while `doing` something with `peer`.
    pub(super) fn from_io(peer: SocketAddr, doing: &'static str, encrypted: bool, error: io::Error) -> Error {
        use io::ErrorKind::*;
        if let Some(tls) = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        {
            return Error::from_tls(peer, tls);
        }
        match error.kind() {
            // EHOSTUNREACH and ENETUNREACH can end an established connection too.
            TimedOut | WouldBlock => Error::Timeout { peer, doing },
            UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe | NotConnected | WriteZero => {
                Error::PeerGone { peer, doing }
            }
            InvalidData if encrypted => Error::Tls {
                peer,
                what: error.to_string(),
            },
            _ => Error::Io {
                doing,
                with: peer,
                source: error,
            },
        }
    }

    fn from_tls(peer: SocketAddr, error: &rustls::Error) -> Error {
        use rustls::{AlertDescription, CertificateError, InvalidMessage};
        match error {
            // What our verifiers report, and the alert that rustls makes of it.
            rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
                Error::WrongCertificate {
                    shown_by: Party::Peer(peer),
                    checked_by: Party::ThisHost,
                }
            }
            rustls::Error::AlertReceived(AlertDescription::AccessDenied) => Error::WrongCertificate {
                shown_by: Party::ThisHost,
                checked_by: Party::Peer(peer),
            },
            // It has another's certificate, but not its key: that is no question of trust.
            rustls::Error::InvalidCertificate(CertificateError::BadSignature) => Error::Tls {
                peer,
                what: error.to_string(),
            },
            rustls::Error::InvalidCertificate(error) => Error::Distrusted {
                peer,
                why: certified::reason(error),
            },
            rustls::Error::NoCertificatesPresented => Error::Distrusted {
                peer,
                why: "it has none (client-cert.pem there)".into(),
            },
            rustls::Error::AlertReceived(alert) if refusal(*alert).is_some() => Error::NotAccepted {
                peer,
                why: refusal(*alert).unwrap_or_default().into(),
            },
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => Error::Protection {
                peer,
                ours: "encrypted",
            },
            other => Error::Tls {
                peer,
                what: other.to_string(),
            },
        }
    }

    /// How far a connection attempt came: of several failed attempts the furthest tells most.
    pub(super) fn rank(&self) -> u8 {
        match self {
            Error::Io { .. } => 0,
            Error::Timeout { .. } => 1,
            Error::PeerGone { .. } => 2,
            Error::Tls { .. } | Error::Protection { .. } => 3,
            Error::WrongCertificate { .. } | Error::Distrusted { .. } | Error::NotAccepted { .. } => 4,
            _ => 5,
        }
    }
}
