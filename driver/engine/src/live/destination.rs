//! The destination's engine: the guest is not here before everything is, exactly as it was sent.
//!
//! ```text
//!   Reserved ──attach──▶ Attached ──▶ Arrival (a thread serves the source) ──▶ committed ──▶ concluded
//!       └──────────────────┴──────────────── error ──▶ libvirt ends the incoming QEMU
//! ```

use super::land::Landing;
use super::messages::{downtime, Answer, Ask, DestinationPause, SourcePause};
use super::protection::{self, AtDestination};
use super::relay;
use super::reserve::{self, Backing};
use super::signals::{End, Signals};
use super::verify;
use super::watch::{deadline, Watch, COMMAND};
use super::Error;
use crate::control::{Control, Meter};
use crate::qemu::cgroup::join_cgroups_of;
use crate::qemu::{discover, Process, RamBlock};
use crate::report::{self, millis, Migration, Outcome, Ram, Recorder, Role, Stage};
use crate::wire::{message, Connection, DataReceiver, Listener, Purpose, Security, Totals};
use ferry_contract::control::{Reply, Request, Settings};
use ferry_contract::cookie::{self, Offer};
use ferry_contract::session::{Block, Encryption, Guest};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long libvirt may take to start QEMU and come back.
const UNTIL_ATTACH: Duration = Duration::from_secs(15 * 60);
/// How long the source may take to connect after the answer went out.
const UNTIL_SOURCE: Duration = Duration::from_secs(15 * 60);
/// For the source's remaining connections once the first one is there.
const CONNECTIONS: Duration = Duration::from_secs(20);
/// For QEMU to load the device state after libvirt's source has finished.
const LOAD: Duration = Duration::from_secs(50);
/// For libvirt to conclude once the memory is here: it may run hooks and start networks first.
const UNTIL_CONCLUDED: Duration = Duration::from_secs(15 * 60);

/// Serves one plug-in, from its first request to its end.
pub fn run(control: &Control, meter: &Arc<Meter>, signals: &Arc<Signals>) -> Result<(), Error> {
    serve(control, meter, signals);
    Ok(())
}

fn serve(control: &Control, meter: &Arc<Meter>, signals: &Arc<Signals>) {
    let Some(Request::Reserve {
        guest,
        host,
        offer,
        memory_directory,
        promised,
        promised_huge,
        settings,
    }) = signals.next_request(Some(deadline(UNTIL_ATTACH)))
    else {
        return;
    };
    let span = tracing::info_span!("migration", guest = guest.name, role = "destination");
    let _entered = span.enter();
    let protection = match AtDestination::of(&settings, &offer) {
        Ok(protection) => protection,
        Err(error) => return control.reply(Reply::Failed(error.failure(&host))),
    };
    let place = Place {
        control,
        meter,
        signals,
        guest,
        host,
        offer,
        settings,
        protection,
    };
    match reserve(&place.offer, &memory_directory, promised, promised_huge) {
        Ok(Backing::Memory) => control.reply(Reply::Reserved),
        Ok(Backing::Other) => {
            let directory = memory_directory.display();
            let reason = format!(
                "{directory} (memory_backing_dir) is not on tmpfs: memory would be written to a disk"
            );
            return control.reply(Reply::NotEligible { reason });
        }
        Err(error) => return control.reply(Reply::Failed(error.failure(&place.host))),
    }
    let Some(Request::Attach {
        monitor,
        incoming,
        host: address,
        listen,
    }) = signals.next_request(Some(deadline(UNTIL_ATTACH)))
    else {
        return;
    };
    let mut recorder = place.recorder();
    recorder.enter(Stage::Reservation);
    match Attached::take_hold(&place, &monitor, listen.as_deref()) {
        Ok(attached) => attached.serve(&place, incoming.clone(), address, recorder),
        Err(error) => place.fail(recorder, &error),
    }
    // Ended before anybody has connected, QEMU leaves its socket behind. The plug-in removes it, too, but it may be gone.
    let _ = std::fs::remove_file(&incoming);
}

fn reserve(offer: &Offer, directory: &Path, promised: u64, promised_huge: u64) -> Result<Backing, Error> {
    let (huge, files): (Vec<_>, Vec<_>) = offer.blocks.iter().cloned().partition(Block::is_huge);
    reserve::check_huge(&huge, promised_huge, reserve::free_huge)?;
    if files.is_empty() {
        return Ok(Backing::Memory);
    }
    let (room, backing) = reserve::survey(directory)?;
    if backing == Backing::Memory {
        reserve::check(&files, promised, room, directory)?;
    }
    Ok(backing)
}

/// What every stage needs of its surroundings.
struct Place<'a> {
    control: &'a Control,
    meter: &'a Arc<Meter>,
    signals: &'a Arc<Signals>,
    guest: Guest,
    host: String,
    offer: Offer,
    settings: Settings,
    protection: AtDestination,
}

impl Place<'_> {
    fn recorder(&self) -> Recorder {
        let mut recorder = Recorder::new(Migration {
            session: self.offer.session,
            role: Role::Destination,
            guest: report::Guest {
                name: self.guest.name.clone(),
                uuid: self.guest.uuid,
            },
            local_host: self.host.clone(),
            peer_host: String::new(),
            encryption: protection::words(self.protection.encryption),
            streams: u32::from(self.settings.streams),
        });
        recorder.ram(Ram {
            blocks: self.offer.blocks.len() as u32,
            bytes: self.offer.blocks.iter().map(|block| block.size).sum(),
            resident: self.offer.blocks.iter().map(|block| block.resident).sum(),
        });
        recorder
    }

    /// The migration has failed here; libvirt will end the incoming QEMU and all its memory.
    fn fail(&self, recorder: Recorder, error: &Error) {
        self.signals.end(End::Failed(error.to_string()));
        let outcome = match error {
            Error::Cancelled => Outcome::Cancelled,
            error => Outcome::Failed {
                stage: recorder.stage(),
                error: error.to_string(),
            },
        };
        report::publish(&recorder.finish(outcome), &self.settings.log_directory);
        self.control.reply(Reply::Failed(error.failure(&self.host)));
    }
}

/// Reservation: the incoming QEMU is ours to fill, and the door is open.
struct Attached {
    watch: Arc<Watch>,
    landing: Landing,
    listener: Listener,
}

impl Attached {
    fn take_hold(place: &Place<'_>, monitor: &Path, listen: Option<&str>) -> Result<Self, Error> {
        let watch = Watch::open(monitor, Arc::clone(place.signals))?;
        let pid = watch.command(|monitor| monitor.peer_pid())?;
        let process = Process::open(pid)?;
        let blocks = watch.command(|monitor| Ok(discover(monitor, &process, deadline(COMMAND))))??;
        let files = in_order(&place.offer, blocks)?;
        // What we write first is charged to us: to the guest, that is, once we are in its groups.
        for group in join_cgroups_of(&process) {
            tracing::debug!(group = %group.display(), "joined the guest's control group");
        }
        let landing = Landing::new(files, Arc::clone(place.meter), Arc::clone(place.signals))?;
        watch.ignore_shared()?;
        let (first, last) = place.settings.ports;
        let listener = bind(listen, first..=last)?;
        place.signals.watch_listener(listener.stopper());
        Ok(Self {
            watch,
            landing,
            listener,
        })
    }

    /// Answers the plug-in, then serves the source's engine on one thread and the plug-in on this one.
    fn serve(self, place: &Place<'_>, incoming: PathBuf, address: String, mut recorder: Recorder) {
        let answer = cookie::Answer {
            session: place.offer.session,
            encryption: place.protection.encryption,
            certificate: place.protection.certificate.clone(),
            host: address,
            port: self.listener.address().port(),
        };
        let token = (*place.offer.token.bytes()).into();
        let security = Security {
            session: place.offer.session,
            token,
            protection: place.protection.protection.clone(),
        };
        place
            .meter
            .total
            .store(place.offer.blocks.iter().map(|block| block.size).sum(), Relaxed);
        let (tell, concluded) = channel();
        let (noted, notes) = channel();
        let arrival = Arrival {
            signals: Arc::clone(place.signals),
            meter: Arc::clone(place.meter),
            landing: self.landing,
            layout: place.offer.blocks.iter().map(|block| block.size).collect(),
            names: place
                .offer
                .blocks
                .iter()
                .map(|block| block.name.clone())
                .collect(),
            host: place.host.clone(),
            incoming,
            concluded,
            noted,
        };
        let span = tracing::Span::current();
        let listener = self.listener;
        let server = std::thread::Builder::new()
            .name("arrival".into())
            .spawn(move || span.in_scope(|| arrival.serve(&listener, &security)));
        if let Err(error) = server {
            return place.fail(recorder, &Error::system("start a thread")(error));
        }
        recorder.enter(Stage::PreCopy);
        place.control.reply(Reply::Listening(answer));
        match finish(place, &self.watch, &notes, &mut recorder) {
            Ok(()) => conclude(place, recorder, &notes, &tell),
            Err(error) => {
                // Our refusal makes libvirt end the guest here. Without a plug-in to hear it nothing is known.
                if !matches!(error, Error::Abandoned) {
                    let _ = tell.send(None);
                }
                place.fail(recorder, &error);
            }
        }
        drop(tell);
        // The source's thread ends once it has told, or the source is gone.
        while notes.recv_timeout(LINGER).is_ok() {}
    }
}

/// The offered blocks' files, in the offer's order; a guest that looks different here cannot be filled.
fn in_order(offer: &Offer, mut blocks: Vec<RamBlock>) -> Result<Vec<crate::memory::RamFile>, Error> {
    let count = blocks.len();
    let files: Vec<_> = offer
        .blocks
        .iter()
        .map(|wanted| {
            let same = |block: &RamBlock| block.name == wanted.name && block.size == wanted.size;
            let index = blocks.iter().position(same).ok_or_else(|| {
                Error::Elsewhere(format!(
                    "the QEMU started here has no RAM block {} of {} bytes; are both hosts' definitions the same?",
                    wanted.name, wanted.size
                ))
            })?;
            let file = blocks.swap_remove(index).file;
            // The source tells of what is on its pages; of huge ones it tells otherwise than of others.
            match file.backing().page() {
                page if page == wanted.page => Ok(file),
                page => Err(Error::Elsewhere(format!(
                    "RAM block {} is made of pages of {} KiB here and of {} KiB at the source; give the guest the same \
                     memory on both hosts (<hugepages>)",
                    wanted.name,
                    page >> 10,
                    wanted.page >> 10
                ))),
            }
        })
        .collect::<Result<_, Error>>()?;
    match blocks.is_empty() {
        true => Ok(files),
        false => Err(Error::Elsewhere(format!(
            "the QEMU started here has {count} RAM blocks, the source has {}",
            files.len()
        ))),
    }
}

/// Listens where the operator said, else on every address.
pub(crate) fn bind(listen: Option<&str>, ports: std::ops::RangeInclusive<u16>) -> Result<Listener, Error> {
    use std::net::ToSocketAddrs;
    let Some(name) = listen else {
        return Listener::bind(IpAddr::V6(Ipv6Addr::UNSPECIFIED), ports.clone())
            .or_else(|_| Listener::bind(IpAddr::V4(Ipv4Addr::UNSPECIFIED), ports))
            .map_err(Error::from);
    };
    let failed = Error::system("find the listen address");
    let mut found = (name, 0).to_socket_addrs().map_err(failed)?;
    let address = found
        .next()
        .ok_or_else(|| failed(std::io::ErrorKind::AddrNotAvailable.into()))?;
    Ok(Listener::bind(address.ip(), ports)?)
}

/// What the source's thread has to tell.
enum Note {
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

/// Connections that may be there before the control connection: 16 streams, device state and return path.
const MAX_EARLY: usize = 18;

/// What the source's thread waits for: the destination's part of the pause, or that the guest will not run here.
type Told = Option<DestinationPause>;

/// The source's engine, served.
struct Arrival {
    signals: Arc<Signals>,
    meter: Arc<Meter>,
    landing: Landing,
    layout: Vec<u64>,
    names: Vec<String>,
    host: String,
    incoming: PathBuf,
    concluded: Receiver<Told>,
    noted: Sender<Note>,
}

impl Arrival {
    fn serve(self, listener: &Listener, security: &Security) {
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

/// libvirt's Finish: only a committed guest, loaded whole, may be resumed.
fn finish(
    place: &Place<'_>,
    watch: &Watch,
    notes: &Receiver<Note>,
    recorder: &mut Recorder,
) -> Result<(), Error> {
    match place.signals.next_request_or_failure()? {
        Some(Request::Finish) => {}
        Some(Request::Conclude { .. }) => {
            // libvirt ends it. Its own cause is told by the source, unless ours came first.
            let cause = place.signals.check().err().unwrap_or(Error::Libvirt);
            place.control.reply(Reply::Concluded);
            return Err(cause);
        }
        Some(_) => return Err(Error::Elsewhere("the plug-in asked out of turn".into())),
        None => return Err(Error::Abandoned),
    }
    let Some(committed) = place.signals.committed() else {
        place.signals.check()?;
        return Err(Error::Elsewhere(
            "the guest's memory had not arrived when libvirt wanted to resume it".into(),
        ));
    };
    recorder.enter_at(Stage::Commitment, committed);
    note(recorder, place.protection.encryption, notes.try_iter());
    let loaded = place
        .signals
        .wait_for_qemu(deadline(LOAD), |seen| seen.completed.is_some() || seen.failed)?;
    if loaded != Some(true) || place.signals.seen().failed {
        return Err(Error::Elsewhere(
            "QEMU could not load the guest's device state; see its log".into(),
        ));
    }
    watch.honour_shared(COMMAND)?;
    recorder.enter(Stage::Activation);
    place.control.reply(Reply::Committed);
    Ok(())
}

fn note(
    recorder: &mut Recorder,
    encryption: Encryption,
    notes: impl Iterator<Item = Note>,
) -> Option<SourcePause> {
    let mut pause = None;
    for note in notes {
        match note {
            Note::Connected {
                host,
                streams,
                certificate,
            } => {
                recorder.peer(host);
                recorder.streams(u32::from(streams));
                if encryption == Encryption::Certificates {
                    recorder.note(protection::proof("source", certificate));
                }
            }
            Note::Committed { totals } => recorder.totals(report::Totals::from_streams(&totals)),
            Note::Paused(source) => pause = Some(source),
        }
    }
    pause
}

/// libvirt has resumed the guest, or ended it.
fn conclude(place: &Place<'_>, mut recorder: Recorder, notes: &Receiver<Note>, tell: &Sender<Told>) {
    let failed = |cause: &str| report::publish(&recorder.clone().fail(cause), &place.settings.log_directory);
    match place.signals.next_request(Some(deadline(UNTIL_CONCLUDED))) {
        Some(Request::Conclude { success: true }) => {}
        // libvirt's daemon ended between resuming the guest and saying so.
        None if place.signals.seen().resumed.is_some() => {}
        Some(Request::Conclude { success: false }) => {
            let _ = tell.send(None);
            failed("libvirt could not resume the guest here; it goes on at the source");
            return place.control.reply(Reply::Concluded);
        }
        // Not known, so nothing is told: the source must not resume it either.
        _ => return failed("libvirt's daemon ended before it resumed the guest; look whether it runs here"),
    }
    // libvirt's client now lets the source conclude, which asks for our part of the pause.
    place.control.reply(Reply::Concluded);
    let seen = place.signals.seen();
    let committed = place.signals.committed();
    let span = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
        (Some(from), Some(to)) => millis(to.saturating_duration_since(from)),
        _ => 0.0,
    };
    let ours = DestinationPause {
        device_state_ms: span(committed, seen.completed),
        resume_ms: span(seen.completed, seen.resumed),
    };
    // An error means that the source has gone already.
    let _ = tell.send(Some(ours));
    let asked = notes.recv_timeout(SOURCE_CONCLUDES).ok();
    if let Some(theirs) = note(&mut recorder, place.protection.encryption, asked.into_iter()) {
        recorder.downtime(downtime(theirs, ours));
    }
    report::publish(
        &recorder.finish(Outcome::Completed),
        &place.settings.log_directory,
    );
}

/// For the source to ask whether the guest runs here, once that is decided; its end of the connection ends the wait.
const LINGER: Duration = Duration::from_secs(60);
/// For the source to ask for the pause after libvirt's Finish; only the timeline waits for it.
const SOURCE_CONCLUDES: Duration = Duration::from_secs(10);
