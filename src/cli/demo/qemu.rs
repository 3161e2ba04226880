//! Linux in a QEMU as the demo's guest. QEMU is started as `farfault demo-vm`, so that it ends with
//! the side that has started it, whatever becomes of that.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use clap::Args;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

use super::console::{Console, Heard};
use super::guest::LOOK_EVERY;
use super::machine::{Machine, value};
use super::process::name;
use super::protocol::{SideSettings, Verified};
use crate::engine::Failure;
use crate::guest::GuestError;
use crate::guest::qemu::{QemuDestination, QemuSource, SpawnOptions};

/// QEMU, started by a side of the demo.
pub(super) const VM_COMMAND: &str = "demo-vm";
/// How much of the end of QEMU's output an error quotes.
const QUOTE_CHARS: usize = 500;
/// What the test guest takes for: verify as fast as you can.
const VERIFY: &[u8] = b"v";
/// The sweep that is under way when it is asked to has begun before; one more is a whole one.
const SWEEPS: u64 = 2;

/// A guest in a QEMU: running, or awaited.
pub(super) struct QemuGuest {
    console: Console,
    files: Files,
    /// Until a session has it.
    destination: Option<Box<QemuDestination>>,
}

/// The names that one side's QEMU uses.
struct Files {
    ram: PathBuf,
    console: PathBuf,
    tty: PathBuf,
    qmp: PathBuf,
    log: PathBuf,
}

impl Files {
    fn of(settings: &SideSettings) -> Result<Files, GuestError> {
        let Some(ram_dir) = &settings.ram_dir else {
            return Err(GuestError::new("no directory for the RAM of QEMU"));
        };
        let side = name(settings.role);
        let path = |what: &str| settings.state_dir.join(format!("{side}.{what}"));
        Ok(Files {
            ram: ram_dir.join(side),
            console: path("console"),
            tty: path("tty"),
            qmp: path("qmp"),
            log: path("log"),
        })
    }

    /// What QEMU has written, for an error.
    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let words = lines.join("; ");
        let skipped = words.chars().count().saturating_sub(QUOTE_CHARS);
        words.chars().skip(skipped).collect()
    }
}

impl QemuGuest {
    /// Starts a QEMU, and waits until its guest works.
    pub(super) async fn boot(machine: &Machine, settings: &SideSettings) -> Result<Self, Failure> {
        let (files, console) = open(settings)?;
        let command = guarded(machine, settings, &files)?;
        let qmp = format!("unix:{},server=on,wait=off", value(&files.qmp));
        let log = File::create(&files.log);
        let start = log.and_then(|log| {
            Command::new(&command[0])
                .args(&command[1..])
                .args(["-qmp", &qmp])
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
        });
        let mut child =
            start.map_err(|error| Failure::plain(format!("QEMU cannot be started: {error}")))?;
        let guest = QemuGuest { console, files, destination: None };
        while !guest.console.heard().is_ready {
            if let Ok(Some(status)) = child.try_wait() {
                let words = guest.files.last_words();
                return Err(Failure::plain(format!("QEMU has ended ({status}): {words}")));
            }
            guest.check()?;
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(guest)
    }

    /// Starts a QEMU that waits for a guest.
    pub(super) fn await_arrival(
        machine: &Machine,
        settings: &SideSettings,
    ) -> Result<Self, GuestError> {
        let (files, console) = open(settings)?;
        let command = guarded(machine, settings, &files)?;
        let log = Some(files.log.clone());
        let destination = QemuDestination::spawn(&SpawnOptions { command, log })?;
        Ok(QemuGuest { console, files, destination: Some(Box::new(destination)) })
    }

    pub(super) fn leaving(&self) -> Result<QemuSource, GuestError> {
        QemuSource::attach(&self.files.qmp)
    }

    pub(super) fn arriving(&mut self) -> Result<Box<QemuDestination>, GuestError> {
        self.destination.take().ok_or_else(|| GuestError::new("this QEMU has its guest already"))
    }

    pub(super) fn console(&self) -> Console {
        self.console.clone()
    }

    /// Lets the guest verify all its pages, from the first to the last.
    pub(super) async fn verify(&self) -> Result<Verified, Failure> {
        let begin = loop {
            let heard = self.check()?;
            if heard.ops.is_some() {
                break heard.sweeps;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        let said = UnixStream::connect(&self.files.tty).and_then(|mut tty| {
            tty.write_all(VERIFY)?;
            Ok(tty)
        });
        // Open until the end: QEMU throws away what it has not read when its peer is gone.
        let _tty = said.map_err(|error| {
            Failure::plain(format!("the guest cannot be asked to verify its pages: {error}"))
        })?;
        loop {
            let heard = self.check()?;
            if heard.sweeps >= begin + SWEEPS {
                return Ok(Verified {
                    pages: heard.swept_pages,
                    wrong_pages: heard.wrong_pages,
                    first_wrong_page: heard.first_wrong_page,
                });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// What it has said, unless it has stopped.
    fn check(&self) -> Result<Heard, Failure> {
        let heard = self.console.heard();
        if let Some(fatal) = &heard.fatal {
            return Err(Failure::plain(format!("the guest cannot go on: {fatal}")));
        }
        if heard.has_ended {
            let words = self.files.last_words();
            return Err(Failure::plain(format!("the guest's QEMU has ended: {words}")));
        }
        Ok(heard)
    }
}

fn open(settings: &SideSettings) -> Result<(Files, Console), GuestError> {
    let files = Files::of(settings)?;
    let console = Console::listen(&files.console)?;
    Ok((files, console))
}

/// The command that starts QEMU so that it ends with this process.
fn guarded(
    machine: &Machine,
    settings: &SideSettings,
    files: &Files,
) -> Result<Vec<OsString>, GuestError> {
    let program = std::env::current_exe().map_err(|error| {
        GuestError::new(format!("farfault does not find its own program: {error}"))
    })?;
    let parent = std::process::id().to_string();
    let mut command: Vec<OsString> =
        vec![program.into(), VM_COMMAND.into(), "--parent".into(), parent.into(), "--".into()];
    command.extend(machine.command(&settings.plan, &files.ram, &files.console, &files.tty));
    Ok(command)
}

/// A QEMU of `farfault demo`.
#[derive(Debug, Args)]
#[command(hide = true)]
pub(crate) struct DemoVm {
    /// The process that it must not outlive.
    #[arg(long)]
    parent: i32,
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

impl DemoVm {
    /// Becomes QEMU. Comes back only when that fails.
    pub(crate) fn run(self) -> ExitCode {
        let guarded = set_pdeathsig(Signal::SIGKILL);
        // Before that, it may have ended already.
        if getppid() != Pid::from_raw(self.parent) {
            return ExitCode::FAILURE;
        }
        let why = match guarded {
            Ok(()) => Command::new(&self.command[0]).args(&self.command[1..]).exec().to_string(),
            Err(error) => format!("the kernel does not end it with the demo: {error}"),
        };
        eprintln!("{}: {why}", self.command[0].to_string_lossy());
        ExitCode::FAILURE
    }
}
