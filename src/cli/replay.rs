//! `farfault replay`

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::bytes;
use crate::engine::Failure;
use crate::engine::pusher::PusherKind;
use crate::lab::experiment::{Replayed, draw_orders};
use crate::lab::replay::{Link, Outcome, Simulation, Touches, from_trace, workload};
use crate::lab::spec::LinkSpec;
use crate::page::PAGE_SIZE_BYTES;
use crate::report::read_trace;

/// Replays what guests touch after a switchover against the policies of the pusher, and tells how long
/// their threads wait.
#[derive(Debug, Args)]
pub(super) struct Replay {
    /// Traces that `farfault receive --trace` has written; without any, made-up guests are replayed. Beside one
    /// whose name ends in `.destination.jsonl`, as the lab's do, the source's is found by its name.
    traces: Vec<PathBuf>,
    /// The trace that `farfault send --trace` has written of the same migration: what the guest wrote to
    /// before the switchover.
    #[arg(long, value_name = "FILE", requires = "traces")]
    source_trace: Option<PathBuf>,
    /// Rate and round trip.
    #[arg(long, default_value = "100Mbit,40ms")]
    link: LinkSpec,
    /// Memory of the made-up guests.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = bytes)]
    memory: u64,
    /// What an encoded page takes, on average.
    #[arg(long, value_name = "BYTES", default_value_t = 1800,
        value_parser = clap::value_parser!(u32).range(1..=8192))]
    page_bytes: u32,
    /// One policy only.
    #[arg(long, value_name = "NAME")]
    pusher: Option<PusherKind>,
    /// Draw a picture of how the orders compare into this directory: orders.svg and orders.png.
    #[arg(long, value_name = "DIR", conflicts_with = "pusher")]
    plot: Option<PathBuf>,
    /// One JSON object a line instead of a Markdown table.
    #[arg(long)]
    json: bool,
}

/// Memory of made-up guests.
const MEMORY_LIMIT_BYTES: u64 = 64 << 30;

impl Replay {
    pub(super) fn run(self) -> ExitCode {
        match self.table() {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => {
                eprintln!("farfault: error: {}", failure.reason);
                if let Some(hint) = failure.hint {
                    eprintln!("farfault: hint: {hint}");
                }
                ExitCode::FAILURE
            }
        }
    }

    fn table(&self) -> Result<(), Failure> {
        if !(64 * PAGE_SIZE_BYTES as u64..=MEMORY_LIMIT_BYTES).contains(&self.memory) {
            return Err(Failure::plain("--memory: from 256 KiB to 64 GiB"));
        }
        let link = Link {
            rate_bytes_per_s: (self.link.rate.bits_per_s() / 8).max(1),
            round_trip: self.link.round_trip,
            page_bytes: self.page_bytes,
        };
        let mut out = std::io::stdout().lock();
        if !self.json {
            line(
                &mut out,
                "| guest | order | waits | of a round trip or more | waited, s | longest, ms | \
                 last page after s | 90 % of its pace after s |\n|---|---|---|---|---|---|---|---|",
            );
        }
        let mut replays = Vec::new();
        for (name, touches) in self.guests()? {
            let kinds = PusherKind::ALL.into_iter();
            for kind in kinds.filter(|kind| self.pusher.is_none_or(|only| only == *kind)) {
                let outcome = Simulation::new(&touches, link, kind).run();
                line(&mut out, &self.row(&name, kind, &outcome));
                replays.push(Replayed { guest: name.clone(), order: kind, outcome });
            }
        }
        if let Some(directory) = &self.plot {
            let about = format!("link {}, {} bytes a page", self.link, self.page_bytes);
            draw_orders(&about, &replays, directory)
                .map_err(|error| Failure::plain(format!("--plot: {error:#}")))?;
        }
        Ok(())
    }

    fn guests(&self) -> Result<Vec<(String, Touches)>, Failure> {
        if self.traces.is_empty() {
            let pages = self.memory / PAGE_SIZE_BYTES as u64;
            let guest = |name: &str| workload::named(name, pages).map(|g| (name.to_owned(), g));
            return Ok(workload::NAMES.into_iter().filter_map(guest).collect());
        }
        if self.source_trace.is_some() && self.traces.len() > 1 {
            return Err(Failure::new(
                "--source-trace belongs to one migration, and there are several traces",
                "replay them one by one, or give both traces of each the lab's names",
            ));
        }
        let guest = |path: &PathBuf| {
            let mut records = records(path)?;
            if let Some(source) = self.source_trace.clone().or_else(|| counterpart(path)) {
                records.extend(self::records(&source)?.into_iter().skip(1));
            }
            let touches = from_trace(&records)
                .map_err(|error| Failure::plain(format!("{}: {error}", path.display())))?;
            Ok((name_of(path), touches))
        };
        self.traces.iter().map(guest).collect()
    }

    fn row(&self, guest: &str, kind: PusherKind, outcome: &Outcome) -> String {
        let Outcome { waits, long_waits, waited, longest, last_page, recovered, .. } = *outcome;
        let [waited_s, last_page_s, recovered_s] =
            [waited, last_page, recovered].map(|time| (time.as_secs_f64() * 1e3).round() / 1e3);
        let longest_ms = (longest.as_secs_f64() * 1e4).round() / 10.0;
        if self.json {
            let order = kind.name();
            return serde_json::json!({
                "guest": guest, "order": order, "waits": waits, "long_waits": long_waits,
                "waited_s": waited_s, "longest_ms": longest_ms, "last_page_s": last_page_s,
                "recovered_s": recovered_s,
            })
            .to_string();
        }
        format!(
            "| {guest} | {kind} | {waits} | {long_waits} | {waited_s:.2} | {longest_ms:.0} | \
             {last_page_s:.2} | {recovered_s:.1} |"
        )
    }
}

/// How the lab ends the names of a migration's two traces.
const DESTINATION_END: &str = ".destination.jsonl";
const SOURCE_END: &str = ".source.jsonl";

fn counterpart(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?.strip_suffix(DESTINATION_END)?;
    let source = path.with_file_name(format!("{name}{SOURCE_END}"));
    source.exists().then_some(source)
}

/// What a table calls a trace.
fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    name.trim_end_matches(DESTINATION_END).to_owned()
}

fn records(path: &Path) -> Result<Vec<crate::report::TraceRecord>, Failure> {
    let failed = |error| Failure::plain(format!("{}: {error}", path.display()));
    read_trace(BufReader::new(File::open(path).map_err(failed)?)).map_err(failed)
}

/// A reader that has gone away is no reason to panic.
fn line(out: &mut impl Write, text: &str) {
    let _ = writeln!(out, "{text}");
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        replay: Replay,
    }

    #[test]
    fn the_source_trace_of_one_migration_is_not_taken_for_that_of_another() {
        let words = ["replay", "one.jsonl", "two.jsonl", "--source-trace", "source.jsonl"];
        let failure = Program::parse_from(words).replay.guests().unwrap_err();
        assert!(failure.reason.contains("several traces"), "{failure}");
    }
}
