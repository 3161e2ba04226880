//! A side of the demo as its parent sees it.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;

use super::protocol::{Order, SideEvent, SideSettings};
use crate::engine::Failure;
use crate::report::Role;

/// A side that was told to end gets so long before it is killed.
const END_GRACE: Duration = Duration::from_secs(3);
/// Lines of both sides that have not been looked at yet.
pub(super) const SAID_QUEUE: usize = 1024;

/// Something that a side said.
pub(super) struct Said {
    pub(super) role: Role,
    pub(super) what: What,
}

pub(super) enum What {
    /// On standard output: as it was, and understood.
    Event(Value, Box<SideEvent>),
    /// On standard error.
    Log(String),
    /// It has ended, or closed its standard output.
    Ended,
}

/// The process, killed when this is dropped.
pub(super) struct Side {
    role: Role,
    child: Child,
    stdin: ChildStdin,
}

impl Side {
    /// Starts a side; what it says goes to `said`.
    pub(super) async fn start(
        settings: &SideSettings,
        log_level: &str,
        said: &mpsc::Sender<Said>,
    ) -> Result<Side, Failure> {
        let role = settings.role;
        let failed =
            |error| Failure::plain(format!("the {} cannot be started: {error}", name(role)));
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(program)
            .args(["--log-level", log_level, super::SIDE_COMMAND])
            // What it leaves there when it is killed goes with the run.
            .env("TMPDIR", &settings.state_dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for the demo alone, which ends its sides in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            unreachable!("all three are pipes");
        };
        let to = said.clone();
        tokio::spawn(async move {
            listen(stdout, role, &to, |line| {
                let value: Value = serde_json::from_str(&line).ok()?;
                let event = serde_json::from_value(value.clone()).ok()?;
                Some(What::Event(value, Box::new(event)))
            })
            .await;
            let _ = to.send(Said { role, what: What::Ended }).await;
        });
        let to = said.clone();
        tokio::spawn(async move { listen(stderr, role, &to, |line| Some(What::Log(line))).await });
        let mut side = Side { role, child, stdin };
        side.say(settings).await?;
        Ok(side)
    }

    pub(super) async fn order(&mut self, order: &Order) -> Result<(), Failure> {
        self.say(order).await
    }

    async fn say(&mut self, what: &impl Serialize) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(what).expect("plain data");
        line.push(b'\n');
        self.stdin.write_all(&line).await.map_err(|error| {
            Failure::plain(format!("the {} does not listen any more: {error}", name(self.role)))
        })
    }

    /// Asks it to cancel its migration, as an operator would.
    pub(super) fn cancel(&self) {
        if let Some(pid) = self.child.id() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
    }

    /// Ends it.
    pub(super) async fn end(mut self) {
        drop(self.stdin);
        if tokio::time::timeout(END_GRACE, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

/// For a person.
pub(super) fn name(role: Role) -> &'static str {
    match role {
        Role::Source => "source",
        Role::Destination => "destination",
    }
}

/// Hands on what `understand` makes of each line. A line that is not understood is handed on as it is.
async fn listen(
    pipe: impl AsyncRead + Unpin,
    role: Role,
    said: &mpsc::Sender<Said>,
    understand: impl Fn(String) -> Option<What>,
) {
    let mut lines = BufReader::new(pipe).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let what = understand(line.clone()).unwrap_or(What::Log(line));
        if said.send(Said { role, what }).await.is_err() {
            return;
        }
    }
}
