//! Takes the place of a `receive` that was killed.
//!
//! QEMU has kept the userfaultfd open, so that whoever touched a missing page since waits. The page table
//! lies in a file in memory and tells what every page is; one that was being written when the process was
//! killed counts as unknown. Before the decision had come there is nothing to save: the guest is given up
//! here, and the source, which is told so, lets it run on. When every page had come there is nothing to do:
//! the guest is let go of, and the source told.

use tokio::task::JoinHandle;

use super::actions::serve;
use super::ending::{keep_evidence, tell_of_refusal};
use super::*;
use crate::guest::Whereabouts;
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
    // The source may have decided, and be in doubt.
    let awaited = keep.final_version.is_some();
    let left = if !committed {
        Left::give_up(place).await?
    } else if has(Entry::Complete) {
        Left::let_go(place).await?
    } else {
        let version = keep.final_version.ok_or_else(|| {
            Failure::plain("what was kept for a takeover does not know of the switchover")
        })?;
        let guest = blocking(move || Ok(LeftQemu::find(&place, Access::ReadWrite)?)).await?;
        Left::serve(guest, &journal.pages_path(), version, keep.paused).await?
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
            let refused = matches!(left.standing, Standing::GivenUp);
            let hint = if refused && awaited {
                tell_of_refusal(&journal)
            } else if refused {
                journal.remove();
                "the guest was ended here, where it never ran; on the source see `farfault status`"
                    .to_owned()
            } else if left.settle_alone().await? {
                keep_evidence(&mut journal)
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
    standing: Standing,
}

/// How the guest stands here.
enum Standing {
    /// It never ran here, and never will.
    GivenUp,
    /// It runs with all its pages.
    Complete,
    Served(Served),
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
    /// Ends the guest that never ran here, unless an earlier process has, or it has ended by itself.
    async fn give_up(place: Whereabouts) -> Result<Self, Failure> {
        let guest = blocking(move || {
            let mut guest = LeftQemu::settled(&place)?;
            guest.discard()?;
            Ok(guest)
        })
        .await?;
        Ok(Left { guest: Shared::new(Box::new(guest)), standing: Standing::GivenUp })
    }

    /// Makes sure that the guest, which has all its pages, waits for nothing. It may be running for long.
    async fn let_go(place: Whereabouts) -> Result<Self, Failure> {
        let guest = blocking(move || {
            let mut guest = LeftQemu::settled(&place)?;
            guest.unregister()?;
            // What this cannot do it only notes.
            DestinationGuest::release(&mut guest)?;
            Ok(guest)
        })
        .await?;
        Ok(Left { guest: Shared::new(Box::new(guest)), standing: Standing::Complete })
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
        let served = Served { prepared, mapper, counters, asked, asking, starting };
        Ok(Left { guest, standing: Standing::Served(served) })
    }

    /// The source has not come. True when it was not needed: the guest is given up here, or has all its
    /// pages and is let go of by now.
    async fn settle_alone(self) -> Result<bool, Failure> {
        let Standing::Served(Served { prepared, mapper, starting, .. }) = self.standing else {
            return Ok(true);
        };
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
        let served = match self.standing {
            Standing::Served(served) => served,
            Standing::Complete => {
                session.machine = DestinationMachine::resumed_complete();
                return;
            }
            Standing::GivenUp => {
                let reason =
                    "the farfault that received the guest was killed before it could run there";
                session.machine = DestinationMachine::resumed_to_refuse(Failure::plain(reason));
                return;
            }
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
        *lock(&session.prepared) = Some(prepared);
        session.start_lanes();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::{Ipv4Addr, UdpSocket};

    use tempfile::TempDir;

    use super::*;
    use crate::guest::qemu::{QemuDestination, SpawnOptions};
    use crate::memory::HostCapabilities;
    use crate::memory::adopt::ProcessIdentity;
    use crate::session::control::ask_cancel;
    use crate::session::journal::list;
    use crate::transport::{Ticket, connect, reconnect};
    use crate::wire::message::SourceStage;

    const COMPLETE: [DestinationRecord; 3] =
        [DestinationRecord::Started, DestinationRecord::Committed, DestinationRecord::Complete];
    /// Nobody waits so long in a test.
    const FOR_EVER: Duration = Duration::from_secs(3600);

    fn options() -> TransportOptions {
        TransportOptions { keep_alive_ms: 100, idle_timeout_ms: 1_000, ..Default::default() }
    }

    /// A process that has ended.
    fn ended() -> ProcessIdentity {
        let me = ProcessIdentity::own().unwrap();
        ProcessIdentity { start_ticks: me.start_ticks + 1, ..me }
    }

    /// A guest whose QEMU has ended.
    fn ended_guest() -> Whereabouts {
        Whereabouts { process: Some(ended()), started_here: true, ..Whereabouts::default() }
    }

    /// What a killed `receive` has left, and its source.
    struct Killed {
        state: TempDir,
        ticket: Ticket,
        key: SessionKey,
    }

    impl Killed {
        async fn after(records: &[DestinationRecord], guest: Whereabouts) -> Self {
            let state = tempfile::tempdir().unwrap();
            let local = (Ipv4Addr::LOCALHOST, 0).into();
            let (listener, ticket) = Listener::bind(local, Vec::new(), &options()).unwrap();
            let to = options();
            let (source, link) = tokio::join!(connect(&ticket, &to), listener.accept(None));
            let (source, link) = (source.unwrap(), link.unwrap());
            let migration = ticket.migration.to_string();
            let about = About::begin(&migration, Side::Destination, guest).unwrap();
            let about = About { owner: ended(), ..about };
            let mut journal = Journal::create(state.path(), &about).unwrap();
            records.iter().for_each(|record| journal.record(record).unwrap());
            journal.keep(&Keep {
                session: SavedReceiver::of(&listener, &link),
                strategy: Strategy::Hybrid,
                paused: false,
                final_version: Some(Version(1)),
            });
            let key = source.session_key();
            drop((source, link, listener));
            // The socket is closed a little later.
            while UdpSocket::bind(ticket.addresses[0]).is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Killed { state, ticket, key }
        }

        /// Another process takes over.
        fn resume(&self, reconnect_for: Duration) -> JoinHandle<Result<Report, Failure>> {
            let found = self.left();
            let output = Arc::new(Output::new(false));
            let to = options();
            tokio::spawn(async move { resume_receive(found, &to, reconnect_for, output).await })
        }

        /// The source comes back after its decision, and is told how things stand.
        async fn ask(&self) -> (Link, DestinationStage) {
            let mut tries = 0;
            let link = loop {
                match reconnect(&self.ticket, &self.key, &options()).await {
                    // It does not listen yet.
                    Err(_) if tries < 30 => tries += 1,
                    other => break other.unwrap(),
                }
            };
            let asks = encode(&ToDestination::Resync { at: SourceStage::Decided });
            link.control_send(asks.into()).await.unwrap();
            let told = decode(&link.control_recv().await.unwrap()).unwrap();
            let ToSource::Resync { at, .. } = told else { panic!("{told:?}") };
            (link, at)
        }

        /// The journal that is there.
        fn left(&self) -> Found {
            list(self.state.path()).unwrap().0.pop().unwrap()
        }

        fn leaves_nothing(&self) -> bool {
            fs::read_dir(self.state.path()).unwrap().next().is_none()
        }
    }

    /// A QEMU that `receive` has started, with its RAM registered; ended with this value.
    struct Registered(Whereabouts);

    impl Registered {
        fn start() -> Self {
            let line = "qemu-system-x86_64 -accel tcg -nodefaults -display none -m 64 \
                -machine q35,memory-backend=ram -object memory-backend-memfd,id=ram,size=64M,share=on";
            let command = line.split_whitespace().map(Into::into).collect();
            let mut qemu = QemuDestination::spawn(&SpawnOptions { command, log: None }).unwrap();
            let registered = Registered(qemu.whereabouts());
            drop(qemu.userfault().unwrap());
            qemu.leave().unwrap();
            registered
        }

        /// Whether first touches of its RAM wait.
        fn waits(&self) -> bool {
            let pid = self.0.process.unwrap().pid;
            let mappings = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
            let mut flags = mappings.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
            flags.any(|flags| flags.split_whitespace().any(|flag| ["um", "ui"].contains(&flag)))
        }
    }

    impl Drop for Registered {
        fn drop(&mut self) {
            let _ = end(&self.0);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_guest_with_all_its_pages_is_let_go_of_and_its_source_told() {
        let has_qemu = std::process::Command::new("qemu-system-x86_64").arg("--version").output();
        if has_qemu.is_err() || !HostCapabilities::can_serve_faults() {
            eprintln!("*** SKIPPED: there is no QEMU, or this process may not serve faults ***");
            return;
        }
        let qemu = Registered::start();
        let socket = qemu.0.qmp.clone().unwrap();
        assert!(qemu.waits() && socket.exists());
        let killed = Killed::after(&COMPLETE, qemu.0.clone()).await;
        let receiving = killed.resume(FOR_EVER);
        let (source, at) = killed.ask().await;
        assert_eq!(at, DestinationStage::Done);
        assert!(!qemu.waits(), "it would wait at pages that nobody serves");
        assert!(!socket.exists());
        let bye = encode(&ToDestination::Bye { downtime_us: Some(5) });
        source.control_send(bye.into()).await.unwrap();
        let report = receiving.await.unwrap().unwrap();
        assert_eq!(report.result, MigrationResult::Migrated);
        assert_eq!(report.pages_total, 64 << 20 >> 12);
        assert!(killed.leaves_nothing());

        // The same, with nothing left to be done and a source that does not come.
        let killed = Killed::after(&COMPLETE, qemu.0.clone()).await;
        let failure = killed.resume(Duration::from_millis(200)).await.unwrap().unwrap_err();
        // Where the guest runs is told to whoever asks here.
        assert!(failure.hint.as_ref().unwrap().contains("may not know"), "{failure}");
        assert!(!qemu.waits() && qemu.0.process.unwrap().lives() && !killed.leaves_nothing());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_is_told_to_end_does_not_wait_for_a_source_that_has_only_to_be_told() {
        let killed = Killed::after(&COMPLETE, ended_guest()).await;
        let receiving = killed.resume(FOR_EVER);
        let (source, at) = killed.ask().await;
        assert_eq!(at, DestinationStage::Done);
        // Before it could say its last word.
        source.abandon();
        let directory = killed.left().directory;
        let begin = Instant::now();
        // Until it has seen that the link is down it goes on.
        while !receiving.is_finished() {
            assert!(begin.elapsed() < Duration::from_secs(30), "it waits");
            let directory = directory.clone();
            let _ = tokio::task::spawn_blocking(move || ask_cancel(&directory)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(receiving.await.unwrap().unwrap().result, MigrationResult::Migrated);
        assert!(!killed.leaves_nothing(), "the only evidence of where the guest runs");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_refusal_that_the_source_may_wait_for_is_kept() {
        let killed = Killed::after(&[DestinationRecord::Loaded], ended_guest()).await;
        let failure = killed.resume(Duration::from_millis(100)).await.unwrap().unwrap_err();
        let hint = failure.hint.as_ref().unwrap();
        assert!(hint.contains("`farfault receive --resume` here and"), "{failure}");
        // The evidence that it never ran here.
        let left = killed.left();
        assert!(left.records.has(Entry::Refused));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_guest_that_ended_before_the_decision_was_written_down_is_refused_to_its_source() {
        let refused = [DestinationRecord::Loaded, DestinationRecord::Refused];
        // The second time an earlier heir has ended it, and was killed too.
        for records in [&refused[..1], &refused] {
            let killed = Killed::after(records, ended_guest()).await;
            let receiving = killed.resume(FOR_EVER);
            let (_source, at) = killed.ask().await;
            assert!(matches!(at, DestinationStage::Refused { .. }), "{at:?}");
            let report = receiving.await.unwrap().unwrap();
            assert_eq!(report.result, MigrationResult::Refused);
            assert!(killed.leaves_nothing());
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_guest_that_ended_after_the_decision_was_written_down_is_not_refused() {
        let committed = [DestinationRecord::Started, DestinationRecord::Committed];
        let killed = Killed::after(&committed, ended_guest()).await;
        let failure = killed.resume(FOR_EVER).await.unwrap().unwrap_err();
        assert!(failure.reason.contains("has ended") && !killed.leaves_nothing(), "{failure}");
    }
}
