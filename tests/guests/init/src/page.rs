//! A stamped page: 4 KiB that say which page they are and how new they are, in every one of their words.
//!
//! ```text
//!   word 0   MARK ^ place        place: index of the page in its area
//!   word 1   sequence number     never 0: an all-zero page is never right
//!   word i   base(place, sequence) + i * STEP
//! ```
//!
//! Each word depends on place, sequence and its own position, so a page that is older than it should be, zeroed, put in
//! another's place, or put together from two versions is told from the right one, and by which of these it is.

use std::fmt;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// First word of every stamped page, XORed with its place.
const MARK: u64 = 0xfe44_7900_6d65_6d00;
/// Odd, so that no two words of a page are equal; without it shifted content would look right.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// Places are below this: a first word is recognised as a mark by its upper bits.
pub const MAX_PAGES: u64 = 1 << 32;

/// One page of memory, aligned as the hardware has it.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page([u8; PAGE_SIZE]);

/// The content word `base + i * STEP` starts from: a mix of place and sequence (splitmix64's finalizer).
fn base(place: u64, sequence: u64) -> u64 {
    let mut mixed = place.rotate_left(40) ^ sequence.wrapping_mul(STEP);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}

impl Page {
    /// A page of zeros, which is right nowhere.
    pub const ZEROED: Page = Page([0; PAGE_SIZE]);

    /// A page stamped as `place` with `sequence`.
    pub fn stamped(place: u64, sequence: u64) -> Self {
        let mut page = Page::ZEROED;
        page.stamp(place, sequence);
        page
    }

    /// The page's bytes as they lie in memory.
    pub fn bytes(&self) -> &[u8; PAGE_SIZE] {
        &self.0
    }

    /// The page's bytes, for a device or a file to be read into.
    pub fn bytes_mut(&mut self) -> &mut [u8; PAGE_SIZE] {
        &mut self.0
    }

    /// Writes the whole page anew.
    pub fn stamp(&mut self, place: u64, sequence: u64) {
        let mut value = base(place, sequence);
        for bytes in self.0.chunks_exact_mut(8) {
            bytes.copy_from_slice(&value.to_le_bytes());
            value = value.wrapping_add(STEP);
        }
        self.0[..8].copy_from_slice(&(MARK ^ place).to_le_bytes());
        self.0[8..16].copy_from_slice(&sequence.to_le_bytes());
    }

    /// Place and sequence that the first two words claim, whole or torn; `None` if no stamp is there.
    pub fn claim(&self) -> Option<(u64, u64)> {
        let (place, sequence) = (word(&self.0[..8]) ^ MARK, word(&self.0[8..16]));
        (place < MAX_PAGES && sequence != 0).then_some((place, sequence))
    }

    /// Whether the page is exactly `place` at `sequence`. Without branches, so that the compiler takes several words at a time.
    pub fn is(&self, place: u64, sequence: u64) -> bool {
        let mut wrong = (word(&self.0[..8]) ^ MARK ^ place) | (word(&self.0[8..16]) ^ sequence);
        let mut value = base(place, sequence).wrapping_add(STEP.wrapping_mul(2));
        for bytes in self.0[16..].chunks_exact(8) {
            wrong |= word(bytes) ^ value;
            value = value.wrapping_add(STEP);
        }
        wrong == 0
    }

    /// Checks that the page is exactly `place` at `sequence`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn verify(&self, place: u64, sequence: u64) -> Result<(), Damage> {
        if self.is(place, sequence) {
            return Ok(());
        }
        if self.0.iter().all(|byte| *byte == 0) {
            return Err(Damage::Zeroed);
        }
        Err(match self.claim() {
            Some((other, seen)) if self.is(other, seen) => {
                if other != place {
                    Damage::Misplaced {
                        place: other,
                        sequence: seen,
                    }
                } else if seen < sequence {
                    Damage::Stale { sequence: seen }
                } else {
                    Damage::Ahead { sequence: seen }
                }
            }
            _ => {
                let right = Page::stamped(place, sequence);
                let differing = self
                    .0
                    .iter()
                    .zip(&right.0)
                    .take_while(|(seen, right)| seen == right)
                    .count();
                Damage::Torn { word: differing / 8 }
            }
        })
    }
}

/// What is wrong with a page that should have held something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// All zeros.
    Zeroed,
    /// A whole, but older version: a lost write.
    Stale {
        /// The version it holds.
        sequence: u64,
    },
    /// A whole version newer than the last one written.
    Ahead {
        /// The version it holds.
        sequence: u64,
    },
    /// A whole page that belongs elsewhere.
    Misplaced {
        /// Where it belongs.
        place: u64,
        /// The version it holds.
        sequence: u64,
    },
    /// Neither: parts of two versions, or foreign bytes.
    Torn {
        /// The first wrong 8-byte word, 0 to 511.
        word: usize,
    },
    /// The expected sequence numbers of this page's stripe no longer add up to what the writer counted: the book-keeping itself
    /// lies in guest memory, and went back with it.
    Ledger,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Damage::Zeroed => write!(f, "kind=zeroed"),
            Damage::Stale { sequence } => write!(f, "kind=stale seen={sequence}"),
            Damage::Ahead { sequence } => write!(f, "kind=ahead seen={sequence}"),
            Damage::Misplaced { place, sequence } => {
                write!(f, "kind=misplaced seen={sequence} place={place}")
            }
            Damage::Torn { word } => write!(f, "kind=torn word={word}"),
            Damage::Ledger => write!(f, "kind=ledger"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damaged(change: impl FnOnce(&mut [u8; PAGE_SIZE])) -> Damage {
        let mut page = Page::stamped(7, 100);
        change(page.bytes_mut());
        page.verify(7, 100).expect_err("damage must be seen")
    }

    #[test]
    fn a_stamped_page_is_right() {
        assert_eq!(Page::stamped(7, 100).verify(7, 100), Ok(()));
        assert_eq!(Page::stamped(7, 100).claim(), Some((7, 100)));
        assert_eq!(Page::ZEROED.claim(), None);
    }

    #[test]
    fn each_damage_is_told_by_its_kind() {
        assert_eq!(damaged(|bytes| bytes.fill(0)), Damage::Zeroed);
        assert_eq!(
            damaged(|bytes| *bytes = Page::stamped(7, 99).0),
            Damage::Stale { sequence: 99 }
        );
        assert_eq!(
            damaged(|bytes| *bytes = Page::stamped(7, 101).0),
            Damage::Ahead { sequence: 101 }
        );
        let misplaced = Damage::Misplaced {
            place: 8,
            sequence: 100,
        };
        assert_eq!(damaged(|bytes| *bytes = Page::stamped(8, 100).0), misplaced);
    }

    #[test]
    fn a_page_of_two_versions_is_torn_wherever_the_seam_is() {
        let old = Page::stamped(7, 99);
        for seam in [16, 24, 512, 4088] {
            assert!(matches!(
                damaged(|bytes| bytes[..seam].copy_from_slice(&old.0[..seam])),
                Damage::Torn { .. }
            ));
        }
        let torn = damaged(|bytes| bytes[512..].copy_from_slice(&old.0[512..]));
        assert_eq!(torn, Damage::Torn { word: 64 });
    }

    #[test]
    fn every_byte_matters() {
        for byte in 0..PAGE_SIZE {
            damaged(|bytes| bytes[byte] ^= 1);
        }
    }
}
