use proptest::prelude::*;

use super::*;
use crate::codec::test_pages::{noise_of, page_of};
use crate::codec::{ContentHash, SentLimits};
use crate::page::PAGE_SIZE_BYTES;

const PAGES: u64 = 4096;

fn anchors_of(page: &PageBytes) -> Vec<Anchor> {
    let mut anchors = Vec::new();
    find_anchors(page, &mut anchors);
    anchors
}

fn sent() -> SentPages {
    SentPages::new(SentLimits { base_cache_bytes: 64 << 20, lines_bytes: 0 }, PAGES)
}

/// As a sender does.
fn send(sent: &SentPages, finder: &mut KinFinder, page: u64, version: u16, bytes: &PageBytes) {
    finder.begin();
    finder.look_at(bytes);
    let (page, anchors) = (PageIndex(page), finder.anchors_of(0).to_vec());
    sent.remember(page, Version(version), bytes, Some(ContentHash::of(bytes)), &anchors);
    finder.sent(page);
}

/// The end of one page and the begin of the next, as they lie in memory.
fn across(first: &PageBytes, second: &PageBytes, offset: usize) -> PageBytes {
    let both = [*first, *second].concat();
    both[offset..offset + PAGE_SIZE_BYTES].try_into().unwrap()
}

#[test]
fn a_page_has_a_bounded_number_of_anchors_and_one_of_repetition_hardly_any() {
    let total: usize = (0..64).map(|seed| anchors_of(&noise_of(seed)).len()).sum();
    let expected = 64 * PAGE_SIZE_BYTES as u64 / ANCHOR_EVERY;
    assert!((expected / 2..expected * 2).contains(&(total as u64)), "{total}");
    assert!((0..=255).all(|byte| anchors_of(&[byte; PAGE_SIZE_BYTES]).len() <= 1));
    let of_period = |seed: u64| -> PageBytes {
        noise_of(seed)[..2].repeat(PAGE_SIZE_BYTES / 2).try_into().unwrap()
    };
    let most = (0..5000).map(|seed| anchors_of(&of_period(seed)).len()).max();
    assert_eq!(most, Some(1));
}

#[test]
fn pages_that_hold_the_same_bytes_at_other_offsets_are_found() {
    let (sent, mut finder) = (sent(), KinFinder::default());
    for page in 0..100 {
        send(&sent, &mut finder, page, 1, &noise_of(page));
    }
    let mut finder = KinFinder::default();
    finder.begin();
    finder.look_at(&across(&noise_of(40), &noise_of(41), 1000));
    let kin = finder.find(&sent, |_| true, |_, _| true);
    let expected = [(PageIndex(40), Version(1)), (PageIndex(41), Version(1))];
    assert_eq!(kin.pages, expected);
    assert_eq!(kin.bytes, [noise_of(40), noise_of(41)].concat());
    assert_eq!(finder.find(&sent, |page| page.0 != 40, |_, _| true).pages, expected[1..]);
}

#[test]
fn the_pages_sent_last_are_kin_too_as_far_as_they_are_there() {
    let (sent, mut finder) = (sent(), KinFinder::default());
    for page in 0..100 {
        send(&sent, &mut finder, page, 1, &page_of(page));
    }
    finder.begin();
    finder.look_at(&noise_of(1));
    let kin = finder.find(&sent, |_| true, |_, _| true);
    let pages: Vec<u64> = kin.pages.iter().map(|(page, _)| page.0).collect();
    assert_eq!(pages, (100 - RECENT_PAGES as u64..100).collect::<Vec<_>>());
    let kin = finder.find(&sent, |page| page.0 < 50, |_, _| true);
    assert_eq!(
        kin.pages.iter().map(|(page, _)| page.0).collect::<Vec<_>>(),
        (18..50).collect::<Vec<_>>()
    );
    finder.begin();
    finder.pass_over();
    assert!(finder.find(&sent, |_| true, |_, _| true).pages.is_empty(), "nobody asked for any");
}

#[test]
fn what_became_of_a_page_since_it_was_found_is_what_counts() {
    let (sent, mut finder) = (sent(), KinFinder::default());
    send(&sent, &mut finder, 7, 1, &noise_of(7));
    sent.remember(PageIndex(7), Version(2), &noise_of(8), None, &[]);
    let mut finder = KinFinder::default();
    finder.begin();
    finder.look_at(&noise_of(7));
    let kin = finder.find(&sent, |_| true, |_, _| true);
    assert_eq!(
        (&kin.pages[..], &kin.bytes[..]),
        (&[(PageIndex(7), Version(2))][..], &noise_of(8)[..])
    );
    sent.distrust(PageIndex(7));
    assert!(finder.find(&sent, |_| true, |_, _| true).pages.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn kin_are_few_ascend_and_are_what_was_sent(
        likes in prop::collection::vec((0..PAGES - 1, 0..PAGE_SIZE_BYTES), 1..MAX_KIN_PAGES),
        wanted in any::<u8>(),
    ) {
        let (sent, mut finder) = (sent(), KinFinder::default());
        for page in 0..300 {
            send(&sent, &mut finder, page, 1 + page as u16 % 3, &noise_of(page));
        }
        finder.begin();
        for (page, offset) in likes {
            finder.look_at(&across(&noise_of(page % 299), &noise_of(page % 299 + 1), offset));
        }
        let kin = finder.find(&sent, |_| true, |page, _| page.0 as u8 & wanted == 0);
        prop_assert!(kin.pages.len() <= MAX_KIN_PAGES);
        prop_assert!(kin.pages.is_sorted_by(|a, b| a.0 < b.0));
        prop_assert_eq!(kin.bytes.len(), kin.pages.len() * PAGE_SIZE_BYTES);
        for ((page, version), bytes) in kin.pages.iter().zip(kin.bytes.as_chunks().0) {
            prop_assert!(page.0 as u8 & wanted == 0);
            prop_assert_eq!(*version, Version(1 + page.0 as u16 % 3));
            prop_assert_eq!(bytes, &noise_of(page.0));
        }
    }
}
