//! The host the guest comes to: Prepare, Finish.

use super::uri::{self, DataAddress};
use super::{options, settings, unexpected, DISABLED, LOADED, LOCAL};
use crate::engine::Engine;
use crate::guest_memory;
use crate::libvirt::phase::{self, MallocString, Prepared};
use crate::libvirt::{Connection, Cookie, Error, OwnedDomain, Params};
use crate::sessions::{self, HugePromise, Promise, Role, Session, SocketFile};
use crate::turns::Moving;
use ferry_contract::config::Config;
use ferry_contract::control::{Reply, Request, Settings};
use ferry_contract::cookie::{self, Answer, Offer};
use ferry_contract::session::Guest;
use ferry_host as host;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
use virt_sys::{
    VIR_MIGRATE_PARAM_DEST_NAME, VIR_MIGRATE_PARAM_DEST_XML, VIR_MIGRATE_PARAM_DISKS_PORT,
    VIR_MIGRATE_PARAM_LISTEN_ADDRESS, VIR_MIGRATE_PARAM_URI,
};

/// The longest path a unix socket can have, in bytes.
const SUN_PATH: usize = 107;

/// Prepare: libvirt's own; with an offer in the cookie, of a QEMU that awaits its stream from our engine.
pub fn prepare(
    connection: Connection,
    params: &Params,
    cookie: &[u8],
    flags: u32,
) -> Result<Prepared, Error> {
    let permitted = connection.is_qemu() && connection.may_write();
    let own = || {
        let prepared = match permitted {
            true => natively(connection, params, cookie, flags)?,
            false => phase::prepare(connection, params, cookie, flags)?,
        };
        // What an earlier attempt left must not be taken for this one at Finish.
        if let Some((_, uuid)) = identity(cookie) {
            sessions::forget(Role::Destination, uuid);
        }
        Ok(prepared)
    };
    let declined = |reason: &str| {
        tracing::info!("libvirt's own migration to this host: {reason}");
        own()
    };
    if !permitted {
        return own();
    }
    let offer = match cookie::offer(cookie) {
        Ok(None) => return own(),
        Ok(Some(offer)) => offer,
        Err(error @ cookie::Error::Version { .. }) => return declined(&error.to_string()),
        Err(error) => return Err(Error::failed(format!("host {}: {error}", host::name()))),
    };
    let arrival = match Arrival::plan(connection, params, cookie, flags, offer) {
        Ok(arrival) => arrival,
        Err(reason) => return declined(&reason),
    };
    let started = match arrival.reserve()? {
        Reservation::Made(engine, promises) => {
            arrival.start(connection, params, cookie, flags, engine, promises)?
        }
        Reservation::Declined(reason) => return declined(&reason),
    };
    match started {
        Started::Listening(prepared) => Ok(prepared),
        Started::Declined(reason) => declined(&reason),
    }
}

/// libvirt's own; a guest that chooses no memory gets some that the engine can move next time.
fn natively(connection: Connection, params: &Params, cookie: &[u8], flags: u32) -> Result<Prepared, Error> {
    let Some(xml) = params.utf8(VIR_MIGRATE_PARAM_DEST_XML) else {
        return phase::prepare(connection, params, cookie, flags);
    };
    if let Some(xml) = guest_memory::shared(xml, guest_memory::Start::Now) {
        let params = params.share().with(VIR_MIGRATE_PARAM_DEST_XML, &xml);
        return phase::prepare(connection, &params, cookie, flags);
    }
    let prepared = phase::prepare(connection, params, cookie, flags)?;
    if let Some((name, _)) = identity(cookie) {
        guest_memory::warn_of_disk(&name, xml);
    }
    Ok(prepared)
}

/// What is known of an arriving guest before anything is started.
struct Arrival {
    config: Config,
    settings: Settings,
    host: String,
    guest: Guest,
    offer: Offer,
    data: DataAddress,
    incoming: PathBuf,
}

/// How long the engine may take to get hold of the QEMU that libvirt has started. What that QEMU has filled of its
/// memory (`<allocation mode='immediate'/>`) is emptied first: at 20 GB/s where it was measured; half of that is allowed.
fn to_attach(offer: &Offer) -> Duration {
    const BYTES_A_SECOND: u64 = 10 << 30;
    let bytes = offer
        .blocks
        .iter()
        .map(|block| block.size)
        .fold(0, u64::saturating_add);
    LOCAL + Duration::from_secs(bytes / BYTES_A_SECOND)
}

enum Reservation {
    Made(Engine, (Promise, HugePromise)),
    Declined(String),
}

enum Started {
    Listening(Prepared),
    /// libvirt has cleaned up what it had begun.
    Declined(String),
}

impl Arrival {
    /// Where the guest will arrive, or why its migration is libvirt's own.
    fn plan(
        connection: Connection,
        params: &Params,
        cookie: &[u8],
        flags: u32,
        offer: Offer,
    ) -> Result<Self, String> {
        let config = host::config()?;
        if !config.enabled {
            return Err(DISABLED.into());
        }
        let mut settings = settings(&config, flags)?;
        // What the engines do is between them; a client also drops some of these flags and not their parameters.
        let (params, flags) = options::for_libvirt(params, flags);
        options::read(&params, flags)?;
        let (name, uuid) = identity(cookie).ok_or("libvirt's cookie names no guest")?;
        let name = params
            .utf8(VIR_MIGRATE_PARAM_DEST_NAME)
            .map_or(name, str::to_owned);
        let name_here = connection.hostname().unwrap_or_else(host::name);
        let data = match params.utf8(VIR_MIGRATE_PARAM_URI) {
            None => DataAddress {
                host: host::migration_host().unwrap_or_else(|| name_here.clone()),
                port: None,
            },
            Some(given) => {
                uri::parse(given).ok_or_else(|| format!("the engine does not take the URI {given}"))?
            }
        };
        if let Some(port) = data.port {
            settings.ports = (port, port);
        }
        let incoming = incoming_socket(Path::new(host::INCOMING), offer.session, &name);
        Ok(Self {
            config,
            settings,
            host: name_here,
            guest: Guest { name, uuid },
            offer,
            data,
            incoming,
        })
    }

    /// Reservation: would the guest fit? Nothing has been started for it yet, and what is wrong with this host's engine
    /// does not keep it from libvirt's own way; having no room would.
    fn reserve(&self) -> Result<Reservation, Error> {
        if let Err(error) = host::make_incoming_directory() {
            let reason = format!("cannot make {} for QEMU's sockets: {error}", host::INCOMING);
            return Ok(Reservation::Declined(reason));
        }
        let engine = match Engine::start(&self.config, "destination", &self.host) {
            Ok(engine) => engine,
            Err(error) => return Ok(Reservation::Declined(error.to_string())),
        };
        let (promise, promised) = Promise::make(&self.offer);
        let (huge, promised_huge) = HugePromise::make(&self.offer);
        let request = Request::Reserve {
            guest: self.guest.clone(),
            host: self.host.clone(),
            offer: self.offer.clone(),
            memory_directory: host::memory_directory(),
            promised,
            promised_huge,
            settings: self.settings.clone(),
        };
        match engine.ask(&request, Some(LOCAL)) {
            Ok(Reply::Reserved) => Ok(Reservation::Made(engine, (promise, huge))),
            Ok(Reply::NotEligible { reason }) => Ok(Reservation::Declined(reason)),
            Ok(reply) => Ok(Reservation::Declined(unexpected(&reply).to_string())),
            Err(refused) if engine.has_failed() => Err(refused.into()),
            // It has ended, or is of another release.
            Err(gone) => Ok(Reservation::Declined(gone.to_string())),
        }
    }

    /// libvirt starts QEMU, the engine takes hold of it. From the real Prepare on, a failure must end that QEMU; until
    /// it has succeeded, an earlier session of this guest stands. Where it fails, the reason may be what we ask of it (a
    /// QEMU that is not allowed our socket); any other will show again on libvirt's own way.
    fn start(
        &self,
        connection: Connection,
        params: &Params,
        cookie: &[u8],
        flags: u32,
        engine: Engine,
        (promise, huge): (Promise, HugePromise),
    ) -> Result<Started, Error> {
        let uri = format!("unix://{}", self.incoming.display());
        let (params, native) = options::for_libvirt(params, flags);
        let mut rewritten = params
            .share()
            .without(VIR_MIGRATE_PARAM_LISTEN_ADDRESS)
            .with(VIR_MIGRATE_PARAM_URI, &uri);
        if flags & options::STORAGE != 0 {
            let port = params.integer(VIR_MIGRATE_PARAM_DISKS_PORT);
            let port = port
                .and_then(|port| u16::try_from(port).ok())
                .filter(|port| *port != 0);
            let listen = listen_address(&params).unwrap_or_else(host::any_address);
            rewritten = uri::with_disks(rewritten, &uri::disks(&listen, port));
        }
        let socket = SocketFile(self.incoming.clone());
        let prepared = match phase::prepare(connection, &rewritten, cookie, native) {
            Ok(prepared) => prepared,
            Err(error) => {
                let reason = format!("its QEMU cannot be started for the engine: {error}");
                return Ok(Started::Declined(reason));
            }
        };
        drop(huge);
        let session = Session::new(Role::Destination, self.guest.clone(), self.offer.clone(), engine);
        let session = sessions::add(session.arriving(promise, socket));
        let attached = self.attach(connection, &params, &session, prepared);
        attached.map(Started::Listening).inspect_err(|_| {
            sessions::remove(&session);
            let name = params
                .share()
                .only(&[])
                .with(VIR_MIGRATE_PARAM_DEST_NAME, &self.guest.name);
            // Always an error: cancelled, it returns no domain.
            let _ = phase::finish(connection, &name, &[], flags, true);
        })
    }

    fn attach(
        &self,
        connection: Connection,
        params: &Params,
        session: &Arc<Session>,
        prepared: Prepared,
    ) -> Result<Prepared, Error> {
        let domain = connection.domain(self.guest.uuid)?;
        let monitor = super::monitor(domain.get()).ok_or_else(|| {
            Error::failed(format!(
                "the QEMU that libvirt started on host {} has no private monitor",
                self.host
            ))
        })?;
        session.engine.guard(&monitor, Moving::here(self.guest.uuid))?;
        let attach = Request::Attach {
            monitor,
            incoming: self.incoming.clone(),
            host: self.data.host.clone(),
            listen: listen_address(params),
        };
        let answer = match session.engine.ask(&attach, Some(to_attach(&self.offer)))? {
            Reply::Listening(answer) => answer,
            reply => return Err(unexpected(&reply)),
        };
        self.answered(prepared, &answer)
    }

    fn answered(&self, prepared: Prepared, answer: &Answer) -> Result<Prepared, Error> {
        let cookie = cookie::with_answer(prepared.cookie.bytes(), answer)
            .map_err(|error| Error::failed(format!("host {}: {error}", self.host)))?;
        let uri = uri::of(&answer.host, answer.port);
        Ok(Prepared {
            cookie: Cookie::copy_of(&cookie),
            uri: Some(MallocString::copy_of(&uri)),
        })
    }
}

/// Where to listen, where anybody has said so.
fn listen_address(params: &Params) -> Option<String> {
    let given = params.utf8(VIR_MIGRATE_PARAM_LISTEN_ADDRESS);
    given.map(str::to_owned).or_else(host::migration_address)
}

/// Where the incoming QEMU binds. The name's end is one that libvirt's AppArmor profiles let every guest create
/// (libvirt 11.3, virt-aa-helper.c); a guest whose name is too long for it goes without.
fn incoming_socket(directory: &Path, session: Uuid, name: &str) -> PathBuf {
    let short = session.simple().to_string();
    let plain = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    let path = directory.join(format!("{}.tunnelmigrate.dest.{name}", &short[..8]));
    if plain && path.as_os_str().len() <= SUN_PATH {
        return path;
    }
    directory.join(format!("{}.sock", &short[..8]))
}

/// The guest's name and UUID in libvirt's cookie.
fn identity(cookie: &[u8]) -> Option<(String, Uuid)> {
    let text = |name| cookie::text_of(cookie, name).ok().flatten();
    Some((text("name")?, text("uuid")?.parse().ok()?))
}

/// Finish: where the engine brought the guest, only after it has committed.
pub fn finish(
    connection: Connection,
    params: &Params,
    cookie: &[u8],
    flags: u32,
    cancelled: bool,
) -> Result<(OwnedDomain, Cookie), Error> {
    let session = params
        .utf8(VIR_MIGRATE_PARAM_DEST_NAME)
        .filter(|_| connection.is_qemu())
        .and_then(|name| sessions::by_name(Role::Destination, name));
    // libvirt itself refuses a user who may not; the session stays for the one who may.
    let may = |session: &Arc<Session>| match connection.domain(session.guest.uuid) {
        Ok(domain) => domain.get().may_migrate(),
        // Its QEMU has died.
        Err(_) => connection.may_write(),
    };
    let Some(session) = session.filter(may) else {
        return phase::finish(connection, params, cookie, flags, cancelled);
    };
    sessions::remove(&session);
    let committed = match cancelled {
        true => Err(None),
        false => match session.engine.ask(&Request::Finish, Some(LOADED)) {
            Ok(Reply::Committed) => {
                session.engine.let_go_of_memory();
                Ok(())
            }
            Ok(reply) => Err(Some(unexpected(&reply))),
            Err(failure) => Err(Some(failure.into())),
        },
    };
    let finished = phase::finish(connection, params, cookie, flags, committed.is_err());
    let conclude = Request::Conclude {
        success: committed.is_ok() && finished.is_ok(),
    };
    // An engine that has failed has said so, and ended.
    if let (false, Err(failure)) = (
        session.engine.has_failed(),
        session.engine.ask(&conclude, Some(LOCAL)),
    ) {
        tracing::warn!(
            guest = session.guest.name,
            "the engine did not conclude: {failure}"
        );
    }
    match (finished, committed) {
        (Ok(finished), _) => Ok(finished),
        (Err(_), Err(Some(ours))) => Err(ours),
        (Err(error), _) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_always_fits() {
        let directory = Path::new(host::INCOMING);
        for name in ["g", &"n".repeat(300), "with space", "ä"] {
            let path = incoming_socket(directory, Uuid::from_u128(1), name);
            assert!(path.as_os_str().len() <= SUN_PATH, "{path:?}");
        }
        let path = incoming_socket(directory, Uuid::from_u128(1), "guest");
        assert!(path.ends_with("00000000.tunnelmigrate.dest.guest"));
    }

    #[test]
    fn the_cookie_says_who_arrives() {
        let uuid = Uuid::from_u128(5);
        let cookie = format!("<qemu-migration><name>g&amp;1</name><uuid>{uuid}</uuid></qemu-migration>\0");
        assert_eq!(identity(cookie.as_bytes()), Some(("g&1".into(), uuid)));
        assert_eq!(identity(b"<qemu-migration/>\0"), None);
    }

    #[test]
    fn a_large_guest_is_waited_for_longer() {
        let of = |size| {
            let block = ferry_contract::session::Block {
                name: "pc.ram".into(),
                size,
                resident: 0,
                page: ferry_contract::session::PAGE,
            };
            to_attach(&Offer {
                session: Uuid::from_u128(1),
                token: ferry_contract::session::Token::new([0; 32]),
                encryption: ferry_contract::session::Encryption::Never,
                certificate: Vec::new(),
                blocks: vec![block],
            })
        };
        assert_eq!(of(1 << 30), LOCAL);
        assert_eq!(of(1 << 40), LOCAL + Duration::from_secs(102));
        assert!(of(u64::MAX) > of(1 << 40));
    }
}
