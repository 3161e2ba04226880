use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Insert(u64),
    Remove(u64),
    InsertRange(PageRange),
    RemoveRange(PageRange),
    Clear,
}

/// Of a guest of less than a chunk, of one or two to the page, and of some more.
fn guest_pages() -> impl Strategy<Value = u64> {
    prop_oneof![1u64..300, CHUNK_PAGES - 1..=CHUNK_PAGES + 1, 1..=3 * CHUNK_PAGES]
}

/// Its ends are often those of chunks, words or pages.
fn range(pages: u64) -> impl Strategy<Value = PageRange> {
    let end = move || {
        prop_oneof![
            2 => 0..=pages,
            1 => (0..=pages).prop_map(move |page| (page / 64 * 64).min(pages)),
            1 => (0..4u64).prop_map(move |chunk| (chunk * CHUNK_PAGES).min(pages)),
        ]
    };
    (end(), end()).prop_map(|(a, b)| PageRange::new(a.min(b), a.max(b)))
}

fn op(pages: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0..pages).prop_map(Op::Insert),
        8 => (0..pages).prop_map(Op::Remove),
        8 => range(pages).prop_map(Op::InsertRange),
        8 => range(pages).prop_map(Op::RemoveRange),
        1 => Just(Op::Clear),
    ]
}

fn ops(pages: u64) -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(pages), 0..12)
}

fn slice(range: PageRange) -> std::ops::Range<usize> {
    range.start.0 as usize..range.end.0 as usize
}

fn build(pages: u64, ops: &[Op]) -> (PageSet, Vec<bool>) {
    let (mut set, mut model) = (PageSet::empty(pages), vec![false; pages as usize]);
    for op in ops {
        match *op {
            Op::Insert(page) => {
                let was = std::mem::replace(&mut model[page as usize], true);
                assert_eq!(set.insert(PageIndex(page)), !was);
            }
            Op::Remove(page) => {
                let was = std::mem::replace(&mut model[page as usize], false);
                assert_eq!(set.remove(PageIndex(page)), was);
            }
            Op::InsertRange(range) => {
                set.insert_range(range);
                model[slice(range)].fill(true);
            }
            Op::RemoveRange(range) => {
                set.remove_range(range);
                model[slice(range)].fill(false);
            }
            Op::Clear => {
                set.clear();
                model.fill(false);
            }
        }
    }
    (set, model)
}

/// The set is `model`, in the one form that such a set has.
fn check(set: &PageSet, model: &[bool]) {
    let pages = (0..model.len() as u64).map(PageIndex);
    assert!(pages.zip(model).all(|(page, member)| set.contains(page) == *member));
    assert_eq!(set.len(), model.iter().filter(|member| **member).count() as u64);
    for (number, chunk) in set.chunks.iter().enumerate() {
        let pages = set.pages_in(number);
        let ones = |words: &[u64; CHUNK_WORDS]| words.iter().map(|word| word.count_ones()).sum();
        let count: u32 = chunk.words.as_deref().map_or(chunk.count, ones);
        assert_eq!(chunk.count, count);
        let is_uniform = chunk.count == 0 || u64::from(chunk.count) == pages;
        assert_eq!(chunk.words.is_none(), is_uniform, "chunk {number}: {count} of {pages}");
    }
}

fn members(model: &[bool], range: PageRange) -> Vec<PageIndex> {
    range.pages().filter(|page| model[page.0 as usize]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn behaves_like_an_array_of_bits(
        (pages, ops, range) in guest_pages().prop_flat_map(|n| (Just(n), ops(n), range(n))),
    ) {
        let (set, model) = build(pages, &ops);
        check(&set, &model);
        let all = PageRange::new(0, pages);
        prop_assert!(!set.contains(PageIndex(pages)));
        prop_assert_eq!(set.iter().collect::<Vec<_>>(), members(&model, all));
        prop_assert_eq!(set.iter_in(range).collect::<Vec<_>>(), members(&model, range));
        prop_assert_eq!(set.len_in(range), members(&model, range).len() as u64);
        prop_assert_eq!(set.is_empty_in(range), members(&model, range).is_empty());
        prop_assert_eq!(set.first_from(range.start), members(&model, PageRange { end: all.end, ..range }).first().copied());
        let runs: Vec<PageRange> = set.runs_in(range).collect();
        prop_assert_eq!(runs.iter().flat_map(PageRange::pages).collect::<Vec<_>>(), members(&model, range));
        prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        let gaps: Vec<PageRange> = set.gaps_in(range).collect();
        let others: Vec<bool> = model.iter().map(|member| !member).collect();
        prop_assert_eq!(gaps.iter().flat_map(PageRange::pages).collect::<Vec<_>>(), members(&others, range));
        prop_assert!(gaps.windows(2).all(|pair| pair[0].end < pair[1].start));
        let words: Vec<u64> = (0..set.word_count()).map(|index| set.word(index)).collect();
        prop_assert_eq!(PageSet::from_words(words.into_iter(), pages), Some(set));
    }

    #[test]
    fn combines_like_arrays_of_bits(
        (pages, a, b, range) in
            guest_pages().prop_flat_map(|n| (Just(n), ops(n), ops(n), range(n))),
    ) {
        let ((set, model), (other, other_model)) = (build(pages, &a), build(pages, &b));
        let combine = |range: PageRange, op: fn(bool, bool) -> bool| {
            let mut combined = model.clone();
            for (own, other) in combined[slice(range)].iter_mut().zip(&other_model[slice(range)]) {
                *own = op(*own, *other);
            }
            combined
        };
        for range in [range, PageRange::new(0, pages)] {
            let (mut union, mut both, mut left) = (set.clone(), set.clone(), set.clone());
            union.union_in(range, &other);
            check(&union, &combine(range, |own, other| own | other));
            both.intersect_in(range, &other);
            check(&both, &combine(range, |own, other| own & other));
            left.subtract_in(range, &other);
            check(&left, &combine(range, |own, other| own & !other));
        }
        let (mut union, mut both, mut left) = (set.clone(), set.clone(), set.clone());
        let all = PageRange::new(0, pages);
        union.union_with(&other);
        check(&union, &combine(all, |own, other| own | other));
        both.intersect_with(&other);
        check(&both, &combine(all, |own, other| own & other));
        left.subtract(&other);
        check(&left, &combine(all, |own, other| own & !other));
        prop_assert_eq!(set.intersection_len(&other), both.len());
    }
}

#[test]
fn words_beyond_the_guest_are_refused() {
    let from = |words: &[u64], pages| PageSet::from_words(words.iter().copied(), pages);
    assert!(from(&[1 << 10], 10).is_none());
    assert!(from(&[0, 0], 64).is_none());
    assert_eq!(from(&[1 << 9], 10).map(|set| set.len()), Some(1));
}

#[test]
fn what_is_alike_takes_no_memory() {
    let mut set = PageSet::full(1 << 32);
    set.remove(PageIndex(1 << 31));
    assert_eq!(set.chunks.iter().filter(|chunk| chunk.words.is_some()).count(), 1);
    assert_eq!(set.runs().count(), 2);
}
