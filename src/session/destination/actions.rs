//! What the machine asks for, carried out.

use super::lanes::{again, tell_round};
use super::*;

/// A refusal gets so long to reach the source before the link is closed.
const REFUSAL_GRACE: Duration = Duration::from_secs(5);

impl Session {
    pub(super) async fn act(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(message) => self.send(message).await,
            DestinationAction::Prepare { shape, strategy, runs } => {
                self.strategy = strategy;
                self.options.paused |= !runs;
                self.prepare(*shape);
            }
            DestinationAction::AwaitRound { round, messages } => {
                let noted = self.ledger.lock().expect("no holder panics").expect(round, messages);
                match noted {
                    Noted::Apply(message) => self.apply_now(message),
                    noted => {
                        if let Err(failure) = tell_round(noted, &self.happened, &self.asked) {
                            self.fail(failure);
                        }
                    }
                }
            }
            DestinationAction::CollectPages { outage, of } => self.collect_pages(outage, of),
            DestinationAction::KeepRehearsal(state) => self.keep_rehearsal(state).await,
            DestinationAction::AwaitFlight(version) => self.await_flight(version),
            DestinationAction::LoadDeviceState => {
                let (guest, state) = (self.guest.clone(), self.device_state.clone());
                let timeline = self.timeline.clone();
                self.spawn_step(async move {
                    let state = state.lock().expect("no holder panics").take().unwrap_or_default();
                    let begin = Instant::now();
                    guest.call(move |guest| guest.load_device_state(&state)).await?;
                    timeline.part("offer.load", begin.elapsed());
                    Ok(DestinationEvent::Loaded)
                });
            }
            DestinationAction::Journal(record) => {
                let journal = self.journal.clone();
                self.spawn_step(async move {
                    let write = move || {
                        let mut journal = journal.lock().expect("no holder panics");
                        Ok(match journal.record(&record) {
                            Ok(()) => DestinationEvent::Journaled(record),
                            Err(failure) if journal.is_sound() => {
                                DestinationEvent::JournalFailed(record, failure)
                            }
                            Err(failure) => DestinationEvent::JournalUnknown(record, failure),
                        })
                    };
                    let unknown = |failure| DestinationEvent::JournalUnknown(record, failure);
                    Ok(blocking(write).await.unwrap_or_else(unknown))
                });
            }
            DestinationAction::RunGuest => self.run_guest(),
            DestinationAction::ReleaseGuest => {
                let (guest, prepared) = (self.guest.clone(), self.prepared.clone());
                let mapper = self.mapper.take();
                self.spawn_farewell(async move {
                    blocking(move || {
                        drop(mapper);
                        if let Some(prepared) = &*lock(&prepared) {
                            prepared.userfault.release()?;
                        }
                        Ok(())
                    })
                    .await?;
                    guest.call(|guest| guest.release()).await
                });
            }
            DestinationAction::DiscardGuest => {
                let (guest, prepared) = (self.guest.clone(), self.prepared.clone());
                // Of a guest that was to run, and did not.
                let mapper = self.mapper.take();
                self.spawn_farewell(async move {
                    // A monitor that waits for a page while it loads would neither return nor end. It
                    // goes on with wrong content, which does no harm: it never runs.
                    blocking(move || {
                        drop(mapper);
                        if let Some(prepared) = &*lock(&prepared) {
                            prepared.userfault.release()?;
                        }
                        Ok(())
                    })
                    .await?;
                    guest.call(|guest| guest.discard()).await
                });
            }
            DestinationAction::End(outcome) => self.outcome = Some(outcome),
        }
    }

    async fn send(&mut self, mut message: ToSource) {
        if let ToSource::Resync { running_us, .. } = &mut message {
            *running_us = self.runs_since.map(|since| since.elapsed().as_micros() as u64);
        }
        let Some(on_link) = self.links.on_link() else { return };
        let mut sent = on_link.link.control_send(encode(&message).into()).await;
        let refused = matches!(
            message,
            ToSource::Refused { .. }
                | ToSource::Resync { at: DestinationStage::Refused { .. }, .. }
        );
        if sent.is_ok() && refused {
            // The guest is discarded next, and the link closed: let it arrive first, or else try again.
            let idle_ms = REFUSAL_GRACE.as_millis() as u64;
            sent = tokio::time::timeout(REFUSAL_GRACE, on_link.link.finish())
                .await
                .unwrap_or(Err(LinkError::TimedOut { idle_ms }));
        }
        if let Err(error) = sent {
            let _ = self.happened.send(Happened::Heard(on_link.number, Heard::End(error)));
        }
    }

    /// A step that lets go of the guest, whose failure changes nothing.
    fn spawn_farewell(&mut self, step: impl Future<Output = Result<(), Failure>> + Send + 'static) {
        self.spawn_step(async move {
            Ok(match step.await {
                Ok(()) => DestinationEvent::Released,
                Err(failure) => {
                    tracing::warn!("letting go of the guest: {failure}");
                    DestinationEvent::LetGoFailed
                }
            })
        });
    }

    fn spawn_step(
        &mut self,
        step: impl Future<Output = Result<DestinationEvent, Failure>> + Send + 'static,
    ) {
        let happened = self.happened.clone();
        self.tasks.spawn(async move {
            let event = step.await.unwrap_or_else(DestinationEvent::Failed);
            let _ = happened.send(Happened::Event(event));
        });
    }

    /// Compares shapes, registers the guest's memory, and serves its faults.
    fn prepare(&mut self, source: Shape) {
        let (guest, counters) = (self.guest.clone(), self.counters.clone());
        let (prepared, asked) = (self.prepared.clone(), self.asked.clone());
        let watched = self.options.page_table.clone();
        let pages_path = self.journal.lock().expect("no holder panics").pages_path();
        let touches_kept = if self.options.trace.is_some() { TRACE_LIMIT } else { 0 };
        let fault_options = FaultOptions { touches_kept, ..FaultOptions::default() };
        self.spawn_step(async move {
            blocking(move || {
                let differences = source.differences(&guest.with(|guest| guest.shape().clone()));
                if !differences.is_empty() {
                    return Err(Failure::new(
                        format!("the two guests are not of one shape: {}", differences.join("; ")),
                        "start the destination with the command line of the source",
                    ));
                }
                let memory = guest.with(|guest| guest.memory());
                let userfault = Arc::new(guest.with(|guest| guest.userfault())?);
                let outlives = guest.with(|guest| guest.whereabouts().process.is_some());
                let table = Arc::new(make_table(&pages_path, memory.pages(), outlives)?);
                let _ = watched.set(table.clone());
                let arrivals = Arrivals::new(memory, table.clone(), counters);
                let ready = serve(arrivals, userfault, table, fault_options, asked.clone())?;
                *lock(&prepared) = Some(ready);
                Ok(DestinationEvent::Prepared)
            })
            .await
        });
    }

    /// Applies a message that has waited for pages which were rejected, and others like it.
    fn apply_now(&mut self, message: Unapplied) {
        let prepared = lock(&self.prepared);
        let arrivals = prepared.as_ref().map(|prepared| prepared.arrivals.clone());
        drop(prepared);
        let (Some(arrivals), Some(on_link)) = (arrivals, self.links.on_link()) else { return };
        let (application, happened) = (self.application(arrivals), self.happened.clone());
        self.tasks.spawn(async move {
            let apply = move || application.apply(message, &mut DecodeScratch::default());
            if let Err(failure) = blocking(apply).await {
                let _ = happened.send(Happened::Event(DestinationEvent::Failed(failure)));
            }
            // The link is at work until then: an outage ends the round only when nothing is applied any more.
            drop(on_link);
        });
    }

    /// Looks up what the source must know of pages after an outage, when nothing is being applied.
    fn collect_pages(&mut self, outage: u32, of: PagesOf) {
        let (prepared, ledger) = (self.prepared.clone(), self.ledger.clone());
        let asked = self.asked.clone();
        self.spawn_step(async move {
            blocking(move || {
                let prepared = lock(&prepared);
                let prepared = prepared.as_ref().expect("prepared before pages");
                let table = prepared.arrivals.table();
                let pages = match of {
                    PagesOf::Round(round) => {
                        if !ledger.lock().expect("no holder panics").end(round, outage) {
                            return Err(Failure::plain("the source names a round out of turn"));
                        }
                        PagesHere::Held(PackedSet::pack(&table.stale_at(round)))
                    }
                    PagesOf::Remainder => {
                        let missing = table.incomplete();
                        // What was asked for may be lost with the link.
                        let mut waiting = table.waiting_pages();
                        waiting.intersect_with(&missing);
                        for page in waiting.iter() {
                            // Who waits for it is not known any more. A page that is waited for by itself
                            // goes in a message by itself.
                            let alone = prepared.userfault.units().of(page).len() == 1;
                            let thread = if alone { Wanted::SOME_THREAD } else { Wanted::TOGETHER };
                            asked.send((Wanted { page, thread }, false));
                        }
                        PagesHere::Lacking(Lacking {
                            missing: PackedSet::pack(&missing),
                            without_base: PackedSet::pack(&table.absent()),
                        })
                    }
                };
                Ok(DestinationEvent::PagesCollected { outage, pages })
            })
            .await
        });
    }

    /// Before anything else is taken in, so that the answer stands before that to the round.
    async fn keep_rehearsal(&mut self, state: PackedState) {
        let kept = blocking(move || Ok(RehearsedState::new(state.unpack(None)?))).await;
        match kept {
            Ok(state) => {
                let answer = ToSource::Rehearsed { check: state.check() };
                *self.rehearsed.lock().expect("no holder panics") = Some(state);
                self.send(answer).await;
            }
            Err(failure) => self.fail(failure),
        }
    }

    fn await_flight(&mut self, offered: Version) {
        let Some(on_link) = self.links.on_link() else { return };
        let prepared = self.prepared.clone();
        let (device_state, happened) = (self.device_state.clone(), self.happened.clone());
        let (state_bytes, remaining) =
            (self.device_state_bytes.clone(), self.remaining_at_freeze.clone());
        let (pages, timeline) = (self.pages_total, self.timeline.clone());
        let (ledger, asked) = (self.ledger.clone(), self.asked.clone());
        let journal = self.journal.clone();
        let (strategy, paused) = (self.strategy, self.options.paused);
        self.keep = Keep { strategy, paused, final_version: Some(offered), ..self.keep.clone() };
        let keep = self.keep.clone();
        let (trace, steps) = (self.trace.clone(), self.happened.clone());
        let rehearsed = self.rehearsed.clone();
        self.tasks.spawn(async move {
            let bytes = match on_link.link.recv(Lane::State).await {
                Ok(bytes) => bytes,
                // It is offered again on the next link.
                Err(error) => {
                    let _ = steps.send(Happened::Heard(on_link.number, Heard::End(error)));
                    return;
                }
            };
            let event = blocking(move || {
                let begin = Instant::now();
                let flight: Flight = decode(&bytes)?;
                if flight.final_version != offered {
                    return Err(Failure::plain("the flight is not the one that was offered"));
                }
                if !ledger.lock().expect("no holder panics").may_close_at(offered) {
                    return Err(Failure::plain("the source offers the guest out of turn"));
                }
                let (need, zero) = (flight.need.unpack(pages)?, flight.zero.unpack(pages)?);
                let rehearsed = rehearsed.lock().expect("no holder panics");
                let state = flight.device_state.unpack(rehearsed.as_ref())?;
                *device_state.lock().expect("no holder panics") = Some(state);
                *state_bytes.lock().expect("no holder panics") =
                    flight.device_state.coded_bytes() as u64;
                *remaining.lock().expect("no holder panics") = need.len();
                let prepared = lock(&prepared);
                let arrivals = &prepared.as_ref().expect("prepared before the offer").arrivals;
                let missing = arrivals.switch_over(offered, &need, &zero)?;
                if let Some(trace) = &mut *trace.lock().expect("no holder panics") {
                    trace.missing(&need);
                }
                for page in ledger.lock().expect("no holder panics").close() {
                    asked.send(again(page));
                }
                journal.lock().expect("no holder panics").keep(&keep);
                timeline.part("offer.switch_over", begin.elapsed());
                if missing == 0 {
                    let _ = happened.send(Happened::Event(DestinationEvent::PagesComplete));
                }
                Ok(DestinationEvent::FlightArrived)
            })
            .await;
            let event = event.unwrap_or_else(DestinationEvent::Failed);
            let _ = steps.send(Happened::Event(event));
            // Until here this is work on the link: another one is taken after it.
            drop(on_link);
        });
    }

    fn run_guest(&mut self) {
        let prepared = self.prepared.clone();
        // A page that is mapped beforehand would not be seen to be touched.
        if let Some(Prepared { faults, .. }) = &*lock(&prepared)
            && self.options.trace.is_none()
        {
            match Mapper::start(faults) {
                Ok(mapper) => self.mapper = Some(mapper),
                // The guest then faults for each page, slower but as right.
                Err(error) => tracing::warn!("pages are not mapped in the background: {error}"),
            }
        }
        let (guest, paused) = (self.guest.clone(), self.options.paused);
        let timeline = self.timeline.clone();
        self.spawn_step(async move {
            let begin = Instant::now();
            if !paused && let Err(failure) = guest.call(|guest| guest.run()).await {
                let stands = guest.call(|guest| Ok(guest.stands_still())).await;
                return Ok(match stands {
                    Ok(true) => DestinationEvent::NotStarted(failure),
                    _ => DestinationEvent::Failed(failure),
                });
            }
            timeline.part("commit.run", begin.elapsed());
            Ok(DestinationEvent::Running)
        });
    }
}

/// The table of page states, where another process finds it when this one is killed, unless the guest
/// ends with this process.
fn make_table(path: &Path, pages: u64, outlives: bool) -> Result<PageTable, MemoryError> {
    if !outlives {
        return PageTable::anonymous(pages);
    }
    PageTable::create(path, pages).or_else(|error| {
        tracing::warn!(%error, "no other process could take over");
        PageTable::anonymous(pages)
    })
}

/// Serves the guest's faults from here on; pages that must come are put into `asked`.
pub(super) fn serve(
    arrivals: Arrivals,
    userfault: Arc<Userfault>,
    table: Arc<PageTable>,
    options: FaultOptions,
    asked: AskSender,
) -> Result<Prepared, Failure> {
    let queue = asked.clone();
    let ask = move |page: PageIndex, asked_for: AskedFor| {
        let thread = match asked_for {
            // In another namespace of processes it may have none.
            AskedFor::Thread(thread) => thread.unwrap_or(0).max(Wanted::SOME_THREAD),
            AskedFor::Unit => Wanted::TOGETHER,
            AskedFor::UnitAgain => Wanted::OVERDUE,
        };
        asked.send((Wanted { page, thread }, false));
    };
    let may_ask_again = move || queue.is_empty();
    let faults = FaultServer::start(userfault.clone(), table, options, ask, may_ask_again)?;
    let (arrivals, faults) = (Arc::new(arrivals), Arc::new(faults));
    arrivals.serve_with(faults.clone());
    Ok(Prepared { arrivals, userfault, faults })
}
