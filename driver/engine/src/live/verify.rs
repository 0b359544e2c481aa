//! The test mode that compares all of a guest's memory on both hosts before the commitment.

use super::Error;
use crate::memory::RamFile;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

/// Digests of a guest, of all its blocks together, so that a control message stays small; one a block at least.
const MAX_PIECES: u64 = 2048;
/// The smallest piece, bytes.
const MIN_PIECE: u64 = 1 << 20;
/// Bytes read at a time.
const READ: usize = 1 << 20;

/// Digests of one block after the other, piece by piece; holes count as zeros.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests(Vec<Vec<String>>);

/// Computes the digests of these files.
pub fn digest<'a>(files: impl IntoIterator<Item = &'a RamFile>) -> Result<Digests, Error> {
    let files: Vec<_> = files.into_iter().collect();
    files
        .iter()
        .map(|file| digest_file(file, piece(file.len(), files.len())))
        .collect::<Result<_, _>>()
        .map(Digests)
}

/// The first piece in which two hosts differ: block, offset and length in bytes.
pub fn difference<'a>(
    ours: &Digests,
    theirs: &Digests,
    files: impl IntoIterator<Item = &'a RamFile>,
) -> Option<(usize, u64, u64)> {
    let blocks = ours.0.len();
    files.into_iter().enumerate().find_map(|(block, file)| {
        let (ours, theirs) = (ours.0.get(block)?, theirs.0.get(block));
        let same = |index: usize| theirs.and_then(|theirs| theirs.get(index)) == ours.get(index);
        let index = (0..ours.len()).find(|index| !same(*index))?;
        let piece = piece(file.len(), blocks);
        Some((block, index as u64 * piece, piece))
    })
}

/// Bytes of a piece of a block of this length, of a guest of so many.
fn piece(length: u64, blocks: usize) -> u64 {
    let share = (MAX_PIECES / blocks.max(1) as u64).max(1);
    length.div_ceil(share).next_multiple_of(MIN_PIECE)
}

fn digest_file(file: &RamFile, piece: u64) -> Result<Vec<String>, Error> {
    let mut buffer = vec![0; READ];
    let mut digests = Vec::new();
    let length = file.len();
    for start in (0..length).step_by(piece as usize) {
        let mut digest = xxhash_rust::xxh3::Xxh3Default::new();
        let end = (start + piece).min(length);
        for offset in (start..end).step_by(READ) {
            let part = &mut buffer[..(end - offset).min(READ as u64) as usize];
            file.read_at(offset, part)?;
            // A digest of digests: the inner one is the fast whole-buffer form.
            digest.update(&xxh3_128(part).to_le_bytes());
        }
        digests.push(format!("{:032x}", digest.digest128()));
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(length: u64, byte: Option<(u64, u8)>) -> (tempfile::NamedTempFile, RamFile) {
        let temporary = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        temporary.as_file().set_len(length).unwrap();
        let file = RamFile::open(temporary.path()).unwrap();
        if let Some((offset, byte)) = byte {
            file.write_at(offset, &[byte]).unwrap();
        }
        (temporary, file)
    }

    #[test]
    fn one_byte_is_found_and_a_hole_equals_zeros() {
        let (_a, empty) = file(5 << 20, None);
        let (_b, zeros) = file(5 << 20, Some((3 << 20, 0)));
        let (_c, other) = file(5 << 20, Some(((3 << 20) + 77, 1)));
        let (empty, zeros, other_digests) = (
            digest([&empty]).unwrap(),
            digest([&zeros]).unwrap(),
            digest([&other]).unwrap(),
        );
        assert_eq!(difference(&empty, &zeros, [&other]), None);
        assert_eq!(
            difference(&empty, &other_digests, [&other]),
            Some((0, 3 << 20, 1 << 20))
        );
    }

    #[test]
    fn missing_digests_are_a_difference() {
        let (_a, file) = file(1 << 20, None);
        let ours = digest([&file]).unwrap();
        assert_eq!(
            difference(&ours, &Digests(vec![]), [&file]),
            Some((0, 0, 1 << 20))
        );
    }

    #[test]
    fn the_digests_of_many_large_blocks_fit_a_message() {
        // 8 NUMA cells and 7 DIMMs; more than there can be.
        for blocks in [1, 15, 300, 5000] {
            for length in [1_u64 << 20, 1 << 31, 1 << 33, 1 << 43] {
                let all = length.div_ceil(piece(length, blocks)) * blocks as u64;
                assert!(
                    all <= MAX_PIECES.max(blocks as u64),
                    "{blocks} of {length}: {all}"
                );
            }
        }
    }
}
