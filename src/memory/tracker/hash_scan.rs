//! Dirty tracking on any kernel: a hash of every page, compared with the one before.
//!
//! 8 bytes per page, and reading all populated memory for every collection. Two contents of a page are
//! taken for the same with a chance of 2^-64 (xxh3).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_64;

use super::{DirtyTracker, ReadWitness};
use crate::memory::{GuestMemory, MemoryError};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, PageSet};

/// See the module's text.
pub struct HashScan {
    memory: Arc<GuestMemory>,
    hashes: Arc<Hashes>,
}

/// In the place of the hash of a page that was neither sent nor looked at.
pub(super) const NOTHING_KNOWN: u64 = 0;

/// What was last sent of each page, or else what it was when last reported: in either case a page that
/// still hashes to this needs no new report.
pub(super) struct Hashes(Vec<AtomicU64>);

impl Hashes {
    /// Gives what was in the place of `hash`.
    pub(super) fn replace(&self, page: PageIndex, hash: u64) -> u64 {
        // Each page's hash stands for itself: no order between pages is needed.
        self.0[page.0 as usize].swap(hash, Ordering::Relaxed)
    }
}

impl ReadWitness for Hashes {
    fn saw(&self, page: PageIndex, copy: &PageBytes) {
        self.replace(page, xxh3_64(copy));
    }

    fn saw_holes(&self, holes: PageRange) {
        let zero = hash_of_zeros();
        for page in holes.pages() {
            self.replace(page, zero);
        }
    }
}

pub(super) fn hash_of_zeros() -> u64 {
    xxh3_64(&[0; PAGE_SIZE_BYTES])
}

impl HashScan {
    /// A tracker of all of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let hashes = (0..memory.pages()).map(|_| AtomicU64::new(NOTHING_KNOWN)).collect();
        HashScan { memory, hashes: Arc::new(Hashes(hashes)) }
    }

    /// Hashes `range`, holes as the zeros that they read as, and calls `changed` where it differs.
    pub(super) fn scan(
        &self,
        range: PageRange,
        mut changed: impl FnMut(PageIndex),
    ) -> Result<(), MemoryError> {
        let zero = hash_of_zeros();
        let mut copy = [0; PAGE_SIZE_BYTES];
        let mut compare = |page, hash| {
            if self.hashes.replace(page, hash) != hash {
                changed(page);
            }
        };
        let mut at = range.start;
        for run in self.memory.populated_runs(range)? {
            PageRange { start: at, end: run.start }.pages().for_each(|page| compare(page, zero));
            for page in run.pages() {
                self.memory.try_read_page(page, &mut copy)?;
                compare(page, xxh3_64(&copy));
            }
            at = run.end;
        }
        PageRange { start: at, end: range.end }.pages().for_each(|page| compare(page, zero));
        Ok(())
    }

    /// What is known of each page, for a witness of another tracker.
    pub(super) fn hashes(&self) -> Arc<Hashes> {
        Arc::clone(&self.hashes)
    }

    /// Those of `range` of which a content was sent or found that was not zero.
    pub(super) fn not_zero(&self, range: PageRange) -> impl Iterator<Item = PageIndex> {
        let zero = hash_of_zeros();
        let hash = |page: &PageIndex| self.hashes.0[page.0 as usize].load(Ordering::Relaxed);
        range.pages().filter(move |page| ![NOTHING_KNOWN, zero].contains(&hash(page)))
    }
}

impl DirtyTracker for HashScan {
    fn name(&self) -> &'static str {
        "hash-scan"
    }

    fn arm(&mut self) -> Result<(), MemoryError> {
        self.scan(PageRange::new(0, self.memory.pages()), |_| {})
    }

    fn collect(&mut self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError> {
        self.scan(range, |page| {
            into.insert(page);
        })
    }

    fn witness(&self) -> Option<Arc<dyn ReadWitness>> {
        Some(Arc::clone(&self.hashes) as Arc<dyn ReadWitness>)
    }

    fn is_quick(&self) -> bool {
        false
    }

    fn compares_content(&self) -> bool {
        true
    }

    fn disarm(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}
