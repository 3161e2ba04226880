//! What comes on the lanes of pages, and what is asked for on that of faults.

use super::*;

/// Threads that apply bulk, at most: one takes up what some Gbit/s bring.
const MAX_BULK_APPLIERS: usize = 8;

impl Session {
    /// Starts to work on the lanes of the current link, once the guest's memory is registered.
    pub(super) fn start_lanes(&mut self) {
        let Some(on_link) = self.links.on_link() else { return };
        let arrivals = match &*self.prepared.lock().expect("no holder panics") {
            Some(prepared) => prepared.arrivals.clone(),
            None => return,
        };
        if self.lanes_of.replace(on_link.number) == Some(on_link.number) {
            return;
        }
        let cores = crate::cores::cores();
        let bulk = std::iter::repeat_n(Lane::Push, cores.min(MAX_BULK_APPLIERS));
        for lane in bulk.chain([Lane::FaultReply, Lane::Bundle]) {
            let applier = Applier {
                lane,
                on_link: on_link.clone(),
                arrivals: arrivals.clone(),
                ledger: self.ledger.clone(),
                asked: self.asked.clone(),
                happened: self.happened.clone(),
            };
            if let Err(failure) = applier.start(Handle::current()) {
                self.fail(failure);
            }
        }
        self.tasks.spawn(ask(on_link, self.asking.clone(), self.counters.clone()));
    }
}

/// A thread that applies what comes on one lane. Messages of bulk come in any order, so several threads may
/// work on them.
struct Applier {
    lane: Lane,
    on_link: OnLink,
    arrivals: Arc<Arrivals>,
    ledger: Arc<Mutex<RoundLedger>>,
    asked: AskSender,
    happened: mpsc::UnboundedSender<Happened>,
}

impl Applier {
    fn start(self, handle: Handle) -> Result<(), Failure> {
        let thread = std::thread::Builder::new().name(format!("apply-{:?}", self.lane));
        thread
            .spawn(move || {
                let mut scratch = DecodeScratch::default();
                // The link's end is told by the control lane.
                while let Ok(message) = handle.block_on(self.on_link.link.recv(self.lane)) {
                    if let Err(failure) = self.apply(message, &mut scratch) {
                        let event = DestinationEvent::Failed(failure);
                        let _ = self.happened.send(Happened::Event(event));
                        return;
                    }
                }
            })
            .map(drop)
            .map_err(|error| Failure::plain(format!("no thread could be started: {error}")))
    }

    fn apply(&self, message: Bytes, scratch: &mut DecodeScratch) -> Result<(), Failure> {
        let was_complete = self.arrivals.is_complete();
        let applied = self.arrivals.apply(&message, scratch)?;
        let mut ledger = self.ledger.lock().expect("no holder panics");
        let noted = ledger.note(applied.version, applied.rejected);
        drop(ledger);
        tell_round(noted, &self.happened, &self.asked)?;
        if !was_complete && self.arrivals.is_complete() {
            let _ = self.happened.send(Happened::Event(DestinationEvent::PagesComplete));
        }
        Ok(())
    }
}

pub(super) fn tell_round(
    noted: Noted,
    happened: &mpsc::UnboundedSender<Happened>,
    asked: &AskSender,
) -> Result<(), Failure> {
    match noted {
        Noted::Waiting => {}
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
