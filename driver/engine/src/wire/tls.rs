//! TLS 1.3 over a blocking socket, and its pinned certificates.

use std::io::{self, IoSlice, Read, Write};
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::crypto::{verify_tls13_signature, CryptoProvider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::NoServerSessionStorage;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, ServerConfig,
    ServerConnection, SignatureScheme,
};

use super::identity::Identity;
use super::socket::Socket;
use super::{Error, Result};

/// The cryptography of this crate, passed explicitly: a process-wide default would be everybody's.
pub(super) fn provider() -> Arc<CryptoProvider> {
    let (aes, chacha) = (
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    );
    let cipher_suites = if has_aes() {
        vec![aes, chacha]
    } else {
        vec![chacha, aes]
    };
    Arc::new(CryptoProvider {
        cipher_suites,
        ..aws_lc_rs::default_provider()
    })
}

/// Whether the processor encrypts AES itself. ChaCha20 is half as fast as that, and several times faster than AES without.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// Accepts exactly one certificate, from a server as from a client; or any, where it is still to be learned.
#[derive(Debug)]
struct Pin {
    certificate: Option<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Pin {
    fn new(certificate: Option<&[u8]>, provider: &Arc<CryptoProvider>) -> Arc<Pin> {
        Arc::new(Pin {
            certificate: certificate.map(|certificate| CertificateDer::from(certificate.to_vec())),
            provider: provider.clone(),
        })
    }

    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        if self
            .certificate
            .as_ref()
            .is_none_or(|certificate| shown == certificate)
        {
            Ok(())
        } else {
            // The error module recognises this one, and the alert rustls makes of it (access_denied), by kind.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            ))
        }
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// TLS 1.2 is not offered, so nothing of it can ever have to be verified.
fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".into())
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Pin {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

fn unusable(error: rustls::Error) -> Error {
    Error::Identity {
        what: error.to_string(),
    }
}

/// What every connecting side does, whatever its certificates.
pub(super) fn settle_client(config: &mut ClientConfig) {
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
}

/// What every accepting side does.
pub(super) fn settle_server(config: &mut ServerConfig) {
    // A ticket left unread at close makes the kernel reset the connection, and data is lost with it.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    // The slower of the two processors decides: a client without AES asks for ChaCha20, a server without insists on it.
    config.ignore_client_order = !has_aes();
}

/// Starts TLS as the connecting side, with pinned certificates.
pub(super) fn client(identity: &Identity, peer: &[u8], ip: IpAddr) -> Result<Session> {
    let config = client_config(identity, peer).map_err(unusable)?;
    Session::client(Arc::new(config), ServerName::IpAddress(ip.into()))
}

fn client_config(identity: &Identity, peer: &[u8]) -> Result<ClientConfig, rustls::Error> {
    let provider = provider();
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Pin::new(Some(peer), &provider))
        .with_client_auth_cert(identity.chain(), identity.key())?;
    settle_client(&mut config);
    Ok(config)
}

/// Starts TLS as the accepting side, with pinned certificates; without the peer's, whoever has one is let as far as the
/// greeting.
pub(super) fn server(identity: &Identity, peer: Option<&[u8]>) -> Result<Session> {
    let provider = provider();
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(Pin::new(peer, &provider))
        .with_single_cert(identity.chain(), identity.key())
        .map_err(unusable)?;
    settle_server(&mut config);
    Session::server(Arc::new(config))
}

/// Read from the socket at once, bytes. rustls itself asks for 4 KiB at a time, five system calls a record.
const READ: usize = 256 << 10;

/// One TLS session; the socket is lent to each call.
pub(super) struct Session {
    tls: rustls::Connection,
    /// What has been read from the socket, and which part of it rustls has not had.
    incoming: Box<[u8]>,
    left: Range<usize>,
}

impl Session {
    /// Starts TLS as the connecting side.
    pub(super) fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Session> {
        let connection = ClientConnection::new(config, name).map_err(unusable)?;
        Ok(Session::new(connection.into()))
    }

    /// Starts TLS as the accepting side.
    pub(super) fn server(config: Arc<ServerConfig>) -> Result<Session> {
        let connection = ServerConnection::new(config).map_err(unusable)?;
        Ok(Session::new(connection.into()))
    }

    /// The certificate the peer has shown and proven to be its own, once the handshake is over.
    pub(super) fn shown(&self) -> Option<&CertificateDer<'static>> {
        self.tls.peer_certificates()?.first()
    }

    fn new(mut tls: rustls::Connection) -> Session {
        // Callers write at most a few 100 KiB at a time: let one call become one system call.
        tls.set_buffer_limit(None);
        Session {
            tls,
            incoming: vec![0; READ].into_boxed_slice(),
            left: 0..0,
        }
    }

    /// Runs the handshake to its end.
    pub(super) fn handshake(&mut self, socket: &mut Socket) -> io::Result<()> {
        while self.tls.is_handshaking() {
            self.tls.complete_io(socket)?;
        }
        self.flush(socket)
    }

    /// Sends what rustls has ready.
    pub(super) fn flush(&mut self, socket: &mut Socket) -> io::Result<()> {
        while self.tls.wants_write() {
            if self.tls.write_tls(socket)? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }

    /// Encrypts and sends at least a part of `parts`; says how much.
    pub(super) fn write_vectored(&mut self, socket: &mut Socket, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let written = self.tls.writer().write_vectored(parts)?;
        self.flush(socket)?;
        Ok(written)
    }

    /// Reads at least one byte, or 0 at the peer's clean end.
    pub(super) fn read(&mut self, socket: &mut Socket, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.fill(socket)?,
                answer => return answer,
            }
        }
    }

    /// Reads what has already arrived; `None` if that is nothing.
    pub(super) fn read_ready(&mut self, socket: &mut Socket, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.left.is_empty() && !socket.readable_now()? {
                        return Ok(None);
                    }
                    self.fill(socket)?;
                }
                answer => return answer.map(Some),
            }
        }
    }

    /// Something more from the socket into rustls, and what follows from it.
    fn fill(&mut self, socket: &mut Socket) -> io::Result<()> {
        if self.left.is_empty() {
            self.left = 0..socket.read(&mut self.incoming)?;
        }
        // The socket's end, too, is for rustls to know.
        self.left.start += self.tls.read_tls(&mut &self.incoming[self.left.clone()])?;
        if let Err(error) = self.tls.process_new_packets() {
            // The alert that tells the peer is worth a try; the error itself is what counts.
            let _ = self.flush(socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        self.flush(socket) // answers to a key update
    }

    /// Tells the peer that nothing more follows.
    pub(super) fn end_writing(&mut self, socket: &mut Socket) -> io::Result<()> {
        self.tls.send_close_notify();
        self.flush(socket)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::thread;
    use std::time::{Duration, Instant};

    use rustls::client::ResolvesClientCert;
    use rustls::sign::CertifiedKey;

    use super::*;
    use crate::wire::testing::{listener, securities, soon};
    use crate::wire::{connect, Protection, Purpose, Security};

    /// Shows a certificate without having its key.
    #[derive(Debug)]
    struct Thief(Arc<CertifiedKey>);

    impl ResolvesClientCert for Thief {
        fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            Some(self.0.clone())
        }

        fn has_certs(&self) -> bool {
            true
        }
    }

    /// A client's session that is like ours but for what `change` does.
    fn changed(source: &Security, ip: IpAddr, change: impl FnOnce(&Identity, &mut ClientConfig)) -> Session {
        let Protection::Encrypted { identity, peer } = &source.protection else {
            unreachable!()
        };
        let mut config = client_config(identity, peer).unwrap();
        change(identity, &mut config);
        let name = ServerName::IpAddress(ip.into());
        Session::new(ClientConnection::new(Arc::new(config), name).unwrap().into())
    }

    #[test]
    fn the_right_certificate_without_its_key_is_refused() {
        // Whoever has seen the cookie has both certificates: they alone must admit nobody.
        let (source, destination) = securities(true);
        let other = Identity::generate(source.session).unwrap();
        let key = provider().key_provider.load_private_key(other.key()).unwrap();
        let listener = listener();
        let address = listener.address();
        let mut session = changed(&source, address.ip(), |identity, config| {
            let stolen = CertifiedKey::new(identity.chain(), key);
            config.client_auth_cert_resolver = Arc::new(Thief(Arc::new(stolen)));
        });
        thread::scope(|scope| {
            let stealing = scope.spawn(move || {
                let mut socket = Socket::new(TcpStream::connect(address).unwrap()).unwrap();
                session.handshake(&mut socket)?;
                session.read(&mut socket, &mut [0; 1])
            });
            let refusal = loop {
                match listener.accept(&destination, Instant::now() + Duration::from_millis(50)) {
                    Err(Error::NobodyCame { last: Some(last), .. }) => break *last,
                    Err(Error::NobodyCame { .. }) => {}
                    other => panic!("{other:?}"),
                }
            };
            assert!(matches!(refusal, Error::Tls { .. }), "{refusal:?}");
            assert!(refusal.to_string().contains("BadSignature"), "{refusal}");
            stealing.join().unwrap().unwrap_err();
        });
    }

    #[test]
    fn sessions_are_tls_1_3_without_tickets() {
        let (source, destination) = securities(true);
        let listener = listener();
        let address = listener.address();
        thread::scope(|scope| {
            let accepting = scope.spawn(|| listener.accept(&destination, soon()).unwrap());
            // Ours asks for no tickets; this one does.
            let mut session = changed(&source, address.ip(), |_, config| {
                config.resumption = Resumption::default()
            });
            let mut socket = Socket::new(TcpStream::connect(address).unwrap()).unwrap();
            session.handshake(&mut socket).unwrap();
            assert_eq!(
                session.tls.protocol_version(),
                Some(rustls::ProtocolVersion::TLSv1_3)
            );
            let suite = session.tls.negotiated_cipher_suite().unwrap();
            assert_eq!(suite, provider().cipher_suites[0]);
            // A ticket would come right behind the server's Finished, and unread it would reset the connection.
            socket
                .set_deadline(Some(Instant::now() + Duration::from_millis(100)))
                .unwrap();
            let silence = socket.read(&mut [0; 1]).unwrap_err();
            assert_eq!(silence.kind(), io::ErrorKind::TimedOut);
            drop(socket); // never greeted: the listener waits on, for this one
            connect(&[address], &source, Purpose::Control, soon()).unwrap();
            accepting.join().unwrap();
        });
    }
}
