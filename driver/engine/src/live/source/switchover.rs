//! From the last round on: stop-and-copy, commitment, and what the destination says afterwards.

use super::links::{last_words, out_of_turn};
use super::{save, Place, CLEAR, UNTIL_PERFORM};
use crate::live::brake::Brake;
use crate::live::messages::{downtime, Answer, Ask, SourcePause};
use crate::live::precopy::{Precopy, Spent};
use crate::live::relay::{self, Door};
use crate::live::signals::Seen;
use crate::live::verify;
use crate::live::watch::{deadline, Watch};
use crate::live::Error;
use crate::report::{self, millis, Outcome, Recorder, Stage};
use crate::wire::{message, Connection};
use ferry_contract::control::{Options, Reply, Request};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// For the destination to compare and commit.
const COMMIT: Duration = Duration::from_secs(60);
/// For the destination to say whether the guest runs; by then libvirt has been told by its own means.
const RESUMED: Duration = Duration::from_secs(20);
/// Between rounds while libvirt prepares the switch-over.
const STEP: Duration = Duration::from_millis(10);
/// Between rounds once QEMU's migration has begun: it has nothing to send but device state, and comes to its
/// switch-over within milliseconds.
const IMMINENT: Duration = Duration::from_millis(100);
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
