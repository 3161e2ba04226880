//! The pages that were not sent yet, as a bitmap with summaries: finding the next one does not grow with
//! what was sent before it.

use crate::page::{PageIndex, PageRange, PageSet};

/// A set of pages that only shrinks, and in which the nearest member is found in a few steps,
/// wherever it is. Above the bitmap each level has a bit for each word of the level below that is not
/// empty: 1/63 more memory than the bitmap alone.
#[derive(Clone, Debug)]
pub struct Unsent {
    levels: Vec<Vec<u64>>,
    pages: u64,
    left: u64,
}

impl Unsent {
    /// The members of `set`.
    pub fn new(set: &PageSet) -> Self {
        let mut levels = vec![set.words().to_vec()];
        while levels.last().is_some_and(|level| level.len() > 1) {
            let below = levels.last().expect("just looked at");
            let summary = |words: &[u64]| {
                let bits = words.iter().enumerate();
                bits.fold(0, |sum, (bit, word)| sum | u64::from(*word != 0) << bit)
            };
            levels.push(below.chunks(64).map(summary).collect());
        }
        Unsent { levels, pages: set.pages(), left: set.len() }
    }

    /// How many members are left.
    pub fn len(&self) -> u64 {
        self.left
    }

    /// True when none is left.
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Size of the guest.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// True for a member; pages beyond the guest never are.
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.levels[0][(page.0 / 64) as usize] >> (page.0 % 64) & 1 == 1
    }

    /// Takes a page out; true when it was a member.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        if !self.contains(page) {
            return false;
        }
        self.left -= 1;
        let mut at = page.0;
        for level in &mut self.levels {
            let word = &mut level[(at / 64) as usize];
            *word &= !(1 << (at % 64));
            if *word != 0 {
                break;
            }
            at /= 64;
        }
        true
    }

    /// The first member at or after `from`.
    pub fn first_from(&self, from: PageIndex) -> Option<PageIndex> {
        let mut at = from.0;
        let mut height = 0;
        // Up until some word has a bit at or above `at`, then down to the lowest bit of each word.
        loop {
            let level = self.levels.get(height)?;
            let word = level.get((at / 64) as usize).copied().unwrap_or(0);
            let ahead = word & (u64::MAX << (at % 64));
            if ahead != 0 {
                at = at / 64 * 64 + u64::from(ahead.trailing_zeros());
                break;
            }
            at = at / 64 + 1;
            height += 1;
        }
        for level in self.levels[..height].iter().rev() {
            at = at * 64 + u64::from(level[at as usize].trailing_zeros());
        }
        Some(PageIndex(at))
    }

    /// The last member at or before `until`.
    pub fn last_until(&self, until: PageIndex) -> Option<PageIndex> {
        let mut at = until.0.min(self.pages.checked_sub(1)?);
        let mut height = 0;
        loop {
            let level = self.levels.get(height)?;
            let behind = level[(at / 64) as usize] & (u64::MAX >> (63 - at % 64));
            if behind != 0 {
                at = at / 64 * 64 + 63 - u64::from(behind.leading_zeros());
                break;
            }
            at = (at / 64).checked_sub(1)?;
            height += 1;
        }
        for level in self.levels[..height].iter().rev() {
            at = at * 64 + 63 - u64::from(level[at as usize].leading_zeros());
        }
        Some(PageIndex(at))
    }

    /// How many members are in a run that begins and ends at multiples of 64 or at the guest's end.
    pub fn count_in(&self, run: PageRange) -> u64 {
        let words = &self.levels[0];
        let end = (run.end.0.div_ceil(64) as usize).min(words.len());
        let start = ((run.start.0 / 64) as usize).min(end);
        words[start..end].iter().map(|word| u64::from(word.count_ones())).sum()
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
