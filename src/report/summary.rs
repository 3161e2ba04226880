//! The report at the end of a migration.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::PhaseTimes;
use super::{AccountFigures, FaultFigures, PushFigures};
use crate::memory::adopt::HugePages;
use crate::units::{format_bytes, format_rate};
use crate::wire::message::Strategy;

/// Which side reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The host that the guest left.
    Source,
    /// The host that it went to.
    Destination,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationResult {
    /// The guest runs at the destination (or is paused there, as asked) with all its pages.
    Migrated,
    /// Seen from the source: the guest has stayed there.
    Stayed,
    /// Seen from the destination: the guest has not run there and never will.
    Refused,
    /// Neither side knows for sure; the guest is stopped here.
    InDoubt,
    /// The guest runs at the destination and lacks pages, or whoever reports this does not know that it has all.
    LostPages,
}

/// Remote faults: from the guest's fault to its page in place, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultLatency {
    /// Half of the faults took at most this long.
    pub p50: u64,
    /// 90 of 100.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

impl FaultLatency {
    /// The quantiles of a histogram of microseconds.
    pub fn of(histogram: &hdrhistogram::Histogram<u64>) -> Self {
        FaultLatency {
            p50: histogram.value_at_quantile(0.5),
            p90: histogram.value_at_quantile(0.9),
            p99: histogram.value_at_quantile(0.99),
            max: histogram.max(),
        }
    }
}

/// Everything worth keeping of one migration, seen from one side. Field names are those of the
/// `report` event and stay as they are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Which side.
    pub role: Role,
    /// How it ended.
    pub result: MigrationResult,
    /// How the guest moved.
    pub strategy: Strategy,
    /// From the link's first message to the end.
    pub total_ms: f64,
    /// From the order to stop the guest at the source until it ran at the destination, as the source
    /// saw it, less half a round trip. `null` when it never came to that.
    pub downtime_ms: Option<f64>,
    /// UDP payload sent by this side.
    pub wire_sent_bytes: u64,
    /// UDP payload received by this side.
    pub wire_received_bytes: u64,
    /// Pages of guest RAM.
    pub pages_total: u64,
    /// Pages by codec.
    pub pages_by_codec: BTreeMap<Cow<'static, str>, u64>,
    /// Bytes by codec, before QUIC's own framing.
    pub bytes_by_codec: BTreeMap<Cow<'static, str>, u64>,
    /// Pre-copy rounds.
    pub precopy_rounds: u16,
    /// Pages that the destination still lacked when the guest was stopped.
    pub remaining_pages_at_freeze: u64,
    /// Device state, as it crossed at the switchover.
    pub device_state_bytes: u64,
    /// How long the guest stood still in pre-copy for a rehearsal: its device state was taken and sent, so
    /// that at the switchover only the difference had to cross. Only the source knows; `null` without one.
    pub rehearsal_ms: Option<f64>,
    /// Faults that asked the source.
    pub remote_faults: u64,
    /// Faults on pages that were already here.
    pub local_faults: u64,
    /// Pages that came twice and were dropped.
    pub duplicate_pages: u64,
    /// Only the destination knows.
    pub fault_latency_us: Option<FaultLatency>,
    /// The guest's faults after the switchover: only the destination knows.
    pub faults: Option<FaultFigures>,
    /// How what was left then was sent: only the source knows.
    pub push: Option<PushFigures>,
    /// What is remembered of what was sent: only the source knows.
    #[serde(default)]
    pub account: Option<AccountFigures>,
    /// The link's shortest round trip.
    pub round_trip_ms: f64,
    /// Connections of the link, at its end.
    #[serde(default)]
    pub connections: u32,
    /// Outages of the link that were mended.
    pub reconnects: u32,
    /// The most memory that farfault itself was seen to take on this side, looked at four times a
    /// second: heap, stacks and program, but not the guest's RAM, which it maps.
    pub peak_rss_bytes: u64,
    /// How much of the guest's RAM is mapped by huge pages: the destination tells, where they were to be
    /// gathered.
    #[serde(default)]
    pub huge_pages: Option<HugePages>,
    /// How writes were followed: only the source knows.
    pub tracker: Option<Cow<'static, str>>,
    /// The time of each phase, and of the parts of the switchover, by name and in the order of time.
    pub phases_ms: PhaseTimes,
}

/// As many as fit an ordinary terminal.
const PHASES_A_LINE: usize = 3;

impl Report {
    /// The source's report, with what only the destination knows.
    #[must_use]
    pub fn joined(mut self, destination: &Report) -> Report {
        self.local_faults = destination.local_faults;
        self.duplicate_pages = destination.duplicate_pages;
        self.fault_latency_us = destination.fault_latency_us;
        self.faults = destination.faults;
        // Faults that the source was asked for are those of the destination, less what crossed.
        self.remote_faults = destination.remote_faults;
        self.phases_ms.complete_by(&destination.phases_ms);
        self
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match (self.result, self.role) {
            (MigrationResult::Migrated, Role::Source) => "the guest runs at the destination",
            (MigrationResult::Migrated, Role::Destination) => "the guest is here",
            (MigrationResult::Stayed, _) => "the guest has stayed at the source",
            (MigrationResult::Refused, _) => "the guest has not run here and will not",
            (MigrationResult::InDoubt, _) => "in doubt: the guest is stopped here",
            (MigrationResult::LostPages, _) => {
                "the guest runs at the destination and may lack pages"
            }
        };
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<22}{value}");
        row("result", verdict.to_owned())?;
        row("strategy", format!("{:?}", self.strategy).to_lowercase())?;
        row("total time", format!("{:.2} s", self.total_ms / 1e3))?;
        if let Some(downtime_ms) = self.downtime_ms {
            row("downtime", format!("{downtime_ms:.1} ms"))?;
        }
        let ram_bytes = self.pages_total * crate::page::PAGE_SIZE_BYTES as u64;
        let wire_bytes = self.wire_sent_bytes + self.wire_received_bytes;
        let share = 100.0 * wire_bytes as f64 / ram_bytes.max(1) as f64;
        row("guest RAM", format_bytes(ram_bytes))?;
        row(
            "on the wire",
            format!(
                "{} sent, {} received ({share:.1} % of RAM), {} on average",
                format_bytes(self.wire_sent_bytes),
                format_bytes(self.wire_received_bytes),
                format_rate(wire_bytes as f64 / (self.total_ms / 1e3).max(1e-3)),
            ),
        )?;
        for (codec, pages) in &self.pages_by_codec {
            let bytes = self.bytes_by_codec.get(codec).copied().unwrap_or(0);
            row(&format!("  {codec}"), format!("{pages} pages, {}", format_bytes(bytes)))?;
        }
        row("pre-copy rounds", self.precopy_rounds.to_string())?;
        row("pages after freeze", self.remaining_pages_at_freeze.to_string())?;
        row("device state", format_bytes(self.device_state_bytes))?;
        if let Some(rehearsal_ms) = self.rehearsal_ms {
            row("rehearsal", format!("{rehearsal_ms:.1} ms"))?;
        }
        row("remote faults", self.remote_faults.to_string())?;
        if self.role == Role::Destination || self.local_faults > 0 {
            row("local faults", self.local_faults.to_string())?;
        }
        if let Some(latency) = self.fault_latency_us.filter(|_| self.remote_faults > 0) {
            let ms = |us: u64| us as f64 / 1e3;
            row(
                "fault latency",
                format!(
                    "p50 {:.1} ms, p90 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
                    ms(latency.p50),
                    ms(latency.p90),
                    ms(latency.p99),
                    ms(latency.max)
                ),
            )?;
        }
        if let Some(faults) = self.faults.filter(|_| self.remote_faults > 0) {
            row("guest stalled", faults.to_string())?;
        }
        if let Some(push) = &self.push {
            row("pages pushed", push.to_string())?;
        }
        if let Some(account) = &self.account {
            row("remembered", account.to_string())?;
        }
        if self.connections > 1 {
            row("connections", self.connections.to_string())?;
        }
        if self.reconnects > 0 {
            row("reconnects", self.reconnects.to_string())?;
        }
        if let Some(HugePages { before_bytes, after_bytes }) = self.huge_pages {
            let share = |bytes: u64| 100.0 * bytes as f64 / ram_bytes.max(1) as f64;
            let (before, after) = (share(before_bytes), share(after_bytes));
            row("on huge pages", format!("{before:.0} % of RAM before, {after:.0} % after"))?;
        }
        row("memory of farfault", format_bytes(self.peak_rss_bytes))?;
        row("round trip", format!("{:.1} ms", self.round_trip_ms))?;
        let parts: Vec<String> =
            self.phases_ms.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
        for (line, parts) in parts.chunks(PHASES_A_LINE).enumerate() {
            row(if line == 0 { "phases, ms" } else { "" }, parts.join(", "))?;
        }
        Ok(())
    }
}
