//! Which pages a pre-copy round still has to send.
//!
//! The plan walks the guest chunk by chunk. Just before a chunk is read, its newest writes are
//! collected from the tracker, so that a page which was dirtied since the round began but before its
//! turn is sent once, not twice.

use super::heat::Heat;
use crate::page::{PageIndex, PageRange, PageSet};

/// Pages looked at in one go: 4 MiB of guest memory.
pub const CHUNK_PAGES: u64 = 1024;

/// The page sets of a pre-copy.
#[derive(Debug)]
pub struct PrecopyPlan {
    /// To be sent in this round.
    todo: PageSet,
    /// Changed since their last sending.
    dirty: PageSet,
    /// Sent at least once.
    sent: PageSet,
    /// Sent in this round.
    sent_now: PageSet,
    heat: Heat,
    cursor: u64,
}

impl PrecopyPlan {
    /// A guest of `pages` pages of which nothing was sent.
    pub fn new(pages: u64) -> Self {
        PrecopyPlan {
            todo: PageSet::empty(pages),
            dirty: PageSet::empty(pages),
            sent: PageSet::empty(pages),
            sent_now: PageSet::empty(pages),
            heat: Heat::new(pages),
            cursor: 0,
        }
    }

    /// Begins a round: the first takes every page, a later one those that are dirty.
    pub fn begin_round(&mut self) {
        let pages = self.todo.pages();
        self.todo = if self.sent.is_empty() {
            PageSet::full(pages)
        } else {
            std::mem::replace(&mut self.dirty, PageSet::empty(pages))
        };
        self.sent_now = PageSet::empty(pages);
        self.cursor = 0;
    }

    /// The link was lost in this round, or before it was acknowledged, and of the round's pages the
    /// destination holds those in `held`. All others, with those that were not sent yet, go in the
    /// next round. Gives the pages that were sent and have not arrived: nothing is known of their
    /// older copies at the destination.
    ///
    /// Of `held` only pages that were sent in this round are believed.
    pub fn end_round_early(&mut self, held: &PageSet) -> PageSet {
        let pages = self.todo.pages();
        let mut lost = std::mem::replace(&mut self.sent_now, PageSet::empty(pages));
        lost.subtract(held);
        self.dirty.union_with(&lost);
        self.dirty.union_with(&std::mem::replace(&mut self.todo, PageSet::empty(pages)));
        lost
    }

    /// The next chunk that has pages to send in this round; the caller collects its writes into
    /// [`Self::dirty_mut`] and then takes its pages.
    pub fn next_chunk(&mut self) -> Option<PageRange> {
        let first = self.todo.first_from(PageIndex(self.cursor))?;
        let start = first.0 / CHUNK_PAGES * CHUNK_PAGES;
        let end = (start + CHUNK_PAGES).min(self.todo.pages());
        self.cursor = end;
        Some(PageRange::new(start.max(first.0), end))
    }

    /// A round is sent and the writes since then are collected: notes which pages are dirty again.
    pub fn end_round(&mut self) {
        self.heat.end_round(&self.dirty);
    }

    /// How hot each page is, as of the last [`Self::end_round`].
    pub fn heat(&self) -> &Heat {
        &self.heat
    }

    /// Takes that out, for good: the guest is frozen.
    pub fn take_heat(&mut self) -> Heat {
        std::mem::replace(&mut self.heat, Heat::new(0))
    }

    /// Where the tracker's findings go.
    pub fn dirty_mut(&mut self) -> &mut PageSet {
        &mut self.dirty
    }

    /// The pages of `chunk` to send now, which counts as sent from here on.
    pub fn take(&mut self, chunk: PageRange, into: &mut Vec<PageIndex>) {
        into.clear();
        let mut at = chunk.start;
        while let Some(page) = self.todo.first_from(at).filter(|page| *page < chunk.end) {
            into.push(page);
            at = PageIndex(page.0 + 1);
        }
        for page in into.iter() {
            self.todo.remove(*page);
            self.dirty.remove(*page);
            self.sent.insert(*page);
            self.sent_now.insert(*page);
        }
    }

    /// Pages that must be sent again whatever the tracker says.
    pub fn mark_dirty(&mut self, pages: &[PageIndex]) {
        for page in pages {
            if page.0 < self.dirty.pages() {
                self.dirty.insert(*page);
            }
        }
    }

    /// Pages changed since their last sending, as far as was collected.
    pub fn dirty(&self) -> &PageSet {
        &self.dirty
    }

    /// How many these are.
    pub fn dirty_pages(&self) -> u64 {
        self.dirty.len()
    }

    /// Pages of this round not yet taken.
    pub fn left_in_round(&self) -> u64 {
        self.todo.len()
    }

    /// Pages sent so far, at whatever version.
    pub fn sent(&self) -> &PageSet {
        &self.sent
    }

    /// The pages of which the destination does not hold the content, as far as was collected.
    pub fn unsent(&self) -> PageSet {
        let mut unsent = PageSet::full(self.sent.pages());
        unsent.subtract(&self.sent);
        unsent.union_with(&self.dirty);
        unsent
    }

    /// The guest is stopped and its last writes are collected: what the destination still needs.
    /// `populated`: of [`Self::unsent`] those that are not holes now.
    pub fn remainder(&self, populated: &PageSet) -> Remainder {
        let mut need = self.unsent();
        let mut zero = need.clone();
        zero.subtract(populated);
        need.subtract(&zero);
        Remainder { need, zero }
    }
}

/// What the destination still needs at the freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remainder {
    /// Pages whose content must be sent.
    pub need: PageSet,
    /// Holes that the destination does not know to be zero.
    pub zero: PageSet,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A guest of version numbers: what a page holds now, and what of it was sent last.
    struct Model {
        now: Vec<u32>,
        sent: Vec<Option<u32>>,
        /// Written since last collected.
        tracked: PageSet,
    }

    proptest! {
        /// Writes fall between any two steps; at the freeze, a page that is neither needed nor zero
        /// must be at the destination as it is.
        #[test]
        fn what_is_not_in_the_remainder_was_sent_as_it_is(
            pages in 1u64..4000,
            writes in prop::collection::vec((any::<u64>(), 0u8..4), 0..120),
            rounds in 0usize..4,
            holes in prop::collection::vec(any::<u64>(), 0..10),
            losses in prop::collection::vec(prop::option::of((0u64..5, any::<u64>())), 4),
        ) {
            let mut model = Model {
                now: vec![0; pages as usize],
                sent: vec![None; pages as usize],
                tracked: PageSet::empty(pages),
            };
            let mut plan = PrecopyPlan::new(pages);
            let mut writes = writes.into_iter();
            let mut write_some = |model: &mut Model, slot: u8| {
                for (page, when) in writes.by_ref().take(3) {
                    if when == slot || when == 3 {
                        let page = page % pages;
                        model.now[page as usize] += 1;
                        model.tracked.insert(PageIndex(page));
                    }
                }
            };
            let mut taken = Vec::new();
            for loss in losses.into_iter().take(rounds) {
                plan.begin_round();
                let before = model.sent.clone();
                let (mut chunks, mut sent_now) = (0, PageSet::empty(pages));
                while let Some(chunk) = plan.next_chunk() {
                    // The link is lost in the middle of the round.
                    if loss.is_some_and(|(after_chunks, _)| chunks >= after_chunks) {
                        break;
                    }
                    chunks += 1;
                    write_some(&mut model, 0);
                    for page in chunk.pages() {
                        if model.tracked.remove(page) {
                            plan.dirty_mut().insert(page);
                        }
                    }
                    write_some(&mut model, 1);
                    plan.take(chunk, &mut taken);
                    for page in &taken {
                        model.sent[page.0 as usize] = Some(model.now[page.0 as usize]);
                        sent_now.insert(*page);
                    }
                    write_some(&mut model, 2);
                }
                if let Some((_, lottery)) = loss {
                    // The destination says it holds pages that were never sent in this round too.
                    let mut held = PageSet::full(pages);
                    let mut lost = PageSet::empty(pages);
                    for page in (0..pages).filter(|page| lottery >> (page % 64) & 1 == 1) {
                        held.remove(PageIndex(page));
                        if sent_now.contains(PageIndex(page)) {
                            lost.insert(PageIndex(page));
                            model.sent[page as usize] = before[page as usize];
                        }
                    }
                    prop_assert_eq!(plan.end_round_early(&held), lost);
                }
            }
            plan.dirty_mut().union_with(&model.tracked);
            let mut populated = PageSet::full(pages);
            for hole in holes {
                populated.remove(PageIndex(hole % pages));
            }
            let remainder = plan.remainder(&populated);
            for page in (0..pages).map(PageIndex) {
                let current = model.sent[page.0 as usize] == Some(model.now[page.0 as usize]);
                let told = remainder.need.contains(page) || remainder.zero.contains(page);
                prop_assert!(current || told, "{page:?} would be stale");
                prop_assert!(!(remainder.need.contains(page) && remainder.zero.contains(page)));
                prop_assert!(!remainder.need.contains(page) || populated.contains(page));
            }
        }
    }

    #[test]
    fn the_first_round_takes_every_page_once() {
        let mut plan = PrecopyPlan::new(2500);
        plan.begin_round();
        let (mut all, mut taken) = (Vec::new(), Vec::new());
        while let Some(chunk) = plan.next_chunk() {
            plan.take(chunk, &mut taken);
            all.append(&mut taken);
        }
        assert_eq!(all, (0..2500).map(PageIndex).collect::<Vec<_>>());
        assert_eq!(plan.left_in_round(), 0);
        plan.begin_round();
        assert_eq!(plan.next_chunk(), None);
        plan.dirty_mut().insert(PageIndex(7));
        plan.end_round();
        assert_eq!((plan.heat().of(PageIndex(7)), plan.heat().of(PageIndex(8))), (128, 0));
    }
}
