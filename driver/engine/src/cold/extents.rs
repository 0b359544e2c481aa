//! Where a file has data: SEEK_DATA and SEEK_HOLE (lseek(2)).

use super::hash;
use ferry_contract::cold::BLOCK;
use nix::errno::Errno;
use nix::unistd::{lseek, Whence};
use std::fs::File;
use std::io;
use std::ops::Range;

/// The runs of blocks of a file that may hold data, in ascending order and apart from each other. A file system that
/// knows no holes, and a block device, say all of it.
pub fn data_blocks(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => break,
            // A device, or a file system without.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        if start >= size {
            break;
        }
        let end = match seek(file, start, Whence::SeekHole) {
            Ok(end) if end > start => end.min(size),
            Ok(_) | Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENXIO) => size,
            Err(error) => return Err(error.into()),
        };
        let blocks = start / BLOCK..end.div_ceil(BLOCK);
        match runs.last_mut() {
            Some(last) if last.end >= blocks.start => last.end = blocks.end.max(last.end),
            _ => runs.push(blocks),
        }
        at = end;
    }
    Ok(runs)
}

/// Adds a run behind all others. Where there are `most` already, what lies before it becomes part of the last one.
pub fn push(runs: &mut Vec<Range<u64>>, run: Range<u64>, most: usize) {
    let full = runs.len() >= most;
    match runs.last_mut().filter(|_| full) {
        Some(last) => last.end = run.end,
        None => runs.push(run),
    }
}

/// Bytes in these blocks of a file.
pub fn bytes(runs: &[Range<u64>], size: u64) -> u64 {
    let of = |run: &Range<u64>| match run.is_empty() {
        true => 0,
        false => (run.end - 1 - run.start) * BLOCK + hash::length(size, run.end - 1) as u64,
    };
    runs.iter().map(of).sum()
}

fn seek(file: &File, at: u64, whence: Whence) -> Result<u64, Errno> {
    let at = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
    lseek(file, at, whence).map(|found| found as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn more_runs_than_there_may_be_are_joined() {
        let mut runs = Vec::new();
        for run in [0..1, 2..3, 4..5, 6..7] {
            push(&mut runs, run, 2);
        }
        assert_eq!(runs, [0..1, 2..7]);
    }

    #[test]
    fn only_what_was_written_is_data() {
        let file = tempfile::tempfile().unwrap();
        let size = 64 * BLOCK + 5;
        file.set_len(size).unwrap();
        assert_eq!(data_blocks(&file, size).unwrap(), []);
        file.write_all_at(b"x", 3 * BLOCK + 9).unwrap();
        file.write_all_at(b"x", 4 * BLOCK).unwrap();
        file.write_all_at(b"x", 64 * BLOCK + 4).unwrap();
        let runs = data_blocks(&file, size).unwrap();
        assert_eq!(runs, [3..5, 64..65]);
        assert_eq!(bytes(&runs, size), 2 * BLOCK + 5);
        assert_eq!(bytes(&[], size), 0);
    }
}
