use proptest::prelude::*;

use super::*;

fn heat_of(pages: u64, rounds: &[Vec<u64>]) -> Heat {
    let mut heat = Heat::new(pages);
    for round in rounds {
        let mut dirty = PageSet::empty(pages);
        for page in round {
            dirty.insert(PageIndex(page % pages));
        }
        heat.end_interval(&dirty);
    }
    heat
}

#[test]
fn a_page_that_was_never_needed_is_not_sent() {
    for kind in PusherKind::ALL {
        let mut pusher = Pusher::new(PageSet::empty(10), Heat::new(10), kind);
        for page in [3, 1 << 40, u64::MAX] {
            let wanted = Wanted { page: PageIndex(page), thread: 0 };
            assert!(!pusher.request(wanted, 100, &|_| 1, &mut Vec::new()));
        }
        assert_eq!(kind.name().parse(), Ok(kind));
    }
    assert!("quickest".parse::<PusherKind>().unwrap_err().contains("bubbling"));
}

#[test]
fn a_page_that_is_wanted_in_nobodys_name_goes_once_and_teaches_nothing() {
    for kind in PusherKind::ALL {
        let mut pusher = Pusher::new(PageSet::full(2000), Heat::new(2000), kind);
        // As of a huge page at 512, of which the one at 512 is asked for last.
        let together = |page| Wanted { page: PageIndex(page), thread: Wanted::TOGETHER };
        let overdue = |page| Wanted { page: PageIndex(page), thread: Wanted::OVERDUE };
        for page in 513..1024 {
            assert!(pusher.give(together(page)) && !pusher.give(together(page)), "{page}");
            assert!(pusher.give(overdue(page)), "{page}");
        }
        assert!(!pusher.give(together(1 << 40)) && !pusher.give(overdue(1 << 40)));
        assert_eq!((pusher.left(), pusher.bundles()), (2000 - 511, BundleStats::default()));
        let mut bundle = Vec::new();
        let wanted = Wanted { page: PageIndex(512), thread: 1 };
        assert!(pusher.request(wanted, 8, &|_| 1, &mut bundle));
        assert!(bundle.iter().all(|page| !(512..1024).contains(&page.0)), "{bundle:?}");
    }
}

#[test]
fn a_page_is_sent_again_when_it_is_asked_for_again() {
    for kind in PusherKind::ALL {
        let mut pusher = Pusher::new(PageSet::full(100), Heat::new(100), kind);
        let wanted = Wanted { page: PageIndex(9), thread: 0 };
        assert!(pusher.request(wanted, 0, &|_| 1, &mut Vec::new()));
        assert!(pusher.request(wanted, 0, &|_| 1, &mut Vec::new()), "it may be lost");
        assert_eq!(pusher.left(), 99);
    }
}

#[test]
fn the_hottest_go_first_where_they_may_and_each_page_once() {
    for kind in PusherKind::ALL {
        let rounds = [vec![2000, 7, 5], vec![2000, 7], vec![2000, 2001, 9]];
        let heat = heat_of(3000, &rounds);
        let mut pusher = Pusher::new(PageSet::full(3000), heat, kind);
        pusher.hottest_first(4, &|page| page != PageIndex(9));
        let mut pages = Vec::new();
        pusher.take(2, &|_| 1, &mut pages);
        assert_eq!(pages, [2000, 7].map(PageIndex));
        // Asked for before its turn.
        let wanted = Wanted { page: PageIndex(2001), thread: 0 };
        assert!(pusher.request(wanted, 0, &|_| 1, &mut Vec::new()));
        let mut rest = Vec::new();
        while pusher.left() > 0 {
            pusher.take(64, &|_| 1, &mut pages);
            rest.append(&mut pages);
        }
        assert_eq!(rest[0], PageIndex(5));
        rest.sort_unstable();
        rest.dedup();
        assert_eq!(rest.len(), 2997);
    }
}

#[test]
fn few_pages_are_asked_about_while_the_guest_stands_still() {
    let all: Vec<u64> = (0..3000).collect();
    let heat = heat_of(3000, &[all, vec![2999]]);
    let mut pusher = Pusher::new(PageSet::full(3000), heat, PusherKind::Linear);
    let asked = std::cell::Cell::new(0);
    let mut ask = |count, answer: &dyn Fn(PageIndex) -> bool| {
        asked.set(0);
        pusher.hottest_first(count, &|page| {
            asked.set(asked.get() + 1);
            answer(page)
        });
        let first = pusher.first.iter().map(|page| page.0).collect::<Vec<_>>();
        (first, asked.get())
    };
    assert_eq!(ask(0, &|_| true), (vec![], 0));
    assert_eq!(ask(3, &|_| true).0, [2999, 0, 1]);
    assert!(ask(3, &|_| true).1 <= 4);
    let (first, asked) = ask(10, &|_| false);
    assert!(first.is_empty() && asked == 40, "{asked}");
    // Those that may not go do not use up the turn of a hotter one, wherever that is.
    assert_eq!(ask(10, &|page| page.0 == 2999).0, [2999]);
    // The hottest may not go: others do in its place.
    assert_eq!(ask(2, &|page| page.0 < 2999).0, [0, 1]);
    assert_eq!(ask(5000, &|_| true).0.len(), 3000);
}

#[test]
fn it_begins_again_with_what_is_missing_and_was_needed() {
    for kind in PusherKind::ALL {
        let mut need = PageSet::full(10);
        need.remove(PageIndex(4));
        let mut pusher = Pusher::new(need, Heat::new(10), kind);
        let mut pages = Vec::new();
        pusher.take(7, &|_| 1, &mut pages);
        let mut missing = PageSet::empty(10);
        missing.insert_range(PageRange::new(3, 6));
        pusher.begin_again(&missing);
        assert_eq!(pusher.left(), 2, "what was sent and is missing, nothing else");
        pusher.take(7, &|_| 1, &mut pages);
        pages.sort_unstable();
        assert_eq!(pages, [3, 5].map(PageIndex), "page 4 is not to be had");
    }
}

#[test]
fn a_guest_of_a_tebibyte_costs_no_walk_for_each_page() {
    const PAGES: u64 = 1 << 28;
    for kind in PusherKind::ALL {
        let mut pusher = Pusher::new(PageSet::full(PAGES), Heat::new(PAGES), kind);
        let mut pages = Vec::new();
        // A walk over the bitmap for each of these would take minutes.
        for i in 0..20_000u64 {
            let page = PageIndex(i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % PAGES);
            pusher.request(Wanted { page, thread: i as u32 % 7 }, 64, &|_| 1, &mut pages);
            pusher.take(64, &|_| 1, &mut pages);
        }
        assert!(pusher.left() < PAGES - 20_000 * 64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the faults, the batches and the heat: every needed page goes, once, and a page that is
    /// asked for goes at once.
    #[test]
    fn every_needed_page_is_sent_once(
        pages in 1u64..40_000,
        skip in prop::collection::vec((any::<u64>(), 1u64..3000), 0..20),
        faults in prop::collection::vec((any::<u64>(), 0u32..3, 0usize..100, any::<bool>()), 0..200),
        rounds in prop::collection::vec(prop::collection::vec(any::<u64>(), 0..50), 0..4),
        batch_pages in 1usize..300,
    ) {
        let mut need = PageSet::full(pages);
        for (page, run) in skip {
            need.remove_range(PageRange::new(page % pages, page % pages + run));
        }
        for kind in PusherKind::ALL {
            let mut pusher = Pusher::new(need.clone(), heat_of(pages, &rounds), kind);
            let (mut sent, mut asked) = (PageSet::empty(pages), PageSet::empty(pages));
            let mut at = 0;
            let mut faults = faults.iter();
            let mut batch = Vec::new();
            let cost = |page: PageIndex| 100 + page.0 as u32 % 3 * 1000;
            while pusher.left() > 0 {
                if let Some((random, thread, room, near)) = faults.next() {
                    // Some faults go on from the last one, some do not.
                    at = if *near { at + random % 40 } else { *random } % pages;
                    let (page, mut bundle) = (PageIndex(at), Vec::new());
                    let due = pusher.request(
                        Wanted { page, thread: *thread }, *room, &cost, &mut bundle);
                    prop_assert_eq!(due, need.contains(page));
                    if due {
                        asked.insert(page);
                        sent.insert(page);
                    }
                    prop_assert!(bundle.len() <= *room);
                    for page in bundle {
                        prop_assert!(sent.insert(page), "{page:?} bundled twice by {kind}");
                    }
                }
                pusher.take(batch_pages, &cost, &mut batch);
                prop_assert!(batch.len() <= batch_pages);
                prop_assert!(!batch.is_empty() || pusher.left() == 0);
                for page in &batch {
                    prop_assert!(sent.insert(*page), "{page:?} pushed twice by {kind}");
                }
            }
            prop_assert_eq!(&sent, &need);
        }
    }
}
