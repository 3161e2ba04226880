//! The source's pages after the guest was stopped: they do not change any more, so the pusher and the
//! fault lane read and encode them side by side, without locks but for the choice of the next page.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::reader::{BATCH_PAGES, PageReader, is_full};
use crate::codec::BaseCache;
use crate::engine::heat::Heat;
use crate::engine::precopy::Remainder;
use crate::engine::pusher::Pusher;
use crate::memory::GuestMemory;
use crate::page::{PageIndex, PageSet, Version};
use crate::report::Counters;

/// The frozen guest.
pub(super) struct FrozenPages {
    memory: Arc<GuestMemory>,
    bases: BaseCache,
    version: Version,
    /// Holes that the destination does not know to be zero.
    zero: PageSet,
    need: PageSet,
    pusher: Mutex<Pusher>,
    counters: Arc<Counters>,
    requested: AtomicU64,
}

impl FrozenPages {
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        bases: BaseCache,
        version: Version,
        remainder: Remainder,
        heat: &Heat,
        counters: Arc<Counters>,
    ) -> Self {
        let Remainder { need, zero } = remainder;
        counters.remaining_pages.store(need.len(), Ordering::Relaxed);
        let pusher = Mutex::new(Pusher::new(need.clone(), heat));
        let requested = AtomicU64::new(0);
        FrozenPages { memory, bases, version, zero, need, pusher, counters, requested }
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

    /// The next push message; `None` when every page was sent. `message` is where the last call ended:
    /// frames that did not fit the message before.
    pub(super) fn next_push(
        &self,
        reader: &mut PageReader,
        message: &mut Vec<u8>,
    ) -> Option<Bytes> {
        let mut pages = Vec::with_capacity(BATCH_PAGES);
        while !is_full(message) {
            {
                let mut pusher = self.pusher.lock().expect("no holder panics");
                pusher.take(BATCH_PAGES, &mut pages);
                self.counters.remaining_pages.store(pusher.left(), Ordering::Relaxed);
            }
            if pages.is_empty() {
                break;
            }
            self.encode(&pages, false, reader, message);
            if let Some(left_over) = reader.left_over() {
                return Some(Bytes::from(std::mem::replace(message, left_over)));
            }
        }
        (!message.is_empty()).then(|| Bytes::from(std::mem::take(message)))
    }

    /// The answers to a fault request: first the pages that were asked for, then their neighbours, in
    /// messages of their own so that the first does not wait for the second.
    pub(super) fn answer(
        &self,
        asked: &[PageIndex],
        whole: bool,
        reader: &mut PageReader,
    ) -> Vec<Bytes> {
        let (mut due, mut neighbours, mut window) = (Vec::new(), Vec::new(), Vec::new());
        {
            let mut pusher = self.pusher.lock().expect("no holder panics");
            for page in asked {
                if pusher.request(*page) {
                    due.push(*page);
                }
            }
            for page in &due {
                pusher.take_window(*page, &mut window);
                neighbours.append(&mut window);
            }
            self.counters.remaining_pages.store(pusher.left(), Ordering::Relaxed);
        }
        self.requested.fetch_add(due.len() as u64, Ordering::Relaxed);
        self.counters.remote_faults.fetch_add(due.len() as u64, Ordering::Relaxed);
        let mut messages = Vec::new();
        for (mut pages, whole) in [(due, whole), (neighbours, false)] {
            pages.sort_unstable();
            pages.dedup();
            for batch in pages.chunks(BATCH_PAGES) {
                let mut out = Vec::new();
                self.encode(batch, whole, reader, &mut out);
                messages.push(Bytes::from(out));
            }
        }
        messages
    }

    fn encode(&self, pages: &[PageIndex], whole: bool, reader: &mut PageReader, out: &mut Vec<u8>) {
        let bases = (!whole).then_some(&self.bases);
        let counts = reader.encode(&self.memory, bases, self.version, pages, out);
        self.counters.add_frames(&counts);
    }
}
