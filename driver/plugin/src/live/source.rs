//! The host the guest leaves: Begin, Perform, Confirm.

use super::{guard, job, moved, options, orphan, settings, unexpected, uri, DISABLED, LOADED, LOCAL};
use crate::engine::Engine;
use crate::guest_memory;
use crate::libvirt::phase::{self, Begun};
use crate::libvirt::{ending, Cookie, Domain, Error, Params};
use crate::sessions::{self, Opening, Role, Session};
use crate::turns::Moving;
use ferry_contract::config::Config;
use ferry_contract::control::{FailureKind, Options, Reply, Request, Settings};
use ferry_contract::cookie::{self, Answer};
use ferry_contract::session::Guest;
use ferry_host as host;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_sys::{
    VIR_MIGRATE_ABORT_ON_ERROR, VIR_MIGRATE_CHANGE_PROTECTION, VIR_MIGRATE_PARAM_DEST_XML,
    VIR_MIGRATE_PARAM_LISTEN_ADDRESS, VIR_MIGRATE_PARAM_URI,
};

/// Begin: libvirt's own, and where the guest is eligible, our offer in its cookie.
pub fn begin(domain: Domain, params: &Params, flags: u32) -> Result<Begun, Error> {
    let opening = domain.guest().map(|guest| Opening::of(guest.uuid));
    let params = &with_its_memory(domain, params);
    let begun = phase::begin(domain, params, flags)?;
    job::forget(domain);
    match Candidate::of(domain, params, flags).and_then(|candidate| candidate.open(domain, opening.as_ref()))
    {
        Ok(session) => {
            orphan::watch(&session, domain);
            Ok(offer(begun, &session))
        }
        Err(reason) => {
            native(domain, &reason);
            Ok(begun)
        }
    }
}

/// The parameters; an operator's own definition among them says of the guest's memory what libvirt compares it with.
pub fn with_its_memory<'a>(domain: Domain, params: &'a Params) -> Params<'a> {
    let given = params.utf8(VIR_MIGRATE_PARAM_DEST_XML);
    match given.and_then(|xml| guest_memory::as_it_runs(xml, domain)) {
        Some(xml) => params.share().with(VIR_MIGRATE_PARAM_DEST_XML, &xml),
        None => params.share(),
    }
}

/// Adds a session's offer to what the real Begin returned.
pub fn offer(mut begun: Begun, session: &Arc<Session>) -> Begun {
    match cookie::with_offer(begun.cookie.bytes(), &session.offer) {
        Ok(bytes) => begun.cookie = Cookie::copy_of(&bytes),
        Err(error) => {
            tracing::warn!(guest = session.guest.name, "libvirt's own migration: {error}");
            sessions::remove(session);
        }
    }
    begun
}

/// A guest that the engine may be asked about: nothing has been started and nothing touched.
pub struct Candidate {
    config: Config,
    settings: Settings,
    guest: Guest,
    monitor: PathBuf,
}

impl Candidate {
    /// Looks at the call alone; says why the migration is libvirt's own.
    pub fn of(domain: Domain, params: &Params, flags: u32) -> Result<Self, String> {
        if !domain.connection().is_qemu() {
            return Err("its driver is not QEMU".into());
        }
        let config = host::config()?;
        if !config.enabled {
            return Err(DISABLED.into());
        }
        options::read(params, flags)?;
        let settings = settings(&config, flags)?;
        if flags & VIR_MIGRATE_CHANGE_PROTECTION == 0 {
            return Err("the client holds no job across the phases (no change protection)".into());
        }
        let asked = domain.guest().ok_or("libvirt does not say who it is")?;
        let found = domain.connection().domain(asked.uuid);
        let found = found.map_err(|error| error.to_string())?;
        let guest = found.get().guest().ok_or("libvirt does not say who it is")?;
        found.get().id().ok_or("it is not running")?;
        let monitor = super::monitor(found.get()).ok_or(
            "its QEMU was started without the plug-in's monitor; it is eligible after a move to a host with virt-ferry, or \
             defined and started anew (see virt-ferry(1))",
        )?;
        Ok(Self {
            config,
            settings,
            guest,
            monitor,
        })
    }

    /// Who it is, as libvirt has it.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Opens a session if the engine finds the guest eligible. libvirt's job must be held: a device that is plugged
    /// in after this look would be missed.
    pub fn open(self, domain: Domain, opening: Option<&Opening>) -> Result<Arc<Session>, String> {
        // Its engine would hold the monitor, which serves one client.
        sessions::forget(Role::Source, self.guest.uuid);
        let name = domain.connection().hostname().unwrap_or_else(host::name);
        let engine = Engine::start(&self.config, "source", &name).map_err(|error| error.to_string())?;
        let turn =
            Moving::away(self.guest.uuid).ok_or("its memory is about to be saved, dumped or snapshotted")?;
        engine
            .guard(&self.monitor, turn)
            .map_err(|failure| failure.to_string())?;
        let inspect = Request::Inspect {
            guest: self.guest.clone(),
            host: name,
            monitor: self.monitor,
            settings: self.settings,
        };
        match engine.ask(&inspect, Some(LOCAL)) {
            Ok(Reply::Offer(offer)) => {
                let session = sessions::add(Session::new(Role::Source, self.guest, offer, engine));
                if opening.is_some_and(Opening::is_cancelled) {
                    session.cancel();
                }
                Ok(session)
            }
            Ok(Reply::NotEligible { reason }) => Err(reason),
            Ok(_) => Err("the engine answered out of turn".into()),
            Err(failure) => Err(failure.to_string()),
        }
    }
}

/// Perform, with all the client's flags but peer-to-peer: through the engine where the destination answered,
/// libvirt's own where it did not.
pub fn perform(domain: Domain, params: &Params, cookie: &[u8], flags: u32) -> Result<Cookie, Error> {
    if !domain.may_migrate() {
        return phase::perform(domain, None, params, cookie, flags);
    }
    let session = domain
        .guest()
        .and_then(|guest| sessions::by_uuid(Role::Source, guest.uuid));
    let answer = match cookie::answer(cookie) {
        Ok(answer) => answer,
        Err(error) => {
            session.as_ref().inspect(|session| sessions::remove(session));
            let cause = format!("host {}: {error}", host::name());
            return Err(give_up(domain, params, flags, Error::failed(cause)));
        }
    };
    match (answer, session) {
        (Some(answer), Some(session)) => {
            // To the end of this call: a job of libvirt's that has failed has not lost its client.
            let Some(_claim) = session.claim() else {
                return Err(claimed());
            };
            let performed = through_engine(domain, params, cookie, flags, answer, &session);
            if performed.is_err() {
                sessions::remove(&session);
            }
            performed
        }
        (Some(_), None) => {
            let cause = format!(
                "host {} has no engine for this guest any more; try again",
                host::name()
            );
            Err(give_up(domain, params, flags, Error::failed(cause)))
        }
        (None, session) => {
            if let Some(session) = session {
                native(domain, "the destination did not answer: it has no plug-in, another version, or declined (see its log)");
                sessions::remove(&session);
            }
            let _turn =
                guard::with_its_memory(domain).map_err(|error| give_up(domain, params, flags, error))?;
            phase::perform(domain, None, params, cookie, flags)
        }
    }
}

fn through_engine(
    domain: Domain,
    params: &Params,
    cookie: &[u8],
    flags: u32,
    answer: Answer,
    session: &Arc<Session>,
) -> Result<Cookie, Error> {
    if answer.session != session.offer.session {
        let cause = format!(
            "host {} was answered for another migration than this one; try again",
            host::name()
        );
        return Err(give_up(domain, params, flags, Error::failed(cause)));
    }
    let options = match asked(domain, params, flags) {
        Ok(options) => options,
        Err(changed) => return Err(give_up(domain, params, flags, Error::failed(changed))),
    };
    let disks = options.storage.then(|| uri::disks(&answer.host, None));
    let (params, native) = options::for_libvirt(params, flags);
    let towards = |socket: &Path| towards(&params, socket, disks.as_deref());
    let give_up = |error| give_up(domain, &params, flags, error);
    let socket = match session.engine.ask(&Request::Precopy { answer, options }, None) {
        Ok(Reply::Switchover { socket }) => socket,
        Ok(reply) => return Err(give_up(unexpected(&reply))),
        Err(failure) => {
            let error = give_up(failure.into());
            // The engine may have noticed before libvirt has.
            return Err(if domain.is_over() { over(session) } else { error });
        }
    };
    let performed = phase::perform(domain, None, &towards(&socket), cookie, native);
    // The engine removes it, too, but it may have died.
    let _ = std::fs::remove_file(&socket);
    let engine = session.engine.ask(
        &Request::Performed {
            success: performed.is_ok(),
        },
        Some(LOADED),
    );
    match (performed, engine) {
        (Ok(cookie), committed) => {
            session.hand_over();
            // QEMU has handed everything over, which it could only after the commitment. The destination's engine
            // is asked again before the guest is resumed there.
            if !matches!(committed, Ok(Reply::Committed)) {
                tracing::warn!(
                    guest = session.guest.name,
                    "the engine could not confirm the commitment"
                );
            }
            let statistics = session.engine.statistics();
            moved::remember(session.guest.uuid, statistics);
            Ok(job::in_cookie(cookie, statistics))
        }
        // libvirt has ended it, as asked, and says so.
        (Err(error), _) if flags & VIR_MIGRATE_ABORT_ON_ERROR != 0 && domain.failed_at_io() => Err(error),
        (Err(_), _) if domain.is_over() => Err(over(session)),
        // QEMU breaks its own stream before it notes that it was told to cancel (10.0.2, `migration_cancel`), and may
        // then call it a failure of the channel.
        (Err(_), Err(failure)) if failure.kind == FailureKind::Cancelled && session.is_cancelled() => {
            Err(Error::cancelled())
        }
        // The engine knows better than "migration failed" why the stream ended, unless libvirt ended it.
        (Err(_), Err(failure)) if failure.kind == FailureKind::Failed => Err(failure.into()),
        (Err(error), _) => Err(error),
    }
}

/// The error of a guest that was ended, or whose QEMU ended, on this host.
fn over(session: &Session) -> Error {
    Error::failed(format!(
        "guest {} ended on host {} while it was moving; where nobody ended it, see the log of its QEMU there",
        session.guest.name,
        host::name()
    ))
}

/// What the operator asks of this migration, in its call or before it (`virsh migrate-setspeed`).
fn asked(domain: Domain, params: &Params, flags: u32) -> Result<Options, String> {
    let mut asked = options::read(params, flags)?;
    if asked.bandwidth == 0 {
        asked.bandwidth = options::bandwidth(domain.max_speed().unwrap_or(0))?;
    }
    Ok(asked)
}

/// The parameters for a Perform into the engine's socket. With it, libvirt 11.3 refuses a listen address and wants to
/// be told where disks go: to the destination's host, at the port that is in libvirt's cookie.
fn towards<'a>(params: &'a Params<'_>, socket: &Path, disks: Option<&str>) -> Params<'a> {
    let uri = format!("unix://{}", socket.display());
    let params = params
        .share()
        .without(VIR_MIGRATE_PARAM_LISTEN_ADDRESS)
        .with(VIR_MIGRATE_PARAM_URI, &uri);
    match disks {
        Some(disks) => uri::with_disks(params, disks),
        None => params,
    }
}

/// Ends libvirt's job after a Perform that libvirt never saw: nobody else will (a failed Perform is not followed
/// by a Confirm), and the guest would refuse every job from then on.
fn give_up(domain: Domain, params: &Params, flags: u32, error: Error) -> Error {
    let only_job = params.share().only(&[]);
    if let Err(left) = phase::confirm(domain, &only_job, &[], flags, true) {
        tracing::error!("libvirt could not end its migration job: {left}");
    }
    error
}

/// Confirm: libvirt's own, and the end of the session.
///
/// A guest that has been handed over is the destination's, and a client that lost its connection to the destination
/// knows no better: before such a guest is resumed here, the destination's engine is asked whether it runs there.
pub fn confirm(
    domain: Domain,
    params: &Params,
    cookie: &[u8],
    flags: u32,
    cancelled: bool,
) -> Result<(), Error> {
    let session = domain
        .guest()
        .and_then(|guest| sessions::by_uuid(Role::Source, guest.uuid));
    let Some(session) = session.filter(|_| domain.may_migrate()) else {
        return phase::confirm(domain, params, cookie, flags, cancelled);
    };
    // Taken only where the client was thought to have gone, which then is not so.
    let Some(_claim) = session.claim() else {
        return Err(claimed());
    };
    if !(cancelled && session.is_handed_over()) {
        ending::waited_for(|| phase::confirm(domain, params, cookie, flags, cancelled))?;
        conclude(&session, !cancelled);
        sessions::remove(&session);
        return Ok(());
    }
    let go_on = match conclude(&session, false) {
        Some(Reply::Concluded) => true,
        Some(Reply::RunsThere) => {
            tracing::warn!(guest = session.guest.name, "the guest runs at the destination: it is ended here");
            false
        }
        // The session stays, so that another Confirm is answered the same. libvirt ends the job when its client
        // goes, and leaves the guest as it is.
        _ => {
            return Err(Error::failed(format!(
                "guest {} was handed over, but the destination does not say whether it runs there, so it stays \
                 paused on host {}. Look at the destination. If the guest runs there, virsh destroy it here; if it \
                 does not, virsh resume it here once the client of this migration has disconnected",
                session.guest.name,
                host::name()
            )))
        }
    };
    sessions::remove(&session);
    phase::confirm(domain, params, cookie, flags, go_on)
}

/// The error of a call for a migration that is being ended.
fn claimed() -> Error {
    Error::failed(format!(
        "host {} is ending this migration, whose client had no job any more",
        host::name()
    ))
}

/// Tells the engine how it ended; `None` where it does not answer.
pub fn conclude(session: &Session, success: bool) -> Option<Reply> {
    let concluded = session.engine.ask(&Request::Conclude { success }, Some(LOADED));
    concluded
        .inspect_err(|failure| {
            tracing::warn!(
                guest = session.guest.name,
                "the engine did not conclude: {failure}"
            )
        })
        .ok()
}

/// Says why a migration is libvirt's own.
pub fn native(domain: Domain, reason: &str) {
    let guest = domain.guest().map_or_else(String::new, |guest| guest.name);
    tracing::info!(guest, "libvirt's own migration: {reason}");
}
