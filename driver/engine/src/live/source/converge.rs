//! Iterative pre-copy: rounds until what is left fits the pause.

use super::Place;
use crate::live::brake::Brake;
use crate::live::precopy::Precopy;
use crate::live::rounds::Decision;
use crate::live::watch::deadline;
use crate::live::Error;
use crate::report::{millis, Recorder};

/// The first pass, and rounds until what is left fits the pause.
pub(super) fn converge(
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
