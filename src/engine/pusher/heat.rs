//! Pages first that the guest has written to most lately and most often, as pre-copy saw it.

use super::{Left, Policy, Wanted};
use crate::engine::heat::CHUNK_PAGES;
use crate::page::{PageIndex, PageRange};

/// One walk over the guest for each: pages whose history is at least so much go in it. Dirty in the last
/// two rounds, in the last one, in any, and all others.
const WALKS: [u8; 4] = [0b1100_0000, 0b1000_0000, 1, 0];

/// See the module's text. Nothing is sorted beforehand: the guest stands still while a policy is made.
#[derive(Debug, Default)]
pub(super) struct Hottest {
    walk: usize,
    cursor: u64,
}

impl Policy for Hottest {
    fn fault(&mut self, _: Wanted, _: &Left<'_>, _: usize, _: &mut Vec<PageIndex>) {}

    fn next(&mut self, left: &Left<'_>) -> Option<PageRange> {
        loop {
            let hot_enough = *WALKS.get(self.walk)?;
            let Some(first) = left.unsent.first_from(PageIndex(self.cursor)) else {
                (self.walk, self.cursor) = (self.walk + 1, 0);
                continue;
            };
            self.cursor = first.0;
            if hot_enough == 0 {
                return Some(PageRange::new(first.0, left.unsent.pages()));
            }
            let chunk_end = (first.0 / CHUNK_PAGES + 1) * CHUNK_PAGES;
            self.cursor = chunk_end;
            if left.heat.is_cold(first) {
                continue;
            }
            let is_hot = |page: &u64| left.heat.of(PageIndex(*page)) >= hot_enough;
            let hot = |page: &u64| is_hot(page) && left.unsent.contains(PageIndex(*page));
            if let Some(start) = (first.0..chunk_end).find(hot) {
                self.cursor = start;
                let end = (start..chunk_end).find(|page| !is_hot(page)).unwrap_or(chunk_end);
                return Some(PageRange::new(start, end));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Pusher, PusherKind};
    use super::*;
    use crate::engine::heat::Heat;
    use crate::page::PageSet;

    #[test]
    fn pages_of_the_last_rounds_go_first_and_all_others_follow() {
        let mut heat = Heat::new(5000);
        for dirty in [[4000, 30, 7], [4001, 30, 7], [4001, 31, 7]] {
            let mut set = PageSet::empty(5000);
            for page in dirty {
                set.insert(PageIndex(page));
            }
            heat.end_interval(&set);
        }
        let mut pusher = Pusher::new(PageSet::full(5000), heat, PusherKind::Heat);
        let mut pages = Vec::new();
        pusher.take(7, &|_| 1, &mut pages);
        assert_eq!(pages, [7, 4001, 31, 30, 4000, 0, 1].map(PageIndex));
    }
}
