//! Blocks that are copied and verified together, and what runs of them are.

use ferry_contract::cold::BLOCK;
use std::ops::Range;

/// Blocks that are asked for, written back and verified together.
const CHUNK: u64 = 16;

/// Some blocks of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Which.
    pub file: usize,
    /// One after the other.
    pub blocks: Range<u64>,
}

/// What is to be asked for next: a list of all chunks would be as long as the source wants.
#[derive(Debug, Default)]
pub struct Cursor {
    file: usize,
    run: usize,
    block: u64,
}

impl Cursor {
    /// The next chunk, by the runs of each file; none beyond the last file.
    pub fn next<'a>(&mut self, runs: impl Fn(usize) -> Option<&'a [Range<u64>]>) -> Option<Chunk> {
        loop {
            let Some(run) = runs(self.file)?.get(self.run) else {
                *self = Self {
                    file: self.file + 1,
                    ..Self::default()
                };
                continue;
            };
            let start = run.start.max(self.block);
            let end = run.end.min(start + CHUNK);
            if start >= end {
                self.run += 1;
                continue;
            }
            self.block = end;
            let (file, blocks) = (self.file, start..end);
            return Some(Chunk { file, blocks });
        }
    }
}

/// How many chunks a run is.
pub fn count(run: &Range<u64>) -> usize {
    (run.end - run.start).div_ceil(CHUNK) as usize
}

/// The chunks of a file's runs.
pub fn chunks(file: usize, runs: &[Range<u64>]) -> impl Iterator<Item = Chunk> + '_ {
    runs.iter().flat_map(move |run| {
        let end = run.end;
        run.clone().step_by(CHUNK as usize).map(move |start| Chunk {
            file,
            blocks: start..end.min(start + CHUNK),
        })
    })
}

/// What lies between runs, to the end of the file.
pub fn gaps(runs: &[Range<u64>], size: u64) -> Vec<Range<u64>> {
    let end = size.div_ceil(BLOCK);
    let mut at = 0;
    let mut gaps = Vec::new();
    for run in runs.iter().cloned().chain(std::iter::once(end..end)) {
        if run.start > at {
            gaps.push(at..run.start);
        }
        at = run.end;
    }
    gaps
}

/// Both, joined.
pub fn union(one: &[Range<u64>], two: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all: Vec<_> = one
        .iter()
        .chain(two)
        .filter(|run| !run.is_empty())
        .cloned()
        .collect();
    all.sort_by_key(|run| run.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for run in all {
        match joined.last_mut() {
            Some(last) if last.end >= run.start => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_and_their_gaps_known() {
        assert_eq!(union(&[0..2, 5..6], &[1..3, 6..7, 9..9]), [0..3, 5..7]);
        assert_eq!(gaps(&[1..2, 4..5], 6 * BLOCK + 1), [0..1, 2..4, 5..7]);
        assert_eq!(gaps(&[0..3, 3..7], 6 * BLOCK + 1), []);
        let chunks: Vec<_> = chunks(3, &[0..17, 20..21]).map(|chunk| chunk.blocks).collect();
        assert_eq!(chunks, [0..16, 16..17, 20..21]);
    }

    #[test]
    fn each_chunk_is_next_once() {
        let end = 1 << 22;
        let files = [vec![0..17, 20..21], vec![], vec![5..end, end..end]];
        let runs = |file: usize| files.get(file).map(Vec::as_slice);
        let mut cursor = Cursor::default();
        let found: Vec<_> = std::iter::from_fn(|| cursor.next(runs)).collect();
        assert_eq!(found.len(), files.iter().flatten().map(count).sum::<usize>());
        let expected = files
            .iter()
            .enumerate()
            .flat_map(|(number, runs)| chunks(number, runs));
        assert!(found.into_iter().eq(expected));
    }
}
