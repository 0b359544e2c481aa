//! Who may speak in a session: certificate, token, protection.
//!
//! Where a migration does not ask for libvirt's own certificates ([`Certified`]), each engine makes a self-signed
//! certificate for it, and hands its DER to the other host in libvirt's migration cookie. That exchange, over libvirt's own
//! authenticated connection, is the root of trust: each side then accepts exactly the peer's certificate, byte for byte.
//! Names, expiry and clocks play no part. The token, from the same cookie, says which session a connection is for.
//! Certificate, key and token are in memory only, but for those of a guest that moves while it is shut off: its journal
//! keeps them until it is over, so that both hosts find each other again after a crash.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::certified::Certified;
use super::{tls, Error, Result};

/// An engine's certificate and private key for one session. Clones share the key.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Identity {
    /// Makes a new key (ECDSA P-256) and a self-signed certificate that carries the session's id as its name.
    ///
    /// # Errors
    /// [`Error::Identity`] where the cryptographic library fails.
    pub fn generate(session: Uuid) -> Result<Identity> {
        let failed = |error: rcgen::Error| Error::Identity {
            what: error.to_string(),
        };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("virt-ferry {session}"));
        let certificate = params.self_signed(&key).map_err(failed)?;
        let inner = Inner {
            certificate: certificate.der().clone(),
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
        };
        Ok(Identity {
            inner: Arc::new(inner),
        })
    }

    /// The identity whose certificate and key, DER, were kept from before a crash.
    pub fn kept(certificate: Vec<u8>, key: Vec<u8>) -> Identity {
        let inner = Inner {
            certificate: certificate.into(),
            key: key.into(),
        };
        Identity {
            inner: Arc::new(inner),
        }
    }

    /// The private key, PKCS #8 in DER, to be kept for after a crash.
    pub fn expose_key(&self) -> &[u8] {
        self.inner.key.secret_pkcs8_der()
    }

    /// The certificate in DER, to be pinned by the other host.
    pub fn certificate(&self) -> &[u8] {
        &self.inner.certificate
    }

    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.inner.certificate.clone()]
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from(self.inner.key.clone_key())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("certificate", &format_args!("{} bytes", self.certificate().len()))
            .finish()
    }
}

/// The secret that admits a connection to its session. Compared in constant time, never printed.
#[derive(Clone)]
pub struct Token([u8; Token::LENGTH]);

impl Token {
    /// Bytes of a token.
    pub const LENGTH: usize = 32;

    /// A new random token.
    ///
    /// # Errors
    /// [`Error::Identity`] where the system has no randomness to give.
    pub fn generate() -> Result<Token> {
        let mut bytes = [0; Token::LENGTH];
        let provider: Arc<CryptoProvider> = tls::provider();
        provider
            .secure_random
            .fill(&mut bytes)
            .map_err(|_| Error::Identity {
                what: "no random bytes for the session's token".into(),
            })?;
        Ok(Token(bytes))
    }

    /// The secret itself, to be put into the cookie.
    pub fn expose(&self) -> &[u8; Token::LENGTH] {
        &self.0
    }
}

impl From<[u8; Token::LENGTH]> for Token {
    fn from(bytes: [u8; Token::LENGTH]) -> Token {
        Token(bytes)
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Token) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

/// What both ends of every connection of a session know.
#[derive(Debug, Clone)]
pub struct Security {
    /// The migration.
    pub session: Uuid,
    /// The secret that admits to it.
    pub token: Token,
    /// Encrypted, or not.
    pub protection: Protection,
}

/// Whether the session's connections are encrypted.
#[derive(Clone)]
pub enum Protection {
    /// TLS 1.3 with both certificates pinned.
    Encrypted {
        /// This engine's own certificate and key.
        identity: Identity,
        /// The peer's certificate, DER.
        peer: Vec<u8>,
    },
    /// TLS 1.3 with libvirt's own certificates.
    Certified(Certified),
    /// For an end that accepts and has not been told the peer's certificate: the first one that is shown together with
    /// the session's token is the peer's from then on.
    Learned {
        /// This engine's own certificate and key.
        identity: Identity,
        /// The peer's certificate, DER, once it has been shown.
        peer: Arc<OnceLock<Vec<u8>>>,
        /// This host would do without encryption: a peer that does not want it either is let in without.
        plain: bool,
    },
    /// No encryption: guest memory and the token travel in clear, and whoever can read the network can also join.
    /// Only for a migration network that is itself protected.
    Plain,
}

impl Protection {
    /// Starts TLS as the connecting side, where there is any.
    pub(super) fn client(&self, ip: IpAddr) -> Result<Option<tls::Session>> {
        match self {
            Protection::Encrypted { identity, peer } => tls::client(identity, peer, ip).map(Some),
            Protection::Certified(certified) => certified.session().map(Some),
            Protection::Learned { .. } => Err(Error::Identity {
                what: "the peer's certificate has to be known before connecting to it".into(),
            }),
            Protection::Plain => Ok(None),
        }
    }

    /// Starts TLS as the accepting side, where there is any.
    pub(super) fn server(&self) -> Result<Option<tls::Session>> {
        match self {
            Protection::Encrypted { identity, peer } => tls::server(identity, Some(peer)).map(Some),
            Protection::Learned { identity, peer, .. } => {
                tls::server(identity, peer.get().map(Vec::as_slice)).map(Some)
            }
            Protection::Certified(certified) => certified.session().map(Some),
            Protection::Plain => Ok(None),
        }
    }

    /// An error of opening a connection, with what is known of its cause here.
    pub(super) fn explain(&self, error: Error) -> Error {
        match self {
            Protection::Certified(certified) => certified.explain(error),
            Protection::Encrypted { .. } | Protection::Learned { .. } | Protection::Plain => error,
        }
    }
}

impl fmt::Debug for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Protection::Certified(certified) => certified.fmt(f),
            Protection::Encrypted { identity, .. } => f.debug_tuple("Encrypted").field(identity).finish(),
            Protection::Learned { identity, plain, .. } => {
                f.debug_tuple("Learned").field(identity).field(plain).finish()
            }
            Protection::Plain => f.write_str("Plain"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_random_equal_by_value_and_hidden() {
        let token = Token::generate().unwrap();
        assert_ne!(token, Token::generate().unwrap());
        assert_eq!(token, Token::from(*token.expose()));
        let mut other = *token.expose();
        other[31] ^= 1;
        assert_ne!(token, Token::from(other));
        assert_eq!(format!("{token:?}"), "Token(hidden)");
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let session = Uuid::new_v4();
        let identity = Identity::generate(session).unwrap();
        let peer = identity.certificate().to_vec();
        let security = Security {
            session,
            token: Token::from([0xab; 32]),
            protection: Protection::Encrypted {
                identity: identity.clone(),
                peer,
            },
        };
        let text = format!("{security:?}");
        assert!(!text.contains("171"), "{text}");
        assert!(text.len() < 300, "{text}");
    }

    #[test]
    fn two_identities_differ() {
        let session = Uuid::new_v4();
        let (one, two) = (
            Identity::generate(session).unwrap(),
            Identity::generate(session).unwrap(),
        );
        assert_ne!(one.certificate(), two.certificate());
    }
}
