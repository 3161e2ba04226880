//! The link emulator, as a process.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail, ensure};
use farfault_wan::spec::{LinkSpec, QueueLimit};
use serde_json::Value;

use crate::lab::{ADDRESS_A, ADDRESS_B};
use crate::process::{Guarded, workspace_program};

/// A link between two namespaces.
#[derive(Debug)]
pub struct Wan {
    // In this order: the end of its input ends the emulator by itself.
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    _process: Guarded,
}

impl Wan {
    /// Starts the emulator; the link is up when this returns.
    pub fn start(netns_a: &str, netns_b: &str, link: LinkSpec, queue: QueueLimit) -> Result<Self> {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(workspace_program("FARFAULT_WAN_BIN", "wan")?);
        command.arg("--a").arg(format!("{netns_a},{ADDRESS_A}/30"));
        command.arg("--b").arg(format!("{netns_b},{ADDRESS_B}/30"));
        command.arg("--link").arg(link.to_string());
        let queue = queue.bytes(link.rate, link.round_trip);
        command.arg("--queue").arg(queue.to_string()).arg("--seed").arg("1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Guarded::spawn("wan", &mut command)?;
        let commands = process.child().stdin.take().context("wan's stdin")?;
        let answers = BufReader::new(process.child().stdout.take().context("wan's stdout")?);
        let mut wan = Wan { commands, answers, _process: process };
        ensure!(wan.answer()?["event"] == "ready", "wan is not ready");
        Ok(wan)
    }

    /// Sends a command of `wan` (`cut`, `rate 25Mbit` ...) and gives its answer.
    pub fn command(&mut self, line: &str) -> Result<Value> {
        writeln!(self.commands, "{line}").context("speak to wan")?;
        let answer = self.answer()?;
        if answer["event"] == "error" {
            bail!("wan: {}", answer["message"]);
        }
        Ok(answer)
    }

    /// Bytes that have used the link, in both directions together, since the last reset.
    pub fn carried_bytes(&mut self) -> Result<u64> {
        let totals = self.command("totals")?;
        let of = |direction: &str| totals[direction]["carried_bytes"].as_u64().unwrap_or(0);
        Ok(of("a_to_b") + of("b_to_a"))
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("listen to wan")?;
        serde_json::from_str(&line).with_context(|| format!("wan has said {line:?}"))
    }
}
