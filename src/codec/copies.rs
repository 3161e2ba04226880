//! Where a content was sent before: from the hash of a page, or of a stretch of one, to pages that have it.
//!
//! The hash only proposes. Whoever asks compares the bytes of the page that is named with the
//! ones at hand, so what is forgotten, outdated or mistaken here costs a chance, never a wrong page.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::page::PageIndex;

/// Entries that are looked at for a hash: one cache line.
const WAYS: usize = 8;
/// Bits of an entry that name a page, plus one; the others are a tag from the hash.
const PAGE_BITS: u32 = 40;
const PAGE_MASK: u64 = (1 << PAGE_BITS) - 1;
/// No page.
const FREE: u64 = 0;

/// Hash table of a fixed size, 8 bytes an entry, without a lock: an entry is one word.
pub struct CopyIndex {
    entries: Vec<[AtomicU64; WAYS]>,
}

impl CopyIndex {
    /// An index of about as many contents as there are `pages`.
    pub fn new(pages: usize) -> Self {
        let sets = pages.div_ceil(WAYS);
        CopyIndex { entries: (0..sets).map(|_| [const { AtomicU64::new(FREE) }; WAYS]).collect() }
    }

    /// What the index occupies, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.entries.len() * size_of::<[AtomicU64; WAYS]>()
    }

    /// Pages whose content may have this hash.
    pub fn find(&self, hash: u64) -> impl Iterator<Item = PageIndex> {
        let entries = self.set_of(hash).into_iter().flatten();
        // An entry stands for itself: whatever else is known of its page has its own lock.
        let entries = entries.map(|entry| entry.load(Ordering::Relaxed));
        entries
            .filter(move |entry| *entry != FREE && *entry >> PAGE_BITS == tag_of(hash))
            .map(|entry| PageIndex((entry & PAGE_MASK) - 1))
    }

    /// `page` was sent with a content of this hash. Takes the place of another page with this
    /// hash, or else a free one, or else any.
    pub fn insert(&self, hash: u64, page: PageIndex) {
        if page.0 >= PAGE_MASK {
            return;
        }
        let Some(set) = self.set_of(hash) else { return };
        let tag = tag_of(hash);
        let at = |is: &dyn Fn(u64) -> bool| {
            set.iter().position(|entry| is(entry.load(Ordering::Relaxed)))
        };
        let place = at(&|entry| entry != FREE && entry >> PAGE_BITS == tag)
            .or_else(|| at(&|entry| entry == FREE))
            .unwrap_or(hash as usize / 64 % WAYS);
        set[place].store(tag << PAGE_BITS | (page.0 + 1), Ordering::Relaxed);
    }

    fn set_of(&self, hash: u64) -> Option<&[AtomicU64; WAYS]> {
        // The high bits choose the set, the low ones are the tag.
        let at = (u128::from(hash) * self.entries.len() as u128) >> 64;
        self.entries.get(at as usize)
    }
}

fn tag_of(hash: u64) -> u64 {
    hash & (u64::MAX >> PAGE_BITS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_content_is_found_by_its_hash_until_it_is_displaced() {
        let index = CopyIndex::new(1000);
        assert_eq!(index.find(7).count(), 0);
        index.insert(7, PageIndex(0));
        index.insert(u64::MAX, PageIndex(1 << 30));
        assert_eq!(index.find(7).collect::<Vec<_>>(), [PageIndex(0)]);
        assert_eq!(index.find(u64::MAX).collect::<Vec<_>>(), [PageIndex(1 << 30)]);
        index.insert(7, PageIndex(3));
        assert_eq!(index.find(7).collect::<Vec<_>>(), [PageIndex(3)], "the newer one");
    }

    #[test]
    fn one_that_is_off_takes_no_memory_and_finds_nothing() {
        let index = CopyIndex::new(0);
        index.insert(7, PageIndex(0));
        assert_eq!((index.find(7).count(), index.memory_bytes()), (0, 0));
    }

    proptest! {
        #[test]
        fn it_stays_as_large_as_it_was_and_finds_most_of_what_fits(seed in any::<u64>()) {
            let index = CopyIndex::new(4096);
            let bytes = index.memory_bytes();
            let hash = |page: u64| xxhash_rust::xxh3::xxh3_64_with_seed(&page.to_le_bytes(), seed);
            for page in 0..2048 {
                index.insert(hash(page), PageIndex(page));
            }
            let found = (0..2048).filter(|page| index.find(hash(*page)).any(|it| it.0 == *page));
            let found = found.count();
            prop_assert!(found > 1900, "{found} of 2048");
            prop_assert_eq!(index.memory_bytes(), bytes);
            prop_assert_eq!(bytes, 4096 * 8);
        }
    }
}
