//! Huge pages of 2 MiB, which all hosts of a lab share with this machine.

use std::fs::{self, File};

use anyhow::{Context, Result};

use crate::skipped;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// More huge pages than this machine had, until dropped.
pub struct HugePages {
    before: u64,
    /// Locked: there is one pool, and who gives his pages back would take another one's along.
    _pool: File,
}

fn figure(name: &str) -> Result<u64> {
    let path = format!("{POOL}/{name}");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    text.trim().parse().context(path)
}

fn set(count: u64) -> Result<()> {
    Ok(fs::write(format!("{POOL}/nr_hugepages"), count.to_string())?)
}

impl HugePages {
    /// Adds `count` pages; `None`, and a line that says so, where the kernel has them not.
    ///
    /// # Errors
    /// If they cannot be counted.
    pub fn add(count: u64) -> Result<Option<Self>> {
        let Ok(pool) = File::open(format!("{POOL}/nr_hugepages")) else {
            skipped("this kernel has no huge pages");
            return Ok(None);
        };
        pool.lock()?;
        let before = figure("nr_hugepages")?;
        let pages = HugePages { before, _pool: pool };
        if set(before + count).is_err() || figure("nr_hugepages")? < before + count {
            skipped(&format!("this machine has no memory for {count} huge pages"));
            return Ok(None);
        }
        Ok(Some(pages))
    }

    /// Takes all pages from the pool but those in use and `count` more.
    ///
    /// # Errors
    /// If the pool cannot be changed.
    pub fn leave(&self, count: u64) -> Result<()> {
        set(self.used()? + count)
    }

    /// Pages in use.
    ///
    /// # Errors
    /// If they cannot be counted.
    pub fn used(&self) -> Result<u64> {
        Ok(figure("nr_hugepages")? - figure("free_hugepages")?)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = set(self.before) {
            eprintln!("huge pages stay set aside: {error:#}");
        }
    }
}
