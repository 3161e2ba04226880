//! A scenario and results of it that were never measured.

use super::record::{Machine, Measured, Outcome, Record, key};
use super::scenario::{Cell, Scenario};
use crate::lab::stage::film::{Frame, MemoryFilm};
use crate::lab::stage::stream::StreamSeen;
use crate::lab::stage::timeline::Throughput;

pub(super) fn scenario() -> Scenario {
    let text = r#"
        title = "a test"
        repeat = 2
        [[guest]]
        name = "db"
        memory = "256MiB"
        working_set = "64MiB"
        work = "sparse"
        rate = 1000
        [[link]]
        name = "lan"
        link = "1Gbit,1ms"
        [[link]]
        name = "wan"
        link = "100Mbit,40ms"
        [[method]]
        name = "farfault"
        send = ["--strategy", "hybrid"]
        [[method]]
        name = "xbzrle"
        qemu = "xbzrle"
    "#;
    Scenario::parse(text).unwrap()
}

/// The same with a guest that streams.
pub(super) fn stream_scenario() -> Scenario {
    let mut scenario = scenario();
    scenario.guest[0].work = "stream".to_owned();
    scenario
}

/// Frames whose stop is missed in part.
fn stream() -> StreamSeen {
    let at = |n: i64| n * 40 + if n < 0 { 0 } else { 300 };
    StreamSeen {
        frames: 100,
        missed: 3,
        missed_with_short_buffer: 7,
        corrupt: 0,
        longest_gap_ms: 340.0,
        arrivals: (-50..50).map(|n| (at(n), at(n) - n * 40)).collect(),
    }
}

/// Two parts of the memory that come one after the other.
fn film() -> MemoryFilm {
    let frame = |at_ms, cells: &str| Frame { at_ms, cells: cells.to_owned() };
    let frames = [
        frame(-500, "f000f000"),
        frame(-100, "0f00f000"),
        frame(0, "0f000f00"),
        frame(100, "00f00078"),
        frame(200, "00000000"),
    ];
    MemoryFilm { frames: frames.into() }
}

pub(super) fn record(scenario: &Scenario, cell: &Cell, outcome: Outcome) -> Record {
    let throughput = Throughput {
        bin_ms: 100,
        first_ms: -2000,
        operations_per_s: (0..60).map(|i| if (20..23).contains(&i) { 0.0 } else { 1e3 }).collect(),
    };
    let scale = if cell.method.qemu.is_some() { 10.0 } else { 1.0 };
    let measured = Measured {
        total_ms: 1000.0 * scale * f64::from(cell.repetition),
        downtime_ms: 30.0 * scale,
        recovered_after_ms: Some(40.0 * scale),
        there_bytes: (10e6 * scale) as u64,
        back_bytes: 500_000,
        stream: cell.guest.streams().then(stream),
        throughput,
        memory: cell.method.send.is_some().then(film),
        ..Measured::default()
    };
    let report = serde_json::json!({
        "bytes_by_codec": { "zstd": 6_000_000, "delta-zstd": 2_000_000, "zero": 100 },
        "strategy": "hybrid",
        "remote_faults": 7,
        "fault_latency_us": { "p50": 41_000, "p90": 43_000, "p99": 50_000, "max": 90_000 },
    });
    let estimate = serde_json::json!({
        "predictions": [
            { "strategy": "precopy", "total_s": 99.0 },
            { "strategy": "hybrid", "total_s": 1.25, "downtime_ms": 33.0, "link_bytes": 11e6 },
        ],
    });
    Record {
        key: key(scenario, cell),
        repetition: cell.repetition,
        guest: cell.guest.clone(),
        link: cell.link.clone(),
        method: cell.method.clone(),
        downtime: scenario.downtime.clone(),
        limit: scenario.limit.clone(),
        ready_memory: scenario.ready_memory,
        seed: scenario.seed_of(cell.repetition),
        machine: Machine::default(),
        unix_s: 0,
        wall_s: 20.0,
        outcome,
        reason: (outcome == Outcome::Failed).then(|| "no, | and\nno".to_owned()),
        measured: (outcome == Outcome::Moved).then_some(measured),
        reports: [("source", report.clone()), ("destination", report), ("estimate", estimate)]
            .map(|(side, report)| (side.to_owned(), report))
            .into(),
    }
}
