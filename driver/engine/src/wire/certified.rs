//! TLS with libvirt's own certificates (`virsh migrate --tls`), used as QEMU uses them.
//!
//! As QEMU 10.0 does it (`crypto/tlscredsx509.c`) with what libvirt 11.3 tells it:
//!
//! | file | source | destination |
//! |---|---|---|
//! | `ca-cert.pem` | the authorities it trusts | so |
//! | `server-cert.pem`, `server-key.pem` | | what it shows |
//! | `client-cert.pem`, `client-key.pem` | what it shows; where one is missing, nothing | |
//! | `ca-crl.pem` | | what has been revoked; need not exist |
//!
//! A host's own certificate is checked before anybody is shown it. The source always checks chain and name of the
//! destination's, the destination the chain of the source's unless told not to (`migrate_tls_x509_verify = 0`). Unlike
//! GnuTLS, only names in subjectAltName count, never the common name.

#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::tls::{self, Session};
use super::Error;

/// The most of a file that is read; a system's bundle of all authorities has a quarter of it.
const MAX_FILE: u64 = 1 << 20;

/// What is wrong with this host's certificates.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A file that is needed.
    #[error("cannot read {}: {source}; TLS needs it (migrate_tls_x509_cert_dir in qemu.conf)", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file without what its name promises.
    #[error("{} cannot be used: {what}", file.display())]
    Content {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A name that no certificate has.
    #[error(
        "{name} is no host name that a certificate could bear; name the destination with --tls-destination"
    )]
    Name {
        /// What was given.
        name: String,
    },
}

/// One end's certificates, fit to be used. Clones share them.
#[derive(Clone)]
pub struct Certified(Arc<Inner>);

struct Inner {
    authorities: PathBuf,
    shown: Option<PathBuf>,
    end: End,
}

enum End {
    Source {
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    },
    Destination(Arc<ServerConfig>),
}

impl Certified {
    /// What a source needs, to speak to a destination of this name.
    ///
    /// # Errors
    /// The file that is missing or wrong, and why.
    pub fn source(directory: &Path, name: &str) -> Result<Self, Fault> {
        // The zone of a link-local address is this host's own business.
        let bare = name.split_once('%').map_or(name, |(address, _)| address);
        let name = ServerName::try_from(bare.to_owned()).map_err(|_| Fault::Name { name: name.into() })?;
        let authorities = Authorities::read(directory)?;
        let own = ["client-cert.pem", "client-key.pem"].map(|file| directory.join(file));
        let own = own.iter().all(|file| file.exists()).then_some(own);
        let builder = ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| authorities.wrong(&error))?
            .with_root_certificates(authorities.roots.clone());
        let (mut config, shown) = match own {
            None => (builder.with_no_client_auth(), None),
            Some([file, key]) => {
                let chain = certificates(&file)?;
                authorities.vouch_for_client(&file, &chain)?;
                let config = builder.with_client_auth_cert(chain, private_key(&key)?);
                (config.map_err(|error| no_pair(&key, &error))?, Some(file))
            }
        };
        tls::settle_client(&mut config);
        Ok(Self(Arc::new(Inner {
            authorities: authorities.file,
            shown,
            end: End::Source {
                config: Arc::new(config),
                name,
            },
        })))
    }

    /// What a destination needs; with `verify` it wants to see the source's certificate.
    ///
    /// # Errors
    /// The file that is missing or wrong, and why.
    pub fn destination(directory: &Path, verify: bool) -> Result<Self, Fault> {
        let authorities = Authorities::read(directory)?;
        let [file, key] = ["server-cert.pem", "server-key.pem"].map(|file| directory.join(file));
        let chain = certificates(&file)?;
        authorities.vouch_for_server(&file, &chain)?;
        let verifier = match verify {
            false => WebPkiClientVerifier::no_client_auth(),
            true => {
                // As GnuTLS: a list that is out of date is no list, a certificate no list speaks of is good.
                let builder =
                    WebPkiClientVerifier::builder_with_provider(authorities.roots.clone(), tls::provider())
                        .with_crls(revocations(directory)?)
                        .allow_unknown_revocation_status()
                        .enforce_revocation_expiration();
                builder.build().map_err(|error| authorities.wrong(&error))?
            }
        };
        let mut config = ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| authorities.wrong(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, private_key(&key)?)
            .map_err(|error| no_pair(&key, &error))?;
        tls::settle_server(&mut config);
        Ok(Self(Arc::new(Inner {
            authorities: authorities.file,
            shown: Some(file),
            end: End::Destination(Arc::new(config)),
        })))
    }

    /// Starts TLS at this end.
    pub(super) fn session(&self) -> super::Result<Session> {
        match &self.0.end {
            End::Source { config, name } => Session::client(config.clone(), name.clone()),
            End::Destination(config) => Session::server(config.clone()),
        }
    }

    /// An error of a connection, with the files that it is about.
    pub(super) fn explain(&self, error: Error) -> Error {
        match error {
            Error::Distrusted { peer, why } => Error::Distrusted {
                peer,
                why: format!("{why}; checked with {}", self.0.authorities.display()),
            },
            Error::NotAccepted { peer, why } => Error::NotAccepted {
                peer,
                why: match &self.0.shown {
                    Some(file) => format!("{why}; it is {} on this host", file.display()),
                    None => format!(
                        "{why}; this host has none, there is no client-cert.pem with its client-key.pem beside {}",
                        self.0.authorities.display()
                    ),
                },
            },
            other => other,
        }
    }
}

impl fmt::Debug for Certified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certified")
            .field("authorities", &self.0.authorities)
            .finish()
    }
}

/// Whom a host trusts.
struct Authorities {
    file: PathBuf,
    roots: Arc<RootCertStore>,
}

impl Authorities {
    /// Those that are authorities and valid today: rustls asks neither of a root.
    fn read(directory: &Path) -> Result<Self, Fault> {
        let file = directory.join("ca-cert.pem");
        let mut roots = RootCertStore::empty();
        let mut expired = false;
        for certificate in certificates(&file)? {
            let parsed = X509Certificate::from_der(&certificate)
                .map(|(_, parsed)| (parsed.is_ca(), parsed.validity().is_valid()));
            match parsed {
                Ok((true, true)) => roots.add(certificate).map_err(|error| content(&file, &error))?,
                Ok((_, valid)) => expired |= !valid,
                Err(error) => return Err(content(&file, &error)),
            }
        }
        if roots.is_empty() {
            let what = match expired {
                true => "the authority in it has expired, or is not valid yet",
                false => "no certificate in it is an authority's (basicConstraints: CA)",
            };
            return Err(content(&file, &what));
        }
        Ok(Self {
            file,
            roots: Arc::new(roots),
        })
    }

    fn vouch_for_server(&self, file: &Path, chain: &[CertificateDer<'static>]) -> Result<(), Fault> {
        let (own, others) = chain
            .split_first()
            .ok_or_else(|| content(file, &NO_CERTIFICATE))?;
        let own = ParsedCertificate::try_from(own).map_err(|error| content(file, &error))?;
        let algorithms = tls::provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&own, &self.roots, others, UnixTime::now(), algorithms)
            .map_err(|error| self.no_good(file, &error))
    }

    fn vouch_for_client(&self, file: &Path, chain: &[CertificateDer<'static>]) -> Result<(), Fault> {
        let (own, others) = chain
            .split_first()
            .ok_or_else(|| content(file, &NO_CERTIFICATE))?;
        WebPkiClientVerifier::builder_with_provider(self.roots.clone(), tls::provider())
            .build()
            .map_err(|error| self.wrong(&error))?
            .verify_client_cert(own, others, UnixTime::now())
            .map(drop)
            .map_err(|error| self.no_good(file, &error))
    }

    fn no_good(&self, file: &Path, error: &rustls::Error) -> Fault {
        let why = match error {
            rustls::Error::InvalidCertificate(error) => reason(error),
            other => other.to_string(),
        };
        content(file, &format!("{why}; checked with {}", self.file.display()))
    }

    fn wrong(&self, error: &dyn fmt::Display) -> Fault {
        content(&self.file, error)
    }
}

const NO_CERTIFICATE: &str = "there is no certificate in it";

fn content(file: &Path, what: &dyn fmt::Display) -> Fault {
    Fault::Content {
        file: file.into(),
        what: what.to_string(),
    }
}

fn no_pair(key: &Path, error: &rustls::Error) -> Fault {
    content(
        key,
        &format!("it does not belong to the certificate beside it, or is of no known kind ({error})"),
    )
}

/// A file's bytes, bounded.
fn bytes(file: &Path) -> Result<Vec<u8>, Fault> {
    let failed = |source| Fault::File {
        file: file.into(),
        source,
    };
    let mut bytes = Vec::new();
    let mut opened = File::open(file).map_err(failed)?.take(MAX_FILE + 1);
    opened.read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 {
        0..=MAX_FILE => Ok(bytes),
        _ => Err(content(file, &format!("it is longer than {MAX_FILE} bytes"))),
    }
}

/// All certificates of a file, at least one.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, Fault> {
    let found = CertificateDer::pem_slice_iter(&bytes(file)?).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if found.is_empty() => Err(content(file, &NO_CERTIFICATE)),
        found => found.map_err(|error| content(file, &error)),
    }
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, Fault> {
    PrivateKeyDer::from_pem_slice(&bytes(file)?).map_err(|error| match error {
        pem::Error::NoItemsFound => content(file, &"there is no private key without a password in it"),
        error => content(file, &error),
    })
}

fn revocations(directory: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, Fault> {
    let file = directory.join("ca-crl.pem");
    if !file.exists() {
        return Ok(Vec::new());
    }
    let found = CertificateRevocationListDer::pem_slice_iter(&bytes(&file)?).collect::<Result<_, _>>();
    found.map_err(|error| content(&file, &error))
}

/// Why a certificate is not accepted.
pub(super) fn reason(error: &CertificateError) -> String {
    use CertificateError::*;
    match error {
        UnknownIssuer => "no authority that is trusted has signed it".into(),
        Expired | ExpiredContext { .. } => "it has expired".into(),
        NotValidYet | NotValidYetContext { .. } => "it is not valid yet; is the clock right?".into(),
        Revoked => "it has been revoked".into(),
        ExpiredRevocationList | ExpiredRevocationListContext { .. } => "the list of what is revoked is out of date".into(),
        NotValidForNameContext { expected, presented } if presented.is_empty() => format!(
            "it is for nobody, so not for {}: names must be in its subjectAltName",
            expected.to_str()
        ),
        NotValidForNameContext { expected, presented } => format!(
            "it is not for {}, but for [{}] (subjectAltName); name the destination as it does, with --tls-destination \
             or --migrateuri",
            expected.to_str(),
            presented.iter().map(|name| bare(name)).collect::<Vec<_>>().join(", ")
        ),
        InvalidPurpose | InvalidPurposeContext { .. } => "it is not meant for this end of a connection".into(),
        other => other.to_string(),
    }
}

/// A name as rustls tells it, `DnsName("host2")` or `IpAddress(192.0.2.1)`, without its kind.
fn bare(name: &str) -> &str {
    let inside = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inside.unwrap_or(name).trim_matches('"')
}

/// Whose certificate this is, for people.
pub(super) fn owner(certificate: &CertificateDer<'_>) -> String {
    match X509Certificate::from_der(certificate) {
        Ok((_, parsed)) => format!(
            "{}, signed by {}, number {}",
            parsed.subject(),
            parsed.issuer(),
            parsed.raw_serial_as_string()
        ),
        Err(error) => format!("unreadable: {error}"),
    }
}
