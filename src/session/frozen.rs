//! The source's pages after the guest was stopped: they do not change any more, so all pushing threads and the
//! fault lane read and encode them side by side, and wait for each other only where the next page is chosen.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::lock;
use super::reader::{Against, BATCH_PAGES, PageReader, is_full};
use crate::codec::{CodecCounts, Content, SentPages};
use crate::engine::heat::Heat;
use crate::engine::precopy::Remainder;
use crate::engine::pusher::{BundleStats, Pusher, PusherKind};
use crate::memory::GuestMemory;
use crate::page::{PageIndex, PageSet, Version};
use crate::report::{Counters, PushFigures};
use crate::transport::Buffers;
use crate::wire::message::Wanted;

/// Pages in a message of a bundle: few, so that the first are there soon and a lost packet holds few up.
pub(super) const BUNDLE_MESSAGE_PAGES: usize = 16;

/// The frozen guest.
pub(super) struct FrozenPages {
    memory: Arc<GuestMemory>,
    /// Written between two links only.
    sent: Arc<SentPages>,
    version: Version,
    /// Holes that the destination does not know to be zero.
    zero: PageSet,
    need: PageSet,
    /// These two: what is remembered of them is not what the destination will hold, so nothing goes as a copy of them.
    unsettled: PageSet,
    pusher: Mutex<Pusher>,
    costs: Costs,
    /// False once the destination has asked for a page that came spoilt: the guest may have written to what it was said
    /// to be a copy of, and to what many others are.
    may_copy: AtomicBool,
    counters: Arc<Counters>,
    buffers: Buffers,
}

impl FrozenPages {
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        sent: Arc<SentPages>,
        version: Version,
        remainder: Remainder,
        (heat, pusher): (Heat, PusherKind),
        counters: Arc<Counters>,
    ) -> Self {
        let Remainder { need, zero } = remainder;
        counters.remaining_pages.store(need.len(), Ordering::Relaxed);
        let mut unsettled = need.clone();
        unsettled.union_with(&zero);
        let pusher = Mutex::new(Pusher::new(need.clone(), heat, pusher));
        let costs = Costs::new(&counters.codecs());
        FrozenPages {
            memory,
            sent,
            version,
            zero,
            need,
            unsettled,
            pusher,
            costs,
            may_copy: AtomicBool::new(true),
            counters,
            buffers: Buffers::default(),
        }
    }

    /// The hottest pages that can go as deltas are pushed first, as many as take `bytes`: the guest will
    /// want them at once.
    pub(super) fn push_hottest_first(&self, bytes: u64) {
        let pages = bytes / u64::from(self.costs.of(true).max(1));
        let mut pusher = lock(&self.pusher);
        pusher.hottest_first(pages as usize, &|page| self.sent.knows(page));
    }

    /// Nothing of what was sent is taken to have arrived: all that was needed is to be sent.
    pub(super) fn begin_again(&self) {
        self.resend(&self.need, &PageSet::empty(self.need.pages()));
    }

    /// Of all that was needed the destination lacks `missing`, and has no older copies of
    /// `without_base`.
    pub(super) fn resend(&self, missing: &PageSet, without_base: &PageSet) {
        for run in without_base.runs() {
            self.sent.forget(run);
        }
        let mut pusher = lock(&self.pusher);
        pusher.begin_again(missing);
        self.counters.remaining_pages.store(pusher.left(), Ordering::Relaxed);
    }

    /// The version of all contents.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Pages whose content the destination lacked at the freeze.
    pub(super) fn need(&self) -> &PageSet {
        &self.need
    }

    /// Holes that it must be told of.
    pub(super) fn zero(&self) -> &PageSet {
        &self.zero
    }

    /// For the report.
    pub(super) fn figures(&self, policy: PusherKind) -> PushFigures {
        let BundleStats { useful, useless } = lock(&self.pusher).bundles();
        PushFigures {
            policy: policy.name().into(),
            pushed_pages: self.counters.pushed_pages.load(Ordering::Relaxed),
            bundled_pages: self.counters.bundled_pages.load(Ordering::Relaxed),
            unit_pages: self.counters.unit_pages.load(Ordering::Relaxed),
            useful_bundles: useful,
            useless_bundles: useless,
        }
    }

    /// The next push message of one of the threads that push; `None` when every page was sent. `message` is
    /// where the thread's last call ended: frames that did not fit the message before.
    pub(super) fn next_push(
        &self,
        reader: &mut PageReader,
        message: &mut Vec<u8>,
    ) -> Option<Bytes> {
        let mut pages = Vec::with_capacity(BATCH_PAGES);
        while !is_full(message) {
            {
                let mut pusher = lock(&self.pusher);
                pusher.take(BATCH_PAGES, &|page| self.encoded_bytes(page), &mut pages);
                self.counters.remaining_pages.store(pusher.left(), Ordering::Relaxed);
            }
            if pages.is_empty() {
                break;
            }
            pages.sort_unstable();
            self.counters.pushed_pages.fetch_add(pages.len() as u64, Ordering::Relaxed);
            self.encode(&pages, false, reader, message);
            if let Some(left_over) = reader.left_over() {
                let full = std::mem::replace(message, left_over);
                return Some(self.buffers.message(full));
            }
        }
        let last = std::mem::replace(message, self.buffers.take());
        (!last.is_empty()).then(|| self.buffers.message(last))
    }

    /// Takes note that a thread waits for a page: true when it is to be answered. `bundle_bytes`: how much
    /// may go along; the pages that do are appended to `bundle`, the likeliest first.
    pub(super) fn request(
        &self,
        wanted: Wanted,
        bundle_bytes: u64,
        bundle: &mut Vec<PageIndex>,
    ) -> bool {
        // Also what the guest does not have.
        if !self.need.contains(wanted.page) {
            return false;
        }
        let mut pusher = lock(&self.pusher);
        let room = (bundle_bytes / u64::from(self.encoded_bytes(wanted.page).max(1))) as usize;
        let due = pusher.request(wanted, room, &|page| self.encoded_bytes(page), bundle);
        self.counters.remaining_pages.store(pusher.left(), Ordering::Relaxed);
        self.counters.remote_faults.fetch_add(u64::from(due), Ordering::Relaxed);
        due
    }

    /// Those of `wanted`, for which no thread is named, that are to be sent now.
    pub(super) fn give(&self, wanted: impl Iterator<Item = Wanted>) -> Vec<PageIndex> {
        let mut pusher = lock(&self.pusher);
        let given = wanted.filter(|wanted| pusher.give(*wanted)).map(|wanted| wanted.page);
        let given = given.collect();
        self.counters.remaining_pages.store(pusher.left(), Ordering::Relaxed);
        given
    }

    /// A page that a thread waits for, in a message of its own: nothing that is lost on the way of
    /// another page holds it up.
    pub(super) fn reply(&self, page: PageIndex, whole: bool, reader: &mut PageReader) -> Bytes {
        let mut out = Vec::new();
        self.encode(&[page], whole, reader, &mut out);
        Bytes::from(out)
    }

    /// A message of a bundle, of at most [`BUNDLE_MESSAGE_PAGES`].
    pub(super) fn bundle(&self, pages: &[PageIndex], reader: &mut PageReader) -> Bytes {
        self.counters.bundled_pages.fetch_add(pages.len() as u64, Ordering::Relaxed);
        self.together(pages, reader)
    }

    /// A message of pages that are only wanted together, of at most [`BUNDLE_MESSAGE_PAGES`].
    pub(super) fn mates(&self, pages: &[PageIndex], reader: &mut PageReader) -> Bytes {
        self.counters.unit_pages.fetch_add(pages.len() as u64, Ordering::Relaxed);
        self.together(pages, reader)
    }

    fn together(&self, pages: &[PageIndex], reader: &mut PageReader) -> Bytes {
        let mut pages = pages.to_vec();
        pages.sort_unstable();
        let mut out = Vec::new();
        self.encode(&pages, false, reader, &mut out);
        Bytes::from(out)
    }

    /// What a page will take on the link, by whether it goes as a delta.
    pub(super) fn encoded_bytes(&self, page: PageIndex) -> u32 {
        self.costs.of(self.sent.knows(page))
    }

    fn encode(&self, pages: &[PageIndex], whole: bool, reader: &mut PageReader, out: &mut Vec<u8>) {
        if whole {
            self.may_copy.store(false, Ordering::Relaxed);
        }
        let against = (!whole).then(|| Against {
            sent: &self.sent,
            sending: &self.unsettled,
            landed: None,
            may_copy: self.may_copy.load(Ordering::Relaxed),
        });
        let counts = reader.encode(&self.memory, against, self.version, pages, out);
        self.costs.learn(&counts);
        self.counters.add_frames(&counts);
    }
}

/// What pages have taken so far: as deltas and whole.
struct Costs {
    delta: Kind,
    whole: Kind,
}

#[derive(Default)]
struct Kind {
    pages: AtomicU64,
    bytes: AtomicU64,
}

impl Costs {
    /// From what pre-copy has sent; before there is anything, a delta of a tenth of a page, and a page
    /// that compresses to a half.
    fn new(sent: &CodecCounts) -> Self {
        let kind = |bytes| Kind { pages: AtomicU64::new(1), bytes: AtomicU64::new(bytes) };
        let costs = Costs { delta: kind(400), whole: kind(2048) };
        costs.learn(sent);
        costs
    }

    fn learn(&self, counts: &CodecCounts) {
        for (codec, pages, bytes) in counts.used() {
            let kind = match codec.content() {
                Content::Words | Content::Lines | Content::Runs | Content::Unchanged => &self.delta,
                Content::Whole => &self.whole,
                // As good as free, and not known beforehand.
                Content::Zero | Content::Copy => continue,
            };
            kind.pages.fetch_add(pages, Ordering::Relaxed);
            kind.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    fn of(&self, has_base: bool) -> u32 {
        let kind = if has_base { &self.delta } else { &self.whole };
        let pages = kind.pages.load(Ordering::Relaxed).max(1);
        (kind.bytes.load(Ordering::Relaxed) / pages) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{CodecId, SentLimits};
    use crate::memory::{MemoryLayout, RegionLayout};
    use crate::page::PAGE_SIZE_BYTES;
    use crate::session::pace::Pace;
    use crate::session::reader::Purpose;

    /// A hole that it was before the freeze the destination makes zero, whatever was sent of the page before.
    #[test]
    fn nothing_goes_as_a_copy_of_what_the_guest_has_given_back() {
        let region =
            RegionLayout { name: "ram0".to_owned(), size_bytes: 4 * PAGE_SIZE_BYTES as u64 };
        let memory = Arc::new(GuestMemory::create(&MemoryLayout::new(vec![region])).unwrap());
        let pages = [PageIndex(0), PageIndex(3)];
        let bytes: [u8; PAGE_SIZE_BYTES] = std::array::from_fn(|at| (at * at / 7) as u8);
        pages.iter().for_each(|page| memory.write_page(*page, &bytes).unwrap());
        let limits = SentLimits { base_cache_bytes: 16 << 20, lines_bytes: 0 };
        let sent = Arc::new(SentPages::new(limits, 4));
        let reader =
            |purpose| PageReader::new(purpose, None, Arc::new(Pace::new(1, Some(3_000_000))));
        let (mut before, nothing) = (reader(Purpose::Round), PageSet::empty(4));
        let against =
            Some(Against { sent: &sent, sending: &nothing, landed: None, may_copy: true });
        before.encode(&memory, against, Version(1), &pages[..1], &mut Vec::new());
        before.remember(&sent, Version(1), &pages[..1], |_, _| {});
        for given_back in [false, true] {
            let [mut need, mut zero] = [PageSet::empty(4), PageSet::empty(4)];
            need.insert(pages[1]);
            if given_back {
                zero.insert(pages[0]);
            }
            let order = (Heat::new(4), PusherKind::default());
            let counters = Arc::new(Counters::default());
            let remainder = Remainder { need, zero };
            let frozen = FrozenPages::new(
                memory.clone(),
                sent.clone(),
                Version(2),
                remainder,
                order,
                counters.clone(),
            );
            frozen.together(&pages[1..], &mut reader(Purpose::Push));
            let used: Vec<CodecId> = counters.codecs().used().map(|(codec, _, _)| codec).collect();
            assert_eq!(used == [CodecId::Copy], !given_back, "{used:?}");
        }
    }

    #[test]
    fn what_a_page_will_take_is_learnt_from_what_others_took() {
        let mut sent = CodecCounts::default();
        sent.add(CodecId::Zstd, 1000, 1_500_000);
        sent.add(CodecId::Zero, 1_000_000, 10);
        let costs = Costs::new(&sent);
        assert_eq!((costs.of(false), costs.of(true)), (1500, 400));
        let mut sent = CodecCounts::default();
        sent.add(CodecId::DeltaZstd, 10_000, 500_000);
        costs.learn(&sent);
        assert_eq!((costs.of(false), costs.of(true)), (1500, 50));
    }
}
