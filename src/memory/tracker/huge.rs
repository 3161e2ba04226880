//! Dirty tracking of RAM on hugetlbfs: by the kernel in pages of 2 MiB, and within those by hashes.
//!
//! As [`super::WriteProtect`], but the first write to 4 KiB lets all 2 MiB count as written. So of a page that
//! is found written each 4 KiB are hashed and compared with what was sent (8 bytes a page of 4 KiB are kept), and
//! only what has changed is reported. A page that was taken out of the guest's page table, by a balloon, may
//! have become a hole, which no write tells: so what is not in there and was not zero is hashed too.

use std::sync::Arc;

use userfaultfd::Uffd;

use super::pagemap::Pagemap;
use super::write_protect::{protect, unprotect, watch};
use super::{DirtyTracker, HashScan, ReadWitness};
use crate::cores::cores;
use crate::memory::sys::PagemapQuery;
use crate::memory::{GuestMemory, MemoryError};
use crate::page::{PageIndex, PageRange, PageSet};

/// Pages of 4 KiB in one of the kernel's: it does not track larger ones.
pub(super) const HUGE_PAGES: u64 = 512;

/// A thread is worth starting for so many pages to hash: 32 MiB, some milliseconds.
const PAGES_A_THREAD: u64 = 8192;

/// See the module's text.
pub(super) struct HugeWriteProtect {
    uffd: Uffd,
    guest: Pagemap,
    memory: Arc<GuestMemory>,
    hashes: HashScan,
    armed: bool,
}

impl HugeWriteProtect {
    /// A tracker of all of `memory`, as [`super::WriteProtect::new`]; its pages may be of 2 MiB.
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        pid: u32,
        addresses: &[u64],
        uffd: Uffd,
    ) -> Result<Self, MemoryError> {
        let guest = Pagemap::open(&pid.to_string(), memory.layout(), addresses)?;
        let hashes = HashScan::new(Arc::clone(&memory));
        Ok(HugeWriteProtect { uffd, guest, memory, hashes, armed: false })
    }

    /// `range` and what else is in the huge pages at its ends, in pieces that are each of one region: of
    /// part of a huge page the kernel does not take the protection anew.
    fn whole_units(&self, range: PageRange) -> Vec<PageRange> {
        let layout = self.memory.layout();
        let whole = |(region, piece): (usize, PageRange)| {
            let all = layout.range_of(region);
            let start = (piece.start.0 - all.start.0) / HUGE_PAGES * HUGE_PAGES;
            let end = (piece.end.0 - all.start.0).next_multiple_of(HUGE_PAGES);
            PageRange::new(all.start.0 + start, (all.start.0 + end).min(all.end.0))
        };
        layout.split(range).map(whole).collect()
    }

    /// Hashes these pages and adds those that have changed. Several threads do, where it is much: at the freeze the
    /// guest waits.
    fn compare(&self, runs: &[PageRange], into: &mut PageSet) -> Result<(), MemoryError> {
        let pieces: Vec<PageRange> = runs.iter().flat_map(|run| in_pieces(*run)).collect();
        let pages: u64 = pieces.iter().map(PageRange::len).sum();
        let threads = (pages / PAGES_A_THREAD).clamp(1, cores() as u64) as usize;
        let changed_in = |pieces: &[PageRange]| {
            let mut changed: Vec<PageIndex> = Vec::new();
            for piece in pieces {
                self.hashes.scan(*piece, |page| changed.push(page))?;
            }
            Ok(changed)
        };
        let changed: Result<Vec<Vec<PageIndex>>, MemoryError> = std::thread::scope(|scope| {
            let changed_in = &changed_in;
            let share = pieces.len().div_ceil(threads).max(1);
            let started: Vec<_> =
                pieces.chunks(share).map(|part| scope.spawn(move || changed_in(part))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            started.into_iter().map(join).collect()
        });
        changed?.into_iter().flatten().for_each(|page| {
            into.insert(page);
        });
        Ok(())
    }
}

/// Pieces of a run that threads can share.
fn in_pieces(run: PageRange) -> impl Iterator<Item = PageRange> {
    let starts = (run.start.0..run.end.0).step_by(HUGE_PAGES as usize);
    starts.map(move |start| PageRange::new(start, (start + HUGE_PAGES).min(run.end.0)))
}

impl DirtyTracker for HugeWriteProtect {
    fn name(&self) -> &'static str {
        "write-protect"
    }

    fn arm(&mut self) -> Result<(), MemoryError> {
        self.armed = true;
        watch(&self.uffd, &self.guest)?;
        // All of it: the file does not tell holes from content.
        protect(&self.uffd, &self.guest, PageRange::new(0, self.memory.pages()))
    }

    fn collect(&mut self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError> {
        let mut runs = Vec::new();
        for units in self.whole_units(range) {
            let written = PagemapQuery::WrittenToProtect;
            self.guest.scan(written, &[units], |run| runs.push(run))?;
            let (mut at, mut gaps) = (units.start, Vec::new());
            self.guest.scan(PagemapQuery::Mapped, &[units], |run| {
                gaps.push(PageRange { start: at, end: run.start });
                at = run.end;
            })?;
            gaps.push(PageRange { start: at, end: units.end });
            let lost = gaps.into_iter().flat_map(|gap| self.hashes.not_zero(gap));
            runs.extend(lost.map(|page| PageRange::new(page.0, page.0 + 1)));
        }
        self.compare(&runs, into)
    }

    fn witness(&self) -> Option<Arc<dyn ReadWitness>> {
        self.hashes.witness()
    }

    fn is_quick(&self) -> bool {
        false
    }

    fn disarm(&mut self) -> Result<(), MemoryError> {
        if !std::mem::take(&mut self.armed) {
            return Ok(());
        }
        unprotect(&self.uffd, &self.guest)
    }
}

impl Drop for HugeWriteProtect {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::warn!(%error, "the guest's process stays write-protected, which only slows it");
        }
    }
}
