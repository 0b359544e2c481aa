//! The source, served by a thread: connections, memory, commitment.

use super::activation::UNTIL_CONCLUDED;
use crate::control::Meter;
use crate::live::land::Landing;
use crate::live::messages::{Answer, Ask, DestinationPause, SourcePause};
use crate::live::relay;
use crate::live::signals::{End, Signals};
use crate::live::verify;
use crate::live::watch::deadline;
use crate::live::Error;
use crate::wire::{message, Connection, DataReceiver, Listener, Purpose, Security, Totals};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the source may take to connect after the answer went out.
const UNTIL_SOURCE: Duration = Duration::from_secs(15 * 60);
/// For the source's remaining connections once the first one is there.
const CONNECTIONS: Duration = Duration::from_secs(20);

/// Connections that may be there before the control connection: 16 streams, device state and return path.
const MAX_EARLY: usize = 18;

/// What the source's thread has to tell.
pub(super) enum Note {
    Connected {
        host: String,
        streams: u16,
        certificate: Option<String>,
    },
    Committed {
        totals: Vec<Totals>,
    },
    Paused(SourcePause),
}

/// A connection of the source's and what it is for.
type Opened = (Purpose, Connection);

/// What the source's thread waits for: the destination's part of the pause, or that the guest will not run here.
pub(super) type Told = Option<DestinationPause>;

/// The source's engine, served.
pub(super) struct Arrival {
    pub(super) signals: Arc<Signals>,
    pub(super) meter: Arc<Meter>,
    pub(super) landing: Landing,
    pub(super) layout: Vec<u64>,
    pub(super) names: Vec<String>,
    pub(super) host: String,
    pub(super) incoming: PathBuf,
    pub(super) concluded: Receiver<Told>,
    pub(super) noted: Sender<Note>,
}

impl Arrival {
    pub(super) fn serve(self, listener: &Listener, security: &Security) {
        let signals = Arc::clone(&self.signals);
        if let Err(error) = self.try_serve(listener, security) {
            signals.end(End::Failed(error.to_string()));
        }
    }

    fn try_serve(mut self, listener: &Listener, security: &Security) -> Result<(), Error> {
        let (mut control, streams, early) = self.first(listener, security)?;
        let served = self
            .streams(listener, security, streams, early)
            .and_then(|landed| {
                message::send(
                    &mut control,
                    &Answer::Ready {
                        host: self.host.clone(),
                    },
                )?;
                self.commit(&mut control, landed)
            });
        match served {
            Ok(()) => self.tell_when_resumed(&mut control),
            Err(error) => {
                self.signals.end(End::Failed(error.to_string()));
                // The first cause, in this host's words, for the source's administrator; it may not be listening.
                let cause = self.signals.check().err().unwrap_or(error);
                let refusal = Answer::Refused {
                    cause: cause.to_string(),
                    host: self.host.clone(),
                };
                let _ = message::send(&mut control, &refusal);
                Err(cause)
            }
        }
    }

    /// The control connection, and how many streams the source wants. The source opens this one first; but greetings
    /// go on side by side, and a later one may be over sooner on a busy host: what came early is given out too.
    fn first(
        &self,
        listener: &Listener,
        security: &Security,
    ) -> Result<(Connection, u16, Vec<Opened>), Error> {
        let mut early = Vec::new();
        let mut end = deadline(UNTIL_SOURCE);
        let mut control = loop {
            let (purpose, connection) = listener.accept(security, end)?;
            if purpose == Purpose::Control {
                break connection;
            }
            if early.len() == MAX_EARLY {
                return Err(Error::Elsewhere("the source opened no control connection".into()));
            }
            early.push((purpose, connection));
            end = end.min(deadline(CONNECTIONS));
        };
        control.set_deadline(Some(deadline(CONNECTIONS)))?;
        let ask = message::receive(&mut control)?;
        control.set_deadline(None)?;
        self.signals.watch_control(control.breaker());
        match ask {
            Ask::Open {
                streams: streams @ 1..=16,
                host,
            } => {
                // Nobody listens any more where libvirt has concluded already.
                let _ = self.noted.send(Note::Connected {
                    host,
                    streams,
                    certificate: control.peer_certificate(),
                });
                Ok((control, streams, early))
            }
            other => Err(Error::Elsewhere(format!("the source began with {other:?}"))),
        }
    }

    /// All other connections; each stream lands on its own thread.
    fn streams(
        &mut self,
        listener: &Listener,
        security: &Security,
        count: u16,
        early: Vec<Opened>,
    ) -> Result<Vec<JoinHandle<Result<Totals, Error>>>, Error> {
        let mut streams: Vec<Option<Connection>> = (0..count).map(|_| None).collect();
        let (mut device_state, mut return_path) = (None, None);
        let end = deadline(CONNECTIONS);
        let mut early = early.into_iter();
        while streams.iter().any(Option::is_none) || device_state.is_none() || return_path.is_none() {
            let (purpose, connection) = match early.next() {
                Some(opened) => opened,
                None => listener.accept(security, end)?,
            };
            self.signals.watch(connection.breaker());
            let place = match purpose {
                Purpose::Data(number) => streams.get_mut(usize::from(number)),
                Purpose::DeviceState => Some(&mut device_state),
                Purpose::ReturnPath => Some(&mut return_path),
                Purpose::Control => None,
            };
            match place {
                Some(place @ None) => *place = Some(connection),
                _ => {
                    return Err(Error::Elsewhere(format!(
                        "the source opened one {purpose} connection too many"
                    )))
                }
            }
        }
        if let (Some(device_state), Some(return_path)) = (device_state, return_path) {
            relay::to_destination(self.incoming.clone(), &self.signals, device_state, return_path)?;
        }
        streams
            .into_iter()
            .flatten()
            .map(|connection| self.land(connection))
            .collect()
    }

    fn land(&self, connection: Connection) -> Result<JoinHandle<Result<Totals, Error>>, Error> {
        let receiver = DataReceiver::new(connection, &self.layout);
        let mut landing = self.landing.clone();
        let signals = Arc::clone(&self.signals);
        let meter = Arc::clone(&self.meter);
        let run = move || {
            let landed = receiver.run(&mut landing).map_err(Error::from);
            match &landed {
                Ok(totals) => {
                    meter.wire.fetch_add(totals.wire_bytes, Relaxed);
                }
                Err(error) => signals.end(End::Failed(error.to_string())),
            }
            landed
        };
        std::thread::Builder::new()
            .name("land".into())
            .spawn(run)
            .map_err(Error::system("start a thread"))
    }

    /// Commitment: every stream carried exactly what the source says it sent.
    fn commit(
        &self,
        control: &mut Connection,
        landed: Vec<JoinHandle<Result<Totals, Error>>>,
    ) -> Result<(), Error> {
        let (totals, memory) = match message::receive(control)? {
            Ask::Commit { totals, memory } => (totals, memory),
            other => {
                return Err(Error::Elsewhere(format!(
                    "the source asked out of turn: {other:?}"
                )))
            }
        };
        let mut ours = Vec::new();
        for stream in landed {
            ours.push(
                stream
                    .join()
                    .map_err(|_| Error::Elsewhere("a landing thread panicked".into()))??,
            );
        }
        if ours != totals {
            return Err(Error::Elsewhere(
                "what arrived is not what the source sent: counts or digests differ".into(),
            ));
        }
        if let Some(theirs) = memory {
            let mine = verify::digest(self.landing.files())?;
            if let Some((block, offset, length)) = verify::difference(&mine, &theirs, self.landing.files()) {
                let name = self.names.get(block).map_or("?", String::as_str);
                return Err(Error::Elsewhere(format!(
                    "the guest's memory differs in block {name}, in the {length} bytes from {offset:#x}"
                )));
            }
        }
        self.signals.check()?;
        self.signals.commit();
        let _ = self.noted.send(Note::Committed { totals });
        message::send(control, &Answer::Committed)?;
        // Not sooner, for the guest stands still; libvirt's Finish waits for it.
        self.signals.leave_cgroups();
        Ok(())
    }

    /// The source wants to know whether the guest runs here: only then may it end its own, only if it does not may
    /// it resume it.
    fn tell_when_resumed(&self, control: &mut Connection) -> Result<(), Error> {
        // The source's end is its own affair from here on.
        let Ok(Ask::Resumed { pause }) = message::receive(control) else {
            return Ok(());
        };
        let _ = self.noted.send(Note::Paused(pause));
        let answer = match self.concluded.recv_timeout(UNTIL_CONCLUDED) {
            Ok(Some(pause)) => Answer::Resumed { pause },
            Ok(None) => Answer::NotResumed,
            // Nothing is known, and nothing is said.
            Err(_) => return Ok(()),
        };
        let _ = message::send(control, &answer);
        Ok(())
    }
}
