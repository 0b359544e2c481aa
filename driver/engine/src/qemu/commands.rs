//! The QMP commands a migration needs, typed.

use std::fmt;
use std::time::Instant;

use serde_json::{json, Value};
use uuid::Uuid;

use super::monitor::{Monitor, MonitorError};

/// More than any machine type of QEMU 10.0 has.
const MAX_VCPUS: usize = 4096;

/// A QEMU version. Compares as versions do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// State of QEMU's own migration (qapi/migration.json, MigrationStatus; QEMU 10.0).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrationStatus {
    /// There has been none.
    None,
    /// Begun, nothing sent but the header.
    Setup,
    /// Sending or receiving; the guest runs on the source.
    Active,
    /// vCPUs stopped, block I/O drained, waiting for `migrate-continue`.
    PreSwitchover,
    /// Sending device state.
    Device,
    /// Done.
    Completed,
    /// Failed; the source's guest runs on.
    Failed,
    /// Being cancelled.
    Cancelling,
    /// Cancelled; the source's guest runs on.
    Cancelled,
    /// Any other: postcopy, COLO, wait-unplug …
    Other(String),
}

impl MigrationStatus {
    /// From QEMU's name of it, as in `query-migrate` and the MIGRATION event.
    pub fn parse(name: &str) -> Self {
        match name {
            "none" => MigrationStatus::None,
            "setup" => MigrationStatus::Setup,
            "active" => MigrationStatus::Active,
            "pre-switchover" => MigrationStatus::PreSwitchover,
            "device" => MigrationStatus::Device,
            "completed" => MigrationStatus::Completed,
            "failed" => MigrationStatus::Failed,
            "cancelling" => MigrationStatus::Cancelling,
            "cancelled" => MigrationStatus::Cancelled,
            other => MigrationStatus::Other(other.to_owned()),
        }
    }
}

/// QEMU's capability that keeps shared, named RAM files out of its stream.
const IGNORE_SHARED: &str = "x-ignore-shared";

impl Monitor {
    /// QEMU's version, from its greeting.
    ///
    /// # Errors
    /// When the greeting held none.
    pub fn version(&self) -> Result<Version, MonitorError> {
        let version = &self.greeting()["version"]["qemu"];
        let part = |key: &str| {
            version
                .get(key)
                .and_then(Value::as_u64)
                .and_then(|part| part.try_into().ok())
        };
        match (part("major"), part("minor"), part("micro")) {
            (Some(major), Some(minor), Some(micro)) => Ok(Version { major, minor, micro }),
            _ => Err(self.protocol("a greeting without a version")),
        }
    }

    /// Returns when all block I/O in flight has landed in guest RAM: `transaction` with an empty list runs
    /// bdrv_drain_all() (blockdev.c, QEMU 7.2 and 10.0). Without it between a scan and the copying, direct I/O that
    /// was in flight at the scan is lost.
    ///
    /// # Errors
    /// As [`Monitor::execute`], and a time-out once `moot` is so. A hung disk makes it time out; it must then not be taken
    /// for done.
    pub fn drain(&mut self, deadline: Instant, moot: impl Fn() -> bool) -> Result<(), MonitorError> {
        self.execute_unless("transaction", json!({ "actions": [] }), deadline, moot)
            .map(drop)
    }

    /// Switches the capability `x-ignore-shared`. Left on, every save, snapshot and native migration of the guest
    /// would lose its RAM.
    ///
    /// # Errors
    /// As [`Monitor::execute`]; QEMU refuses while it migrates.
    pub fn set_ignore_shared(&mut self, on: bool, deadline: Instant) -> Result<(), MonitorError> {
        let capabilities = json!([{ "capability": IGNORE_SHARED, "state": on }]);
        self.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": capabilities }),
            deadline,
        )
        .map(drop)
    }

    /// Whether the capability `x-ignore-shared` is on.
    ///
    /// # Errors
    /// As [`Monitor::execute`]; also when QEMU does not know the capability.
    pub fn ignore_shared(&mut self, deadline: Instant) -> Result<bool, MonitorError> {
        let list = self.execute("query-migrate-capabilities", json!({}), deadline)?;
        let mut list = list.as_array().into_iter().flatten();
        list.find(|entry| entry["capability"] == IGNORE_SHARED)
            .and_then(|entry| entry["state"].as_bool())
            .ok_or_else(|| self.protocol("no migration capability x-ignore-shared"))
    }

    /// Stops the vCPUs and waits for the block I/O in flight, as QEMU does before it saves a guest.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn stop(&mut self, deadline: Instant) -> Result<(), MonitorError> {
        self.execute("stop", json!({}), deadline).map(drop)
    }

    /// State of QEMU's own migration, outgoing or incoming.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn migration_status(&mut self, deadline: Instant) -> Result<MigrationStatus, MonitorError> {
        let answer = self.execute("query-migrate", json!({}), deadline)?;
        Ok(MigrationStatus::parse(
            answer.get("status").and_then(Value::as_str).unwrap_or("none"),
        ))
    }

    /// The guest's downtime limit, milliseconds, as an administrator or OpenStack set it.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn downtime_limit_ms(&mut self, deadline: Instant) -> Result<u64, MonitorError> {
        let answer = self.execute("query-migrate-parameters", json!({}), deadline)?;
        let limit = answer.get("downtime-limit").and_then(Value::as_u64);
        limit.ok_or_else(|| self.protocol("no downtime-limit among the migration parameters"))
    }

    /// The threads of the vCPUs, as QEMU says; at most as many as QEMU has vCPUs at all.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn vcpu_threads(&mut self, deadline: Instant) -> Result<Vec<i32>, MonitorError> {
        let answer = self.execute("query-cpus-fast", json!({}), deadline)?;
        let cpus = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        let threads = cpus.iter().take(MAX_VCPUS).filter_map(|cpu| {
            let thread = cpu.get("thread-id").and_then(Value::as_i64)?;
            i32::try_from(thread).ok().filter(|thread| *thread > 0)
        });
        Ok(threads.collect())
    }

    /// The guest's UUID, as libvirt gave it to QEMU.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn uuid(&mut self, deadline: Instant) -> Result<Uuid, MonitorError> {
        let answer = self.execute("query-uuid", json!({}), deadline)?;
        let uuid = answer.get("UUID").and_then(Value::as_str);
        uuid.and_then(|uuid| uuid.parse().ok())
            .ok_or_else(|| self.protocol("query-uuid without a UUID"))
    }
}
