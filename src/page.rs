//! The vocabulary of pages: every other room speaks in these types.
//!
//! A guest's RAM is one or more regions (see [`crate::memory::MemoryLayout`]). Their pages are
//! numbered through, region after region, so that everything above `memory` deals with one flat
//! space `0..pages`.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Bytes in a page: the unit in which guest memory is tracked, sent and faulted in.
pub const PAGE_SIZE_BYTES: usize = 4096;

/// The bytes of one page.
pub type PageBytes = [u8; PAGE_SIZE_BYTES];

/// A page of the guest, numbered through over all its RAM regions.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl fmt::Debug for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.0)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Which sending of a page: the number of the pre-copy round in which its content was read, from 1
/// on; [`Version::NONE`] for a page that was never sent. A page is sent at most once per round, so
/// page and version together name exact bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Version(pub u16);

impl Version {
    /// Never sent.
    pub const NONE: Version = Version(0);
    /// The largest version that the destination's page table can hold.
    pub const MAX: Version = Version(2047);

    /// The version after this one, or `None` beyond [`Version::MAX`].
    pub fn next(self) -> Option<Version> {
        (self < Self::MAX).then(|| Version(self.0 + 1))
    }
}

/// A half-open run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// First page of the run.
    pub start: PageIndex,
    /// The page behind the last one.
    pub end: PageIndex,
}

impl PageRange {
    /// The pages `start..end`; an `end` before `start` gives an empty run.
    pub fn new(start: u64, end: u64) -> Self {
        PageRange { start: PageIndex(start), end: PageIndex(end.max(start)) }
    }

    /// How many pages.
    pub fn len(&self) -> u64 {
        self.end.0 - self.start.0
    }

    /// True for a run of no pages.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when `page` is in the run.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.start <= page && page < self.end
    }

    /// The pages one by one.
    pub fn pages(&self) -> impl DoubleEndedIterator<Item = PageIndex> + use<> {
        (self.start.0..self.end.0).map(PageIndex)
    }
}

impl From<Range<u64>> for PageRange {
    fn from(range: Range<u64>) -> Self {
        PageRange::new(range.start, range.end)
    }
}

/// A set of pages of a guest, as a bitmap: one bit per page of RAM (32 KiB per GiB), walked by word.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
    count: u64,
}

impl PageSet {
    /// The empty set over a guest of `pages` pages.
    pub fn empty(pages: u64) -> Self {
        PageSet { words: vec![0; pages.div_ceil(64) as usize], pages, count: 0 }
    }

    /// Every page of a guest of `pages` pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.insert_range(PageRange::new(0, pages));
        set
    }

    /// From bitmap words, least significant bit first. Bits beyond `pages` are an error (`None`), so
    /// that words from the network cannot name pages that do not exist.
    pub fn from_words(words: Vec<u64>, pages: u64) -> Option<Self> {
        if words.len() as u64 != pages.div_ceil(64) {
            return None;
        }
        if !pages.is_multiple_of(64) && words.last().is_some_and(|w| w >> (pages % 64) != 0) {
            return None;
        }
        let count = words.iter().map(|w| u64::from(w.count_ones())).sum();
        Some(PageSet { words, pages, count })
    }

    /// The bitmap, least significant bit first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Size of the guest, in pages: the capacity, not the number of members.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many members.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// True when there is no member.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// True when `page` is a member. Pages beyond the guest never are.
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[(page.0 / 64) as usize] >> (page.0 % 64) & 1 == 1
    }

    /// Adds a page; true when it was not a member before.
    ///
    /// # Panics
    /// When the page is beyond the guest: the caller has not checked its input.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        assert!(page.0 < self.pages, "{page:?} beyond a guest of {} pages", self.pages);
        let word = &mut self.words[(page.0 / 64) as usize];
        let bit = 1 << (page.0 % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.count += u64::from(new);
        new
    }

    /// Removes a page; true when it was a member.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        if !self.contains(page) {
            return false;
        }
        self.words[(page.0 / 64) as usize] &= !(1 << (page.0 % 64));
        self.count -= 1;
        true
    }

    /// Adds a run of pages.
    ///
    /// # Panics
    /// When the run ends beyond the guest.
    pub fn insert_range(&mut self, range: PageRange) {
        assert!(range.is_empty() || range.end.0 <= self.pages, "{range:?} beyond the guest");
        self.for_each_word_in(range, |word, mask| *word |= mask);
    }

    /// Removes a run of pages.
    pub fn remove_range(&mut self, range: PageRange) {
        let clipped = PageRange::new(range.start.0.min(self.pages), range.end.0.min(self.pages));
        self.for_each_word_in(clipped, |word, mask| *word &= !mask);
    }

    fn for_each_word_in(&mut self, range: PageRange, mut change: impl FnMut(&mut u64, u64)) {
        let mut at = range.start.0;
        while at < range.end.0 {
            let bit = at % 64;
            let take = (64 - bit).min(range.end.0 - at);
            let mask = if take == 64 { u64::MAX } else { ((1 << take) - 1) << bit };
            let word = &mut self.words[(at / 64) as usize];
            let before = u64::from(word.count_ones());
            change(word, mask);
            self.count = self.count + u64::from(word.count_ones()) - before;
            at += take;
        }
    }

    /// Adds every member of `other`.
    ///
    /// # Panics
    /// When the sets are of guests of different sizes; so for the other operations on two sets.
    pub fn union_with(&mut self, other: &PageSet) {
        self.combine(other, |a, b| a | b);
    }

    /// Keeps the members that are in `other` too.
    pub fn intersect_with(&mut self, other: &PageSet) {
        self.combine(other, |a, b| a & b);
    }

    /// Removes every member of `other`.
    pub fn subtract(&mut self, other: &PageSet) {
        self.combine(other, |a, b| a & !b);
    }

    fn combine(&mut self, other: &PageSet, op: impl Fn(u64, u64) -> u64) {
        assert_eq!(self.pages, other.pages, "page sets of different guests");
        self.count = 0;
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a = op(*a, *b);
            self.count += u64::from(a.count_ones());
        }
    }

    /// How many members are in `other` too.
    pub fn intersection_len(&self, other: &PageSet) -> u64 {
        let common = self.words.iter().zip(&other.words).map(|(a, b)| (a & b).count_ones());
        common.map(u64::from).sum()
    }

    /// The members in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.words.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(i, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                (left != 0).then(|| {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    PageIndex(i as u64 * 64 + u64::from(bit))
                })
            })
        })
    }

    /// The members as maximal runs, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        let mut from = Some(PageIndex(0));
        std::iter::from_fn(move || {
            let start = self.first_from(from?)?;
            let end = self.first_gap_from(start);
            from = Some(end);
            Some(PageRange { start, end })
        })
    }

    /// The first member at or after `from`.
    pub fn first_from(&self, from: PageIndex) -> Option<PageIndex> {
        self.first_bit_from(from.0, |word| word).map(PageIndex)
    }

    fn first_gap_from(&self, from: PageIndex) -> PageIndex {
        PageIndex(self.first_bit_from(from.0, |word| !word).unwrap_or(self.pages))
    }

    fn first_bit_from(&self, from: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let mut i = (from / 64) as usize;
        let mut word = view(self.words[i]) & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                let at = i as u64 * 64 + u64::from(word.trailing_zeros());
                return (at < self.pages).then_some(at);
            }
            i += 1;
            word = view(*self.words.get(i)?);
        }
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {})", self.count, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64),
        Remove(u64),
        InsertRange(u64, u64),
        RemoveRange(u64, u64),
    }

    fn op(pages: u64) -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..pages).prop_map(Op::Insert),
            (0..pages).prop_map(Op::Remove),
            (0..pages, 0..=pages).prop_map(|(a, b)| Op::InsertRange(a, b)),
            (0..pages, 0..=pages).prop_map(|(a, b)| Op::RemoveRange(a, b)),
        ]
    }

    fn build(pages: u64, ops: &[Op]) -> (PageSet, BTreeSet<u64>) {
        let (mut set, mut model) = (PageSet::empty(pages), BTreeSet::new());
        for op in ops {
            match *op {
                Op::Insert(p) => assert_eq!(set.insert(PageIndex(p)), model.insert(p)),
                Op::Remove(p) => assert_eq!(set.remove(PageIndex(p)), model.remove(&p)),
                Op::InsertRange(a, b) => {
                    set.insert_range(PageRange::new(a, b));
                    model.extend(a..b);
                }
                Op::RemoveRange(a, b) => {
                    set.remove_range(PageRange::new(a, b));
                    model.retain(|p| !(a..b).contains(p));
                }
            }
        }
        (set, model)
    }

    proptest! {
        #[test]
        fn behaves_like_a_tree_set(
            (pages, ops) in (1u64..300).prop_flat_map(|n| (Just(n), prop::collection::vec(op(n), 0..20))),
        ) {
            let (set, model) = build(pages, &ops);
            prop_assert_eq!(set.len(), model.len() as u64);
            let members: Vec<u64> = set.iter().map(|p| p.0).collect();
            prop_assert_eq!(&members, &model.iter().copied().collect::<Vec<_>>());
            let from_runs: Vec<u64> = set.runs().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(&from_runs, &members);
            prop_assert!(set.runs().zip(set.runs().skip(1)).all(|(a, b)| a.end < b.start));
            let copy = PageSet::from_words(set.words().to_vec(), pages);
            prop_assert_eq!(copy, Some(set));
        }

        #[test]
        fn combines_like_tree_sets(
            a in prop::collection::vec(op(200), 0..12),
            b in prop::collection::vec(op(200), 0..12),
        ) {
            let ((sa, ma), (sb, mb)) = (build(200, &a), build(200, &b));
            let check = |set: PageSet, model: BTreeSet<u64>| {
                assert_eq!(set.iter().map(|p| p.0).collect::<BTreeSet<_>>(), model);
                assert_eq!(set.len(), model.len() as u64);
            };
            let mut union = sa.clone();
            union.union_with(&sb);
            check(union, &ma | &mb);
            let mut both = sa.clone();
            both.intersect_with(&sb);
            check(both, &ma & &mb);
            let mut left = sa.clone();
            left.subtract(&sb);
            check(left, &ma - &mb);
            prop_assert_eq!(sa.intersection_len(&sb), (&ma & &mb).len() as u64);
        }
    }

    #[test]
    fn words_beyond_the_guest_are_refused() {
        assert!(PageSet::from_words(vec![1 << 10], 10).is_none());
        assert!(PageSet::from_words(vec![0, 0], 64).is_none());
        assert_eq!(PageSet::from_words(vec![1 << 9], 10).map(|s| s.len()), Some(1));
    }
}
