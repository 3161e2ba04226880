//! The command line: one file per subcommand; only argument parsing and wording.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::engine::Failure;
use crate::report::{MigrationResult, Output, Report, serve_metrics};
use crate::session::journal::default_state_dir;
use crate::transport::Qlog;

mod cancel;
mod completions;
mod demo;
mod doctor;
mod estimate;
#[doc(hidden)]
pub mod fuzz;
mod lab;
mod receive;
mod replay;
mod resolve;
mod send;
mod status;

/// Moves a running virtual machine to another host over QUIC.
///
/// On the destination run `farfault receive`; it prints a ticket. On the source run `farfault send`
/// with that ticket. The guest keeps running all the while but for a fraction of a second.
#[derive(Debug, Parser)]
#[command(name = "farfault", version, arg_required_else_help = true)]
struct Arguments {
    /// What is logged on stderr: error, warn, info, debug, trace, or a filter such as
    /// `farfault::transport=debug`.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Waits for a guest: prints a ticket for `farfault send`.
    Receive(receive::Receive),
    /// Moves a running QEMU guest to a waiting receiver.
    Send(send::Send),
    /// Tells all migrations on this host, and what to do about those that nobody works on.
    Status(status::Status),
    /// Ends a migration while the guest still belongs to the source.
    Cancel(cancel::Cancel),
    /// Decides by hand where the guest runs, when a migration ended in doubt.
    Resolve(resolve::Resolve),
    /// Tells what a migration would be like, without moving anything.
    Estimate(estimate::Estimate),
    /// Shows a whole migration on this machine, with a built-in guest.
    Demo(demo::Demo),
    #[command(hide = true)]
    DemoSide(demo::DemoSide),
    #[command(hide = true)]
    DemoVm(demo::DemoVm),
    /// Replays what guests touch against the orders in which pages can go.
    Replay(replay::Replay),
    /// Experiments: farfault and QEMU's own methods over emulated links, with tables and pictures.
    Lab(lab::Lab),
    /// Prints what a shell needs to complete farfault's arguments.
    Completions(completions::Completions),
    /// Prints the manual page of farfault, or of one of its commands, in roff.
    Man(completions::Man),
    /// Tells what this host can do, and how to mend what it cannot.
    Doctor(doctor::Doctor),
}

/// Parses the arguments, runs the command, and gives the process's exit status: 0 only when all that
/// was asked for is done.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = match tracing_subscriber::EnvFilter::try_new(&arguments.log_level) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("farfault: error: --log-level '{}': {error}", arguments.log_level);
            return ExitCode::from(2);
        }
    };
    // A log that cannot be written must not end a migration: what tells of it would panic.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .init();
    match arguments.command {
        Command::Receive(receive) => {
            run_migration(receive.json, receive.metrics, |output| receive.run(output))
        }
        Command::Send(send) => run_migration(send.json, send.metrics, |output| send.run(output)),
        Command::Status(status) => status.run(),
        Command::Cancel(cancel) => cancel.run(),
        Command::Resolve(resolve) => resolve.run(),
        Command::Demo(demo) => demo.run(&arguments.log_level),
        Command::DemoSide(side) => side.run(),
        Command::DemoVm(vm) => vm.run(),
        Command::Replay(replay) => replay.run(),
        Command::Lab(lab) => lab.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
        Command::Estimate(estimate) => estimate.run(),
        Command::Doctor(doctor) => doctor.run(),
    }
}

/// Runs one side of a migration on a runtime of its own and tells its end.
fn run_migration<F>(
    json: bool,
    metrics: Option<SocketAddr>,
    side: impl FnOnce(Arc<Output>) -> F,
) -> ExitCode
where
    F: Future<Output = Result<Report, Failure>>,
{
    let output = Arc::new(Output::new(json));
    if let Err(failure) = descriptors() {
        output.error(&failure);
        return ExitCode::FAILURE;
    }
    if let Some(address) = metrics
        && let Err(error) = serve_metrics(address, output.clone())
    {
        output.error(&Failure::new(
            format!("--metrics {address}: {error}"),
            "choose an address of this host and a port that is free",
        ));
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output.error(&Failure::plain(format!("no threads or descriptors left: {error}")));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(side(output.clone()));
    // Threads that wait for a peer which is gone must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(report) => {
            output.report(&report);
            match report.result {
                MigrationResult::Migrated => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(failure) => {
            output.error(&failure);
            ExitCode::FAILURE
        }
    }
}

/// A migration has some 40 files and sockets open.
const LEAST_DESCRIPTORS: u64 = 128;

/// Sees to it that a migration does not run out of descriptors in the middle.
fn descriptors() -> Result<(), Failure> {
    let limit = Resource::RLIMIT_NOFILE;
    let asked = getrlimit(limit).map_err(|error| Failure::plain(format!("getrlimit: {error}")));
    let (soft, hard) = asked?;
    if soft >= LEAST_DESCRIPTORS {
        return Ok(());
    }
    setrlimit(limit, LEAST_DESCRIPTORS, hard).map_err(|_| {
        let text = format!(
            "no more than {soft} files and sockets may be open at a time; a migration needs {LEAST_DESCRIPTORS}"
        );
        Failure::new(text, "`ulimit -n 1024`, or LimitNOFILE=1024 in the unit of systemd")
    })
}

/// Tells why a command that is no migration did not work.
fn fail(failure: &Failure) -> ExitCode {
    eprintln!("farfault: error: {}", failure.reason);
    if let Some(hint) = &failure.hint {
        eprintln!("farfault: hint: {hint}");
    }
    ExitCode::FAILURE
}

/// Makes the log before anything is moved.
fn qlog(path: Option<&Path>) -> Result<Option<Qlog>, Failure> {
    let make = |path: &Path| {
        Qlog::create(path)
            .map_err(|error| Failure::plain(format!("--qlog {}: {error}", path.display())))
    };
    path.map(make).transpose()
}

fn state_dir(chosen: Option<PathBuf>) -> PathBuf {
    chosen.unwrap_or_else(default_state_dir)
}

/// clap's view of a parser from [`crate::units`].
fn rate(text: &str) -> Result<u64, String> {
    crate::units::parse_rate(text).map_err(|error| error.to_string())
}

fn bytes(text: &str) -> Result<u64, String> {
    crate::units::parse_bytes(text).map_err(|error| error.to_string())
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    crate::units::parse_duration(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;

    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_follows_two_dashes_is_left_to_qemu() {
        let line = "farfault receive --listen 10.0.0.2 -- qemu-system-x86_64 -m 1G -S";
        let arguments = Arguments::try_parse_from(line.split(' ')).unwrap();
        let Command::Receive(receive) = arguments.command else { panic!("receive") };
        assert_eq!(receive.command, ["qemu-system-x86_64", "-m", "1G", "-S"]);
    }

    #[test]
    fn a_receiver_needs_a_guest() {
        assert!(Arguments::try_parse_from(["farfault", "receive"]).is_err());
        let both = "farfault receive --qmp a.sock -- qemu-system-x86_64";
        assert!(Arguments::try_parse_from(both.split(' ')).is_err());
    }

    fn refused(line: &str) -> Option<ErrorKind> {
        Arguments::try_parse_from(line.split(' ')).err().map(|error| error.kind())
    }

    #[test]
    fn who_takes_over_a_receiver_is_told_what_it_would_not_do() {
        let with = |options: &str| refused(&format!("farfault receive --resume 7a01 {options}"));
        assert_eq!(with("--json --reconnect-for 1min"), None);
        let useless = [
            "--huge-pages",
            "--trace touched.jsonl",
            "--paused",
            "--listen [::]:7",
            "--advertise [::1]:7",
        ];
        for option in useless {
            assert_eq!(with(option), Some(ErrorKind::ArgumentConflict), "{option}");
        }
    }

    #[test]
    fn who_takes_over_a_sender_is_told_what_it_would_not_do() {
        let with = |options: &str| refused(&format!("farfault send --resume 7a01 {options}"));
        assert_eq!(with("--json --bandwidth 1Gbit --encoders 1 --codec lz4/lz4"), None);
        let useless = [
            "ticket",
            "--qmp vm.qmp",
            "--strategy precopy",
            "--handover strict",
            "--downtime 60ms",
            "--precopy-rounds 1",
            "--base-cache 0",
            "--line-cache 0",
            "--tracker hash-scan",
            "--trace touched.jsonl",
        ];
        for option in useless {
            assert_eq!(with(option), Some(ErrorKind::ArgumentConflict), "{option}");
        }
    }
}
