//! Takes the place of a `send` that was killed.
//!
//! Before the decision there is nothing to go on with: what the killed process had sent, and which pages
//! the guest has written to since, is not known any more. The guest runs on. After it, the guest's memory
//! lies frozen in its files, the destination says what it lacks, and that is sent, without deltas.

use super::*;
use crate::codec::SentLimits;
use crate::engine::heat::Heat;
use crate::engine::precopy::Remainder;
use crate::guest::qemu::{LeftQemu, Standing, let_run, still_stands};
use crate::memory::Access;
use crate::page::PageSet;
use crate::session::journal::{Entry, Found};

/// The guest runs at the destination, and somebody has let this copy of it run too.
pub(super) fn let_run_here() -> Failure {
    let reason = "the guest was let run here although it had moved: it is stopped again, and what is left \
                  of its memory here is not what it was";
    let hint = "it runs at the destination, without the pages that had not arrived there: see `Lost pages` \
                in docs/failures.md";
    Failure::new(reason, hint)
}

/// A decision is taken back on disk before the guest runs on, unless the disk fails. But it may as well be
/// that somebody has let the guest run: only the destination knows whether it then runs twice.
fn in_doubt(found: &Found) -> Failure {
    let reason = "the guest was let run here although it was decided that it moves, by hand or by a farfault \
                  that could not write down why: it is stopped until that is settled";
    let id = &found.about.migration;
    let hint = format!(
        "look at the destination (`farfault resolve {id} --show`): unless the guest runs there, choose \
         --run-source on both, there first"
    );
    Failure::new(reason, hint)
}

/// Goes on with a migration whose source process was killed. The report is there even when it fails.
///
/// # Errors
/// When there is nothing to go on with, which says where the guest runs; when the destination does not
/// come back in time.
pub async fn resume_send(
    found: Found,
    transport: &TransportOptions,
    mut options: SendOptions,
    output: Arc<Output>,
) -> Result<Report, Failure> {
    let mut signals = StopSignals::listen()?;
    let journal = Journal::take_over(&found)?;
    let has = |entry| found.records.has(entry);
    let place = found.about.guest.clone();
    if has(Entry::RunSource) {
        let reason = "it was resolved by hand that the guest runs here";
        let id = &found.about.migration;
        let hint = format!(
            "give the copy at the destination up: `farfault resolve {id} --run-source` there"
        );
        return Err(Failure::new(reason, hint));
    }
    if has(Entry::Complete) {
        journal.remove();
        return Err(Failure::plain("nothing is left to do: every page is at the destination"));
    }
    if has(Entry::Void) || !has(Entry::Decided) {
        blocking(move || Ok(let_run(&place)?)).await?;
        journal.remove();
        let reason = "the guest had not been handed over: it runs on here";
        return Err(Failure::new(reason, "move it anew, with a new ticket"));
    }
    let looked_at = place.clone();
    if blocking(move || Ok(still_stands(&looked_at)?)).await? == Standing::Disturbed {
        return Err(if has(Entry::Running) { let_run_here() } else { in_doubt(&found) });
    }
    let keep: Keep = found.kept()?;
    let Some(version) = keep.final_version else {
        return Err(Failure::plain("what was kept for a takeover does not know of the freeze"));
    };
    let (ticket, key) = keep.session.open().map_err(|error| Failure::plain(error.to_string()))?;
    let guest = blocking(move || Ok(LeftQemu::find(&place, Access::ReadOnly)?)).await?;
    journal.own(&found.about)?;
    signals.listen_at(&journal, &output);
    let destination = Destination {
        ticket,
        key,
        transport: TransportOptions {
            connect_timeout_ms: ATTEMPT.as_millis() as u64,
            ..transport.clone()
        },
    };
    let link = tokio::select! {
        link = destination.find() => link,
        () = tokio::time::sleep(options.reconnect_for) => {
            let limit_s = options.reconnect_for.as_secs_f64();
            let reason = format!("the destination could not be reached within {limit_s} s");
            let hint = format!("there: farfault receive --resume {}", found.about.migration);
            return Err(Failure::new(reason, hint));
        }
        asked = signals.wait() => {
            asked.answer(Verdict::refused("the guest is already at the destination"));
            return Err(Failure::plain("stopped by the operator, before the destination came back"));
        }
    };
    output.link(LinkState::Up);
    options.engine.strategy = keep.strategy;
    options.limits = SentLimits::default();
    let machine = SourceMachine::resumed(options.engine.clone(), has(Entry::Running));
    let memory = SourceGuest::memory(&guest);
    let pages = memory.pages();
    let mut session =
        Session::new(Box::new(guest), link, destination, options, (journal, None, keep), output);
    session.machine = machine;
    // The destination says what of this it lacks.
    let remainder = Remainder { need: PageSet::full(pages), zero: PageSet::empty(pages) };
    let nothing = session.sender.as_ref().expect("no round goes on").sent().clone();
    let counters = session.counters.clone();
    let order = (Heat::new(pages), session.options.pusher);
    let frozen = FrozenPages::new(memory, nothing, version, remainder, order, counters);
    session.frozen = Some(Arc::new(frozen));
    let _ = session.happened.send(Happened::Event(SourceEvent::LinkUp));
    session.watch_guest();
    Ok(session.run(signals).await)
}
