//! The host the guest leaves: Begin, Confirm.

use super::definition::Definition;
use super::recovery::Departing;
use super::sessions::{self, Session};
use super::{
    configuration, durable, for_libvirt, here, inventory, pools, recovery, unexpected, DELETED, SETTLED,
};
use crate::engine::Engine;
use crate::libvirt::phase::{self, Begun, MallocString};
use crate::libvirt::{c_string, Connection, Cookie, Domain, Error, OwnedConnection, Params};
use crate::live::options;
use ferry_contract::cold::journal::Role;
use ferry_contract::cold::{self, Deleted, Serve, TO_STAY};
use ferry_contract::config::{Config, SourceStorage};
use ferry_contract::control::{Reply, Request};
use ferry_contract::cookie::{self, ColdOffer};
use ferry_contract::session::Guest;
use ferry_host as host;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use virt_sys::*;

/// Between two looks whether an engine has ended without a Confirm.
const LOOK: Duration = Duration::from_secs(2);
/// For a Confirm, once the guest is registered at the destination: a client's idle connection to the source may have been cut
/// meanwhile. One that comes later finds the work done.
const UNCONFIRMED: Duration = Duration::from_secs(60);
/// For the engine to measure, lock and hash what it offers: it opens every file.
const OFFERED: Duration = Duration::from_secs(300);

/// Begin: libvirt's own but for storage, and the offer of our engine in its cookie.
pub fn begin(domain: Domain, params: &Params, flags: u32) -> Result<Begun, Error> {
    let ours = domain.may_migrate().then(configuration).flatten();
    let (Some(config), Some(guest)) = (ours, domain.guest()) else {
        return phase::begin(domain, params, flags);
    };
    super::options::check(params, flags, host::tls_is_forced()).map_err(here)?;
    let _held = recovery::hold(guest.uuid)?;
    let departure = Departure {
        domain,
        params,
        flags,
        config,
        guest,
    };
    departure.begin()
}

/// A guest that is asked to leave.
struct Departure<'a> {
    domain: Domain,
    params: &'a Params<'a>,
    flags: u32,
    config: Config,
    guest: Guest,
}

impl Departure<'_> {
    fn begin(self) -> Result<Begun, Error> {
        let name = &self.guest.name;
        if !self.domain.is_shut_off()? {
            return Err(here(format!(
                "guest {name} runs, and --offline moves only a guest that does not: shut it down first (virsh shutdown \
                 {name}), or move it as it runs, with --live instead of --offline"
            )));
        }
        if self.domain.has_managed_save()? {
            return Err(here(format!(
                "guest {name} has a managed save image, which is not moved: start the guest and shut it down, or throw the \
                 image away (virsh managedsave-remove {name})"
            )));
        }
        host::hook().map_err(here)?;
        self.supersede()?;
        // Before the definition is read: an edit after this is noticed at the commitment.
        let file = inventory::definition_file(name);
        let begun = self.libvirts()?;
        let xml = self.domain.definition()?;
        let definition = Definition::read(&xml).map_err(here)?;
        let disks = self.params.texts(VIR_MIGRATE_PARAM_MIGRATE_DISKS);
        let found = inventory::take(self.domain, &definition, &disks)
            .map_err(|why| here(format!("guest {name} cannot be moved: {why}")))?;
        let (session, offer) = self.serve(found, file, xml)?;
        match cookie::with_cold_offer(begun.cookie.bytes(), &offer) {
            Ok(bytes) => {
                watch(&session, self.domain);
                Ok(Begun {
                    xml: begun.xml,
                    cookie: Cookie::copy_of(&bytes),
                })
            }
            Err(error) => {
                sessions::take(&session);
                abort(&session)?;
                Err(here(error))
            }
        }
    }

    /// An earlier attempt must have ended: one that nobody has taken up is given up, one under way stands.
    fn supersede(&self) -> Result<(), Error> {
        let name = &self.guest.name;
        if let Some(former) = sessions::by_uuid(Role::Source, self.guest.uuid) {
            let under_way = !former.engine.is_gone() && recovery::is_fenced(self.guest.uuid);
            if under_way && former.engine.statistics().wire > 0 {
                return Err(here(format!(
                    "guest {name} is being moved already; virsh domjobabort {name} ends that"
                )));
            }
            if sessions::take(&former) {
                // One that cannot be given up has a journal, which is looked at next.
                let _ = abort(&former);
            }
        }
        recovery::settle(self.domain.connection(), Role::Source, &self.guest, &self.config)
    }

    /// What libvirt's own Begin makes and checks. It refuses guests with snapshots or checkpoints, whose definition alone
    /// would be of no use elsewhere; these get the same without it (libvirt 11.3, `qemuMigrationSrcIsAllowed`).
    fn libvirts(&self) -> Result<Begun, Error> {
        let (params, flags) = for_libvirt(self.params, self.flags);
        if self.domain.snapshots()?.is_empty() && self.domain.checkpoints()?.is_empty() {
            return phase::begin(self.domain, &params, flags);
        }
        let refused = |why: &str| {
            Err(here(format!(
                "guest {} has snapshots or checkpoints: {why}",
                self.guest.name
            )))
        };
        if params.text(VIR_MIGRATE_PARAM_DEST_XML).is_some()
            || params.text(VIR_MIGRATE_PARAM_PERSIST_XML).is_some()
        {
            return refused(
                "each holds a definition of its own, so it can only be moved as it is, without --xml",
            );
        }
        if flags & VIR_MIGRATE_PERSIST_DEST == 0 {
            return refused("add --persistent, or nothing would be left of it");
        }
        if flags & VIR_MIGRATE_TUNNELLED != 0 {
            return refused("it cannot be moved through libvirt's tunnel, leave --tunnelled out");
        }
        let connection = self.domain.connection();
        let host_uuid = host_uuid(&connection.capabilities()?)
            .ok_or_else(|| here("libvirt does not say this host's UUID"))?;
        let hostname = connection.hostname().unwrap_or_else(host::name);
        let cookie = libvirt_cookie(&self.guest, &hostname, &host_uuid);
        Ok(Begun {
            xml: MallocString::copy_of(&self.domain.migratable()?),
            cookie: Cookie::copy_of(&cookie),
        })
    }

    /// Starts the engine that fences and serves the guest's files.
    fn serve(
        &self,
        found: inventory::Found,
        definition: Option<cold::Definition>,
        xml: String,
    ) -> Result<(Arc<Session>, ColdOffer), Error> {
        let name_here = self.domain.connection().hostname().unwrap_or_else(host::name);
        let asked = cold::Options {
            bandwidth: options::bandwidth(self.params.number(VIR_MIGRATE_PARAM_BANDWIDTH).unwrap_or(0))
                .map_err(here)?,
            compression: options::compression(self.params, self.flags).map_err(here)?,
            undefine: self.flags & VIR_MIGRATE_UNDEFINE_SOURCE != 0,
            keep: self.config.cold.source_storage == SourceStorage::Keep,
        };
        let serve = Serve {
            guest: self.guest.clone(),
            host: name_here.clone(),
            address: host::migration_host().unwrap_or_else(|| name_here.clone()),
            listen: host::migration_address(),
            items: found.items,
            media: found.media,
            metadata: found.metadata,
            autostart: self.domain.autostart()?,
            definition,
            xml,
            options: asked,
            settings: self.config.settings(),
        };
        let engine = Engine::start(&self.config, "cold-source", &name_here).map_err(here)?;
        match engine.ask(&Request::ColdServe(Box::new(serve)), Some(OFFERED))? {
            Reply::ColdOffer(offer) => {
                let session = sessions::add(Session {
                    role: Role::Source,
                    guest: self.guest.clone(),
                    engine,
                    started: Instant::now(),
                    arrived: None,
                });
                Ok((session, *offer))
            }
            reply => Err(unexpected(&reply)),
        }
    }
}

/// The host's UUID in its capabilities.
fn host_uuid(capabilities: &str) -> Option<String> {
    let document = roxmltree::Document::parse(capabilities).ok()?;
    let host = document
        .root_element()
        .children()
        .find(|child| child.has_tag_name("host"))?;
    let uuid = host.children().find(|child| child.has_tag_name("uuid"))?;
    uuid.text().map(|text| text.trim().to_owned())
}

/// The cookie that libvirt's own Begin makes of a guest that does not run (libvirt 11.3, `qemuMigrationCookieXMLFormat`).
fn libvirt_cookie(guest: &Guest, hostname: &str, host_uuid: &str) -> Vec<u8> {
    let mut xml = String::from("<qemu-migration>\n");
    for (element, text) in [
        ("name", guest.name.as_str()),
        ("uuid", &guest.uuid.to_string()),
        ("hostname", hostname),
        ("hostuuid", host_uuid),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(
            xml,
            "  <{element}>{}</{element}>",
            quick_xml::escape::escape(text)
        );
    }
    xml.push_str("</qemu-migration>\n\0");
    xml.into_bytes()
}

/// Gives a session up: the guest stays here.
///
/// # Errors
/// If the destination may have it already.
fn abort(session: &Session) -> Result<(), Error> {
    match session.engine.ask(&Request::ColdAbort, Some(SETTLED)) {
        Ok(Reply::ColdAborted) => Ok(()),
        Ok(reply) => Err(unexpected(&reply)),
        // It has given up by itself, and said why to whoever asked then.
        Err(_) if !recovery::is_pending(session.guest.uuid) => Ok(()),
        Err(failure) => Err(failure.into()),
    }
}

/// Confirm: what libvirt's own would delete was never copied by it, so it is not called.
pub fn confirm(
    domain: Domain,
    params: &Params,
    cookie: &[u8],
    flags: u32,
    cancelled: bool,
) -> Result<(), Error> {
    let ours = domain.may_migrate().then(configuration).flatten();
    let (Some(config), Some(guest)) = (ours, domain.guest()) else {
        return phase::confirm(domain, params, cookie, flags, cancelled);
    };
    let _held = recovery::hold(guest.uuid)?;
    let Some(session) = sessions::by_uuid(Role::Source, guest.uuid).filter(sessions::take) else {
        // The daemon was restarted, or the time limit has come: what is left is in the journal.
        return recovery::settle(domain.connection(), Role::Source, &guest, &config);
    };
    let confirmed = || match session.engine.ask(&Request::ColdConfirm, Some(SETTLED)) {
        Ok(Reply::ColdOwnedThere) => {
            leave(domain.connection(), &guest, &session.engine, left(flags, &config))
        }
        Ok(reply) => Err(unexpected(&reply)),
        Err(failure) => Err(failure.into()),
    };
    let settled = match cancelled {
        true => abort(&session),
        false => confirmed(),
    };
    settled.inspect_err(|_| recovery::watch(domain.connection()))
}

/// What is left of a guest where it was.
pub struct Left {
    /// Its definition goes.
    pub undefine: bool,
    /// Its files stay.
    pub keep: bool,
}

fn left(flags: u32, config: &Config) -> Left {
    let undefine = flags & VIR_MIGRATE_UNDEFINE_SOURCE != 0;
    Left {
        undefine,
        keep: !undefine || config.cold.source_storage == SourceStorage::Keep,
    }
}

/// The guest is the destination's: its definition goes here, and then the files that moved.
pub fn leave(connection: Connection, guest: &Guest, engine: &Engine, left: Left) -> Result<(), Error> {
    let mut keep = left.keep.then(|| TO_STAY.to_owned());
    let in_use = match keep {
        Some(_) => Vec::new(),
        // Before the definition goes, so that a failure leaves a whole guest to look at.
        None => inventory::others(connection, guest.uuid).unwrap_or_else(|why| {
            tracing::warn!(
                guest = guest.name,
                "the files that moved stay on host {}: {why}",
                host::name()
            );
            keep = Some(why);
            Vec::new()
        }),
    };
    let sweeps = keep.is_none();
    if left.undefine {
        undefine(connection, guest)?;
    }
    match engine.ask(&Request::ColdDelete { keep, in_use }, Some(DELETED))? {
        Reply::ColdDeleted(deleted) => {
            tell(guest, &deleted);
            if sweeps {
                sweep(guest);
            }
            pools::refresh(connection, deleted.deleted.iter().map(PathBuf::as_path));
            Ok(())
        }
        reply => Err(unexpected(&reply)),
    }
}

/// Removes the definition, for good: its files and its journal go next. A recovery may find it gone; whoever may not see the
/// guest does not know that.
fn undefine(connection: Connection, guest: &Guest) -> Result<(), Error> {
    match connection.domain(guest.uuid) {
        Ok(domain) if domain.get().is_shut_off()? => domain.get().undefine()?,
        Ok(_) => {
            return Err(here(format!(
                "guest {} runs, though it is the destination's",
                guest.name
            )))
        }
        Err(error) if error.is_no_domain() => {}
        Err(error) => return Err(error),
    }
    durable::definitions(&guest.name)
}

/// What is left of a TPM whose state has moved: swtpm's lock file, which is empty, and directories that then are.
fn sweep(guest: &Guest) {
    let own = Path::new(inventory::TPM).join(guest.uuid.to_string());
    for version in std::fs::read_dir(&own).into_iter().flatten().flatten() {
        let state = std::fs::read_dir(version.path()).into_iter().flatten().flatten();
        if state.map(|entry| entry.file_name()).eq([".lock"]) {
            let _ = std::fs::remove_file(version.path().join(".lock"));
        }
        // One that is not empty stays.
        let _ = std::fs::remove_dir(version.path());
    }
    let _ = std::fs::remove_dir(own);
}

fn tell(guest: &Guest, deleted: &Deleted) {
    let name = guest.name.as_str();
    for kept in &deleted.kept {
        tracing::info!(guest = name, "{} stays: {}", kept.path.display(), kept.reason);
    }
    let shown = |path: &PathBuf| Path::display(path).to_string();
    let gone: Vec<_> = deleted.deleted.iter().map(shown).collect();
    if !gone.is_empty() {
        tracing::info!(guest = name, "moved away and deleted here: {}", gone.join(", "));
    }
}

/// Looks after a session whose client may go: once it has ended without a Confirm, the journal says what is left to do.
fn watch(session: &Arc<Session>, domain: Domain) {
    let Some(uri) = domain.connection().uri() else {
        return;
    };
    let watched = Arc::downgrade(session);
    let started = std::thread::Builder::new()
        .name("ferry-cold-watch".into())
        .spawn(move || {
            let (mut left, mut departing) = (None, Departing::default());
            while !is_over(&watched, &uri, &mut left, &mut departing) {}
        });
    if let Err(error) = started {
        tracing::warn!(
            guest = session.guest.name,
            "should this migration's client go, nobody will notice: {error}"
        );
    }
}

/// Whether nothing is left to watch; `left` is when the guest was first seen to have.
fn is_over(
    watched: &Weak<Session>,
    uri: &str,
    left: &mut Option<Instant>,
    departing: &mut Departing,
) -> bool {
    std::thread::sleep(LOOK);
    let Some(session) = watched.upgrade() else {
        return true;
    };
    // Given up by the destination, the engine still waits for a Confirm that nobody may send.
    departing.look(session.guest.uuid);
    if departing.has_left {
        left.get_or_insert_with(Instant::now);
    }
    let unconfirmed = left.is_some_and(|left| left.elapsed() > UNCONFIRMED);
    if !session.engine.is_gone() && !unconfirmed && departing.is_fenced {
        return false;
    }
    if sessions::take(&session) {
        tracing::warn!(
            guest = session.guest.name,
            "the migration ended without its client"
        );
        if let Ok(connection) = OwnedConnection::open(&c_string(uri)) {
            recovery::watch(connection.get());
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_cookie_made_by_hand_is_one_of_libvirts() {
        let guest = Guest {
            name: "a<b".into(),
            uuid: Uuid::from_u128(7),
        };
        let cookie = libvirt_cookie(&guest, "h", "u");
        assert_eq!(cookie::text_of(&cookie, "name"), Ok(Some("a<b".into())));
        assert_eq!(cookie::text_of(&cookie, "hostuuid"), Ok(Some("u".into())));
        assert_eq!(cookie::cold_offer(&cookie), Ok(None));
    }

    #[test]
    fn the_hosts_uuid_is_found() {
        let xml =
            "<capabilities><host><uuid>x-y</uuid><cpu/></host><guest><uuid>no</uuid></guest></capabilities>";
        assert_eq!(host_uuid(xml).as_deref(), Some("x-y"));
        assert_eq!(host_uuid("<capabilities/>"), None);
    }
}
