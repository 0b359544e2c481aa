//! Two ends with certificates of an authority meet, and others do not.

use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::super::authority::{Authority, Purpose as For, Validity};
use super::super::testing::{listener, soon};
use super::super::{connect, Protection, Purpose, Security, Token};
use super::*;

/// Certificates of two hosts, all in order: changed by each test.
struct Hosts {
    authority: Authority,
    source: TempDir,
    destination: TempDir,
}

impl Hosts {
    fn new() -> Self {
        let hosts = Self {
            authority: Authority::new("the authority", Validity::Good).unwrap(),
            source: TempDir::new().unwrap(),
            destination: TempDir::new().unwrap(),
        };
        for directory in [&hosts.source, &hosts.destination] {
            hosts.authority.trust(directory.path()).unwrap();
        }
        hosts.issue(For::Client, "the source", &[], Validity::Good);
        hosts.issue(
            For::Server,
            "the destination",
            &["host2.example", "127.0.0.1"],
            Validity::Good,
        );
        hosts
    }

    fn issue(&self, purpose: For, subject: &str, names: &[&str], validity: Validity) {
        let directory = match purpose {
            For::Client => self.source.path(),
            For::Server => self.destination.path(),
        };
        self.authority
            .issue(directory, purpose, subject, names, validity)
            .unwrap();
    }

    /// Connects, as the source to a host of this name: whom the destination and the source have found, or why not.
    fn meet(&self, name: &str, verify: bool) -> Result<[Option<String>; 2], String> {
        let source = Certified::source(self.source.path(), name).map_err(|fault| fault.to_string())?;
        let destination =
            Certified::destination(self.destination.path(), verify).map_err(|fault| fault.to_string())?;
        let (session, token) = (uuid::Uuid::new_v4(), Token::generate().unwrap());
        let [source, destination] = [source, destination].map(|certified| Security {
            session,
            token: token.clone(),
            protection: Protection::Certified(certified),
        });
        let listener = listener();
        let address = listener.address();
        let stopper = listener.stopper();
        thread::scope(|scope| {
            let accepting = scope.spawn(|| listener.accept(&destination, soon()));
            let connected = connect(&[address], &source, Purpose::Control, soon());
            if connected.is_err() {
                stopper.stop();
            }
            let accepted = accepting.join().unwrap();
            match (connected, accepted) {
                (Ok(ours), Ok((_, theirs))) => Ok([theirs.peer_certificate(), ours.peer_certificate()]),
                (Err(error), _) => Err(error.to_string()),
                (Ok(_), Err(error)) => panic!("{error}"),
            }
        })
    }

    /// [`Self::meet`], which fails with an error that has these words.
    fn refused(&self, name: &str, verify: bool, words: &[&str]) {
        let error = self.meet(name, verify).unwrap_err();
        for word in words {
            assert!(error.contains(word), "no '{word}' in: {error}");
        }
    }
}

#[test]
fn hosts_of_one_authority_meet_and_know_each_other() {
    let hosts = Hosts::new();
    for name in ["host2.example", "127.0.0.1", "127.0.0.1%lo"] {
        let [source, destination] = hosts.meet(name, true).unwrap();
        for (found, subject) in [(source, "CN=the source"), (destination, "CN=the destination")] {
            let found = found.unwrap();
            for word in [subject, "signed by CN=the authority", "number 2b:ad:ca:fe"] {
                assert!(found.contains(word), "{found}");
            }
        }
    }
}

#[test]
fn the_destinations_name_is_checked() {
    let hosts = Hosts::new();
    hosts.refused(
        "host3.example",
        true,
        &[
            "not for host3.example",
            "[host2.example, 127.0.0.1]",
            "--tls-destination",
        ],
    );
    hosts.refused("192.0.2.1", false, &["not for 192.0.2.1"]);
    hosts.refused("no name", true, &["no name is no host name"]);
    // GnuTLS takes a common name for a host's.
    hosts.issue(For::Server, "host2.example", &[], Validity::Good);
    hosts.refused("host2.example", true, &["subjectAltName"]);
}

#[test]
fn another_authority_is_refused() {
    let other = Authority::new("another", Validity::Good).unwrap();
    // The source trusts another one than the destination has its certificate from.
    let hosts = Hosts::new();
    other.trust(hosts.source.path()).unwrap();
    other
        .issue(hosts.source.path(), For::Client, "source", &[], Validity::Good)
        .unwrap();
    hosts.refused(
        "127.0.0.1",
        true,
        &["no authority that is trusted", "ca-cert.pem"],
    );
    // The other way round: the destination trusts another one than the source's, whose own is as it should be.
    let hosts = Hosts::new();
    let trusted = std::fs::read_to_string(hosts.source.path().join("ca-cert.pem")).unwrap();
    other.trust(hosts.destination.path()).unwrap();
    other
        .issue(
            hosts.destination.path(),
            For::Server,
            "d",
            &["127.0.0.1"],
            Validity::Good,
        )
        .unwrap();
    let both = trusted + &std::fs::read_to_string(hosts.destination.path().join("ca-cert.pem")).unwrap();
    std::fs::write(hosts.source.path().join("ca-cert.pem"), both).unwrap();
    hosts.refused(
        "127.0.0.1",
        true,
        &[
            "does not accept this host's",
            "client-cert.pem",
            "ca-cert.pem there",
        ],
    );
    // It does not ask who comes.
    assert_eq!(hosts.meet("127.0.0.1", false).unwrap()[0], None);
}

#[test]
fn a_source_without_a_certificate_is_let_in_only_where_nobody_asks() {
    for file in For::Client.files() {
        let hosts = Hosts::new();
        std::fs::remove_file(hosts.source.path().join(file)).unwrap();
        hosts.refused("127.0.0.1", true, &["migrate_tls_x509_verify", "client-cert.pem"]);
        assert_eq!(hosts.meet("127.0.0.1", false).unwrap()[0], None);
    }
}

#[test]
fn what_is_out_of_date_or_for_another_purpose_is_not_even_shown() {
    for (purpose, file) in [(For::Client, "client-cert.pem"), (For::Server, "server-cert.pem")] {
        let hosts = Hosts::new();
        hosts.issue(purpose, "late", &["127.0.0.1"], Validity::Expired);
        hosts.refused("127.0.0.1", true, &[file, "expired", "ca-cert.pem"]);
    }
    let hosts = Hosts::new();
    let [server, key] = For::Server.files();
    for (from, to) in For::Client.files().into_iter().zip([server, key]) {
        std::fs::copy(hosts.source.path().join(from), hosts.destination.path().join(to)).unwrap();
    }
    hosts.refused("127.0.0.1", true, &[server, "not meant for"]);

    let late = Authority::new("late", Validity::Expired).unwrap();
    late.trust(hosts.source.path()).unwrap();
    hosts.refused("127.0.0.1", true, &["ca-cert.pem", "expired"]);
}

#[test]
fn what_has_been_revoked_is_refused_by_the_destination() {
    let hosts = Hosts::new();
    hosts.authority.revoke(hosts.destination.path()).unwrap();
    hosts.refused(
        "127.0.0.1",
        true,
        &["client-cert.pem", "revoked", "ca-crl.pem there"],
    );
    // Lists of others say nothing of it.
    let other = Authority::new("another", Validity::Good).unwrap();
    other.revoke(hosts.destination.path()).unwrap();
    hosts.meet("127.0.0.1", true).unwrap();
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let cases: [(&str, Option<&str>, &str); 6] = [
        ("ca-cert.pem", None, "cannot read"),
        ("ca-cert.pem", Some(""), "no certificate"),
        ("server-cert.pem", None, "cannot read"),
        ("server-key.pem", None, "cannot read"),
        (
            "server-key.pem",
            Some("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n"),
            "without a password",
        ),
        (
            "server-cert.pem",
            Some("-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n"),
            "cannot be used",
        ),
    ];
    for (file, content, word) in cases {
        let hosts = Hosts::new();
        let path = hosts.destination.path().join(file);
        match content {
            None => std::fs::remove_file(&path).unwrap(),
            Some(content) => std::fs::write(&path, content).unwrap(),
        }
        hosts.refused("127.0.0.1", true, &[path.to_str().unwrap(), word]);
    }
    // Another's key.
    let hosts = Hosts::new();
    let key = hosts.source.path().join("client-key.pem");
    std::fs::copy(hosts.destination.path().join("server-key.pem"), &key).unwrap();
    hosts.refused("127.0.0.1", true, &[key.to_str().unwrap(), "does not belong"]);
    let endless = hosts.source.path().join("ca-cert.pem");
    std::fs::write(&endless, vec![b'x'; MAX_FILE as usize + 1]).unwrap();
    hosts.refused("127.0.0.1", true, &["longer than"]);
}

#[test]
fn the_token_is_asked_for_all_the_same() {
    let hosts = Hosts::new();
    let certified = [
        Certified::source(hosts.source.path(), "127.0.0.1").unwrap(),
        Certified::destination(hosts.destination.path(), true).unwrap(),
    ];
    let session = uuid::Uuid::new_v4();
    let [source, destination] = certified.map(|certified| Security {
        session,
        token: Token::generate().unwrap(),
        protection: Protection::Certified(certified),
    });
    let listener = listener();
    let address = listener.address();
    thread::scope(|scope| {
        scope.spawn(|| {
            let nobody = listener.accept(&destination, Instant::now() + Duration::from_secs(1));
            assert!(nobody.is_err());
        });
        let refusal = connect(&[address], &source, Purpose::Control, soon()).unwrap_err();
        assert!(refusal.to_string().contains("token is wrong"), "{refusal}");
    });
}
