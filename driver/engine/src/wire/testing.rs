//! What the tests of this module share: two ends of a session on the loopback interface.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{connect, Connection, Identity, Listener, Protection, Purpose, Security, Token};

pub(super) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A bound for waits that end much earlier unless something is wrong.
pub(super) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// The two sides' view of one session.
pub(super) fn securities(encrypted: bool) -> (Security, Security) {
    let (session, token) = (Uuid::new_v4(), Token::generate().unwrap());
    let security = |protection| Security {
        session,
        token: token.clone(),
        protection,
    };
    if !encrypted {
        return (security(Protection::Plain), security(Protection::Plain));
    }
    let (one, two) = (
        Identity::generate(session).unwrap(),
        Identity::generate(session).unwrap(),
    );
    let protection = |own: &Identity, peer: &Identity| Protection::Encrypted {
        identity: own.clone(),
        peer: peer.certificate().into(),
    };
    (security(protection(&one, &two)), security(protection(&two, &one)))
}

/// A listener at a port of the system's choice.
pub(super) fn listener() -> Listener {
    Listener::bind(LOOPBACK, 0..=0).unwrap()
}

/// (the connecting, the accepting) end of a connection.
pub(super) fn pair(encrypted: bool, purpose: Purpose) -> (Connection, Connection) {
    let (source, destination) = securities(encrypted);
    let listener = listener();
    let address = listener.address();
    thread::scope(|scope| {
        let connecting = scope.spawn(move || connect(&[address], &source, purpose, soon()).unwrap());
        let (got, accepted) = listener.accept(&destination, soon()).unwrap();
        assert_eq!(got, purpose);
        (bounded(connecting.join().unwrap()), bounded(accepted))
    })
}

/// Makes a wait that should not be one fail instead of hang.
fn bounded(mut connection: Connection) -> Connection {
    connection.set_deadline(Some(soon())).unwrap();
    connection
}

/// A greeted plain connection whose accepting end is in the test's own hands, as a bare socket.
pub(super) fn raw_receiver(purpose: Purpose) -> (Connection, TcpStream) {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (security, _) = securities(false);
    thread::scope(|scope| {
        let connecting = scope.spawn(|| connect(&[address], &security, purpose, soon()).unwrap());
        let (mut raw, _) = listener.accept().unwrap();
        raw.read_exact(&mut [0; super::hello::HELLO_LENGTH]).unwrap();
        raw.write_all(&super::hello::answer(Ok(()))).unwrap();
        (bounded(connecting.join().unwrap()), raw)
    })
}

/// A greeted plain connection whose connecting end is in the test's own hands, as a bare socket.
pub(super) fn raw_sender(purpose: Purpose) -> (TcpStream, Connection) {
    use std::io::{Read, Write};
    let listener = listener();
    let (security, _) = securities(false);
    let mut raw = TcpStream::connect(listener.address()).unwrap();
    raw.write_all(&super::hello::hello(&security, purpose)).unwrap();
    let (_, connection) = listener.accept(&security, soon()).unwrap();
    raw.read_exact(&mut [0; super::hello::ANSWER_LENGTH]).unwrap();
    (raw, bounded(connection))
}

/// A local address where nobody listens.
pub(super) fn nobody() -> SocketAddr {
    let socket = std::net::TcpListener::bind((LOOPBACK, 0)).unwrap();
    socket.local_addr().unwrap()
}
