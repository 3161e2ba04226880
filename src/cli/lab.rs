//! `farfault lab`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use super::duration;
use crate::lab::experiment::{
    RunOptions, SHIPPED, Scenario, Shipped, Store, Tally, run, write_report,
};
use crate::lab::stage::process::{interrupt, is_interrupted};

/// Exit status of a command that Ctrl-C has ended, by the shells' custom.
const INTERRUPTED: u8 = 130;

/// Experiments: moves guests over emulated links by farfault and by QEMU's own methods, and compares.
#[derive(Debug, Args)]
pub(super) struct Lab {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    Run(Run),
    /// Lists the scenarios that farfault brings along.
    List,
    /// Prints one of them, to begin another with.
    Show {
        /// Its name.
        name: String,
    },
    /// Writes report, table and pictures of an experiment anew.
    Report {
        /// Its directory.
        directory: PathBuf,
    },
}

/// Runs a scenario, or what of it is not done yet.
///
/// Every cell of the matrix of guests, links and methods is run in a place of its own: two network
/// namespaces with an emulated link between them, and in each a QEMU. They are made and removed here,
/// also on Ctrl-C. Finished runs are kept in the output directory; what is there is not run again.
/// Guests in QEMU need root; qemu-system-x86_64, ip and setpriv; the program `wan` beside this one or in
/// PATH; and the test guest that tools/build-guest makes.
///
/// The exit status is 0 when every run has ended as it should: a method that does not converge within
/// the limit is a result, a run that fails or a corrupt page is not.
#[derive(Debug, Args)]
struct Run {
    /// A scenario of `farfault lab list`, or a TOML file.
    #[arg(value_name = "NAME|FILE.toml")]
    scenario: String,
    /// Where results go [default: lab-NAME].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Times that each cell is run, instead of what the scenario says.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: Option<u32>,
    /// Only cells whose name GUEST/LINK/METHOD contains this; may be given several times.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Give a migration up after this time, instead of what the scenario says.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    limit: Option<Duration>,
    /// Begin no run that would end later than this, by the runs before; each repetition of the whole
    /// matrix comes before the next.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    budget: Option<Duration>,
    /// The test guest: a directory with vmlinuz and initrd, as tools/build-guest makes it.
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    image: PathBuf,
}

impl Lab {
    pub(super) fn run(self) -> ExitCode {
        let done = match self.command {
            LabCommand::Run(run) => run.run(),
            LabCommand::List => list().map(|()| ExitCode::SUCCESS),
            LabCommand::Show { name } => show(&name).map(|()| ExitCode::SUCCESS),
            LabCommand::Report { directory } => report(&directory).map(|()| ExitCode::SUCCESS),
        };
        done.unwrap_or_else(|error| {
            if is_interrupted() {
                eprintln!("farfault: interrupted; what is finished is kept");
                return ExitCode::from(INTERRUPTED);
            }
            eprintln!("farfault: error: {error:#}");
            ExitCode::FAILURE
        })
    }
}

impl Run {
    fn run(self) -> Result<ExitCode> {
        let (name, mut scenario) = find(&self.scenario)?;
        if let Some(repeat) = self.repeat {
            scenario.repeat = repeat;
        }
        // Written otherwise, the same limit would make finished runs count as those of another scenario.
        if let Some(limit) = self.limit
            && scenario.limit()? != limit
        {
            scenario.limit = format!("{}ms", limit.as_millis());
        }
        let directory = self.out.unwrap_or_else(|| PathBuf::from(format!("lab-{name}")));
        listen_for_signals()?;
        let mut store = Store::open(&directory, &scenario)?;
        let options = RunOptions { only: self.only, budget: self.budget, image: self.image };
        let tally = run(&scenario, &mut store, &options, |line| eprintln!("farfault: {line}"))?;
        write_report(&scenario, &store)?;
        eprintln!("farfault: {}", in_words(&tally));
        println!("{}", store.path("report.md").display());
        let is_good = tally.failed == 0 && tally.corrupt_pages == 0;
        Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn in_words(tally: &Tally) -> String {
    let Tally { kept, made, failed, left, corrupt_pages } = tally;
    let mut text = format!("{made} runs made, {kept} kept from before");
    for (count, word) in [(failed, "failed"), (left, "left")] {
        if *count > 0 {
            text.push_str(&format!(", {count} {word}"));
        }
    }
    text.push_str(&format!(", {corrupt_pages} corrupt pages"));
    text
}

/// A scenario and its name.
fn find(wanted: &str) -> Result<(String, Scenario)> {
    if let Some(shipped) = Shipped::named(wanted) {
        return Ok((shipped.name.to_owned(), shipped.scenario()?));
    }
    let path = Path::new(wanted);
    if path.extension().is_none_or(|extension| extension != "toml") {
        bail!(
            "there is no scenario {wanted:?}: give one of {}, or a file that ends in .toml",
            SHIPPED.iter().map(|shipped| shipped.name).collect::<Vec<_>>().join(", ")
        );
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("read {wanted}"))?;
    let scenario = Scenario::parse(&text).with_context(|| wanted.to_owned())?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, scenario))
}

fn list() -> Result<()> {
    for shipped in SHIPPED {
        let scenario = shipped.scenario()?;
        let runs = scenario.runs(&[]).len();
        println!("{:<8}{:>4} runs  {}", shipped.name, runs, scenario.title);
    }
    Ok(())
}

fn show(name: &str) -> Result<()> {
    let shipped = Shipped::named(name)
        .with_context(|| format!("there is no scenario {name:?}; see farfault lab list"))?;
    print!("{}", shipped.text);
    Ok(())
}

fn report(directory: &Path) -> Result<()> {
    let (store, scenario) = Store::existing(directory)?;
    write_report(&scenario, &store)?;
    println!("{}", store.path("report.md").display());
    Ok(())
}

/// From now on Ctrl-C and SIGTERM end the run in order. What is started later has signals as usual:
/// only this process catches them.
fn listen_for_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("listen for signals")?;
    let (mut ctrl_c, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = ctrl_c.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        interrupt();
    });
    Ok(())
}
