//! Notices that a page which was read and sent may have become a hole since.
//!
//! Punching a hole takes the page out of every mapping of its file, farfault's alias included, and what
//! the guest does to it afterwards does not bring it back there. So a page that was read through the alias
//! and is not in the alias's page table any more may have been a hole in between. It may also have been
//! swapped out, or been part of a huge page that was split: then it is sent once more than needed.
//!
//! The converse, that a page which is there was never a hole since it was read, needs that nothing but
//! reading the page itself puts it there. Commonly the kernel maps the neighbours of a page that is
//! read too, but not in an area that a userfaultfd watches: so one is registered over the alias, for write
//! protection, with nothing protected. And no huge page may stand for many pages: the alias is
//! advised against them, and what is mapped by one all the same counts as not being there. RAM on hugetlbfs has no alias,
//! and is not watched.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::c_void;
use userfaultfd::{RegisterMode, Uffd};

use super::pagemap::Pagemap;
use super::{ReadWitness, TRACK_FEATURES};
use crate::memory::guest_mapping::own_uffd;
use crate::memory::sys::PagemapQuery;
use crate::memory::userfault::register;
use crate::memory::{GuestMemory, MemoryError};
use crate::page::{PageBytes, PageIndex, PageRange, PageSet};

/// See the module's text.
pub(super) struct ReadWatch {
    uffd: Uffd,
    alias: Pagemap,
    /// Which regions there is an alias of.
    is_watched: Vec<bool>,
    pages: Arc<ReadPages>,
    /// The alias stays where it is as long as the userfaultfd watches it.
    memory: Arc<GuestMemory>,
}

impl ReadWatch {
    /// From now on reading a page through the alias maps that page there and no other.
    ///
    /// # Errors
    /// [`MemoryError::RegisterBusy`] when this alias is watched already.
    pub(super) fn new(memory: Arc<GuestMemory>) -> Result<Self, MemoryError> {
        let addresses = memory.addresses();
        let is_watched: Vec<bool> = addresses.iter().map(Option::is_some).collect();
        let nowhere = |address: Option<u64>| address.unwrap_or_default();
        let addresses: Vec<u64> = addresses.into_iter().map(nowhere).collect();
        let alias = Pagemap::open("self", memory.layout(), &addresses)?;
        let uffd = own_uffd(TRACK_FEATURES)?;
        memory.avoid_huge_pages();
        for (name, address, size_bytes) in watched(&alias, &is_watched) {
            register(&uffd, name, "track", address, size_bytes, RegisterMode::WRITE_PROTECT)?;
        }
        let pages = Arc::new(ReadPages::none_of(memory.pages()));
        Ok(ReadWatch { uffd, alias, is_watched, pages, memory })
    }

    /// Who must be told which pages were read.
    pub(super) fn witness(&self) -> Arc<ReadPages> {
        Arc::clone(&self.pages)
    }

    /// Adds the pages of `range` that were read and may have been holes since. They then count as not
    /// read.
    pub(super) fn collect(
        &mut self,
        range: PageRange,
        into: &mut PageSet,
    ) -> Result<(), MemoryError> {
        let ReadWatch { alias, is_watched, pages, memory, .. } = self;
        for (region, piece) in memory.layout().split(range) {
            if !is_watched[region] || !pages.any_in(piece) {
                continue;
            }
            let mut gap = piece.start;
            alias.scan(PagemapQuery::MappedSingly, &[piece], |run| {
                pages.take(PageRange { start: gap, end: run.start }, into);
                gap = run.end;
            })?;
            pages.take(PageRange { start: gap, end: piece.end }, into);
        }
        Ok(())
    }
}

/// Name, address and size in bytes of each region that is watched.
fn watched<'a>(
    alias: &'a Pagemap,
    is_watched: &'a [bool],
) -> impl Iterator<Item = (&'a str, u64, u64)> {
    alias.regions().zip(is_watched).filter_map(|(region, is_watched)| is_watched.then_some(region))
}

impl Drop for ReadWatch {
    fn drop(&mut self) {
        for (_, address, size_bytes) in watched(&self.alias, &self.is_watched) {
            // Nothing is protected, so that nobody waits for this userfaultfd: failing does no harm.
            let _ = self.uffd.unregister(address as *mut c_void, size_bytes as usize);
        }
    }
}

/// Which pages were read through the alias and sent, a bit each.
///
/// A bit may be set late, when the page has become a hole already: it is missing from the alias until it
/// is read again. And it is read again only when it is to be sent again.
pub(super) struct ReadPages(Vec<AtomicU64>);

impl ReadPages {
    fn none_of(pages: u64) -> Self {
        ReadPages((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// The words that hold `range`, with the number of their first page and the bits of the range.
    fn words(&self, range: PageRange) -> impl Iterator<Item = (&AtomicU64, u64, u64)> {
        let (start, end) = (range.start.0, range.end.0.max(range.start.0));
        (start / 64..end.div_ceil(64)).map(move |index| {
            let first = index * 64;
            let from = u64::MAX << start.saturating_sub(first);
            let up_to = u64::MAX >> (first + 64).saturating_sub(end);
            (&self.0[index as usize], first, from & up_to)
        })
    }

    fn any_in(&self, range: PageRange) -> bool {
        self.words(range).any(|(word, _, mask)| word.load(Ordering::Relaxed) & mask != 0)
    }

    /// Moves the members in `range` to `into`.
    fn take(&self, range: PageRange, into: &mut PageSet) {
        for (word, first, mask) in self.words(range) {
            if word.load(Ordering::Relaxed) & mask == 0 {
                continue;
            }
            let mut found = word.fetch_and(!mask, Ordering::Relaxed) & mask;
            while found != 0 {
                into.insert(PageIndex(first + u64::from(found.trailing_zeros())));
                found &= found - 1;
            }
        }
    }
}

impl ReadWitness for ReadPages {
    fn saw(&self, page: PageIndex, _copy: &PageBytes) {
        self.0[(page.0 / 64) as usize].fetch_or(1 << (page.0 % 64), Ordering::Relaxed);
    }

    /// What was read, and was still in the alias's page table when that was last looked at.
    fn known_populated(&self, pages: &PageSet) -> PageSet {
        let mut known = PageSet::empty(pages.pages());
        for run in pages.runs() {
            for (word, first, mask) in self.words(run) {
                let read = word.load(Ordering::Relaxed) & mask;
                known.insert_word((first / 64) as usize, read).expect("it is of the run");
            }
        }
        known
    }

    fn saw_holes(&self, holes: PageRange) {
        // What is known to be zero cannot lose its content.
        for (word, _, mask) in self.words(holes) {
            word.fetch_and(!mask, Ordering::Relaxed);
        }
    }
}
