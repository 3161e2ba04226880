//! The source's pages while the guest still runs: pre-copy rounds and the freeze.
//!
//! All of this blocks and runs on threads of its own. Each core encodes: a thread takes the next pages
//! from the [`Desk`], which looks for the guest's newest writes just before it gives them out, and then
//! works alone. Messages leave through a bounded channel, so that encoding goes on while the link is busy
//! and stops when it is far behind.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::desk::{Desk, Task};
use super::frozen::FrozenPages;
use super::pace::Pace;
use super::reader::{Against, BATCH_PAGES, Landed, PageReader, Purpose, is_full};
use super::standstill::Standstill;
use crate::codec::ladder::CodecChoice;
use crate::codec::{CodecCounts, SentLimits, SentPages};
use crate::engine::Failure;
use crate::engine::policy::RoundSummary;
use crate::engine::precopy::{PrecopyPlan, Remainder};
use crate::engine::pusher::PusherKind;
use crate::memory::{DirtyTracker, GuestMemory, MemoryError, ReadWitness};
use crate::page::{PageIndex, PageRange, PageSet, Version};
use crate::report::Counters;
use crate::transport::Buffers;

/// Changed pages that are encoded for trial to learn what a changed page costs.
const SAMPLE_PAGES: u64 = 256;

/// How pages are encoded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoding {
    /// Threads that do it.
    pub(super) encoders: usize,
    /// The operator's choice of codecs.
    pub(super) codecs: Option<CodecChoice>,
    /// How much of what is sent may be remembered.
    pub(super) limits: SentLimits,
}

/// Reads, encodes and remembers pages of the running guest.
pub(super) struct RoundSender {
    memory: Arc<GuestMemory>,
    tracker: Option<Box<dyn DirtyTracker>>,
    /// Where devices write past the page tables.
    standstill: Option<Standstill>,
    plan: PrecopyPlan,
    sent: Arc<SentPages>,
    /// Must be told of everything that is sent, where the tracker wants to know.
    witness: Option<Arc<dyn ReadWitness>>,
    readers: Vec<PageReader>,
    counters: Arc<Counters>,
    pusher: PusherKind,
    pace: Arc<Pace>,
    buffers: Buffers,
}

impl RoundSender {
    /// A guest of which nothing was sent.
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        encoding: Encoding,
        counters: Arc<Counters>,
        pusher: PusherKind,
    ) -> Self {
        let pages = memory.pages();
        let encoders = encoding.encoders.max(1);
        let pace = Arc::new(Pace::new(encoders, None));
        let reader = || PageReader::new(Purpose::Round, encoding.codecs, pace.clone());
        RoundSender {
            plan: PrecopyPlan::new(pages),
            sent: Arc::new(SentPages::new(encoding.limits, pages)),
            memory,
            tracker: None,
            standstill: None,
            witness: None,
            readers: (0..encoders).map(|_| reader()).collect(),
            counters,
            pusher,
            pace,
            buffers: Buffers::default(),
        }
    }

    /// True when the guest's writes are being followed.
    pub(super) fn is_tracking(&self) -> bool {
        self.tracker.is_some()
    }

    /// Follows the guest's writes from now on: before the first page is read. With `standstill` the tracker is
    /// asked only while the guest stands still ([`SourceGuest::writes_past_page_tables`]), unless it
    /// compares content.
    ///
    /// [`SourceGuest::writes_past_page_tables`]: crate::guest::SourceGuest::writes_past_page_tables
    pub(super) fn track(
        &mut self,
        mut tracker: Box<dyn DirtyTracker>,
        standstill: Option<Standstill>,
    ) -> Result<(), Failure> {
        self.standstill = standstill.filter(|_| !tracker.compares_content());
        tracker.arm()?;
        if let Some(standstill) = &self.standstill {
            // What was on its way past the page tables when they were armed is in memory now; what begins later
            // they tell of. Arming takes too long for a guest to stand still for it.
            standstill.during(|_| Ok(()))??;
        }
        self.witness = tracker.witness();
        self.tracker = Some(tracker);
        Ok(())
    }

    /// True when writes are collected while the guest runs, by what its page tables tell.
    pub(super) fn tracks_while_it_runs(&self) -> bool {
        let tracker = self.tracker.as_ref();
        self.standstill.is_none() && tracker.is_some_and(|tracker| !tracker.compares_content())
    }

    /// Which tracker it is.
    pub(super) fn tracker_name(&self) -> Option<&'static str> {
        self.tracker.as_ref().map(|tracker| tracker.name())
    }

    /// Pages changed since they were sent, as of the end of the last round.
    pub(super) fn dirty(&self) -> &PageSet {
        self.plan.dirty()
    }

    /// What is remembered of what was sent.
    pub(super) fn sent(&self) -> &Arc<SentPages> {
        &self.sent
    }

    /// What the link is taken to carry, until that is known better.
    pub(super) fn expect_link(&self, bytes_per_s: f64) {
        self.pace.expect(bytes_per_s);
    }

    /// The destination could not apply these pages: send them whole next time.
    pub(super) fn forget(&mut self, pages: &[PageIndex]) {
        for page in pages.iter().filter(|page| page.0 < self.memory.pages()) {
            self.sent.distrust(*page);
        }
        self.plan.mark_dirty(pages);
    }

    /// The link was lost in the last round, and the destination holds `held` of its pages: sends the
    /// others again, whole.
    pub(super) fn end_round_early(&mut self, held: &PageSet) {
        for run in self.plan.end_round_early(held).runs() {
            self.sent.forget(run);
        }
        let remaining = self.plan.left_in_round() + self.plan.dirty_pages();
        self.counters.remaining_pages.store(remaining, Ordering::Relaxed);
    }

    /// Sends a round into `messages`. `None` when the channel is closed before: whoever closed it knows
    /// why.
    pub(super) fn send_round(
        &mut self,
        version: Version,
        messages: &mpsc::Sender<Bytes>,
    ) -> Result<Option<RoundSummary>, Failure> {
        let begin = Instant::now();
        self.plan.begin_round();
        let RoundSender {
            memory,
            tracker,
            standstill,
            plan,
            sent,
            witness,
            readers,
            counters,
            buffers,
            ..
        } = self;
        let round = Round {
            memory,
            sent,
            sending: &plan.left(),
            landed: (version == Version(1)).then(|| Arc::new(Landed::none(memory.pages()))),
            witness: witness.as_deref(),
            counters,
            version,
            messages,
            buffers,
        };
        // A short round is not worth a thread.
        let batches = plan.left_in_round().div_ceil(BATCH_PAGES as u64) as usize;
        let encoders = readers.len().min(batches).max(1);
        let (first, others) = readers.split_first_mut().expect("at least one encoder");
        let tracking = (tracker.as_deref_mut(), standstill.is_some());
        let desk = Mutex::new(Desk::new(memory, sent, plan, tracking, counters));
        let done = std::thread::scope(|scope| {
            let work = |reader| round.work(&desk, reader);
            let others: Vec<_> = others[..encoders - 1]
                .iter_mut()
                .map(|reader| scope.spawn(move || work(reader)))
                .collect();
            let mut done = work(first);
            for other in others {
                let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                done = done.and_then(|done| Ok(done.and(other?)));
            }
            done
        })?;
        if done.closed {
            return Ok(None);
        }
        let mut desk = desk.into_inner().expect("no holder panics");
        match standstill {
            None => desk.end_round()?,
            Some(standstill) => standstill.during(|_| Ok(desk.end_round()?))??,
        }
        let mut summary = RoundSummary {
            messages: done.messages,
            sent_pages: done.pages,
            sent_bytes: done.counts.total_bytes(),
            duration: begin.elapsed(),
            dirty_pages: self.plan.dirty_pages(),
            held_back_pages: self.plan.held_back_pages(),
            ..RoundSummary::default()
        };
        self.counters.held_back_pages.store(summary.held_back_pages, Ordering::Relaxed);
        summary.bytes_per_dirty_page = self.cost_of_a_dirty_page(version);
        Ok(Some(summary))
    }

    /// The guest is stopped and its device state saved: collects its last writes. What is left is for
    /// [`FrozenPages`]; writes are followed until this sender is dropped, in case the guest runs on here.
    pub(super) fn freeze(&mut self, version: Version) -> Result<FrozenPages, Failure> {
        let all = PageRange::new(0, self.memory.pages());
        if let Some(tracker) = &mut self.tracker {
            tracker.collect(all, self.plan.found_mut())?;
        }
        let unsent = self.plan.unsent();
        let populated = self.populated_of(&unsent)?;
        let remainder = Remainder::of(unsent, populated);
        let (memory, sent) = (self.memory.clone(), self.sent.clone());
        let order = (self.plan.take_heat(), self.pusher);
        Ok(FrozenPages::new(memory, sent, version, remainder, order, self.counters.clone()))
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

    /// Encodes some of the dirty pages, evenly drawn, without sending them.
    fn cost_of_a_dirty_page(&mut self, version: Version) -> Option<u64> {
        let next = version.next()?;
        let dirty = self.plan.dirty();
        let step = dirty.len().div_ceil(SAMPLE_PAGES).max(1);
        let sample: Vec<PageIndex> = dirty.iter().step_by(step as usize).collect();
        let is_populated = |page: &PageIndex| {
            let runs = self.memory.populated_runs(PageRange::new(page.0, page.0 + 1));
            runs.is_ok_and(|runs| !runs.is_empty())
        };
        let populated: Vec<PageIndex> = sample.iter().copied().filter(is_populated).collect();
        let mut bytes = 0;
        for batch in populated.chunks(BATCH_PAGES) {
            let mut trial = Vec::new();
            let against =
                Some(Against { sent: &self.sent, sending: dirty, landed: None, may_copy: true });
            let reader = &mut self.readers[0];
            let counts = reader.encode(&self.memory, against, next, batch, &mut trial);
            bytes += counts.total_bytes();
        }
        bytes.checked_div(sample.len() as u64)
    }
}

/// What the threads that send a round share.
struct Round<'a> {
    memory: &'a GuestMemory,
    sent: &'a SentPages,
    /// All pages of the round.
    sending: &'a PageSet,
    /// Those that have arrived, in the first round.
    landed: Option<Arc<Landed>>,
    witness: Option<&'a dyn ReadWitness>,
    counters: &'a Counters,
    version: Version,
    messages: &'a mpsc::Sender<Bytes>,
    buffers: &'a Buffers,
}

/// What a thread has sent.
#[derive(Default)]
struct Done {
    pages: u64,
    messages: u64,
    counts: CodecCounts,
    /// Nobody takes messages any more.
    closed: bool,
}

impl Done {
    fn and(mut self, other: Done) -> Done {
        self.pages += other.pages;
        self.messages += other.messages;
        self.counts += other.counts;
        self.closed |= other.closed;
        self
    }
}

impl Round<'_> {
    /// Takes tasks until there are no more.
    fn work(&self, desk: &Mutex<Desk<'_>>, reader: &mut PageReader) -> Result<Done, Failure> {
        let mut done = Done::default();
        let (mut task, mut message) = (Task::default(), self.buffers.take());
        while !done.closed {
            if !desk.lock().expect("no holder panics").next(&mut task)? {
                break;
            }
            let mut counts = reader.encode_zero_runs(self.version, &task.holes, &mut message);
            for run in &task.holes {
                self.sent.forget(*run);
                if let Some(witness) = self.witness {
                    witness.saw_holes(*run);
                }
            }
            let (sent, sending) = (self.sent, self.sending);
            let against =
                Some(Against { sent, sending, landed: self.landed.as_deref(), may_copy: true });
            counts += reader.encode(self.memory, against, self.version, &task.pages, &mut message);
            if let Some(left_over) = reader.left_over() {
                let full = std::mem::replace(&mut message, left_over);
                self.hand_over(full, reader, &mut done);
            }
            reader.remember(self.sent, self.version, &task.pages, |page, copy| {
                if let Some(witness) = self.witness {
                    witness.saw(page, copy);
                }
            });
            if !reader.put_off().is_empty() {
                desk.lock().expect("no holder panics").put_off(reader.put_off());
            }
            done.pages += (task.pages.len() - reader.put_off().len()) as u64;
            self.counters.add_frames(&counts);
            done.counts += counts;
            if is_full(&message) {
                let full = std::mem::replace(&mut message, self.buffers.take());
                self.hand_over(full, reader, &mut done);
            }
        }
        self.hand_over(message, reader, &mut done);
        Ok(done)
    }

    fn hand_over(&self, message: Vec<u8>, reader: &mut PageReader, done: &mut Done) {
        if message.is_empty() {
            return;
        }
        let (bytes, begin) = (message.len(), Instant::now());
        done.messages += 1;
        let (pages, landed) = (reader.end_message(), self.landed.clone());
        let message = self.buffers.message_until(message, move || {
            if let Some(landed) = landed {
                landed.add(&pages);
            }
        });
        done.closed |= self.messages.blocking_send(message).is_err();
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
        let encoding = Encoding { encoders: 1, codecs: None, limits: SentLimits::default() };
        let mut sender = RoundSender::new(memory, encoding, Arc::default(), PusherKind::default());
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
