//! "Bubbling" (Hines and Gopalan, "Post-copy based live virtual machine migration using adaptive
//! pre-paging and dynamic self-ballooning", VEE 2009): around each of the last faults a bubble grows in
//! both directions.

use std::collections::VecDeque;

use super::{Left, Policy, Wanted};
use crate::page::{PageIndex, PageRange};

/// Pages around a fault that are sent along with it: an aligned window of 64 KiB.
const WINDOW_PAGES: u64 = 16;
/// Bubbles that grow at a time; the seven of the paper did best there.
const BUBBLES: usize = 7;
/// How much a bubble grows at a time.
const STEP_PAGES: u64 = 16;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Bubbling {
    /// Where the last faults were; the front grows next.
    pivots: VecDeque<PageIndex>,
    upwards: bool,
}

impl Policy for Bubbling {
    fn fault(&mut self, wanted: Wanted, left: &Left<'_>, room: usize, bundle: &mut Vec<PageIndex>) {
        let page = wanted.page;
        self.pivots.retain(|pivot| pivot.0 / STEP_PAGES != page.0 / STEP_PAGES);
        self.pivots.push_front(page);
        self.pivots.truncate(BUBBLES);
        let start = page.0 / WINDOW_PAGES * WINDOW_PAGES;
        let window = PageRange::new(start, start + WINDOW_PAGES);
        bundle.extend(window.pages().filter(|page| left.unsent.contains(*page)).take(room));
    }

    fn next(&mut self, left: &Left<'_>) -> Option<PageRange> {
        // Each bubble upwards in turn, then each downwards.
        let pivot = *self.pivots.front()?;
        self.pivots.rotate_left(1);
        self.upwards = !self.upwards;
        let above = left.unsent.first_from(pivot).map(|page| (page.0, page.0 + STEP_PAGES));
        let below = left.unsent.last_until(pivot);
        let below = below.map(|page| ((page.0 + 1).saturating_sub(STEP_PAGES), page.0 + 1));
        let (start, end) = if self.upwards { above.or(below) } else { below.or(above) }?;
        Some(PageRange::new(start, end))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Pusher, PusherKind};
    use super::*;
    use crate::engine::heat::Heat;
    use crate::page::PageSet;

    #[test]
    fn bubbles_grow_in_both_directions() {
        let mut pusher = Pusher::new(PageSet::full(1000), Heat::new(1000), PusherKind::Bubbling);
        let mut bundle = Vec::new();
        assert!(pusher.request(
            Wanted { page: PageIndex(500), thread: 0 },
            64,
            &|_| 1,
            &mut bundle
        ));
        bundle.sort_unstable();
        let expected: Vec<PageIndex> = (496..512).filter(|p| *p != 500).map(PageIndex).collect();
        assert_eq!(bundle, expected);
        let mut pages = Vec::new();
        pusher.take(32, &|_| 1, &mut pages);
        pages.sort_unstable();
        let expected: Vec<PageIndex> = (480..496).chain(512..528).map(PageIndex).collect();
        assert_eq!(pages, expected);
    }
}
