//! The host the guest comes to: Prepare, Finish.

use super::definition::{Definition, Source};
use super::ghost::exorcise;
use super::inventory::TPM;
use super::machine::Machine;
use super::plan::{self, Here, Places};
use super::sessions::{self, Session};
use super::{configuration, durable, for_libvirt, here, inventory, pools, recovery, unexpected, SETTLED};
use crate::engine::Engine;
use crate::libvirt::phase::{self, Prepared};
use crate::libvirt::{
    c_string, Connection, Cookie, Domain, Error, Metadata, OwnedConnection, OwnedDomain, Params,
};
use crate::live::options;
use ferry_contract::cold::journal::Role;
use ferry_contract::cold::{self, Inventory, MetadataKind, Plan, Pull};
use ferry_contract::config::Config;
use ferry_contract::control::{Reply, Request};
use ferry_contract::cookie::{self, ColdAnswer, ColdOffer};
use ferry_contract::session::Guest;
use ferry_host::{self as host, Others};
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use virt_sys::*;

/// A client calls Finish at once after Prepare (libvirt 11.3, `virDomainMigrateVersion3Full`: no Perform when offline).
/// One that has not by then is gone.
const FORGOTTEN: Duration = Duration::from_secs(30);
/// Between two looks at that.
const LOOK: Duration = Duration::from_secs(2);

/// Prepare: pulls and verifies every file, then libvirt's own.
pub fn prepare(
    connection: Connection,
    params: &Params,
    cookie: &[u8],
    flags: u32,
) -> Result<Prepared, Error> {
    let own = || phase::prepare(connection, params, cookie, flags);
    let may = connection.is_qemu() && connection.may_write();
    let Some(config) = may.then(configuration).flatten() else {
        return own();
    };
    let offer = match cookie::cold_offer(cookie) {
        Ok(Some(offer)) => offer,
        // The source has no plug-in, or one of another version: libvirt's own refusal.
        Ok(None) => return own(),
        Err(error @ cookie::Error::Version { .. }) => {
            tracing::info!("libvirt's own offline migration: {error}");
            return own();
        }
        Err(error) => return Err(here(error)),
    };
    super::options::check(params, flags, host::tls_is_forced()).map_err(here)?;
    host::hook().map_err(here)?;
    let _held = recovery::hold_soon(offer.inventory.guest.uuid)?;
    let arrival = Arrival::plan(connection, params, flags, offer, config)?;
    let engine = arrival.pull(params, flags)?;
    arrival.register(connection, params, cookie, flags, engine)
}

/// A guest on its way here.
struct Arrival {
    config: Config,
    guest: Guest,
    offer: ColdOffer,
    plan: Plan,
    host: String,
}

/// This host, asked by the plan.
struct ThisHost(Connection);

impl Here for ThisHost {
    fn path_of(&self, source: &Source) -> Result<Option<PathBuf>, String> {
        pools::path_of(self.0, source)
    }
    fn exists(&self, path: &Path) -> bool {
        path.symlink_metadata().is_ok()
    }
    fn keeps_images(&self, path: &Path) -> bool {
        pools::hold(self.0, path)
    }
}

impl Arrival {
    /// Where everything goes; nothing has been touched if this fails, and all that is in the way is told at once.
    fn plan(
        connection: Connection,
        params: &Params,
        flags: u32,
        offer: ColdOffer,
        config: Config,
    ) -> Result<Self, Error> {
        let xml = params
            .utf8(VIR_MIGRATE_PARAM_DEST_XML)
            .ok_or_else(|| here("libvirt passed on no definition"))?;
        if cold::is_remains(xml) {
            return Err(here(
                "it is no guest, but what is left of one that did not arrive: virsh undefine it",
            ));
        }
        let definition = Definition::read(xml).map_err(here)?;
        if definition.uuid != offer.inventory.guest.uuid {
            return Err(here("the definition is that of another guest than was offered"));
        }
        let name = params
            .utf8(VIR_MIGRATE_PARAM_DEST_NAME)
            .unwrap_or(&definition.name)
            .to_owned();
        let guest = Guest {
            name,
            uuid: definition.uuid,
        };
        recovery::settle(connection, Role::Destination, &guest, &config)?;
        let mut problems = in_the_way(connection, xml, &definition, &guest);
        let places = plan::places(&offer.inventory, &definition, &guest.name, &ThisHost(connection));
        let places = places.unwrap_or_else(|more| {
            problems.extend(more);
            Places {
                files: Vec::new(),
                media: Vec::new(),
            }
        });
        problems.extend(taken(connection, &guest, &places.files));
        if !problems.is_empty() {
            return Err(here(format!(
                "guest {} cannot come here: {}",
                guest.name,
                problems.join("; ")
            )));
        }
        Ok(Self {
            plan: Plan {
                places: places.files,
                media: places.media,
                incremental: flags & VIR_MIGRATE_NON_SHARED_INC != 0,
                definition: renamed(xml, &guest.name).ok_or_else(|| here("the definition has no name"))?,
            },
            host: connection.hostname().unwrap_or_else(host::name),
            config,
            guest,
            offer,
        })
    }

    /// Has the engine bring all files; as long as that takes.
    fn pull(&self, params: &Params, flags: u32) -> Result<Engine, Error> {
        make_tpm_directory(&self.plan.places).map_err(here)?;
        let engine = Engine::start(&self.config, "cold-destination", &self.host).map_err(here)?;
        let pull = Pull {
            guest: self.guest.clone(),
            host: self.host.clone(),
            offer: self.offer.clone(),
            plan: self.plan.clone(),
            streams: options::streams(params, flags).map_err(here)?,
            settings: self.config.settings(),
        };
        match engine.ask(&Request::ColdPull(Box::new(pull)), None)? {
            Reply::ColdPulled => Ok(engine),
            reply => Err(unexpected(&reply)),
        }
    }

    /// libvirt's own Prepare, which knows nothing of the files.
    fn register(
        self,
        connection: Connection,
        params: &Params,
        cookie: &[u8],
        flags: u32,
        engine: Engine,
    ) -> Result<Prepared, Error> {
        let (rest, native) = for_libvirt(params, flags);
        let prepared = phase::prepare(connection, &rest, cookie, native).and_then(|prepared| {
            let answer = ColdAnswer {
                session: self.offer.session,
            };
            let answered = cookie::with_cold_answer(prepared.cookie.bytes(), answer).map_err(here)?;
            Ok(Prepared {
                cookie: Cookie::copy_of(&answered),
                uri: prepared.uri,
            })
        });
        let prepared = prepared.inspect_err(|_| {
            exorcise(connection, &self.guest, &self.plan.definition);
            give_up(&engine, &self.guest);
            attend(connection, &self.guest);
        })?;
        let session = sessions::add(Session {
            role: Role::Destination,
            guest: self.guest,
            engine,
            started: Instant::now(),
            arrived: Some(Arrived {
                inventory: self.offer.inventory,
                places: self.plan.places,
                definition: self.plan.definition,
            }),
        });
        watch(&session, connection, flags);
        Ok(prepared)
    }
}

/// A guest whose files are here.
#[derive(Debug)]
pub struct Arrived {
    /// What it owns.
    pub inventory: Inventory,
    /// Where that is.
    pub places: Vec<PathBuf>,
    /// What libvirt registers.
    pub definition: String,
}

/// On a host that has not had a guest with a TPM yet, the directory for their state is missing: made as libvirt makes it
/// (libvirt 11.3, `qemuTPMEmulatorInitStorage`).
fn make_tpm_directory(places: &[PathBuf]) -> Result<(), String> {
    use std::os::unix::fs::DirBuilderExt;
    if !places.iter().any(|place| place.starts_with(TPM)) {
        return Ok(());
    }
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(TPM);
    made.map_err(|error| format!("cannot make {TPM}: {error}"))
}

/// What is known without the engine to be in the guest's way.
fn in_the_way(connection: Connection, xml: &str, definition: &Definition, guest: &Guest) -> Vec<String> {
    let mut problems = Vec::new();
    let known = connection
        .domain(guest.uuid)
        .ok()
        .and_then(|domain| domain.get().guest());
    match known {
        Some(other) => problems.push(format!(
            "a guest of its UUID, {}, is here already: if it is an old copy, virsh undefine {} and move its files away",
            other.name, other.name
        )),
        None if connection.domain_named(&guest.name).is_some() => {
            problems.push("another guest of its name is here: choose one with --dname".into());
        }
        None => {}
    }
    for secret in &definition.secrets {
        if !connection.has_secret(*secret) {
            problems.push(format!(
                "libvirt has no secret {secret} here: virsh secret-define it"
            ));
        }
    }
    if let Err(error) = Machine::read(xml).map_or(Ok(()), |machine| connection.supports(&machine)) {
        problems.push(error.to_string());
    }
    problems
}

/// Devices are written to in place: none that another guest here has, though it may not run now.
fn taken(connection: Connection, guest: &Guest, places: &[PathBuf]) -> Vec<String> {
    let devices: Vec<_> = places.iter().filter(|place| is_device(place)).collect();
    if devices.is_empty() {
        return Vec::new();
    }
    match inventory::others(connection, guest.uuid) {
        Ok(others) => {
            let others = Others::new(&others);
            devices
                .into_iter()
                .filter(|place| others.need(place).is_some())
                .map(|place| format!("{} belongs to another guest of this host", place.display()))
                .collect()
        }
        Err(why) => vec![why],
    }
}

/// Whether a place is a device here, whatever its content comes from.
fn is_device(place: &Path) -> bool {
    place
        .metadata()
        .is_ok_and(|found| found.file_type().is_block_device())
}

/// The definition under another name.
fn renamed(xml: &str, name: &str) -> Option<String> {
    let document = roxmltree::Document::parse(xml).ok()?;
    let element = document
        .root_element()
        .children()
        .find(|child| child.has_tag_name("name"))?;
    let Range { start, end } = element.range();
    let name = quick_xml::escape::escape(name);
    Some(format!("{}<name>{name}</name>{}", &xml[..start], &xml[end..]))
}

/// Finish: the source lets go, the files get their names, and libvirt registers the guest.
pub fn finish(
    connection: Connection,
    params: &Params,
    cookie: &[u8],
    flags: u32,
    cancelled: bool,
) -> Result<(OwnedDomain, Cookie), Error> {
    let (params, native) = for_libvirt(params, flags);
    let own = |cancelled| phase::finish(connection, &params, cookie, native, cancelled);
    let session = params
        .utf8(VIR_MIGRATE_PARAM_DEST_NAME)
        .filter(|_| connection.is_qemu() && connection.may_write())
        .and_then(|name| sessions::by_name(Role::Destination, name));
    let Some(session) = session else {
        // libvirt's own would register a guest whose files are not here.
        if !cancelled && connection.is_qemu() && configuration().is_some() {
            return Err(here(
                "this migration was given up here, or the daemon was restarted: try again",
            ));
        }
        return own(cancelled);
    };
    let _held = recovery::hold(session.guest.uuid)?;
    let (true, Some(arrived)) = (sessions::take(&session), &session.arrived) else {
        return Err(here(
            "this migration has been given up: its client did not go on with it",
        ));
    };
    let failed = |error: Option<Error>| {
        let libvirts = own(true);
        exorcise(connection, &session.guest, &arrived.definition);
        give_up(&session.engine, &session.guest);
        attend(connection, &session.guest);
        match (error, libvirts) {
            (Some(error), _) | (None, Err(error)) => Err(error),
            (None, Ok(arrived)) => Ok(arrived),
        }
    };
    if cancelled {
        return failed(None);
    }
    match session.engine.ask(&Request::ColdCommit, Some(SETTLED)) {
        Ok(Reply::ColdPlaced) => {}
        Ok(reply) => return failed(Some(unexpected(&reply))),
        Err(failure) => return failed(Some(failure.into())),
    }
    let finished = own(false).and_then(|(domain, cookie)| {
        complete(domain.get(), &arrived.inventory)?;
        Ok((domain, cookie))
    });
    let finished = finished.inspect_err(|_| {
        exorcise(connection, &session.guest, &arrived.definition);
        withdraw(connection, &session.engine, &session.guest);
        attend(connection, &session.guest);
    })?;
    if !own_it(connection, &session.engine, &session.guest, &arrived.places) {
        recovery::watch(connection);
    }
    Ok(finished)
}

/// What libvirt keeps of a guest beside its definition.
pub fn complete(domain: Domain, inventory: &Inventory) -> Result<(), Error> {
    if inventory.autostart {
        domain.set_autostart()?;
    }
    redefine(domain, &inventory.metadata)
}

/// Snapshots and checkpoints that are in the images already.
pub fn redefine(domain: Domain, metadata: &[cold::Metadata]) -> Result<(), Error> {
    for metadata in metadata {
        let one = Metadata {
            xml: metadata.xml.clone(),
            current: metadata.current,
        };
        match metadata.kind {
            MetadataKind::Snapshot => domain.redefine_snapshot(&one)?,
            MetadataKind::Checkpoint => domain.redefine_checkpoint(&one)?,
        }
    }
    Ok(())
}

/// The guest is this host's: the engine writes it down and tells the source. Whether the source has heard it.
pub fn own_it(connection: Connection, engine: &Engine, guest: &Guest, places: &[PathBuf]) -> bool {
    pools::refresh(connection, places.iter().map(PathBuf::as_path));
    if let Err(error) = durable::definitions(&guest.name) {
        tracing::error!(
            guest = guest.name,
            "the guest is here, and its former host is not told yet: {error}"
        );
        return false;
    }
    match engine.ask(&Request::ColdOwned, Some(SETTLED)) {
        Ok(Reply::ColdOwned { told: true }) => return true,
        Ok(Reply::ColdOwned { told: false }) => {
            tracing::warn!(
                guest = guest.name,
                "the guest is here, but its former host does not hear it yet"
            );
        }
        Ok(reply) => tracing::warn!(guest = guest.name, "{}", unexpected(&reply)),
        Err(failure) => tracing::warn!(
            guest = guest.name,
            "the guest is here, but the engine did not write it down: {failure}"
        ),
    }
    false
}

/// A source that does not say that it keeps the guest is asked again.
fn attend(connection: Connection, guest: &Guest) {
    if recovery::is_pending(guest.uuid) {
        recovery::watch(connection);
    }
}

/// Has the engine remove what it pulled, once the source has said that it keeps the guest; until then its journal keeps it.
pub fn give_up(engine: &Engine, guest: &Guest) {
    match engine.ask(&Request::ColdAbort, Some(SETTLED)) {
        Ok(Reply::ColdAborted) => {}
        Ok(reply) => tracing::warn!(guest = guest.name, "{}", unexpected(&reply)),
        // An engine that has failed has undone its work and said so.
        Err(failure) if engine.has_failed() => tracing::debug!(guest = guest.name, "{failure}"),
        Err(failure) => tracing::warn!(guest = guest.name, "what has come stays for now: {failure}"),
    }
}

/// Gives a guest up that libvirt did not take as it should: its registration goes first, then its files. One that stays
/// registered keeps them, and the journal keeps it from being started until a recovery has tried again.
pub fn withdraw(connection: Connection, engine: &Engine, guest: &Guest) {
    match unregister(connection, guest) {
        Ok(()) => give_up(engine, guest),
        Err(error) => {
            tracing::error!(
                guest = guest.name,
                "the guest stays registered here, though it is not complete, and cannot be started: {error}"
            );
        }
    }
}

/// Takes back a registration of ours that is not complete, for good: its files and its journal go next.
///
/// # Errors
/// If the guest is still registered, may be after a power failure, or that is not known.
pub fn unregister(connection: Connection, guest: &Guest) -> Result<(), Error> {
    match connection.domain(guest.uuid) {
        Ok(domain) if !domain.get().is_shut_off()? => {
            return Err(here(format!("guest {} runs", guest.name)));
        }
        Ok(domain) if domain.get().is_persistent()? => domain.get().undefine()?,
        Ok(_) => {}
        Err(error) if error.is_no_domain() => {}
        Err(error) => return Err(error),
    }
    durable::definitions(&guest.name)
}

/// Ends a migration whose client has gone between Prepare and Finish: nobody else will.
fn watch(session: &Arc<Session>, connection: Connection, flags: u32) {
    let Some(uri) = connection.uri() else {
        return;
    };
    let watched = Arc::downgrade(session);
    let started = std::thread::Builder::new()
        .name("ferry-cold-watch".into())
        .spawn(move || {
            let mut told = false;
            while !is_over(&watched, &uri, flags, &mut told) {}
        });
    if let Err(error) = started {
        tracing::warn!(
            guest = session.guest.name,
            "should this migration's client go, nobody will notice: {error}"
        );
    }
}

/// Whether nothing is left to watch; the log is `told` once what is being done.
fn is_over(watched: &Weak<Session>, uri: &str, flags: u32, told: &mut bool) -> bool {
    std::thread::sleep(LOOK);
    let Some(session) = watched.upgrade().filter(sessions::is_listed) else {
        return true;
    };
    // An engine that has ended has undone its work: a Finish can only fail.
    if session.started.elapsed() < FORGOTTEN && !session.engine.is_gone() {
        return false;
    }
    let Ok(connection) = OwnedConnection::open(&c_string(uri)) else {
        return false;
    };
    if !std::mem::replace(told, true) {
        tracing::warn!(
            guest = session.guest.name,
            "the migration's client or engine has gone: what was pulled is removed, if the source keeps the guest"
        );
    }
    let params = Params::none().with(VIR_MIGRATE_PARAM_DEST_NAME, &session.guest.name);
    // Always an error: cancelled, it returns no domain.
    let _ = finish(connection.get(), &params, &[], flags, true);
    // Somebody else may be dealing with the guest just now.
    !sessions::is_listed(&session)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_takes_another_name() {
        let xml = "<domain><title>x</title><name>g</name><metadata><name>m</name></metadata></domain>";
        let new = renamed(xml, "a<b").unwrap();
        assert_eq!(
            new,
            "<domain><title>x</title><name>a&lt;b</name><metadata><name>m</name></metadata></domain>"
        );
        assert_eq!(renamed("<domain/>", "g"), None);
    }

    #[test]
    fn a_machine_is_read() {
        let xml = "<domain type='kvm'><os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>\
                   <devices><emulator>/usr/bin/q</emulator></devices></domain>";
        let machine = Machine::read(xml).unwrap();
        assert_eq!(
            (machine.arch.as_str(), machine.machine.as_str()),
            ("x86_64", "pc-q35-10.0")
        );
        assert_eq!(
            (machine.kind.as_str(), machine.emulator.as_deref()),
            ("kvm", Some("/usr/bin/q"))
        );
        assert_eq!(Machine::read("<domain/>"), None);
    }

    #[test]
    fn a_place_is_judged_by_what_it_is_here() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        assert!(!is_device(&path));
        std::fs::write(&path, "").unwrap();
        assert!(!is_device(&path));
        // A device is only looked at: any that this machine has.
        let mut devices = std::fs::read_dir("/dev").unwrap().flatten();
        let device = devices.find(|entry| entry.file_type().is_ok_and(|kind| kind.is_block_device()));
        if let Some(device) = device {
            let link = directory.path().join("link");
            std::os::unix::fs::symlink(device.path(), &link).unwrap();
            assert!(is_device(&device.path()) && is_device(&link));
        }
    }
}
