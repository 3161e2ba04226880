//! What the kernel tells of a process's own page table over guest RAM.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::memory::sys::{self, PagemapQuery, ScannedRegion};
use crate::memory::{MemoryError, MemoryLayout};
use crate::page::{PAGE_SIZE_BYTES, PageRange};

/// Runs that one call of the kernel tells (24 bytes each).
const RUNS_PER_SCAN: usize = 4096;

/// `/proc/PID/pagemap` of a process that has guest RAM mapped.
pub(super) struct Pagemap {
    file: File,
    layout: MemoryLayout,
    /// Where the regions are in the process, in layout order.
    addresses: Vec<u64>,
    found: Vec<ScannedRegion>,
}

impl Pagemap {
    /// Of `process`: a number, or "self".
    pub(super) fn open(
        process: &str,
        layout: &MemoryLayout,
        addresses: &[u64],
    ) -> Result<Self, MemoryError> {
        assert_eq!(layout.regions().len(), addresses.len(), "an address for each region");
        let path = PathBuf::from(format!("/proc/{process}/pagemap"));
        let file = File::open(&path).map_err(|source| MemoryError::Proc { path, source })?;
        let found = vec![ScannedRegion::default(); RUNS_PER_SCAN];
        Ok(Pagemap { file, layout: layout.clone(), addresses: addresses.to_vec(), found })
    }

    /// Name, address and size in bytes of each region.
    pub(super) fn regions(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        let regions = self.layout.regions().iter();
        regions.zip(&self.addresses).map(|(r, address)| (r.name.as_str(), *address, r.size_bytes))
    }

    /// Calls `visit` with the runs of pages in `range` that `query` asks for, in ascending order.
    pub(super) fn scan(
        &mut self,
        query: PagemapQuery,
        range: PageRange,
        mut visit: impl FnMut(PageRange),
    ) -> Result<(), MemoryError> {
        for (region, piece) in self.layout.split(range) {
            let (first, address) = (self.layout.range_of(region).start.0, self.addresses[region]);
            let address_of = |page: u64| address + (page - first) * PAGE_SIZE_BYTES as u64;
            let page_at = |at: u64| first + (at - address) / PAGE_SIZE_BYTES as u64;
            let (mut at, end) = (address_of(piece.start.0), address_of(piece.end.0));
            while at < end {
                let scanned = sys::pagemap_scan(self.file.as_fd(), at, end, query, &mut self.found);
                let (runs, reached) = scanned.map_err(|source| match source {
                    Errno::ESRCH => MemoryError::ProcessGone,
                    source => MemoryError::Userfault { action: "scan the page table", source },
                })?;
                for run in &self.found[..runs] {
                    visit(PageRange::new(page_at(run.start), page_at(run.end)));
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
}
