//! Which pages a pre-copy round still has to send, and in which order.
//!
//! The plan walks the guest chunk by chunk. Just before a chunk is read, its newest writes are
//! collected from the tracker, so that a page which was dirtied since the round began but before its
//! turn is sent once, not twice.
//!
//! What is written to all the time is worth little before the end: it is sent at the end of the first round
//! that has it, so that its copy there is as young as can be and its last change small; and in later
//! rounds it is held back, since it will be dirty again at the freeze whatever is sent now.

use super::heat::Heat;
use crate::page::{PageIndex, PageRange, PageSet};

/// Pages looked at in one go: 4 MiB of guest memory.
pub const CHUNK_PAGES: u64 = super::heat::CHUNK_PAGES;

/// The page sets of a pre-copy.
#[derive(Debug)]
pub struct PrecopyPlan {
    /// To be sent in this round.
    todo: PageSet,
    /// To be sent at the end of this round: hot pages.
    late: PageSet,
    /// The end of this round has come.
    is_late: bool,
    /// What the tracker has found and nobody has looked at yet.
    found: PageSet,
    /// Changed since their last sending.
    dirty: PageSet,
    /// Written to since the interval began.
    fresh: PageSet,
    /// Sent, and not known to be lost.
    sent: PageSet,
    /// Sent in this round.
    sent_now: PageSet,
    has_begun: bool,
    heat: Heat,
    cursor: u64,
}

impl PrecopyPlan {
    /// A guest of `pages` pages of which nothing was sent.
    pub fn new(pages: u64) -> Self {
        let empty = || PageSet::empty(pages);
        PrecopyPlan {
            todo: empty(),
            late: empty(),
            is_late: false,
            found: empty(),
            dirty: empty(),
            fresh: empty(),
            sent: empty(),
            sent_now: empty(),
            has_begun: false,
            heat: Heat::new(pages),
            cursor: 0,
        }
    }

    /// Begins a round: the first takes every page, a later one those that are dirty and likely to
    /// stay as they are sent.
    pub fn begin_round(&mut self) {
        let pages = self.todo.pages();
        self.todo.clear();
        self.late.clear();
        self.is_late = false;
        self.sent_now.clear();
        self.cursor = 0;
        if !std::mem::replace(&mut self.has_begun, true) {
            self.todo.insert_range(PageRange::new(0, pages));
        } else {
            self.take_in(PageRange::new(0, pages));
            std::mem::swap(&mut self.todo, &mut self.dirty);
            let mut held_back = PageSet::empty(pages);
            for page in self.held_back_of(&self.todo) {
                held_back.insert(page);
            }
            self.todo.subtract(&held_back);
            self.dirty.union_with(&held_back);
        }
        self.put_hot_pages_late();
    }

    /// The pages of this round that were not sent yet. Until the round ends no others are sent.
    pub fn left(&self) -> PageSet {
        let mut left = self.todo.clone();
        left.union_with(&self.late);
        left
    }

    /// The link was lost in this round, or before it was acknowledged, and of the round's pages the
    /// destination holds those in `held`. All others, with those that were not sent yet, go in the
    /// next round. Gives the pages that were sent and have not arrived: nothing is known of their
    /// older copies at the destination.
    ///
    /// Of `held` only pages that were sent in this round are believed.
    pub fn end_round_early(&mut self, held: &PageSet) -> PageSet {
        let pages = self.todo.pages();
        let take = |set: &mut PageSet| std::mem::replace(set, PageSet::empty(pages));
        let mut lost = take(&mut self.sent_now);
        lost.subtract(held);
        self.sent.subtract(&lost);
        self.dirty.union_with(&lost);
        self.dirty.union_with(&take(&mut self.todo));
        self.dirty.union_with(&take(&mut self.late));
        lost
    }

    /// The next chunk that has pages to send in this round; the caller collects its writes into
    /// [`Self::found_mut`] and then takes its pages. A chunk comes twice where some of its pages are hot.
    pub fn next_chunk(&mut self) -> Option<PageRange> {
        let mut first = self.todo.first_from(PageIndex(self.cursor));
        if first.is_none() && !self.is_late {
            self.is_late = true;
            // Empty, since a chunk's pages are taken together and none join a chunk that is behind.
            std::mem::swap(&mut self.todo, &mut self.late);
            first = self.todo.first_from(PageIndex(0));
        }
        let first = first?;
        let start = first.0 / CHUNK_PAGES * CHUNK_PAGES;
        let end = (start + CHUNK_PAGES).min(self.todo.pages());
        self.cursor = end;
        Some(PageRange::new(start.max(first.0), end))
    }

    /// All writes are collected: an interval is over, by itself or with the round that has been sent. Notes
    /// which pages were written to in it.
    pub fn end_interval(&mut self) {
        let pages = self.found.pages();
        self.take_in(PageRange::new(0, pages));
        self.heat.end_interval(&self.fresh);
        self.fresh.clear();
        self.put_hot_pages_late();
    }

    /// Pages written to in this interval, as far as was collected.
    pub fn fresh(&self) -> impl Iterator<Item = PageIndex> {
        let found = self.found.iter().filter(|page| !self.fresh.contains(*page));
        self.fresh.iter().chain(found)
    }

    /// How hot each page is, as of the last [`Self::end_interval`].
    pub fn heat(&self) -> &Heat {
        &self.heat
    }

    /// Takes that out, for good: the guest is frozen.
    pub fn take_heat(&mut self) -> Heat {
        std::mem::replace(&mut self.heat, Heat::new(0))
    }

    /// Where the tracker's findings go.
    pub fn found_mut(&mut self) -> &mut PageSet {
        &mut self.found
    }

    /// The pages of `chunk` to send now, which counts as sent from here on.
    pub fn take(&mut self, chunk: PageRange, into: &mut Vec<PageIndex>) {
        self.take_in(chunk);
        into.clear();
        into.extend(self.todo.iter_in(chunk));
        self.dirty.subtract_in(chunk, &self.todo);
        self.sent.union_in(chunk, &self.todo);
        self.sent_now.union_in(chunk, &self.todo);
        self.todo.remove_range(chunk);
    }

    /// These pages, taken in the first round, are not sent now after all, but in the next one.
    pub fn put_off(&mut self, pages: &[PageIndex]) {
        for page in pages {
            self.sent.remove(*page);
            self.sent_now.remove(*page);
            self.dirty.insert(*page);
        }
    }

    /// The destination does not have these pages: they must be sent again whatever the tracker says.
    pub fn mark_dirty(&mut self, pages: &[PageIndex]) {
        for page in pages {
            if page.0 < self.dirty.pages() {
                self.dirty.insert(*page);
                self.sent.remove(*page);
            }
        }
    }

    /// Pages changed since their last sending, as far as was collected and taken in.
    pub fn dirty(&self) -> &PageSet {
        &self.dirty
    }

    /// How many these are.
    pub fn dirty_pages(&self) -> u64 {
        self.dirty.len()
    }

    /// How many of them the next round would leave to the freeze.
    pub fn held_back_pages(&self) -> u64 {
        self.held_back_of(&self.dirty).count() as u64
    }

    /// Pages of this round not yet taken.
    pub fn left_in_round(&self) -> u64 {
        self.todo.len() + self.late.len()
    }

    /// Pages sent so far, at whatever version, and not known to be lost.
    pub fn sent(&self) -> &PageSet {
        &self.sent
    }

    /// The pages of which the destination does not hold the content, as far as was collected.
    pub fn unsent(&self) -> PageSet {
        let mut unsent = PageSet::full(self.sent.pages());
        unsent.subtract(&self.sent);
        unsent.union_with(&self.dirty);
        unsent.union_with(&self.found);
        unsent
    }

    /// What was found in `range` is dirty.
    fn take_in(&mut self, range: PageRange) {
        if range.len() == self.found.pages() {
            self.dirty.union_with(&self.found);
            self.fresh.union_with(&self.found);
            self.found.clear();
            return;
        }
        self.dirty.union_in(range, &self.found);
        self.fresh.union_in(range, &self.found);
        self.found.remove_range(range);
    }

    /// A copy that the destination has is the base of a restless page's last change; what it has none
    /// of is not held back.
    fn held_back_of<'a>(&'a self, pages: &'a PageSet) -> impl Iterator<Item = PageIndex> + 'a {
        pages.iter().filter(|page| self.heat.is_restless(*page) && self.sent.contains(*page))
    }

    fn put_hot_pages_late(&mut self) {
        if self.is_late || self.todo.is_empty() {
            return;
        }
        for start in (0..self.todo.pages()).step_by(CHUNK_PAGES as usize) {
            if self.heat.is_cold(PageIndex(start)) {
                continue;
            }
            for page in (start..(start + CHUNK_PAGES).min(self.todo.pages())).map(PageIndex) {
                if self.heat.is_hot(page) && self.todo.remove(page) {
                    self.late.insert(page);
                }
            }
        }
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

impl Remainder {
    /// The guest is stopped and its last writes are collected: of what is [`PrecopyPlan::unsent`], `populated` are
    /// not holes now.
    pub fn of(unsent: PageSet, populated: PageSet) -> Self {
        let (mut need, mut zero) = (populated, unsent);
        need.intersect_with(&zero);
        zero.subtract(&need);
        Remainder { need, zero }
    }
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
            writes in prop::collection::vec((0u64..1 << 40, 0u8..4), 0..120),
            narrow in 1u64..4000,
            rounds in 0usize..8,
            holes in prop::collection::vec(any::<u64>(), 0..10),
            losses in prop::collection::vec(prop::option::of((0u64..5, any::<u64>())), 8),
            scans in any::<u64>(),
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
                        // Few pages are written to again and again, so that some are hot.
                        let page = page % narrow.min(pages);
                        model.now[page as usize] += 1;
                        model.tracked.insert(PageIndex(page));
                    }
                }
            };
            let (mut taken, mut steps) = (Vec::new(), 0);
            let lottery_of = |lottery: u64, step: u32| lottery >> (step % 64) & 1 == 1;
            for (round, loss) in losses.into_iter().take(rounds).enumerate() {
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
                            plan.found_mut().insert(page);
                        }
                    }
                    write_some(&mut model, 1);
                    plan.take(chunk, &mut taken);
                    if round == 0 && lottery_of(scans, steps + 7) {
                        let put_off: Vec<_> = taken.iter().copied().step_by(3).collect();
                        plan.put_off(&put_off);
                        taken.retain(|page| !put_off.contains(page));
                    }
                    for page in &taken {
                        model.sent[page.0 as usize] = Some(model.now[page.0 as usize]);
                        sent_now.insert(*page);
                    }
                    write_some(&mut model, 2);
                    steps += 1;
                    if lottery_of(scans, steps) {
                        let tracked =
                            std::mem::replace(&mut model.tracked, PageSet::empty(pages));
                        plan.found_mut().union_with(&tracked);
                        plan.end_interval();
                    }
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
            plan.found_mut().union_with(&model.tracked);
            let mut populated = PageSet::full(pages);
            for hole in holes {
                populated.remove(PageIndex(hole % pages));
            }
            let remainder = Remainder::of(plan.unsent(), populated.clone());
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
        plan.found_mut().insert(PageIndex(7));
        plan.end_interval();
        assert_eq!((plan.heat().of(PageIndex(7)), plan.heat().of(PageIndex(8))), (128, 0));
    }

    /// Sends a round during which, after each chunk, `written` is written to and an interval ends.
    fn round_of(plan: &mut PrecopyPlan, written: &[u64]) -> Vec<u64> {
        plan.begin_round();
        let (mut all, mut taken) = (Vec::new(), Vec::new());
        while let Some(chunk) = plan.next_chunk() {
            plan.take(chunk, &mut taken);
            all.extend(taken.iter().map(|page| page.0));
            written.iter().for_each(|page| {
                plan.found_mut().insert(PageIndex(*page));
            });
            plan.end_interval();
        }
        all
    }

    #[test]
    fn a_hot_page_is_sent_at_the_end_of_the_first_round_and_then_not_before_the_freeze() {
        let mut plan = PrecopyPlan::new(8 * CHUNK_PAGES);
        let hot = 5 * CHUNK_PAGES + 3;
        let sent = round_of(&mut plan, &[hot]);
        assert_eq!((sent.len(), sent.last()), (8 * CHUNK_PAGES as usize, Some(&hot)));
        assert_eq!((plan.dirty_pages(), plan.held_back_pages()), (1, 1));
        plan.found_mut().insert(PageIndex(9));
        assert_eq!(round_of(&mut plan, &[hot]), [9]);
        let need = Remainder::of(plan.unsent(), PageSet::full(8 * CHUNK_PAGES)).need;
        assert_eq!(need.iter().collect::<Vec<_>>(), [PageIndex(hot)]);
    }

    #[test]
    fn a_hot_page_that_the_destination_lost_is_sent_in_a_round() {
        let mut plan = PrecopyPlan::new(8 * CHUNK_PAGES);
        let hot = 5 * CHUNK_PAGES + 3;
        round_of(&mut plan, &[hot]);
        plan.mark_dirty(&[PageIndex(hot)]);
        assert_eq!(plan.held_back_pages(), 0);
        assert_eq!(round_of(&mut plan, &[hot]), [hot]);
    }
}
