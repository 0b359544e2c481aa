//! Peer-to-peer: the source's daemon is called once and runs the phases itself, on a connection of its own.

use super::{configuration, here, source};
use crate::libvirt::phase::{self, Begun};
use crate::libvirt::{Connection, Cookie, Domain, Error, OwnedConnection, Params};
use crate::live::p2p::{answers, DESTINATION};
use ferry_contract::cookie;
use std::ffi::CStr;
use virt_sys::*;

/// Perform with VIR_MIGRATE_PEER2PEER.
pub fn perform(
    domain: Domain,
    destination: Option<&CStr>,
    params: &Params,
    cookie: &[u8],
    flags: u32,
) -> Result<Cookie, Error> {
    // A cookie, no destination, or a user who may not, are errors of libvirt's own to tell.
    let may = cookie.is_empty() && domain.may_migrate();
    let Some(uri) = destination.filter(|_| may && configuration().is_some()) else {
        return phase::perform(domain, destination, params, cookie, flags);
    };
    let moving = Move {
        domain,
        uri,
        params,
        there: flags & !VIR_MIGRATE_ABORT_ON_ERROR,
        managed: flags & !VIR_MIGRATE_PEER2PEER,
    };
    moving.run()?;
    Ok(Cookie::none())
}

struct Move<'a> {
    domain: Domain,
    uri: &'a CStr,
    params: &'a Params<'a>,
    there: u32,
    managed: u32,
}

impl Move<'_> {
    fn run(&self) -> Result<(), Error> {
        let begun = source::begin(self.domain, self.params, self.managed)?;
        self.phases(&begun).inspect_err(|_| {
            if let Err(left) = self.confirm(true) {
                tracing::warn!("the migration is not given up yet: {left}");
            }
        })?;
        // As libvirt: the guest has moved, whatever is left to do here.
        if let Err(left) = self.confirm(false) {
            tracing::warn!("the guest has moved, but something of it is left here: {left}");
        }
        Ok(())
    }

    /// The destination's phases; it has the guest afterwards, or nothing of it.
    fn phases(&self, begun: &Begun) -> Result<(), Error> {
        let peer = OwnedConnection::open(self.uri)?;
        if !answers(peer.get()) {
            return Err(here(format!(
                "the destination, {}, has no virt-ferry, one of another version, or is not to use it (see its log): install it \
                 there, or copy the storage yourself and leave --copy-storage-all out",
                self.uri.to_string_lossy()
            )));
        }
        let name = self.domain.guest().map(|guest| guest.name).unwrap_or_default();
        let xml = begun.xml.text().to_string_lossy();
        let name = self
            .params
            .utf8(VIR_MIGRATE_PARAM_DEST_NAME)
            .unwrap_or(&name)
            .to_owned();
        let given = self
            .params
            .share()
            .only(&DESTINATION)
            .with(VIR_MIGRATE_PARAM_DEST_XML, &xml)
            .with(VIR_MIGRATE_PARAM_DEST_NAME, &name);
        let prepared = phase::prepare(peer.get(), &given, begun.cookie.bytes(), self.there)?;
        let finish = |peer: Connection, cancelled| {
            let given = given.share().without(VIR_MIGRATE_PARAM_DEST_XML);
            phase::finish(peer, &given, &[], self.there, cancelled).map(drop)
        };
        if !matches!(cookie::cold_answer(prepared.cookie.bytes()), Ok(Some(_))) {
            // Always an error: cancelled, it returns no domain.
            let _ = finish(peer.get(), true);
            return Err(here("the destination prepared for a guest without its files"));
        }
        finish(peer.get(), false)
    }

    fn confirm(&self, cancelled: bool) -> Result<(), Error> {
        source::confirm(self.domain, &Params::none(), &[], self.managed, cancelled)
    }
}
