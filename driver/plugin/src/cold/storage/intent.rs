//! What is to be done for one guest, down to the last definition, and everything that is in the way of it as far as it is
//! known without the engine.

use super::chains::{self, Disks, Host};
use super::plan::{self, Plan};
use super::rewrite::{self, Destination};
use crate::cold::definition::{Definition, Source};
use crate::cold::{here, image, inventory, pools};
use crate::libvirt::{Connection, Domain, Error};
use ferry_contract::cold::storage::Order;
use ferry_contract::cold::{self, Metadata};
use ferry_contract::session::Guest;
use ferry_host::real;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What is to be done.
pub struct Intent {
    /// With files.
    pub plan: Plan,
    /// The definition with the new paths.
    pub xml: String,
    /// The snapshots and checkpoints with the new paths.
    pub metadata: Vec<Metadata>,
    /// The file of the definition that there is.
    pub file: Option<cold::Definition>,
    /// The disks that move.
    disks: Vec<Disk>,
}

/// A disk that moves.
struct Disk {
    /// The format of its first image.
    format: String,
    /// Where its images will be, from the top.
    images: Vec<PathBuf>,
}

impl Intent {
    /// Finds it out, and all problems, each in a sentence.
    ///
    /// # Errors
    /// libvirt does not say what there is.
    pub fn of(domain: Domain, guest: &Guest, order: &Order) -> Result<(Self, Vec<String>), Error> {
        let connection = domain.connection();
        let mut problems = Vec::new();
        if domain.has_managed_save()? {
            problems.push(format!(
                "it has a managed save image, which names its disks' paths: start the guest and shut it down, or throw the \
                 image away (virsh managedsave-remove {})",
                guest.name
            ));
        }
        // Before the definition is read: an edit after this is noticed before it is replaced.
        let file = inventory::definition_file(&guest.name);
        let xml = domain.definition()?;
        let definition = Definition::read(&xml).map_err(here)?;
        let mut disks = chains::find(connection, &definition, &order.disks, &mut problems);
        let host = Host::look(connection, guest, &mut problems);
        let (mut plan, pool) = match destination(connection, &order.to) {
            Ok((directory, pool)) => {
                let (plan, more) = plan::plan(&disks.chains, &directory, &host);
                problems.extend(more);
                (plan, pool)
            }
            Err(why) => {
                problems.push(why);
                (Plan::default(), None)
            }
        };
        plan.stays.append(&mut disks.stays);
        let (xml, metadata) = {
            let volume = |pool: &str, volume: &str| place_of_volume(&definition, &disks, &plan, pool, volume);
            let rewriting = Rewriting {
                plan: &plan,
                to: Destination {
                    place: &|path| plan.place(&real(path)).cloned(),
                    volume: &volume,
                    pool,
                },
            };
            let xml = rewriting.of("its definition", &xml, &mut problems)?;
            (xml, rewriting.metadata(domain, &mut problems)?)
        };
        let disks = disks.chains.iter().filter_map(|chain| Disk::of(chain, &plan));
        let intent = Self {
            disks: disks.collect(),
            plan,
            xml,
            metadata,
            file,
        };
        Ok((intent, problems))
    }

    /// Whether the headers of the copies say what was planned: what QEMU will open is what was copied.
    ///
    /// # Errors
    /// They do not.
    pub fn check(&self) -> Result<(), String> {
        self.disks.iter().try_for_each(Disk::check)
    }
}

/// The directory, and the pool that it is of, where a pool was named.
fn destination(connection: Connection, to: &str) -> Result<(PathBuf, Option<&str>), String> {
    match to.starts_with('/') {
        true => Ok((inventory::certain(Path::new(to))?, None)),
        false => Ok((pools::directory(connection, to)?, Some(to))),
    }
}

/// Where the file of a volume goes that a disk of the guest has.
fn place_of_volume(
    definition: &Definition,
    disks: &Disks,
    plan: &Plan,
    pool: &str,
    volume: &str,
) -> Option<PathBuf> {
    let is_it =
        |source: &Source| matches!(source, Source::Volume { pool: p, volume: v } if p == pool && v == volume);
    let disk = definition.disks.iter().find(|disk| is_it(&disk.source))?;
    let chain = disks.chains.iter().find(|chain| chain.target == disk.target)?;
    plan.place(&real(&chain.layers.first()?.path)).cloned()
}

/// The definitions that must name the new paths.
struct Rewriting<'a> {
    plan: &'a Plan,
    to: Destination<'a>,
}

impl Rewriting<'_> {
    /// One of them, whatever it is called.
    fn of(&self, what: &str, xml: &str, problems: &mut Vec<String>) -> Result<String, Error> {
        let xml = rewrite::rewritten(xml, &self.to).map_err(here)?;
        let written = inventory::written(&xml).map_err(here)?;
        let left: BTreeSet<_> = written
            .iter()
            .filter_map(|path| self.plan.moves(&real(path)))
            .collect();
        problems.extend(left.into_iter().map(|path| {
            format!(
                "{what} names {} outside of its disks, too: take that out first",
                path.display()
            )
        }));
        Ok(xml)
    }

    /// Those of snapshots and checkpoints. The files of an external snapshot stand on others in ways of their own.
    fn metadata(&self, domain: Domain, problems: &mut Vec<String>) -> Result<Vec<Metadata>, Error> {
        let mut metadata = inventory::metadata(domain).map_err(here)?;
        for one in &mut metadata {
            if let Some((path, _)) = inventory::external(&one.xml).map_err(here)?.first() {
                problems.push(format!(
                    "its snapshot {} has a file of its own, {}, and names what it stands on: delete it first (virsh \
                     snapshot-delete)",
                    one.name,
                    path.display()
                ));
            }
            let what = format!("its snapshot or checkpoint {}", one.name);
            one.xml = self.of(&what, &one.xml, problems)?;
        }
        Ok(metadata)
    }
}

impl Disk {
    /// `None` where it does not move.
    fn of(chain: &plan::Chain, plan: &Plan) -> Option<Self> {
        let top = chain.layers.first()?;
        plan.place(&real(&top.path))?;
        let place = |path: &PathBuf| plan.place(&real(path)).unwrap_or(path).clone();
        Some(Self {
            format: top.format.clone(),
            images: chain.layers.iter().map(|layer| place(&layer.path)).collect(),
        })
    }

    fn check(&self) -> Result<(), String> {
        let Some(top) = self.images.first() else {
            return Ok(());
        };
        let found = image::layers(top, &self.format)?;
        let found: BTreeSet<_> = found.iter().map(|layer| real(&layer.path)).collect();
        let planned: BTreeSet<_> = self.images.iter().map(|path| real(path)).collect();
        match found == planned {
            true => Ok(()),
            false => Err(format!(
                "the copy {} stands on {found:?}, not on {planned:?}: a defect, please report it",
                top.display()
            )),
        }
    }
}
