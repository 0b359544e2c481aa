//! The migrations this daemon takes part in, by role and guest.

use crate::engine::Engine;
use crate::workers::{self, Leaving};
use ferry_contract::cookie::Offer;
use ferry_contract::session::Guest;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use uuid::Uuid;

/// Which end of a migration this host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The guest leaves.
    Source,
    /// The guest arrives.
    Destination,
}

/// Bytes of memory promised to arriving guests, whether or not they have arrived yet.
static PROMISED: AtomicU64 = AtomicU64::new(0);

/// Bytes of huge pages promised to guests whose QEMU has not started yet.
static PROMISED_HUGE: AtomicU64 = AtomicU64::new(0);

/// Memory promised to one arriving guest, for as long as this lives.
pub struct Promise(u64);

/// Huge pages promised to one arriving guest until its QEMU, which takes them all, has started: then this is dropped.
pub struct HugePromise(u64);

impl Promise {
    /// Promises memory for these blocks; also returns what others have been promised and do not hold yet.
    pub fn make(offer: &Offer) -> (Self, u64) {
        let blocks = offer.blocks.iter().filter(|block| !block.is_huge());
        let bytes = blocks.map(|block| block.resident).fold(0, u64::saturating_add);
        // Sums of what hosts offer stay far below 2^64: each block is bounded by the cookie's parser.
        let others = PROMISED.fetch_add(bytes, Ordering::Relaxed);
        (Self(bytes), others.saturating_sub(landed()))
    }
}

impl HugePromise {
    /// [`Promise::make`] for huge pages.
    pub fn make(offer: &Offer) -> (Self, u64) {
        let blocks = offer.blocks.iter().filter(|block| block.is_huge());
        let bytes = blocks.map(|block| block.size).fold(0, u64::saturating_add);
        (Self(bytes), PROMISED_HUGE.fetch_add(bytes, Ordering::Relaxed))
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        PROMISED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

impl Drop for HugePromise {
    fn drop(&mut self) {
        PROMISED_HUGE.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Bytes of promised memory that arriving guests hold already.
fn landed() -> u64 {
    let arriving: Vec<_> = sessions()
        .iter()
        .filter(|session| session.role == Role::Destination)
        .cloned()
        .collect();
    let held = |session: &Arc<Session>| match &session.promise {
        // Nothing more will arrive.
        Some(Promise(bytes)) if session.engine.is_gone() => *bytes,
        Some(Promise(bytes)) => session.engine.statistics().data.min(*bytes),
        None => 0,
    };
    arriving.iter().map(held).fold(0, u64::saturating_add)
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
    /// When it began.
    pub started: Instant,
    promise: Option<Promise>,
    _incoming: Option<SocketFile>,
    cancelled: AtomicBool,
    handed_over: AtomicBool,
    claimed: AtomicBool,
    _leaving: Option<Leaving>,
}

/// The right to end a session, until this is dropped.
pub struct Claim<'a>(&'a AtomicBool);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// The socket of an incoming QEMU. Ended before anybody has connected, QEMU leaves it behind.
pub struct SocketFile(pub PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Absent where QEMU was connected to: it removes the socket itself then.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Session {
    /// A session with its engine.
    pub fn new(role: Role, guest: Guest, offer: Offer, engine: Engine) -> Self {
        Self {
            role,
            guest,
            offer,
            engine,
            started: Instant::now(),
            promise: None,
            _incoming: None,
            cancelled: AtomicBool::new(false),
            handed_over: AtomicBool::new(false),
            claimed: AtomicBool::new(false),
            _leaving: (role == Role::Source).then(workers::leaving),
        }
    }

    /// Keeps what this host promised to an arriving guest, and the socket its QEMU has bound.
    pub fn arriving(mut self, promise: Promise, incoming: SocketFile) -> Self {
        self.promise = Some(promise);
        self._incoming = Some(incoming);
        self
    }

    /// The right to end it, unless somebody else has it.
    pub fn claim(&self) -> Option<Claim<'_>> {
        let taken = self.claimed.swap(true, Ordering::Acquire);
        (!taken).then_some(Claim(&self.claimed))
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
}

/// A migration away from here that libvirt has begun, or is about to, and that may have no session yet: an abort that
/// comes meanwhile must not be lost.
pub struct Opening {
    cancelled: Arc<AtomicBool>,
}

static OPENING: Mutex<Vec<(Uuid, Arc<AtomicBool>)>> = Mutex::new(Vec::new());

fn openings() -> MutexGuard<'static, Vec<(Uuid, Arc<AtomicBool>)>> {
    // As with the sessions.
    OPENING.lock().unwrap_or_else(|e| e.into_inner())
}

impl Opening {
    /// To be had before libvirt's Begin, since an abort can come as soon as that has taken the job.
    pub fn of(guest: Uuid) -> Self {
        let cancelled = Arc::default();
        openings().push((guest, Arc::clone(&cancelled)));
        Self { cancelled }
    }

    /// Whether it was given up before it had a session. To be asked once the session is listed.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

/// Whether a migration of this guest away from here has begun, or is about to.
pub fn is_opening(guest: Uuid) -> bool {
    openings().iter().any(|(other, _)| *other == guest)
}

impl Drop for Opening {
    fn drop(&mut self) {
        openings().retain(|(_, cancelled)| !Arc::ptr_eq(cancelled, &self.cancelled));
    }
}

/// The operator gave up this guest's migration away from here, whether or not it has a session yet.
pub fn cancel(guest: Uuid) {
    // Noted first: a session that is listed after this look-up finds the note.
    for (_, cancelled) in openings().iter().filter(|(other, _)| *other == guest) {
        cancelled.store(true, Ordering::Release);
    }
    if let Some(session) = by_uuid(Role::Source, guest) {
        session.cancel();
    }
}

static SESSIONS: Mutex<Vec<Arc<Session>>> = Mutex::new(Vec::new());

fn sessions() -> MutexGuard<'static, Vec<Arc<Session>>> {
    // Nothing under this lock can leave the list half changed.
    SESSIONS.lock().unwrap_or_else(|e| e.into_inner())
}

/// Adds a session in place of one of the same role and guest that was left behind; forgets those whose engine
/// is gone. But for a guest that has been handed over: that it must not simply go on here is known by its session alone,
/// which ends with the phases, or with their client (`live::orphan`).
pub fn add(session: Session) -> Arc<Session> {
    let session = Arc::new(session);
    let left: Vec<Arc<Session>>;
    {
        let mut list = sessions();
        let stale = |other: &Arc<Session>| {
            let same = other.role == session.role && other.guest.uuid == session.guest.uuid;
            same || (other.engine.is_gone() && !other.is_handed_over())
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

/// The newest session of the guest of this name on this host.
pub fn by_name(role: Role, name: &str) -> Option<Arc<Session>> {
    sessions()
        .iter()
        .rev()
        .find(|session| session.role == role && session.guest.name == name)
        .cloned()
}

/// Forgets sessions of this guest that an earlier attempt left behind.
pub fn forget(role: Role, uuid: Uuid) {
    while let Some(session) = by_uuid(role, uuid) {
        remove(&session);
    }
}

/// Whether a session has not been forgotten.
pub fn is_listed(session: &Arc<Session>) -> bool {
    sessions().iter().any(|other| Arc::ptr_eq(other, session))
}

/// Forgets a session; its engine is let go with the last reference.
pub fn remove(session: &Arc<Session>) {
    let mut list = sessions();
    list.retain(|other| !Arc::ptr_eq(other, session));
}
