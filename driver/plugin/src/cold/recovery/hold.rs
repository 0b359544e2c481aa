//! One deals with a guest's migration at a time.

use super::LOOK;
use crate::cold::{here, sessions};
use crate::libvirt::Error;
use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long an attempt of our own thread's takes where the other host does not answer, and a little more.
const ATTEMPT: Duration = Duration::from_secs(60);

/// Guests that somebody is dealing with.
static HELD: Mutex<Option<HashSet<Uuid>>> = Mutex::new(None);

fn held() -> MutexGuard<'static, Option<HashSet<Uuid>>> {
    // A set is changed in one step.
    HELD.lock().unwrap_or_else(|e| e.into_inner())
}

/// The right to deal with a guest's migration, until this is dropped.
pub struct Hold(Uuid);

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(set) = held().as_mut() {
            set.remove(&self.0);
        }
    }
}

pub(super) fn try_hold(uuid: Uuid) -> Option<Hold> {
    let is_free = held().get_or_insert_default().insert(uuid);
    // Made only where it is ours: dropped, it gives the right back.
    is_free.then(|| Hold(uuid))
}

/// The right to deal with a guest's migration.
///
/// # Errors
/// If somebody has it.
pub fn hold(uuid: Uuid) -> Result<Hold, Error> {
    try_hold(uuid)
        .ok_or_else(|| here("another migration of this guest is under way, or is being ended; try again"))
}

/// As [`hold`], once an attempt of our own thread's at an earlier one has ended: the source that it asks may have come with
/// this migration.
///
/// # Errors
/// As with [`hold`].
pub fn hold_soon(uuid: Uuid) -> Result<Hold, Error> {
    let deadline = Instant::now() + ATTEMPT;
    loop {
        match hold(uuid) {
            Err(_) if !sessions::is_under_way(uuid) && Instant::now() < deadline => std::thread::sleep(LOOK),
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_deals_with_a_guest_at_a_time() {
        let uuid = Uuid::from_u128(77);
        let first = try_hold(uuid);
        assert!(first.is_some() && try_hold(uuid).is_none());
        assert!(try_hold(Uuid::from_u128(78)).is_some());
        drop(first);
        assert!(try_hold(uuid).is_some());
    }
}
