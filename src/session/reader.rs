//! Copies pages out of the guest and encodes the copies, by the codecs that suit the link.

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use super::pace::Pace;
use super::remembering::Remembering;
use crate::codec::ladder::{CodecChoice, DeltaCodec, Ladder, PageCodec};
use crate::codec::{
    CodecCounts, ContentHash, Kin, KinFinder, Known, LineFingerprint, SentPages, is_zero,
};
use crate::memory::GuestMemory;
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, PageSet, Version};
use crate::transport::Lane;
use crate::wire::limits::MAX_PAGES_PER_FRAME;
use crate::wire::{Base, CopyToSend, FrameEncoder, LinesToSend, PageToSend};

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

/// On a faster link few pages go so densely that kin are of use, and a frame that has to wait for a thread at the
/// destination has too much behind it.
const KIN_UP_TO_BYTES_PER_S: f64 = 125e6;

/// With more changed lines than this a page is sent whole: see the same for words.
const MAX_DELTA_LINES: usize = 48;

/// What the pages of a batch may be told by, other than by themselves.
#[derive(Clone, Copy)]
pub(super) struct Against<'a> {
    /// What the destination holds.
    pub(super) sent: &'a SentPages,
    /// Pages that are sent at the same version. They may be replaced there at any moment, so that nothing
    /// is a copy of them.
    pub(super) sending: &'a PageSet,
    /// Those of them that have arrived; only the first round says.
    pub(super) landed: Option<&'a Landed>,
    /// Whether a page may be told to be a copy of another one.
    pub(super) may_copy: bool,
}

/// Pages of the first round that have arrived at the destination: the messages that brought them were
/// acknowledged.
#[derive(Debug)]
pub(super) struct Landed {
    /// Not in the set yet: whoever has word of them is the transport, which must not wait for encoders.
    new: Mutex<Vec<PageIndex>>,
    pages: RwLock<PageSet>,
}

impl Landed {
    /// None, of so many.
    pub(super) fn none(guest_pages: u64) -> Self {
        Landed { new: Mutex::default(), pages: RwLock::new(PageSet::empty(guest_pages)) }
    }

    /// These have.
    pub(super) fn add(&self, pages: &[PageIndex]) {
        self.new.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(pages);
    }

    /// All that have.
    fn pages(&self) -> RwLockReadGuard<'_, PageSet> {
        let new = std::mem::take(&mut *self.new.lock().unwrap_or_else(PoisonError::into_inner));
        if !new.is_empty() {
            let mut pages = self.pages.write().expect("no holder panics");
            for page in new {
                pages.insert(page);
            }
        }
        self.pages.read().expect("no holder panics")
    }
}

/// How a page of the last batch went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Went {
    /// And is not worth a place: it is told in a few bits, or goes again as quickly as a change would.
    AndIsForgotten,
    AsCopy,
    /// As itself or as a change.
    Otherwise(Option<ContentHash>),
    PutOff,
}

/// One for each thread that sends.
pub(super) struct PageReader {
    purpose: Purpose,
    fixed: Option<CodecChoice>,
    copies: Box<[PageBytes]>,
    bases: Box<[PageBytes]>,
    went: Vec<Went>,
    put_off: Vec<PageIndex>,
    kin: KinFinder,
    /// Kin were looked for in the last batch.
    has_kin: bool,
    /// Remembered pages, of the message that is being put together, in which others may find kin.
    in_message: Vec<PageIndex>,
    encoder: FrameEncoder,
    left_over: Vec<u8>,
    ladder: Ladder,
    pace: Arc<Pace>,
    remembering: Remembering,
}

impl PageReader {
    /// `fixed` is the operator's choice of codecs; without it they follow the link's rate, as `pace` has it.
    pub(super) fn new(purpose: Purpose, fixed: Option<CodecChoice>, pace: Arc<Pace>) -> Self {
        let pages = || vec![[0; PAGE_SIZE_BYTES]; BATCH_PAGES].into_boxed_slice();
        let ladder = match purpose {
            Purpose::Round => Ladder::with_kin(),
            Purpose::Push | Purpose::Fault => Ladder::default(),
        };
        PageReader {
            purpose,
            fixed,
            copies: pages(),
            bases: pages(),
            went: Vec::new(),
            put_off: Vec::new(),
            kin: KinFinder::default(),
            has_kin: false,
            in_message: Vec::new(),
            encoder: FrameEncoder::default(),
            left_over: Vec::new(),
            ladder,
            pace,
            remembering: Remembering::default(),
        }
    }

    /// Copies `pages` (at most [`BATCH_PAGES`]) once and appends their frames to `message`, unless the
    /// message would outgrow its lane: then it is left as it is, and the frames are had from
    /// [`Self::left_over`]. Without `against` each page goes as it is.
    ///
    /// In the first round a page that equals one sent in the same round is not sent: see
    /// [`Self::put_off`]. Where the link takes pages nearly as fast as they are copied, that and all that later
    /// rounds would gain by remembering the page costs more than it saves: most pages are never sent again. Then
    /// pages of that round are only coded ([`Remembering`]).
    pub(super) fn encode(
        &mut self,
        memory: &GuestMemory,
        against: Option<Against<'_>>,
        version: Version,
        pages: &[PageIndex],
        message: &mut Vec<u8>,
    ) -> CodecCounts {
        let begin = Instant::now();
        let choice = self.choice(pages.len());
        let first = self.purpose == Purpose::Round && version == Version(1);
        let only_code = first
            && self.fixed.is_none()
            && (choice.page == PageCodec::Raw || !self.remembering.pays());
        // Nothing is gained by it where one page goes, and a copy may have to be asked for again.
        let may_copy =
            self.purpose != Purpose::Fault && against.is_some_and(|against| against.may_copy);
        let has_kin = self.purpose == Purpose::Round
            && !only_code
            && self.pace.link_bytes_per_s() <= KIN_UP_TO_BYTES_PER_S
            && matches!(choice.page, PageCodec::ZstdKin { .. })
            && against.is_some_and(|against| against.sent.finds_kin());
        self.has_kin = has_kin;
        let start = message.len();
        let PageReader { copies, bases, went, put_off, kin, encoder, left_over, .. } = self;
        kin.begin();
        encoder.set_choice(choice);
        went.clear();
        put_off.clear();
        for run in pages.chunk_by(|page, next| next.0 == page.0 + 1) {
            if let [first, .., last] = run {
                memory.will_read(PageRange::new(first.0, last.0 + 1));
            }
        }
        let (mut plain, mut lines, mut copied) = (Vec::new(), Vec::new(), Vec::new());
        let mut trusts_kin = true;
        for ((page, bytes), base) in pages.iter().zip(copies.iter_mut()).zip(bases.iter_mut()) {
            let page = *page;
            memory.read_page(page, bytes);
            let bytes = &*bytes;
            let mut to_send = PageToSend { page, bytes, base: None };
            if only_code || is_zero(bytes) {
                went.push(Went::AndIsForgotten);
                plain.push(to_send);
                kin.pass_over();
                continue;
            }
            let Some(Against { sent, sending, .. }) = against else {
                went.push(Went::Otherwise(None));
                plain.push(to_send);
                kin.pass_over();
                continue;
            };
            let known = sent.recall(page, base);
            // What was rejected goes by itself, with all that goes together with it: its kin may be at fault.
            trusts_kin &= known != Known::Distrusted;
            let base = &*base;
            let is_unchanged = matches!(known, Known::Bytes(_)) && base == bytes;
            let hash = (may_copy && sent.finds_copies()).then(|| ContentHash::of(bytes));
            if let Some(hash) = hash.filter(|_| known != Known::Distrusted && !is_unchanged) {
                let settled = |other| !sending.contains(other);
                if let Some((page_there, version)) = sent.original_of(page, bytes, hash, settled) {
                    let original = Base { page: page_there, version };
                    copied.push(CopyToSend { page, bytes, original });
                    went.push(Went::AsCopy);
                    kin.pass_over();
                    continue;
                }
                if first && sent.original_of(page, bytes, hash, |_| true).is_some() {
                    put_off.push(page);
                    went.push(Went::PutOff);
                    kin.pass_over();
                    continue;
                }
            }
            went.push(Went::Otherwise(hash));
            match known {
                Known::Bytes(version) => to_send.base = Some((version, base)),
                Known::Lines(base, old) if choice.delta != DeltaCodec::Off => {
                    let changed = old.changed(&LineFingerprint::of(bytes));
                    if changed.count() <= MAX_DELTA_LINES {
                        kin.pass_over();
                        lines.push(LinesToSend { page, bytes, base, changed });
                        continue;
                    }
                }
                Known::Lines(..) | Known::Nothing | Known::Distrusted => {}
            }
            match has_kin && to_send.base.is_none() {
                true => kin.look_at(bytes),
                false => kin.pass_over(),
            }
            plain.push(to_send);
        }
        let none = Kin::default();
        let kin = match against {
            Some(Against { sent, sending, landed, .. }) if has_kin && trusts_kin => {
                let landed = landed.map(Landed::pages);
                // What went in the first round went whole and stays until the next. Of later rounds only what was
                // there before them is certain to be and to stay.
                let has_landed = |page| landed.as_ref().is_some_and(|landed| landed.contains(page));
                let may_be = |page| !sending.contains(page) || first && has_landed(page);
                kin.find(sent, may_be, |page, known| !sending.contains(page) || known == version)
            }
            _ => &none,
        };
        let mut counts = encoder.encode(version, &plain, kin, message);
        let encode_time = begin.elapsed();
        self.ladder.observe(choice, &counts, encode_time);
        // Pages of zeros take next to nothing, and would hide what others do.
        let zero = plain.iter().filter(|page| is_zero(page.bytes)).count();
        if first && zero <= plain.len() / 4 {
            let link_bytes_per_s = self.pace.link_bytes_per_s();
            let bytes = counts.total_bytes();
            self.remembering.sent(plain.len(), encode_time, bytes, link_bytes_per_s);
        }
        counts += encoder.encode_lines(version, &lines, message);
        counts += encoder.encode_copies(version, &copied, message);
        if message.len() > Lane::Push.limit_bytes() {
            *left_over = message.split_off(start);
        }
        counts
    }

    /// Notes in `sent` how the pages that were encoded last went, and shows each copy that was sent to
    /// `saw`.
    pub(super) fn remember(
        &mut self,
        sent: &SentPages,
        version: Version,
        pages: &[PageIndex],
        mut saw: impl FnMut(PageIndex, &PageBytes),
    ) {
        let (begin, mut remembered) = (Instant::now(), 0);
        let batch = pages.iter().zip(&self.copies).zip(&self.went).enumerate();
        for (position, ((page, bytes), went)) in batch {
            match *went {
                Went::AndIsForgotten => sent.forget(PageRange::new(page.0, page.0 + 1)),
                // The original stays the one that is found: this round's other copies are of it too.
                Went::AsCopy => sent.remember(*page, version, bytes, None, &[]),
                Went::Otherwise(hash) => {
                    let anchors = self.kin.anchors_of(position);
                    sent.remember(*page, version, bytes, hash, anchors);
                    if self.has_kin {
                        self.kin.sent(*page);
                        self.in_message.push(*page);
                    }
                    remembered += 1;
                }
                Went::PutOff => continue,
            }
            saw(*page, bytes);
        }
        if remembered >= pages.len() / 4 * 3 {
            self.remembering.remembered(remembered, begin.elapsed());
        }
    }

    /// The message is complete: gives the pages of it that others may build on once it has arrived.
    pub(super) fn end_message(&mut self) -> Vec<PageIndex> {
        std::mem::take(&mut self.in_message)
    }

    /// Pages of the last batch that were not sent, since the destination is about to have them as another page:
    /// in the next round they go as copies of it.
    pub(super) fn put_off(&self) -> &[PageIndex] {
        &self.put_off
    }

    /// Frames that did not fit the message.
    pub(super) fn left_over(&mut self) -> Option<Vec<u8>> {
        (!self.left_over.is_empty()).then(|| std::mem::take(&mut self.left_over))
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

    /// A message of so many bytes was handed over, after waiting so long for the link.
    pub(super) fn sent(&self, bytes: usize, waited: Duration) {
        self.pace.sent(bytes, waited);
    }

    fn choice(&mut self, pages: usize) -> CodecChoice {
        if let Some(fixed) = self.fixed {
            return self.without_old_words(fixed, pages);
        }
        let rate = self.pace.link_bytes_per_s();
        let choice = match self.purpose {
            Purpose::Fault if pages == 1 => self.ladder.choose_for_fault(rate),
            _ => self.ladder.choose(rate, self.pace.encoders()),
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

#[cfg(test)]
mod tests;
