//! Pre-migration: can this guest be moved by us? Nothing about it changes.

use super::signals::Signals;
use super::watch::{deadline, Watch, COMMAND};
use super::Error;
use crate::memory::{probe, probe_huge, PAGE};
use crate::qemu::{discover, Process, RamBlock};
use ferry_contract::control::Verdict;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

/// An eligible guest.
pub struct Looked {
    /// Its QEMU's private monitor.
    pub watch: Arc<Watch>,
    /// Its QEMU.
    pub process: Process,
    /// Its memory, all of which can be moved.
    pub blocks: Vec<RamBlock>,
}

/// Looks at the guest behind a private monitor; where it is told who that must be, at no other.
///
/// # Errors
/// Why it is not eligible, for an administrator.
pub fn look(monitor: &Path, guest: Option<Uuid>, signals: Arc<Signals>) -> Result<Looked, Error> {
    kernel()?;
    let watch = Watch::open(monitor, signals)?;
    if let Some(guest) = guest {
        is(&watch, monitor, guest)?;
    }
    let pid = watch.command(|monitor| monitor.peer_pid())?;
    let process = Process::open(pid)?;
    let blocks = watch.command(|monitor| Ok(discover(monitor, &process, deadline(COMMAND))))??;
    let pages: BTreeSet<u64> = blocks.iter().map(|block| block.file.backing().page()).collect();
    for page in pages.into_iter().filter(|page| *page > PAGE) {
        probe_huge(page).map_err(|unsupported| Error::Elsewhere(unsupported.to_string()))?;
    }
    Ok(Looked {
        watch,
        process,
        blocks,
    })
}

/// Makes sure whose QEMU a monitor is: it was found by name and number.
///
/// # Errors
/// If it is another guest's.
pub fn is(watch: &Watch, monitor: &Path, guest: Uuid) -> Result<(), Error> {
    let found = watch.command(|monitor| monitor.uuid(deadline(COMMAND)))?;
    if found == guest {
        return Ok(());
    }
    Err(Error::Elsewhere(format!(
        "the QEMU behind {} is that of guest {found}, not of {guest}",
        monitor.display()
    )))
}

fn kernel() -> Result<(), Error> {
    probe().map_err(|unsupported| Error::Elsewhere(unsupported.to_string()))
}

/// The same for a person; without a monitor, only whether this host's kernel can do it.
pub fn verdict(monitor: Option<&Path>) -> Verdict {
    let sums = || match monitor {
        None => kernel().map(|()| (0, 0)),
        Some(monitor) => {
            let looked = look(monitor, None, Arc::default())?;
            looked.blocks.iter().try_fold((0, 0), |(bytes, resident), block| {
                Ok((
                    bytes + block.size,
                    resident + block.file.resident()?.min(block.size),
                ))
            })
        }
    };
    match sums() {
        Ok((bytes, resident)) => Verdict::Eligible { bytes, resident },
        Err(error) => Verdict::NotEligible {
            reason: error.to_string(),
        },
    }
}
