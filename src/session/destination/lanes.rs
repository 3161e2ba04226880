//! What comes on the lanes of pages, and what is asked for on that of faults.

use super::*;
use crate::session::without_panic;

/// Threads that apply bulk, at most: one takes up what some Gbit/s bring.
const MAX_BULK_APPLIERS: usize = 8;

impl Session {
    /// Starts to work on the lanes of the current link, once the guest's memory is registered.
    pub(super) fn start_lanes(&mut self) {
        let Some(on_link) = self.links.on_link() else { return };
        let arrivals = match &*lock(&self.prepared) {
            Some(prepared) => prepared.arrivals.clone(),
            None => return,
        };
        if self.lanes_of.replace(on_link.number) == Some(on_link.number) {
            return;
        }
        let cores = crate::cores::cores();
        let bulk = std::iter::repeat_n(Lane::Push, cores.min(MAX_BULK_APPLIERS));
        for lane in bulk.chain([Lane::FaultReply, Lane::Bundle]) {
            let application = self.application(arrivals.clone());
            let applier = Applier { lane, on_link: on_link.clone(), application };
            if let Err(failure) = applier.start(Handle::current()) {
                self.fail(failure);
            }
        }
        self.tasks.spawn(ask(on_link, self.asking.clone(), self.counters.clone()));
    }

    pub(super) fn application(&self, arrivals: Arc<Arrivals>) -> Application {
        Application {
            arrivals,
            ledger: self.ledger.clone(),
            asked: self.asked.clone(),
            happened: self.happened.clone(),
        }
    }
}

/// A message for which there is no room among those that wait is given up after so long.
const WAIT_WITH_IT: Duration = Duration::from_secs(2);

/// A thread that applies what comes on one lane. Messages of bulk come in any order, so several threads may
/// work on them.
struct Applier {
    lane: Lane,
    on_link: OnLink,
    application: Application,
}

impl Applier {
    fn start(self, handle: Handle) -> Result<(), Failure> {
        let thread = std::thread::Builder::new().name(format!("apply-{:?}", self.lane));
        thread
            .spawn(move || {
                // Pages that it has begun with would never come otherwise.
                if let Err(failure) = without_panic(|| self.work(&handle)) {
                    self.application.tell(DestinationEvent::Failed(failure));
                }
            })
            .map(drop)
            .map_err(|error| Failure::plain(format!("no thread could be started: {error}")))
    }

    fn work(&self, handle: &Handle) -> Result<(), Failure> {
        let mut scratch = DecodeScratch::default();
        // The link's end is told by the control lane.
        while let Ok(message) = handle.block_on(self.on_link.link.recv(self.lane)) {
            self.application.apply(Unapplied { message, may_wait: true }, &mut scratch)?;
        }
        Ok(())
    }
}

/// What applying messages takes, and whom it tells.
#[derive(Clone)]
pub(super) struct Application {
    arrivals: Arc<Arrivals>,
    ledger: Arc<Mutex<RoundLedger>>,
    asked: AskSender,
    happened: mpsc::UnboundedSender<Happened>,
}

impl Application {
    /// Applies a message, and those that have waited for it.
    pub(super) fn apply(
        &self,
        message: Unapplied,
        scratch: &mut DecodeScratch,
    ) -> Result<(), Failure> {
        let is_ready = |message: &[u8]| self.arrivals.is_ready(message);
        let mut messages = vec![message];
        while let Some(Unapplied { message, may_wait }) = messages.pop() {
            let was_complete = self.arrivals.is_complete();
            let applied = self.arrivals.apply(&message, may_wait, scratch)?;
            let mut ledger = self.ledger.lock().expect("no holder panics");
            // Also for some frames of a message, when it waits before the others.
            messages.extend(ledger.take_ready(is_ready));
            let noted = match applied.waits_from {
                Some(at) => {
                    let rest = Unapplied { message: message.slice(at..), may_wait };
                    ledger.put_aside(applied.version, applied.rejected, rest, is_ready)
                }
                None => ledger.note(applied.version, applied.rejected),
            };
            drop(ledger);
            match noted {
                Noted::Apply(another) => messages.push(another),
                // What it waits for may be among those that are ready, which only this thread has.
                Noted::Full(unapplied) if messages.iter().any(|other| is_ready(&other.message)) => {
                    messages.insert(0, unapplied);
                }
                Noted::Full(unapplied) => messages.push(self.wait_with(unapplied)),
                noted => tell_round(noted, &self.happened, &self.asked)?,
            }
            if !was_complete && self.arrivals.is_complete() {
                self.tell(DestinationEvent::PagesComplete);
            }
        }
        Ok(())
    }

    /// Waits until what a message builds on is here, so that no more is taken in meanwhile.
    fn wait_with(&self, mut unapplied: Unapplied) -> Unapplied {
        let begin = Instant::now();
        while !self.arrivals.is_ready(&unapplied.message) {
            if begin.elapsed() > WAIT_WITH_IT {
                unapplied.may_wait = false;
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        unapplied
    }

    fn tell(&self, event: DestinationEvent) {
        let _ = self.happened.send(Happened::Event(event));
    }
}

pub(super) fn tell_round(
    noted: Noted,
    happened: &mpsc::UnboundedSender<Happened>,
    asked: &AskSender,
) -> Result<(), Failure> {
    match noted {
        // Whoever has the message deals with it.
        Noted::Waiting | Noted::Apply(_) | Noted::Full(_) => {}
        Noted::RoundDone(round, rejected) => {
            let event = DestinationEvent::RoundApplied { round, rejected };
            let _ = happened.send(Happened::Event(event));
        }
        Noted::AskAgain(pages) => {
            for page in pages {
                asked.send(again(page));
            }
        }
        Noted::OutOfTurn => {
            return Err(Failure::plain("the source sent pages or ended a round out of turn"));
        }
        Noted::Spoilt(pages) => {
            return Err(Failure::plain(format!(
                "{pages} pages came spoilt, or without their base"
            )));
        }
    }
    Ok(())
}

/// A page that came spoilt.
pub(super) fn again(page: PageIndex) -> Asked {
    (Wanted { page, thread: Wanted::TOGETHER }, true)
}

/// A request goes a second time after so long, in a packet of its own. On a lossy link one of a hundred would
/// else take twice the round trip and more: nothing behind it on its way tells that it was lost.
const REPEAT_AFTER: Duration = Duration::from_millis(2);

/// Sends fault requests, those that have gathered while the last was sent together, until the link ends.
async fn ask(
    on_link: OnLink,
    asking: Arc<tokio::sync::Mutex<AskReceiver>>,
    counters: Arc<Counters>,
) {
    let link = &on_link.link;
    let (mut asking, mut gathered) = (asking.lock().await, Vec::new());
    // As many as are asked for within some milliseconds.
    let mut repeats: VecDeque<(tokio::time::Instant, Bytes)> = VecDeque::new();
    loop {
        let repeat_at = repeats.front().map(|(due, _)| *due);
        let repeat = async {
            match repeat_at {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            count = asking.recv_many(&mut gathered, MAX_REQUEST_PAGES) => {
                if count == 0 {
                    return;
                }
            }
            () = repeat => {
                if let Some((_, request)) = repeats.pop_front()
                    && link.send(Lane::FaultRequest, request).await.is_err()
                {
                    return;
                }
                continue;
            }
            _ = link.ended() => return,
        }
        let faults = gathered.iter().filter(|(wanted, _)| wanted.names_thread()).count();
        counters.remote_faults.fetch_add(faults as u64, Ordering::Relaxed);
        for whole in [false, true] {
            let pages: Vec<Wanted> =
                gathered.iter().filter(|asked| asked.1 == whole).map(|asked| asked.0).collect();
            if pages.is_empty() {
                continue;
            }
            let request = Bytes::from(encode(&FaultRequest { pages, whole }));
            // The link's end is told by the control lane.
            if link.send(Lane::FaultRequest, request.clone()).await.is_err() {
                return;
            }
            if !whole {
                repeats.push_back((tokio::time::Instant::now() + REPEAT_AFTER, request));
            }
        }
        gathered.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::codec::test_pages::page_of;
    use crate::codec::{CodecChoice, Kin, PageCodec};
    use crate::memory::{GuestMemory, MemoryLayout, RegionLayout};
    use crate::page::{PAGE_SIZE_BYTES, PageBytes};
    use crate::session::ledger::MAX_WAITING;
    use crate::wire::{FrameEncoder, PageToSend};

    /// More than may wait for one of them.
    const PAGES: u64 = MAX_WAITING as u64 + 44;

    fn content(page: PageIndex) -> PageBytes {
        page_of(page.0 + 1)
    }

    /// Appends a page that builds on `kin`, which ascend.
    fn put(encoder: &mut FrameEncoder, page: PageIndex, kin: &[PageIndex], message: &mut Vec<u8>) {
        let kin = Kin {
            bytes: kin.iter().flat_map(|page| content(*page)).collect(),
            pages: kin.iter().map(|page| (*page, Version(1))).collect(),
        };
        let bytes = &content(page);
        encoder.encode(Version(1), &[PageToSend { page, bytes, base: None }], &kin, message);
    }

    fn encoder() -> FrameEncoder {
        let page = PageCodec::ZstdKin { level: 1 };
        FrameEncoder::new(CodecChoice { page, ..CodecChoice::default() })
    }

    /// As two encoders make them: each frame builds on pages that went before it, by whichever encoder, in
    /// messages that may end later.
    fn messages(frames: &[(usize, Vec<prop::sample::Index>, bool)]) -> Vec<Bytes> {
        let mut encoder = encoder();
        let (mut open, mut done) = ([Vec::new(), Vec::new()], Vec::new());
        for (at, (by, kin, is_last)) in frames.iter().enumerate() {
            let mut kin: Vec<u64> =
                kin.iter().filter(|_| at > 0).map(|kin| kin.index(at) as u64).collect();
            kin.sort_unstable();
            kin.dedup();
            let kin: Vec<PageIndex> = kin.into_iter().map(PageIndex).collect();
            let message = &mut open[by % 2];
            put(&mut encoder, PageIndex(at as u64), &kin, message);
            if *is_last {
                done.push(Bytes::from(std::mem::take(message)));
            }
        }
        done.extend(open.map(Bytes::from));
        done.retain(|message| !message.is_empty());
        done
    }

    /// A destination that has nothing yet.
    struct World {
        memory: Arc<GuestMemory>,
        application: Application,
        happenings: mpsc::UnboundedReceiver<Happened>,
    }

    impl World {
        fn new() -> Self {
            let size_bytes = PAGES * PAGE_SIZE_BYTES as u64;
            let region = RegionLayout { name: "ram0".to_owned(), size_bytes };
            let memory = Arc::new(GuestMemory::create(&MemoryLayout::new(vec![region])).unwrap());
            let table = Arc::new(PageTable::anonymous(PAGES).unwrap());
            let (happened, happenings) = mpsc::unbounded_channel();
            let application = Application {
                arrivals: Arc::new(Arrivals::new(memory.clone(), table, Arc::default())),
                ledger: Arc::default(),
                asked: ask_queue().0,
                happened,
            };
            World { memory, application, happenings }
        }

        fn expect(&self, messages: usize) {
            let mut ledger = self.application.ledger.lock().unwrap();
            let noted = ledger.expect(Version(1), messages as u64);
            drop(ledger);
            tell_round(noted, &self.application.happened, &self.application.asked).unwrap();
        }

        /// The pages that the round could not bring, and those of the first `pages` that are not what was sent.
        fn end(mut self, pages: u64) -> (Vec<PageIndex>, Vec<PageIndex>) {
            let done = self.happenings.try_recv().expect("the round is over");
            let Happened::Event(DestinationEvent::RoundApplied { rejected, .. }) = done else {
                panic!("something else has happened");
            };
            let is_wrong = |page: &PageIndex| {
                let mut there = [0; PAGE_SIZE_BYTES];
                self.memory.read_page(*page, &mut there);
                there != content(*page)
            };
            (rejected, (0..pages).map(PageIndex).filter(is_wrong).collect())
        }
    }

    fn apply(application: &Application, message: Bytes, scratch: &mut DecodeScratch) {
        application.apply(Unapplied { message, may_wait: true }, scratch).unwrap();
    }

    #[test]
    fn a_thread_that_has_one_more_than_may_wait_takes_in_no_more_until_it_can_be_applied() {
        let (world, mut encoder) = (World::new(), encoder());
        let mut message = |page: u64, kin: &[PageIndex]| {
            let mut message = Vec::new();
            put(&mut encoder, PageIndex(page), kin, &mut message);
            Bytes::from(message)
        };
        let first = message(0, &[]);
        let waiting: Vec<Bytes> = (1..PAGES).map(|page| message(page, &[PageIndex(0)])).collect();
        let taken_in = AtomicUsize::new(0);
        world.expect(PAGES as usize);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut scratch = DecodeScratch::default();
                for message in waiting {
                    taken_in.fetch_add(1, Ordering::Relaxed);
                    apply(&world.application, message, &mut scratch);
                }
            });
            while taken_in.load(Ordering::Relaxed) <= MAX_WAITING {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(taken_in.load(Ordering::Relaxed), MAX_WAITING + 1);
            apply(&world.application, first, &mut DecodeScratch::default());
        });
        assert_eq!(world.end(PAGES), (vec![], vec![]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn as_many_messages_as_may_wait_give_every_page_in_any_order(
            frames in prop::collection::vec(
                (0..2usize, prop::collection::vec(any::<prop::sample::Index>(), 0..8), any::<bool>()),
                1..40,
            ),
            order in any::<u64>(),
            end_after in any::<prop::sample::Index>(),
        ) {
            let world = World::new();
            let mut messages = messages(&frames);
            fastrand::Rng::with_seed(order).shuffle(&mut messages);
            let (count, mut scratch) = (messages.len(), DecodeScratch::default());
            let end = end_after.index(count + 1);
            for at in 0..=count {
                if at == end {
                    world.expect(count);
                }
                if let Some(message) = messages.get(at).cloned() {
                    apply(&world.application, message, &mut scratch);
                }
            }
            prop_assert_eq!(world.end(frames.len() as u64), (vec![], vec![]));
        }
    }
}
