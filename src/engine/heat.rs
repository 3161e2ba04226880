//! How hot each page is: in which of the last rounds the guest has written to it.
//!
//! A byte a page is a history: the highest bit is the last round, the bits below are the rounds before
//! it. So comparing two of them as numbers puts recency before frequency, and counting bits gives the
//! frequency. Only chunks in which a page was ever dirty take memory and time.

use crate::page::{PageIndex, PageSet};

/// Pages of one allocation: 4 MiB of guest memory.
pub const CHUNK_PAGES: u64 = 1024;
const CHUNK: usize = CHUNK_PAGES as usize;
/// The last round's bit.
const NEWEST: u8 = 1 << 7;

/// When each page was dirty; at most 256 KiB a GiB of guest.
#[derive(Clone, Debug)]
pub struct Heat {
    /// `None` for a chunk of pages that were never dirty as far back as a history goes.
    chunks: Vec<Option<Box<[u8; CHUNK]>>>,
    rounds: u32,
}

impl Heat {
    /// A guest of `pages` pages of which no writes are known.
    pub fn new(pages: u64) -> Self {
        Heat { chunks: vec![None; pages.div_ceil(CHUNK_PAGES) as usize], rounds: 0 }
    }

    /// A round is over in which the guest has written to the pages of `dirty`.
    ///
    /// # Panics
    /// When `dirty` is of another guest.
    pub fn end_round(&mut self, dirty: &PageSet) {
        assert_eq!(self.chunks.len() as u64, dirty.pages().div_ceil(CHUNK_PAGES));
        self.rounds += 1;
        let words = dirty.words().chunks(CHUNK / 64);
        for (chunk, words) in self.chunks.iter_mut().zip(words) {
            let any = words.iter().any(|word| *word != 0);
            let Some(histories) = (if any {
                Some(chunk.get_or_insert_with(|| Box::new([0; CHUNK])))
            } else {
                chunk.as_mut()
            }) else {
                continue;
            };
            histories.iter_mut().for_each(|history| *history >>= 1);
            for (word, histories) in words.iter().zip(histories.chunks_mut(64)) {
                let mut left = *word;
                while left != 0 {
                    histories[left.trailing_zeros() as usize] |= NEWEST;
                    left &= left - 1;
                }
            }
            if !any && histories.iter().all(|history| *history == 0) {
                *chunk = None;
            }
        }
    }

    /// Rounds seen.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// The history of `page`, the highest bit being the last round: larger is hotter, 0 is a page that
    /// was not written to in the last eight rounds, or is beyond the guest.
    pub fn of(&self, page: PageIndex) -> u8 {
        let chunk = self.chunks.get((page.0 / CHUNK_PAGES) as usize);
        chunk.and_then(Option::as_ref).map_or(0, |histories| histories[page.0 as usize % CHUNK])
    }

    /// In how many of the last eight rounds `page` was written to.
    pub fn rounds_dirty(&self, page: PageIndex) -> u32 {
        self.of(page).count_ones()
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
            rounds in prop::collection::vec(prop::collection::vec(any::<u64>(), 0..20), 0..20),
        ) {
            let mut heat = Heat::new(pages);
            let mut model = vec![0u8; pages as usize];
            for round in rounds {
                let mut dirty = PageSet::empty(pages);
                for page in round {
                    dirty.insert(PageIndex(page % pages));
                }
                heat.end_round(&dirty);
                for (page, history) in model.iter_mut().enumerate() {
                    let now = if dirty.contains(PageIndex(page as u64)) { 128 } else { 0 };
                    *history = *history >> 1 | now;
                }
            }
            for (page, history) in model.iter().enumerate() {
                let page = PageIndex(page as u64);
                prop_assert_eq!(heat.of(page), *history);
                prop_assert_eq!(heat.rounds_dirty(page), history.count_ones());
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
        heat.end_round(&dirty);
        assert!(!heat.is_cold(PageIndex(1 << 27)));
        dirty.remove(PageIndex(1 << 27));
        (0..8).for_each(|_| heat.end_round(&dirty));
        assert!(heat.is_cold(PageIndex(1 << 27)));
        assert_eq!(heat.rounds(), 9);
    }
}
