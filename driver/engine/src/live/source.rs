//! The source's engine: the guest is here until the destination has committed.
//!
//! The stages are values, and each gives the next one away; what belongs to a later stage cannot be had earlier:
//!
//! ```text
//!   Inspected ──precopy──▶ Converged ──stop_and_copy──▶ Moved ──▶ concluded
//!       └──────────┴───────────────┴── error ──▶ everything undone, the guest runs on
//! ```

use super::brake::{Brake, Use};
use super::inspect::{self, Looked};
use super::messages::{downtime, Answer, Ask, SourcePause};
use super::precopy::{Precopy, Spent};
use super::protection;
use super::relay::{self, Door};
use super::rounds::Decision;
use super::signals::{End, Seen, Signals};
use super::verify;
use super::watch::{deadline, Watch, COMMAND};
use super::Error;
use crate::control::{Control, Meter};
use crate::qemu::{Process, RamBlock};
use crate::report::{self, millis, Migration, Outcome, Ram, Recorder, Role, Stage};
use crate::wire::data::WINDOW;
use crate::wire::{connect, message, Connection, DataSender, Identity, Protection, Purpose, Security};
use ferry_contract::control::{Options, Reply, Request, Settings};
use ferry_contract::cookie::{self, Offer};
use ferry_contract::session::{Block, Encryption, Guest};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a plug-in may take from Begin to Perform: the destination starts QEMU, and may fill its memory first.
const UNTIL_PERFORM: Duration = Duration::from_secs(15 * 60);
/// For a connection to the destination.
const CONNECT: Duration = Duration::from_secs(20);
/// For the destination to compare and commit.
const COMMIT: Duration = Duration::from_secs(60);
/// For the destination to say whether the guest runs; by then libvirt has been told by its own means.
const RESUMED: Duration = Duration::from_secs(20);
/// For QEMU to leave its own migration after a failure, so that the capability can be cleared.
const CLEAR: Duration = Duration::from_secs(20);
/// For a destination that has ended the migration to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Between rounds while libvirt prepares the switch-over.
const STEP: Duration = Duration::from_millis(10);
/// Between rounds once QEMU's migration has begun: it has nothing to send but device state, and comes to its
/// switch-over within milliseconds.
const IMMINENT: Duration = Duration::from_millis(100);
/// While libvirt copies disks, for which a guest may take hours: rounds rest for this many times as long as they work,
const REST: u32 = 4;
/// but not longer, so that the rest is small when libvirt is done.
const LONGEST_STEP: Duration = Duration::from_millis(500);

/// Serves one plug-in, from its first request to its end.
///
/// # Errors
/// When something was left on the guest that the plug-in must see to: x-ignore-shared.
pub fn run(control: &Control, meter: &Arc<Meter>, signals: &Arc<Signals>) -> Result<(), Error> {
    let Some(Request::Inspect {
        guest,
        host,
        monitor,
        settings,
    }) = signals.next_request(Some(deadline(UNTIL_PERFORM)))
    else {
        return Ok(());
    };
    let place = Place {
        control,
        meter,
        signals,
        guest,
        host,
        settings,
    };
    let span = tracing::info_span!("migration", guest = place.guest.name, role = "source");
    let _entered = span.enter();
    let session = Uuid::new_v4();
    let mut recorder = place.recorder(session);
    recorder.enter(Stage::PreMigration);
    let inspected = match Inspected::look(&place, monitor, session) {
        Ok(inspected) => inspected,
        Err(error) => {
            control.reply(Reply::NotEligible {
                reason: error.to_string(),
            });
            return Ok(());
        }
    };
    recorder.ram(inspected.ram());
    recorder.enter(Stage::Reservation);
    control.reply(Reply::Offer(inspected.offer.clone()));
    match signals.next_request(Some(deadline(UNTIL_PERFORM))) {
        Some(Request::Precopy { answer, options }) => {
            signals.pace.set(options.bandwidth);
            return inspected.migrate(&place, &answer, &options, recorder);
        }
        Some(Request::Conclude { .. }) => control.reply(Reply::Concluded),
        _ => tracing::info!("libvirt did not come to its Perform; the engine ends"),
    }
    Ok(())
}

/// What every stage needs of its surroundings.
struct Place<'a> {
    control: &'a Control,
    meter: &'a Arc<Meter>,
    signals: &'a Arc<Signals>,
    guest: Guest,
    host: String,
    settings: Settings,
}

impl Place<'_> {
    /// The timeline begins before there is an answer: peer, encryption and memory follow.
    fn recorder(&self, session: Uuid) -> Recorder {
        Recorder::new(Migration {
            session,
            role: Role::Source,
            guest: report::Guest {
                name: self.guest.name.clone(),
                uuid: self.guest.uuid,
            },
            local_host: self.host.clone(),
            peer_host: String::new(),
            encryption: None,
            streams: u32::from(self.settings.streams),
        })
    }
}

/// Pre-migration: the guest is eligible and known; nothing about it has changed.
struct Inspected {
    offer: Offer,
    identity: Identity,
    watch: Arc<Watch>,
    process: Process,
    blocks: Vec<RamBlock>,
}

impl Inspected {
    fn look(place: &Place<'_>, monitor: PathBuf, session: Uuid) -> Result<Self, Error> {
        let Looked {
            watch,
            process,
            blocks,
        } = inspect::look(&monitor, Arc::clone(place.signals))?;
        let identity = Identity::generate(session)?;
        let token = ferry_contract::session::Token::new(*crate::wire::Token::generate()?.expose());
        let offered = |block: &RamBlock| {
            let resident = block.file.resident()?.min(block.size);
            Ok(Block {
                name: block.name.clone(),
                size: block.size,
                resident,
                page: block.file.backing().page(),
            })
        };
        let (encryption, certificate) = protection::offered(&place.settings, &identity);
        let offer = Offer {
            session,
            token,
            encryption,
            certificate,
            blocks: blocks.iter().map(offered).collect::<Result<_, Error>>()?,
        };
        Ok(Self {
            offer,
            identity,
            watch,
            process,
            blocks,
        })
    }

    /// All that follows, and the undoing of it where it fails.
    fn migrate(
        self,
        place: &Place<'_>,
        answer: &cookie::Answer,
        options: &Options,
        mut recorder: Recorder,
    ) -> Result<(), Error> {
        recorder.peer(&answer.host);
        recorder.encryption(protection::words(answer.encryption));
        let watch = Arc::clone(&self.watch);
        let moved = self
            .precopy(place, answer, options, &mut recorder)
            .and_then(|converged| converged.stop_and_copy(place, options, &mut recorder))
            .and_then(|moved| moved.performed(place));
        match moved {
            Ok(handed_over) => handed_over.conclude(place, recorder),
            Err(error) => return undo(place, &watch, recorder, &place.signals.cause(error)),
        }
        Ok(())
    }

    fn ram(&self) -> Ram {
        Ram {
            blocks: self.blocks.len() as u32,
            bytes: self.blocks.iter().map(|block| block.size).sum(),
            resident: self.offer.blocks.iter().map(|block| block.resident).sum(),
        }
    }

    fn precopy(
        self,
        place: &Place<'_>,
        answer: &cookie::Answer,
        options: &Options,
        recorder: &mut Recorder,
    ) -> Result<Converged, Error> {
        place
            .meter
            .total
            .store(self.blocks.iter().map(|block| block.size).sum(), Relaxed);
        place.meter.remaining.store(
            self.offer.blocks.iter().map(|block| block.resident).sum(),
            Relaxed,
        );
        place.control.report();
        let streams = options.streams.unwrap_or(place.settings.streams);
        recorder.streams(u32::from(streams));
        let name = options.tls_name.as_deref();
        let protection = protection::at_source(&place.settings, self.identity, answer, name)?;
        let mut links = Links::connect(place, &self.offer, protection, answer, streams)?;
        if answer.encryption == Encryption::Certificates {
            recorder.note(protection::proof("destination", links.control.peer_certificate()));
        }
        if let Some(level) = options.compression {
            for stream in &mut links.data {
                stream.pack(level).map_err(Error::system("prepare to compress"))?;
            }
            recorder.note(format!("memory is compressed: zstd, level {level}"));
        }
        recorder.peer(links.peer);
        recorder.enter(Stage::PreCopy);
        if options.paused {
            // libvirt resumes it: at the destination, or here where the migration fails.
            self.watch.command(|monitor| monitor.stop(deadline(COMMAND)))?;
            recorder.note("the guest stands still from here on, as asked (no --live)");
        }
        let mut precopy = Precopy::begin(
            &self.process,
            Arc::clone(&self.watch),
            Arc::clone(place.signals),
            Arc::clone(place.meter),
            self.blocks,
            links.data,
        )?;
        let allowed = match options.auto_converge {
            Some(wanted) => Use::Asked(wanted),
            None if place.settings.auto_converge => Use::LastResort,
            None => Use::Never,
        };
        let mut brake = Brake::new(allowed, &self.process, &self.watch, place.meter);
        converge(place, recorder, &mut precopy, brake.as_mut())
            .map_err(|error| last_words(place, &mut links.control, error))?;
        Ok(Converged {
            control: links.control,
            ready: Ready {
                session: self.offer.session,
                watch: self.watch,
                precopy,
                brake,
                device_state: links.device_state,
                return_path: links.return_path,
            },
        })
    }
}

/// The first pass, and rounds until what is left fits the pause.
fn converge(
    place: &Place<'_>,
    recorder: &mut Recorder,
    precopy: &mut Precopy,
    mut brake: Option<&mut Brake>,
) -> Result<(), Error> {
    precopy.first(recorder)?;
    loop {
        let scan = precopy.scan()?;
        match precopy.decide(&scan)? {
            Decision::StopAndCopy {
                why, expected_pause, ..
            } => {
                recorder.note(format!(
                    "stop-and-copy: {why}, {:.1} ms expected",
                    millis(expected_pause)
                ));
                return Ok(());
            }
            Decision::Continue { wait, .. } => {
                // A rest is what the policy asks for once it has given up.
                let hopeless = !wait.is_zero();
                let slower = match &mut brake {
                    Some(brake) => brake.after_round(hopeless, scan.bytes(), precopy.sent_bytes())?,
                    None => None,
                };
                if let Some(percent) = slower {
                    recorder.note(format!(
                        "the guest writes faster than its memory is sent: its vCPUs stand still for {percent} % of their \
                         time from here on"
                    ));
                }
                precopy.send(recorder, scan)?;
                if hopeless && brake.as_ref().is_none_or(|brake| brake.is_spent()) {
                    place.signals.wait_for_qemu(deadline(wait), |_| false)?;
                }
            }
        }
    }
}

/// What the destination says of an error that looks like its absence: it may have ended the migration itself, and
/// breaks off all connections but the one on which it says why.
fn last_words(place: &Place<'_>, control: &mut Connection, error: Error) -> Error {
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

/// The connections of a session.
struct Links {
    /// The destination host's name.
    peer: String,
    control: Connection,
    data: Vec<DataSender>,
    device_state: Connection,
    return_path: Connection,
}

impl Links {
    fn connect(
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

fn out_of_turn(answer: &Answer) -> Error {
    Error::Elsewhere(format!(
        "the destination's engine answered out of turn: {answer:?}"
    ))
}

/// Pre-copy is done: what is left fits the pause. The streams stay open.
struct Converged {
    control: Connection,
    ready: Ready,
}

/// All but the control connection, which outlives a failure to tell of it.
struct Ready {
    session: Uuid,
    watch: Arc<Watch>,
    precopy: Precopy,
    brake: Option<Brake>,
    device_state: Connection,
    return_path: Connection,
}

impl Converged {
    fn stop_and_copy(
        self,
        place: &Place<'_>,
        options: &Options,
        recorder: &mut Recorder,
    ) -> Result<Moved, Error> {
        let Self { mut control, ready } = self;
        let watch = Arc::clone(&ready.watch);
        let (pause, spent) = ready
            .stop_and_copy(place, options, recorder, &mut control)
            .map_err(|error| last_words(place, &mut control, error))?;
        Ok(Moved {
            watch,
            control,
            pause,
            spent,
        })
    }
}

impl Ready {
    /// Lets libvirt begin QEMU's own migration, and copies on until the guest stands still; then the last copy,
    /// and the commitment.
    fn stop_and_copy(
        self,
        place: &Place<'_>,
        options: &Options,
        recorder: &mut Recorder,
        control: &mut Connection,
    ) -> Result<(SourcePause, Spent), Error> {
        let Self {
            mut precopy,
            mut brake,
            watch,
            ..
        } = self;
        precopy.sweep()?;
        let door = Door::open(&place.settings.runtime_directory, self.session)?;
        let socket = door.path().to_owned();
        relay::from_source(
            door,
            Arc::clone(&watch),
            place.signals,
            self.device_state,
            self.return_path,
        )?;
        watch.ignore_shared()?;
        place.control.reply(Reply::Switchover { socket });
        let mut step = STEP;
        loop {
            let begun = place.signals.seen().migrating;
            // While libvirt copies disks, rounds are rare: nobody waits for them.
            let early = options.storage && !begun;
            if begun {
                // QEMU is about to stop the vCPUs, which is not to wait for them to be let go.
                brake = None;
                // A drain asked for now would be answered only once they have stopped, and hold up the last copy.
                step = IMMINENT;
            }
            let done = |seen: &Seen| seen.drained.is_some() || seen.failed || !begun && seen.migrating;
            let waited = place.signals.wait_for_qemu(deadline(step), done)?;
            let seen = place.signals.seen();
            match waited {
                Some(true) if seen.failed => return Err(Error::Libvirt),
                Some(true) if seen.drained.is_some() => break,
                // It has just begun.
                Some(true) => {}
                // libvirt's Perform is over, and QEMU never came to its switch-over.
                Some(false) => return Err(Error::Libvirt),
                None => {
                    let began = Instant::now();
                    if early {
                        precopy.sweep_again()?;
                    }
                    let scan = precopy.scan()?;
                    // From the switch-over on QEMU may not answer before its device state is out.
                    if precopy.pending() > 0 && place.signals.seen().drained.is_none() {
                        precopy.send(recorder, scan)?;
                    }
                    step = match early {
                        true => (began.elapsed() * REST).clamp(STEP, LONGEST_STEP),
                        false => STEP,
                    };
                }
            }
        }
        drop(brake);
        recorder.enter(Stage::StopAndCopy);
        let seen = place.signals.seen();
        let drained = seen.drained.unwrap_or_else(Instant::now);
        let last = precopy.last()?;
        recorder.enter(Stage::Commitment);
        let files = last.blocks.iter().map(|block| &block.file);
        let memory = place
            .settings
            .verify_memory
            .then(|| verify::digest(files))
            .transpose()?;
        if memory.is_some() {
            recorder.note("every byte of the guest's memory is compared on both hosts (verify_memory)");
        }
        control.set_deadline(Some(deadline(COMMIT)))?;
        match message::ask(
            control,
            &Ask::Commit {
                totals: last.totals.clone(),
                memory,
            },
        )? {
            Answer::Committed => {}
            Answer::Refused { cause, host } => return Err(Error::Refused { cause, host }),
            other => return Err(out_of_turn(&other)),
        }
        place.signals.commit();
        let pause = SourcePause {
            stop_ms: millis(drained - seen.stopped.unwrap_or(drained).min(drained)),
            last_copy_ms: millis(drained.elapsed()),
            pages: last.pages,
            bytes: last.sent.data,
        };
        recorder.totals(report::Totals::from_streams(&last.totals));
        Ok((pause, last.spent))
    }
}

/// The destination has committed: it holds the guest's memory, and device state is on its way.
struct Moved {
    watch: Arc<Watch>,
    control: Connection,
    pause: SourcePause,
    spent: Spent,
}

impl Moved {
    /// libvirt's Perform is over. Had it failed, the guest would go on here; either way its QEMU must not ignore
    /// its memory any longer.
    fn performed(self, place: &Place<'_>) -> Result<HandedOver, Error> {
        // A migration that QEMU or libvirt gives up now: a save that waits for its end must find the RAM.
        if place
            .signals
            .wait_for_qemu(deadline(UNTIL_PERFORM), |seen| seen.failed)?
            == Some(true)
        {
            return Err(Error::Libvirt);
        }
        match place.signals.next_request(None) {
            Some(Request::Performed { success: true }) => {
                self.watch.honour_shared(CLEAR)?;
                place.control.reply(Reply::Committed);
                Ok(HandedOver {
                    control: self.control,
                    pause: self.pause,
                    _spent: self.spent,
                })
            }
            Some(Request::Performed { success: false }) => {
                place.signals.check()?;
                Err(Error::Libvirt)
            }
            Some(_) => Err(Error::Elsewhere("the plug-in asked out of turn".into())),
            None => Err(Error::Abandoned),
        }
    }
}

/// The guest is the destination's; its QEMU here stands still until libvirt ends it.
struct HandedOver {
    control: Connection,
    pause: SourcePause,
    /// Let go of in the end: as a rule libvirt has ended this QEMU by then, and nothing is left to lift.
    _spent: Spent,
}

impl HandedOver {
    /// libvirt is about to end the guest here, or to resume it because its client heard nothing good of the
    /// destination. The guest is the destination's now, so only the destination can give it back.
    fn conclude(mut self, place: &Place<'_>, mut recorder: Recorder) {
        recorder.enter(Stage::Activation);
        let Some(Request::Conclude { success }) = place.signals.next_request(Some(deadline(UNTIL_PERFORM)))
        else {
            return save(
                place,
                &recorder.fail("libvirt's daemon ended before it confirmed the migration"),
            );
        };
        let (timeline, reply) = match (self.resumed(), success) {
            (Ok(Answer::Resumed { pause }), success) => {
                recorder.downtime(downtime(self.pause, pause));
                let reply = if success {
                    Reply::Concluded
                } else {
                    Reply::RunsThere
                };
                (recorder.finish(Outcome::Completed), reply)
            }
            (Err(error), true) => {
                recorder.note(format!("the destination did not say when the guest ran: {error}"));
                (recorder.finish(Outcome::Completed), Reply::Concluded)
            }
            (Ok(_), true) => (recorder.finish(Outcome::Completed), Reply::Concluded),
            (Ok(_), false) => {
                let timeline = recorder.fail("the destination could not resume the guest; it goes on here");
                (timeline, Reply::Concluded)
            }
            (Err(error), false) => {
                let cause = format!(
                    "whether the guest runs at the destination is not known ({error}); it stays paused here"
                );
                (recorder.fail(cause), Reply::Unknown)
            }
        };
        save(place, &timeline);
        place.control.reply(reply);
    }

    fn resumed(&mut self) -> Result<Answer, Error> {
        self.control.set_deadline(Some(deadline(RESUMED)))?;
        match message::ask(&mut self.control, &Ask::Resumed { pause: self.pause })? {
            answer @ (Answer::Resumed { .. } | Answer::NotResumed) => Ok(answer),
            other => Err(out_of_turn(&other)),
        }
    }
}

/// The migration failed before the destination owned the guest: nothing of ours may stay with it here. What the
/// stages held (tracking, connections, sockets) went with them.
fn undo(place: &Place<'_>, watch: &Watch, recorder: Recorder, error: &Error) -> Result<(), Error> {
    place.signals.end(End::Failed(error.to_string()));
    let cleared = watch.honour_shared(CLEAR);
    if let Err(left) = &cleared {
        // QEMU itself is gone, most likely, and its memory with it; the plug-in tries once more.
        tracing::warn!("x-ignore-shared may still be on: {left}");
    }
    let outcome = match error {
        Error::Cancelled => Outcome::Cancelled,
        error => Outcome::Failed {
            stage: recorder.stage(),
            error: error.to_string(),
        },
    };
    save(place, &recorder.finish(outcome));
    place.control.reply(Reply::Failed(error.failure(&place.host)));
    cleared
}

/// Writes the timeline down; a full disk must not fail a migration.
fn save(place: &Place<'_>, timeline: &report::Timeline) {
    report::publish(timeline, &place.settings.log_directory);
}
