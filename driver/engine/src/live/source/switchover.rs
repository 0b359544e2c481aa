//! From the last round on: stop-and-copy, commitment, and what the destination says afterwards.

use super::links::{last_words, out_of_turn};
use super::{has_no_guests, save, Place, CLEAR, UNTIL_PERFORM};
use crate::live::brake::Brake;
use crate::live::messages::{downtime, Answer, Ask, SourcePause};
use crate::live::precopy::{Last, Precopy, Spent};
use crate::live::relay::{self, Door};
use crate::live::signals::{End, Seen};
use crate::live::verify::Digests;
use crate::live::watch::{deadline, Watch};
use crate::live::Error;
use crate::qemu::Process;
use crate::report::{self, millis, Outcome, Recorder, Stage};
use crate::wire::{message, Connection};
use ferry_contract::control::{Options, Reply, Request};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// For the destination to compare and commit,
const COMMIT: Duration = Duration::from_secs(60);
/// and where it compares all memory, which it reads at about 3 GB/s, a second more for so many bytes.
const COMPARED: u64 = 1 << 30;
/// For the destination to say whether the guest runs; by then libvirt has been told by its own means.
const RESUMED: Duration = Duration::from_secs(20);
/// Between rounds while libvirt prepares the switch-over.
const STEP: Duration = Duration::from_millis(10);
/// Between rounds once QEMU's migration has begun: it has nothing to send but device state, and comes to its
/// switch-over within milliseconds.
const IMMINENT: Duration = Duration::from_millis(100);
/// For libvirt to let QEMU go on once the guest stands still; where it copies disks, it ends that first.
const CONTINUE: Duration = Duration::from_secs(15 * 60);
/// While libvirt copies disks, for which a guest may take hours: rounds rest for this many times as long as they work,
const REST: u32 = 4;
/// but not longer, so that the rest is small when libvirt is done.
const LONGEST_STEP: Duration = Duration::from_millis(500);

/// Pre-copy is done: what is left fits the pause. The streams stay open.
pub(super) struct Converged {
    pub(super) control: Connection,
    pub(super) ready: Ready,
}

/// All but the control connection, which outlives a failure to tell of it.
pub(super) struct Ready {
    pub(super) session: Uuid,
    pub(super) watch: Arc<Watch>,
    pub(super) process: Arc<Process>,
    pub(super) precopy: Precopy,
    pub(super) brake: Option<Brake>,
    pub(super) device_state: Connection,
    pub(super) return_path: Connection,
}

impl Converged {
    pub(super) fn stop_and_copy(
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
            session,
            mut precopy,
            brake,
            watch,
            process,
            device_state,
            return_path,
        } = self;
        let mut switchover = Switchover {
            place,
            watch: &watch,
            process,
            precopy: &mut precopy,
        };
        let outcome = switchover
            .begin(session, device_state, return_path)
            .and_then(|()| {
                let drained = switchover.until_drained(options, brake, recorder);
                // The guest may have stopped while a round was under way, which then is the pause's, also if it fails.
                if let Some(drained) = place.signals.seen().drained {
                    recorder.enter_at(Stage::StopAndCopy, drained);
                }
                drained?;
                let copied = switchover.last_copy(recorder)?;
                switchover.commit(copied, control, recorder)
            });
        if let Err(error) = &outcome {
            // QEMU's stream ends now, and the guest goes on: what is dropped next takes 50 ms a GiB.
            place.signals.end(match error {
                Error::Wire(error) => End::Lost(error.to_string()),
                Error::Cancelled => End::Cancelled,
                error => End::Failed(error.to_string()),
            });
        }
        outcome.map(|pause| (pause, precopy.spent()))
    }
}

/// From libvirt's Perform to the commitment.
struct Switchover<'a> {
    place: &'a Place<'a>,
    watch: &'a Arc<Watch>,
    process: Arc<Process>,
    precopy: &'a mut Precopy,
}

/// All of the guest's memory is on its way, and its QEMU's devices stand still.
struct Copied {
    last: Last,
    memory: Option<Digests>,
    /// How long it took until block I/O had drained,
    stop: Duration,
    /// and when that was.
    drained: Instant,
}

impl Switchover<'_> {
    /// Tells libvirt where to let QEMU migrate to.
    fn begin(
        &mut self,
        session: Uuid,
        device_state: Connection,
        return_path: Connection,
    ) -> Result<(), Error> {
        let Self { place, watch, .. } = self;
        self.precopy.sweep()?;
        let door = Door::open(&place.settings.runtime_directory, session)?;
        let socket = door.path().to_owned();
        let process = Arc::clone(&self.process);
        relay::from_source(
            door,
            Arc::clone(watch),
            process,
            place.signals,
            device_state,
            return_path,
        )?;
        watch.ignore_shared()?;
        place.control.reply(Reply::Switchover { socket });
        Ok(())
    }

    /// Copies on until the guest stands still and its block I/O has drained.
    fn until_drained(
        &mut self,
        options: &Options,
        mut brake: Option<Brake>,
        recorder: &mut Recorder,
    ) -> Result<(), Error> {
        let (place, precopy) = (self.place, &mut *self.precopy);
        if options.storage {
            place.signals.expect_mirrors();
        }
        let (mut step, mut looked) = (STEP, Instant::now());
        loop {
            let begun = place.signals.seen().migrating;
            // While libvirt copies disks, rounds are rare: nobody waits for them.
            let early = options.storage && !begun;
            if begun || early {
                // QEMU is about to stop the vCPUs, which is not to wait for them to be let go; and while disks are copied, a
                // guest that is held would be for hours, and for nothing.
                let held = brake.take().is_some_and(|brake| brake.is_on());
                if held && early {
                    recorder
                        .note("its vCPUs go on while disks are copied; the last pause may be longer for it");
                }
            }
            if begun {
                // A drain asked for now would be answered only once they have stopped, and hold up the last copy.
                step = IMMINENT;
            }
            let done = |seen: &Seen| seen.drained.is_some() || seen.failed || !begun && seen.migrating;
            let waited = place.signals.wait_for_qemu(deadline(step), done)?;
            let seen = place.signals.seen();
            match waited {
                Some(true) if seen.failed => return Err(Error::Libvirt),
                Some(true) if seen.drained.is_some() => {
                    if options.storage {
                        // The last look before it stood still is some rounds old, and QEMU answers until libvirt has ended
                        // its copies.
                        has_no_guests(self.watch, deadline(IMMINENT))?;
                    }
                    return Ok(());
                }
                // It has just begun.
                Some(true) => {}
                // libvirt's Perform is over, and QEMU never came to its switch-over.
                Some(false) => return Err(Error::Libvirt),
                None => {
                    let began = Instant::now();
                    if early && looked.elapsed() >= LONGEST_STEP {
                        // Where it does not say, it is asked again.
                        has_no_guests(self.watch, deadline(LONGEST_STEP))?;
                        looked = Instant::now();
                    }
                    precopy.sweep_again()?;
                    let scan = precopy.scan()?;
                    // From the switch-over on QEMU may not answer before its device state is out.
                    if precopy.pending() > 0 && place.signals.seen().drained.is_none() {
                        precopy.send(recorder, scan)?;
                    }
                    step = match early {
                        true => (began.elapsed() * REST).clamp(STEP, LONGEST_STEP),
                        // A scan makes the guest fault again on all it uses, so that it rests as long as it worked.
                        false => began.elapsed().clamp(STEP, IMMINENT),
                    };
                }
            }
        }
    }

    /// The last copy, in two steps. When block I/O has drained (pre-switchover), QEMU lets go of its big lock until libvirt
    /// lets it go on, and its main loop may still complete what the guest asked of devices that are no disks: virtio-gpu,
    /// pvscsi's and USB's completions write to guest memory then. Once it writes device state nothing does any more, so
    /// what is scanned from there on, while it cannot finish, is as old as that state. (QEMU 10.0,
    /// `migration_completion_precopy`; the last bitmap of its own RAM is taken there, `ram_save_complete`.)
    fn last_copy(&mut self, recorder: &mut Recorder) -> Result<Copied, Error> {
        let signals = self.place.signals;
        let seen = signals.seen();
        let drained = seen.drained.unwrap_or_else(Instant::now);
        self.precopy.settle()?;
        match signals.wait_for_qemu(deadline(CONTINUE), |seen| seen.frozen || seen.failed)? {
            Some(true) if signals.seen().frozen => {}
            Some(_) => return Err(Error::Libvirt),
            None => {
                return Err(Error::Elsewhere(format!(
                    "libvirt did not let QEMU go on within {} s of the guest's stop",
                    CONTINUE.as_secs()
                )))
            }
        }
        let last = self.precopy.last()?;
        // Before that QEMU's lock must not go, as its main loop would run again.
        let memory = match self.place.settings.verify_memory {
            true => Some(self.precopy.digest()?),
            false => None,
        };
        signals.copied();
        if memory.is_some() {
            recorder.note("every byte of the guest's memory is compared on both hosts (verify_memory)");
        }
        Ok(Copied {
            last,
            memory,
            stop: drained - seen.stopped.unwrap_or(drained).min(drained),
            drained,
        })
    }

    /// The destination compares what it has with what was sent.
    fn commit(
        &self,
        copied: Copied,
        control: &mut Connection,
        recorder: &mut Recorder,
    ) -> Result<SourcePause, Error> {
        recorder.enter(Stage::Commitment);
        let Last { totals, pages, bytes } = copied.last;
        recorder.totals(report::Totals::from_streams(&totals));
        let memory = copied.memory;
        let compared = memory.as_ref().map_or(0, |_| self.precopy.bytes() / COMPARED);
        control.set_deadline(Some(deadline(COMMIT + Duration::from_secs(compared))))?;
        let commit = Ask::Commit { totals, memory };
        match message::ask(control, &commit)? {
            Answer::Committed => {}
            Answer::Refused { cause, host } => return Err(Error::Refused { cause, host }),
            other => return Err(out_of_turn(&other)),
        }
        self.place.signals.commit();
        Ok(SourcePause {
            stop_ms: millis(copied.stop),
            last_copy_ms: millis(copied.drained.elapsed()),
            pages,
            bytes,
        })
    }
}

/// The destination has committed: it holds the guest's memory, and device state is on its way.
pub(super) struct Moved {
    watch: Arc<Watch>,
    control: Connection,
    pause: SourcePause,
    spent: Spent,
}

impl Moved {
    /// libvirt's Perform is over. Had it failed, the guest would go on here; either way its QEMU must not ignore
    /// its memory any longer.
    pub(super) fn performed(self, place: &Place<'_>) -> Result<HandedOver, Error> {
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
pub(super) struct HandedOver {
    control: Connection,
    pause: SourcePause,
    /// Let go of in the end: as a rule libvirt has ended this QEMU by then, and nothing is left to lift.
    _spent: Spent,
}

impl HandedOver {
    /// libvirt is about to end the guest here, or to resume it because its client heard nothing good of the
    /// destination. The guest is the destination's now, so only the destination can give it back.
    pub(super) fn conclude(mut self, place: &Place<'_>, mut recorder: Recorder) {
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
