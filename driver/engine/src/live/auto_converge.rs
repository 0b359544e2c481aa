//! When to slow the vCPUs down, and by how much: QEMU's own policy (QEMU 10.0, `migration_trigger_throttle` and
//! `mig_throttle_guest_down`). Pure.
//!
//! A round that leaves more than half of what it sent to be sent again does not get anywhere. After the second one in a
//! row the vCPUs are slowed down, each time by more.

/// The part of what a round sent that may be dirty after it, in percent (QEMU's `throttle-trigger-threshold`).
const TRIGGER: u128 = 50;
/// Rounds in a row that bring on more.
const ROUNDS: u32 = 2;
/// The most, in percent (QEMU's `max-cpu-throttle`).
const MOST: u8 = 99;

/// How slow the vCPUs are to be.
#[derive(Debug, Clone, Copy)]
pub struct AutoConverge {
    wanted: ferry_contract::control::AutoConverge,
    percent: u8,
    futile: u32,
}

impl AutoConverge {
    /// Not at all, to begin with.
    pub fn new(wanted: ferry_contract::control::AutoConverge) -> Self {
        Self {
            wanted,
            percent: 0,
            futile: 0,
        }
    }

    /// They stand still as long as they ever will.
    pub fn is_spent(&self) -> bool {
        self.percent == MOST
    }

    /// After a round: how much of their time the vCPUs are to stand still from now on, in percent, where that changes.
    pub fn next(&mut self, dirty_bytes: u64, sent_bytes: u64) -> Option<u8> {
        if u128::from(dirty_bytes) * 100 <= u128::from(sent_bytes) * TRIGGER {
            self.futile = 0;
            return None;
        }
        self.futile += 1;
        if self.futile < ROUNDS || self.is_spent() {
            return None;
        }
        self.futile = 0;
        let more = match self.percent {
            0 => self.wanted.initial,
            _ => self.wanted.increment,
        };
        self.percent = self.percent.saturating_add(more).min(MOST);
        Some(self.percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_futile_rounds_slow_it_down_further_each_time() {
        let mut policy = AutoConverge::new(Default::default());
        let steps: Vec<_> = (0..24).map(|_| policy.next(80, 100)).collect();
        let changes: Vec<_> = steps.iter().flatten().copied().collect();
        assert_eq!(changes, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        assert_eq!(steps[..4], [None, Some(20), None, Some(30)]);
    }

    #[test]
    fn rounds_that_get_somewhere_leave_it_as_it_is() {
        let mut policy = AutoConverge::new(Default::default());
        for _ in 0..10 {
            assert_eq!(policy.next(80, 100), None);
            assert_eq!(policy.next(50, 100), None);
        }
        assert_eq!(policy.next(0, 0), None);
        assert_eq!(policy.next(u64::MAX, u64::MAX), None);
        assert_eq!(policy.next(u64::MAX, 1), Some(20));
    }
}
