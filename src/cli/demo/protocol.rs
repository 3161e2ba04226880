//! What `farfault demo` and its two sides say to each other: JSON lines. The first line on a side's
//! standard input is its [`SideSettings`], each further one an [`Order`]; on its standard output are the
//! lines of `--json` and those that only the demo needs.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::guest::GuestKind;
use crate::engine::MigrationPhase;
use crate::guest::workload::GuestPlan;
use crate::report::{MemoryMap, Progress, Report, Role};
use crate::wire::message::{HandoverForm, Strategy};

/// What a side is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SideSettings {
    pub(super) role: Role,
    pub(super) kind: GuestKind,
    pub(super) plan: GuestPlan,
    /// A directory of this run.
    pub(super) state_dir: PathBuf,
    /// Another one, in shared memory, for guests whose memory must have a name.
    pub(super) ram_dir: Option<PathBuf>,
    /// Cells of the map that the destination is to tell of.
    pub(super) map_cells: usize,
}

/// How the guest is to be moved.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Method {
    pub(super) strategy: Strategy,
    pub(super) handover: HandoverForm,
    pub(super) downtime: Duration,
    pub(super) max_rounds: Option<u16>,
    /// Send changed pages as deltas.
    pub(super) deltas: bool,
}

/// What a side is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// To the source: move the guest to the receiver that made this ticket.
    Migrate { ticket: String, method: Method },
    /// To the side where the guest runs: let it check all its pages.
    Verify,
}

/// What a side tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(super) enum SideEvent {
    Ticket {
        ticket: String,
    },
    Phase {
        phase: MigrationPhase,
    },
    Progress(Progress),
    Error {
        message: String,
        hint: Option<String>,
    },
    Report(Box<Report>),
    /// The guest works.
    Booted,
    /// What the guest has done so far, on whichever host.
    Guest {
        /// By the clock that both sides share.
        unix_us: u64,
        ops: u64,
    },
    /// The destination's memory.
    Memory(MemoryMap),
    /// The guest has checked all its pages.
    Verified(Verified),
}

/// What the guest has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Verified {
    /// Pages that it checked when it was asked to.
    pub(super) pages: u64,
    /// Wrong ones, then or at any time before.
    pub(super) wrong_pages: u64,
    /// The first of them.
    pub(super) first_wrong_page: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Event, MigrationResult, PhaseTimes};

    #[test]
    fn what_a_side_prints_is_understood() {
        let progress = Progress { pages: 7, ..Progress::default() };
        let line = serde_json::to_string(&Event::Progress(&progress)).unwrap();
        let event = serde_json::from_str(&line).unwrap();
        assert!(matches!(event, SideEvent::Progress(Progress { pages: 7, .. })), "{event:?}");

        let line = serde_json::to_string(&Event::Error { message: "no", hint: None }).unwrap();
        assert!(matches!(serde_json::from_str(&line).unwrap(), SideEvent::Error { .. }));

        let phase = Event::Phase { phase: MigrationPhase::Freeze };
        let line = serde_json::to_string(&phase).unwrap();
        let event = serde_json::from_str(&line).unwrap();
        assert!(matches!(event, SideEvent::Phase { phase: MigrationPhase::Freeze }));
    }

    #[test]
    fn a_report_comes_back_as_it_went() {
        let report = Report {
            role: Role::Source,
            result: MigrationResult::Migrated,
            strategy: Strategy::Hybrid,
            total_ms: 1.5,
            downtime_ms: None,
            wire_sent_bytes: 1,
            wire_received_bytes: 2,
            pages_total: 3,
            pages_by_codec: [("delta".into(), 5)].into(),
            bytes_by_codec: [("delta".into(), 99)].into(),
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
            tracker: Some("write-protect".into()),
            phases_ms: {
                let mut phases = PhaseTimes::default();
                phases.add("precopy", 12.25);
                phases
            },
        };
        let line = serde_json::to_string(&Event::Report(&report)).unwrap();
        let SideEvent::Report(back) = serde_json::from_str(&line).unwrap() else {
            panic!("a report");
        };
        assert_eq!(back.to_string(), report.to_string());
    }
}
