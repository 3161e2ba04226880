//! What a migration did to the guest, as seen from outside: from its heartbeats on both sides.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::guest_log::Line;

/// Work is compared over windows of this length.
const WINDOW: Duration = Duration::from_millis(500);
/// The guest works as before when it does this share of its work before.
const RECOVERED: f64 = 0.9;
/// How much of the time before the migration tells what the guest does undisturbed.
const BASELINE: Duration = Duration::from_secs(2);

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
}
