//! Huge pages for the guests of a test: taken from the kernel for its time, and a place to make files of them.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::skip::skipped;

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Has the kernel move what is in memory together.
const COMPACT: &str = "/proc/sys/vm/compact_memory";
/// Memory that is free in small pieces only, or that others are about to give back, is no reason to give up.
const PATIENCE: Duration = Duration::from_secs(15);
const TRY_EVERY: Duration = Duration::from_millis(500);

/// A file system on which files are of huge pages. When it is dropped, that and its pages go again.
#[derive(Debug)]
pub struct HugePool {
    directory: tempfile::TempDir,
    pages_before: u64,
    /// Other tests take turns.
    _lock: Flock<File>,
}

impl HugePool {
    /// With so much memory; `None` when the kernel has not so many huge pages to give, and a test may be skipped.
    pub fn of_mib(mib: u64) -> Result<Option<Self>> {
        let lock = Flock::lock(File::open(POOL).context(POOL)?, FlockArg::LockExclusive);
        let lock = lock.map_err(|(_, errno)| anyhow!("lock {POOL}: {errno}"))?;
        let (wanted, pages_before) = (mib / 2, pages(POOL)?);
        let directory = tempfile::Builder::new().prefix("farfault-huge-").tempdir()?;
        let pool = HugePool { directory, pages_before, _lock: lock };
        let there = pool.grow_to(pages_before + wanted)?;
        if there < pages_before + wanted {
            let got = there.saturating_sub(pages_before);
            skipped(&format!("of {wanted} huge pages the kernel has {got} to give"))?;
            return Ok(None);
        }
        mount(Some("none"), pool.path(), Some("hugetlbfs"), MsFlags::empty(), None::<&str>)
            .context("mount hugetlbfs")?;
        Ok(Some(pool))
    }

    /// Asks the kernel for a pool of so many pages, again and again; gives how many it has then.
    fn grow_to(&self, wanted: u64) -> Result<u64> {
        let since = Instant::now();
        loop {
            std::fs::write(POOL, wanted.to_string()).context(POOL)?;
            let there = pages(POOL)?;
            if there >= wanted || since.elapsed() > PATIENCE {
                return Ok(there);
            }
            // Not every kernel can.
            let _ = std::fs::write(COMPACT, "1");
            std::thread::sleep(TRY_EVERY);
        }
    }

    /// Where files of huge pages can be made.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
        let _ = std::fs::write(POOL, self.pages_before.to_string());
    }
}

fn pages(path: &str) -> Result<u64> {
    Ok(std::fs::read_to_string(path).context(path.to_owned())?.trim().parse()?)
}
