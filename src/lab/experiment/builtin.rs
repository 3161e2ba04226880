//! One run on a built-in guest: `farfault demo`, as a child that tells in JSON lines what it sees.
//! Its sides are two processes, its link is in a third.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::cell::{Seen, ms};
use super::record::{Measured, Outcome};
use super::scenario::{Cell, GuestKind, Scenario};
use crate::lab::stage::farfault::Running;
use crate::lab::stage::process::pause;
use crate::lab::stage::timeline::{Beat, Interruption, Throughput, silences};

/// Beside the migration: start, work before and after, and verification under an emulated KVM.
const AROUND: Duration = Duration::from_secs(240);
/// The guest is looked at every 40 ms.
const BIN: Duration = Duration::from_millis(200);
const KEPT: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Carries out a run.
pub(super) fn run(scenario: &Scenario, cell: &Cell, seed: u64, program: &Path) -> Result<Seen> {
    let temporary = tempfile::tempdir()?;
    let limit = scenario.limit()?;
    let arguments = arguments(scenario, cell, seed)?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut running = Running::here(program, &arguments, temporary.path())?;
    let since = Instant::now();
    let mut connected: Option<(Instant, SystemTime)> = None;
    loop {
        pause(LOOK_EVERY)?;
        let migrates = |event: &Value| event["event"] == "phase" && event["side"] == "source";
        if connected.is_none() && running.has(migrates) {
            connected = Some((Instant::now(), SystemTime::now()));
        }
        if running.has_ended()? {
            break;
        }
        let too_late = |(at, _): (Instant, _)| {
            at.elapsed() > limit && !running.has(|event| event["event"] == "report")
        };
        if connected.is_some_and(too_late) {
            return Ok(Seen::not_converged());
        }
        if since.elapsed() > limit + AROUND {
            bail!("farfault demo has not come to its end");
        }
    }
    let ended = running.wait(Duration::from_secs(5))?;
    let verdict = ended.events.iter().find(|event| event["event"] == "verdict");
    let Some(verdict) = verdict else { bail!("{}", ended.failure()?) };
    let (started, started_unix) = connected.context("the demo has told of no migration")?;
    let measured = measure(&ended.events, verdict, started, started_unix)?;
    let report = verdict["report"].clone();
    let reports = [("source".to_owned(), report.clone()), ("destination".to_owned(), report)];
    Ok(Seen { outcome: Outcome::Moved, measured: Some(measured), reports: reports.into() })
}

fn arguments(scenario: &Scenario, cell: &Cell, seed: u64) -> Result<Vec<String>> {
    let kind = if cell.guest.kind == GuestKind::Kvm { "kvm" } else { "threads" };
    let seed = seed.to_string();
    let link =
        cell.link.spec()?.context("a built-in guest moves over an emulated link")?.to_string();
    let work = cell.guest.workload()?.to_string();
    let fixed = ["demo", "--json", "--guest", kind, "--memory", &cell.guest.memory];
    let chosen = ["--link", &link, "--seed", &seed, "--work", &work];
    let mut all: Vec<String> = fixed.into_iter().chain(chosen).map(str::to_owned).collect();
    all.extend(cell.method.send.iter().flatten().cloned());
    if cell.method.downtime()?.is_none() {
        all.extend(["--downtime".to_owned(), scenario.downtime.clone()]);
    }
    Ok(all)
}

fn measure(
    events: &[Value],
    verdict: &Value,
    started: Instant,
    started_unix: SystemTime,
) -> Result<Measured> {
    let report = &verdict["report"];
    let started_us = started_unix.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    let beats = |side: &str| -> Vec<Beat> {
        let of_side =
            events.iter().filter(|event| event["event"] == "guest" && event["side"] == side);
        let mut beats: Vec<Beat> = Vec::new();
        for event in of_side {
            let (Some(unix_us), Some(operations)) =
                (event["unix_us"].as_u64(), event["ops"].as_u64())
            else {
                continue;
            };
            let after = Duration::from_micros(unix_us.saturating_sub(started_us));
            let before = Duration::from_micros(started_us.saturating_sub(unix_us));
            let Some(at) = (started + after).checked_sub(before) else { continue };
            // A guest that stands still is looked at too: only one that gets on has a heartbeat.
            if beats.last().is_none_or(|last| last.operations < operations) {
                beats.push(Beat { at, operations, sweeps: 0, errors: 0 });
            }
        }
        beats
    };
    let source = beats("source");
    // Before it runs, the destination tells what the guest had done when it left.
    let left_with = source.last().map_or(0, |beat| beat.operations);
    let mut destination = beats("destination");
    destination.retain(|beat| beat.operations > left_with);
    let seen = Interruption::measure(&source, &destination, started)?;
    let carried = |direction: &str| {
        let told = events.iter().filter(|event| event["event"] == "carried");
        told.filter_map(|event| event[direction]["carried_bytes"].as_u64()).max().unwrap_or(0)
    };
    Ok(Measured {
        total_ms: report["total_ms"].as_f64().context("a report without total_ms")?,
        downtime_ms: ms(seen.downtime),
        recovered_after_ms: seen.recovered_after.map(ms),
        longest_stall_after_ms: ms(seen.longest_stall_after),
        silences_of_40_ms: silences(&source, &destination, started),
        there_bytes: carried("there"),
        back_bytes: carried("back"),
        corrupt_pages: verdict["wrong_pages"].as_u64().context("a verdict without wrong_pages")?,
        throughput: Throughput::of(&source, &destination, BIN, KEPT, KEPT),
        ..Measured::default()
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::scenario;
    use super::*;

    #[test]
    fn the_demo_is_told_the_seed_and_one_downtime() {
        let mut scenario = scenario();
        scenario.guest[0].kind = GuestKind::Threads;
        let told = |scenario: &Scenario| {
            let cells = scenario.runs(&["lan/farfault".to_owned()]);
            arguments(scenario, &cells[0], 7).unwrap().join(" ")
        };
        let all = told(&scenario);
        assert!(all.contains(" --seed 7 ") && all.ends_with(" --downtime 300ms"), "{all}");
        for own in ["--downtime=50ms", "--downtime 50ms"] {
            scenario.method[0].send = Some(own.split(' ').map(str::to_owned).collect());
            let all = told(&scenario);
            assert!(all.ends_with(own) && all.matches("--downtime").count() == 1, "{all}");
        }
    }
}
