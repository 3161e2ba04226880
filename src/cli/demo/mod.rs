//! `farfault demo`: a whole migration on this machine.
//!
//! | file | subject |
//! |---|---|
//! | `run.rs` | one run, from two new processes to the guest's verdict |
//! | `process.rs`, `protocol.rs` | a side as its parent sees it, and what they say to each other |
//! | `side.rs` | the side's own process |
//! | `choice.rs` | which guest, and whether this host can move it |
//! | `guest.rs` | a guest that session and demo share |
//! | `qemu.rs`, `machine.rs`, `console.rs` | Linux in QEMU: its process, its machine, what it says |
//! | `audience.rs` | picture, lines or JSON |
//! | `outcome.rs` | what is left to read |

mod audience;
mod choice;
mod console;
mod guest;
mod machine;
mod outcome;
mod process;
mod protocol;
mod qemu;
mod run;
mod side;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use self::audience::Audience;
use self::choice::{Chosen, GuestChoice};
use self::outcome::VerdictEvent;
use self::protocol::Method;
pub(super) use self::qemu::DemoVm;
use self::run::{Outcome, RunPlan};
use super::send::{HandoverName, Rounds, StrategyName, rounds};
use super::{bytes, duration};
use crate::engine::Failure;
use crate::guest::workload::{GuestPlan, Workload};
use crate::lab::spec::LinkSpec;
use crate::units::format_bytes;
use crate::wire::message::Strategy;

/// What the demo starts as its two sides.
const SIDE_COMMAND: &str = "demo-side";

/// Pages of a built-in guest that its workload uses, of a hundred; the rest has never been touched.
const USED_PERCENT: u32 = 85;
const MEMORY_BYTES: u64 = 256 << 20;
/// So that an emulated KVM ends within minutes.
const SLOW_MEMORY_BYTES: u64 = 8 << 20;
/// A plain pre-copy is given so many times as long as farfault took, and at least as many seconds.
const PATIENCE: f64 = 3.0;
const PATIENCE_AT_LEAST: Duration = Duration::from_secs(5);
/// The same losses in every run.
const SEED: u64 = 0xfa17;
/// Exit status of a command that Ctrl-C has ended, by the shells' custom.
const INTERRUPTED: u8 = 130;

/// Moves a guest between two processes on this machine, over an emulated link.
///
/// A built-in guest boots, works, is moved while it works, works on, and checks its memory: every page
/// carries a checksum and the number of the operation that wrote it. The exit status is 0 when it has
/// moved and no page is wrong. Needs userfaultfd (root, or vm.unprivileged_userfaultfd=1), and nothing
/// else, but for --guest qemu.
#[derive(Debug, Args)]
pub(super) struct Demo {
    /// Rate, round trip and, if any, loss of the link.
    #[arg(long, value_name = "RATE,RTT[,LOSS]", default_value = "100Mbit,40ms")]
    link: LinkSpec,
    /// Which packets a lossy link loses; `farfault lab` tells.
    #[arg(long, value_name = "N", default_value_t = SEED, hide = true)]
    seed: u64,
    /// What is moved. auto: a virtual machine where KVM runs at the processor's speed, else native
    /// threads that do the same work on the same kind of memory. qemu: Linux in QEMU, which needs root.
    #[arg(long, value_enum, default_value_t)]
    guest: GuestChoice,
    /// Where tools/build-guest has put vmlinuz and initrd for --guest qemu [default: target/guest of
    /// the source tree].
    #[arg(long, value_name = "DIRECTORY")]
    image: Option<PathBuf>,
    /// The guest's memory, in units of 2 MiB [default: 256MiB, or 8MiB on an emulated KVM].
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    memory: Option<u64>,
    /// vCPUs, or threads; one in QEMU.
    #[arg(long, value_name = "N", default_value = "1", value_parser = cpus)]
    cpus: NonZeroU32,
    /// What the guest does, and how often a second: idle, sequential, sparse, hotcold, whole, read,
    /// random-read; without a rate, as fast as it can.
    #[arg(long, value_name = "WORK[:N/s]", default_value = "sparse:50000/s")]
    work: Workload,
    /// How long it works before it is moved, and afterwards.
    #[arg(long, value_name = "TIME", default_value = "2500ms", value_parser = duration)]
    work_for: Duration,
    /// hybrid: short pre-copy, then the guest runs on the other side and its last pages follow.
    /// precopy: everything before. postcopy: everything after.
    #[arg(long, value_enum, default_value_t)]
    strategy: StrategyName,
    /// one-flight: the decision travels with the device state. strict: the destination loads first and
    /// says so.
    #[arg(long, value_enum, default_value_t)]
    handover: HandoverName,
    /// How long the guest may stand still.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = duration)]
    downtime: Duration,
    /// Most pre-copy rounds; auto goes by the trend.
    #[arg(long, value_name = "auto|N", default_value = "auto", value_parser = rounds)]
    precopy_rounds: Rounds,
    /// Move the same guest once more, by plain pre-copy without deltas, and show both side by side.
    #[arg(long)]
    compare: bool,
    /// One JSON object a line on stdout instead of a picture.
    #[arg(long)]
    json: bool,
}

fn cpus(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| "write a number from 1 on".to_owned())
}

/// A side of `farfault demo`.
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct DemoSide {}

impl DemoSide {
    pub(super) fn run(self) -> ExitCode {
        side::run()
    }
}

impl Demo {
    pub(super) fn run(self, log_level: &str) -> ExitCode {
        let mut audience = Audience::new(self.json);
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let why = format!("no threads or descriptors left: {error}");
                audience.error(&Failure::plain(why));
                return ExitCode::FAILURE;
            }
        };
        let shown = runtime.block_on(async {
            tokio::select! {
                shown = self.show(log_level, &mut audience) => Some(shown),
                () = interrupted() => None,
            }
        });
        match shown {
            Some(Ok(true)) => ExitCode::SUCCESS,
            Some(Ok(false)) => ExitCode::FAILURE,
            Some(Err(failure)) => {
                audience.error(&failure);
                ExitCode::FAILURE
            }
            None => ExitCode::from(INTERRUPTED),
        }
    }

    /// True when the guest has moved, and is whole.
    async fn show(&self, log_level: &str, audience: &mut Audience) -> Result<bool, Failure> {
        let chosen = self.guest.settle(self.image.as_deref())?;
        let plan = self.plan(&chosen, log_level)?;
        audience.note(&format!("the guest: {}", chosen.why));
        let outcome = run::run(&plan, audience).await?;
        audience.say(&outcome::summary(&outcome));
        if !self.compare {
            audience.verdict(&VerdictEvent::new(&outcome, None));
            return Ok(outcome.is_good());
        }
        let compared = run::run(&plain_precopy(&plan, &outcome), audience).await?;
        audience.say(&format!("\n{}", outcome::table(&outcome, &compared)));
        audience.verdict(&VerdictEvent::new(&outcome, Some(&compared)));
        Ok(outcome.is_good() && compared.is_whole())
    }

    fn plan(&self, chosen: &Chosen, log_level: &str) -> Result<RunPlan, Failure> {
        let usual = if chosen.slow { SLOW_MEMORY_BYTES } else { MEMORY_BYTES };
        let guest = GuestPlan {
            memory_bytes: self.memory.unwrap_or(usual),
            used_percent: USED_PERCENT,
            workers: self.cpus,
            workload: self.work,
        };
        chosen.kind.check(&guest)?;
        choice::check_room(&guest)?;
        Ok(RunPlan {
            name: "farfault",
            title: format!(
                "{} {} · {} · link {}",
                format_bytes(guest.memory_bytes),
                chosen.kind.name(),
                self.work,
                self.link
            ),
            kind: chosen.kind.clone(),
            guest,
            link: self.link,
            seed: self.seed,
            method: Method {
                strategy: self.strategy.into(),
                handover: self.handover.into(),
                downtime: self.downtime,
                max_rounds: self.precopy_rounds.0,
                deltas: true,
            },
            work_for: self.work_for,
            patience: None,
            log_level: log_level.to_owned(),
        })
    }
}

/// The same once more, as everybody else does it.
fn plain_precopy(plan: &RunPlan, outcome: &Outcome) -> RunPlan {
    let patience = Duration::from_secs_f64(PATIENCE * outcome.report.total_ms / 1e3);
    RunPlan {
        name: "plain pre-copy",
        title: format!("{} · plain pre-copy, for comparison", plan.title),
        method: Method {
            strategy: Strategy::Precopy,
            max_rounds: None,
            deltas: false,
            ..plan.method
        },
        patience: Some(patience.max(PATIENCE_AT_LEAST)),
        ..plan.clone()
    }
}

/// Ctrl-C, SIGTERM, or a terminal that is closed.
async fn interrupted() {
    let listen = |kind| signal(kind).ok();
    let wait = |listener: Option<tokio::signal::unix::Signal>| async {
        match listener {
            Some(mut listener) => drop(listener.recv().await),
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(listen(SignalKind::interrupt())) => {}
        () = wait(listen(SignalKind::terminate())) => {}
        () = wait(listen(SignalKind::hangup())) => {}
    }
}
