//! What is left to read when the demo is over.

use serde::Serialize;

use super::run::Outcome;
use crate::report::{MigrationResult, Report};
use crate::units::format_bytes;

/// The last line of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct VerdictEvent<'a> {
    event: &'static str,
    ok: bool,
    pages_verified: u64,
    wrong_pages: u64,
    first_wrong_page: Option<u64>,
    report: &'a Report,
    /// The plain pre-copy of `--compare`.
    compared: Option<ComparedEvent<'a>>,
}

#[derive(Debug, Serialize)]
struct ComparedEvent<'a> {
    pages_verified: u64,
    wrong_pages: u64,
    cancelled: bool,
    report: &'a Report,
}

impl<'a> VerdictEvent<'a> {
    pub(super) fn new(outcome: &'a Outcome, compared: Option<&'a Outcome>) -> Self {
        VerdictEvent {
            event: "verdict",
            ok: outcome.is_good(),
            pages_verified: outcome.verified.pages,
            wrong_pages: outcome.verified.wrong_pages,
            first_wrong_page: outcome.verified.first_wrong_page,
            report: &outcome.report,
            compared: compared.map(|compared| ComparedEvent {
                pages_verified: compared.verified.pages,
                wrong_pages: compared.verified.wrong_pages,
                cancelled: compared.out_of_patience,
                report: &compared.report,
            }),
        }
    }
}

/// The report, and the guest's own word on it.
pub(super) fn summary(outcome: &Outcome) -> String {
    format!("\n{}\n{}", outcome.report, verdict(outcome))
}

fn verdict(outcome: &Outcome) -> String {
    let place = match outcome.report.result {
        MigrationResult::Migrated => "after the move",
        _ => "at the source, where it has stayed",
    };
    let verified = &outcome.verified;
    let mut text =
        format!("guest verified {} pages {place}, {} wrong", verified.pages, verified.wrong_pages);
    if let Some(page) = verified.first_wrong_page {
        text.push_str(&format!(" (the first is page {page})"));
    }
    text
}

/// The two runs side by side.
pub(super) fn table(outcome: &Outcome, compared: &Outcome) -> String {
    let strategy = format!("farfault, {:?}", outcome.report.strategy).to_lowercase();
    let mut text = row("", [strategy, "plain pre-copy".to_owned()]);
    let both = |column: fn(&Outcome) -> String| [column(outcome), column(compared)];
    for (name, values) in [
        ("result", both(result)),
        ("total time", both(|run| format!("{:.2} s", run.report.total_ms / 1e3))),
        ("downtime", both(downtime)),
        ("on the wire", both(wire)),
        ("pre-copy rounds", both(|run| run.report.precopy_rounds.to_string())),
        ("pages after freeze", both(pages_after_freeze)),
        ("remote faults", both(|run| run.report.remote_faults.to_string())),
        ("guest verified", both(verified)),
    ] {
        text.push_str(&row(name, values));
    }
    text
}

fn row(name: &str, [first, second]: [String; 2]) -> String {
    format!("  {name:<22}{first:<24}{second}\n")
}

fn result(run: &Outcome) -> String {
    match run.report.result {
        MigrationResult::Migrated => "moved".to_owned(),
        _ if run.out_of_patience => "no end in sight, cancelled".to_owned(),
        _ => "stayed at the source".to_owned(),
    }
}

fn downtime(run: &Outcome) -> String {
    match run.report.downtime_ms {
        Some(ms) => format!("{ms:.0} ms"),
        None => "-".to_owned(),
    }
}

fn wire(run: &Outcome) -> String {
    format_bytes(run.report.wire_sent_bytes + run.report.wire_received_bytes)
}

fn pages_after_freeze(run: &Outcome) -> String {
    match run.report.result {
        MigrationResult::Migrated => run.report.remaining_pages_at_freeze.to_string(),
        _ => "-".to_owned(),
    }
}

fn verified(run: &Outcome) -> String {
    format!("{} pages, {} wrong", run.verified.pages, run.verified.wrong_pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::demo::protocol::Verified;
    use crate::report::{PhaseTimes, Role};
    use crate::wire::message::Strategy;

    fn outcome(result: MigrationResult, wrong_pages: u64) -> Outcome {
        let report = Report {
            role: Role::Source,
            result,
            strategy: Strategy::Hybrid,
            total_ms: 9000.0,
            downtime_ms: (result == MigrationResult::Migrated).then_some(71.0),
            wire_sent_bytes: 70 << 20,
            wire_received_bytes: 0,
            pages_total: 65536,
            pages_by_codec: [].into(),
            bytes_by_codec: [].into(),
            precopy_rounds: 2,
            remaining_pages_at_freeze: 4,
            device_state_bytes: 5,
            rehearsal_ms: None,
            huge_pages: None,
            peak_rss_bytes: 0,
            remote_faults: 6,
            local_faults: 7,
            duplicate_pages: 8,
            fault_latency_us: None,
            faults: None,
            push: None,
            account: None,
            round_trip_ms: 40.5,
            connections: 1,
            reconnects: 0,
            tracker: None,
            phases_ms: PhaseTimes::default(),
        };
        let first_wrong_page = (wrong_pages > 0).then_some(77);
        let verified = Verified { pages: 50_000, wrong_pages, first_wrong_page };
        Outcome { report, out_of_patience: result == MigrationResult::Stayed, verified }
    }

    #[test]
    fn the_verdict_is_the_guests_own() {
        let good = outcome(MigrationResult::Migrated, 0);
        assert!(good.is_good());
        assert!(summary(&good).ends_with("guest verified 50000 pages after the move, 0 wrong"));
        let wrong = outcome(MigrationResult::Migrated, 3);
        assert!(!wrong.is_good());
        assert!(summary(&wrong).ends_with("3 wrong (the first is page 77)"));
        let stayed = outcome(MigrationResult::Stayed, 0);
        assert!(stayed.is_whole() && !stayed.is_good());
    }

    #[test]
    fn a_comparison_shows_what_did_not_come_to_its_end() {
        let table =
            table(&outcome(MigrationResult::Migrated, 0), &outcome(MigrationResult::Stayed, 0));
        let line = |name: &str| table.lines().find(|line| line.contains(name)).unwrap().to_owned();
        assert!(line("result").contains("moved") && line("result").contains("cancelled"));
        assert!(line("downtime").contains("71 ms") && line("downtime").ends_with('-'));
    }
}
