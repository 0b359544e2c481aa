//! What a file's content is, as a digest that holes do not change.
//!
//! A file is blocks of 1 MiB, the last one shorter. A block that holds anything but zeros has the BLAKE3 of its bytes;
//! the file's digest is the BLAKE3 of its length and then, in ascending order, of each such block's number and hash. So
//! an empty disk of any size costs nothing, blocks can be read in any order and by several threads, and a damaged one
//! is known by its place.

use crate::memory::is_zero;
use ferry_contract::cold::{Digest, BLOCK};
use std::collections::BTreeMap;
use std::ops::Range;

/// The hash of one block; `None` where it is all zeros.
pub type BlockHash = Option<[u8; 32]>;

/// Hashes a block.
pub fn block(bytes: &[u8]) -> BlockHash {
    (!is_zero(bytes)).then(|| *blake3::hash(bytes).as_bytes())
}

/// How many bytes block `number` of a file has; 0 beyond its end.
pub fn length(size: u64, number: u64) -> usize {
    let left = number
        .checked_mul(BLOCK)
        .and_then(|start| size.checked_sub(start));
    left.unwrap_or(0).min(BLOCK) as usize
}

/// What is known of one file's blocks; for the digest, those that are not noted are zeros.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blocks(BTreeMap<u64, BlockHash>);

impl Blocks {
    /// Notes a block. A second time, whether it is the same.
    pub fn note(&mut self, number: u64, hash: BlockHash) -> bool {
        *self.0.entry(number).or_insert(hash) == hash
    }

    /// What is noted of a block.
    pub fn get(&self, number: u64) -> BlockHash {
        self.0.get(&number).copied().flatten()
    }

    /// Whether every block of these runs is noted.
    pub fn has(&self, runs: &[Range<u64>]) -> bool {
        let mut blocks = runs.iter().cloned().flatten();
        blocks.all(|block| self.0.contains_key(&block))
    }

    /// The digest of a file of this size.
    pub fn digest(&self, size: u64) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&size.to_le_bytes());
        let data = self
            .0
            .iter()
            .filter_map(|(number, hash)| Some((number, hash.as_ref()?)));
        for (number, hash) in data {
            hasher.update(&number.to_le_bytes());
            hasher.update(hash);
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

/// The digest over all files: their numbers, and what is in those that move or were compared.
pub fn manifest(files: impl IntoIterator<Item = Option<Digest>>) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        match file {
            Some(digest) => hasher.update(&[1]).update(&digest.0),
            None => hasher.update(&[0]),
        };
    }
    Digest(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_and_holes_are_one() {
        let mut blocks = Blocks::default();
        let size = 3 * BLOCK + 5;
        let empty = blocks.digest(size);
        assert!(blocks.note(0, block(&vec![0; BLOCK as usize])));
        assert_eq!(blocks.digest(size), empty);
        assert!(!blocks.note(0, block(b"x")));
        assert_ne!(blocks.digest(size + 1), empty);
        assert!(blocks.note(1, block(b"x")));
        assert!(blocks.note(1, block(b"x")));
        assert!(!blocks.note(1, block(b"y")));
        assert!(!blocks.note(1, None));
        let with = blocks.digest(size);
        assert_ne!(with, empty);
        let mut elsewhere = Blocks::default();
        elsewhere.note(2, block(b"x"));
        assert_ne!(elsewhere.digest(size), with);
        // Zeros are no data, but they are known.
        assert!(blocks.has(&[0..1, 1..2]) && !blocks.has(&[0..2, 3..4]));
    }

    #[test]
    fn blocks_end_with_their_file() {
        assert_eq!(length(2 * BLOCK + 7, 1), BLOCK as usize);
        assert_eq!(length(2 * BLOCK + 7, 2), 7);
        assert_eq!(length(2 * BLOCK + 7, 3), 0);
        assert_eq!(length(2 * BLOCK, 2), 0);
        assert_eq!(length(u64::MAX, u64::MAX), 0);
    }

    #[test]
    fn a_manifest_knows_order_and_absence() {
        let (one, two) = (Some(Digest([1; 32])), Some(Digest([2; 32])));
        let all = [[one, two], [two, one], [one, None], [None, one], [None, None]];
        for (index, files) in all.iter().enumerate() {
            for other in &all[index + 1..] {
                assert_ne!(manifest(*files), manifest(*other));
            }
        }
    }
}
