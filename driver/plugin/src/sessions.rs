//! The migrations this daemon takes part in, by role and guest.

use crate::engine::Engine;
use ferry_contract::cookie::Offer;
use ferry_contract::session::Guest;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use uuid::Uuid;

/// Which end of a migration this host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The guest leaves.
    Source,
    /// The guest arrives.
    Destination,
}

/// One migration on this host.
pub struct Session {
    /// Which end.
    pub role: Role,
    /// The guest, by its name on this host.
    pub guest: Guest,
    /// What the source offered.
    pub offer: Offer,
    /// Its engine.
    pub engine: Engine,
    cancelled: AtomicBool,
    handed_over: AtomicBool,
}

impl Session {
    /// A session with its engine.
    pub fn new(role: Role, guest: Guest, offer: Offer, engine: Engine) -> Self {
        Self {
            role,
            guest,
            offer,
            engine,
            cancelled: AtomicBool::new(false),
            handed_over: AtomicBool::new(false),
        }
    }

    /// Notes that the operator gave it up, and tells the engine.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Err(failure) = self.engine.tell(&ferry_contract::control::Request::Cancel) {
            tracing::warn!(%failure, guest = self.guest.name, "the engine was not told to cancel");
        }
    }

    /// Notes that the guest has been handed over: it is the destination's.
    pub fn hand_over(&self) {
        self.handed_over.store(true, Ordering::Relaxed);
    }

    /// Whether it has.
    pub fn is_handed_over(&self) -> bool {
        self.handed_over.load(Ordering::Relaxed)
    }

    /// Whether the operator gave it up.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Bytes promised to this guest on this host that may not be resident yet.
    fn promised(&self) -> u64 {
        let all: u64 = self
            .offer
            .blocks
            .iter()
            .map(|block| block.resident)
            .fold(0, u64::saturating_add);
        all.saturating_sub(self.engine.statistics().data)
    }
}

static SESSIONS: Mutex<Vec<Arc<Session>>> = Mutex::new(Vec::new());

fn sessions() -> MutexGuard<'static, Vec<Arc<Session>>> {
    // Nothing under this lock can leave the list half changed.
    SESSIONS.lock().unwrap_or_else(|e| e.into_inner())
}

/// Adds a session in place of one of the same role and guest that was left behind; forgets those whose engine
/// is gone.
pub fn add(session: Session) -> Arc<Session> {
    let session = Arc::new(session);
    let left: Vec<Arc<Session>>;
    {
        let mut list = sessions();
        let stale = |other: &Arc<Session>| {
            other.engine.is_gone() || (other.role == session.role && other.guest.uuid == session.guest.uuid)
        };
        left = list.extract_if(.., |other| stale(other)).collect();
        list.push(Arc::clone(&session));
    }
    // Dropped here: letting an engine go must not happen under the lock.
    drop(left);
    session
}

/// The session of this guest.
pub fn by_uuid(role: Role, uuid: Uuid) -> Option<Arc<Session>> {
    sessions()
        .iter()
        .find(|session| session.role == role && session.guest.uuid == uuid)
        .cloned()
}

/// The session of the guest of this name on this host.
pub fn by_name(role: Role, name: &str) -> Option<Arc<Session>> {
    sessions()
        .iter()
        .find(|session| session.role == role && session.guest.name == name)
        .cloned()
}

/// Forgets a session; its engine is let go with the last reference.
pub fn remove(session: &Arc<Session>) {
    let mut list = sessions();
    list.retain(|other| !Arc::ptr_eq(other, session));
}

/// Bytes of memory promised to guests on their way to this host.
pub fn promised() -> u64 {
    let arriving: Vec<_> = sessions()
        .iter()
        .filter(|session| session.role == Role::Destination)
        .cloned()
        .collect();
    arriving
        .iter()
        .map(|session| session.promised())
        .fold(0, u64::saturating_add)
}
