//! The job as users see it. A guest that is shut off has none of libvirt's, so what its cold migration is at is answered
//! here alone.

use super::sessions::{self, Session};
use crate::libvirt::job::{leaving, List};
use crate::libvirt::Domain;
use ferry_contract::cold::journal::Role;
use ferry_contract::control::Statistics;
use std::os::raw::c_int;
use std::sync::Arc;
use std::time::Duration;
use virt_sys::*;

/// The cold migration of a guest away from here, or of its disks to another place here, for a user who may look at it.
fn session(domain: Domain) -> Option<Arc<Session>> {
    let uuid = domain.guest()?.uuid;
    let session = sessions::by_uuid(Role::Source, uuid).or_else(|| sessions::by_uuid(Role::Within, uuid))?;
    // Whether it runs is told to whom it may be told.
    (!session.engine.is_gone() && domain.is_shut_off().is_ok()).then_some(session)
}

/// How far a guest is.
pub struct Progress {
    figures: Statistics,
    elapsed: Duration,
}

/// How far the guest is, where its files move away from here.
pub fn progress(domain: Domain) -> Option<Progress> {
    let session = session(domain)?;
    Some(Progress {
        figures: session.engine.statistics(),
        elapsed: session.started.elapsed(),
    })
}

/// Cancels the cold migration of a guest away from here; `false` where there is none.
pub fn cancel(domain: Domain) -> bool {
    match session(domain).filter(|_| domain.may_migrate()) {
        Some(session) => {
            session.cancel();
            true
        }
        None => false,
    }
}

impl Progress {
    fn processed(&self) -> u64 {
        self.figures.total.saturating_sub(self.figures.remaining)
    }

    /// As libvirt's structure has it.
    pub fn info(&self) -> virDomainJobInfo {
        let mut info = leaving(self.elapsed);
        (info.dataTotal, info.fileTotal) = (self.figures.total, self.figures.total);
        (info.dataProcessed, info.fileProcessed) = (self.processed(), self.processed());
        (info.dataRemaining, info.fileRemaining) = (self.figures.remaining, self.figures.remaining);
        info
    }

    /// As libvirt's typed list has it; the list is made, from malloc.
    pub fn stats(&self, kind: &mut c_int, params: &mut virTypedParameterPtr, count: &mut c_int) {
        *kind = VIR_DOMAIN_JOB_UNBOUNDED as c_int;
        let Statistics {
            total,
            remaining,
            bandwidth,
            ..
        } = self.figures;
        let mut list = List::leaving(self.elapsed);
        for (name, value) in [
            (VIR_DOMAIN_JOB_DATA_TOTAL, total),
            (VIR_DOMAIN_JOB_DATA_PROCESSED, self.processed()),
            (VIR_DOMAIN_JOB_DATA_REMAINING, remaining),
            (VIR_DOMAIN_JOB_DISK_TOTAL, total),
            (VIR_DOMAIN_JOB_DISK_PROCESSED, self.processed()),
            (VIR_DOMAIN_JOB_DISK_REMAINING, remaining),
            (VIR_DOMAIN_JOB_DISK_BPS, bandwidth),
        ] {
            list.add(name, value);
        }
        list.give_back(params, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_in_libvirts_fields() {
        let progress = Progress {
            figures: Statistics {
                total: 100,
                remaining: 40,
                ..Default::default()
            },
            elapsed: Duration::from_secs(2),
        };
        let info = progress.info();
        assert_eq!(
            (info.dataTotal, info.fileProcessed, info.timeElapsed),
            (100, 60, 2000)
        );
        let (mut kind, mut params, mut count) = (0, std::ptr::null_mut(), 0);
        // SAFETY: libvirt's thread-local error needs its one-time set-up; the list is freed here.
        unsafe {
            assert_eq!(virInitialize(), 0);
            progress.stats(&mut kind, &mut params, &mut count);
            let mut value = 0;
            let name = VIR_DOMAIN_JOB_DISK_PROCESSED.as_ptr();
            assert_eq!(virTypedParamsGetULLong(params, count, name, &mut value), 1);
            assert_eq!((kind, value), (VIR_DOMAIN_JOB_UNBOUNDED as c_int, 60));
            virTypedParamsFree(params, count);
        }
    }
}
