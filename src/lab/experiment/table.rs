//! Runs as rows of a CSV file, and cells as medians with their spread.

use std::fmt;

use serde_json::Value;

use super::record::{Measured, Outcome, Record};
use crate::codec::{CodecId, Content};

/// The median of some values, and how far they go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let median = match values.len() % 2 {
            1 => values[half],
            _ => f64::midpoint(values[half - 1], values[half]),
        };
        Some(Spread { median, least, most })
    }

    /// `11.5 (11.4–11.9)`, or `11.5` where there is no spread to be seen.
    pub(super) fn show(self, decimals: usize) -> String {
        let [median, least, most] =
            [self.median, self.least, self.most].map(|value| format!("{value:.decimals$}"));
        if least == most { median } else { format!("{median} ({least}–{most})") }
    }
}

/// All runs of one guest, link and method.
#[derive(Clone, Debug)]
pub(super) struct CellRuns<'a> {
    pub(super) guest: &'a str,
    pub(super) link: &'a str,
    pub(super) method: &'a str,
    pub(super) records: Vec<&'a Record>,
}

impl<'a> CellRuns<'a> {
    /// Groups records, which are in order.
    pub(super) fn group(records: &[&'a Record]) -> Vec<Self> {
        let mut cells: Vec<CellRuns<'a>> = Vec::new();
        for record in records {
            match cells.last_mut() {
                Some(cell) if cell.records[0].key == record.key => cell.records.push(record),
                _ => cells.push(CellRuns {
                    guest: &record.guest.name,
                    link: &record.link.name,
                    method: &record.method.name,
                    records: vec![record],
                }),
            }
        }
        cells
    }

    /// Those in which the guest moved.
    pub(super) fn moved(&self) -> impl Iterator<Item = (&'a Record, &'a Measured)> {
        self.records.iter().filter_map(|record| Some((*record, record.measured.as_ref()?)))
    }

    pub(super) fn spread(&self, value: impl Fn(&Measured) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.moved().filter_map(|(_, seen)| value(seen)))
    }

    pub(super) fn count(&self, outcome: Outcome) -> usize {
        self.records.iter().filter(|record| record.outcome == outcome).count()
    }

    /// A number that farfault's receiver tells of itself.
    pub(super) fn told(&self, value: impl Fn(&Value) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.moved().filter_map(|(record, _)| value(record.reports.get("destination")?)))
    }

    /// The run whose downtime is nearest to the median.
    pub(super) fn typical(&self) -> Option<(&'a Record, &'a Measured)> {
        let median = self.spread(|seen| Some(seen.downtime_ms))?.median;
        let distance = |seen: &Measured| (seen.downtime_ms - median).abs();
        self.moved().min_by(|a, b| distance(a.1).total_cmp(&distance(b.1)))
    }
}

/// Bytes of farfault's page frames, or of what QEMU tells of its own, in groups that both have.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct BytesByKind {
    /// Whole pages, compressed or not.
    pub(super) whole: f64,
    /// Changes of pages that were sent before.
    pub(super) deltas: f64,
    /// Everything else towards the destination: zero pages, copies of others, headers, device state, what was sent again.
    pub(super) other: f64,
    /// Back to the source.
    pub(super) back: f64,
}

impl BytesByKind {
    /// Of a run.
    pub(super) fn of(record: &Record, seen: &Measured) -> Self {
        let source = record.reports.get("source").unwrap_or(&Value::Null);
        let (whole, deltas) = match source["bytes_by_codec"].as_object() {
            Some(codecs) => codecs.iter().fold((0.0, 0.0), |(whole, deltas), (codec, bytes)| {
                let bytes = bytes.as_f64().unwrap_or(0.0);
                let known = CodecId::ALL.into_iter().find(|id| id.name() == codec);
                match known.map(CodecId::content) {
                    Some(Content::Whole) => (whole + bytes, deltas),
                    Some(Content::Words | Content::Lines | Content::Runs) => {
                        (whole, deltas + bytes)
                    }
                    Some(Content::Zero | Content::Unchanged | Content::Copy) | None => {
                        (whole, deltas)
                    }
                }
            }),
            None => {
                let number = |value: &Value| value.as_f64().unwrap_or(0.0);
                // Over several connections, what crossed is compressed, and counted apart.
                let whole = match number(&source["ram"]["multifd-bytes"]) {
                    0.0 => number(&source["ram"]["normal-bytes"]),
                    bytes => bytes,
                };
                (whole, number(&source["xbzrle-cache"]["bytes"]))
            }
        };
        let there = seen.there_bytes as f64;
        let other = (there - whole - deltas).max(0.0);
        BytesByKind { whole, deltas, other, back: seen.back_bytes as f64 }
    }

    pub(super) fn parts(self) -> [f64; 4] {
        [self.whole, self.deltas, self.other, self.back]
    }
}

type Column = (&'static str, fn(&Record) -> String);

fn measured(record: &Record, value: impl Fn(&Measured) -> Option<f64>) -> String {
    record.measured.as_ref().and_then(value).map_or(String::new(), |number| format!("{number:.3}"))
}

fn count(record: &Record, value: impl Fn(&Measured) -> Option<u64>) -> String {
    record.measured.as_ref().and_then(value).map_or(String::new(), |number| number.to_string())
}

fn told(record: &Record, path: &str) -> String {
    let value = record.reports.get("destination").and_then(|report| report.pointer(path));
    value.filter(|value| !value.is_null()).map_or(String::new(), Value::to_string)
}

const COLUMNS: &[Column] = &[
    ("guest", |r| r.guest.name.clone()),
    ("link", |r| r.link.name.clone()),
    ("method", |r| r.method.name.clone()),
    ("repetition", |r| r.repetition.to_string()),
    ("outcome", |r| r.outcome.name().to_owned()),
    ("reason", |r| r.reason.clone().unwrap_or_default()),
    ("total_ms", |r| measured(r, |m| Some(m.total_ms))),
    ("downtime_ms", |r| measured(r, |m| Some(m.downtime_ms))),
    ("recovered_after_ms", |r| measured(r, |m| m.recovered_after_ms)),
    ("longest_stall_after_ms", |r| measured(r, |m| Some(m.longest_stall_after_ms))),
    ("silences_of_40_ms", |r| count(r, |m| Some(m.silences_of_40_ms))),
    ("stream_frames", |r| count(r, |m| Some(m.stream.as_ref()?.frames))),
    ("stream_missed", |r| count(r, |m| Some(m.stream.as_ref()?.missed))),
    ("stream_missed_with_short_buffer", |r| {
        count(r, |m| Some(m.stream.as_ref()?.missed_with_short_buffer))
    }),
    ("stream_longest_gap_ms", |r| measured(r, |m| Some(m.stream.as_ref()?.longest_gap_ms))),
    ("slow_touches", |r| count(r, |m| Some(m.slow_touches?.count))),
    ("slow_touch_p50_ms", |r| measured(r, |m| Some(m.slow_touches?.p50_ms))),
    ("slow_touch_p99_ms", |r| measured(r, |m| Some(m.slow_touches?.p99_ms))),
    ("slow_touch_longest_ms", |r| measured(r, |m| Some(m.slow_touches?.longest_ms))),
    ("there_bytes", |r| count(r, |m| Some(m.there_bytes))),
    ("back_bytes", |r| count(r, |m| Some(m.back_bytes))),
    ("source_cpu_s", |r| measured(r, |m| m.source_cpu_s)),
    ("destination_cpu_s", |r| measured(r, |m| m.destination_cpu_s)),
    ("source_extra_bytes", |r| count(r, |m| m.source_extra_bytes)),
    ("destination_extra_bytes", |r| count(r, |m| m.destination_extra_bytes)),
    ("destination_qemu_bytes", |r| count(r, |m| m.destination_qemu_bytes)),
    ("corrupt_pages", |r| count(r, |m| Some(m.corrupt_pages))),
    ("remote_faults", |r| told(r, "/remote_faults")),
    ("fault_p50_us", |r| told(r, "/fault_latency_us/p50")),
    ("fault_p99_us", |r| told(r, "/fault_latency_us/p99")),
    ("memory", |r| r.guest.memory.clone()),
    ("working_set", |r| r.guest.working_set.clone().unwrap_or_default()),
    ("work", |r| r.guest.work.clone()),
    ("rate_per_s", |r| r.guest.rate.to_string()),
    ("fill", |r| r.guest.fill.clone()),
    ("verify_per_s", |r| r.guest.verify.to_string()),
    ("link_spec", |r| r.link.link.clone()),
    ("queue", |r| r.link.queue_if_emulated().unwrap_or_default().to_owned()),
    ("mtu", |r| r.link.mtu_bytes().to_string()),
    ("options", options),
    ("downtime_limit", |r| r.downtime.clone()),
    ("limit", |r| r.limit.clone()),
    ("ready_memory", |r| r.ready_memory.to_string()),
    ("seed", |r| r.seed.to_string()),
    ("unix_s", |r| r.unix_s.to_string()),
    ("wall_s", |r| format!("{:.1}", r.wall_s)),
    ("farfault", |r| r.machine.farfault.clone()),
    ("commit", |r| r.machine.commit.clone().unwrap_or_default()),
    ("build", |r| r.machine.build.clone()),
    ("guest_image", |r| r.machine.guest_image.clone().unwrap_or_default()),
    ("qemu", |r| r.machine.qemu.clone().unwrap_or_default()),
    ("kernel", |r| r.machine.kernel.clone()),
    ("tcp", |r| r.machine.congestion_control.clone()),
    ("cpu", |r| format!("{} x {}", r.machine.cpus, r.machine.cpu)),
];

fn options(record: &Record) -> String {
    match (&record.method.send, &record.method.qemu) {
        (Some(options), _) => format!("farfault send {}", options.join(" ")).trim().to_owned(),
        (None, method) => {
            let parameters = serde_json::to_string(&record.method.parameters).unwrap_or_default();
            let parameters = if parameters == "{}" { String::new() } else { parameters };
            let arguments = record.method.arguments.join(" ");
            let tls = if record.method.tls { "tls" } else { "" };
            let method = method.as_deref().unwrap_or_default();
            let words = ["qemu", method, &parameters, &arguments, tls];
            words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
        }
    }
}

/// One row a run, as RFC 4180 has it.
pub(super) fn csv(records: &[&Record]) -> String {
    let row = |fields: Vec<String>| fields.join(",") + "\r\n";
    let mut text = row(COLUMNS.iter().map(|(name, _)| (*name).to_owned()).collect());
    for record in records {
        text.push_str(&row(COLUMNS.iter().map(|(_, field)| quoted(&field(record))).collect()));
    }
    text
}

fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        return format!("\"{}\"", field.replace('"', "\"\""));
    }
    field.to_owned()
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.show(f.precision().unwrap_or(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::scenario::Scenario;
    use super::super::testing::{record, scenario};
    use super::*;

    #[test]
    fn a_median_lies_in_the_middle_of_its_spread() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        let seen = spread(&[3.0, 1.0, 2.0, f64::NAN]).unwrap();
        assert_eq!((seen.least, seen.median, seen.most), (1.0, 2.0, 3.0));
        assert_eq!(seen.show(1), "2.0 (1.0–3.0)");
        assert_eq!(spread(&[1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(format!("{:.0}", spread(&[1.2, 1.4]).unwrap()), "1");
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn a_row_has_a_field_for_each_column_whatever_the_reason_says() {
        let scenario = scenario();
        let cells = scenario.runs(&["lan/farfault".to_owned()]);
        let records =
            [Outcome::Moved, Outcome::Failed].map(|outcome| record(&scenario, &cells[0], outcome));
        let text = csv(&records.iter().collect::<Vec<_>>()).replace("\"1Gbit,1ms\"", "link");
        let rows: Vec<&str> = text.split_terminator("\r\n").collect();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0].split(',').count(), COLUMNS.len());
        assert_eq!(rows[1].split(',').count(), COLUMNS.len());
        assert!(rows[2].contains(",failed,\"no, | and\nno\","), "{}", rows[2]);
    }

    #[test]
    fn a_row_tells_of_an_unshaped_link_and_of_ready_memory() {
        let mut scenario = scenario();
        let field = |scenario: &Scenario, name: &str| {
            let cells = scenario.runs(&["lan/farfault".to_owned()]);
            let record = record(scenario, &cells[0], Outcome::Moved);
            COLUMNS.iter().find(|(column, _)| *column == name).unwrap().1(&record)
        };
        let names = ["queue", "mtu", "ready_memory"];
        assert_eq!(names.map(|name| field(&scenario, name)), ["bdp", "1500", "false"]);
        scenario.ready_memory = true;
        scenario.link[0].link = "none".to_owned();
        scenario.link[0].mtu = Some(9000);
        assert_eq!(names.map(|name| field(&scenario, name)), ["", "9000", "true"]);
    }

    #[test]
    fn a_row_tells_how_qemu_was_asked() {
        let scenario = scenario();
        let cells = scenario.runs(&["lan/farfault".to_owned()]);
        let mut record = record(&scenario, &cells[0], Outcome::Moved);
        record.method.send = None;
        record.method.qemu = Some("multifd-zstd".to_owned());
        assert_eq!(options(&record), "qemu multifd-zstd");
        record.method.parameters.insert("multifd-channels".to_owned(), 4.into());
        record.method.arguments = ["-global", "a.b=9"].map(str::to_owned).into();
        record.method.tls = true;
        assert_eq!(
            options(&record),
            "qemu multifd-zstd {\"multifd-channels\":4} -global a.b=9 tls"
        );
    }

    #[test]
    fn all_bytes_of_the_link_are_of_some_kind() {
        let scenario = scenario();
        let cells = scenario.runs(&["farfault".to_owned()]);
        let record = record(&scenario, &cells[0], Outcome::Moved);
        let seen = record.measured.as_ref().unwrap();
        let kinds = BytesByKind::of(&record, seen);
        assert_eq!((kinds.whole, kinds.deltas), (6e6, 2e6));
        let all: f64 = kinds.parts().iter().sum();
        assert_eq!(all, (seen.there_bytes + seen.back_bytes) as f64);
    }

    #[test]
    fn each_codec_counts_as_what_its_frames_carry() {
        let scenario = scenario();
        let cells = scenario.runs(&["farfault".to_owned()]);
        let mut record = record(&scenario, &cells[0], Outcome::Moved);
        let by_codec =
            serde_json::json!({"zstd-kin": 1000, "lines-zstd": 100, "copy": 10, "raw": 1});
        record.reports.insert("source".to_owned(), serde_json::json!({"bytes_by_codec": by_codec}));
        let kinds = BytesByKind::of(&record, record.measured.as_ref().unwrap());
        assert_eq!((kinds.whole, kinds.deltas), (1001.0, 100.0));
    }
}
