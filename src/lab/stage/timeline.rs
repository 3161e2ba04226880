//! What a migration did to the guest, as seen from outside: from its heartbeats on both sides.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::guest_log::Line;

/// Work is compared over windows of this length.
const WINDOW: Duration = Duration::from_millis(500);
/// The guest works as before when it does this share of its work before.
const RECOVERED: f64 = 0.9;
/// How much of the time before the migration tells what the guest does undisturbed.
const BASELINE: Duration = Duration::from_secs(2);

/// A silence that a viewer or a player would notice.
const SILENCE: Duration = Duration::from_millis(40);
/// Between two heartbeats that are further apart the guest is taken to have done nothing but at the
/// end.
const STALL: Duration = Duration::from_millis(50);

/// A heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// When the host heard it.
    pub at: Instant,
    /// Page operations so far.
    pub operations: u64,
    /// Verifications of all pages so far.
    pub sweeps: u64,
    /// Errors so far.
    pub errors: u64,
}

impl Beat {
    /// From a line `hb MS OPS SWEEPS ERRORS`.
    pub fn parse(line: &Line) -> Option<Self> {
        let mut numbers = line.text.strip_prefix("hb ")?.split(' ').map(str::parse::<u64>);
        let mut next = || numbers.next()?.ok();
        let _guest_clock_ms = next()?;
        let (operations, sweeps, errors) = (next()?, next()?, next()?);
        Some(Beat { at: line.at, operations, sweeps, errors })
    }
}

/// What the guest went through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interruption {
    /// From the last heartbeat on the source to the first on the destination.
    pub downtime: Duration,
    /// From the last heartbeat on the source to the begin of the first half second in which the
    /// guest did 90 % of what it had done before the migration. `None`: not seen, or it does nothing.
    pub recovered_after: Option<Duration>,
    /// The longest time without a heartbeat on the destination.
    pub longest_stall_after: Duration,
}

impl Interruption {
    /// From the heartbeats of both sides; the migration was started at `started`.
    ///
    /// # Errors
    /// When a side was silent, or the guest ran on both.
    pub fn measure(source: &[Beat], destination: &[Beat], started: Instant) -> Result<Self> {
        let stopped = source.last().context("no heartbeat on the source")?.at;
        let resumed = destination.first().context("no heartbeat on the destination")?.at;
        ensure!(
            resumed >= stopped,
            "the guest ran on both sides: it spoke on the source {:?} after its first word on the \
             destination",
            stopped - resumed
        );
        let gaps = destination.windows(2).map(|pair| pair[1].at - pair[0].at);
        let before: Vec<Beat> = source
            .iter()
            .filter(|beat| beat.at <= started && started - beat.at <= BASELINE)
            .copied()
            .collect();
        let recovered =
            rate_per_s(&before).and_then(|rate| recovery(destination, rate * RECOVERED));
        Ok(Interruption {
            downtime: resumed - stopped,
            recovered_after: recovered.map(|at| at - stopped),
            longest_stall_after: gaps.max().unwrap_or_default(),
        })
    }
}

/// Operations a second; `None` when nothing is done.
fn rate_per_s(beats: &[Beat]) -> Option<f64> {
    let (first, last) = (beats.first()?, beats.last()?);
    let operations = last.operations - first.operations;
    (operations > 0).then(|| operations as f64 / (last.at - first.at).as_secs_f64())
}

/// Begin of the first window in which the guest does at least `wanted` operations a second.
fn recovery(beats: &[Beat], wanted: f64) -> Option<Instant> {
    let mut end = 0;
    for begin in beats {
        while beats.get(end)?.at < begin.at + WINDOW {
            end += 1;
        }
        // Up to the first heartbeat behind the window, so that a stall at its end counts.
        let time = (beats[end].at - begin.at).as_secs_f64();
        if (beats[end].operations - begin.operations) as f64 / time >= wanted {
            return Some(begin.at);
        }
    }
    None
}

/// How many times 40 ms, a frame of a stream of 25 a second, went by whole without a heartbeat on either side,
/// from `started` on.
pub fn silences(source: &[Beat], destination: &[Beat], started: Instant) -> u64 {
    let times: Vec<Instant> =
        source.iter().chain(destination).map(|beat| beat.at).filter(|at| *at >= started).collect();
    let whole = |pair: &[Instant]| {
        (pair[1].saturating_duration_since(pair[0]).as_nanos() / SILENCE.as_nanos()) as u64
    };
    times.windows(2).map(whole).sum()
}

/// Touches of pages for which the guest stood still for half a millisecond or longer, by its own clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SlowTouches {
    /// How many.
    pub count: u64,
    /// All of them added up.
    pub sum_ms: f64,
    /// Half of them took at most so long.
    pub p50_ms: f64,
    /// 99 of 100.
    pub p99_ms: f64,
    /// The longest.
    pub longest_ms: f64,
}

impl SlowTouches {
    /// Of the times that the guest has told.
    pub fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let quantile = |share: f64| {
            let rank = (times.len() as f64 * share).ceil() as usize;
            times.get(rank.saturating_sub(1)).map_or(0.0, |time| ms(*time))
        };
        SlowTouches {
            count: times.len() as u64,
            sum_ms: ms(times.iter().sum()),
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
            longest_ms: quantile(1.0),
        }
    }
}

/// What the guest has done over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Length of a bin.
    pub bin_ms: u64,
    /// Begin of the first bin, counted from the last heartbeat on the source; negative.
    pub first_ms: i64,
    /// Operations a second in each bin.
    pub operations_per_s: Vec<f64>,
}

impl Throughput {
    /// The bins from `before` the stop up to the last heartbeat, or to `after` the stop.
    pub fn of(
        source: &[Beat],
        destination: &[Beat],
        bin: Duration,
        before: Duration,
        after: Duration,
    ) -> Self {
        let (Some(stop), Some(last)) = (source.last(), source.iter().chain(destination).last())
        else {
            return Throughput::default();
        };
        let first = source.first().map_or(stop.at, |beat| beat.at);
        let begin = first.max(stop.at.checked_sub(before).unwrap_or(first));
        let count = (last.at.min(stop.at + after) - begin).as_nanos() / bin.as_nanos();
        let mut operations = vec![0.0; count as usize];
        let beats: Vec<Beat> = source.iter().chain(destination).copied().collect();
        for pair in beats.windows(2) {
            let done = pair[1].operations.saturating_sub(pair[0].operations) as f64;
            let from = pair[0].at.max(pair[1].at.checked_sub(STALL).unwrap_or(pair[0].at));
            spread(&mut operations, begin, bin, (from, pair[1].at), done);
        }
        Throughput {
            bin_ms: bin.as_millis() as u64,
            first_ms: -((stop.at - begin).as_millis() as i64),
            operations_per_s: operations.iter().map(|n| n / bin.as_secs_f64()).collect(),
        }
    }
}

/// Adds `done`, evenly over a time, to the bins that it touches.
fn spread(
    bins: &mut [f64],
    begin: Instant,
    bin: Duration,
    (from, to): (Instant, Instant),
    done: f64,
) {
    let seconds = |at: Instant| {
        at.saturating_duration_since(begin).as_secs_f64()
            - begin.saturating_duration_since(at).as_secs_f64()
    };
    let (from, to, bin) = (seconds(from), seconds(to), bin.as_secs_f64());
    if to <= from || to < 0.0 {
        return;
    }
    let first = (from.max(0.0) / bin) as usize;
    for (index, slot) in bins.iter_mut().enumerate().skip(first) {
        let (left, right) = (index as f64 * bin, (index + 1) as f64 * bin);
        if left >= to {
            break;
        }
        *slot += done * (right.min(to) - left.max(from)).max(0.0) / (to - from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Heartbeats each 10 ms with `per_beat` operations each.
    fn beats(from: Instant, count: u32, first_operations: u64, per_beat: u64) -> Vec<Beat> {
        let beat = |i: u32| Beat {
            at: from + i * 10 * MS,
            operations: first_operations + u64::from(i) * per_beat,
            sweeps: 0,
            errors: 0,
        };
        (0..count).map(beat).collect()
    }

    #[test]
    fn a_heartbeat_is_read_from_its_line_and_other_lines_are_not() {
        let at = Instant::now();
        let line = |text: &str| Line { at, text: text.to_owned() };
        let beat = Beat { at, operations: 2, sweeps: 3, errors: 4 };
        assert_eq!(Beat::parse(&line("hb 1 2 3 4")), Some(beat));
        for text in ["hb 1 2 3", "hb 1 2 3 x", "sweep 1 pages 2 ok", ""] {
            assert_eq!(Beat::parse(&line(text)), None, "{text}");
        }
    }

    #[test]
    fn a_short_stop_is_downtime_and_nothing_else() {
        let start = Instant::now();
        let source = beats(start, 301, 0, 20);
        let destination = beats(start + 3300 * MS, 200, 6000, 20);
        let seen = Interruption::measure(&source, &destination, start + 2500 * MS).unwrap();
        assert_eq!(seen.downtime, 300 * MS);
        assert_eq!(seen.recovered_after, Some(300 * MS));
        assert_eq!(seen.longest_stall_after, 10 * MS);
    }

    #[test]
    fn slow_work_and_stalls_after_the_stop_delay_recovery() {
        let start = Instant::now();
        let source = beats(start, 301, 0, 20);
        let mut destination = beats(start + 3100 * MS, 100, 6000, 5);
        destination.extend(beats(start + 5000 * MS, 200, 6500, 20));
        let seen = Interruption::measure(&source, &destination, start + 3000 * MS).unwrap();
        assert_eq!(seen.downtime, 100 * MS);
        assert_eq!(seen.longest_stall_after, 910 * MS);
        let recovered = seen.recovered_after.unwrap();
        assert!((1900 * MS..=2000 * MS).contains(&recovered), "{recovered:?}");
    }

    #[test]
    fn a_guest_that_runs_on_both_sides_is_an_error() {
        let start = Instant::now();
        let (source, destination) = (beats(start, 100, 0, 1), beats(start + 500 * MS, 100, 0, 1));
        let error = Interruption::measure(&source, &destination, start).unwrap_err();
        assert!(error.to_string().contains("both sides"));
    }

    #[test]
    fn work_is_put_where_it_was_done_and_a_stop_is_a_gap() {
        let start = Instant::now();
        let source = beats(start, 201, 0, 20);
        let destination = beats(start + 2500 * MS, 101, 4000, 10);
        let bin = 100 * MS;
        let seen = Throughput::of(&source, &destination, bin, 1000 * MS, 800 * MS);
        assert_eq!((seen.bin_ms, seen.first_ms), (100, -1000));
        let rate = |from_ms: i64| seen.operations_per_s[((from_ms + 1000) / 100) as usize];
        for (at_ms, expected) in
            [(-1000, 2000.0), (-100, 2000.0), (100, 0.0), (300, 0.0), (600, 1000.0)]
        {
            assert!((rate(at_ms) - expected).abs() < 1.0, "{at_ms} ms: {}", rate(at_ms));
        }
        assert_eq!(seen.operations_per_s.len(), 18);
    }

    #[test]
    fn quantiles_of_slow_touches_are_times_that_occurred() {
        let seen = SlowTouches::of((1..=200).rev().map(|i| i * MS).collect());
        assert_eq!((seen.count, seen.p50_ms, seen.p99_ms), (200, 100.0, 198.0));
        assert_eq!((seen.longest_ms, seen.sum_ms), (200.0, 20_100.0));
        assert_eq!(SlowTouches::of(Vec::new()), SlowTouches::default());
    }

    #[test]
    fn each_whole_40_ms_without_a_heartbeat_is_a_silence() {
        let start = Instant::now();
        let source = beats(start, 100, 0, 1);
        let destination = beats(start + (990 + 130) * MS, 10, 99, 1);
        assert_eq!(silences(&source, &destination, start), 3);
        assert_eq!(silences(&source, &destination, start + 995 * MS), 0);
        assert_eq!(silences(&source, &source, start), 0);
    }
}
