//! The self-checking page.
//!
//! | word | content |
//! |---|---|
//! | 0 | [`TAG`] xor the page's number |
//! | 1 | the sequence number of the operation that wrote the page last |
//! | 2..510 | the body |
//! | 510 | the sum of all words before |
//! | 511 | the sum of those partial sums (as in Fletcher's checksum), so that the order counts |
//!
//! A checksum alone accepts an *older version* of a page, which is just what a migration must never
//! leave behind. So operations visit the pages of a [`Stream`] in a fixed order, each page once in
//! every cycle: after `written` operations over `count` pages, the page's sequence number has to lie
//! in `written - count .. written` and has to fall on this page. Exactly one number does both. The
//! operation counter is kept by the worker (in a CPU register too, where there is a CPU), so it
//! does not share the fate of the page.
//!
//! Both sums are linear: changing a word changes them by a product, so that an operation that
//! changes a few words does not read the whole page.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::page::PAGE_SIZE_BYTES;

/// Words of 8 bytes in a page.
pub const WORDS: usize = PAGE_SIZE_BYTES / 8;
/// First word of each page, before the page's number is mixed in: "farfault".
pub const TAG: u64 = 0x746c_7561_6672_6166;
/// Words of the body that a sparse operation changes.
pub const SPARSE_WORDS: u64 = 3;

pub(crate) const SUM_WORD: usize = WORDS - 2;
pub(crate) const SUMS_WORD: usize = WORDS - 1;
pub(crate) const BODY_WORD: usize = 2;
pub(crate) const BODY_WORDS: u64 = (SUM_WORD - BODY_WORD) as u64;

// Multipliers of the permutation (Murmur3's finalizer) and of the content (Knuth's MMIX generator).
pub(crate) const SCATTER_FIRST: u64 = 0xff51_afd7_ed55_8ccd;
pub(crate) const SCATTER_SECOND: u64 = 0xc4ce_b9fe_1a85_ec53;
pub(crate) const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
pub(crate) const CONTENT_STEP: u64 = 6_364_136_223_846_793_005;
pub(crate) const CONTENT_ADD: u64 = 1_442_695_040_888_963_407;

/// A page of guest memory as its workers see it: other threads may change it at any time.
pub type PageWords = [AtomicU64; WORDS];

/// A run of pages that one worker visits in a fixed order, over and over.
///
/// The layout is shared with the guest program, which keeps its streams in guest memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// The first page.
    pub first_page: u64,
    /// How many pages.
    pub count: u64,
    /// Smallest `2^k - 1` that holds every place below `count`.
    pub mask: u64,
    /// How far the permutation shifts: about half of `k`, at least 1.
    pub shift: u64,
    /// The number of the next operation.
    pub sequence: u64,
    /// Operations that have written, the initial content being the first `count` of them.
    pub written: u64,
}

impl Stream {
    /// The stream over `count` pages from `first_page` on, whose initial content is in place.
    pub fn new(first_page: u64, count: u64) -> Self {
        let bits = u64::from(count.saturating_sub(1).checked_ilog2().map_or(0, |log| log + 1));
        let (mask, shift) = ((1 << bits) - 1, bits.div_ceil(2).max(1));
        Stream { first_page, count, mask, shift, sequence: count, written: count }
    }

    /// The page that operation `sequence` falls on.
    pub fn page_of(&self, sequence: u64, scattered: bool) -> u64 {
        let place = sequence % self.count;
        self.first_page + if scattered { self.scatter(place) } else { place }
    }

    /// A permutation of `0..count`: shifts and odd multiplications permute `0..=mask`; places beyond
    /// `count` are walked over (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite
    /// domains", 2002).
    fn scatter(&self, place: u64) -> u64 {
        let mut x = place;
        loop {
            x ^= x >> self.shift;
            x = x.wrapping_mul(SCATTER_FIRST) & self.mask;
            x ^= x >> self.shift;
            x = x.wrapping_mul(SCATTER_SECOND).wrapping_add(1) & self.mask;
            x ^= x >> self.shift;
            if x < self.count {
                return x;
            }
        }
    }

    /// True when `words` is what this stream's last operation on `page` left there.
    pub fn holds(&self, words: &PageWords, page: u64, scattered: bool) -> bool {
        let sequence = words[1].load(Relaxed);
        let age = self.written.wrapping_sub(1).wrapping_sub(sequence);
        words[0].load(Relaxed) == TAG ^ page
            && age < self.count
            && self.page_of(sequence, scattered) == page
            && sums(words) == (words[SUM_WORD].load(Relaxed), words[SUMS_WORD].load(Relaxed))
    }

    /// True when the head of the page is what operation `sequence` must find there: the same place
    /// one cycle ago.
    pub fn head_holds(&self, words: &PageWords, page: u64, sequence: u64) -> bool {
        words[0].load(Relaxed) == TAG ^ page
            && words[1].load(Relaxed) == sequence.wrapping_sub(self.count)
    }
}

fn sums(words: &PageWords) -> (u64, u64) {
    words[..SUM_WORD].iter().fold((0, 0), |(sum, sums), word| {
        let sum = word.load(Relaxed).wrapping_add(sum);
        (sum, sums.wrapping_add(sum))
    })
}

/// The numbers from which an operation makes a page's new words. Only the top 16 bits of each are
/// stored: such pages compress to about a third, like those of real guests.
fn content(page: u64, sequence: u64) -> impl Iterator<Item = u64> {
    let seed = sequence.wrapping_mul(SEED).wrapping_add(page);
    let next = |x: &u64| Some(x.wrapping_mul(CONTENT_STEP).wrapping_add(CONTENT_ADD));
    std::iter::successors(next(&seed), next)
}

/// Makes the whole page anew.
pub fn write_whole(words: &PageWords, page: u64, sequence: u64) {
    let head = [TAG ^ page, sequence];
    let body = content(page, sequence).map(|x| x >> 48);
    let (mut sum, mut sums) = (0u64, 0u64);
    for (word, value) in words[..SUM_WORD].iter().zip(head.into_iter().chain(body)) {
        word.store(value, Relaxed);
        sum = sum.wrapping_add(value);
        sums = sums.wrapping_add(sum);
    }
    words[SUM_WORD].store(sum, Relaxed);
    words[SUMS_WORD].store(sums, Relaxed);
}

/// Changes the sequence number, [`SPARSE_WORDS`] words of the body, and the sums accordingly.
pub fn write_sparse(words: &PageWords, page: u64, sequence: u64) {
    let mut sum = words[SUM_WORD].load(Relaxed);
    let mut sums = words[SUMS_WORD].load(Relaxed);
    let mut change = |at: usize, value: u64| {
        let difference = value.wrapping_sub(words[at].load(Relaxed));
        words[at].store(value, Relaxed);
        sum = sum.wrapping_add(difference);
        sums = sums.wrapping_add(difference.wrapping_mul((SUM_WORD - at) as u64));
    };
    change(1, sequence);
    for x in content(page, sequence).take(SPARSE_WORDS as usize) {
        change(BODY_WORD + (((x >> 32) * BODY_WORDS) >> 32) as usize, x >> 48);
    }
    words[SUM_WORD].store(sum, Relaxed);
    words[SUMS_WORD].store(sums, Relaxed);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blank() -> PageWords {
        [const { AtomicU64::new(0) }; WORDS]
    }

    fn copy(words: &PageWords) -> PageWords {
        std::array::from_fn(|i| AtomicU64::new(words[i].load(Relaxed)))
    }

    proptest! {
        #[test]
        fn a_cycle_visits_every_page_once(count in 1u64..3000, first_page in 0u64..1 << 30) {
            let stream = Stream::new(first_page, count);
            for scattered in [false, true] {
                let mut pages: Vec<u64> =
                    (0..count).map(|n| stream.page_of(n + 7 * count, scattered)).collect();
                pages.sort_unstable();
                prop_assert_eq!(pages, (first_page..first_page + count).collect::<Vec<_>>());
            }
        }

        #[test]
        fn a_page_passes_only_with_its_last_content(
            count in 1u64..50, cycles in 1u64..6, scattered: bool, place in any::<prop::sample::Index>(),
            flipped_bit in 0usize..WORDS * 64,
        ) {
            let mut stream = Stream::new(1000, count);
            let page = 1000 + place.index(count as usize) as u64;
            let words = blank();
            let older = (0..count * cycles).filter(|n| stream.page_of(*n, scattered) == page);
            let mut stale = Vec::new();
            for sequence in older {
                stale.push(copy(&words));
                if sequence < count {
                    write_whole(&words, page, sequence);
                } else {
                    prop_assert!(stream.head_holds(&words, page, sequence));
                    write_sparse(&words, page, sequence);
                }
            }
            stream.written = count * cycles;
            prop_assert!(stream.holds(&words, page, scattered));
            prop_assert!(stale.iter().all(|old| !stream.holds(old, page, scattered)));
            let bit = 1 << (flipped_bit % 64);
            words[flipped_bit / 64].fetch_xor(bit, Relaxed);
            prop_assert!(!stream.holds(&words, page, scattered), "bit {flipped_bit}");
        }
    }

    #[test]
    fn sparse_changes_touch_at_most_six_words() {
        let (before, stream) = (blank(), Stream::new(5, 1));
        write_whole(&before, 5, 0);
        let after = copy(&before);
        write_sparse(&after, 5, 1);
        let changed = (0..WORDS).filter(|i| before[*i].load(Relaxed) != after[*i].load(Relaxed));
        assert!((3..=6).contains(&changed.count()));
        assert!(Stream { written: 2, ..stream }.holds(&after, 5, false));
    }
}
