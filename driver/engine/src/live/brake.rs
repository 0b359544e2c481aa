//! The brake on a guest that writes faster than its link: the policy of auto-converge, and the vCPUs it slows down.

use super::auto_converge::AutoConverge;
use super::watch::{deadline, Watch, COMMAND};
use super::Error;
use crate::control::Meter;
use crate::qemu::{Process, Throttle};
use ferry_contract::control;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

/// A guest's brake; let go when this is dropped.
pub struct Brake {
    policy: AutoConverge,
    throttle: Throttle,
    meter: Arc<Meter>,
}

impl Brake {
    /// Finds the vCPUs; nothing is slowed down yet.
    pub fn new(
        wanted: control::AutoConverge,
        watch: &Watch,
        process: &Process,
        meter: Arc<Meter>,
    ) -> Result<Self, Error> {
        let threads = watch.command(|monitor| monitor.vcpu_threads(deadline(COMMAND)))?;
        Ok(Self {
            policy: AutoConverge::new(wanted),
            throttle: Throttle::new(process, threads).map_err(Error::system("start a thread"))?,
            meter,
        })
    }

    /// After a round that sent so much and left so much to be sent again; says so where the vCPUs become slower.
    pub fn after_round(&mut self, dirty_bytes: u64, sent_bytes: u64) -> Option<u8> {
        let percent = self.policy.next(dirty_bytes, sent_bytes)?;
        self.throttle.set(percent);
        self.meter.throttle.store(u64::from(percent), Relaxed);
        Some(percent)
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        self.meter.throttle.store(0, Relaxed);
    }
}
