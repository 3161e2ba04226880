//! How hot each page is: in which of the last intervals the guest has written to it. An interval ends with
//! a look at all of the guest's writes: at the end of each round, and now and then in a long one.
//!
//! A byte a page is a history: the highest bit is the last interval, the bits below are those before
//! it. So comparing two of them as numbers puts recency before frequency, and counting bits gives the
//! frequency. Only chunks in which a page was ever dirty take memory and time.

use crate::page::{PageIndex, PageRange, PageSet};

/// Pages of one allocation: 4 MiB of guest memory.
pub const CHUNK_PAGES: u64 = 1024;
const CHUNK: usize = CHUNK_PAGES as usize;
/// The last interval's bit.
const NEWEST: u8 = 1 << 7;

/// When each page was dirty; at most 256 KiB a GiB of guest.
#[derive(Clone, Debug)]
pub struct Heat {
    /// `None` for a chunk of pages that were never dirty as far back as a history goes.
    chunks: Vec<Option<Box<[u8; CHUNK]>>>,
    intervals: u32,
}

impl Heat {
    /// A guest of `pages` pages of which no writes are known.
    pub fn new(pages: u64) -> Self {
        Heat { chunks: vec![None; pages.div_ceil(CHUNK_PAGES) as usize], intervals: 0 }
    }

    /// An interval is over in which the guest has written to the pages of `dirty`.
    ///
    /// # Panics
    /// When `dirty` is of another guest.
    pub fn end_interval(&mut self, dirty: &PageSet) {
        assert_eq!(self.chunks.len() as u64, dirty.pages().div_ceil(CHUNK_PAGES));
        self.intervals += 1;
        for (chunk, start) in self.chunks.iter_mut().zip((0..).step_by(CHUNK)) {
            let pages = PageRange::new(start, start + CHUNK_PAGES);
            let any = !dirty.is_empty_in(pages);
            let Some(histories) = (if any {
                Some(chunk.get_or_insert_with(|| Box::new([0; CHUNK])))
            } else {
                chunk.as_mut()
            }) else {
                continue;
            };
            histories.iter_mut().for_each(|history| *history >>= 1);
            for page in dirty.iter_in(pages) {
                histories[(page.0 - start) as usize] |= NEWEST;
            }
            if !any && histories.iter().all(|history| *history == 0) {
                *chunk = None;
            }
        }
    }

    /// Intervals seen.
    pub fn intervals(&self) -> u32 {
        self.intervals
    }

    /// The history of `page`, the highest bit being the last interval: larger is hotter, 0 is a page that
    /// was not written to in the last eight intervals, or is beyond the guest.
    pub fn of(&self, page: PageIndex) -> u8 {
        let chunk = self.chunks.get((page.0 / CHUNK_PAGES) as usize);
        chunk.and_then(Option::as_ref).map_or(0, |histories| histories[page.0 as usize % CHUNK])
    }

    /// In how many of the last eight intervals `page` was written to.
    pub fn intervals_dirty(&self, page: PageIndex) -> u32 {
        self.of(page).count_ones()
    }

    /// True when `page` was written to in at least half of the intervals known: two, at least.
    pub fn is_hot(&self, page: PageIndex) -> bool {
        let known = self.intervals.min(u8::BITS);
        known >= 2 && self.intervals_dirty(page) * 2 >= known
    }

    /// True when `page` was written to in all intervals known but one at most: four, at least. What is sent
    /// of it now is outdated soon.
    pub fn is_restless(&self, page: PageIndex) -> bool {
        let known = self.intervals.min(u8::BITS);
        known >= 4 && self.intervals_dirty(page) + 1 >= known
    }

    /// True when all pages of `page`'s chunk of [`CHUNK_PAGES`] are cold.
    pub fn is_cold(&self, page: PageIndex) -> bool {
        self.chunks.get((page.0 / CHUNK_PAGES) as usize).is_none_or(Option::is_none)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_the_history_of_each_page(
            pages in 1u64..3000,
            intervals in prop::collection::vec(prop::collection::vec(any::<u64>(), 0..20), 0..20),
        ) {
            let mut heat = Heat::new(pages);
            let mut model = vec![0u8; pages as usize];
            for interval in intervals {
                let mut dirty = PageSet::empty(pages);
                for page in interval {
                    dirty.insert(PageIndex(page % pages));
                }
                heat.end_interval(&dirty);
                for (page, history) in model.iter_mut().enumerate() {
                    let now = if dirty.contains(PageIndex(page as u64)) { 128 } else { 0 };
                    *history = *history >> 1 | now;
                }
            }
            for (page, history) in model.iter().enumerate() {
                let page = PageIndex(page as u64);
                prop_assert_eq!(heat.of(page), *history);
                prop_assert_eq!(heat.intervals_dirty(page), history.count_ones());
                prop_assert!(*history == 0 || !heat.is_cold(page));
            }
            prop_assert_eq!(heat.of(PageIndex(pages + 5000)), 0);
        }
    }

    #[test]
    fn a_chunk_that_has_cooled_takes_no_memory() {
        let mut heat = Heat::new(1 << 28);
        let mut dirty = PageSet::empty(1 << 28);
        dirty.insert(PageIndex(1 << 27));
        heat.end_interval(&dirty);
        assert!(!heat.is_cold(PageIndex(1 << 27)));
        dirty.remove(PageIndex(1 << 27));
        (0..8).for_each(|_| heat.end_interval(&dirty));
        assert!(heat.is_cold(PageIndex(1 << 27)));
        assert_eq!(heat.intervals(), 9);
    }

    #[test]
    fn hot_is_half_of_what_is_known_and_restless_nearly_all() {
        let mut heat = Heat::new(8);
        let (often, always, once) = (PageIndex(1), PageIndex(2), PageIndex(3));
        let mut dirty = PageSet::empty(8);
        dirty.insert(always);
        for interval in 0..4 {
            let known = |heat: &Heat| (heat.is_hot(always), heat.is_restless(always));
            assert_eq!(known(&heat), (interval >= 2, false), "after {interval}");
            dirty.remove(often);
            dirty.remove(once);
            if interval % 2 == 0 {
                dirty.insert(often);
            }
            if interval == 1 {
                dirty.insert(once);
            }
            heat.end_interval(&dirty);
        }
        let page = |page| (heat.is_hot(page), heat.is_restless(page));
        assert_eq!(page(always), (true, true));
        assert_eq!(page(often), (true, false));
        assert_eq!(page(once), (false, false));
    }
}
