//! What the engine moved of guests that have left. libvirt keeps its figures of a guest's last job until they are read,
//! as long as the guest is defined here; so do we, or they would tell of QEMU's few bytes only.

use ferry_contract::control::Statistics;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use uuid::Uuid;

/// Guests remembered at most: those that nobody asks about would pile up.
const KEPT: usize = 256;

static MOVED: Mutex<VecDeque<(Uuid, Statistics)>> = Mutex::new(VecDeque::new());

fn moved() -> MutexGuard<'static, VecDeque<(Uuid, Statistics)>> {
    // Nothing under this lock can leave the list half changed.
    MOVED.lock().unwrap_or_else(|e| e.into_inner())
}

/// Remembers what was moved of a guest, in place of what was before.
pub fn remember(guest: Uuid, statistics: Statistics) {
    let mut list = moved();
    list.retain(|(other, _)| *other != guest);
    if list.len() == KEPT {
        list.pop_front();
    }
    list.push_back((guest, statistics));
}

/// What was moved of a guest.
pub fn of(guest: Uuid) -> Option<Statistics> {
    let list = moved();
    let found = list.iter().find(|(other, _)| *other == guest);
    found.map(|(_, statistics)| *statistics)
}

/// Forgets a guest.
pub fn forget(guest: Uuid) {
    moved().retain(|(other, _)| *other != guest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_move_of_the_last_guests_is_remembered() {
        let statistics = |total| Statistics {
            total,
            ..Default::default()
        };
        let guest = |number: usize| Uuid::from_u128(number as u128);
        for number in 0..=KEPT {
            remember(guest(number), statistics(1));
            remember(guest(number), statistics(2));
        }
        assert_eq!(of(guest(0)), None);
        assert_eq!(of(guest(1)), Some(statistics(2)));
        forget(guest(1));
        assert_eq!(of(guest(1)), None);
        assert_eq!(of(guest(KEPT)), Some(statistics(2)));
    }
}
