//! The source's engine: the guest is here until the destination has committed.
//!
//! The stages are values, and each gives the next one away; what belongs to a later stage cannot be had earlier:
//!
//! ```text
//!   Inspected ──precopy──▶ Converged ──stop_and_copy──▶ Moved ──▶ concluded
//!       └──────────┴───────────────┴── error ──▶ everything undone, the guest runs on
//! ```
//!
//! [`converge`] and [`links`] are of the first arrow, [`switchover`] of what follows.

mod converge;
mod links;
mod switchover;

use converge::converge;
use links::{last_words, Links};
use switchover::{Converged, Ready};

use crate::control::{Control, Meter};
use crate::live::brake::{Brake, Use};
use crate::live::inspect::{self, Looked};
use crate::live::precopy::Precopy;
use crate::live::protection;
use crate::live::signals::{End, Signals};
use crate::live::watch::{deadline, Watch, COMMAND};
use crate::live::Error;
use crate::qemu::{nested, MonitorError, Process, RamBlock};
use crate::report::{self, Migration, Outcome, Ram, Recorder, Role, Stage};
use crate::wire::Identity;
use ferry_contract::control::{Options, Reply, Request, Settings};
use ferry_contract::cookie::{self, Offer};
use ferry_contract::session::{Block, Encryption, Guest};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a plug-in may take from Begin to Perform: the destination starts QEMU, and may fill its memory first.
const UNTIL_PERFORM: Duration = Duration::from_secs(15 * 60);
/// For QEMU to leave its own migration after a failure, so that the capability can be cleared.
const CLEAR: Duration = Duration::from_secs(20);

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
        } = inspect::look(&monitor, Some(place.guest.uuid), Arc::clone(place.signals))?;
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
        if !has_no_guests(&self.watch, deadline(COMMAND))? {
            return Err(Error::Elsewhere(format!(
                "QEMU did not say within {} s whether the guest runs guests of its own; is its storage reachable?",
                COMMAND.as_secs()
            )));
        }
        Ok(Converged {
            control: links.control,
            ready: Ready {
                session: self.offer.session,
                watch: self.watch,
                process: Arc::new(self.process),
                precopy,
                brake,
                device_state: links.device_state,
                return_path: links.return_path,
            },
        })
    }
}

/// Fails where the guest has begun to run guests of its own since it was found eligible; false where QEMU, whose main loop a slow
/// disk may hold up, has not said so by the deadline.
fn has_no_guests(watch: &Watch, deadline: Instant) -> Result<bool, Error> {
    match watch.command(|monitor| nested::in_the_way(monitor, deadline)) {
        Ok(false) => Ok(true),
        Ok(true) => Err(Error::Elsewhere(
            "the guest has begun to run guests of its own while it was migrated, which this host's CPU does past write \
             tracking; migrate it again: it goes libvirt's own way then"
                .into(),
        )),
        Err(Error::Monitor(MonitorError::Timeout { .. })) => Ok(false),
        Err(error) => Err(error),
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
