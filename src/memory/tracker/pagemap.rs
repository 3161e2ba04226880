//! What the kernel tells of a process's own page table over guest RAM.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::errno::Errno;

use super::huge::HUGE_PAGES;
use crate::cores::cores;
use crate::memory::sys::{self, PagemapQuery, ScannedRegion};
use crate::memory::{MemoryError, MemoryLayout};
use crate::page::{PAGE_SIZE_BYTES, PageRange};

/// Runs that one call of the kernel tells (24 bytes each).
const RUNS_PER_SCAN: usize = 4096;

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

    /// The addresses of `range`, one piece for each region.
    pub(super) fn addresses_of(&self, range: PageRange) -> impl Iterator<Item = Range<u64>> {
        self.layout.split(range).map(|(region, piece)| {
            let first = self.layout.range_of(region).start.0;
            let at = |page: u64| self.addresses[region] + (page - first) * PAGE_SIZE_BYTES as u64;
            at(piece.start.0)..at(piece.end.0)
        })
    }

    /// Calls `visit` with the runs of pages in `ranges`, which ascend, that `query` asks for, in ascending order. What is
    /// wide is scanned by several threads: at the freeze it is all of the guest, which stands still.
    pub(super) fn scan(
        &mut self,
        query: PagemapQuery,
        ranges: &[PageRange],
        mut visit: impl FnMut(PageRange),
    ) -> Result<(), MemoryError> {
        let pages: u64 = ranges.iter().map(PageRange::len).sum();
        let threads = (pages / PAGES_A_THREAD).clamp(1, (cores() as u64).min(MAX_THREADS));
        if threads == 1 {
            let mut found = std::mem::take(&mut self.found);
            let mut scan =
                |range: &PageRange| self.scan_part(query, *range, &mut found, &mut visit);
            let scanned = ranges.iter().try_for_each(&mut scan);
            self.found = found;
            return scanned;
        }
        let shares = self.shares(ranges, pages.div_ceil(threads));
        let scan_share = |share: &[PageRange]| {
            let mut found = vec![ScannedRegion::default(); RUNS_PER_SCAN];
            let mut runs = Vec::new();
            for part in share {
                self.scan_part(query, *part, &mut found, |run| runs.push(run))?;
            }
            Ok(runs)
        };
        let parts: Result<Vec<Vec<PageRange>>, MemoryError> = std::thread::scope(|scope| {
            let scan_share = &scan_share;
            let threads: Vec<_> =
                shares.iter().map(|share| scope.spawn(move || scan_share(share))).collect();
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
            let (mut at, end) = (address_of(piece.start.0), address_of(piece.end.0));
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

    /// Divides `ranges` into shares of about `share_pages` pages.
    fn shares(&self, ranges: &[PageRange], share_pages: u64) -> Vec<Vec<PageRange>> {
        let (mut shares, mut share, mut room) = (Vec::new(), Vec::new(), share_pages);
        for range in ranges {
            let mut rest = *range;
            while rest.len() > room {
                let cut = self.huge_page_from(rest.start.0 + room).min(rest.end.0);
                share.push(PageRange::new(rest.start.0, cut));
                shares.push(std::mem::take(&mut share));
                (rest, room) = (PageRange::new(cut, rest.end.0), share_pages);
            }
            room -= rest.len();
            share.push(rest);
        }
        shares.push(share);
        shares
    }

    /// The first page from `page` on where nobody's huge page is cut. Of a part of one the kernel does not take the
    /// protection anew, or it splits it.
    fn huge_page_from(&self, page: u64) -> u64 {
        let mut behind = self.layout.split(PageRange::new(page, self.layout.pages()));
        let Some((region, rest)) = behind.next() else { return page };
        let first = self.layout.range_of(region).start.0;
        let at = self.addresses[region] / PAGE_SIZE_BYTES as u64 + (page - first);
        (page + at.next_multiple_of(HUGE_PAGES) - at).min(rest.end.0)
    }
}
