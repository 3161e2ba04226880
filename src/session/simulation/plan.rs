//! What may happen in a schedule: drawn from its seed.

use std::time::Duration;

use crate::engine::policy::SwitchoverPolicy;
use crate::engine::pusher::PusherKind;
use crate::engine::source::{SourceConfig, SourceTimeouts};
use crate::wire::message::{HandoverForm, Strategy};

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) strategy: Strategy,
    pub(super) handover: HandoverForm,
    pub(super) pusher: PusherKind,
    pub(super) pages: usize,
    pub(super) operations: u32,
    pub(super) rounds_before_fit: u16,
    /// How many of each may yet happen.
    pub(super) cuts: u8,
    pub(super) crashes: u8,
    /// They come in post-copy, while pages are missing; the link has time for these when nothing else is to do.
    pub(super) crashes_late: bool,
    /// How often another process takes the place of a killed one.
    pub(super) resumes: u8,
    pub(super) failed_steps: u8,
    pub(super) cancels: u8,
    pub(super) late_answers: u8,
    pub(super) damages: u8,
    /// Whether a side may give up waiting for another link.
    pub(super) patience_ends: bool,
}

impl Plan {
    pub(super) fn draw(rng: &mut fastrand::Rng) -> Self {
        let strategies = [Strategy::Hybrid, Strategy::Postcopy, Strategy::Precopy];
        let some = |rng: &mut fastrand::Rng, most: u8| match rng.bool() {
            true => 0,
            false => rng.u8(0..=most),
        };
        // In one draw. Few schedules would come to late ones by themselves.
        let (crashes, crashes_late) = match rng.u8(0..16) {
            late @ 0..4 => (late.max(1), true),
            4..9 => (1, false),
            9 => (2, false),
            _ => (0, false),
        };
        let resumes = if crashes_late { crashes } else { some(rng, 3) };
        let strategies = if crashes_late { &strategies[..2] } else { &strategies[..] };
        Plan {
            strategy: strategies[rng.usize(0..strategies.len())],
            handover: if rng.bool() { HandoverForm::OneFlight } else { HandoverForm::Strict },
            pusher: PusherKind::ALL[rng.usize(0..PusherKind::ALL.len())],
            pages: if crashes_late { rng.usize(6..16) } else { rng.usize(2..8) },
            operations: rng.u32(0..40),
            rounds_before_fit: rng.u16(0..3),
            cuts: some(rng, 4),
            crashes,
            crashes_late,
            resumes,
            failed_steps: u8::from(rng.u8(0..3) == 0) * rng.u8(1..3),
            cancels: u8::from(rng.u8(0..6) == 0),
            late_answers: u8::from(rng.u8(0..8) == 0),
            damages: some(rng, 2),
            patience_ends: rng.u8(0..3) == 0,
        }
    }

    /// Nothing goes wrong but the link.
    pub(super) fn is_only_about_links(&self) -> bool {
        self.crashes == 0 && self.is_only_about_links_and_kills()
    }

    /// Nothing goes wrong but the link, and processes that are killed.
    pub(super) fn is_only_about_links_and_kills(&self) -> bool {
        let wrongs = self.failed_steps + self.cancels + self.late_answers;
        wrongs == 0 && !self.patience_ends
    }

    pub(super) fn source_config(&self) -> SourceConfig {
        SourceConfig {
            strategy: self.strategy,
            handover: self.handover,
            policy: SwitchoverPolicy {
                downtime_budget: Duration::from_millis(300),
                max_rounds: Some(6),
            },
            timeouts: SourceTimeouts::default(),
        }
    }
}
