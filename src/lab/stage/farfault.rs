//! farfault itself, as a user runs it: `farfault receive` and `farfault send`, with `--json`.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::place::{ADDRESS_B, PageTables, Place};
use super::process::{Guarded, command_in, describe, is_interrupted, wait_for};
use super::qemu::Guest;
use crate::lab::netns::Netns;

const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// For a cancelled migration to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);
const POLL_EVERY: Duration = Duration::from_millis(5);
/// After the end of the program, for what is still in its pipes.
const PIPE_TIMEOUT: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Output {
    events: Mutex<Vec<Value>>,
    /// Lines on standard output that are not JSON.
    strange: Mutex<Vec<String>>,
    errors: Mutex<String>,
    open_pipes: AtomicU32,
}

/// A farfault that runs.
#[derive(Debug)]
pub struct Running {
    process: Guarded,
    output: Arc<Output>,
}

impl Running {
    /// Starts `farfault receive` or `send` in a namespace of the laboratory, with directories of its
    /// own for journals and temporary files. `wrapper` are words in front of it (`setpriv ...`).
    pub fn start(
        place: &Place,
        netns: &Netns,
        wrapper: &[&str],
        subcommand: &str,
        arguments: &[&str],
    ) -> Result<Self> {
        let program = &place.tools().farfault;
        let mut command = match wrapper.split_first() {
            None => command_in(netns.name(), program),
            Some((first, rest)) => {
                let mut command = command_in(netns.name(), first);
                command.args(rest).arg(program);
                command
            }
        };
        command.arg(subcommand).arg("--json").arg("--state-dir").arg(place.state_directory());
        command.args(arguments).env("TMPDIR", place.temporary_directory());
        Self::spawn(&mut command, place.page_tables().clone())
    }

    /// Starts farfault outside of any laboratory, with a directory for its temporary files.
    pub fn here(program: &Path, arguments: &[&str], temporary: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        Self::spawn(command.args(arguments).env("TMPDIR", temporary), PageTables::default())
    }

    /// `farfault receive`, listening on the destination's address, which starts `guest`.
    pub fn receive(place: &Place, guest: &Guest, options: &[&str]) -> Result<Self> {
        Self::receive_wrapped(place, guest, options, &[])
    }

    /// The same behind a wrapper.
    pub fn receive_wrapped(
        place: &Place,
        guest: &Guest,
        options: &[&str],
        wrapper: &[&str],
    ) -> Result<Self> {
        let listen = format!("{ADDRESS_B}:0");
        let mut arguments = vec!["--listen", &listen];
        arguments.extend(options);
        arguments.push("--");
        arguments.extend(guest.command_line().iter().map(String::as_str));
        Self::start(place, place.b(), wrapper, "receive", &arguments)
    }

    /// `farfault receive`, attached to a QEMU that is there already.
    pub fn receive_attached(place: &Place, guest: &Guest) -> Result<Self> {
        let (listen, qmp) = (format!("{ADDRESS_B}:0"), guest.qmp_path().display().to_string());
        Self::start(place, place.b(), &[], "receive", &["--listen", &listen, "--qmp", &qmp])
    }

    /// `farfault send` of a guest.
    pub fn send(place: &Place, guest: &Guest, ticket: &str, options: &[&str]) -> Result<Self> {
        Self::send_from(place, guest.qmp_path(), ticket, options, &[])
    }

    /// `farfault send` of whatever is at a socket, behind a wrapper.
    pub fn send_from(
        place: &Place,
        qmp: &Path,
        ticket: &str,
        options: &[&str],
        wrapper: &[&str],
    ) -> Result<Self> {
        let qmp = qmp.display().to_string();
        let arguments = [&["--qmp", &qmp, ticket], options].concat();
        Self::start(place, place.a(), wrapper, "send", &arguments)
    }

    /// A receiver's page table is noted in `page_tables`.
    fn spawn(command: &mut Command, page_tables: PageTables) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Guarded::spawn("farfault", command)?;
        let stdout = process.child().stdout.take().context("stdout")?;
        let stderr = process.child().stderr.take().context("stderr")?;
        let output = Arc::new(Output { open_pipes: AtomicU32::new(2), ..Output::default() });
        // These threads end with the pipes, which the QEMU that farfault starts may have inherited:
        // no one waits for them.
        let to = Arc::clone(&output);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                match serde_json::from_str::<Value>(&line) {
                    Ok(event) => {
                        if let Some(ticket) = event["ticket"].as_str() {
                            page_tables.note(ticket);
                        }
                        lock(&to.events).push(event);
                    }
                    Err(_) => lock(&to.strange).push(line),
                }
            }
            to.open_pipes.fetch_sub(1, Relaxed);
        });
        let to = Arc::clone(&output);
        std::thread::spawn(move || {
            let mut stderr = stderr;
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                lock(&to.errors).push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
            to.open_pipes.fetch_sub(1, Relaxed);
        });
        Ok(Running { process, output })
    }

    /// Waits for an event for which `wanted` holds.
    pub fn wait_for_event(
        &mut self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let result = wait_for(what, timeout, || {
            if let Some(event) = lock(&self.output.events).iter().find(|event| wanted(event)) {
                return Ok(Some(event.clone()));
            }
            if let Some(status) = self.process.ended()? {
                bail!("farfault has ended ({}) without {what}", describe(status));
            }
            Ok(None)
        });
        result.with_context(|| format!("farfault says: {}", lock(&self.output.errors)))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Whether it has told of an event for which `wanted` holds.
    pub fn has(&self, wanted: impl Fn(&Value) -> bool) -> bool {
        lock(&self.output.events).iter().any(wanted)
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.process.ended()?.is_some())
    }

    /// The ticket that `receive` prints when it is ready.
    pub fn ticket(&mut self) -> Result<String> {
        let event = self.wait_for_event("a ticket", READY_TIMEOUT, |e| e["event"] == "ticket")?;
        Ok(event["ticket"].as_str().context("the ticket is not a string")?.to_owned())
    }

    /// Waits until it ends by itself.
    pub fn wait(mut self, timeout: Duration) -> Result<Ended> {
        let status = self.process.wait(timeout).with_context(|| {
            let last = lock(&self.output.events).last().cloned().unwrap_or_default();
            format!("the last event was {last}; it says: {}", lock(&self.output.errors))
        })?;
        let since = Instant::now();
        while self.output.open_pipes.load(Relaxed) > 0 && since.elapsed() < PIPE_TIMEOUT {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Ended {
            status,
            events: lock(&self.output.events).clone(),
            strange: lock(&self.output.strange).clone(),
            errors: lock(&self.output.errors).clone(),
        })
    }

    /// Sends it a signal, as a user does with Ctrl-C or an init with SIGTERM.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.process.pid() as i32);
        Ok(nix::sys::signal::kill(pid, signal)?)
    }

    /// Asks it to end, and waits.
    pub fn terminate(self, timeout: Duration) -> Result<Ended> {
        self.signal(Signal::SIGTERM)?;
        self.wait(timeout)
    }

    /// False once it has ended.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.process.ended()?.is_none())
    }

    /// Kills it without warning.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }
}

/// Runs `farfault status`, `cancel` or `resolve` on the state of a laboratory, to its end.
pub fn command(place: &Place, arguments: &[&str]) -> Result<std::process::Output> {
    let mut command = Command::new(&place.tools().farfault);
    command.arg(arguments[0]).arg("--state-dir").arg(place.state_directory()).args(&arguments[1..]);
    command.stdin(Stdio::null()).output().context("start farfault")
}

/// What `farfault status --json` says of a side, `source` or `destination`; there is one at most.
pub fn status_of(place: &Place, side: &str) -> Result<Option<Value>> {
    let output = command(place, &["status", "--json"])?;
    ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let event: Value = serde_json::from_str(line).context("status")?;
        if event["side"] == side {
            return Ok(Some(event));
        }
    }
    Ok(None)
}

/// The journal of a side, as it is now; empty before there is one.
pub fn journal_of(place: &Place, side: &str) -> String {
    let directory = directory_of(&place.state_directory(), side);
    let journal = directory.map(|path| std::fs::read_to_string(path.join("journal")));
    journal.and_then(Result::ok).unwrap_or_default()
}

/// Where a side keeps its journal, if it has begun one; there is one at most.
pub fn directory_of(state_directory: &Path, side: &str) -> Option<PathBuf> {
    let directories = std::fs::read_dir(state_directory).into_iter().flatten().flatten();
    let named = |path: &PathBuf| path.extension().is_some_and(|extension| extension == side);
    directories.map(|entry| entry.path()).find(named)
}

/// A farfault that has ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it said with `--json`.
    pub events: Vec<Value>,
    strange: Vec<String>,
    errors: String,
}

impl Ended {
    /// Its report, given that it succeeded: exit status 0, nothing but JSON on standard output, and
    /// the report last.
    pub fn report(&self) -> Result<&Value> {
        ensure!(
            self.status.success(),
            "farfault failed ({}): {}",
            describe(self.status),
            self.why()
        );
        ensure!(self.strange.is_empty(), "not JSON on standard output: {:?}", self.strange);
        let last = self.events.last().context("no event at all")?;
        ensure!(last["event"] == "report", "the last event is {last}, not a report");
        Ok(last)
    }

    /// Why it failed, given that it did so as it should: a status that is not zero, and an error
    /// event with a message. Gives that and its hint in one text.
    pub fn failure(&self) -> Result<String> {
        ensure!(!self.status.success(), "farfault succeeded where it must fail");
        ensure!(self.status.code().is_some(), "farfault crashed: {}", describe(self.status));
        ensure!(!self.errors.contains("panicked at"), "farfault panicked: {}", self.errors);
        let mut errors = self.events.iter().filter(|event| event["event"] == "error");
        let error =
            errors.next_back().with_context(|| format!("no error event; {}", self.errors))?;
        let text = |field: &str| error[field].as_str().unwrap_or_default();
        ensure!(!text("message").is_empty(), "an error without a message: {error}");
        Ok(format!("{}\n{}", text("message"), text("hint")))
    }

    /// The last phase that it has told of.
    pub fn last_phase(&self) -> Option<&str> {
        self.events.iter().rev().find(|event| event["event"] == "phase")?["phase"].as_str()
    }

    fn why(&self) -> String {
        let errors = self.events.iter().filter(|event| event["event"] == "error");
        let told: Vec<String> = errors.map(Value::to_string).collect();
        format!("{} {}", told.join(" "), self.errors)
    }
}

/// Both sides of a migration that succeeded.
#[derive(Clone, Debug)]
pub struct Moved {
    /// When `send` was started.
    pub started: Instant,
    /// Until both had ended.
    pub took: Duration,
    /// The ticket, used now.
    pub ticket: String,
    /// Report of `send`.
    pub source: Value,
    /// Report of `receive`.
    pub destination: Value,
}

/// A migration under way.
#[derive(Debug)]
pub struct Migration {
    /// `farfault receive`.
    pub receive: Running,
    /// `farfault send`.
    pub send: Running,
    /// When `send` was started.
    pub started: Instant,
    ticket: String,
}

impl Migration {
    /// Starts a receiver, and then a sender of `source`.
    pub fn begin(
        place: &Place,
        source: &Guest,
        destination: &Guest,
        receive_options: &[&str],
        send_options: &[&str],
    ) -> Result<Self> {
        let mut receive = Running::receive(place, destination, receive_options)?;
        let ticket = receive.ticket()?;
        let started = Instant::now();
        let send = Running::send(place, source, &ticket, send_options)?;
        Ok(Migration { receive, send, started, ticket })
    }

    /// Waits for the end of both sides, which must succeed; `tick` is called again and again with the
    /// time since the start. `None` when it took longer than `limit`: then it was cancelled, or, after the switchover,
    /// killed.
    pub fn finish(
        mut self,
        limit: Duration,
        mut tick: impl FnMut(Duration) -> Result<()>,
    ) -> Result<Option<Moved>> {
        loop {
            tick(self.started.elapsed())?;
            if is_interrupted() {
                bail!("interrupted");
            }
            if self.send.process.ended()?.is_some() {
                break;
            }
            if self.started.elapsed() > limit {
                give_up(self.send, self.receive, CANCEL_TIMEOUT)?;
                return Ok(None);
            }
            std::thread::sleep(POLL_EVERY);
        }
        let sent = self.send.wait(READY_TIMEOUT).context("send")?;
        // A failure of one side is told together with what the other one says.
        let received = self.receive.wait(READY_TIMEOUT);
        let took = self.started.elapsed();
        let received = match (sent.report(), received) {
            (Ok(_), received) => received.context("receive")?,
            (Err(error), Ok(other)) => bail!("send: {error:#}\nreceive: {}", other.why()),
            (Err(error), Err(other)) => bail!("send: {error:#}\nreceive: {other:#}"),
        };
        Ok(Some(Moved {
            started: self.started,
            took,
            ticket: self.ticket,
            source: sent.report()?.clone(),
            destination: received.report().context("receive")?.clone(),
        }))
    }
}

/// Ends a migration that has taken too long.
///
/// # Errors
/// When that was interrupted, or the sender does not end although the guest has not moved.
fn give_up(send: Running, receive: Running, timeout: Duration) -> Result<()> {
    // A sender in post-copy does not let itself be cancelled: the guest would lose the pages that are left.
    let output = Arc::clone(&send.output);
    let is_postcopy = |event: &Value| event["event"] == "phase" && event["phase"] == "postcopy";
    match send.terminate(timeout) {
        // A receiver whose sender has cancelled ends by itself, or is killed on drop.
        Ok(_) => drop(receive.wait(timeout)),
        Err(error) if is_interrupted() => return Err(error.context("cancel send")),
        // Both sides are killed on drop, as the guest is.
        Err(_) if lock(&output.events).iter().any(is_postcopy) => {}
        Err(error) => return Err(error.context("cancel send")),
    }
    Ok(())
}

/// Moves a guest; both sides must succeed within `timeout`.
pub fn migrate(
    place: &Place,
    source: &Guest,
    destination: &Guest,
    receive_options: &[&str],
    send_options: &[&str],
    timeout: Duration,
) -> Result<Moved> {
    Migration::begin(place, source, destination, receive_options, send_options)?
        .finish(timeout, |_| Ok(()))?
        .with_context(|| format!("farfault has not moved the guest within {timeout:?}"))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Running {
        let mut command = Command::new("sh");
        let mut running =
            Running::spawn(command.args(["-c", script]), PageTables::default()).unwrap();
        running.wait_for_event("readiness", READY_TIMEOUT, |event| event["ready"] == 1).unwrap();
        running
    }

    #[test]
    fn a_sender_that_does_not_let_itself_be_cancelled_is_given_up_and_killed() {
        for phase in ["precopy", "postcopy"] {
            let send = shell(&format!(
                "trap '' TERM; echo '{{\"event\": \"phase\", \"phase\": \"{phase}\"}}'; echo '{{\"ready\": 1}}'; \
                 while :; do sleep 0.05; done"
            ));
            let receive = shell("echo '{\"ready\": 1}'; exec sleep 60");
            let pids = [send.pid(), receive.pid()];
            let since = Instant::now();
            // In pre-copy it has to.
            assert_eq!(
                give_up(send, receive, Duration::from_millis(200)).is_ok(),
                phase == "postcopy"
            );
            assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
            for pid in pids {
                assert!(!Path::new("/proc").join(pid.to_string()).exists(), "{pid} lives");
            }
        }
    }
}
