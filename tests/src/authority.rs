//! Certificates for tests, in files as QEMU and libvirt have them. The engine's own tests use this file as well.

use std::fs;
use std::path::Path;

use anyhow::Result;
use rcgen::{
    date_time_ymd, BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber,
};

/// An authority that signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

/// Whether a certificate may be used today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// It may.
    Good,
    /// It was valid once.
    Expired,
}

/// The end of a connection a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// `server-cert.pem`, `server-key.pem`: a destination's.
    Server,
    /// `client-cert.pem`, `client-key.pem`: a source's.
    Client,
}

impl Purpose {
    /// The names of the certificate's and its key's file.
    pub fn files(self) -> [&'static str; 2] {
        match self {
            Purpose::Server => ["server-cert.pem", "server-key.pem"],
            Purpose::Client => ["client-cert.pem", "client-key.pem"],
        }
    }
}

fn params(subject: &str, names: &[&str], validity: Validity) -> Result<CertificateParams> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, subject);
    params.not_before = date_time_ymd(2001, 1, 1);
    params.not_after = match validity {
        Validity::Good => date_time_ymd(2101, 1, 1),
        Validity::Expired => date_time_ymd(2002, 1, 1),
    };
    Ok(params)
}

impl Authority {
    /// A new one of this name.
    ///
    /// # Errors
    /// If no key can be made.
    pub fn new(name: &str, validity: Validity) -> Result<Self> {
        let mut params = params(name, &[], validity)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    /// Makes a host trust it: `ca-cert.pem` in this directory.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn trust(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        Ok(fs::write(directory.join("ca-cert.pem"), &self.certificate)?)
    }

    /// Puts a certificate for `subject`, good for these names and addresses, into this directory, and its key.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn issue(
        &self,
        directory: &Path,
        purpose: Purpose,
        subject: &str,
        names: &[&str],
        validity: Validity,
    ) -> Result<()> {
        let mut params = params(subject, names, validity)?;
        params.serial_number = Some(SerialNumber::from(SERIAL));
        // QEMU 10.0 insists on both.
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![match purpose {
            Purpose::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Purpose::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let [file, key_file] = purpose.files();
        fs::create_dir_all(directory)?;
        fs::write(directory.join(file), certificate.pem())?;
        Ok(fs::write(directory.join(key_file), key.serialize_pem())?)
    }

    /// Revokes all it has issued: `ca-crl.pem` in this directory.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn revoke(&self, directory: &Path) -> Result<()> {
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2001, 1, 1),
            next_update: date_time_ymd(2101, 1, 1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(SERIAL),
                revocation_time: date_time_ymd(2001, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(fs::write(
            directory.join("ca-crl.pem"),
            list.signed_by(&self.issuer)?.pem()?,
        )?)
    }
}

/// The number of every certificate, which an engine reports as 2b:ad:ca:fe.
const SERIAL: u64 = 0x2bad_cafe;
