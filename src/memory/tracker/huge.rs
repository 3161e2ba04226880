//! Dirty tracking of RAM on hugetlbfs: by the kernel in pages of 2 MiB, and within those by hashes.
//!
//! As [`super::WriteProtect`], but the first write to 4 KiB lets all 2 MiB count as written. So of a page that
//! is found written each 4 KiB are hashed and compared with what was sent (8 bytes a page of 4 KiB are kept), and
//! only what has changed is reported. Three things no write tells:
//!
//! * A page that was taken out of the guest's page table, by a balloon, may have become a hole: so what is not in there
//!   and was not zero is hashed too.
//! * A guest that reads such a hole gets a page again, all zero, that counts as unwritten. So of each page of 2 MiB that
//!   counts as unwritten one of 4 KiB that was not zero is looked at. RAM beside hugetlbfs has [`ReadWatch`] for that.
//! * A page that was written, read and sent, and written back has been compared, perhaps, with what was sent before.
//!   So what was sent with another content than the last comparison found is compared once more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use userfaultfd::Uffd;
use xxhash_rust::xxh3::xxh3_64;

use super::hash_scan::{Hashes, NOTHING_KNOWN, hash_of_zeros};
use super::pagemap::Pagemap;
use super::reads::{ReadPages, ReadWatch};
use super::write_protect::{protect, unprotect, watch};
use super::{DirtyTracker, HashScan, ReadWitness};
use crate::cores::cores;
use crate::memory::sys::PagemapQuery;
use crate::memory::{GuestMemory, MemoryError};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, PageSet};

/// Pages of 4 KiB in one of the kernel's: it does not track larger ones.
pub(super) const HUGE_PAGES: u64 = 512;

/// A thread is worth starting for so many pages to hash: 32 MiB, some milliseconds.
const PAGES_A_THREAD: u64 = 8192;

/// A look at one page by a system call takes as long as hashing so many.
const PAGES_A_LOOK: u64 = 4;

/// See the module's text.
pub(super) struct HugeWriteProtect {
    uffd: Uffd,
    guest: Pagemap,
    memory: Arc<GuestMemory>,
    /// Which regions lie on hugetlbfs.
    is_huge: Vec<bool>,
    hashes: HashScan,
    /// Of the other regions.
    reads: ReadWatch,
    witness: Arc<Witness>,
    armed: bool,
}

struct Witness {
    hashes: Arc<Hashes>,
    reads: Arc<ReadPages>,
    /// Pages that were sent with another content than they were found to have, before or since.
    doubtful: Mutex<PageSet>,
}

impl Witness {
    fn doubtful(&self) -> MutexGuard<'_, PageSet> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sent(&self, page: PageIndex, hash: u64) {
        let before = self.hashes.replace(page, hash);
        // Of what nothing was known no write was compared, so it still counts as written.
        if ![NOTHING_KNOWN, hash].contains(&before) {
            self.doubtful().insert(page);
        }
    }
}

impl ReadWitness for Witness {
    fn saw(&self, page: PageIndex, copy: &PageBytes) {
        self.sent(page, xxh3_64(copy));
        self.reads.saw(page, copy);
    }

    fn saw_holes(&self, holes: PageRange) {
        let zero = hash_of_zeros();
        holes.pages().for_each(|page| self.sent(page, zero));
        self.reads.saw_holes(holes);
    }
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
        let is_huge = memory.unit_pages().map(|pages| pages > 1).collect();
        let hashes = HashScan::new(Arc::clone(&memory));
        let reads = ReadWatch::new(Arc::clone(&memory))?;
        let doubtful = Mutex::new(PageSet::empty(memory.pages()));
        let witness = Witness { hashes: hashes.hashes(), reads: reads.witness(), doubtful };
        let witness = Arc::new(witness);
        Ok(HugeWriteProtect { uffd, guest, memory, is_huge, hashes, reads, witness, armed: false })
    }

    /// `range` and what else is in the huge pages at its ends, in pieces that are each of one region: of
    /// part of a huge page the kernel does not take the protection anew.
    fn whole_units(&self, range: PageRange) -> Vec<(usize, PageRange)> {
        let layout = self.memory.layout();
        let whole = |(region, piece): (usize, PageRange)| {
            let all = layout.range_of(region);
            let start = (piece.start.0 - all.start.0) / HUGE_PAGES * HUGE_PAGES;
            let end = (piece.end.0 - all.start.0).next_multiple_of(HUGE_PAGES);
            (region, PageRange::new(all.start.0 + start, (all.start.0 + end).min(all.end.0)))
        };
        layout.split(range).map(whole).collect()
    }

    /// Hashes these pages and adds those that have changed.
    fn compare(&self, runs: &[PageRange], into: &mut PageSet) -> Result<(), MemoryError> {
        let pieces: Vec<PageRange> = runs.iter().flat_map(|run| in_pieces(*run)).collect();
        let pages = pieces.iter().map(PageRange::len).sum();
        let changed = shared_out(&pieces, pages, |piece, changed| {
            self.hashes.scan(*piece, |page| changed.push(page))
        });
        changed?.into_iter().for_each(|page| {
            into.insert(page);
        });
        Ok(())
    }

    /// Those of `units` that count as unwritten and may have been holes since they were last looked at.
    fn read_anew(&self, units: &[PageRange]) -> Result<Vec<PageRange>, MemoryError> {
        shared_out(units, units.len() as u64 * PAGES_A_LOOK, |unit, found| {
            let mut copy = [0; PAGE_SIZE_BYTES];
            if let Some(page) = self.hashes.not_zero(*unit).next() {
                self.memory.try_read_page(page, &mut copy)?;
                if xxh3_64(&copy) == hash_of_zeros() {
                    found.push(*unit);
                }
            }
            Ok(())
        })
    }
}

/// Does `look` for each of `items`, for which `pages` are read. Several threads do, where it is much: at the freeze
/// the guest waits.
fn shared_out<T: Sync, R: Send>(
    items: &[T],
    pages: u64,
    look: impl Fn(&T, &mut Vec<R>) -> Result<(), MemoryError> + Sync,
) -> Result<Vec<R>, MemoryError> {
    let threads = (pages / PAGES_A_THREAD).clamp(1, cores() as u64) as usize;
    let look_at = |items: &[T]| {
        let mut found = Vec::new();
        items.iter().try_for_each(|item| look(item, &mut found))?;
        Ok(found)
    };
    if threads == 1 {
        return look_at(items);
    }
    let found: Result<Vec<Vec<R>>, MemoryError> = std::thread::scope(|scope| {
        let look_at = &look_at;
        let parts = items.chunks(items.len().div_ceil(threads));
        let started: Vec<_> = parts.map(|part| scope.spawn(move || look_at(part))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        started.into_iter().map(join).collect()
    });
    Ok(found?.into_iter().flatten().collect())
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
        let (mut runs, mut mapped) = (Vec::new(), Vec::new());
        for (region, units) in self.whole_units(range) {
            let written = PagemapQuery::WrittenToProtect;
            self.guest.scan(written, &[units], |run| runs.push(run))?;
            let (mut at, mut gaps) = (units.start, Vec::new());
            self.guest.scan(PagemapQuery::Mapped, &[units], |run| {
                gaps.push(PageRange { start: at, end: run.start });
                if self.is_huge[region] {
                    mapped.extend(in_pieces(run));
                }
                at = run.end;
            })?;
            gaps.push(PageRange { start: at, end: units.end });
            let lost = gaps.into_iter().flat_map(|gap| self.hashes.not_zero(gap));
            runs.extend(lost.map(|page| PageRange::new(page.0, page.0 + 1)));
            let mut doubtful = self.witness.doubtful();
            runs.extend(doubtful.runs_in(units));
            doubtful.remove_range(units);
        }
        runs.extend(self.read_anew(&mapped)?);
        self.reads.collect(range, into)?;
        self.compare(&runs, into)
    }

    fn witness(&self) -> Option<Arc<dyn ReadWitness>> {
        Some(Arc::clone(&self.witness) as Arc<dyn ReadWitness>)
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
