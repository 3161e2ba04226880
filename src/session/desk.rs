//! Who gives out a round's pages: the one place where the encoders of a round meet.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::reader::BATCH_PAGES;
use crate::codec::SentPages;
use crate::engine::precopy::PrecopyPlan;
use crate::memory::{DirtyTracker, GuestMemory, MemoryError};
use crate::page::{PageIndex, PageRange};
use crate::report::Counters;

/// At the begin of a round the guest's writes are looked at so often, to learn what is hot while most of
/// the round is still to come;
const FIRST_INTERVAL: Duration = Duration::from_millis(50);
/// so many times,
const FIRST_INTERVALS: u32 = 4;
/// and then so often: each look makes the guest's next write to a page a little slower.
const INTERVAL: Duration = Duration::from_millis(500);
/// Of a guest so large that a look takes long, looks take no more than this share of the time.
const LOOKING: u32 = 20;

/// Runs of holes that are told together,
const MAX_HOLE_RUNS: usize = 1024;
/// and about so many pages of them: finding more, 4 GiB, would keep the looks at the guest's writes waiting.
const MAX_HOLE_PAGES: u64 = 1 << 20;

/// Pages for one thread to send.
#[derive(Debug, Default)]
pub(super) struct Task {
    /// Pages with content, ascending.
    pub(super) pages: Vec<PageIndex>,
    /// Holes, ascending.
    pub(super) holes: Vec<PageRange>,
}

/// The round's plan and the guest's writes.
pub(super) struct Desk<'a> {
    memory: &'a GuestMemory,
    sent: &'a SentPages,
    plan: &'a mut PrecopyPlan,
    tracker: Option<&'a mut (dyn DirtyTracker + 'static)>,
    /// Writes are collected at the end of the round only, when the guest stands still.
    at_rest: bool,
    counters: &'a Counters,
    /// Pages of chunks that were begun.
    begun: Task,
    taken: Vec<PageIndex>,
    intervals: u32,
    /// When the guest's writes are looked at next, other than those to a chunk.
    next_look: Instant,
}

impl<'a> Desk<'a> {
    pub(super) fn new(
        memory: &'a GuestMemory,
        sent: &'a SentPages,
        plan: &'a mut PrecopyPlan,
        (tracker, at_rest): (Option<&'a mut (dyn DirtyTracker + 'static)>, bool),
        counters: &'a Counters,
    ) -> Self {
        Desk {
            memory,
            sent,
            plan,
            tracker,
            at_rest,
            counters,
            begun: Task::default(),
            taken: Vec::new(),
            intervals: 0,
            next_look: Instant::now() + FIRST_INTERVAL,
        }
    }

    /// The next pages to send, which are to be read at once; false when the round is sent.
    pub(super) fn next(&mut self, task: &mut Task) -> Result<bool, MemoryError> {
        self.look_when_due()?;
        task.pages.clear();
        task.holes.clear();
        while self.begun.pages.len() < BATCH_PAGES
            && self.begun.holes.len() < MAX_HOLE_RUNS
            && self.begun.holes.iter().map(PageRange::len).sum::<u64>() < MAX_HOLE_PAGES
        {
            let Some(chunk) = self.plan.next_chunk() else { break };
            if let Some(tracker) = self.tracker.as_mut().filter(|_| !self.at_rest) {
                tracker.collect(chunk, self.plan.found_mut())?;
            }
            self.plan.take(chunk, &mut self.taken);
            self.split_holes(chunk)?;
        }
        let left = self.begun.pages.split_off(self.begun.pages.len().min(BATCH_PAGES));
        task.pages.append(&mut self.begun.pages);
        task.holes.append(&mut self.begun.holes);
        self.begun.pages = left;
        // The end of the round, with its hot pages, begins at the front of the guest again.
        task.pages.sort_unstable();
        task.holes.sort_unstable_by_key(|run| run.start);
        self.tell_remaining();
        Ok(!task.pages.is_empty() || !task.holes.is_empty())
    }

    /// These are not sent in this round after all.
    pub(super) fn put_off(&mut self, pages: &[PageIndex]) {
        self.plan.put_off(pages);
        self.counters.put_off_pages.fetch_add(pages.len() as u64, Ordering::Relaxed);
    }

    /// All is sent: collects what was written meanwhile.
    pub(super) fn end_round(&mut self) -> Result<(), MemoryError> {
        self.look()?;
        self.tell_remaining();
        Ok(())
    }

    fn look_when_due(&mut self) -> Result<(), MemoryError> {
        let begin = Instant::now();
        let cheap = self.tracker.as_ref().is_some_and(|tracker| tracker.is_quick());
        if begin < self.next_look || !cheap || self.at_rest {
            return Ok(());
        }
        self.look()?;
        self.intervals += 1;
        let interval = if self.intervals < FIRST_INTERVALS { FIRST_INTERVAL } else { INTERVAL };
        self.next_look = begin + interval.max(begin.elapsed() * LOOKING);
        Ok(())
    }

    /// Collects all writes, which ends an interval.
    fn look(&mut self) -> Result<(), MemoryError> {
        let all = PageRange::new(0, self.memory.pages());
        if let Some(tracker) = &mut self.tracker {
            tracker.collect(all, self.plan.found_mut())?;
        }
        for page in self.plan.fresh() {
            self.sent.touch(page);
        }
        self.plan.end_interval();
        Ok(())
    }

    /// Splits what was taken of `chunk` into pages with content and runs of holes, which are never read:
    /// reading a hole of shared memory through a mapping would fill it.
    fn split_holes(&mut self, chunk: PageRange) -> Result<(), MemoryError> {
        let Task { pages, holes } = &mut self.begun;
        let populated = self.memory.populated_runs(chunk)?;
        let mut runs = populated.iter().peekable();
        for page in &self.taken {
            while runs.next_if(|run| run.end <= *page).is_some() {}
            if runs.peek().is_some_and(|run| run.contains(*page)) {
                pages.push(*page);
            } else {
                match holes.last_mut() {
                    Some(run) if run.end == *page => run.end = PageIndex(page.0 + 1),
                    _ => holes.push(PageRange::new(page.0, page.0 + 1)),
                }
            }
        }
        Ok(())
    }

    fn tell_remaining(&self) {
        // A page that was written to while it waits for its turn is in both: the guest is the limit.
        let remaining = self.plan.left_in_round() + self.plan.dirty_pages();
        let remaining = remaining.min(self.memory.pages());
        self.counters.remaining_pages.store(remaining, Ordering::Relaxed);
    }
}
