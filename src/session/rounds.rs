//! The source's pages while the guest still runs: pre-copy rounds and the freeze.
//!
//! All of this blocks and runs on a thread of its own; messages leave through a bounded channel, so
//! that encoding goes on while the link is busy and stops when it is far behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::frozen::FrozenPages;
use super::reader::{BATCH_PAGES, PageReader, Purpose, is_full};
use crate::codec::BaseCache;
use crate::codec::ladder::CodecChoice;
use crate::engine::Failure;
use crate::engine::policy::RoundSummary;
use crate::engine::precopy::PrecopyPlan;
use crate::engine::pusher::PusherKind;
use crate::memory::{DirtyTracker, GuestMemory, MemoryError, ReadWitness};
use crate::page::{PageBytes, PageIndex, PageRange, PageSet, Version};
use crate::report::Counters;

/// Changed pages that are encoded for trial to learn what a changed page costs.
const SAMPLE_PAGES: u64 = 256;

/// Reads, encodes and remembers pages of the running guest.
pub(super) struct RoundSender {
    memory: Arc<GuestMemory>,
    tracker: Option<Box<dyn DirtyTracker>>,
    plan: PrecopyPlan,
    bases: BaseCache,
    /// Must be told of everything that is sent, where the tracker wants to know.
    witness: Option<Arc<dyn ReadWitness>>,
    reader: PageReader,
    counters: Arc<Counters>,
    pusher: PusherKind,
}

impl RoundSender {
    /// A guest of which nothing was sent. `base_cache_bytes` bounds what is kept of sent pages.
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        base_cache_bytes: usize,
        codecs: Option<CodecChoice>,
        counters: Arc<Counters>,
        pusher: PusherKind,
    ) -> Self {
        let pages = memory.pages();
        RoundSender {
            plan: PrecopyPlan::new(pages),
            bases: BaseCache::new(base_cache_bytes, pages),
            memory,
            tracker: None,
            witness: None,
            reader: PageReader::new(Purpose::Round, codecs, None),
            counters,
            pusher,
        }
    }

    /// True when the guest's writes are being followed.
    pub(super) fn is_tracking(&self) -> bool {
        self.tracker.is_some()
    }

    /// Follows the guest's writes from now on: before the first page is read.
    pub(super) fn track(&mut self, mut tracker: Box<dyn DirtyTracker>) -> Result<(), MemoryError> {
        tracker.arm()?;
        self.witness = tracker.witness();
        self.tracker = Some(tracker);
        Ok(())
    }

    /// Which tracker it is.
    pub(super) fn tracker_name(&self) -> Option<&'static str> {
        self.tracker.as_ref().map(|tracker| tracker.name())
    }

    /// Pages changed since they were sent, as of the end of the last round.
    pub(super) fn dirty(&self) -> &PageSet {
        self.plan.dirty()
    }

    /// The destination could not apply these pages: send them whole next time.
    pub(super) fn forget(&mut self, pages: &[PageIndex]) {
        for page in pages {
            self.bases.forget(*page);
        }
        self.plan.mark_dirty(pages);
    }

    /// The link was lost in the last round, and the destination holds `held` of its pages: sends the
    /// others again, whole.
    pub(super) fn end_round_early(&mut self, held: &PageSet) {
        for page in self.plan.end_round_early(held).iter() {
            self.bases.forget(page);
        }
        self.tell_remaining();
    }

    /// Sends a round into `messages`. `None` when the channel is closed before: whoever closed it knows
    /// why.
    pub(super) fn send_round(
        &mut self,
        version: Version,
        messages: &mpsc::Sender<Bytes>,
    ) -> Result<Option<RoundSummary>, Failure> {
        let begin = Instant::now();
        let mut summary = RoundSummary::default();
        let mut outgoing = Outgoing { messages, buffer: Vec::new(), sent: 0, closed: false };
        let (mut taken, mut full, mut holes) = (Vec::new(), Vec::new(), Vec::new());
        self.plan.begin_round();
        while let Some(chunk) = self.plan.next_chunk() {
            self.collect(chunk)?;
            self.plan.take(chunk, &mut taken);
            self.split_holes(chunk, &taken, &mut full, &mut holes)?;
            let mut counts = self.reader.encode_zero_runs(version, &holes, &mut outgoing.buffer);
            for run in &holes {
                for hole in run.pages() {
                    self.bases.forget(hole);
                }
                if let Some(witness) = &self.witness {
                    witness.saw_holes(*run);
                }
            }
            self.counters.add_frames(&counts);
            // Of a guest of many GiB of holes, what tells of them fills messages too.
            if is_full(&outgoing.buffer) {
                outgoing.send(&mut self.reader);
            }
            for batch in full.chunks(BATCH_PAGES) {
                let RoundSender { memory, bases, reader, witness, .. } = self;
                let buffer = &mut outgoing.buffer;
                let batch_counts = reader.encode(memory, Some(bases), version, batch, buffer);
                if let Some(left_over) = reader.left_over() {
                    outgoing.send(reader);
                    outgoing.buffer = left_over;
                }
                for (page, copy) in batch.iter().zip(reader.copies()) {
                    remember(bases, *page, version, copy);
                    if let Some(witness) = witness {
                        witness.saw(*page, copy);
                    }
                }
                self.counters.add_frames(&batch_counts);
                summary.sent_pages += batch.len() as u64;
                counts += batch_counts;
                if is_full(&outgoing.buffer) {
                    outgoing.send(&mut self.reader);
                }
            }
            summary.sent_bytes += counts.total_bytes();
            self.tell_remaining();
            if outgoing.closed {
                return Ok(None);
            }
        }
        outgoing.send(&mut self.reader);
        self.collect(PageRange::new(0, self.memory.pages()))?;
        self.plan.end_round();
        self.tell_remaining();
        summary.messages = outgoing.sent;
        summary.duration = begin.elapsed();
        summary.dirty_pages = self.plan.dirty_pages();
        summary.bytes_per_dirty_page = self.cost_of_a_dirty_page(version);
        Ok(Some(summary))
    }

    /// The guest is stopped and its device state saved: collects its last writes. What is left is for
    /// [`FrozenPages`]; writes are followed until this sender is dropped, in case the guest runs on here.
    pub(super) fn freeze(&mut self, version: Version) -> Result<FrozenPages, Failure> {
        let all = PageRange::new(0, self.memory.pages());
        self.collect(all)?;
        let populated = self.populated_of(&self.plan.unsent())?;
        let remainder = self.plan.remainder(&populated);
        let bases = std::mem::replace(&mut self.bases, BaseCache::new(0, self.memory.pages()));
        let (memory, counters) = (self.memory.clone(), self.counters.clone());
        let order = (self.plan.take_heat(), self.pusher);
        Ok(FrozenPages::new(memory, bases, version, remainder, order, counters))
    }

    fn collect(&mut self, range: PageRange) -> Result<(), MemoryError> {
        match &mut self.tracker {
            Some(tracker) => tracker.collect(range, self.plan.dirty_mut()),
            None => Ok(()),
        }
    }

    /// Those of `pages` that are not holes, as quickly as can be told: the guest stands still.
    fn populated_of(&self, pages: &PageSet) -> Result<PageSet, MemoryError> {
        let Some(witness) = &self.witness else { return self.memory.populated_of(pages) };
        let mut populated = witness.known_populated(pages);
        let mut others = pages.clone();
        others.subtract(&populated);
        populated.union_with(&self.memory.populated_of(&others)?);
        Ok(populated)
    }

    fn tell_remaining(&self) {
        let remaining = self.plan.left_in_round() + self.plan.dirty_pages();
        self.counters.remaining_pages.store(remaining, std::sync::atomic::Ordering::Relaxed);
    }

    /// Splits `taken` into pages with content and runs of holes, which are never read: reading a hole
    /// of shared memory through a mapping would fill it.
    fn split_holes(
        &self,
        chunk: PageRange,
        taken: &[PageIndex],
        full: &mut Vec<PageIndex>,
        holes: &mut Vec<PageRange>,
    ) -> Result<(), MemoryError> {
        full.clear();
        holes.clear();
        let populated = self.memory.populated_runs(chunk)?;
        let mut runs = populated.iter().peekable();
        for page in taken {
            while runs.next_if(|run| run.end <= *page).is_some() {}
            if runs.peek().is_some_and(|run| run.contains(*page)) {
                full.push(*page);
            } else {
                match holes.last_mut() {
                    Some(run) if run.end == *page => run.end = PageIndex(page.0 + 1),
                    _ => holes.push(PageRange::new(page.0, page.0 + 1)),
                }
            }
        }
        Ok(())
    }

    /// Encodes some of the dirty pages, evenly drawn, without sending them.
    fn cost_of_a_dirty_page(&mut self, version: Version) -> Option<u64> {
        let next = version.next()?;
        let step = self.plan.dirty_pages().div_ceil(SAMPLE_PAGES).max(1);
        let sample: Vec<PageIndex> = self.plan.dirty_mut().iter().step_by(step as usize).collect();
        let is_populated = |page: &PageIndex| {
            let runs = self.memory.populated_runs(PageRange::new(page.0, page.0 + 1));
            runs.is_ok_and(|runs| !runs.is_empty())
        };
        let populated: Vec<PageIndex> = sample.iter().copied().filter(is_populated).collect();
        let mut bytes = 0;
        for batch in populated.chunks(BATCH_PAGES) {
            let mut trial = Vec::new();
            let bases = Some(&self.bases);
            let counts = self.reader.encode(&self.memory, bases, next, batch, &mut trial);
            bytes += counts.total_bytes();
        }
        bytes.checked_div(sample.len() as u64)
    }
}

/// Keeps the bytes that were sent. A zero page is not worth its place: it is told in a few bits.
fn remember(bases: &mut BaseCache, page: PageIndex, version: Version, bytes: &PageBytes) {
    if version > Version(1) {
        // It was changed since it was sent: of the kind that changes again.
        bases.touch(page);
    }
    if crate::codec::is_zero(bytes) || !bases.insert(page, version, bytes) {
        bases.forget(page);
    }
}

/// Frames on their way into the channel.
struct Outgoing<'a> {
    messages: &'a mpsc::Sender<Bytes>,
    buffer: Vec<u8>,
    sent: u64,
    closed: bool,
}

impl Outgoing<'_> {
    fn send(&mut self, reader: &mut PageReader) {
        if self.buffer.is_empty() {
            return;
        }
        let message = Bytes::from(std::mem::take(&mut self.buffer));
        let (bytes, begin) = (message.len(), Instant::now());
        self.sent += 1;
        self.closed |= self.messages.blocking_send(message).is_err();
        reader.sent(bytes, begin.elapsed());
    }
}

/// What a duration is in the report's unit.
pub(super) fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e5).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MemoryLayout, RegionLayout};
    use crate::transport::Lane;

    #[test]
    fn what_tells_of_very_many_holes_fits_messages() {
        let region = RegionLayout { name: "ram0".to_owned(), size_bytes: 4 << 30 };
        let memory = Arc::new(GuestMemory::create(&MemoryLayout::new(vec![region])).unwrap());
        let pages = memory.pages();
        let mut sender = RoundSender::new(memory, 0, None, Arc::default(), PusherKind::default());
        let (messages, mut sent) = mpsc::channel(1 << 10);
        sender.send_round(Version(1), &messages).unwrap();
        let every_other: Vec<PageIndex> = (0..pages).step_by(2).map(PageIndex).collect();
        sender.forget(&every_other);
        let summary = sender.send_round(Version(2), &messages).unwrap().unwrap();
        assert!(summary.sent_bytes > Lane::Push.limit_bytes() as u64, "it would fit one message");
        while let Ok(message) = sent.try_recv() {
            assert!(message.len() <= Lane::Push.limit_bytes());
        }
    }
}
