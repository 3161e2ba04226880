//! Which page goes next after the switchover.
//!
//! The guest's RAM at the source is frozen, so a page is sent once, either because a guest thread
//! waits for it or in the pusher's order. That order is "bubbling" (Hines and Gopalan, VEE 2009): the
//! pusher goes on from where the guest last faulted, since the pages behind a fault are the likeliest
//! next ones, and wraps around. Until the first fault it starts where the guest has written most lately
//! and most often.

use std::cmp::Reverse;

use super::heat::Heat;
use crate::page::{PageIndex, PageSet};

/// Pages around a fault that are sent along with it: an aligned window of 64 KiB.
pub const WINDOW_PAGES: u64 = 16;

/// The pages that the destination still needs.
#[derive(Debug)]
pub struct Pusher {
    need: PageSet,
    unsent: PageSet,
    cursor: PageIndex,
}

impl Pusher {
    /// Everything in `need` is still to be sent.
    pub fn new(need: PageSet, heat: &Heat) -> Self {
        let warm = heat.warm_chunks().flat_map(|chunk| chunk.pages());
        let hottest =
            warm.filter(|page| need.contains(*page)).min_by_key(|page| Reverse(heat.of(*page)));
        Pusher { unsent: need.clone(), need, cursor: hottest.unwrap_or(PageIndex(0)) }
    }

    /// Pages not sent yet.
    pub fn left(&self) -> u64 {
        self.unsent.len()
    }

    /// A guest thread waits for `page`: true when its content is to be sent now, even if it was sent
    /// before (it may be lost on the way); false for a page that the destination was never told to
    /// need. The pusher goes on from here.
    pub fn request(&mut self, page: PageIndex) -> bool {
        if !self.need.contains(page) {
            return false;
        }
        self.unsent.remove(page);
        self.cursor = page;
        true
    }

    /// Unsent neighbours of a requested page, to be sent right behind it.
    pub fn take_window(&mut self, page: PageIndex, into: &mut Vec<PageIndex>) {
        into.clear();
        let start = page.0 / WINDOW_PAGES * WINDOW_PAGES;
        self.take_from(PageIndex(start), start + WINDOW_PAGES, WINDOW_PAGES as usize, into);
    }

    /// The next at most `count` pages in the pusher's order.
    pub fn take(&mut self, count: usize, into: &mut Vec<PageIndex>) {
        into.clear();
        self.take_from(self.cursor, self.need.pages(), count, into);
        if into.is_empty() {
            self.take_from(PageIndex(0), self.need.pages(), count, into);
        }
        if let Some(last) = into.last() {
            self.cursor = PageIndex(last.0 + 1);
        }
    }

    fn take_from(&mut self, start: PageIndex, end: u64, count: usize, into: &mut Vec<PageIndex>) {
        let mut at = start;
        while into.len() < count {
            let Some(page) = self.unsent.first_from(at).filter(|page| page.0 < end) else { break };
            self.unsent.remove(page);
            into.push(page);
            at = PageIndex(page.0 + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn goes_on_from_the_last_fault_and_wraps_around() {
        let mut pusher = Pusher::new(PageSet::full(100), &Heat::new(100));
        assert!(pusher.request(PageIndex(50)));
        let mut pages = Vec::new();
        pusher.take(3, &mut pages);
        assert_eq!(pages, [51, 52, 53].map(PageIndex));
        pusher.take(1000, &mut pages);
        assert_eq!(pages.len(), 46);
        pusher.take(1000, &mut pages);
        assert_eq!((pages[0], pages.len()), (PageIndex(0), 50));
        assert_eq!(pusher.left(), 0);
    }

    #[test]
    fn starts_where_the_guest_writes_most() {
        let mut heat = Heat::new(100);
        let (mut dirty, mut pages) = (PageSet::empty(100), Vec::new());
        dirty.insert(PageIndex(70));
        heat.end_round(&dirty);
        dirty.insert(PageIndex(20));
        heat.end_round(&dirty);
        Pusher::new(PageSet::full(100), &heat).take(2, &mut pages);
        assert_eq!(pages, [70, 71].map(PageIndex));
    }

    #[test]
    fn a_page_that_was_never_needed_is_not_sent() {
        let mut pusher = Pusher::new(PageSet::empty(10), &Heat::new(10));
        assert!(!pusher.request(PageIndex(3)));
        assert!(!pusher.request(PageIndex(1 << 40)));
    }

    proptest! {
        #[test]
        fn every_needed_page_is_sent_at_least_once(
            pages in 1u64..300,
            skip in prop::collection::vec(any::<u64>(), 0..50),
            faults in prop::collection::vec(any::<u64>(), 0..50),
        ) {
            let mut need = PageSet::full(pages);
            for page in skip {
                need.remove(PageIndex(page % pages));
            }
            let mut pusher = Pusher::new(need.clone(), &Heat::new(pages));
            let mut sent = PageSet::empty(pages);
            let mut faults = faults.into_iter();
            let mut batch = Vec::new();
            loop {
                if let Some(fault) = faults.next().map(|f| PageIndex(f % pages))
                    && pusher.request(fault)
                {
                    sent.insert(fault);
                    pusher.take_window(fault, &mut batch);
                    for page in &batch {
                        prop_assert!(sent.insert(*page), "{page:?} pushed twice");
                    }
                }
                pusher.take(7, &mut batch);
                if batch.is_empty() && pusher.left() == 0 {
                    break;
                }
                for page in &batch {
                    prop_assert!(sent.insert(*page), "{page:?} pushed twice");
                }
            }
            prop_assert_eq!(sent, need);
        }
    }
}
