//! A set of pages of one RAM block, as a plain bitmap.
//!
//! One bit a page: 32 KiB of bitmap for a GiB of guest. Dirty pages come and go as ranges, so insertion,
//! removal and iteration work on whole 64-bit words; a 256 GiB guest's empty set is walked in a millisecond.

use std::ops::Range;

use super::PAGE;

const BITS: u64 = u64::BITS as u64;

/// A set of [`PAGE`]-sized pages of a RAM block, addressed by byte ranges.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    /// Pages the set can hold; bits from here on in the last word are always clear.
    pages: u64,
}

impl PageSet {
    /// An empty set for a block of `len` bytes (a last partial page counts as a page).
    pub fn new(len: u64) -> Self {
        let pages = len.div_ceil(PAGE);
        PageSet {
            words: vec![0; words_for(pages)],
            pages,
        }
    }

    /// A set holding every page of a block of `len` bytes.
    pub fn full(len: u64) -> Self {
        let mut set = PageSet::new(len);
        set.insert(0..len);
        set
    }

    /// A set for a block of `len` bytes from its bitmap, page 0 in bit 0 of word 0. Missing words are empty; what
    /// lies past the end of the block is ignored.
    pub fn from_words(len: u64, words: &[u64]) -> Self {
        let mut set = PageSet::new(len);
        for (to, from) in set.words.iter_mut().zip(words) {
            *to = *from;
        }
        if let (Some(last), rest @ 1..) = (set.words.last_mut(), set.pages % BITS) {
            *last &= (1 << rest) - 1;
        }
        set
    }

    /// The bitmap of [`from_words`](Self::from_words).
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds every page that `range` touches. What lies past the end of the block is ignored.
    pub fn insert(&mut self, range: Range<u64>) {
        self.each_word(range, |word, mask| *word |= mask);
    }

    /// Takes out every page that `range` touches.
    pub fn remove(&mut self, range: Range<u64>) {
        self.each_word(range, |word, mask| *word &= !mask);
    }

    /// Whether the page holding byte `offset` is in the set.
    pub fn contains(&self, offset: u64) -> bool {
        let page = offset / PAGE;
        page < self.pages && self.words[(page / BITS) as usize] >> (page % BITS) & 1 == 1
    }

    /// Adds every page of `other`, a set of the same block.
    ///
    /// # Panics
    /// When the two sets cover blocks of different size, which is a mistake of the caller.
    pub fn union_with(&mut self, other: &PageSet) {
        self.zip(other, |a, b| a | b);
    }

    /// Takes out every page of `other`, a set of the same block.
    ///
    /// # Panics
    /// When the two sets cover blocks of different size, which is a mistake of the caller.
    pub fn subtract(&mut self, other: &PageSet) {
        self.zip(other, |a, b| a & !b);
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Bytes in the set.
    pub fn bytes(&self) -> u64 {
        self.count() * PAGE
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The set as maximal runs of adjacent pages, in ascending order.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_up_to(u64::MAX)
    }

    /// As [`runs`](Self::runs), with runs longer than `max` bytes cut into pieces of `max`, rounded down to
    /// whole pages but at least one.
    pub fn runs_up_to(&self, max: u64) -> Runs<'_> {
        Runs {
            set: self,
            page: 0,
            max: (max / PAGE).max(1),
        }
    }

    /// The first page at or after `page` that is in the set.
    fn next_set(&self, page: u64) -> Option<u64> {
        self.find(page, |word| word)
    }

    /// The first page at or after `page` that is not in the set; the end of the block if all are.
    fn next_clear(&self, page: u64) -> u64 {
        self.find(page, |word| !word).unwrap_or(self.pages)
    }

    fn find(&self, page: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        if page >= self.pages {
            return None;
        }
        let mut index = (page / BITS) as usize;
        let mut word = view(self.words[index]) & (u64::MAX << (page % BITS));
        while word == 0 {
            index += 1;
            word = view(*self.words.get(index)?);
        }
        let found = index as u64 * BITS + u64::from(word.trailing_zeros());
        (found < self.pages).then_some(found)
    }

    fn each_word(&mut self, range: Range<u64>, change: impl Fn(&mut u64, u64)) {
        let first = range.start / PAGE;
        let end = range.end.div_ceil(PAGE).min(self.pages);
        if range.is_empty() || first >= end {
            return;
        }
        let (low, high) = ((first / BITS) as usize, ((end - 1) / BITS) as usize);
        let head = u64::MAX << (first % BITS);
        let tail = u64::MAX >> (BITS - 1 - (end - 1) % BITS);
        if low == high {
            change(&mut self.words[low], head & tail);
            return;
        }
        change(&mut self.words[low], head);
        for word in &mut self.words[low + 1..high] {
            change(word, u64::MAX);
        }
        change(&mut self.words[high], tail);
    }

    fn zip(&mut self, other: &PageSet, change: impl Fn(u64, u64) -> u64) {
        assert_eq!(self.pages, other.pages, "page sets of different RAM blocks");
        for (a, &b) in self.words.iter_mut().zip(&other.words) {
            *a = change(*a, b);
        }
    }
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageSet({} of {} pages)", self.count(), self.pages)
    }
}

/// Runs of adjacent pages of a [`PageSet`], as byte ranges.
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    set: &'a PageSet,
    page: u64,
    /// Longest run, pages.
    max: u64,
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.set.next_set(self.page)?;
        let end = self.set.next_clear(start).min(start.saturating_add(self.max));
        self.page = end;
        Some(start * PAGE..end * PAGE)
    }
}

fn words_for(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(BITS)).expect("a page set larger than the address space")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(set: &PageSet) -> Vec<Range<u64>> {
        set.runs().map(|run| run.start / PAGE..run.end / PAGE).collect()
    }

    #[test]
    fn ranges_touch_whole_pages_and_stop_at_the_end_of_the_block() {
        let mut set = PageSet::new(10 * PAGE + 1);
        set.insert(PAGE + 1..PAGE + 2);
        set.insert(10 * PAGE..u64::MAX);
        set.insert(5 * PAGE..5 * PAGE);
        set.insert(99 * PAGE..100 * PAGE);
        assert_eq!(pages(&set), [1..2, 10..11]);
        assert!(set.contains(PAGE) && set.contains(2 * PAGE - 1) && !set.contains(2 * PAGE));
        assert!(!set.contains(u64::MAX));
        set.remove(0..2 * PAGE);
        assert!(set.runs().eq(std::iter::once(10 * PAGE..11 * PAGE)));
        assert_eq!((set.count(), set.bytes(), set.is_empty()), (1, PAGE, false));
    }

    #[test]
    fn runs_cross_words_and_are_cut_on_demand() {
        let mut set = PageSet::new(1000 * PAGE);
        set.insert(60 * PAGE..200 * PAGE);
        set.insert(999 * PAGE..1000 * PAGE);
        assert_eq!(pages(&set), [60..200, 999..1000]);
        let cut: Vec<_> = set
            .runs_up_to(64 * PAGE + 5)
            .map(|run| (run.start / PAGE, run.end / PAGE))
            .collect();
        assert_eq!(cut, [(60, 124), (124, 188), (188, 200), (999, 1000)]);
        assert_eq!(set.runs_up_to(0).count() as u64, set.count());
    }

    #[test]
    fn agrees_with_a_naive_set() {
        let mut random = 1_u64;
        let mut next = |limit: u64| {
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (random >> 33) % limit
        };
        for size in [1, 63, 64, 65, 128, 777] {
            let mut set = PageSet::new(size * PAGE);
            let mut naive = vec![false; size as usize];
            for _ in 0..500 {
                let start = next(size);
                let end = (start + next(100)).min(size);
                let add = next(3) > 0;
                naive[start as usize..end as usize].fill(add);
                match add {
                    true => set.insert(start * PAGE..end * PAGE),
                    false => set.remove(start * PAGE..end * PAGE),
                }
                let seen: Vec<bool> = (0..size).map(|page| set.contains(page * PAGE)).collect();
                assert_eq!(seen, naive);
                let mut rebuilt = PageSet::new(size * PAGE);
                set.runs().for_each(|run| rebuilt.insert(run));
                assert_eq!(rebuilt, set);
                assert_eq!(set.count(), naive.iter().filter(|&&bit| bit).count() as u64);
            }
        }
    }

    #[test]
    fn union_and_difference() {
        let mut a = PageSet::new(300 * PAGE);
        let mut b = a.clone();
        a.insert(0..100 * PAGE);
        b.insert(50 * PAGE..300 * PAGE);
        let mut union = a.clone();
        union.union_with(&b);
        assert_eq!(union, PageSet::full(300 * PAGE));
        a.subtract(&b);
        assert!(a.runs().eq(std::iter::once(0..50 * PAGE)));
        a.clear();
        assert!(a.is_empty());
    }
}
