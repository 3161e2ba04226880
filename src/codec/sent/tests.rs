use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::codec::test_pages::page_of;
use crate::page::PAGE_SIZE_BYTES;

const GUEST_PAGES: u64 = 20_000;

fn account(base_cache_bytes: usize, lines_bytes: usize) -> SentPages {
    SentPages::new(SentLimits { base_cache_bytes, lines_bytes }, GUEST_PAGES)
}

fn remember(sent: &SentPages, page: u64, version: u16, bytes: &PageBytes) {
    let hash = Some(ContentHash::of(bytes));
    sent.remember(PageIndex(page), Version(version), bytes, hash, &[]);
}

fn known(sent: &SentPages, page: u64) -> Known {
    sent.recall(PageIndex(page), &mut [0; PAGE_SIZE_BYTES])
}

#[test]
fn a_page_that_loses_its_place_in_the_cache_is_known_by_its_lines() {
    let sent = account(1 << 20, 8 << 20);
    let cold: Vec<u64> = (0..4000)
        .filter(|page| {
            remember(&sent, *page, 1, &page_of(*page));
            matches!(known(&sent, *page), Known::Bytes(_))
        })
        .collect();
    assert!(cold.len() > 100 && cold.len() < 256, "{} pages in 1 MiB", cold.len());
    for page in 4000..8000 {
        sent.touch(PageIndex(page));
        remember(&sent, page, 2, &page_of(page));
    }
    let evicted: Vec<_> =
        cold.iter().filter(|page| !matches!(known(&sent, **page), Known::Bytes(_))).collect();
    assert!(evicted.len() > 100, "{} of {}", evicted.len(), cold.len());
    for page in evicted {
        let lines = LineFingerprint::of(&page_of(*page));
        assert_eq!(known(&sent, *page), Known::Lines(Version(1), lines));
    }
}

#[test]
fn what_was_rejected_goes_whole_once() {
    let sent = account(1 << 20, 1 << 20);
    remember(&sent, 7, 1, &page_of(7));
    sent.distrust(PageIndex(7));
    assert_eq!(known(&sent, 7), Known::Distrusted);
    assert!(!sent.knows(PageIndex(7)));
    remember(&sent, 7, 2, &page_of(7));
    assert_eq!(known(&sent, 7), Known::Bytes(Version(2)));
}

#[test]
fn an_original_is_another_page_that_has_these_bytes_now() {
    let sent = account(1 << 20, 0);
    let bytes = page_of(1);
    let hash = ContentHash::of(&bytes);
    let original = |page: u64| sent.original_of(PageIndex(page), &bytes, hash, |_| true);
    assert_eq!(original(9), None);
    remember(&sent, 5, 1, &bytes);
    assert_eq!(original(9), Some((PageIndex(5), Version(1))));
    assert_eq!(original(5), None, "not a copy of itself");
    assert_eq!(sent.original_of(PageIndex(9), &bytes, hash, |page| page.0 != 5), None);
    let other = page_of(2);
    assert_eq!(
        sent.original_of(PageIndex(9), &other, hash, |_| true),
        None,
        "the hash alone makes no copy"
    );
    remember(&sent, 5, 2, &other);
    assert_eq!(original(9), None, "it was sent with another content since");
}

#[test]
fn it_stays_within_its_limits() {
    let limits = SentLimits { base_cache_bytes: 8 << 20, lines_bytes: 1 << 20 };
    let sent = SentPages::new(limits, GUEST_PAGES);
    for page in 0..GUEST_PAGES {
        remember(&sent, page, 1, &page_of(page));
    }
    let SentMemory { base_cache_bytes, lines_bytes, copies_bytes, kin_bytes } = sent.memory();
    // Counters of how often each page was written to, and pointers to lines, come on top.
    let extra = GUEST_PAGES + (8 << 10);
    let cache = base_cache_bytes + copies_bytes + kin_bytes;
    assert!(cache <= (8 << 20) + extra, "{cache}");
    assert!(base_cache_bytes > 7 << 20, "{base_cache_bytes}");
    assert!(lines_bytes <= (1 << 20) + extra, "{lines_bytes}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_never_knows_anything_but_what_was_sent_last(
        steps in prop::collection::vec((0u64..5000, 0u8..8, 0u64..20), 1..400),
        (cache, lines) in (0usize..4, 0usize..4),
    ) {
        let sent = account(cache << 19, lines << 19);
        let mut model: HashMap<u64, (u16, u64)> = HashMap::new();
        for (step, (page, what, content)) in steps.into_iter().enumerate() {
            let version = step as u16 + 1;
            match what {
                0..5 => {
                    if what == 0 {
                        sent.touch(PageIndex(page));
                    }
                    remember(&sent, page, version, &page_of(content));
                    model.insert(page, (version, content));
                }
                5 => {
                    sent.distrust(PageIndex(page));
                    model.remove(&page);
                }
                _ => {
                    sent.forget(PageRange::new(page.saturating_sub(300), page + 1));
                    (page.saturating_sub(300)..=page).for_each(|page| { model.remove(&page); });
                }
            }
            let bytes = page_of(content);
            let hash = ContentHash::of(&bytes);
            if let Some((other, version)) =
                sent.original_of(PageIndex(page), &bytes, hash, |_| true)
            {
                prop_assert_eq!(model.get(&other.0), Some(&(version.0, content)));
            }
        }
        for page in 0..5000 {
            let mut bytes = [0; PAGE_SIZE_BYTES];
            match (sent.recall(PageIndex(page), &mut bytes), model.get(&page)) {
                (Known::Nothing, _) | (Known::Distrusted, None) => {}
                (Known::Bytes(found), Some((version, content))) => {
                    prop_assert_eq!(found.0, *version);
                    prop_assert!(bytes == page_of(*content));
                }
                (Known::Lines(found, lines), Some((version, content))) => {
                    prop_assert_eq!(found.0, *version);
                    prop_assert_eq!(lines, LineFingerprint::of(&page_of(*content)));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
