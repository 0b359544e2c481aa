//! Peer-to-peer: the source's daemon is called once and runs the phases itself, on a connection of its own.
//!
//! libvirt's own peer-to-peer code goes past the functions we stand in for, so a guest that the engine can move is
//! moved by this room: the same phases, in the same order, with the same errors. What would send the migration
//! libvirt's own way is found out before the destination is touched: is the guest eligible (looked at under the job
//! that Begin takes), does the destination have the plug-in (a Prepare with nothing in it but our question, which
//! libvirt refuses without doing anything)? Then Begin is undone, and libvirt begins anew.
//!
//! libvirt binds the job to the connection that Begin came on. The client's may live as long as its process, Nova's for
//! weeks: should the job be left, the guest would refuse everything as long. So the phases run on a connection of our
//! own, which closes with them; the caller's identity is the thread's, and holds on it too.

use super::source::{self, Candidate};
use super::{guard, job};
use crate::libvirt::phase::{self, Begun};
use crate::libvirt::{c_string, Connection, Cookie, Domain, Error, OwnedConnection, OwnedDomain, Params};
use crate::sessions::{self, Opening, Session};
use ferry_contract::cookie;
use std::ffi::CStr;
use std::sync::Arc;
use virt_sys::*;

/// What libvirt's own peer-to-peer code passes on to the destination (libvirt 11.3, qemuMigrationSrcPeer2Peer3);
/// an older one refuses names it does not know.
pub const DESTINATION: [&CStr; 13] = [
    VIR_MIGRATE_PARAM_DEST_XML,
    VIR_MIGRATE_PARAM_DEST_NAME,
    VIR_MIGRATE_PARAM_URI,
    VIR_MIGRATE_PARAM_GRAPHICS_URI,
    VIR_MIGRATE_PARAM_LISTEN_ADDRESS,
    VIR_MIGRATE_PARAM_BANDWIDTH,
    VIR_MIGRATE_PARAM_MIGRATE_DISKS,
    VIR_MIGRATE_PARAM_MIGRATE_DISKS_DETECT_ZEROES,
    VIR_MIGRATE_PARAM_DISKS_PORT,
    VIR_MIGRATE_PARAM_DISKS_URI,
    VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS,
    VIR_MIGRATE_PARAM_COMPRESSION,
    VIR_MIGRATE_PARAM_COMPRESSION_ZSTD_LEVEL,
];

/// Perform with VIR_MIGRATE_PEER2PEER: through the engine, or libvirt's own.
pub fn perform(
    domain: Domain,
    destination: Option<&CStr>,
    params: &Params,
    cookie: &[u8],
    flags: u32,
) -> Result<Cookie, Error> {
    let params = &source::with_its_memory(domain, params);
    let own = || phase::perform(domain, destination, params, cookie, flags);
    // A cookie, no destination, or a user who may not, are errors of libvirt's own to tell.
    let Some(uri) = destination.filter(|_| cookie.is_empty() && domain.may_migrate()) else {
        return own();
    };
    job::forget(domain);
    let managed = flags & !VIR_MIGRATE_PEER2PEER | VIR_MIGRATE_CHANGE_PROTECTION;
    let reason = match candidate(domain, params, managed) {
        Ok((candidate, here)) => {
            let moving = Move {
                domain: here.get(),
                uri,
                params,
                flags,
                managed,
            };
            match moving.run(candidate)? {
                Outcome::Moved => return Ok(Cookie::none()),
                Outcome::Own(reason) => reason,
            }
        }
        Err(reason) => reason,
    };
    source::native(domain, &reason);
    let _turn = guard::with_its_memory(domain)?;
    own()
}

/// A guest that the engine may be asked about, on a connection of our own that closes with it.
fn candidate(domain: Domain, params: &Params, managed: u32) -> Result<(Candidate, OwnedDomain), String> {
    let candidate = Candidate::of(domain, params, managed)?;
    let uri = domain.connection().uri().ok_or("its connection has no URI")?;
    let here = OwnedConnection::here(&c_string(&uri)).map_err(|error| error.to_string())?;
    let found = here.get().domain(candidate.guest().uuid);
    // A domain keeps its connection open.
    Ok((candidate, found.map_err(|error| error.to_string())?))
}

/// Whether the peer has the plug-in.
pub fn answers(peer: Connection) -> bool {
    let probe = cookie::probe();
    let answered = phase::prepare(peer, &Params::none(), &probe, 0);
    answered.is_ok_and(|answer| cookie::is_probe(answer.cookie.bytes()))
}

enum Outcome {
    Moved,
    /// The guest runs here, no job is held, and the migration is libvirt's own for this reason.
    Own(String),
}

struct Move<'a> {
    domain: Domain,
    uri: &'a CStr,
    params: &'a Params<'a>,
    flags: u32,
    managed: u32,
}

/// A session that ends with the phases, however they do: nobody else looks after it.
struct Listed(Arc<Session>);

impl Drop for Listed {
    fn drop(&mut self) {
        sessions::remove(&self.0);
    }
}

impl Move<'_> {
    /// Begin, which checks the guest and takes the job; then, under the job, whether all is there for the engine.
    fn run(&self, candidate: Candidate) -> Result<Outcome, Error> {
        let opening = self.domain.guest().map(|guest| Opening::of(guest.uuid));
        let begun = phase::begin(self.domain, self.params, self.managed)?;
        let session = match candidate.open(self.domain, opening.as_ref()) {
            Ok(session) => Listed(session),
            Err(reason) => return Ok(self.own(reason)),
        };
        match OwnedConnection::to_peer(self.uri) {
            Ok(peer) if answers(peer.get()) => self.phases(peer.get(), begun, &session.0),
            Ok(_) => Ok(self.own(
                "the destination has no plug-in, one of another version, or is not to use it (see its log)",
            )),
            // libvirt's own code meets the same failure, unless it has passed by then.
            Err(error) => Ok(self.own(format!(
                "the destination {} cannot be reached: {error}",
                self.uri.to_string_lossy()
            ))),
        }
    }

    /// Leaves everything as it was before Begin.
    fn own(&self, reason: impl Into<String>) -> Outcome {
        // libvirt's own would meet the job that is left, if one is, and says so.
        let _ = self.resume();
        Outcome::Own(reason.into())
    }

    /// The phases after Begin. On an error the guest runs on here and the job is given back.
    fn phases(&self, peer: Connection, begun: Begun, session: &Arc<Session>) -> Result<Outcome, Error> {
        let begun = source::offer(begun, session);
        let xml = begun.xml.text().to_string_lossy().into_owned();
        let name = self
            .params
            .utf8(VIR_MIGRATE_PARAM_DEST_NAME)
            .unwrap_or(&session.guest.name)
            .to_owned();
        let paused = match self.domain.is_paused() {
            Ok(true) => VIR_MIGRATE_PAUSED,
            Ok(false) => 0,
            Err(error) => return Err(self.stay(error)),
        };
        // As libvirt's own: the destination sees PEER2PEER, but neither the source's own business.
        let there = (self.flags | paused)
            & !(VIR_MIGRATE_ABORT_ON_ERROR | VIR_MIGRATE_AUTO_CONVERGE | VIR_MIGRATE_CHANGE_PROTECTION);
        let given = self
            .params
            .share()
            .only(&DESTINATION)
            .with(VIR_MIGRATE_PARAM_DEST_XML, &xml);
        let given = given.with(VIR_MIGRATE_PARAM_DEST_NAME, &name);
        let prepared = match phase::prepare(peer, &given, begun.cookie.bytes(), there) {
            Ok(prepared) => prepared,
            Err(error) => return Err(self.stay(error)),
        };
        let answered = matches!(cookie::answer(prepared.cookie.bytes()), Ok(Some(_)));
        if !answered {
            // Declined after all: nothing of it may be left before libvirt begins anew.
            let _ = self.finish(peer, &name, &[], there, true);
            return Ok(self.own("the destination declined (see its log)"));
        }
        let uri = prepared
            .uri
            .as_ref()
            .map(|uri| uri.text().to_string_lossy().into_owned());
        let here = match &uri {
            Some(uri) => self.params.share().with(VIR_MIGRATE_PARAM_URI, uri),
            None => self.params.share(),
        };
        let performed = source::perform(self.domain, &here, prepared.cookie.bytes(), self.managed | paused);
        let failed = match performed {
            Ok(cookie) => match self.finish(peer, &name, cookie.bytes(), there, false) {
                Ok((arrived, cookie)) => {
                    self.confirmed(cookie.bytes());
                    drop(arrived);
                    return Ok(Outcome::Moved);
                }
                Err(error) => self.stay(error),
            },
            Err(error) => {
                // Perform has resumed the guest and ended the job; the destination still has to be ended.
                let _ = self.finish(peer, &name, &[], there, true);
                error
            }
        };
        Err(failed)
    }

    fn finish(
        &self,
        peer: Connection,
        name: &str,
        cookie: &[u8],
        flags: u32,
        cancelled: bool,
    ) -> Result<(OwnedDomain, Cookie), Error> {
        let given = self
            .params
            .share()
            .only(&DESTINATION)
            .with(VIR_MIGRATE_PARAM_DEST_NAME, name);
        phase::finish(peer, &given, cookie, flags, cancelled)
    }

    /// The guest is the destination's: end it here. A failure is only logged, as libvirt does, since the
    /// migration has succeeded.
    fn confirmed(&self, cookie: &[u8]) {
        if let Err(left) = source::confirm(self.domain, &Params::none(), cookie, self.managed, false) {
            tracing::warn!("libvirt could not end the guest on the source: {left}");
        }
    }

    /// The guest stays: resume it if it was stopped, give the job back.
    ///
    /// # Errors
    /// Why the guest does not go on here, and what to do.
    fn resume(&self) -> Result<(), Error> {
        source::confirm(self.domain, &Params::none(), &[], self.managed, true)
            .inspect_err(|left| tracing::warn!("the migration's job was not ended: {left}"))
    }

    /// [`Self::resume`], on the way out with the first error; together with what keeps the guest from going on here.
    fn stay(&self, error: Error) -> Error {
        match self.resume() {
            Err(ours @ Error::Ours { .. }) => error.and(&ours),
            _ => error,
        }
    }
}
