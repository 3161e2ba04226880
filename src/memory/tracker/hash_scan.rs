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

/// What was last sent of each page, or else what it was when last reported: in either case a page that
/// still hashes to this needs no new report.
struct Hashes(Vec<AtomicU64>);

impl Hashes {
    /// True when `hash` is new.
    fn replace(&self, page: PageIndex, hash: u64) -> bool {
        // Each page's hash stands for itself: no order between pages is needed.
        self.0[page.0 as usize].swap(hash, Ordering::Relaxed) != hash
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

fn hash_of_zeros() -> u64 {
    xxh3_64(&[0; PAGE_SIZE_BYTES])
}

impl HashScan {
    /// A tracker of all of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let hashes = (0..memory.pages()).map(|_| AtomicU64::new(0)).collect();
        HashScan { memory, hashes: Arc::new(Hashes(hashes)) }
    }

    /// Hashes `range`, holes as the zeros that they read as, and calls `changed` where it differs.
    fn scan(
        &self,
        range: PageRange,
        mut changed: impl FnMut(PageIndex),
    ) -> Result<(), MemoryError> {
        let zero = hash_of_zeros();
        let populated = self.memory.populated(range)?;
        let mut copy = [0; PAGE_SIZE_BYTES];
        for page in range.pages() {
            let hash = if populated.contains(page) {
                self.memory.read_page(page, &mut copy);
                xxh3_64(&copy)
            } else {
                zero
            };
            if self.hashes.replace(page, hash) {
                changed(page);
            }
        }
        Ok(())
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

    fn disarm(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}
