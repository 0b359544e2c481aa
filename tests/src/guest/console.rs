//! A guest's serial log, read as it grows.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use ferry_guest::line::{Status, Verdict, PREFIX};

/// Time between two looks at the log.
const LOOK: Duration = Duration::from_millis(10);

/// The file a guest's serial port writes to, on whichever host it runs.
#[derive(Clone, Debug)]
pub struct Console {
    path: PathBuf,
}

impl Console {
    /// The log at `path`, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Console { path: path.into() }
    }

    /// The log's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything said so far.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn text(&self) -> Result<String> {
        let bytes = fs::read(&self.path).with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Everything said so far, by whole lines.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn lines(&self) -> Result<Vec<String>> {
        let text = self.text()?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        Ok(whole.lines().map(|line| line.trim_end().to_owned()).collect())
    }

    /// Waits until `wanted` makes something of the log's lines.
    ///
    /// # Errors
    /// When `patience` is over; the message has `what` was waited for and the end of the log.
    pub fn wait<T>(
        &self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&[String]) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            let lines = self.lines().unwrap_or_default();
            if let Some(found) = wanted(&lines) {
                return Ok(found);
            }
            if let Some(fatal) = lines
                .iter()
                .find(|line| line.starts_with(&format!("{PREFIX}fatal")))
            {
                bail!(
                    "{}: waited for {what}, but the guest said '{fatal}'",
                    self.path.display()
                );
            }
            if Instant::now() > deadline {
                let end = lines[lines.len().saturating_sub(10)..].join("\n");
                bail!(
                    "{}: no {what} within {patience:?}; the log ends:\n{end}",
                    self.path.display()
                );
            }
            thread::sleep(LOOK);
        }
    }

    /// The last status said, if any.
    pub fn status(&self) -> Option<Status> {
        self.lines()
            .ok()?
            .iter()
            .rev()
            .find_map(|line| Status::parse(line))
    }

    /// Waits for a status line that is yet to be said and that `wanted` accepts.
    ///
    /// # Errors
    /// When `patience` is over.
    pub fn next_status(&self, patience: Duration, mut wanted: impl FnMut(&Status) -> bool) -> Result<Status> {
        let before = self.lines().unwrap_or_default().len();
        self.wait("further status", patience, |lines| {
            lines
                .get(before..)?
                .iter()
                .filter_map(|line| Status::parse(line))
                .find(|status| wanted(status))
        })
    }

    /// Waits until the writer has been through its whole working set once more, counted from now: only then has every page that
    /// a migration brought been looked at by the guest itself.
    ///
    /// # Errors
    /// When `patience` is over.
    pub fn next_round(&self, patience: Duration) -> Result<Status> {
        let from = self.next_status(patience, |_| true)?;
        self.next_status(patience, |status| status.seq >= from.seq + from.set)
    }

    /// Waits for the answer to `check ID`.
    ///
    /// # Errors
    /// When `patience` is over.
    pub fn verdict(&self, id: &str, patience: Duration) -> Result<Verdict> {
        self.wait(&format!("verdict {id}"), patience, |lines| {
            lines
                .iter()
                .filter_map(|line| Verdict::parse(line))
                .find(|verdict| verdict.id == id)
        })
    }

    /// The lines that tell damage.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn errors(&self) -> Result<Vec<String>> {
        let errors = format!("{PREFIX}error ");
        Ok(self
            .lines()?
            .into_iter()
            .filter(|line| line.starts_with(&errors))
            .collect())
    }
}
