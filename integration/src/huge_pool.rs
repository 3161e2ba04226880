//! Huge pages for the guests of a test: taken from the kernel for its time, and a place to make files of them.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// A file system on which files are of huge pages. When it is dropped, that and its pages go again.
#[derive(Debug)]
pub struct HugePool {
    directory: tempfile::TempDir,
    pages_before: u64,
    /// Other tests take turns.
    _lock: Flock<File>,
}

impl HugePool {
    /// With so much memory; `None`, with a loud word, when the kernel has not so many huge pages to give.
    pub fn of_mib(mib: u64) -> Result<Option<Self>> {
        let lock = Flock::lock(File::open(POOL).context(POOL)?, FlockArg::LockExclusive);
        let lock = lock.map_err(|(_, errno)| anyhow!("lock {POOL}: {errno}"))?;
        let (wanted, pages_before) = (mib / 2, pages(POOL)?);
        std::fs::write(POOL, (pages_before + wanted).to_string()).context(POOL)?;
        let directory = tempfile::Builder::new().prefix("farfault-huge-").tempdir()?;
        let pool = HugePool { directory, pages_before, _lock: lock };
        let there = pages(POOL)?;
        if there < pages_before + wanted {
            eprintln!(
                "\n*** SKIPPED, nothing was tested: of {wanted} huge pages there are {} ***\n",
                there - pages_before
            );
            return Ok(None);
        }
        mount(Some("none"), pool.path(), Some("hugetlbfs"), MsFlags::empty(), None::<&str>)
            .context("mount hugetlbfs")?;
        Ok(Some(pool))
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
