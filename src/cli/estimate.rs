//! `farfault estimate`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::duration;
use crate::engine::Failure;
use crate::guest::qemu::QemuSource;
use crate::lab::estimate::{Prediction, Sample, predict, recommend};
use crate::lab::spec::LinkSpec;
use crate::page::PAGE_SIZE_BYTES;
use crate::report::Output;
use crate::units::format_bytes;
use crate::wire::message::Strategy;

const STRATEGIES: [Strategy; 3] = [Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy];

/// Tells what a migration would be like, without moving anything.
///
/// Follows the guest's writes for some seconds and encodes a sample of its pages, then plays each strategy
/// through for the link that is told. The guest is not stopped, but the first write to each page after
/// each look is slower. What it cannot know: what the guest only reads, and what it will do later.
#[derive(Debug, Args)]
pub(super) struct Estimate {
    /// The running QEMU's QMP socket.
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Rate, round trip and, if any, loss of the link to the destination.
    #[arg(long, value_name = "RATE,RTT[,LOSS]")]
    link: LinkSpec,
    /// How long the guest may stand still, as for `farfault send`.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = duration)]
    downtime: Duration,
    /// How long to look at the guest.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = look)]
    time: Duration,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
}

fn look(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    let range = Duration::from_secs(2)..=Duration::from_secs(600);
    if range.contains(&time) { Ok(time) } else { Err("from 2s to 10min".to_owned()) }
}

#[derive(Debug, Serialize)]
struct EstimateEvent {
    event: &'static str,
    link: String,
    downtime_ms: f64,
    sample: Sample,
    predictions: Vec<Prediction>,
    recommended: Strategy,
    reason: String,
}

impl Estimate {
    pub(super) fn run(self) -> ExitCode {
        let output = Output::new(self.json);
        match self.estimate() {
            Ok(event) => {
                if self.json {
                    println!("{}", serde_json::to_string(&event).expect("plain data"));
                } else {
                    print!("{}", text(&event));
                }
                ExitCode::SUCCESS
            }
            Err(failure) => {
                output.error(&failure);
                ExitCode::FAILURE
            }
        }
    }

    fn estimate(&self) -> Result<EstimateEvent, Failure> {
        let mut guest = QemuSource::attach(&self.qmp)?;
        let link_bytes_per_s = self.link.rate.bits_per_s() as f64 / 8.0;
        let sample = Sample::take(&mut guest, link_bytes_per_s, self.time)?;
        let predictions: Vec<Prediction> =
            STRATEGIES.map(|strategy| predict(&sample, &self.link, self.downtime, strategy)).into();
        let (recommended, reason) = recommend(&predictions);
        Ok(EstimateEvent {
            event: "estimate",
            link: self.link.to_string(),
            downtime_ms: self.downtime.as_secs_f64() * 1e3,
            sample,
            predictions,
            recommended,
            reason,
        })
    }
}

fn name(strategy: Strategy) -> String {
    format!("{strategy:?}").to_lowercase()
}

fn text(event: &EstimateEvent) -> String {
    let sample = &event.sample;
    let bytes = |pages: f64| format_bytes((pages * PAGE_SIZE_BYTES as f64) as u64);
    let mut text = String::new();
    let mut row = |name: &str, value: String| text.push_str(&format!("  {name:<22}{value}\n"));
    row("guest RAM", bytes(sample.pages as f64));
    row(
        "in use",
        format!(
            "{}, {:.0} % of it zero",
            bytes(sample.populated_pages as f64),
            sample.zero_share * 100.0
        ),
    );
    row(
        "a whole page",
        format!(
            "{:.0} bytes, {:.0} if it was written just now",
            sample.whole_bytes_per_page, sample.written_bytes_per_page
        ),
    );
    row(
        "a changed page",
        format!(
            "{:.0} bytes if it is changed all the time, {:.0} if not, from {} pages",
            sample.hot_delta_bytes_per_page,
            sample.cold_delta_bytes_per_page,
            sample.delta_sample_pages
        ),
    );
    let written = [0.1, 1.0, 5.0]
        .map(|seconds| format!("{} in {seconds} s", bytes(sample.written_in(seconds))));
    row("written pages", written.join(", "));
    row("working set", bytes(sample.working_set_pages as f64));
    text.push_str(&format!(
        "\n  {:<12}{:>10}{:>13}{:>14}{:>12}  how it ends\n",
        "strategy", "total s", "downtime ms", "on the link", "stall ms"
    ));
    for told in &event.predictions {
        if !told.converges {
            let why = format!("does not end within {:.0} ms", event.downtime_ms);
            text.push_str(&format!("  {:<12}{:>10}  {why}\n", name(told.strategy), "-"));
            continue;
        }
        let end = if told.post_copy { "post-copy" } else { "without post-copy" };
        text.push_str(&format!(
            "  {:<12}{:>10.1}{:>13.0}{:>14}{:>12.0}  {end}\n",
            name(told.strategy),
            told.total_s,
            told.downtime_ms,
            format_bytes(told.link_bytes as u64),
            told.stall_ms
        ));
    }
    text.push_str(&format!("\n  take --strategy {}: {}\n", name(event.recommended), event.reason));
    text
}
