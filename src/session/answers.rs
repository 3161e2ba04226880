//! The fault lane at the source: requests come in, each page goes back in a message of its own, and what
//! is likely to be wanted next follows in the same flight, behind all replies and before all bulk.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::frozen::{BUNDLE_MESSAGE_PAGES, FrozenPages};
use super::reader::PageReader;
use crate::engine::Failure;
use crate::engine::pusher::BundleBudget;
use crate::page::PageIndex;
use crate::transport::{Lane, Link, LinkError};
use crate::wire::message::{FaultRequest, MAX_REQUEST_PAGES, decode};

/// What the fault lane's tasks share.
pub(super) struct Answers {
    link: Link,
    frozen: Arc<FrozenPages>,
    budget: Mutex<BundleBudget>,
    begin: Instant,
    /// Pages for the bundler. Bounded by the guest: each page is bundled once.
    bundles: mpsc::UnboundedSender<Vec<PageIndex>>,
}

impl Answers {
    /// Also gives what [`send_bundles`] consumes.
    pub(super) fn new(
        link: Link,
        frozen: Arc<FrozenPages>,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Vec<PageIndex>>) {
        let (bundles, queue) = mpsc::unbounded_channel();
        let (budget, begin) = (Mutex::new(BundleBudget::new(Duration::ZERO)), Instant::now());
        (Arc::new(Answers { link, frozen, budget, begin, bundles }), queue)
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
            for wanted in request.pages {
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
        }
    }

    fn room(&self) -> u64 {
        let (link, now) = (self.link.stats(), self.begin.elapsed());
        let round_trip = Duration::from_micros(link.min_rtt_us);
        self.with_budget(|budget| budget.room(now, link.delivery_rate_bytes_per_s, round_trip))
    }

    fn with_budget<T>(&self, f: impl FnOnce(&mut BundleBudget) -> T) -> T {
        f(&mut self.budget.lock().expect("no holder panics"))
    }
}

/// Encodes and sends bundles until the link ends; a bundle's messages leave as they are encoded.
pub(super) async fn send_bundles(
    link: &Link,
    frozen: Arc<FrozenPages>,
    mut queue: mpsc::UnboundedReceiver<Vec<PageIndex>>,
    mut reader: PageReader,
) -> Result<(), LinkError> {
    while let Some(bundle) = queue.recv().await {
        for pages in bundle.chunks(BUNDLE_MESSAGE_PAGES) {
            let message = frozen.bundle(pages, &mut reader);
            link.send(Lane::Bundle, message).await?;
            // Encoding takes a while: the replies of this thread's other tasks go first.
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}
