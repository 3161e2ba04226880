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
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL", value_parser = log_filter)]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

// What help says of each is at its arguments.
#[derive(Debug, Subcommand)]
enum Command {
    Receive(receive::Receive),
    Send(send::Send),
    Status(status::Status),
    Cancel(cancel::Cancel),
    Resolve(resolve::Resolve),
    Estimate(estimate::Estimate),
    Demo(demo::Demo),
    #[command(hide = true)]
    DemoSide(demo::DemoSide),
    #[command(hide = true)]
    DemoVm(demo::DemoVm),
    Replay(replay::Replay),
    Lab(lab::Lab),
    Completions(completions::Completions),
    Man(completions::Man),
    Doctor(doctor::Doctor),
}

/// Parses the arguments, runs the command, and gives the process's exit status: 0 only when all that
/// was asked for is done.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A log that cannot be written must not end a migration: what tells of it would panic.
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(&arguments.log_level))
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .init();
    crate::memory::keep_freed_memory();
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
        Qlog::create(path).map_err(|error| {
            let text = format!("--qlog {}: {error}", path.display());
            Failure::new(text, "name a new file in a directory that is there and can be written")
        })
    };
    path.map(make).transpose()
}

fn state_dir(chosen: Option<PathBuf>) -> PathBuf {
    chosen.unwrap_or_else(default_state_dir)
}

/// A filter of the log. A word that is no level would be taken for the name of a module, of which alone is then logged.
fn log_filter(text: &str) -> Result<String, String> {
    let is_word = |part: &str| part.chars().all(char::is_alphanumeric);
    let is_level = |part: &str| {
        !part.is_empty() && part.parse::<tracing_subscriber::filter::LevelFilter>().is_ok()
    };
    let parsed = tracing_subscriber::EnvFilter::try_new(text);
    let is_clear = |part: &str| !is_word(part) || is_level(part);
    let is_known = parsed.is_ok() && text.split(',').all(is_clear);
    is_known.then(|| text.to_owned()).ok_or_else(|| {
        "write off, error, warn, info, debug or trace, or a filter such as farfault::transport=debug".to_owned()
    })
}

/// An address at which others are reached, or answered.
fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        "write it like 192.0.2.1:64023 or [2001:db8::1]:64023: with a port; names are not looked up".to_owned()
    })
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

    #[test]
    fn help_says_all_that_is_written_for_it() {
        let help = |line: &str| {
            let asked = Arguments::try_parse_from(line.split(' ')).expect_err("help");
            asked.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
        };
        for (line, said) in [
            ("farfault resolve --help", "same choice on both"),
            (
                "farfault lab run --help",
                "The exit status is 0 when every run has ended as it should",
            ),
            ("farfault demo --help", "every page carries a checksum"),
            ("farfault help", "resolve Decides by hand"),
        ] {
            assert!(help(line).contains(said), "{line}: {}", help(line));
        }
    }

    #[test]
    fn a_log_level_that_is_none_is_refused() {
        for level in ["inf", "nonsense", "farfault=loud", ""] {
            assert!(log_filter(level).is_err(), "{level:?}");
        }
        let filters = ["farfault::transport=debug", "warn,quinn=trace", "[span{a=1}]=debug"];
        for level in ["info", "ERROR", "off"].into_iter().chain(filters) {
            assert!(log_filter(level).is_ok(), "{level:?}");
        }
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
            "--qemu-log qemu.txt",
        ];
        for option in useless {
            assert_eq!(with(option), Some(ErrorKind::ArgumentConflict), "{option}");
        }
        let attached = refused("farfault receive --qmp vm.qmp --qemu-log qemu.txt");
        assert_eq!(attached, Some(ErrorKind::ArgumentConflict), "who started it has its output");
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
