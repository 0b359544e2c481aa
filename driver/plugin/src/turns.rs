//! Whose turn a guest is: an engine's, which may turn x-ignore-shared on in its QEMU, or somebody's who has that QEMU
//! write its memory. Never both.
//!
//! libvirt's own jobs keep the two apart as well, but one ends the moment QEMU's migration fails, and whoever waits for
//! it begins at once: a save would reach QEMU before the capability is cleared. So whoever writes memory waits here,
//! outside of libvirt, until the engine has ended and cleared up; and a migration that begins while somebody waits is
//! libvirt's own.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// For one who has had libvirt's job to come back from libvirt, once it is ours; one who waits for it does not.
const RETURNING: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Moves,
    Writes,
}

static TAKEN: Mutex<Vec<(Uuid, Kind)>> = Mutex::new(Vec::new());
static CHANGED: Condvar = Condvar::new();

fn taken() -> MutexGuard<'static, Vec<(Uuid, Kind)>> {
    // Nothing under this lock can leave the list half changed.
    TAKEN.lock().unwrap_or_else(|e| e.into_inner())
}

/// One's turn, until this is dropped.
#[derive(Debug)]
struct Turn(Uuid, Kind);

impl Turn {
    fn take(list: &mut Vec<(Uuid, Kind)>, guest: Uuid, kind: Kind) -> Self {
        list.push((guest, kind));
        Self(guest, kind)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut list = taken();
        if let Some(index) = list.iter().position(|turn| *turn == (self.0, self.1)) {
            list.swap_remove(index);
        }
        CHANGED.notify_all();
    }
}

/// Waits until nobody has a turn of this kind with the guest.
fn wait(guest: Uuid, kind: Kind, limit: Duration) -> Option<MutexGuard<'static, Vec<(Uuid, Kind)>>> {
    let deadline = Instant::now() + limit;
    let mut list = taken();
    while list.contains(&(guest, kind)) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        list = CHANGED
            .wait_timeout(list, left)
            .unwrap_or_else(|e| e.into_inner())
            .0;
    }
    Some(list)
}

/// The turn of an engine with a guest.
#[derive(Debug)]
pub struct Moving {
    _turn: Turn,
}

impl Moving {
    /// For a guest that runs here; `None` where its memory is about to be written.
    pub fn away(guest: Uuid) -> Option<Self> {
        let mut list = wait(guest, Kind::Writes, RETURNING)?;
        let turn = Turn::take(&mut list, guest, Kind::Moves);
        Some(Self { _turn: turn })
    }

    /// For a guest that arrives: libvirt lets nobody near it before it runs, and by then the capability is off.
    pub fn here(guest: Uuid) -> Self {
        let turn = Turn::take(&mut taken(), guest, Kind::Moves);
        Self { _turn: turn }
    }
}

/// The turn of one who writes a guest's memory. From the first moment on no engine begins; one that has begun is
/// waited for.
#[derive(Debug)]
pub struct Writing(Turn);

impl Writing {
    /// Stands in line.
    pub fn of(guest: Uuid) -> Self {
        Self(Turn::take(&mut taken(), guest, Kind::Writes))
    }

    /// Waits until no engine has a turn; false where one still has when the time is over.
    pub fn alone(&self, limit: Duration) -> bool {
        wait(self.0 .0, Kind::Moves, limit).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOT_AT_ALL: Duration = Duration::ZERO;

    #[test]
    fn who_writes_waits_for_who_moves() {
        let guest = Uuid::from_u128(1);
        let moving = Moving::away(guest).unwrap();
        let writing = Writing::of(guest);
        assert!(!writing.alone(NOT_AT_ALL));
        let waiter = std::thread::spawn(move || writing.alone(Duration::from_secs(60)));
        drop(moving);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn nobody_moves_what_is_written() {
        let guest = Uuid::from_u128(2);
        let writing = Writing::of(guest);
        assert!(writing.alone(NOT_AT_ALL));
        assert!(Moving::away(guest).is_none());
        assert!(Moving::away(Uuid::from_u128(3)).is_some());
        // Another one writes as well, and both must have ended.
        let other = Writing::of(guest);
        drop(writing);
        assert!(Moving::away(guest).is_none());
        drop(other);
        assert!(Moving::away(guest).is_some());
    }

    #[test]
    fn an_arriving_guest_is_waited_for_too() {
        let guest = Uuid::from_u128(4);
        let writing = Writing::of(guest);
        let arriving = Moving::here(guest);
        assert!(!writing.alone(NOT_AT_ALL));
        drop(arriving);
        assert!(writing.alone(NOT_AT_ALL));
    }
}
