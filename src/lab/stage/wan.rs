//! The link emulator `wan`, as a process.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::place::{ADDRESS_A, ADDRESS_B};
use super::process::Guarded;
use crate::lab::spec::{LinkSpec, QueueLimit};

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
    pub fn start(
        program: &Path,
        [netns_a, netns_b]: [&str; 2],
        link: LinkSpec,
        queue: QueueLimit,
        seed: u64,
    ) -> Result<Self> {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(program);
        command.arg("--a").arg(format!("{netns_a},{ADDRESS_A}/30"));
        command.arg("--b").arg(format!("{netns_b},{ADDRESS_B}/30"));
        command.arg("--link").arg(link.to_string());
        let queue = queue.bytes(link.rate, link.round_trip);
        command.arg("--queue").arg(queue.to_string()).arg("--seed").arg(seed.to_string());
        // Not in the group of whoever started this: Ctrl-C must not end the link before its guests.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
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

    /// Bytes that have used the link since the last reset: from a to b, and back.
    pub fn carried_bytes_each_way(&mut self) -> Result<[u64; 2]> {
        let totals = self.command("totals")?;
        let of = |direction: &str| totals[direction]["carried_bytes"].as_u64().unwrap_or(0);
        Ok([of("a_to_b"), of("b_to_a")])
    }

    /// The same, in both directions together.
    pub fn carried_bytes(&mut self) -> Result<u64> {
        Ok(self.carried_bytes_each_way()?.iter().sum())
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("listen to wan")?;
        serde_json::from_str(&line).with_context(|| format!("wan has said {line:?}"))
    }
}
