//! The end of it: the link is closed, the tracking ended, and the report written.

use super::*;

/// A round gets so long to notice that the link is closed.
const ROUND_GRACE: Duration = Duration::from_secs(10);

/// A guest that stands still for a moment, and whose monitor does not answer, is waited for as long as it
/// may take.
const STANDSTILL_GRACE: Duration = Duration::from_secs(660);

/// The last message gets so long to reach the destination.
const FAREWELL_GRACE: Duration = Duration::from_secs(2);

/// The guest runs on here, and the destination, which cannot be reached, is to be told so within this.
const LAST_WORD: Duration = Duration::from_secs(10);

impl Session {
    pub(super) async fn finish(mut self) -> Report {
        let outcome = self.outcome.take().expect("the loop ends with an outcome");
        self.timeline.enter(MigrationPhase::Done, &self.output);
        let total_ms = ms(self.timeline.elapsed());
        let stats = self.links.stats();
        let failure = match &outcome {
            SourceOutcome::Migrated => None,
            SourceOutcome::Stayed(f) | SourceOutcome::InDoubt(f) | SourceOutcome::LostPages(f) => {
                Some(f.clone())
            }
        };
        let goodbye = failure.as_ref().map_or("done", |failure| failure.reason.as_str());
        // Of two links the destination would take the one that came last, on which nothing is said.
        if let Some(search) = self.search.take() {
            search.abort();
        }
        if let (SourceOutcome::Stayed(failure), Some(deadline)) = (&outcome, self.links.deadline())
        {
            let limit = deadline.saturating_duration_since(Instant::now()).min(LAST_WORD);
            self.tell_of_stay(failure, limit).await;
        }
        // What was said last must arrive before the link is closed.
        let link = self.links.link();
        let _ = tokio::time::timeout(FAREWELL_GRACE, link.finish()).await;
        link.close(u32::from(failure.is_some()), goodbye).await;
        // Ends the tracking of the guest's writes, which must not outlive the migration.
        let mut back = tokio::time::timeout(ROUND_GRACE, self.take_sender_back()).await.is_ok();
        if !back && self.standstill.is_on() {
            self.output.note("waiting for the guest's monitor, which is to let it run on");
            back = tokio::time::timeout(STANDSTILL_GRACE, self.take_sender_back()).await.is_ok();
        }
        if !back {
            tracing::warn!("a pre-copy round did not end: the guest's writes are still followed");
        }
        let account = self.sender.take().map(|sender| self.account_of(&sender));
        self.tasks.shutdown().await;
        if let Some(failure) = &failure {
            self.output.error(failure);
        }
        let path = self.journal.lock().expect("no holder panics").path().to_owned();
        match &outcome {
            SourceOutcome::Stayed(_) if self.standstill.is_on() => self.output.note(&format!(
                "the guest may stand still here: `farfault send --resume {}` lets it run on, by what is in {}",
                self.destination.ticket.migration,
                path.display()
            )),
            SourceOutcome::Migrated | SourceOutcome::Stayed(_) => {
                self.journal.lock().expect("no holder panics").remove();
            }
            _ => self.output.note(&format!(
                "what is known of this side is in {}; `farfault status` says what to type",
                path.display()
            )),
        }
        if let Some(trace) = self.trace.take() {
            crate::session::finish_trace(trace, &self.output);
        }
        self.counters.note_own_memory();
        let codecs = self.counters.codecs();
        Report {
            role: Role::Source,
            result: match outcome {
                SourceOutcome::Migrated => MigrationResult::Migrated,
                SourceOutcome::Stayed(_) => MigrationResult::Stayed,
                SourceOutcome::InDoubt(_) => MigrationResult::InDoubt,
                SourceOutcome::LostPages(_) => MigrationResult::LostPages,
            },
            strategy: self.options.engine.strategy,
            total_ms,
            downtime_ms: self.downtime.map(ms),
            wire_sent_bytes: stats.sent_bytes,
            wire_received_bytes: stats.received_bytes,
            pages_total: self.pages_total,
            pages_by_codec: codecs.pages_by_name(),
            bytes_by_codec: codecs.bytes_by_name(),
            precopy_rounds: self.machine.rounds(),
            remaining_pages_at_freeze: self.remaining_at_freeze,
            device_state_bytes: self.device_state_bytes,
            rehearsal_ms: self.rehearsal.pause().map(ms),
            remote_faults: self.counters.remote_faults.load(Ordering::Relaxed),
            local_faults: 0,
            duplicate_pages: 0,
            fault_latency_us: None,
            faults: None,
            push: self.push_figures(),
            account,
            round_trip_ms: stats.min_rtt_us as f64 / 1e3,
            connections: stats.connections,
            reconnects: self.links.reconnects(),
            huge_pages: None,
            peak_rss_bytes: self.counters.peak_rss_bytes.load(Ordering::Relaxed),
            tracker: self.tracker.map(Into::into),
            phases_ms: self.timeline.parts_ms(),
        }
    }

    /// A round that still goes on ends with the link; then its sender comes back.
    async fn take_sender_back(&mut self) {
        while self.sender.is_none() {
            match self.happenings.recv().await {
                Some(Happened::Round(sender, _) | Happened::Frozen(sender, _)) => {
                    self.sender = Some(sender);
                }
                Some(_) => {}
                None => return,
            }
        }
    }

    /// The migration has ended in an outage, with the guest running here. The destination would wait.
    async fn tell_of_stay(&self, failure: &Failure, limit: Duration) {
        let abort = ToDestination::Abort { reason: failure.reason.clone() };
        let abort = Bytes::from(encode(&abort));
        let tell = async {
            loop {
                let link = self.destination.find().await;
                let is_told =
                    link.control_send(abort.clone()).await.is_ok() && link.finish().await.is_ok();
                if is_told {
                    return link.close(1, &failure.reason).await;
                }
            }
        };
        if tokio::time::timeout(limit, tell).await.is_err() {
            tracing::warn!("the destination was not told that the guest stays here");
        }
    }

    fn account_of(&self, sender: &RoundSender) -> AccountFigures {
        AccountFigures {
            encoders: self.options.encoders.max(1) as u64,
            put_off_pages: self.counters.put_off_pages.load(Ordering::Relaxed),
            held_back_pages: self.counters.held_back_pages.load(Ordering::Relaxed),
            ..AccountFigures::default()
        }
        .occupying(sender.sent().memory())
    }
}
