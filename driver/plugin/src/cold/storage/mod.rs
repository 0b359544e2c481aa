//! The disks of a guest that is shut off go to another data store of the same host (`virt-ferry move-storage`).
//!
//! ```text
//!  Order ─▶ intent:  chains: every image of every disk ─▶ plan: what moves, where, which headers ─▶ rewrite: definitions
//!           engine: ColdMove ═══ fence, copy, verify, name ═══▶ placed
//!           libvirt defines the guest anew: the commitment
//!           engine: ColdOwned, ColdDelete ─▶ Report
//! ```
//!
//! The daemon does it, not the command: that may go, and the move comes to its end all the same.

mod chains;
pub mod ending;
mod intent;
mod plan;
mod rewrite;

use self::plan::Plan;
use super::sessions::{self, Session};
use super::{configuration, here, inventory, pools, recovery, unexpected};
use crate::engine::Engine;
use crate::libvirt::{Connection, Domain, Error};
use ending::Names;
use ferry_contract::cold::journal::Role;
use ferry_contract::cold::storage::{Moved, Order, Relocate, Report};
use ferry_contract::cold::Part;
use ferry_contract::config::{Config, SourceStorage};
use ferry_contract::control::{FailureKind, Reply, Request};
use ferry_contract::session::Guest;
use ferry_host as host;
use intent::Intent;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Does what an order says, and says what has been done; both are JSON.
///
/// # Errors
/// Everything that is in the way, or what failed; then the guest has the disks it had.
pub fn answer(connection: Connection, order: &str) -> Result<String, Error> {
    let order: Order = serde_json::from_str(order).map_err(|error| {
        here(format!(
            "an order that cannot be read: {error}; are virt-ferry and the plug-in of one release?"
        ))
    })?;
    let config = configuration().ok_or_else(|| here(crate::live::DISABLED))?;
    let domain = connection
        .domain_named(&order.guest)
        .ok_or_else(|| here(format!("there is no guest {}", order.guest)))?;
    let domain = domain.get();
    if !domain.may_migrate() {
        return Err(Error::libvirt());
    }
    let guest = domain
        .guest()
        .ok_or_else(|| here("libvirt does not say whose disks these are"))?;
    host::hook().map_err(here)?;
    let _held = recovery::hold(guest.uuid)?;
    let asked = Move {
        domain,
        guest,
        order,
        config,
    };
    let report = asked.run().inspect_err(|_| {
        // What a dead engine has left is undone.
        if recovery::is_pending(asked.guest.uuid) {
            recovery::watch(connection);
        }
    })?;
    serde_json::to_string(&report).map_err(here)
}

/// A guest whose disks are to move.
struct Move {
    domain: Domain,
    guest: Guest,
    order: Order,
    config: Config,
}

impl Move {
    fn run(&self) -> Result<Report, Error> {
        let name = &self.guest.name;
        let connection = self.domain.connection();
        if !self.domain.is_shut_off()? {
            return Err(self.refused(&[format!(
                "it runs: shut it down first (virsh shutdown {name}), or move each disk as it runs (virsh blockcopy {name} DISK \
                 --dest FILE --transient-job --wait --pivot)"
            )]));
        }
        recovery::settle(connection, Role::Within, &self.guest, &self.config)?;
        let (intent, mut problems) = Intent::of(self.domain, &self.guest, &self.order)?;
        let plan = &intent.plan;
        if plan.items.is_empty() && problems.is_empty() {
            return Ok(report(plan, &[]));
        }
        let engine = Engine::start(&self.config, "cold-move", &host::name()).map_err(here)?;
        let session = sessions::add(Session {
            role: Role::Within,
            guest: self.guest.clone(),
            engine,
            started: Instant::now(),
            arrived: None,
        });
        let _listed = Listed(Arc::clone(&session));
        let dry_run = self.order.dry_run || !problems.is_empty();
        let relocate = Relocate {
            guest: self.guest.clone(),
            host: host::name(),
            items: plan.items.clone(),
            places: plan.places.clone(),
            renames: plan.renames.clone(),
            metadata: intent.metadata.clone(),
            definition: intent.file.clone(),
            keep: self.config.cold.source_storage == SourceStorage::Keep,
            dry_run,
            settings: self.config.settings(),
        };
        match session.engine.ask(&Request::ColdMove(Box::new(relocate)), None) {
            Ok(Reply::ColdPlaced | Reply::ColdPlanned) => {}
            Ok(reply) => return Err(unexpected(&reply)),
            Err(failure) if failure.kind == FailureKind::Cancelled => {
                return Err(Error::aborted(format_args!(
                    "the disks of guest {name} stay where they are: canceled by client"
                )))
            }
            Err(failure) => problems.extend(failure.cause.lines().map(str::to_owned)),
        }
        if !problems.is_empty() {
            return Err(self.refused(&problems));
        }
        if dry_run {
            return Ok(report(plan, &items(plan)));
        }
        self.commit(&intent, &session.engine)
    }

    /// That it cannot be done, and why.
    fn refused(&self, problems: &[String]) -> Error {
        let all = match problems {
            [one] => format!(" {one}"),
            all => all.iter().map(|one| format!("\n  {one}")).collect(),
        };
        Error::operation(format_args!(
            "the disks of guest {} stay where they are on host {}:{all}",
            self.guest.name,
            host::name()
        ))
    }

    /// The copies are there, complete and named: from here on the guest has them, or the engine removes them.
    fn commit(&self, intent: &Intent, engine: &Engine) -> Result<Report, Error> {
        let connection = self.domain.connection();
        if let Err(error) = self.define(intent) {
            let tops = |paths: &[PathBuf]| -> Vec<PathBuf> {
                let of = intent.plan.items.iter().zip(paths);
                let tops = of.filter(|(item, _)| ending::is_top(&item.part));
                tops.map(|(_, path)| path.clone()).collect()
            };
            let (old, new) = (tops(&items(&intent.plan)), tops(&intent.plan.places));
            // Whatever libvirt says: nothing that its definition names is removed.
            if let Ok(Names::Old) = ending::names(connection, &self.guest, &old, &new) {
                ending::give_up(&self.guest, engine);
            }
            return Err(error);
        }
        let keep = self.config.cold.source_storage == SourceStorage::Keep;
        let deleted = ending::conclude(connection, &self.guest, engine, &intent.metadata, keep)?;
        pools::refresh(connection, intent.plan.places.iter().map(PathBuf::as_path));
        Ok(Report {
            kept: deleted.kept,
            ..report(&intent.plan, &intent.plan.places)
        })
    }

    /// Gives libvirt the new definition, if what it names is right and the old one is still what it was.
    fn define(&self, intent: &Intent) -> Result<(), Error> {
        intent.check().map_err(here)?;
        // It cannot be started since the journal was written; before that, only the images' locks kept it from it.
        if !self.domain.is_shut_off()? {
            return Err(here("the guest was started while its files were looked at"));
        }
        if inventory::definition_file(&self.guest.name) != intent.file {
            return Err(here(
                "the guest's definition was changed while its files were copied: try again",
            ));
        }
        self.domain.connection().define(&intent.xml).map(drop)
    }
}

/// A session that somebody may look at, until this is dropped.
struct Listed(Arc<Session>);

impl Drop for Listed {
    fn drop(&mut self) {
        sessions::take(&self.0);
    }
}

fn items(plan: &Plan) -> Vec<PathBuf> {
    plan.items.iter().map(|item| item.path.clone()).collect()
}

/// What moves or has moved; `files` says where each file is now.
fn report(plan: &Plan, files: &[PathBuf]) -> Report {
    let moved = plan.items.iter().zip(&plan.places).zip(files);
    let moved = moved.map(|((item, place), file)| Moved {
        disk: match &item.part {
            Part::Disk { target, .. } | Part::Data { target, .. } => target.clone(),
            _ => String::new(),
        },
        from: item.path.clone(),
        to: place.clone(),
        bytes: file.metadata().map_or(0, |found| found.blocks() * 512),
    });
    Report {
        moved: moved.collect(),
        stays: plan.stays.clone(),
        kept: Vec::new(),
    }
}
