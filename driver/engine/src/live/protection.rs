//! What protects a session's connections: what both hosts ask for, and what each has for it.

use super::Error;
use crate::wire::{Certified, Identity, Protection};
use ferry_contract::control::{Certificates, Settings};
use ferry_contract::cookie::{Answer, Offer};
use ferry_contract::session::Encryption;

/// What the source offers, with its part of it.
pub fn offered(settings: &Settings, identity: &Identity) -> (Encryption, Vec<u8>) {
    let encryption = settings.wanted();
    (encryption, shown(encryption, identity))
}

/// The source's end: what the destination has answered must be what was asked for, or stricter. `name` is what the
/// destination's certificate must bear, where libvirt's are used.
pub fn at_source(
    settings: &Settings,
    identity: Identity,
    answer: &Answer,
    name: Option<&str>,
) -> Result<Protection, Error> {
    match (
        settings.wanted().agreed(answer.encryption),
        &settings.certificates,
    ) {
        (Some(Encryption::Certificates), Some(Certificates { directory, .. })) => {
            let name = name.unwrap_or(&answer.host);
            let certified = Certified::source(directory, name).map_err(crate::wire::Error::from)?;
            Ok(Protection::Certified(certified))
        }
        (Some(agreed), None) if agreed == answer.encryption => Ok(match agreed {
            Encryption::Never => Protection::Plain,
            _ => Protection::Encrypted {
                identity,
                peer: answer.certificate.clone(),
            },
        }),
        _ => Err(Error::Elsewhere(format!(
            "host {} would protect the migration as encryption = \"{}\" has it, but this host wants it as \
             encryption = \"{}\" has it",
            answer.host,
            answer.encryption,
            settings.wanted()
        ))),
    }
}

/// The destination's end, made from what the source offers: what holds, and our part of the answer.
pub struct AtDestination {
    /// What holds.
    pub encryption: Encryption,
    /// The certificate to be pinned by the source.
    pub certificate: Vec<u8>,
    /// What this end does for it.
    pub protection: Protection,
}

impl AtDestination {
    /// Finds what holds, and reads what is needed for it.
    pub fn of(settings: &Settings, offer: &Offer) -> Result<Self, Error> {
        let identity = Identity::generate(offer.session)?;
        let (encryption, protection) =
            match (settings.wanted().agreed(offer.encryption), &settings.certificates) {
                (Some(Encryption::Certificates), Some(Certificates { directory, verify })) => {
                    let certified =
                        Certified::destination(directory, *verify).map_err(crate::wire::Error::from)?;
                    (Encryption::Certificates, Protection::Certified(certified))
                }
                (Some(Encryption::Never), None) => (Encryption::Never, Protection::Plain),
                (Some(Encryption::Always), None) => (
                    Encryption::Always,
                    Protection::Encrypted {
                        identity: identity.clone(),
                        peer: offer.certificate.clone(),
                    },
                ),
                _ => {
                    return Err(Error::Elsewhere(format!(
                        "the source offers encryption \"{}\", but libvirt's call here asks for \"{}\"; the migration's \
                         client must pass the same flags to both hosts",
                        offer.encryption,
                        settings.wanted()
                    )))
                }
            };
        Ok(Self {
            encryption,
            certificate: shown(encryption, &identity),
            protection,
        })
    }
}

/// A certificate of one session is told only where it is to be pinned.
fn shown(encryption: Encryption, identity: &Identity) -> Vec<u8> {
    match encryption {
        Encryption::Certificates => Vec::new(),
        Encryption::Always | Encryption::Never => identity.certificate().to_vec(),
    }
}

/// For the timeline.
pub fn words(encryption: Encryption) -> Option<String> {
    match encryption {
        Encryption::Always => Some("TLS 1.3".into()),
        Encryption::Never => None,
        Encryption::Certificates => Some("TLS 1.3 with libvirt's certificates".into()),
    }
}

/// For the timeline: whom the other end has proven to be, by libvirt's certificates.
pub fn proof(peer: &str, certificate: Option<String>) -> String {
    match certificate {
        Some(owner) => format!("the {peer}'s certificate: {owner}"),
        None => format!("the {peer} has shown no certificate (migrate_tls_x509_verify = 0)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn settings(encryption: Encryption) -> Settings {
        let certificates = (encryption == Encryption::Certificates).then(|| Certificates {
            directory: "/nonexistent".into(),
            verify: true,
        });
        Settings {
            encryption: if certificates.is_some() {
                Encryption::Always
            } else {
                encryption
            },
            certificates,
            ..ferry_contract::config::Config::default().settings()
        }
    }

    fn offer(encryption: Encryption) -> Offer {
        Offer {
            session: Uuid::new_v4(),
            token: ferry_contract::session::Token::new([0; 32]),
            encryption,
            certificate: vec![1],
            blocks: Vec::new(),
        }
    }

    fn answer(encryption: Encryption) -> Answer {
        Answer {
            session: Uuid::new_v4(),
            encryption,
            certificate: vec![1],
            host: "host2".into(),
            port: 1,
        }
    }

    #[test]
    fn the_stricter_host_decides() {
        use Encryption::{Always, Never};
        for (here, there, held) in [
            (Always, Always, Always),
            (Never, Always, Always),
            (Always, Never, Always),
            (Never, Never, Never),
        ] {
            assert_eq!(
                AtDestination::of(&settings(here), &offer(there))
                    .unwrap()
                    .encryption,
                held
            );
        }
    }

    #[test]
    fn nothing_weaker_than_asked_for_is_taken() {
        use Encryption::{Always, Certificates, Never};
        let identity = || Identity::generate(Uuid::new_v4()).unwrap();
        let taken = |here, there| at_source(&settings(here), identity(), &answer(there), None);
        assert!(matches!(taken(Never, Never), Ok(Protection::Plain)));
        assert!(matches!(taken(Never, Always), Ok(Protection::Encrypted { .. })));
        for (here, there) in [
            (Always, Never),
            (Certificates, Always),
            (Certificates, Never),
            (Always, Certificates),
            (Never, Certificates),
        ] {
            let refusal = taken(here, there).unwrap_err().to_string();
            assert!(refusal.contains("host2"), "{refusal}");
        }
    }

    #[test]
    fn certificates_are_both_hosts_or_nobodys() {
        use Encryption::{Always, Certificates, Never};
        for (here, there) in [
            (Certificates, Always),
            (Certificates, Never),
            (Always, Certificates),
        ] {
            let Err(refusal) = AtDestination::of(&settings(here), &offer(there)) else {
                panic!("{here} goes with {there}")
            };
            assert!(refusal.to_string().contains("certificates"), "{refusal}");
        }
        // It comes to the files.
        let Err(missing) = AtDestination::of(&settings(Certificates), &offer(Certificates)) else {
            panic!("there are none")
        };
        assert!(
            missing.to_string().contains("/nonexistent/ca-cert.pem"),
            "{missing}"
        );
    }
}
