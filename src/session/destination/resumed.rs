//! Takes the place of a `receive` that was killed.
//!
//! QEMU has kept the userfaultfd open, so that whoever touched a missing page since waits. The page table
//! lies in a file in memory and tells what every page is; one that was being written when the process was
//! killed counts as unknown. Before the decision had come there is nothing to save: the guest is given up
//! here, and the source, which is told so, lets it run on.

use tokio::task::JoinHandle;

use super::actions::serve;
use super::*;
use crate::guest::qemu::{LeftQemu, end, let_run_when_it_answers};
use crate::memory::Access;
use crate::session::journal::{Entry, Found};
use crate::transport::{SavedError, TransportOptions};

/// Goes on with a migration whose destination process was killed. The report is there even when it
/// fails.
///
/// # Errors
/// When there is nothing to go on with; when the source does not come back in time.
pub async fn resume_receive(
    found: Found,
    transport: &TransportOptions,
    reconnect_for: Duration,
    output: Arc<Output>,
) -> Result<Report, Failure> {
    let mut signals = StopSignals::listen()?;
    let mut journal = Journal::take_over(&found)?;
    let has = |entry| found.records.has(entry);
    // A refusal that follows the decision was made before the guest ran, and the source may know of it.
    let refused = has(Entry::Refused);
    let committed = has(Entry::Committed) && !refused;
    if !committed && !refused {
        journal.record(&DestinationRecord::Refused)?;
    }
    let keep = match found.kept::<Keep>() {
        Ok(keep) => keep,
        // The guest runs here, or will: it waits until that can be read.
        Err(failure) if committed => return Err(failure),
        Err(failure) => {
            let place = found.about.guest.clone();
            blocking(move || Ok(end(&place)?)).await?;
            if has(Entry::Started) {
                let hint = "the guest, which never ran here, is ended; the journal says so to whoever asks \
                            for the source";
                return Err(Failure::new(failure.reason, hint));
            }
            journal.remove();
            let reason = "no source had come yet: the guest that waited here is ended";
            return Err(Failure::new(reason, "start `farfault receive` anew"));
        }
    };
    journal.own(&found.about)?;
    signals.listen_at(&journal, &output);
    let place = found.about.guest.clone();
    let guest = blocking(move || Ok(LeftQemu::find(&place, Access::ReadWrite)?)).await?;
    let left = if committed {
        let version = keep.final_version.ok_or_else(|| {
            Failure::plain("what was kept for a takeover does not know of the switchover")
        })?;
        Left::serve(guest, &journal.pages_path(), version, keep.paused).await?
    } else {
        Left::give_up(guest).await?
    };
    let damaged = |error: SavedError| Failure::plain(error.to_string());
    let key = keep.session.session().map_err(damaged)?;
    let listener = Listener::reopen(&keep.session, transport)
        .map_err(|error| Failure::plain(error.to_string()))?;
    let accepted = tokio::select! {
        link = listener.accept_resumed(&key, Some(reconnect_for)) => {
            link.map_err(|error| Failure::plain(error.to_string()))
        }
        asked = signals.wait() => {
            asked.answer(Verdict::refused("it is being taken over"));
            Err(Failure::plain("stopped by the operator, before the source came back"))
        }
    };
    let link = match accepted {
        Ok(link) => link,
        Err(failure) => {
            let settled = left.settle_alone().await?;
            if settled {
                journal.remove();
            }
            let hint = if settled {
                "this side has all it needs; on the source see `farfault status`".to_owned()
            } else {
                format!("on the source: farfault send --resume {}", found.about.migration)
            };
            return Err(Failure::new(failure.reason, hint));
        }
    };
    output.link(LinkState::Up);
    let options = ReceiveOptions {
        state_dir: PathBuf::new(),
        paused: keep.paused,
        reconnect_for,
        page_table: Arc::default(),
        huge_pages: false,
        trace: None,
    };
    let strategy = keep.strategy;
    let mut session =
        Session::new(left.guest.clone(), link, options, (journal, None, keep), output);
    session.strategy = strategy;
    left.join(&mut session);
    let _ = session.happened.send(Happened::Event(DestinationEvent::LinkUp));
    Ok(session.run(signals, &listener).await)
}

/// What was left, before there is a link.
struct Left {
    guest: Shared<dyn DestinationGuest>,
    /// `None` when it is given up.
    served: Option<Served>,
}

/// The guest here, with its faults served.
struct Served {
    prepared: Prepared,
    mapper: Option<Mapper>,
    counters: Arc<Counters>,
    asked: AskSender,
    asking: AskReceiver,
    /// The guest runs as soon as its monitor listens, for which it may need pages of the source.
    starting: JoinHandle<Result<(), Failure>>,
}

impl Left {
    /// Ends the guest that never ran here.
    async fn give_up(guest: LeftQemu) -> Result<Self, Failure> {
        let guest = Shared::new(Box::new(guest) as Box<dyn DestinationGuest>);
        guest.call(|guest| guest.discard()).await?;
        Ok(Left { guest, served: None })
    }

    /// Serves the faults of the guest, and makes sure that it runs.
    async fn serve(
        mut guest: LeftQemu,
        pages_path: &Path,
        version: Version,
        paused: bool,
    ) -> Result<Self, Failure> {
        let pages_path = pages_path.to_owned();
        let (asked, asking) = ask_queue();
        let counters = Arc::new(Counters::default());
        let place = DestinationGuest::whereabouts(&guest);
        let (to_ask, counting) = (asked.clone(), counters.clone());
        let (guest, prepared, mapper) = blocking(move || {
            let memory = DestinationGuest::memory(&guest);
            let table = Arc::new(PageTable::open(&pages_path)?);
            if table.pages() != memory.pages() {
                return Err(Failure::plain("the page table is that of another guest"));
            }
            table.recover();
            let userfault = Arc::new(guest.userfault()?);
            let arrivals = Arrivals::resumed(memory, table.clone(), counting, version);
            let options = FaultOptions::default();
            let prepared = serve(arrivals, userfault.clone(), table, options, to_ask)?;
            // Whoever waits asks again, now us.
            userfault.wake(userfault.pages())?;
            let mapper = Mapper::start(&prepared.faults)?;
            let guest = Shared::new(Box::new(guest) as Box<dyn DestinationGuest>);
            Ok((guest, prepared, Some(mapper)))
        })
        .await?;
        // Not through `guest`, which the session needs meanwhile.
        let starting = tokio::spawn(blocking(move || {
            if !paused {
                let_run_when_it_answers(&place)?;
            }
            Ok(())
        }));
        let served = Some(Served { prepared, mapper, counters, asked, asking, starting });
        Ok(Left { guest, served })
    }

    /// The source has not come. True when it was not needed: the guest is given up here, or has all its
    /// pages and is let go of.
    async fn settle_alone(self) -> Result<bool, Failure> {
        let Some(Served { prepared, mapper, starting, .. }) = self.served else { return Ok(true) };
        if !prepared.arrivals.is_complete() {
            return Ok(false);
        }
        // All that its monitor may have waited for is here.
        starting.await.map_err(|error| Failure::plain(error.to_string()))??;
        blocking(move || {
            drop(mapper);
            Ok(prepared.userfault.release()?)
        })
        .await?;
        self.guest.call(|guest| guest.release()).await?;
        Ok(true)
    }

    /// Puts it into a session, which has a link.
    fn join(self, session: &mut Session) {
        let Some(served) = self.served else {
            let reason =
                "the farfault that received the guest was killed before it could run there";
            session.machine = DestinationMachine::resumed_to_refuse(Failure::plain(reason));
            return;
        };
        let Served { prepared, mapper, counters, asked, asking, starting } = served;
        session.machine = DestinationMachine::resumed();
        session.ledger.lock().expect("no holder panics").close();
        let missing = counters.remaining_pages.load(Ordering::Relaxed);
        *session.remaining_at_freeze.lock().expect("no holder panics") = missing;
        if prepared.arrivals.is_complete() {
            let _ = session.happened.send(Happened::Event(DestinationEvent::PagesComplete));
        }
        let happened = session.happened.clone();
        session.tasks.spawn(async move {
            let event = match starting.await {
                Ok(Ok(())) => DestinationEvent::Running,
                Ok(Err(failure)) => DestinationEvent::Failed(failure),
                Err(error) => DestinationEvent::Failed(Failure::plain(error.to_string())),
            };
            let _ = happened.send(Happened::Event(event));
        });
        (session.asked, session.counters, session.mapper) = (asked, counters, mapper);
        session.asking = Arc::new(tokio::sync::Mutex::new(asking));
        *session.prepared.lock().expect("no holder panics") = Some(prepared);
        session.start_lanes();
    }
}
