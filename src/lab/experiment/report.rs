//! The Markdown report of an experiment, with its CSV file and its pictures.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::{Context, Result};

use super::plots;
use super::record::{Machine, Outcome, Record};
use super::scenario::{GuestKind, GuestPart, LinkPart, Scenario};
use super::store::Store;
use super::table::{CellRuns, Spread, csv};
use crate::lab::stage::qemu::Programs;
use crate::lab::stage::stream::StreamSeen;

/// Writes `report.md`, `results.csv` and the pictures into the store's directory.
pub fn write_report(scenario: &Scenario, store: &Store) -> Result<()> {
    let records = store.of(scenario);
    let cells = CellRuns::group(&records);
    let plots = plots::draw_all(scenario, &cells, &store.path("plots"))?;
    let text = markdown(scenario, &records, &cells, &plots);
    for (name, text) in [("results.csv", csv(&records)), ("report.md", text)] {
        let path = store.path(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn markdown(
    scenario: &Scenario,
    records: &[&Record],
    cells: &[CellRuns<'_>],
    plots: &[plots::Plot],
) -> String {
    let mut text = format!("# {}\n\n", scenario.title);
    if !scenario.about.is_empty() {
        let _ = writeln!(text, "{}\n", scenario.about.trim());
    }
    let machines: BTreeSet<String> =
        records.iter().map(|record| describe_machine(&record.machine)).collect();
    for machine in machines {
        let _ = writeln!(text, "* {machine}");
    }
    let wanted = scenario.runs(&[]).len();
    let _ = writeln!(
        text,
        "* {} of {wanted} runs, each repetition of the matrix shuffled with seed {}; downtime limit \
         {}, a migration is given up after {}{}",
        records.len(),
        scenario.seed,
        scenario.downtime,
        scenario.limit,
        if scenario.ready_memory {
            "; destinations in QEMU had memory that was touched before"
        } else {
            ""
        }
    );
    let corrupt: u64 =
        records.iter().filter_map(|record| Some(record.measured.as_ref()?.corrupt_pages)).sum();
    let moved = records.iter().filter(|record| record.outcome == Outcome::Moved).count();
    let _ = writeln!(
        text,
        "* {corrupt} corrupt pages in {moved} migrations; every guest verified all its pages at the \
         end\n\nMedians, with the least and the most in parentheses. What the columns mean, and what \
         is fair about it: docs/experiments.md. All runs: `results.csv`, and with all that was seen \
         `results.jsonl`.\n",
    );
    for guest in &scenario.guest {
        let of_guest = |cell: &&CellRuns<'_>| cell.guest == guest.name;
        if !cells.iter().any(|cell| of_guest(&cell)) {
            continue;
        }
        let _ = writeln!(text, "## Guest {}\n\n{}\n", guest.name, describe_guest(guest));
        for link in &scenario.link {
            let cells: Vec<&CellRuns<'_>> =
                cells.iter().filter(of_guest).filter(|cell| cell.link == link.name).collect();
            if cells.is_empty() {
                continue;
            }
            let _ = writeln!(text, "### Link {}: {}\n", link.name, describe_link(link));
            for (index, cell) in cells.into_iter().enumerate() {
                let columns = columns(cell, &scenario.limit, guest.streams());
                let (names, values): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
                if index == 0 {
                    let rule = "---|".repeat(names.len());
                    let _ = writeln!(text, "| {} |\n|{rule}", names.join(" | "));
                }
                let _ = writeln!(text, "| {} |", values.join(" | "));
            }
            text.push('\n');
            show_plots(&mut text, plots, Some(&guest.name), Some(&link.name));
        }
        show_plots(&mut text, plots, Some(&guest.name), None);
    }
    if plots.iter().any(|plot| plot.guest.is_none()) {
        text.push_str("## All guests\n\n");
        for link in &scenario.link {
            show_plots(&mut text, plots, None, Some(&link.name));
        }
    }
    show_estimates(&mut text, cells);
    show_failures(&mut text, records);
    text
}

/// What `farfault estimate` expected of farfault's strategies, and what came.
fn show_estimates(text: &mut String, cells: &[CellRuns<'_>]) {
    let mut is_first = true;
    for cell in cells {
        let expected = |field: &'static str| {
            Spread::of(cell.moved().filter_map(|(record, _)| {
                let predictions = record.reports.get("estimate")?["predictions"].as_array()?;
                let strategy = &record.reports.get("source")?["strategy"];
                let told = predictions.iter().find(|told| &told["strategy"] == strategy)?;
                told[field].as_f64()
            }))
        };
        let Some(total_s) = expected("total_s") else { continue };
        if is_first {
            is_first = false;
            text.push_str(
                "## Expected and measured\n\nWhat `farfault estimate` said before each migration, and \
                 what was measured then; medians.\n\n| cell | total s | downtime ms | MB on the link \
                 |\n|---|---|---|---|\n",
            );
        }
        let compare = |expected: Option<Spread>, measured: Option<Spread>, decimals: usize| {
            let show = |spread: Option<Spread>| {
                spread.map_or("–".to_owned(), |s| format!("{:.decimals$}", s.median))
            };
            format!("{} / {}", show(expected), show(measured))
        };
        let mega = |spread: Option<Spread>| {
            spread.map(|s| Spread {
                median: s.median / 1e6,
                least: s.least / 1e6,
                most: s.most / 1e6,
            })
        };
        let total = compare(Some(total_s), cell.spread(|seen| Some(seen.total_ms / 1e3)), 1);
        let downtime =
            compare(expected("downtime_ms"), cell.spread(|seen| Some(seen.downtime_ms)), 0);
        let bytes = cell.spread(|seen| Some((seen.there_bytes + seen.back_bytes) as f64));
        let bytes = compare(mega(expected("link_bytes")), mega(bytes), 1);
        let (guest, link, method) = (cell.guest, cell.link, cell.method);
        let _ = writeln!(text, "| {guest}/{link}/{method} | {total} | {downtime} | {bytes} |");
    }
    if !is_first {
        text.push('\n');
    }
}

/// Names and values.
fn columns(cell: &CellRuns<'_>, limit: &str, streams: bool) -> Vec<(&'static str, String)> {
    let show = |spread: Option<Spread>, decimals: usize| {
        spread.map_or("–".to_owned(), |spread| spread.show(decimals))
    };
    let pair = |[first, second]: [Option<Spread>; 2], decimals: usize| match (first, second) {
        (None, None) => "–".to_owned(),
        // Two spreads in one field are too much to read.
        _ => [first, second]
            .map(|spread| spread.map_or("–".to_owned(), |s| format!("{:.decimals$}", s.median)))
            .join(" / "),
    };
    let mega = |bytes: u64| bytes as f64 / 1e6;
    let quantile = |name: &'static str| {
        cell.told(move |report| {
            let faults = report["remote_faults"].as_u64()?;
            let us = report["fault_latency_us"][name].as_f64()?;
            (faults > 0).then_some(us / 1e3)
        })
    };
    let corrupt: u64 = cell.moved().map(|(_, seen)| seen.corrupt_pages).sum();
    let moved = cell.count(Outcome::Moved);
    let mut runs = moved.to_string();
    for (outcome, word) in
        [(Outcome::NotConverged, format!("not within {limit}")), (Outcome::Failed, "failed".into())]
    {
        match cell.count(outcome) {
            0 => {}
            count => runs.push_str(&format!(", {count} {word}")),
        }
    }
    let slow_touch = [
        cell.spread(|seen| Some(seen.slow_touches?.p50_ms)),
        cell.spread(|seen| Some(seen.slow_touches?.p99_ms)),
    ];
    let cpu = [cell.spread(|seen| seen.source_cpu_s), cell.spread(|seen| seen.destination_cpu_s)];
    let extra = [
        cell.spread(|seen| seen.source_extra_bytes.map(mega)),
        cell.spread(|seen| seen.destination_extra_bytes.map(mega)),
    ];
    let stream = |value: fn(&StreamSeen) -> f64| {
        show(cell.spread(|seen| seen.stream.as_ref().map(value)), 0)
    };
    let frames = match streams {
        true => vec![
            ("missed frames", stream(|seen| seen.missed as f64)),
            ("with a 40 ms buffer", stream(|seen| seen.missed_with_short_buffer as f64)),
            ("longest gap ms", stream(|seen| seen.longest_gap_ms)),
        ],
        false => vec![(
            "40 ms silences",
            show(cell.spread(|seen| Some(seen.silences_of_40_ms as f64)), 0),
        )],
    };
    let mut columns = vec![
        ("method", cell.method.to_owned()),
        ("runs", runs),
        ("total s", show(cell.spread(|seen| Some(seen.total_ms / 1e3)), 2)),
        ("downtime ms", show(cell.spread(|seen| Some(seen.downtime_ms)), 0)),
        ("90 % again after ms", show(cell.spread(|seen| seen.recovered_after_ms), 0)),
        ("longest stall after ms", show(cell.spread(|seen| Some(seen.longest_stall_after_ms)), 0)),
    ];
    columns.extend(frames);
    columns.extend([
        ("slow touches", show(cell.spread(|seen| Some(seen.slow_touches?.count as f64)), 0)),
        ("slow touch p50 / p99 ms", pair(slow_touch, 1)),
        (
            "MB on the link",
            show(cell.spread(|seen| Some(mega(seen.there_bytes + seen.back_bytes))), 2),
        ),
        ("CPU s, source / dest.", pair(cpu, 1)),
        ("extra MB, source / dest.", pair(extra, 0)),
        ("remote faults", show(cell.told(|report| report["remote_faults"].as_f64()), 0)),
        ("fault p50 / p99 ms", pair([quantile("p50"), quantile("p99")], 1)),
        ("corrupt", if moved == 0 { "–".to_owned() } else { corrupt.to_string() }),
    ]);
    columns
}

fn describe_machine(machine: &Machine) -> String {
    format!(
        "farfault {}{}, QEMU {}, Linux {}, {} × {}, {:.0} GiB, TCP {}",
        machine.farfault,
        machine.commit.as_ref().map_or(String::new(), |commit| format!(" ({commit})")),
        machine.qemu.as_deref().unwrap_or("absent"),
        machine.kernel,
        machine.cpus,
        machine.cpu,
        machine.memory_bytes as f64 / f64::from(1 << 30),
        machine.congestion_control
    )
}

fn describe_guest(guest: &GuestPart) -> String {
    let rate = match guest.rate {
        0 => "as fast as it can".to_owned(),
        rate => format!("{rate} operations a second"),
    };
    let (content, things) = match guest.programs() {
        Programs::Redis => ("records", "keys"),
        _ => (guest.fill.as_str(), "pages"),
    };
    let kind = match guest.kind {
        GuestKind::Qemu => "QEMU (TCG)",
        GuestKind::Kvm => "the built-in microVM (KVM)",
        GuestKind::Threads => "native threads",
    };
    match &guest.working_set {
        Some(set) => format!(
            "{kind}, {}, of which {set} are filled ({content}) and worked on: `{}`, {rate}; {} {things} a \
             second are verified besides.",
            guest.memory, guest.work, guest.verify
        ),
        None => format!("{kind}, {}: `{}`, {rate}.", guest.memory, guest.work),
    }
}

fn describe_link(link: &LinkPart) -> String {
    let mut text = match link.queue_if_emulated() {
        Some(queue) => format!("{}, queue {queue}", link.link),
        None => format!("{}, MTU {}", link.link, link.mtu_bytes()),
    };
    for cut in &link.cut {
        let _ = write!(text, ", cut after {} for {}", cut.at, cut.lasts);
    }
    text
}

fn show_plots(text: &mut String, plots: &[plots::Plot], guest: Option<&str>, link: Option<&str>) {
    for plot in plots {
        if plot.guest.as_deref() == guest && plot.link.as_deref() == link {
            let _ = writeln!(text, "![{}](plots/{}.svg)\n", plot.caption, plot.file);
        }
    }
}

fn show_failures(text: &mut String, records: &[&Record]) {
    let failed = records.iter().filter(|record| record.outcome == Outcome::Failed);
    for (index, record) in failed.enumerate() {
        if index == 0 {
            text.push_str("## Runs that failed\n\n");
        }
        let reason = record.reason.as_deref().unwrap_or_default().replace('\n', " ");
        let _ = writeln!(text, "* {} #{}: {reason}", record.name(), record.repetition);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{record, scenario, stream_scenario};
    use super::*;

    #[test]
    fn a_report_of_a_stream_tells_what_its_viewer_missed_and_shows_it() {
        let directory = tempfile::tempdir().unwrap();
        let scenario = stream_scenario();
        let mut store = Store::open(directory.path(), &scenario).unwrap();
        for cell in scenario.runs(&["wan".to_owned()]) {
            store.add(record(&scenario, &cell, Outcome::Moved)).unwrap();
        }
        write_report(&scenario, &store).unwrap();
        let text = std::fs::read_to_string(store.path("report.md")).unwrap();
        let names = " missed frames | with a 40 ms buffer | longest gap ms |";
        assert!(text.contains(names) && text.contains("| 3 | 7 | 340 |"), "{text}");
        assert!(!text.contains("silences"), "{text}");
        let picture = std::fs::read_to_string(store.path("plots/db-wan-frames.svg")).unwrap();
        assert!(picture.contains("3 missed, gap 340 ms"), "{picture}");
    }

    #[test]
    fn guests_that_differ_in_nothing_but_their_size_have_a_picture_together() {
        let pictures = |change: fn(&mut Scenario)| {
            let directory = tempfile::tempdir().unwrap();
            let mut scenario = scenario();
            let mut large = scenario.guest[0].clone();
            (large.name, large.memory) = ("large-db".to_owned(), "1GiB".to_owned());
            scenario.guest.push(large);
            change(&mut scenario);
            let mut store = Store::open(directory.path(), &scenario).unwrap();
            for cell in scenario.runs(&["wan".to_owned()]) {
                store.add(record(&scenario, &cell, Outcome::Moved)).unwrap();
            }
            write_report(&scenario, &store).unwrap();
            let text = std::fs::read_to_string(store.path("report.md")).unwrap();
            text.split_once("## All guests").map(|(_, behind)| behind.to_owned())
        };
        let together = pictures(|_| {}).unwrap();
        assert!(together.contains("](plots/wan-sizes.svg)"), "{together}");
        assert_eq!(pictures(|scenario| scenario.guest[1].rate += 1), None);
    }

    #[test]
    fn a_report_of_an_unshaped_link_tells_its_mtu_and_shows_memory() {
        let directory = tempfile::tempdir().unwrap();
        let mut scenario = scenario();
        scenario.ready_memory = true;
        scenario.link[0].link = "none".to_owned();
        let mut store = Store::open(directory.path(), &scenario).unwrap();
        for cell in scenario.runs(&["lan".to_owned()]) {
            store.add(record(&scenario, &cell, Outcome::Moved)).unwrap();
        }
        write_report(&scenario, &store).unwrap();
        let text = std::fs::read_to_string(store.path("report.md")).unwrap();
        assert!(text.contains("### Link lan: none, MTU 1500\n"), "{text}");
        assert!(text.contains("memory that was touched before"), "{text}");
        assert!(text.contains("](plots/db-lan-memory-farfault.svg)"), "{text}");
    }

    #[test]
    fn a_report_has_a_row_for_each_cell_and_says_what_did_not_work() {
        let directory = tempfile::tempdir().unwrap();
        let scenario = scenario();
        let mut store = Store::open(directory.path(), &scenario).unwrap();
        for cell in scenario.runs(&[]) {
            let outcome = match (cell.name().as_str(), cell.repetition) {
                ("db/wan/xbzrle", _) => Outcome::NotConverged,
                ("db/lan/xbzrle", 1) => Outcome::Failed,
                _ => Outcome::Moved,
            };
            store.add(record(&scenario, &cell, outcome)).unwrap();
        }
        write_report(&scenario, &store).unwrap();
        let text = std::fs::read_to_string(store.path("report.md")).unwrap();
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| ")).collect();
        let row = |start: &str| rows.iter().filter(|row| row.starts_with(start)).count();
        assert_eq!((row("| farfault | 2 |"), row("| xbzrle | 1, 1 failed |")), (2, 1), "{text}");
        assert_eq!(row("| xbzrle | 0, 2 not within 120s | – |"), 1, "{text}");
        assert!(text.contains("1.50 (1.00–2.00)"), "{text}");
        assert!(text.contains("* db/lan/xbzrle #1: no, | and no"), "{text}");
        let (before, estimates) = text.split_once("## Expected and measured").unwrap();
        let expected = "| db/lan/farfault | 1.2 / 1.5 | 33 / 30 | 11.0 / 10.5 |";
        assert!(estimates.contains(expected), "{text}");
        let rows: Vec<&str> = before.lines().filter(|line| line.starts_with("| ")).collect();
        let columns = rows.first().map(|row| row.matches('|').count());
        assert!(rows.iter().all(|row| Some(row.matches('|').count()) == columns), "{text}");
        for picture in text.lines().filter_map(|line| line.split_once("](plots/")) {
            let file = picture.1.trim_end_matches(')');
            let png = file.replace(".svg", ".png");
            assert!(store.path("plots").join(file).exists(), "{file}");
            assert!(store.path("plots").join(png).exists(), "{file}");
        }
        assert!(text.contains("](plots/"));
    }
}
