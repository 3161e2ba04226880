//! What the machine asks for, carried out.

use super::resumed::let_run_here;
use super::*;

/// Tasks that answer faults: while one encodes a page, another takes the next request. As many as there are
/// processors, within these.
const ANSWERERS: std::ops::RangeInclusive<usize> = 2..=8;

/// No link that anybody migrates over takes less than this: the flight is not waited for as if one did.
const SLOWEST_BYTES_PER_S: u64 = 64 << 10;

/// A path this short stays within a building,
const LAN_RTT_US: u64 = 1_000;
/// where the first pages should not wait for codecs that suit a slower link than this.
const LAN_BYTES_PER_S: f64 = 600e6;

impl Session {
    pub(super) async fn act(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(mut message) => {
                if let ToDestination::Bye { downtime_us } = &mut message {
                    *downtime_us = self.downtime.map(|downtime| downtime.as_micros() as u64);
                }
                let Some(on_link) = self.links.on_link() else { return };
                if let ToDestination::Offer { run_when, .. } = &message {
                    // With all pages there before it runs, the guest waits for none.
                    on_link.link.expect_faults(*run_when == RunWhen::Loaded);
                }
                if let Err(error) = on_link.link.control_send(encode(&message).into()).await {
                    // The receiving task finds the same; this one may be first.
                    link_ended(&self.happened, &on_link, error);
                }
            }
            SourceAction::SendRound(version) => self.send_round(version),
            SourceAction::ForgetPages(pages) => {
                if let Some(sender) = &mut self.sender {
                    sender.forget(&pages);
                }
            }
            SourceAction::EndRound { held } => self.end_round(&held),
            SourceAction::Freeze(version) => self.freeze(version),
            SourceAction::SendFlight => self.send_flight(),
            SourceAction::SendRemainder => {
                if let Some(frozen) = &self.frozen {
                    frozen.begin_again();
                }
                self.send_remainder();
            }
            SourceAction::SendLacking(lacking) => self.send_lacking(&lacking),
            SourceAction::Journal(record) => {
                let journal = self.journal.clone();
                self.spawn_step(async move {
                    let write = move || journal.lock().expect("no holder panics").record(&record);
                    Ok(match blocking(write).await {
                        Ok(()) => SourceEvent::Journaled(record),
                        Err(failure) => SourceEvent::JournalFailed(record, failure),
                    })
                });
            }
            SourceAction::ResumeGuest => {
                // Before the guest is asked for: whoever has it later sees this.
                self.is_to_stand.store(false, Ordering::SeqCst);
                let (guest, standstill) = (self.guest.clone(), self.standstill.clone());
                self.spawn_step(async move {
                    let resumed = guest.call(|guest| guest.resume()).await;
                    if resumed.is_err() {
                        standstill.leave_standing();
                    }
                    Ok(resumed.map_or_else(SourceEvent::ResumeFailed, |()| SourceEvent::Resumed))
                });
            }
            SourceAction::ReleaseGuest => {
                let (guest, quit) = (self.guest.clone(), self.options.quit_source);
                let output = self.output.clone();
                self.spawn_step(async move {
                    let released = guest.call(move |guest| guest.release(quit)).await;
                    // It is no failure of the migration.
                    if let Err(failure) = &released {
                        output.note(&format!("the guest has moved; here: {failure}"));
                    }
                    released.map(|()| SourceEvent::Released)
                });
            }
            SourceAction::End(outcome) => self.outcome = Some(outcome),
        }
    }

    /// Carries out a step whose result is an event.
    fn spawn_step(
        &mut self,
        step: impl Future<Output = Result<SourceEvent, Failure>> + Send + 'static,
    ) {
        let happened = self.happened.clone();
        self.tasks.spawn(async move {
            let event = step.await.unwrap_or_else(SourceEvent::Failed);
            let _ = happened.send(Happened::Event(event));
        });
    }

    /// From the decision on: should somebody let the guest run here, it is stopped again, and what is left of
    /// its memory is not sent any more.
    pub(super) fn watch_guest(&mut self) {
        let (guest, happened) = (self.guest.clone(), self.happened.clone());
        let is_to_stand = self.is_to_stand.clone();
        self.tasks.spawn(async move {
            loop {
                tokio::time::sleep(WATCH_INTERVAL).await;
                let is_to_stand = is_to_stand.clone();
                let looked = guest.call(move |guest| match is_to_stand.load(Ordering::SeqCst) {
                    true => guest.keep_still(),
                    false => Ok(true),
                });
                match looked.await {
                    Ok(true) => {}
                    Ok(false) => {
                        let event = SourceEvent::Failed(let_run_here());
                        let _ = happened.send(Happened::Event(event));
                        return;
                    }
                    // One that has ended does not run, and one that does not answer is not told to.
                    Err(failure) => tracing::debug!("the guest that was left here: {failure}"),
                }
            }
        });
    }

    fn send_round(&mut self, version: Version) {
        let Some(on_link) = self.links.on_link() else { return };
        let Some(mut sender) = self.sender.take() else { return };
        let (guest, kind) = (self.guest.clone(), self.options.tracker);
        let standstill = self.standstill.clone();
        let (happened, link) = (self.happened.clone(), on_link.link.clone());
        link.expect_faults(false);
        let (messages, queue) = mpsc::channel(4);
        let (rehearsed, measured) = (happened.clone(), link.clone());
        let number = on_link.number;
        self.tasks.spawn(async move {
            let forward = tokio::spawn(forward(link, queue, |link, message| async move {
                link.push(message).await
            }));
            let round = tokio::task::spawn_blocking(move || {
                let result = (|| {
                    if version == Version(1) && measured.stats().rtt_us < LAN_RTT_US {
                        sender.expect_link(LAN_BYTES_PER_S);
                    }
                    if !sender.is_tracking() {
                        let tracker = guest.with(|guest| guest.track(kind))?;
                        let past = guest.with(|guest| guest.writes_past_page_tables())?;
                        sender.track(tracker, past.then(|| standstill.clone()))?;
                    }
                    let summary = sender.send_round(version, &messages)?;
                    if version == Version(1) && summary.is_some() {
                        let rate = measured.stats().delivery_rate_bytes_per_s;
                        if let Some(state) = rehearse(&guest, &standstill, rate)? {
                            let _ = rehearsed.send(Happened::Rehearsed(number, state));
                        }
                    }
                    Ok(summary)
                })();
                drop(messages);
                (sender, result)
            });
            let (sender, result) = match round.await {
                Ok(done) => done,
                Err(error) => {
                    let failure = Failure::plain(format!("the sending thread failed: {error}"));
                    let _ = happened.send(Happened::Event(SourceEvent::Failed(failure)));
                    return;
                }
            };
            // What the link still holds is waited for by the destination's acknowledgement.
            let result = match forward.await {
                Ok(Ok(())) => result,
                Ok(Err(error)) => {
                    link_ended(&happened, &on_link, error);
                    result
                }
                Err(error) => {
                    Err(Failure::plain(format!("the thread that hands on a round failed: {error}")))
                }
            };
            let _ = happened.send(Happened::Round(sender, result));
        });
    }

    fn freeze(&mut self, version: Version) {
        let Some(mut sender) = self.sender.take() else { return };
        let (guest, happened) = (self.guest.clone(), self.happened.clone());
        let (timeline, stopped_at) = (self.timeline.clone(), self.stopped_at.clone());
        let stats = self.links.stats();
        let budget_bytes = self.options.engine.policy.downtime_bytes(
            stats.delivery_rate_bytes_per_s,
            Duration::from_micros(stats.min_rtt_us),
        );
        self.tasks.spawn_blocking(move || {
            let freeze = |sender: &mut RoundSender| {
                if sender.tracks_while_it_runs() && guest.with(|guest| guest.writes_past_page_tables())? {
                    return Err(Failure::new(
                        "the guest has got a disk past the page cache while its writes were followed: some may be missed",
                        "begin anew: from the start farfault can do it",
                    ));
                }
                // The destination was told at the beginning.
                let ran = guest.with(|guest| guest.runs());
                if guest.with(|guest| guest.is_running())? != ran {
                    let now = if ran { "does not run any more" } else { "runs by now" };
                    return Err(Failure::new(
                        format!("the guest {now}, which is not farfault's doing: it would be otherwise at the destination"),
                        "begin anew: it arrives as it is then",
                    ));
                }
                let begin = Instant::now();
                *stopped_at.lock().expect("no holder panics") = Some(begin);
                guest.with(|guest| guest.pause())?;
                timeline.part("freeze.stop", begin.elapsed());
                let saving = Instant::now();
                // Before the last look at the dirty pages: what the monitor writes while it saves
                // its state is then found too.
                let device_state = guest.with(|guest| guest.save_device_state())?;
                timeline.part("freeze.device_state", saving.elapsed());
                let scanning = Instant::now();
                let frozen = sender.freeze(version)?;
                frozen.push_hottest_first(budget_bytes);
                timeline.part("freeze.last_scan", scanning.elapsed());
                Ok(Box::new((frozen, device_state)))
            };
            // Whatever comes of it must be told: else the guest would stand still for ever.
            let result = without_panic(|| freeze(&mut sender));
            let _ = happened.send(Happened::Frozen(sender, result));
        });
    }

    /// Gives what the link is expected to take for it.
    pub(super) fn pack_flight(&mut self, frozen: FrozenPages, device_state: &[u8]) -> Duration {
        let packing = Instant::now();
        let device_state = PackedState::pack(device_state, self.rehearsal.base());
        self.device_state_bytes = device_state.coded_bytes() as u64;
        let flight = encode(&Flight {
            final_version: frozen.version(),
            need: PackedSet::pack(frozen.need()),
            zero: PackedSet::pack(frozen.zero()),
            device_state,
        });
        self.keep.final_version = Some(frozen.version());
        self.journal.lock().expect("no holder panics").keep(&self.keep);
        self.remaining_at_freeze = frozen.need().len();
        let takes = flight_time(flight.len(), self.links.stats().delivery_rate_bytes_per_s);
        self.flight = Some(flight.into());
        self.frozen = Some(Arc::new(frozen));
        self.timeline.part("freeze.pack", packing.elapsed());
        takes
    }

    fn send_flight(&mut self) {
        let Some(flight) = self.flight.clone() else { return };
        let Some(on_link) = self.links.on_link() else { return };
        let happened = self.happened.clone();
        self.tasks.spawn(async move {
            if let Err(error) = on_link.link.send(Lane::State, flight).await {
                link_ended(&happened, &on_link, error);
            }
        });
    }

    fn end_round(&mut self, held: &PackedSet) {
        match held.unpack(self.pages_total) {
            Ok(held) => {
                if let Some(sender) = &mut self.sender {
                    sender.end_round_early(&held);
                }
            }
            Err(error) => self.fail(error.into()),
        }
    }

    fn send_lacking(&mut self, lacking: &Lacking) {
        let pages = self.pages_total;
        let sets = lacking.missing.unpack(pages).and_then(|missing| {
            let without_base = lacking.without_base.unpack(pages)?;
            Ok((missing, without_base))
        });
        match sets {
            Ok((missing, without_base)) => {
                if let Some(frozen) = &self.frozen {
                    frozen.resend(&missing, &without_base);
                }
                self.send_remainder();
            }
            Err(error) => self.fail(error.into()),
        }
    }

    /// Starts the pusher and the fault lane.
    fn send_remainder(&mut self) {
        let Some(on_link) = self.links.on_link() else { return };
        let Some(frozen) = self.frozen.clone() else { return };
        let (messages, queue) = mpsc::channel(2);
        let (codecs, rate) = (self.options.codecs, self.links.stats().delivery_rate_bytes_per_s);
        // Each thread takes the pages that are due and encodes ahead of the link by a message; the
        // remainder is sent when the last of them lets go of the channel.
        let encoders = self.options.encoders.max(1);
        let pace = Arc::new(Pace::new(encoders, Some(rate)));
        for _ in 0..encoders {
            let (frozen, on_link, messages) = (frozen.clone(), on_link.clone(), messages.clone());
            let mut reader = PageReader::new(Purpose::Push, codecs, pace.clone());
            self.tasks.spawn_blocking(move || {
                let _on_link = on_link;
                let mut begun = Vec::new();
                while let Some(message) = frozen.next_push(&mut reader, &mut begun) {
                    let (bytes, waiting) = (message.len(), Instant::now());
                    if messages.blocking_send(message).is_err() {
                        return;
                    }
                    reader.sent(bytes, waiting.elapsed());
                }
            });
        }
        drop(messages);
        let (pushing, happened) = (on_link.clone(), self.happened.clone());
        self.tasks.spawn(async move {
            let link = pushing.link.clone();
            match forward(link, queue, |link, message| async move { link.push(message).await })
                .await
            {
                Ok(()) => {
                    let _ = happened.send(Happened::Event(SourceEvent::RemainderSent));
                }
                Err(error) => link_ended(&happened, &pushing, error),
            }
        });
        let fault_pace = Arc::new(Pace::new(1, Some(rate)));
        let reader = move || PageReader::new(Purpose::Fault, codecs, fault_pace.clone());
        let (answers, bundles) = Answers::new(on_link.link.clone(), frozen.clone());
        let cores = crate::cores::cores();
        for _ in 0..cores.clamp(*ANSWERERS.start(), *ANSWERERS.end()) {
            let (answers, happened) = (answers.clone(), self.happened.clone());
            let (on_link, reader) = (on_link.clone(), reader());
            self.tasks.spawn(async move {
                match answers.serve(reader).await {
                    Ok(error) => link_ended(&happened, &on_link, error),
                    Err(failure) => {
                        let _ = happened.send(Happened::Event(SourceEvent::Failed(failure)));
                    }
                }
            });
        }
        // Only those who serve keep the bundler going.
        drop(answers);
        let (messages, encoded) = mpsc::channel(2);
        let bundler = on_link.clone();
        self.tasks.spawn_blocking(move || {
            let _on_link = bundler;
            encode_bundles(&frozen, bundles, &messages, reader());
        });
        let happened = self.happened.clone();
        self.tasks.spawn(async move {
            let send = |link: Link, message| async move { link.send(Lane::Bundle, message).await };
            if let Err(error) = forward(on_link.link.clone(), encoded, send).await {
                link_ended(&happened, &on_link, error);
            }
        });
    }
}

/// What a link that was seen to take `bytes_per_s` takes for a flight, at worst: twice as long.
fn flight_time(bytes: usize, bytes_per_s: u64) -> Duration {
    Duration::from_secs(2 * bytes as u64 / bytes_per_s.max(SLOWEST_BYTES_PER_S))
}

/// Tells the session's loop that work on a link has ended with the link.
fn link_ended(happened: &mpsc::UnboundedSender<Happened>, on_link: &OnLink, error: LinkError) {
    let _ = happened.send(Happened::Heard(on_link.number, Heard::End(error)));
}

/// Takes messages out of the queue until it ends and hands each to the link.
async fn forward<F: Future<Output = Result<(), LinkError>>>(
    link: Link,
    mut queue: mpsc::Receiver<Bytes>,
    send: impl Fn(Link, Bytes) -> F,
) -> Result<(), LinkError> {
    while let Some(message) = queue.recv().await {
        send(link.clone(), message).await?;
    }
    Ok(())
}
