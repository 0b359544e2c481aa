//! The writable working set: pages written in round after round wait for the last one.
//!
//! Sending a page that is written again before the round is over is wasted work (Clark et al., NSDI 2005, "Rapid Page
//! Dirtying"). A [`WorkingSet`] keeps, for one RAM block, which pages the destination does not have yet (*pending*) and
//! for how many successive rounds each has been written (its *streak*). Both live in bitmaps of `u64` words, page 0 in
//! bit 0 of word 0; the streak is a two-bit saturating counter in two bit planes, so that a round costs a few
//! operations per 64 pages and 3 bits of memory a page (96 MiB for a guest of 1 TiB).
//!
//! ```text
//!              absorb(dirty)                    take(deferral)
//!   written ──▶ pending ──────┬── streak short ──▶ send now
//!                  ▲          └── streak long ──┐
//!                  └────────── stays pending ◀──┘        into_last() ──▶ everything still pending
//! ```
//!
//! The guarantee: a page leaves *pending* only through [`WorkingSet::take`]'s or [`WorkingSet::into_last`]'s result,
//! so no page is ever forgotten. A page that misses one round's writes is no longer hot and goes with the next `take`.

use thiserror::Error;

/// From the widest to the narrowest idea of a hot page.
const STREAKS: [Streak; 2] = [Streak::Two, Streak::Three];

/// A scan's bitmap did not have the length of the block it was meant for.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a dirty bitmap of {got} words does not fit a RAM block of {expected} words: pages would be lost")]
pub struct LengthMismatch {
    /// Words the block needs.
    pub expected: usize,
    /// Words there were.
    pub got: usize,
}

/// How many successive rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streak {
    /// Two or more.
    Two,
    /// Three or more.
    Three,
}

/// Which pages [`WorkingSet::take`] holds back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deferral {
    /// None: everything pending is sent.
    Nothing,
    /// Pages written in this many successive rounds.
    Hot(Streak),
}

impl Deferral {
    /// Chooses for a guest (all its RAM blocks): as many pages as possible, but never more than `budget_pages`, as a
    /// deferred set that lengthens the guest's pause beyond the aim does not help. A budget of 0 defers nothing.
    pub fn choose(blocks: &[WorkingSet], budget_pages: u64) -> Deferral {
        for streak in STREAKS {
            let hot: u64 = blocks.iter().map(|block| block.hot_pages(streak)).sum();
            if hot <= budget_pages {
                return if hot == 0 {
                    Deferral::Nothing
                } else {
                    Deferral::Hot(streak)
                };
            }
        }
        Deferral::Nothing
    }
}

/// What [`WorkingSet::take`] did, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Handed out to be sent.
    pub sent: u64,
    /// Held back; still pending.
    pub deferred: u64,
}

/// The pages of one RAM block the destination does not have yet.
#[derive(Clone, Debug)]
pub struct WorkingSet {
    pending: Vec<u64>,
    /// Low and high bit of each page's streak, 0 to 3.
    low: Vec<u64>,
    high: Vec<u64>,
    /// The valid bits of the last word.
    last_mask: u64,
}

impl WorkingSet {
    /// An empty set for a block of `pages` pages.
    pub fn new(pages: usize) -> Self {
        let words = pages.div_ceil(64);
        let last_mask = match pages % 64 {
            0 => u64::MAX,
            rest => (1 << rest) - 1,
        };
        WorkingSet {
            pending: vec![0; words],
            low: vec![0; words],
            high: vec![0; words],
            last_mask,
        }
    }

    /// Takes in a round's scan: the pages written since the scan before. Bits beyond the block's last page are
    /// ignored.
    ///
    /// # Errors
    /// [`LengthMismatch`] if the bitmap is not the block's size; nothing is taken in then.
    pub fn absorb(&mut self, dirty: &[u64]) -> Result<(), LengthMismatch> {
        if dirty.len() != self.pending.len() {
            return Err(LengthMismatch {
                expected: self.pending.len(),
                got: dirty.len(),
            });
        }
        let end = dirty.len().saturating_sub(1);
        for (i, &word) in dirty.iter().enumerate() {
            let dirty = if i == end { word & self.last_mask } else { word };
            let (low, high) = (self.low[i], self.high[i]);
            self.pending[i] |= dirty;
            // 0 -> 1 -> 2 -> 3 -> 3 where dirty, 0 where not.
            self.low[i] = dirty & (!low | high);
            self.high[i] = dirty & (low | high);
        }
        Ok(())
    }

    /// Moves what is to be sent now from the set to `send` (cleared first, then one word per 64 pages).
    pub fn take(&mut self, deferral: Deferral, send: &mut Vec<u64>) -> Split {
        let mut split = Split::default();
        send.clear();
        send.reserve(self.pending.len());
        for i in 0..self.pending.len() {
            let held = match deferral {
                Deferral::Nothing => 0,
                Deferral::Hot(streak) => self.hot(i, streak),
            };
            let now = self.pending[i] & !held;
            self.pending[i] &= held;
            split.sent += u64::from(now.count_ones());
            split.deferred += u64::from(self.pending[i].count_ones());
            send.push(now);
        }
        split
    }

    /// Everything still pending, for the last round: absorb the scan of the stopped guest first.
    pub fn into_last(self) -> Vec<u64> {
        self.pending
    }

    /// Pages the last round would have to send if there were no other.
    pub fn pending_pages(&self) -> u64 {
        self.pending.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Pending pages written in at least so many successive rounds.
    pub fn hot_pages(&self, streak: Streak) -> u64 {
        (0..self.pending.len())
            .map(|i| u64::from(self.hot(i, streak).count_ones()))
            .sum()
    }

    fn hot(&self, i: usize, streak: Streak) -> u64 {
        self.pending[i]
            & match streak {
                Streak::Two => self.high[i],
                Streak::Three => self.high[i] & self.low[i],
            }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn pages(words: &[u64]) -> Vec<usize> {
        (0..words.len() * 64)
            .filter(|page| words[page / 64] >> (page % 64) & 1 == 1)
            .collect()
    }

    fn bitmap(pages: &[usize], words: usize) -> Vec<u64> {
        let mut bitmap = vec![0; words];
        for page in pages {
            bitmap[page / 64] |= 1 << (page % 64);
        }
        bitmap
    }

    #[test]
    fn a_hot_page_waits_and_goes_once_it_cools_down() {
        let mut set = WorkingSet::new(100);
        let mut send = Vec::new();
        let hot = Deferral::Hot(Streak::Two);
        set.absorb(&bitmap(&[3, 70], 2)).unwrap();
        assert_eq!(set.take(hot, &mut send), Split { sent: 2, deferred: 0 });
        set.absorb(&bitmap(&[3, 99], 2)).unwrap();
        assert_eq!(set.take(hot, &mut send), Split { sent: 1, deferred: 1 });
        assert_eq!(pages(&send), [99]);
        set.absorb(&bitmap(&[3], 2)).unwrap();
        assert_eq!(set.take(hot, &mut send), Split { sent: 0, deferred: 1 });
        set.absorb(&bitmap(&[], 2)).unwrap();
        assert_eq!(set.take(hot, &mut send), Split { sent: 1, deferred: 0 });
        assert_eq!(pages(&send), [3]);
        assert!(set.into_last().iter().all(|&word| word == 0));
    }

    #[test]
    fn more_hot_pages_than_the_budget_are_narrowed_or_not_deferred_at_all() {
        let mut set = WorkingSet::new(64);
        for dirty in [0b0011, 0b0111, 0b1111] {
            set.absorb(&[dirty]).unwrap();
        }
        assert_eq!((set.hot_pages(Streak::Two), set.hot_pages(Streak::Three)), (3, 2));
        let sets = [set];
        assert_eq!(Deferral::choose(&sets, 3), Deferral::Hot(Streak::Two));
        assert_eq!(Deferral::choose(&sets, 2), Deferral::Hot(Streak::Three));
        assert_eq!(Deferral::choose(&sets, 1), Deferral::Nothing);
        assert_eq!(Deferral::choose(&sets, 0), Deferral::Nothing);
        assert_eq!(Deferral::choose(&[WorkingSet::new(64)], 100), Deferral::Nothing);
    }

    #[test]
    fn a_bitmap_of_another_size_is_refused_whole() {
        let mut set = WorkingSet::new(65);
        assert_eq!(set.absorb(&[1]), Err(LengthMismatch { expected: 2, got: 1 }));
        assert_eq!(
            set.absorb(&[1, 1, 1]),
            Err(LengthMismatch { expected: 2, got: 3 })
        );
        assert_eq!(set.pending_pages(), 0);
        set.absorb(&[0, u64::MAX]).unwrap();
        assert_eq!(set.pending_pages(), 1, "bits beyond the block's last page");
        assert_eq!(WorkingSet::new(0).absorb(&[]), Ok(()));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Absorb(Vec<u64>),
        Take(Deferral),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        // Bits biased to be set, so that streaks happen.
        let word = prop_oneof![any::<u64>(), any::<(u64, u64)>().prop_map(|(a, b)| a | b)];
        let deferral = prop_oneof![
            Just(Deferral::Nothing),
            Just(Deferral::Hot(Streak::Two)),
            Just(Deferral::Hot(Streak::Three))
        ];
        prop_oneof![
            proptest::collection::vec(word, 3).prop_map(Step::Absorb),
            deferral.prop_map(Step::Take)
        ]
    }

    proptest! {
        /// Against a model that counts page by page: whatever is written is handed out afterwards, never before,
        /// and a page is only held back after a streak.
        #[test]
        fn no_page_is_ever_lost(steps in proptest::collection::vec(any_step(), 0..60)) {
            const PAGES: usize = 150;
            let mut set = WorkingSet::new(PAGES);
            let mut streaks: BTreeMap<usize, u32> = BTreeMap::new();
            let mut owed = [false; PAGES];
            let mut send = Vec::new();
            for step in steps {
                match step {
                    Step::Absorb(dirty) => {
                        set.absorb(&dirty).unwrap();
                        let dirty: Vec<_> = pages(&dirty).into_iter().filter(|&page| page < PAGES).collect();
                        streaks = dirty.iter().map(|page| (*page, streaks.get(page).unwrap_or(&0) + 1)).collect();
                        for page in dirty {
                            owed[page] = true;
                        }
                    }
                    Step::Take(deferral) => {
                        let split = set.take(deferral, &mut send);
                        let long = match deferral {
                            Deferral::Nothing => u32::MAX,
                            Deferral::Hot(Streak::Two) => 2,
                            Deferral::Hot(Streak::Three) => 3,
                        };
                        let held = |page: &usize| streaks.get(page).is_some_and(|&streak| streak >= long);
                        let expected: Vec<_> = (0..PAGES).filter(|page| owed[*page] && !held(page)).collect();
                        prop_assert_eq!(pages(&send), expected.clone());
                        for page in expected {
                            owed[page] = false;
                        }
                        prop_assert_eq!(split.sent, pages(&send).len() as u64);
                        prop_assert_eq!(split.deferred, set.pending_pages());
                    }
                }
                prop_assert_eq!(set.pending_pages(), owed.iter().filter(|owed| **owed).count() as u64);
            }
            let last = set.into_last();
            prop_assert_eq!(pages(&last), (0..PAGES).filter(|page| owed[*page]).collect::<Vec<_>>());
        }
    }
}
