//! Copies pages out of the guest and encodes the copies, by the codecs that suit the link.

use std::time::{Duration, Instant};

use crate::codec::ladder::{CodecChoice, DeltaCodec, Ladder};
use crate::codec::{BaseCache, CodecCounts};
use crate::memory::GuestMemory;
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, Version};
use crate::transport::Lane;
use crate::wire::limits::MAX_PAGES_PER_FRAME;
use crate::wire::{FrameEncoder, PageToSend};

/// Pages encoded together.
pub(super) const BATCH_PAGES: usize = MAX_PAGES_PER_FRAME;

/// A message is closed when it has reached this size: small enough that one lost packet delays little,
/// large enough that its stream costs nothing.
const MESSAGE_BYTES: usize = 96 << 10;

/// What the frames of a batch add to its pages at most, however they are coded.
const BATCH_OVERHEAD_BYTES: usize = 4 << 10;

/// A batch that does not compress must fit a message by itself.
const _: () =
    assert!(BATCH_PAGES * PAGE_SIZE_BYTES + BATCH_OVERHEAD_BYTES <= Lane::Push.limit_bytes());

/// What the encoded pages are for, which decides what they may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Pre-copy: every base is certain to be there.
    Round,
    /// After the switchover: a fault reply may overtake a page of the same frame, whose base is gone
    /// then; so no codec that needs all of them.
    Push,
    /// A guest thread waits.
    Fault,
}

/// One for each thread that sends.
pub(super) struct PageReader {
    purpose: Purpose,
    fixed: Option<CodecChoice>,
    copies: Box<[PageBytes]>,
    encoder: FrameEncoder,
    batch: Vec<u8>,
    ladder: Ladder,
    pace: Pace,
}

impl PageReader {
    /// `fixed` is the operator's choice of codecs; without it they follow the link's rate, which is
    /// taken to be `link_bytes_per_s` until this thread's own sending tells better.
    pub(super) fn new(
        purpose: Purpose,
        fixed: Option<CodecChoice>,
        link_bytes_per_s: Option<u64>,
    ) -> Self {
        PageReader {
            purpose,
            fixed,
            copies: vec![[0; PAGE_SIZE_BYTES]; BATCH_PAGES].into_boxed_slice(),
            encoder: FrameEncoder::default(),
            batch: Vec::new(),
            ladder: Ladder::default(),
            pace: Pace::new(link_bytes_per_s),
        }
    }

    /// Copies `pages` (at most [`BATCH_PAGES`]) once and appends their frames to `message`, unless the
    /// message would outgrow its lane: then it is left as it is, and the frames are had from
    /// [`Self::left_over`]. The copies can be had from [`Self::copies`] until the next call.
    pub(super) fn encode(
        &mut self,
        memory: &GuestMemory,
        bases: Option<&BaseCache>,
        version: Version,
        pages: &[PageIndex],
        message: &mut Vec<u8>,
    ) -> CodecCounts {
        let begin = Instant::now();
        let choice = self.choice(pages.len());
        self.encoder.set_choice(choice);
        self.batch.clear();
        for (page, copy) in pages.iter().zip(self.copies.iter_mut()) {
            memory.read_page(*page, copy);
        }
        let list: Vec<PageToSend<'_>> = pages
            .iter()
            .zip(&self.copies)
            .map(|(page, bytes)| {
                let base = bases.and_then(|bases| bases.get(*page));
                PageToSend { page: *page, bytes, base }
            })
            .collect();
        let counts = self.encoder.encode(version, &list, &mut self.batch);
        if message.len() + self.batch.len() <= Lane::Push.limit_bytes() {
            message.append(&mut self.batch);
        }
        self.ladder.observe(choice, &counts, begin.elapsed());
        counts
    }

    /// Frames that did not fit the message.
    pub(super) fn left_over(&mut self) -> Option<Vec<u8>> {
        (!self.batch.is_empty()).then(|| std::mem::take(&mut self.batch))
    }

    /// Appends frames that say that `runs` are zero.
    pub(super) fn encode_zero_runs(
        &mut self,
        version: Version,
        runs: &[PageRange],
        out: &mut Vec<u8>,
    ) -> CodecCounts {
        self.encoder.encode_zero_runs(version, runs, out)
    }

    /// The copies that were encoded last.
    pub(super) fn copies(&self) -> &[PageBytes] {
        &self.copies
    }

    /// A message of so many bytes was handed over, after waiting so long for the link.
    pub(super) fn sent(&mut self, bytes: usize, waited: Duration) {
        self.pace.sent(bytes as u64, waited);
    }

    fn choice(&mut self, pages: usize) -> CodecChoice {
        if let Some(fixed) = self.fixed {
            return self.without_old_words(fixed, pages);
        }
        let rate = self.pace.link_bytes_per_s;
        let choice = match self.purpose {
            Purpose::Fault if pages == 1 => self.ladder.choose_for_fault(rate),
            _ => self.ladder.choose(rate, 1),
        };
        self.without_old_words(choice, pages)
    }

    fn without_old_words(&self, choice: CodecChoice, pages: usize) -> CodecChoice {
        match choice.delta {
            DeltaCodec::ZstdOld { level } if self.purpose != Purpose::Round && pages > 1 => {
                CodecChoice { delta: DeltaCodec::Zstd { level }, ..choice }
            }
            _ => choice,
        }
    }
}

/// True when a message should leave.
pub(super) fn is_full(message: &[u8]) -> bool {
    message.len() >= MESSAGE_BYTES
}

/// How fast the link takes what this thread makes.
///
/// While the thread waits for the link, the link's rate is what leaves; while it does not, the encoder is
/// the bottleneck and the link is faster than anything seen: then more is assumed, so that a quicker
/// codec gets its turn.
#[derive(Debug)]
struct Pace {
    link_bytes_per_s: f64,
    window: Instant,
    bytes: u64,
    waited: Duration,
}

/// Taken for the link's rate before anything is known: in the middle of the ladder.
const UNKNOWN_LINK_BYTES_PER_S: f64 = 60e6;
/// How often the rate is judged.
const PACE_WINDOW: Duration = Duration::from_millis(200);
/// Waiting for less than this share of the time, the encoder is the bottleneck.
const LINK_BOUND: f64 = 0.15;
/// No link is faster than this, as far as codecs go.
const FASTEST_BYTES_PER_S: f64 = 20e9;

impl Pace {
    fn new(link_bytes_per_s: Option<u64>) -> Self {
        let rate = link_bytes_per_s.filter(|rate| *rate > 0);
        Pace {
            link_bytes_per_s: rate.map_or(UNKNOWN_LINK_BYTES_PER_S, |rate| rate as f64),
            window: Instant::now(),
            bytes: 0,
            waited: Duration::ZERO,
        }
    }

    fn sent(&mut self, bytes: u64, waited: Duration) {
        self.bytes += bytes;
        self.waited += waited;
        let elapsed = self.window.elapsed();
        if elapsed >= PACE_WINDOW {
            self.judge(elapsed);
            (self.window, self.bytes, self.waited) = (Instant::now(), 0, Duration::ZERO);
        }
    }

    fn judge(&mut self, elapsed: Duration) {
        let rate = self.bytes as f64 / elapsed.as_secs_f64();
        self.link_bytes_per_s = if self.waited.as_secs_f64() >= LINK_BOUND * elapsed.as_secs_f64() {
            rate
        } else {
            (rate.max(self.link_bytes_per_s) * 1.5).min(FASTEST_BYTES_PER_S)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::ladder::PageCodec;

    #[test]
    fn a_slow_link_gets_dense_codecs_and_one_that_never_waits_quick_ones() {
        let mut reader = PageReader::new(Purpose::Round, None, None);
        reader.pace.bytes = 3_000_000;
        reader.pace.waited = Duration::from_millis(900);
        reader.pace.judge(Duration::from_secs(1));
        assert_eq!(reader.choice(64).page, PageCodec::Zstd { level: 6 });
        for _ in 0..20 {
            reader.pace.waited = Duration::ZERO;
            reader.pace.bytes = 100_000_000;
            reader.pace.judge(Duration::from_secs(1));
        }
        assert_eq!(reader.choice(64).page, PageCodec::Raw);
    }

    #[test]
    fn after_the_switchover_no_frame_needs_the_bases_of_all_its_pages() {
        let old = |purpose, pages| {
            let mut reader = PageReader::new(purpose, None, Some(3_000_000));
            matches!(reader.choice(pages).delta, DeltaCodec::ZstdOld { .. })
        };
        assert!(old(Purpose::Round, 64));
        assert!(!old(Purpose::Push, 64));
        assert!(!old(Purpose::Fault, 16));
        assert!(old(Purpose::Fault, 1));
    }
}
