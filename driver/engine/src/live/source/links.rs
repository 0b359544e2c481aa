//! The connections to the destination, and what it says on them.

use super::Place;
use crate::live::messages::{Answer, Ask};
use crate::live::signals::End;
use crate::live::watch::deadline;
use crate::live::Error;
use crate::wire::data::WINDOW;
use crate::wire::{connect, message, Connection, DataSender, Protection, Purpose, Security};
use ferry_contract::cookie::{self, Offer};
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

/// For a connection to the destination.
const CONNECT: Duration = Duration::from_secs(20);
/// For a destination that has ended the migration to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The connections of a session.
pub(super) struct Links {
    /// The destination host's name.
    pub(super) peer: String,
    pub(super) control: Connection,
    pub(super) data: Vec<DataSender>,
    pub(super) device_state: Connection,
    pub(super) return_path: Connection,
}

impl Links {
    pub(super) fn connect(
        place: &Place<'_>,
        offer: &Offer,
        protection: Protection,
        answer: &cookie::Answer,
        streams: u16,
    ) -> Result<Self, Error> {
        let token = (*offer.token.bytes()).into();
        let security = Security {
            session: offer.session,
            token,
            protection,
        };
        let addresses: Vec<SocketAddr> = (answer.host.as_str(), answer.port)
            .to_socket_addrs()
            .map_err(|error| {
                Error::Elsewhere(format!(
                    "cannot find the address of the destination's engine, {}: {error}; name one that resolves here \
                     with --migrateuri or migration_host",
                    answer.host
                ))
            })?
            .collect();
        let end = deadline(CONNECT);
        let open = |purpose| -> Result<Connection, Error> {
            place.signals.check()?;
            Ok(connect(&addresses, &security, purpose, end)?)
        };
        let watched = |purpose| -> Result<Connection, Error> {
            let connection = open(purpose)?;
            place.signals.watch(connection.breaker());
            Ok(connection)
        };
        let mut control = open(Purpose::Control)?;
        let greeting = Ask::Open {
            streams,
            host: place.host.clone(),
        };
        control.set_deadline(Some(end))?;
        message::send(&mut control, &greeting)?;
        let data = (0..streams).map(|number| Ok(DataSender::new(watched(Purpose::Data(number))?, WINDOW)));
        let data = data.collect::<Result<_, Error>>()?;
        let device_state = watched(Purpose::DeviceState)?;
        let return_path = watched(Purpose::ReturnPath)?;
        let peer = match message::receive(&mut control)? {
            Answer::Ready { host } => host,
            Answer::Refused { cause, host } => return Err(Error::Refused { cause, host }),
            other => return Err(out_of_turn(&other)),
        };
        Ok(Self {
            peer,
            control,
            data,
            device_state,
            return_path,
        })
    }
}

/// What the destination says of an error that looks like its absence: it may have ended the migration itself, and
/// breaks off all connections but the one on which it says why.
pub(super) fn last_words(place: &Place<'_>, control: &mut Connection, error: Error) -> Error {
    let error = place.signals.cause(error);
    if !matches!(error, Error::Wire(_)) && !place.signals.is_lost() {
        return error;
    }
    // QEMU need not wait for the answer: a guest that stands still goes on now.
    place.signals.end(End::Lost(error.to_string()));
    let said = control.set_deadline(Some(deadline(LAST_WORDS)));
    match said.and_then(|()| message::receive(control)) {
        Ok(Answer::Refused { cause, host }) => Error::Refused { cause, host },
        _ => error,
    }
}

pub(super) fn out_of_turn(answer: &Answer) -> Error {
    Error::Elsewhere(format!(
        "the destination's engine answered out of turn: {answer:?}"
    ))
}
