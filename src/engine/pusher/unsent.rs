//! The pages that were not sent yet, as a bitmap with summaries: finding the next one does not grow with
//! what was sent before it.

use crate::page::{PageIndex, PageRange, PageSet};

/// A set of pages that only shrinks, and in which the nearest member is found in a few steps,
/// wherever it is. Above the bitmap each level has a bit for each word of the level below that is not
/// empty: 1/63 more memory than the bitmap alone.
#[derive(Clone, Debug)]
pub struct Unsent {
    pages: PageSet,
    /// Above it, the lowest first.
    levels: Vec<Vec<u64>>,
}

impl Unsent {
    /// The members of `set`.
    pub fn new(set: &PageSet) -> Self {
        let words_of_64 = (0..set.pages()).step_by(64 * 64);
        let is_empty = |first| set.is_empty_in(PageRange::new(first, first + 64));
        let summary = |first: u64| {
            if set.is_empty_in(PageRange::new(first, first + 64 * 64)) {
                return 0;
            }
            (0..64).fold(0, |sum, bit| sum | u64::from(!is_empty(first + bit * 64)) << bit)
        };
        let mut levels: Vec<Vec<u64>> = vec![words_of_64.map(summary).collect()];
        while levels.last().is_some_and(|level| level.len() > 1) {
            let below = levels.last().expect("just looked at");
            let summary = |words: &[u64]| {
                let bits = words.iter().enumerate();
                bits.fold(0, |sum, (bit, word)| sum | u64::from(*word != 0) << bit)
            };
            levels.push(below.chunks(64).map(summary).collect());
        }
        Unsent { pages: set.clone(), levels }
    }

    /// How many members are left.
    pub fn len(&self) -> u64 {
        self.pages.len()
    }

    /// True when none is left.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Size of the guest.
    pub fn pages(&self) -> u64 {
        self.pages.pages()
    }

    /// True for a member; pages beyond the guest never are.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.pages.contains(page)
    }

    /// Takes a page out; true when it was a member.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        if !self.pages.remove(page) {
            return false;
        }
        let mut at = page.0 / 64;
        let mut is_empty = self.pages.word(at as usize) == 0;
        for level in &mut self.levels {
            if !is_empty {
                break;
            }
            let word = &mut level[(at / 64) as usize];
            *word &= !(1 << (at % 64));
            is_empty = *word == 0;
            at /= 64;
        }
        true
    }

    /// Word `index` of the bitmap, or of a level above it; one beyond the guest is empty. `None` above all levels.
    fn word(&self, height: usize, index: u64) -> Option<u64> {
        let index = index as usize;
        match height.checked_sub(1) {
            None if index < self.pages.word_count() => Some(self.pages.word(index)),
            None => Some(0),
            Some(above) => {
                self.levels.get(above).map(|level| level.get(index).copied().unwrap_or(0))
            }
        }
    }

    /// From bit `at` of a level that has bits below it down to a page: to the lowest one, or to the highest one.
    fn down(&self, height: usize, mut at: u64, bit_of: impl Fn(u64) -> u32) -> PageIndex {
        for height in (0..height).rev() {
            let word = self.word(height, at).expect("below a level there is another");
            at = at * 64 + u64::from(bit_of(word));
        }
        PageIndex(at)
    }

    /// The first member at or after `from`.
    pub fn first_from(&self, from: PageIndex) -> Option<PageIndex> {
        let mut at = from.0;
        let mut height = 0;
        // Up until some word has a bit at or above `at`, then down to the lowest bit of each word.
        loop {
            let ahead = self.word(height, at / 64)? & (u64::MAX << (at % 64));
            if ahead != 0 {
                at = at / 64 * 64 + u64::from(ahead.trailing_zeros());
                break;
            }
            at = at / 64 + 1;
            height += 1;
        }
        Some(self.down(height, at, u64::trailing_zeros))
    }

    /// The last member at or before `until`.
    pub fn last_until(&self, until: PageIndex) -> Option<PageIndex> {
        let mut at = until.0.min(self.pages().checked_sub(1)?);
        let mut height = 0;
        loop {
            let behind = self.word(height, at / 64)? & (u64::MAX >> (63 - at % 64));
            if behind != 0 {
                at = at / 64 * 64 + 63 - u64::from(behind.leading_zeros());
                break;
            }
            at = (at / 64).checked_sub(1)?;
            height += 1;
        }
        Some(self.down(height, at, |word| 63 - word.leading_zeros()))
    }

    /// How many members are in `run`.
    pub fn count_in(&self, run: PageRange) -> u64 {
        self.pages.len_in(run)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_finds_what_a_plain_walk_finds(
            pages in 1u64..20_000,
            members in prop::collection::vec(any::<u64>(), 0..60),
            removed in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
            asked in prop::collection::vec(0u64..25_000, 1..40),
        ) {
            let mut set = PageSet::empty(pages);
            for page in &members {
                set.insert(PageIndex(page % pages));
            }
            let mut unsent = Unsent::new(&set);
            for index in removed.iter().filter(|_| !members.is_empty()) {
                let page = PageIndex(index.get(&members) % pages);
                prop_assert_eq!(unsent.remove(page), set.remove(page));
            }
            prop_assert_eq!(unsent.len(), set.len());
            prop_assert_eq!(unsent.count_in(PageRange::new(0, pages)), set.len());
            for from in asked.into_iter().map(PageIndex) {
                prop_assert_eq!(unsent.first_from(from), set.iter().find(|page| *page >= from));
                let before = set.iter().take_while(|page| *page <= from).last();
                prop_assert_eq!(unsent.last_until(from), before);
                prop_assert_eq!(unsent.contains(from), set.contains(from));
            }
        }
    }
}
