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

/// Of a huge page.
const HUGE_BYTES: u64 = 2 << 20;

/// A thread is worth starting for so many pages: 4 GiB, some milliseconds.
const PAGES_A_THREAD: u64 = 1 << 20;
const MAX_THREADS: u64 = 16;

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

    /// Calls `visit` with the runs of pages in `range` that `query` asks for, in ascending order. A wide
    /// range is scanned by several threads: at the freeze it is all of the guest, which stands still.
    ///
    /// [`PagemapQuery::WrittenToProtect`] may give pages beside `range` too, some of them twice: those of a huge page
    /// that lies partly in it. Asked for a part, the kernel splits the huge page, which leaves nothing mapped of shared
    /// memory, and forgets what was written.
    pub(super) fn scan(
        &mut self,
        query: PagemapQuery,
        range: PageRange,
        visit: impl FnMut(PageRange),
    ) -> Result<(), MemoryError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        let threads = (range.len() / PAGES_A_THREAD).clamp(1, cores.min(MAX_THREADS));
        if threads == 1 {
            let mut found = std::mem::take(&mut self.found);
            let scanned = self.scan_part(query, range, &mut found, visit);
            self.found = found;
            return scanned;
        }
        // Of part of a huge page the kernel does not take the protection anew.
        let share = range.len().div_ceil(threads).next_multiple_of(super::huge::HUGE_PAGES);
        let part = |number: u64| {
            let start = range.start.0 + number * share;
            let part = PageRange::new(start.min(range.end.0), (start + share).min(range.end.0));
            let mut found = vec![ScannedRegion::default(); RUNS_PER_SCAN];
            let mut runs = Vec::new();
            self.scan_part(query, part, &mut found, |run| runs.push(run)).map(|()| runs)
        };
        let parts: Result<Vec<Vec<PageRange>>, MemoryError> = std::thread::scope(|scope| {
            let part = &part;
            let threads: Vec<_> =
                (0..threads).map(|number| scope.spawn(move || part(number))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        });
        parts?.into_iter().flatten().for_each(visit);
        Ok(())
    }

    fn scan_part(
        &self,
        query: PagemapQuery,
        range: PageRange,
        found: &mut [ScannedRegion],
        mut visit: impl FnMut(PageRange),
    ) -> Result<(), MemoryError> {
        for (region, piece) in self.layout.split(range) {
            let (first, address) = (self.layout.range_of(region).start.0, self.addresses[region]);
            let address_of = |page: u64| address + (page - first) * PAGE_SIZE_BYTES as u64;
            let page_at = |at: u64| first + (at - address) / PAGE_SIZE_BYTES as u64;
            let (mut at, mut end) = (address_of(piece.start.0), address_of(piece.end.0));
            if query == PagemapQuery::WrittenToProtect {
                let region_end = address_of(self.layout.range_of(region).end.0);
                at = (at / HUGE_BYTES * HUGE_BYTES).max(address);
                end = end.next_multiple_of(HUGE_BYTES).min(region_end);
            }
            while at < end {
                let scanned = sys::pagemap_scan(self.file.as_fd(), at, end, query, found);
                let (runs, reached) = scanned.map_err(|source| match source {
                    Errno::ESRCH => MemoryError::ProcessGone,
                    source => MemoryError::Userfault { action: "scan the page table", source },
                })?;
                for run in &found[..runs] {
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
