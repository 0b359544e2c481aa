//! The cold migrations this daemon takes part in, by role and guest.

use super::destination::Arrived;
use crate::engine::Engine;
use ferry_contract::cold::journal::Role;
use ferry_contract::control::Request;
use ferry_contract::session::Guest;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use uuid::Uuid;

/// One cold migration on this host.
pub struct Session {
    /// Which end.
    pub role: Role,
    /// The guest, by its name on this host.
    pub guest: Guest,
    /// Its engine.
    pub engine: Engine,
    /// When it began.
    pub started: Instant,
    /// Destination: what Finish registers.
    pub arrived: Option<Arrived>,
}

impl Session {
    /// Tells the engine that the operator gave it up.
    pub fn cancel(&self) {
        if let Err(failure) = self.engine.tell(&Request::Cancel) {
            tracing::warn!(%failure, guest = self.guest.name, "the engine was not told to cancel");
        }
    }
}

static SESSIONS: Mutex<Vec<Arc<Session>>> = Mutex::new(Vec::new());

fn sessions() -> MutexGuard<'static, Vec<Arc<Session>>> {
    // Nothing under this lock can leave the list half changed.
    SESSIONS.lock().unwrap_or_else(|e| e.into_inner())
}

/// Adds a session; there is none of this role and guest.
pub fn add(session: Session) -> Arc<Session> {
    let session = Arc::new(session);
    sessions().push(Arc::clone(&session));
    session
}

/// The session of this guest.
pub fn by_uuid(role: Role, uuid: Uuid) -> Option<Arc<Session>> {
    let list = sessions();
    let found = list.iter().rev();
    found
        .clone()
        .find(|session| session.role == role && session.guest.uuid == uuid)
        .cloned()
}

/// The session of the guest of this name on this host.
pub fn by_name(role: Role, name: &str) -> Option<Arc<Session>> {
    let list = sessions();
    let found = list.iter().rev();
    found
        .clone()
        .find(|session| session.role == role && session.guest.name == name)
        .cloned()
}

/// The session in which an engine works on this guest, of any role.
pub fn under_way(uuid: Uuid) -> Option<Arc<Session>> {
    let list = sessions();
    list.iter()
        .find(|session| session.guest.uuid == uuid && !session.engine.is_gone())
        .cloned()
}

/// Whether an engine works on this guest, of any role.
pub fn is_under_way(uuid: Uuid) -> bool {
    under_way(uuid).is_some()
}

/// Whether a session has not been taken off the list.
pub fn is_listed(session: &Arc<Session>) -> bool {
    sessions().iter().any(|other| Arc::ptr_eq(other, session))
}

/// Takes a session off the list; `false` where somebody else has: who takes it ends it.
pub fn take(session: &Arc<Session>) -> bool {
    let mut list = sessions();
    let before = list.len();
    list.retain(|other| !Arc::ptr_eq(other, session));
    list.len() < before
}
