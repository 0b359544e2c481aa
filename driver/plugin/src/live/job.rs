//! The job as users see it: the engine's figures in libvirt's fields.

use super::{moved, options};
use crate::libvirt::job::{integer, leaving, List};
use crate::libvirt::{Cookie, Domain};
use crate::sessions::{self, Role};
use ferry_contract::control::{Request, Statistics};
use ferry_contract::cookie;
use ferry_contract::session::PAGE;
use std::ffi::CStr;
use std::os::raw::c_int;
use std::time::Duration;
use virt_sys::*;

/// The engine's part of a job.
pub struct Progress(Statistics);

/// How far the guest is, where the engine moves it away from here; before anything has been counted, libvirt's
/// own figures stand.
pub fn progress(domain: Domain) -> Option<Progress> {
    let session = sessions::by_uuid(Role::Source, domain.guest()?.uuid)?;
    let statistics = session.engine.statistics();
    (statistics.total > 0).then_some(Progress(statistics))
}

/// A guest that stands still while the last of its memory is copied. Its QEMU answers nobody then, so that whoever asked
/// libvirt for the job would be answered after the pause, and could not give it up (libvirt 11.3, QEMU 10.0).
pub struct Standstill {
    progress: Progress,
    elapsed: Duration,
}

/// How far the guest is, where that is so, for a user who may look at it.
pub fn standstill(domain: Domain) -> Option<Standstill> {
    let session = sessions::by_uuid(Role::Source, domain.guest()?.uuid)?;
    let statistics = session.engine.statistics();
    if !statistics.silent || session.engine.has_failed() || session.engine.is_gone() {
        return None;
    }
    // Whether it runs is told to whom it may be told, also now.
    domain.is_shut_off().ok()?;
    Some(Standstill {
        progress: Progress(statistics),
        elapsed: session.started.elapsed(),
    })
}

/// What the engine did in the job that a guest has completed, where that was its move away from here. `libvirts` are
/// the figures that libvirt has of it; where they are of another job, ours are outdated.
pub fn completed(domain: Domain, libvirts: &[virTypedParameter]) -> Option<Progress> {
    let uuid = domain.guest()?.uuid;
    let moved = moved::of(uuid)?;
    let operation = integer(libvirts, VIR_DOMAIN_JOB_OPERATION);
    if operation != Some(VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT as c_int) {
        moved::forget(uuid);
        return None;
    }
    Some(Progress(moved))
}

/// libvirt has forgotten what the guest's completed job did.
pub fn forget(domain: Domain) {
    if let Some(guest) = domain.guest() {
        moved::forget(guest.uuid);
    }
}

/// Adds the engine's figures to those of libvirt's that go from the source to the destination.
pub fn in_cookie(cookie: Cookie, statistics: Statistics) -> Cookie {
    let figures = Progress(statistics).figures(Known::default(), Known::default());
    let names = figures
        .iter()
        .filter_map(|(name, value)| Some((name.to_str().ok()?, *value)));
    match cookie::with_figures(cookie.bytes(), names) {
        Ok(bytes) => Cookie::copy_of(&bytes),
        Err(error) => {
            tracing::warn!("the destination will not know how much was moved: {error}");
            cookie
        }
    }
}

/// Whether the guest's job, as it is now, is its migration away from here. One that waits for its turn has no session yet,
/// and the job is another's until then: a dump that is given up is none of ours.
pub fn is_ours(domain: Domain) -> bool {
    let Some(guest) = domain.guest() else {
        return false;
    };
    sessions::by_uuid(Role::Source, guest.uuid).is_some()
        || sessions::is_opening(guest.uuid)
            && domain.job_operation() == Some(VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT as c_int)
}

/// Cancels the migration of a guest that the engine moves away from here.
pub fn cancel(domain: Domain) {
    if let Some(guest) = domain.guest() {
        sessions::cancel(guest.uuid);
    }
}

/// Limits the bandwidth of a guest's migration away from here, in libvirt's MiB/s.
pub fn limit(domain: Domain, mib: u64) {
    let session = domain
        .guest()
        .and_then(|guest| sessions::by_uuid(Role::Source, guest.uuid));
    // libvirt has refused what is out of range.
    if let (Some(session), Ok(bandwidth)) = (session, options::bandwidth(mib)) {
        if let Err(failure) = session.engine.tell(&Request::Limit { bandwidth }) {
            tracing::warn!(%failure, guest = session.guest.name, "the engine was not told of the new speed");
        }
    }
}

/// What libvirt knows of something, in bytes.
#[derive(Clone, Copy, Default)]
struct Known {
    total: u64,
    processed: u64,
}

impl Progress {
    /// Bytes dealt with, in libvirt's sense: what is no longer remaining.
    fn processed(&self) -> u64 {
        self.0.total.saturating_sub(self.0.remaining)
    }

    /// What the engine adds to libvirt's figures, which know the disks and the small blocks in QEMU's own stream. Once
    /// QEMU does not ignore the guest's memory any more, its total (`known`) has that memory in it.
    ///
    /// What libvirt calls processed of these blocks is what QEMU has transferred, which may be more than there is: together it
    /// is never more than the total.
    fn figures(&self, memory: Known, data: Known) -> [(&'static CStr, u64); 12] {
        let total = match memory.total < self.0.total {
            true => self.0.total,
            false => 0,
        };
        let processed = |known: Known| {
            let room = (known.total + total).saturating_sub(known.processed);
            self.processed().min(room)
        };
        [
            (VIR_DOMAIN_JOB_MEMORY_TOTAL, total),
            (VIR_DOMAIN_JOB_MEMORY_PROCESSED, processed(memory)),
            (VIR_DOMAIN_JOB_MEMORY_REMAINING, self.0.remaining),
            (VIR_DOMAIN_JOB_DATA_TOTAL, total),
            (VIR_DOMAIN_JOB_DATA_PROCESSED, processed(data)),
            (VIR_DOMAIN_JOB_DATA_REMAINING, self.0.remaining),
            (VIR_DOMAIN_JOB_MEMORY_CONSTANT, self.0.zero / PAGE),
            (VIR_DOMAIN_JOB_MEMORY_NORMAL, self.0.data / PAGE),
            (VIR_DOMAIN_JOB_MEMORY_NORMAL_BYTES, self.0.data),
            (VIR_DOMAIN_JOB_MEMORY_BPS, self.0.bandwidth),
            (VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE, self.0.dirty_rate),
            (VIR_DOMAIN_JOB_MEMORY_ITERATION, self.0.iteration),
        ]
    }

    /// Adds the engine's figures to libvirt's.
    pub fn complete_info(&self, info: &mut virDomainJobInfo) {
        let known = |total, processed| Known { total, processed };
        let memory = known(info.memTotal, info.memProcessed);
        let data = known(info.dataTotal, info.dataProcessed);
        let [(_, total), (_, of_memory), _, _, (_, of_data), ..] = self.figures(memory, data);
        info.memTotal += total;
        info.memProcessed += of_memory;
        info.memRemaining += self.0.remaining;
        info.dataTotal += total;
        info.dataProcessed += of_data;
        info.dataRemaining += self.0.remaining;
    }

    /// [`Self::complete_info`] for the typed list.
    pub fn complete_stats(&self, params: &mut virTypedParameterPtr, count: &mut c_int) {
        let mut list = List::take(params, count);
        let mut known = |total, processed| Known {
            total: list.number(total).unwrap_or(0),
            processed: list.number(processed).unwrap_or(0),
        };
        let memory = known(VIR_DOMAIN_JOB_MEMORY_TOTAL, VIR_DOMAIN_JOB_MEMORY_PROCESSED);
        let data = known(VIR_DOMAIN_JOB_DATA_TOTAL, VIR_DOMAIN_JOB_DATA_PROCESSED);
        for (name, value) in self.figures(memory, data) {
            list.add(name, value);
        }
        if self.0.throttle > 0 && list.find(VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE).is_none() {
            list.add_integer(VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE, self.0.throttle as c_int);
        }
        if list.find(VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE).is_none() {
            list.add(VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE, PAGE);
        }
        list.give_back(params, count);
    }
}

impl Standstill {
    /// As libvirt's structure has it.
    pub fn info(&self) -> virDomainJobInfo {
        let mut info = leaving(self.elapsed);
        self.progress.complete_info(&mut info);
        info
    }

    /// As libvirt's typed list has it; the list is made, from malloc.
    pub fn stats(&self, kind: &mut c_int, params: &mut virTypedParameterPtr, count: &mut c_int) {
        *kind = VIR_DOMAIN_JOB_UNBOUNDED as c_int;
        List::leaving(self.elapsed).give_back(params, count);
        self.progress.complete_stats(params, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_added_to_libvirts() {
        let progress = Progress(Statistics {
            total: 100,
            remaining: 40,
            data: 8192,
            ..Default::default()
        });
        let (mut params, mut count, mut room) = (std::ptr::null_mut(), 0, 0);
        let value = |params, count, name: &CStr| {
            let mut value = 0;
            // SAFETY: a list made here.
            let found = unsafe { virTypedParamsGetULLong(params, count, name.as_ptr(), &mut value) };
            (found, value)
        };
        // SAFETY: libvirt's thread-local error needs its one-time set-up; the list is made and freed here.
        unsafe {
            assert_eq!(virInitialize(), 0);
            let total = VIR_DOMAIN_JOB_MEMORY_TOTAL.as_ptr();
            assert_eq!(
                virTypedParamsAddULLong(&mut params, &mut count, &mut room, total, 7),
                0
            );
            // QEMU has transferred more than there was.
            let processed = VIR_DOMAIN_JOB_MEMORY_PROCESSED.as_ptr();
            assert_eq!(
                virTypedParamsAddULLong(&mut params, &mut count, &mut room, processed, 50),
                0
            );
            progress.complete_stats(&mut params, &mut count);
            assert_eq!(value(params, count, VIR_DOMAIN_JOB_MEMORY_TOTAL), (1, 107));
            assert_eq!(value(params, count, VIR_DOMAIN_JOB_MEMORY_PROCESSED), (1, 107));
            assert_eq!(value(params, count, VIR_DOMAIN_JOB_DATA_PROCESSED), (1, 60));
            assert_eq!(value(params, count, VIR_DOMAIN_JOB_MEMORY_NORMAL), (1, 2));
            virTypedParamsFree(params, count);
        }
    }
}
