//! The fault lane at the source: requests come in, each page goes back in a message of its own, and what
//! is likely to be wanted next follows in the same flight, behind all replies and before all bulk.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::frozen::{BUNDLE_MESSAGE_PAGES, FrozenPages};
use super::reader::PageReader;
use crate::engine::Failure;
use crate::engine::pusher::BundleBudget;
use crate::page::{PageIndex, PageSet};
use crate::transport::{Lane, Link, LinkError};
use crate::wire::message::{FaultRequest, MAX_REQUEST_PAGES, Wanted, decode};

/// What the fault lane's tasks share.
pub(super) struct Answers {
    link: Link,
    frozen: Arc<FrozenPages>,
    budget: Mutex<BundleBudget>,
    begin: Instant,
    /// Pages that were answered on this link: a request may come twice, and one that is overdue any number of times.
    answered: Mutex<PageSet>,
    /// Pages for the bundler. Bounded by the guest: each page is bundled once.
    bundles: mpsc::UnboundedSender<Vec<PageIndex>>,
}

impl Answers {
    /// Also gives what [`encode_bundles`] consumes.
    pub(super) fn new(
        link: Link,
        frozen: Arc<FrozenPages>,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Vec<PageIndex>>) {
        let (bundles, queue) = mpsc::unbounded_channel();
        let (budget, begin) = (Mutex::new(BundleBudget::new(Duration::ZERO)), Instant::now());
        let answered = Mutex::new(PageSet::empty(frozen.need().pages()));
        (Arc::new(Answers { link, frozen, budget, begin, answered, bundles }), queue)
    }

    /// Answers fault requests until the link ends, and gives why it did. Several tasks may do so at a time.
    pub(super) async fn serve(&self, mut reader: PageReader) -> Result<LinkError, Failure> {
        loop {
            let bytes = match self.link.recv(Lane::FaultRequest).await {
                Ok(bytes) => bytes,
                Err(error) => return Ok(error),
            };
            let request: FaultRequest = decode(&bytes)?;
            if request.pages.len() > MAX_REQUEST_PAGES {
                let count = request.pages.len();
                return Err(Failure::plain(format!(
                    "the destination asks for {count} pages at once"
                )));
            }
            // All of them before a thread's fault is looked at: what may be wanted next is none of these.
            let is_mate = |wanted: &&Wanted| !wanted.names_thread() && !request.whole;
            let is_due =
                |wanted: &Wanted| wanted.thread != Wanted::OVERDUE || self.is_first(wanted.page);
            let mates = request.pages.iter().filter(is_mate).copied().filter(is_due);
            let mates = self.frozen.give(mates);
            mates.iter().for_each(|page| _ = self.is_first(*page));
            for wanted in request.pages.iter().filter(|wanted| !is_mate(wanted)).copied() {
                // One that came spoilt is asked for again.
                if !self.is_first(wanted.page) && !request.whole {
                    continue;
                }
                let mut bundle = Vec::new();
                if !self.frozen.request(wanted, self.room(), &mut bundle) {
                    continue;
                }
                let reply = self.frozen.reply(wanted.page, request.whole, &mut reader);
                if let Err(error) = self.link.send(Lane::FaultReply, reply).await {
                    return Ok(error);
                }
                if !bundle.is_empty() {
                    let bytes = |page: &PageIndex| u64::from(self.frozen.encoded_bytes(*page));
                    let cost = bundle.iter().map(bytes).sum();
                    self.with_budget(|budget| budget.spend(cost));
                    // Its consumer ends with the link only.
                    let _ = self.bundles.send(bundle);
                }
            }
            // They are good for something when all of them are there: what is lost with one holds nothing else up.
            for pages in mates.chunks(BUNDLE_MESSAGE_PAGES) {
                let reply = self.frozen.mates(pages, &mut reader);
                if let Err(error) = self.link.send(Lane::FaultReply, reply).await {
                    return Ok(error);
                }
            }
        }
    }

    /// Notes that a page is being answered: true when it was not before, and is one of the guest's.
    fn is_first(&self, page: PageIndex) -> bool {
        let mut answered = self.answered.lock().expect("no holder panics");
        page.0 < answered.pages() && answered.insert(page)
    }

    fn room(&self) -> u64 {
        let ((rate_bytes_per_s, round_trip), now) = (self.link.main_path(), self.begin.elapsed());
        self.with_budget(|budget| budget.room(now, rate_bytes_per_s, round_trip))
    }

    fn with_budget<T>(&self, f: impl FnOnce(&mut BundleBudget) -> T) -> T {
        f(&mut self.budget.lock().expect("no holder panics"))
    }
}

/// Encodes bundles until those who serve are gone; a bundle's messages leave as they are encoded. It
/// blocks: the tasks that answer faults must not stand behind it.
pub(super) fn encode_bundles(
    frozen: &FrozenPages,
    mut queue: mpsc::UnboundedReceiver<Vec<PageIndex>>,
    messages: &mpsc::Sender<Bytes>,
    mut reader: PageReader,
) {
    while let Some(bundle) = queue.blocking_recv() {
        for pages in bundle.chunks(BUNDLE_MESSAGE_PAGES) {
            if messages.blocking_send(frozen.bundle(pages, &mut reader)).is_err() {
                return;
            }
        }
    }
}
