//! The brake on a guest that writes faster than its link: the policy of auto-converge, and the vCPUs it slows down.
//!
//! Asked for (`virsh migrate --auto-converge`), it acts as soon as rounds do not get anywhere, as QEMU does. Unasked, it
//! is the last resort: where a guest's rounds are used up without one moment that met the downtime target, nothing else
//! ends the migration, and a guest that is slow for a minute is better off than one that can never leave its host.
//! `auto_converge = false` in the configuration leaves such a guest alone.

use super::auto_converge::AutoConverge;
use super::watch::{deadline, Watch, COMMAND};
use super::Error;
use crate::control::Meter;
use crate::qemu::{Process, Throttle};
use ferry_contract::control;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

/// Larger steps than QEMU's: 30 rounds have been tried before.
const LAST_RESORT: control::AutoConverge = control::AutoConverge {
    initial: 40,
    increment: 20,
};

/// When the brake may act.
#[derive(Debug, Clone, Copy)]
pub enum Use {
    /// From the start.
    Asked(control::AutoConverge),
    /// As a last resort.
    LastResort,
    /// Never.
    Never,
}

/// A guest's brake; let go when this is dropped.
pub struct Brake {
    last_resort: bool,
    policy: AutoConverge,
    process: Process,
    watch: Arc<Watch>,
    meter: Arc<Meter>,
    /// Once it is needed.
    throttle: Option<Throttle>,
}

impl Brake {
    /// Nothing is slowed down yet.
    pub fn new(allowed: Use, process: &Process, watch: &Arc<Watch>, meter: &Arc<Meter>) -> Option<Self> {
        let (last_resort, wanted) = match allowed {
            Use::Asked(wanted) => (false, wanted),
            Use::LastResort => (true, LAST_RESORT),
            Use::Never => return None,
        };
        Some(Self {
            last_resort,
            policy: AutoConverge::new(wanted),
            process: process.clone(),
            watch: Arc::clone(watch),
            meter: Arc::clone(meter),
            throttle: None,
        })
    }

    /// After a round that sent so much and left so much to be sent again, `hopeless` once the rounds are used up: how much
    /// of their time the vCPUs stand still from now on, in percent, where that changes.
    pub fn after_round(
        &mut self,
        hopeless: bool,
        dirty_bytes: u64,
        sent_bytes: u64,
    ) -> Result<Option<u8>, Error> {
        if self.last_resort && !hopeless && self.throttle.is_none() {
            return Ok(None);
        }
        let Some(percent) = self.policy.next(dirty_bytes, sent_bytes) else {
            return Ok(None);
        };
        let throttle = match &mut self.throttle {
            Some(throttle) => throttle,
            none => {
                let threads = self
                    .watch
                    .command(|monitor| monitor.vcpu_threads(deadline(COMMAND)))?;
                none.insert(Throttle::new(&self.process, threads).map_err(Error::system("start a thread"))?)
            }
        };
        throttle.set(percent);
        self.meter.throttle.store(u64::from(percent), Relaxed);
        Ok(Some(percent))
    }

    /// It slows the guest down.
    pub fn is_on(&self) -> bool {
        self.throttle.is_some()
    }

    /// It cannot help any further.
    pub fn is_spent(&self) -> bool {
        self.policy.is_spent()
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        self.meter.throttle.store(0, Relaxed);
    }
}
