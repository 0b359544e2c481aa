//! Connections over real TCP: who is let in, who is not, and how they end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::error::Party;
use super::testing::*;
use super::*;

/// Connects with `source` while `destination` listens: the connecting side's error and the last refusal of the other.
fn refused(source: &Security, destination: &Security) -> (Error, Error) {
    let listener = listener();
    let address = listener.address();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| loop {
            // A refusal is reported with the deadline: short ones until there is one.
            match listener.accept(destination, Instant::now() + Duration::from_millis(50)) {
                Err(Error::NobodyCame { last: Some(last), .. }) => return *last,
                Err(Error::NobodyCame { last: None, .. }) => {}
                other => panic!("{other:?}"),
            }
        });
        let ours = connect(&[address], source, Purpose::Control, soon()).unwrap_err();
        (ours, accepting.join().unwrap())
    })
}

#[test]
fn both_protections_carry_every_purpose_both_ways() {
    for encrypted in [false, true] {
        for purpose in [
            Purpose::Control,
            Purpose::Data(0),
            Purpose::Data(65535),
            Purpose::DeviceState,
            Purpose::ReturnPath,
        ] {
            let (mut source, mut destination) = pair(encrypted, purpose);
            assert_eq!(source.is_encrypted(), encrypted);
            source
                .send(&[b"", b"over ", b"", b"there", b"!", b"", b""], "testing")
                .unwrap();
            let mut heard = [0; 11];
            destination.receive_exact(&mut heard, "testing").unwrap();
            assert_eq!(&heard, b"over there!");
            destination.send(&[b"and back"], "testing").unwrap();
            let mut heard = [0; 8];
            source.receive_exact(&mut heard, "testing").unwrap();
            assert_eq!(&heard, b"and back");
        }
    }
}

#[test]
fn guest_memory_does_not_travel_in_clear() {
    // A relay between the two that keeps what it passes on.
    for encrypted in [false, true] {
        let (source, destination) = securities(encrypted);
        let listener = listener();
        let middle = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
        let address = middle.local_addr().unwrap();
        let secret = b"the guest's own secret, page after page";
        let seen = thread::scope(|scope| {
            let relay = scope.spawn(|| {
                let (mut near, _) = middle.accept().unwrap();
                let mut far = TcpStream::connect(listener.address()).unwrap();
                let (mut back_in, mut back_out) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                scope.spawn(move || std::io::copy(&mut back_in, &mut back_out));
                let mut seen = Vec::new();
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = near.read(&mut buffer) {
                    seen.extend_from_slice(&buffer[..count]);
                    far.write_all(&buffer[..count]).unwrap();
                }
                let _ = far.shutdown(std::net::Shutdown::Write);
                seen
            });
            scope.spawn(|| {
                let mut connection = connect(&[address], &source, Purpose::Control, soon()).unwrap();
                connection.send(&[secret], "testing").unwrap();
                connection.end_sending().unwrap();
            });
            let (_, mut connection) = listener.accept(&destination, soon()).unwrap();
            let mut heard = [0; 39];
            connection.receive_exact(&mut heard, "testing").unwrap();
            assert_eq!(&heard, secret);
            connection.end_receiving().unwrap();
            relay.join().unwrap()
        });
        let shows = |needle: &[u8]| seen.windows(needle.len()).any(|window| window == needle);
        assert_eq!(shows(secret), !encrypted);
        assert_eq!(shows(source.token.expose()), !encrypted);
    }
}

#[test]
fn a_wrong_token_or_session_is_refused_on_both_sides() {
    for encrypted in [false, true] {
        let (good, destination) = securities(encrypted);
        let mut source = good.clone();
        source.token = Token::generate().unwrap();
        let (ours, theirs) = refused(&source, &destination);
        assert!(
            matches!(
                ours,
                Error::Refused {
                    reason: Refusal::Token,
                    ..
                }
            ),
            "{ours:?}"
        );
        assert!(
            matches!(
                theirs,
                Error::Turned {
                    reason: Refusal::Token,
                    ..
                }
            ),
            "{theirs:?}"
        );

        let mut source = good;
        source.session = Uuid::new_v4();
        let (ours, theirs) = refused(&source, &destination);
        assert!(
            matches!(
                ours,
                Error::Refused {
                    reason: Refusal::Session,
                    ..
                }
            ),
            "{ours:?}"
        );
        assert!(
            matches!(
                theirs,
                Error::Turned {
                    reason: Refusal::Session,
                    ..
                }
            ),
            "{theirs:?}"
        );
    }
}

#[test]
fn a_client_with_another_certificate_is_refused_on_both_sides() {
    let (mut source, destination) = securities(true);
    if let Protection::Encrypted { identity, .. } = &mut source.protection {
        *identity = Identity::generate(source.session).unwrap();
    }
    let (ours, theirs) = refused(&source, &destination);
    assert!(
        matches!(
            ours,
            Error::WrongCertificate {
                shown_by: Party::ThisHost,
                ..
            }
        ),
        "{ours:?}"
    );
    assert!(
        matches!(
            theirs,
            Error::WrongCertificate {
                checked_by: Party::ThisHost,
                ..
            }
        ),
        "{theirs:?}"
    );
}

#[test]
fn a_server_with_another_certificate_is_refused_on_both_sides() {
    let (source, mut destination) = securities(true);
    if let Protection::Encrypted { identity, .. } = &mut destination.protection {
        *identity = Identity::generate(destination.session).unwrap();
    }
    let (ours, theirs) = refused(&source, &destination);
    assert!(
        matches!(
            ours,
            Error::WrongCertificate {
                checked_by: Party::ThisHost,
                ..
            }
        ),
        "{ours:?}"
    );
    assert!(
        matches!(
            theirs,
            Error::WrongCertificate {
                shown_by: Party::ThisHost,
                ..
            }
        ),
        "{theirs:?}"
    );
}

#[test]
fn one_side_encrypted_the_other_plain_is_named() {
    let (encrypted, _) = securities(true);
    let mut plain = encrypted.clone();
    plain.protection = Protection::Plain;
    let (ours, theirs) = refused(&plain, &encrypted);
    assert!(
        matches!(ours, Error::Protection { ours: "plain", .. }),
        "{ours:?}"
    );
    assert!(
        matches!(
            theirs,
            Error::Protection {
                ours: "encrypted",
                ..
            }
        ),
        "{theirs:?}"
    );
    let (ours, theirs) = refused(&encrypted, &plain);
    assert!(
        matches!(
            ours,
            Error::Protection {
                ours: "encrypted",
                ..
            }
        ),
        "{ours:?}"
    );
    assert!(
        matches!(theirs, Error::Protection { ours: "plain", .. }),
        "{theirs:?}"
    );
}

#[test]
fn another_version_is_named_on_both_sides() {
    // Accepting: a peer of version 7.
    let (security, _) = securities(false);
    let door = listener();
    let mut raw = TcpStream::connect(door.address()).unwrap();
    let mut hello = hello::hello(&security, Purpose::Control);
    hello[8..10].copy_from_slice(&7u16.to_le_bytes());
    raw.write_all(&hello).unwrap();
    let mut answer = [0; hello::ANSWER_LENGTH];
    let error = thread::scope(|scope| {
        let accepting = scope.spawn(|| loop {
            match door.accept(&security, Instant::now() + Duration::from_millis(50)) {
                Err(Error::NobodyCame { last: Some(last), .. }) => return *last,
                Err(Error::NobodyCame { .. }) => {}
                other => panic!("{other:?}"),
            }
        });
        raw.read_exact(&mut answer).unwrap();
        drop(raw);
        accepting.join().unwrap()
    });
    assert!(
        matches!(
            error,
            Error::Version {
                ours: VERSION,
                theirs: 7,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(u16::from_le_bytes([answer[10], answer[11]]), 1);

    // Connecting: to a peer of version 9.
    let listener = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let error = thread::scope(|scope| {
        let connecting =
            scope.spawn(|| connect(&[address], &security, Purpose::Control, soon()).unwrap_err());
        let (mut raw, _) = listener.accept().unwrap();
        raw.read_exact(&mut [0; hello::HELLO_LENGTH]).unwrap();
        let mut answer = hello::answer(Err(Refusal::Version { theirs: VERSION }));
        answer[8..10].copy_from_slice(&9u16.to_le_bytes());
        raw.write_all(&answer).unwrap();
        connecting.join().unwrap()
    });
    assert!(
        matches!(
            error,
            Error::Version {
                ours: VERSION,
                theirs: 9,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("speaks wire version 9, this host 1"),
        "{error}"
    );
}

#[test]
fn strangers_keep_nobody_out() {
    for encrypted in [false, true] {
        let (source, destination) = securities(encrypted);
        let listener = listener();
        let address = listener.address();
        // More than may be in their greeting at once: silent, babbling, half a greeting, gone again.
        let mut strangers = Vec::new();
        for number in 0..40 {
            let mut stranger = TcpStream::connect(address).unwrap();
            match number % 4 {
                0 => {}
                1 => stranger.write_all(&[0x5a; 200]).unwrap(),
                2 => stranger.write_all(b"FERRYWIR\x01\0").unwrap(),
                _ => continue,
            }
            strangers.push(stranger);
        }
        let began = Instant::now();
        thread::scope(|scope| {
            let connecting = scope.spawn(|| connect(&[address], &source, Purpose::Data(3), soon()).unwrap());
            let (purpose, _accepted) = listener.accept(&destination, soon()).unwrap();
            assert_eq!(purpose, Purpose::Data(3));
            connecting.join().unwrap();
        });
        // Not a speed limit: had one silent stranger been waited for, it would have been its 10 s.
        assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
        drop(strangers);
    }
}

#[test]
fn a_greeting_is_bounded_as_a_whole() {
    for encrypted in [false, true] {
        let (_, destination) = securities(encrypted);
        let door = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
        let mut stranger = TcpStream::connect(door.local_addr().unwrap()).unwrap();
        let (stream, peer) = door.accept().unwrap();
        thread::scope(|scope| {
            // A byte now and then: each read succeeds, the whole never ends.
            scope.spawn(move || {
                let greeting = [&[0x16, 0x03, 0x01, 0x3f, 0xff][..], &[1; 10_000]].concat();
                for byte in greeting.chunks(1) {
                    if stranger.write_all(byte).is_err() {
                        return;
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                panic!("the stranger was never shut out");
            });
            let deadline = Instant::now() + Duration::from_millis(300);
            let error = connection::admit(stream, peer, &destination, deadline).unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::Timeout { .. } | Error::Turned { .. } | Error::Protection { .. }
                ),
                "{error:?}"
            );
        });
    }
}

#[test]
fn many_connections_arrive_whatever_their_order() {
    let (source, destination) = securities(true);
    let listener = listener();
    let address = listener.address();
    thread::scope(|scope| {
        let source = &source;
        for stream in 0..12 {
            scope.spawn(move || {
                let mut connection = connect(&[address], source, Purpose::Data(stream), soon()).unwrap();
                connection.receive_exact(&mut [0; 1], "testing").unwrap();
            });
        }
        let mut streams: Vec<_> = (0..12)
            .map(|_| {
                let (purpose, mut connection) = listener.accept(&destination, soon()).unwrap();
                connection.send(&[b"x"], "testing").unwrap();
                match purpose {
                    Purpose::Data(stream) => stream,
                    other => panic!("{other}"),
                }
            })
            .collect();
        streams.sort_unstable();
        assert_eq!(streams, (0..12).collect::<Vec<_>>());
    });
}

#[test]
fn connecting_tries_every_address_and_reports_the_furthest() {
    let (source, destination) = securities(true);
    let door = listener();
    let addresses = [nobody(), door.address()];
    thread::scope(|scope| {
        let connecting = scope.spawn(|| connect(&addresses, &source, Purpose::Control, soon()));
        door.accept(&destination, soon()).unwrap();
        connecting.join().unwrap().unwrap();
    });
    let error = connect(&[nobody()], &source, Purpose::Control, soon()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    assert!(matches!(
        connect(&[], &source, Purpose::Control, soon()),
        Err(Error::NoAddress)
    ));
    // A listener whose handshakes nobody answers: the time limit holds.
    let silent = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
    let deadline = Instant::now() + Duration::from_millis(200);
    let error = connect(
        &[silent.local_addr().unwrap()],
        &source,
        Purpose::Control,
        deadline,
    )
    .unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
}

#[test]
fn ports_are_taken_from_the_top_and_run_out_by_name() {
    let find = || {
        // Two neighbouring free ports.
        (20000..30000u16).step_by(2).find(|&port| {
            let free = |port| std::net::TcpListener::bind((LOOPBACK, port)).is_ok();
            free(port) && free(port + 1)
        })
    };
    let first = find().unwrap();
    let upper = Listener::bind(LOOPBACK, first..=first + 1).unwrap();
    let lower = Listener::bind(LOOPBACK, first..=first + 1).unwrap();
    assert_eq!(
        (upper.address().port(), lower.address().port()),
        (first + 1, first)
    );
    let error = Listener::bind(LOOPBACK, first..=first + 1).err().unwrap();
    assert!(matches!(error, Error::NoFreePort { .. }), "{error:?}");
    assert!(
        error.to_string().contains(&format!("{first}-{}", first + 1)),
        "{error}"
    );
}

#[test]
fn a_stopped_listener_ends_its_accept() {
    let listener = listener();
    let (security, _) = securities(false);
    let stopper = listener.stopper();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(&security, soon()));
        stopper.stop();
        assert!(matches!(accepting.join().unwrap(), Err(Error::Stopped { .. })));
    });
    assert!(matches!(
        listener.accept(&security, soon()),
        Err(Error::Stopped { .. })
    ));
}

#[test]
fn the_breaker_ends_blocked_reads_and_writes() {
    for encrypted in [false, true] {
        let (mut source, destination) = pair(encrypted, Purpose::Data(0));
        let breaker = source.breaker();
        thread::scope(|scope| {
            let writing = scope.spawn(move || {
                let block = vec![7; 1 << 20];
                loop {
                    // Nobody reads: this blocks when the buffers are full.
                    if let Err(error) = source.send(&[&block], "testing") {
                        let again = source.send(&[&block], "testing").unwrap_err();
                        assert!(matches!(again, Error::BrokenOff { .. }), "{again:?}");
                        return error;
                    }
                }
            });
            breaker.break_off();
            let error = writing.join().unwrap();
            assert!(matches!(error, Error::BrokenOff { .. }), "{error:?}");
        });
        drop(destination);

        let (mut source, destination) = pair(encrypted, Purpose::Control);
        let breaker = source.breaker();
        thread::scope(|scope| {
            let reading = scope.spawn(move || source.receive_exact(&mut [0; 1], "testing"));
            breaker.break_off();
            let error = reading.join().unwrap().unwrap_err();
            assert!(matches!(error, Error::BrokenOff { .. }), "{error:?}");
        });
        drop(destination);
        breaker.break_off(); // the connection is closed: no effect, no panic
    }
}

#[test]
fn a_breaker_does_not_keep_a_connection_open() {
    let (source, mut destination) = pair(false, Purpose::Control);
    let _breaker = source.breaker();
    drop(source);
    let error = destination.receive_exact(&mut [0; 1], "testing").unwrap_err();
    assert!(matches!(error, Error::PeerGone { .. }), "{error:?}");
}

#[test]
fn a_deadline_ends_a_wait_and_can_be_lifted() {
    for encrypted in [false, true] {
        let (mut source, mut destination) = pair(encrypted, Purpose::Control);
        source
            .set_deadline(Some(Instant::now() + Duration::from_millis(100)))
            .unwrap();
        let error = source.receive_exact(&mut [0; 1], "testing").unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        source.set_deadline(None).unwrap();
        destination.send(&[b"x"], "testing").unwrap();
        source.receive_exact(&mut [0; 1], "testing").unwrap();
    }
}

#[test]
fn a_clean_end_is_confirmed_and_an_unclean_one_is_not() {
    for encrypted in [false, true] {
        let (mut source, mut destination) = pair(encrypted, Purpose::DeviceState);
        thread::scope(|scope| {
            let sending = scope.spawn(move || {
                source.send(&[&[1; 100_000]], "testing")?;
                source.end_sending()
            });
            destination.receive_exact(&mut [0; 100_000], "testing").unwrap();
            destination.end_receiving().unwrap();
            sending.join().unwrap().unwrap();
        });

        // The receiver goes before it has read everything.
        let (mut source, mut destination) = pair(encrypted, Purpose::DeviceState);
        source.send(&[&[1; 100_000]], "testing").unwrap();
        destination.receive_exact(&mut [0; 10], "testing").unwrap();
        drop(destination);
        let error = source.end_sending().unwrap_err();
        assert!(matches!(error, Error::PeerGone { .. }), "{error:?}");

        // There is more than the receiver thought.
        let (mut source, destination) = pair(encrypted, Purpose::DeviceState);
        source.send(&[b"x"], "testing").unwrap();
        let error = destination.end_receiving().unwrap_err();
        assert!(
            matches!(
                error,
                Error::BadFrame {
                    what: frame::Invalid::AfterEnd,
                    ..
                }
            ),
            "{error:?}"
        );
    }
}

#[test]
fn a_cut_encrypted_stream_is_not_a_clean_end() {
    let (source, destination) = pair(true, Purpose::DeviceState);
    drop(source); // closes TCP without TLS's own end, as a cut by somebody in between would look
    let error = destination.end_receiving().unwrap_err();
    assert!(matches!(error, Error::PeerGone { .. }), "{error:?}");
}

#[test]
fn a_receiver_that_does_not_read_is_given_up_after_the_patience() {
    // The fact that set_patience documents: a zero window counts as silence, although the peer's kernel answers.
    let (mut source, _destination) = pair(false, Purpose::Data(0));
    source.set_patience(Duration::from_secs(1)).unwrap();
    let block = vec![7; 1 << 20];
    let began = Instant::now();
    let error = loop {
        if let Err(error) = source.send(&[&block], "testing") {
            break error;
        }
    };
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "the deadline, not the patience, ended it"
    );
}
