//! The end of it: the link is closed, the guest let go of, and the report written.

use super::*;

/// The guest runs here with all its pages, and the source has not been told: keeps what tells so. Gives what a person
/// should know.
pub(super) fn keep_evidence(journal: &mut Journal) -> String {
    let what = "the source may not know that the guest runs here with all its pages";
    let noted = journal.record(&DestinationRecord::Complete);
    // As large as a 2048th of the guest, and of no use any more. Without the record whoever takes over would serve a guest
    // that needs nothing: then that is refused, and what was decided stays there for a person to read.
    let _ = std::fs::remove_file(journal.pages_path());
    if let Err(failure) = noted {
        return format!(
            "{what}, and {} tells only that it was to run here: {failure}",
            journal.path().display()
        );
    }
    format!(
        "{what}: it is told by `farfault receive --resume` here and `farfault send --resume` there, by what is in {}",
        journal.path().display()
    )
}

/// The guest was refused after the source may have decided, and the source has not been told: what a person should know of
/// the journal that tells so.
pub(super) fn tell_of_refusal(journal: &Journal) -> String {
    format!(
        "the source may wait for the word that the guest was refused here: it is told by `farfault receive --resume` here \
         and `farfault send --resume` there, by what is in {}; or choose --run-source on both sides, see `farfault status`",
        journal.path().display()
    )
}

impl Session {
    pub(super) async fn finish(mut self) -> Report {
        let outcome = self.outcome.take().expect("the loop ends with an outcome");
        self.timeline.enter(MigrationPhase::Done, &self.output);
        let total_ms = ms(self.timeline.elapsed());
        let stats = self.links.stats();
        let failure = match &outcome {
            DestinationOutcome::Migrated => None,
            DestinationOutcome::Refused(failure)
            | DestinationOutcome::InDoubt(failure)
            | DestinationOutcome::LostPages(failure) => Some(failure.clone()),
        };
        let goodbye = failure.as_ref().map_or("done", |failure| failure.reason.as_str());
        self.links.link().close(u32::from(failure.is_some()), goodbye).await;
        self.tasks.shutdown().await;
        if let Some(failure) = &failure {
            self.output.error(failure);
        }
        let path = self.journal.lock().expect("no holder panics").path().to_owned();
        match &outcome {
            // The source may be in doubt: who has to decide there finds the answer here.
            DestinationOutcome::Migrated if !self.machine.source_knows() => {
                let kept = keep_evidence(&mut self.journal.lock().expect("no holder panics"));
                self.output.note(&kept);
            }
            // The same, once it may have decided.
            DestinationOutcome::Refused(_)
                if self.keep.final_version.is_some() && !self.machine.source_knows_of_refusal() =>
            {
                let tell = tell_of_refusal(&self.journal.lock().expect("no holder panics"));
                self.output.note(&tell);
            }
            DestinationOutcome::Migrated | DestinationOutcome::Refused(_) => {
                self.journal.lock().expect("no holder panics").remove();
            }
            _ => {
                self.output.note(&format!(
                    "what is known of this side is in {}; `farfault status` says what to type",
                    path.display()
                ));
                // The guest stays as it is: loaded, or running with some threads that wait. Its
                // memory stays registered, so that they do not go on with wrong bytes.
                if let Err(error) = self.guest.call(|guest| guest.leave()).await {
                    tracing::warn!("letting go of the guest: {error}");
                }
            }
        }
        let huge_pages = match &outcome {
            DestinationOutcome::Migrated if self.options.huge_pages => self.gather().await,
            _ => None,
        };
        self.finish_trace();
        self.counters.note_own_memory();
        let codecs = self.counters.codecs();
        let prepared = lock(&self.prepared);
        let faults = prepared.as_ref().map(|prepared| prepared.faults.stats());
        Report {
            role: Role::Destination,
            result: match outcome {
                DestinationOutcome::Migrated => MigrationResult::Migrated,
                DestinationOutcome::Refused(_) => MigrationResult::Refused,
                DestinationOutcome::InDoubt(_) => MigrationResult::InDoubt,
                DestinationOutcome::LostPages(_) => MigrationResult::LostPages,
            },
            strategy: self.strategy,
            total_ms,
            downtime_ms: self.downtime_us.map(|us| ms(Duration::from_micros(us))),
            wire_sent_bytes: stats.sent_bytes,
            wire_received_bytes: stats.received_bytes,
            pages_total: self.pages_total,
            pages_by_codec: codecs.pages_by_name(),
            bytes_by_codec: codecs.bytes_by_name(),
            precopy_rounds: self.rounds,
            remaining_pages_at_freeze: *self.remaining_at_freeze.lock().expect("no panics"),
            device_state_bytes: *self.device_state_bytes.lock().expect("no holder panics"),
            rehearsal_ms: None,
            huge_pages,
            remote_faults: faults.as_ref().map_or(0, |faults| faults.remote_faults),
            local_faults: faults.as_ref().map_or(0, |faults| faults.local_faults),
            duplicate_pages: self.counters.duplicate_pages.load(Ordering::Relaxed),
            fault_latency_us: faults
                .as_ref()
                .map(|faults| FaultLatency::of(&faults.remote_latency_us)),
            faults: faults.as_ref().map(FaultFigures::of),
            push: None,
            account: None,
            round_trip_ms: stats.min_rtt_us as f64 / 1e3,
            connections: stats.connections,
            reconnects: self.links.reconnects(),
            peak_rss_bytes: self.counters.peak_rss_bytes.load(Ordering::Relaxed),
            tracker: None,
            phases_ms: self.timeline.parts_ms(),
        }
    }

    /// The guest has all its pages, and runs: what is left is its comfort.
    async fn gather(&self) -> Option<HugePages> {
        let begin = Instant::now();
        let gathered = self.guest.call(|guest| guest.gather_huge_pages()).await;
        self.timeline.part("gather", begin.elapsed());
        gathered.unwrap_or_else(|failure| {
            self.output.note(&format!("the guest keeps its small pages: {failure}"));
            None
        })
    }

    fn finish_trace(&self) {
        let Some(mut trace) = lock(&self.trace).take() else { return };
        if let Some(prepared) = &*lock(&self.prepared) {
            let (touches, cut) = prepared.faults.take_touches();
            let record = |touch: Touched| TraceRecord::Touch {
                at_us: touch.at.as_micros() as u64,
                waited_us: touch.waited.as_micros() as u64,
                thread: touch.thread,
                page: touch.page,
            };
            trace.touches(touches.into_iter().map(record), cut);
        }
        crate::session::finish_trace(trace, &self.output);
    }
}
