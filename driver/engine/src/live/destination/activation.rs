//! libvirt's Finish, and whether the guest runs here after it.

use super::arrival::{Note, Told};
use super::Place;
use crate::live::messages::{downtime, DestinationPause, SourcePause};
use crate::live::protection;
use crate::live::watch::{deadline, Watch, COMMAND};
use crate::live::Error;
use crate::report::{self, millis, Outcome, Recorder, Stage};
use ferry_contract::control::{Reply, Request};
use ferry_contract::session::Encryption;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

/// For QEMU to load the device state after libvirt's source has finished.
const LOAD: Duration = Duration::from_secs(50);
/// For libvirt to conclude once the memory is here: it may run hooks and start networks first.
pub(super) const UNTIL_CONCLUDED: Duration = Duration::from_secs(15 * 60);
/// For the source to ask for the pause after libvirt's Finish; only the timeline waits for it.
const SOURCE_CONCLUDES: Duration = Duration::from_secs(10);

/// libvirt's Finish: only a committed guest, loaded whole, may be resumed.
pub(super) fn finish(
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
    // Should libvirt end the guest from here on, there must be somebody to tell the source so.
    place.signals.leave_cgroups();
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
pub(super) fn conclude(
    place: &Place<'_>,
    mut recorder: Recorder,
    notes: &Receiver<Note>,
    tell: &Sender<Told>,
) {
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
