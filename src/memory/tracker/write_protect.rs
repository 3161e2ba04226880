//! Dirty tracking by the kernel: userfaultfd's asynchronous write protection, collected with
//! `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst).
//!
//! The first write to a protected page, in user or kernel mode, only removes its protection; the guest
//! does not wait for anybody. A scan finds the unprotected pages and protects them again in one
//! step. What it cannot see is a page that became a hole (a balloon gave it back): those are found by
//! comparing which pages are holes with which were at the last collection.
//!
//! One case stays unseen: between two collections a page is made a hole and then read, not written, by
//! the guest. The kernel fills it with zeros and keeps it protected. A guest does that only to a
//! page that it gave to its balloon, which is to say that it does not mind what is in it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use libc::c_void;
use nix::errno::Errno;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd};

use super::DirtyTracker;
use crate::memory::userfault::{errno, register};
use crate::memory::{GuestMemory, MemoryError, sys};
use crate::page::{PAGE_SIZE_BYTES, PageIndex, PageRange, PageSet};

/// What `UFFDIO_API` must agree on for the userfaultfd of this tracker.
pub const TRACK_FEATURES: FeatureFlags = FeatureFlags::from_bits_retain(
    FeatureFlags::PAGEFAULT_FLAG_WP.bits()
        | sys::WP_HUGETLBFS_SHMEM.bits()
        | sys::WP_UNPOPULATED.bits()
        | sys::WP_ASYNC.bits(),
);

/// Runs of written pages that one call of the kernel tells (24 bytes each).
const RUNS_PER_SCAN: usize = 4096;

/// See the module's text.
pub struct WriteProtect {
    memory: Arc<GuestMemory>,
    uffd: Uffd,
    pagemap: File,
    /// Where the regions are in the process, in layout order.
    addresses: Vec<u64>,
    /// Which pages were not holes when they were last collected.
    populated: PageSet,
    armed: bool,
}

impl WriteProtect {
    /// A tracker of all of `memory`, which process `pid` has mapped at `addresses`. `uffd` was made in
    /// that process, with [`TRACK_FEATURES`].
    pub fn new(
        memory: Arc<GuestMemory>,
        pid: u32,
        addresses: &[u64],
        uffd: Uffd,
    ) -> Result<Self, MemoryError> {
        assert_eq!(memory.layout().regions().len(), addresses.len(), "an address for each region");
        let path = PathBuf::from(format!("/proc/{pid}/pagemap"));
        let pagemap = File::open(&path).map_err(|source| MemoryError::Proc { path, source })?;
        let populated = PageSet::empty(memory.pages());
        let addresses = addresses.to_vec();
        Ok(WriteProtect { memory, uffd, pagemap, addresses, populated, armed: false })
    }

    /// Name, address and size in bytes of each region.
    fn regions(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        let regions = self.memory.layout().regions().iter();
        regions.zip(&self.addresses).map(|(r, address)| (r.name.as_str(), *address, r.size_bytes))
    }

    /// Adds the pages of `range` that were written, and protects them again.
    fn collect_written(&self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError> {
        let mut found = vec![sys::ScannedRegion::default(); RUNS_PER_SCAN];
        for (region, piece) in self.memory.layout().split(range) {
            let first = self.memory.layout().range_of(region).start;
            let address_of = |page: PageIndex| {
                self.addresses[region] + (page.0 - first.0) * PAGE_SIZE_BYTES as u64
            };
            let page_at = |address: u64| {
                first.0 + (address - self.addresses[region]) / PAGE_SIZE_BYTES as u64
            };
            let (mut at, end) = (address_of(piece.start), address_of(piece.end));
            while at < end {
                let scanned = sys::pagemap_scan(self.pagemap.as_fd(), at, end, true, &mut found);
                let (runs, reached) = scanned.map_err(|source| match source {
                    Errno::ESRCH => MemoryError::ProcessGone,
                    source => MemoryError::Userfault { action: "scan for written pages", source },
                })?;
                for run in &found[..runs] {
                    into.insert_range(PageRange::new(page_at(run.start), page_at(run.end)));
                }
                // Nothing found and nowhere reached: the address space is gone.
                if reached <= at {
                    return Err(MemoryError::ProcessGone);
                }
                at = reached;
            }
        }
        Ok(())
    }

    /// Adds the pages of `range` that became holes or ceased to be.
    fn collect_holes(&mut self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError> {
        let mut runs = Vec::new();
        self.memory.for_each_populated_run(range, |run| runs.push(run))?;
        let mut gap = range.start;
        for run in runs.into_iter().chain([PageRange { start: range.end, end: range.end }]) {
            while let Some(page) = self.populated.first_from(gap).filter(|page| *page < run.start) {
                self.populated.remove(page);
                into.insert(page);
                gap = page;
            }
            for page in run.pages() {
                if self.populated.insert(page) {
                    into.insert(page);
                }
            }
            gap = run.end;
        }
        Ok(())
    }
}

impl DirtyTracker for WriteProtect {
    fn name(&self) -> &'static str {
        "write-protect"
    }

    fn arm(&mut self) -> Result<(), MemoryError> {
        self.armed = true;
        for (name, address, size_bytes) in self.regions() {
            register(&self.uffd, name, "track", address, size_bytes, RegisterMode::WRITE_PROTECT)?;
            let protected = self.uffd.write_protect(address as *mut c_void, size_bytes as usize);
            protected.map_err(|error| MemoryError::Userfault {
                action: "write-protect guest RAM",
                source: errno(&error),
            })?;
        }
        self.populated = self.memory.populated(PageRange::new(0, self.memory.pages()))?;
        Ok(())
    }

    fn collect(&mut self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError> {
        self.collect_written(range, into)?;
        self.collect_holes(range, into)
    }

    fn disarm(&mut self) -> Result<(), MemoryError> {
        if !std::mem::take(&mut self.armed) {
            return Ok(());
        }
        for (_, address, size_bytes) in self.regions() {
            let done = self.uffd.unregister(address as *mut c_void, size_bytes as usize);
            match done.map_err(|error| errno(&error)) {
                // The process has ended.
                Ok(()) | Err(Errno::ESRCH | Errno::ENOMEM) => {}
                Err(source) => {
                    return Err(MemoryError::Userfault { action: "stop tracking", source });
                }
            }
        }
        Ok(())
    }
}

impl Drop for WriteProtect {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::warn!(%error, "the guest's process stays write-protected, which only slows it");
        }
    }
}
