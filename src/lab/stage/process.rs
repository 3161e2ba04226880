//! Child processes that end with their parent, whatever happens to it; and waiting that Ctrl-C ends.

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a condition is looked at while waiting for it.
const POLL_EVERY: Duration = Duration::from_millis(5);

/// Set by [`interrupt`].
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes every wait here and in the rest of the laboratory end with an error, now and from now on, so
/// that all is cleaned up on the way out.
pub fn interrupt() {
    INTERRUPTED.store(true, Relaxed);
}

/// True after [`interrupt`].
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Relaxed)
}

/// Does nothing for a while.
///
/// # Errors
/// When it was interrupted.
pub fn pause(time: Duration) -> Result<()> {
    let since = Instant::now();
    while since.elapsed() < time {
        if is_interrupted() {
            bail!("interrupted");
        }
        std::thread::sleep(POLL_EVERY.min(time.saturating_sub(since.elapsed())));
    }
    Ok(())
}

/// A command that runs in a network namespace and is killed when the thread that starts it ends,
/// even if that is killed itself. Neither wrapper stays: the child's pid is that of the program.
pub fn command_in(netns: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "ip", "netns", "exec", netns]).arg(program);
    command
}

/// Waits for something to become `Some`.
pub fn wait_for<T>(
    what: &str,
    timeout: Duration,
    mut poll: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let since = Instant::now();
    loop {
        if let Some(value) = poll()? {
            return Ok(value);
        }
        if is_interrupted() {
            bail!("interrupted");
        }
        if since.elapsed() > timeout {
            bail!("waited {timeout:?} in vain for {what}");
        }
        std::thread::sleep(POLL_EVERY);
    }
}

/// A child that is killed and reaped on drop.
#[derive(Debug)]
pub struct Guarded {
    child: Child,
    name: String,
}

impl Guarded {
    /// Starts a command.
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Guarded { child, name: name.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it ends.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait_for(&what, timeout, || Ok(self.child.try_wait()?))
    }

    /// Ends it at once and without warning, as a crash does.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// Kills a process that another one started, named by a pid file; nothing if it has ended.
pub fn kill_by_pid_file(pid_file: &Path) {
    let Ok(text) = std::fs::read_to_string(pid_file) else { return };
    let Ok(pid) = text.trim().parse::<i32>() else { return };
    // A pid may have been given to another process since: the command line must name the file.
    let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let file = pid_file.as_os_str().as_encoded_bytes();
    if command_line.split(|b| *b == 0).any(|argument| argument == file) {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        );
        let gone = || Ok((!Path::new(&format!("/proc/{pid}/exe")).exists()).then_some(()));
        let _ = wait_for("a killed process to end", Duration::from_secs(5), gone);
    }
}

/// Killed by a signal, or ended with a status: in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, signal) => format!("killed by signal {}", signal.unwrap_or_default()),
    }
}
