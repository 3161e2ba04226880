use std::collections::HashMap;

use super::*;
use proptest::prelude::*;

fn cache_of(slots: usize, guest_pages: u64) -> BaseCache {
    let cache = BaseCache::new(slots * SLOT_COST_BYTES, guest_pages);
    assert_eq!(cache.capacity(), slots);
    cache
}

fn page_with(value: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE_BYTES];
    page[..8].copy_from_slice(&value.to_le_bytes());
    page[PAGE_SIZE_BYTES - 8..].copy_from_slice(&value.to_le_bytes());
    page
}

#[test]
fn gives_back_what_was_sent_last() {
    let mut cache = cache_of(10, 1000);
    let page = PageIndex(7);
    assert_eq!(cache.get(page), None);
    assert!(cache.insert(page, Version(1), &page_with(1), |_, _, _| {}));
    assert!(cache.insert(page, Version(2), &page_with(2), |_, _, _| {}));
    assert_eq!(cache.get(page), Some((Version(2), &page_with(2))));
    assert_eq!(cache.len(), 1);
    assert!(cache.forget(page));
    assert!(!cache.forget(page));
    assert_eq!(cache.get(page), None);
    assert!(cache.is_empty());
}

#[test]
fn counters_of_a_large_guest_are_halved_once_in_as_many_touches_as_there_are_words_of_them() {
    let page = PageIndex(7);
    let mut heat = Heat::new(16 * 100, 0);
    (0..99).for_each(|_| heat.touch(page));
    assert_eq!(u64::from(heat.of(page)), Heat::MAX);
    heat.touch(page);
    assert_eq!(u64::from(heat.of(page)), Heat::MAX / 2);
    // One that holds nothing counts nothing.
    let mut none = cache_of(0, 16 * 100);
    (0..10).for_each(|_| none.touch(page));
    assert_eq!(none.heat.of(page), 0);
}

#[test]
fn a_first_pass_over_a_larger_guest_displaces_no_hot_page() {
    let mut cache = cache_of(300, 10_000);
    let hot: Vec<PageIndex> = (0..300).map(|i| PageIndex(i * 33)).collect();
    for &page in &hot {
        cache.touch(page);
        assert!(cache.insert(page, Version(1), &page_with(page.0), |_, _, _| {}));
    }
    for page in (0..10_000).map(PageIndex) {
        cache.insert(page, Version(2), &page_with(page.0), |_, _, _| {});
    }
    assert!(hot.iter().all(|&page| cache.get(page).is_some()));
    assert_eq!(cache.len(), 300);
}

#[test]
fn a_hot_page_takes_the_place_of_a_cold_one() {
    let mut cache = cache_of(300, 10_000);
    for page in (0..10_000).map(PageIndex) {
        assert_eq!(cache.insert(page, Version(1), &page_with(page.0), |_, _, _| {}), page.0 < 300);
    }
    for page in (5_000..5_300).map(PageIndex) {
        cache.touch(page);
        assert!(cache.insert(page, Version(2), &page_with(page.0), |_, _, _| {}));
    }
    assert!((5_000..5_300).all(|page| cache.get(PageIndex(page)).is_some()));
}

#[test]
fn a_working_set_twice_the_cache_still_hits_half_the_time() {
    let mut cache = cache_of(512, 10_000);
    let (mut hits, mut looks) = (0, 0);
    for round in 1..=20 {
        for page in (0..1024).map(PageIndex) {
            cache.touch(page);
            if round > 1 {
                looks += 1;
                hits += usize::from(cache.get(page).is_some());
            }
            cache.insert(page, Version(round), &page_with(page.0), |_, _, _| {});
        }
    }
    assert!(hits * 100 / looks >= 40, "{hits} hits of {looks}");
}

#[test]
fn old_heat_fades_so_that_a_new_working_set_moves_in() {
    let mut cache = cache_of(256, 10_000);
    let mut work_on = |first: u64, rounds: u16| {
        for round in 1..=rounds {
            for page in (first..first + 256).map(PageIndex) {
                cache.touch(page);
                cache.insert(page, Version(round), &page_with(page.0), |_, _, _| {});
            }
        }
        (first..first + 256).filter(|&page| cache.get(PageIndex(page)).is_some()).count()
    };
    assert_eq!(work_on(0, 30), 256);
    assert!(work_on(4000, 30) > 200);
}

#[test]
fn stays_within_its_capacity_and_starts_small() {
    let (capacity, guest_pages) = (64 << 20, 262_144u64);
    let counters = guest_pages as usize / 2;
    let mut cache = BaseCache::new(capacity, guest_pages);
    assert!(cache.memory_bytes() < counters + (1 << 20), "{}", cache.memory_bytes());
    for page in (0..guest_pages / 4).map(PageIndex) {
        cache.insert(page, Version(1), &page_with(page.0), |_, _, _| {});
    }
    assert_eq!(cache.len(), cache.capacity());
    assert!(cache.capacity() * PAGE_SIZE_BYTES > capacity * 98 / 100);
    let last_chunk = (1 << SMALL_CHUNK_SHIFT) * SLOT_COST_BYTES;
    assert!(cache.memory_bytes() <= capacity + counters + last_chunk, "{}", cache.memory_bytes());
}

#[test]
fn a_cache_of_nothing_keeps_nothing() {
    let mut cache = BaseCache::new(0, 100);
    cache.touch(PageIndex(3));
    assert!(!cache.insert(PageIndex(3), Version(1), &page_with(3), |_, _, _| {}));
    assert_eq!(cache.get(PageIndex(3)), None);
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u64),
    Forget(u64),
    Touch(u64),
}

proptest! {
    #[test]
    fn never_gives_bytes_other_than_the_last_sent(
        ops in prop::collection::vec(
            prop_oneof![
                3 => (0u64..60).prop_map(Op::Insert),
                1 => (0u64..60).prop_map(Op::Forget),
                2 => (0u64..60).prop_map(Op::Touch),
            ],
            1..400,
        ),
        slots in 1usize..40,
    ) {
        let mut cache = cache_of(slots, 60);
        let mut sent: HashMap<u64, u16> = HashMap::new();
        for (time, op) in ops.into_iter().enumerate() {
            match op {
                Op::Insert(page) => {
                    let version = time as u16 + 1;
                    let mut evicted = None;
                    let kept = cache.insert(
                        PageIndex(page),
                        Version(version),
                        &page_with(version.into()),
                        |page, version, bytes| evicted = Some((page, version, *bytes)),
                    );
                    if let Some((colder, version, bytes)) = evicted {
                        prop_assert!(kept && cache.get(colder).is_none());
                        prop_assert_eq!(sent.get(&colder.0), Some(&version.0));
                        prop_assert!(bytes == page_with(version.0.into()));
                    }
                    prop_assert_eq!(kept, cache.get(PageIndex(page)).is_some());
                    sent.insert(page, version);
                }
                Op::Forget(page) => {
                    cache.forget(PageIndex(page));
                    prop_assert!(cache.get(PageIndex(page)).is_none());
                }
                Op::Touch(page) => cache.touch(PageIndex(page)),
            }
            prop_assert!(cache.len() <= slots);
            let held = (0..60).filter_map(|page| Some((page, cache.get(PageIndex(page))?)));
            let mut count = 0;
            for (page, (version, bytes)) in held {
                count += 1;
                prop_assert_eq!(version.0, sent[&page]);
                prop_assert_eq!(bytes, &page_with(version.0.into()));
            }
            prop_assert_eq!(count, cache.len());
        }
    }
}
