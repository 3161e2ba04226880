//! The link between two namespaces: the emulator `wan`, as a process, or a plain pair of virtual network
//! cards, as fast as the machine.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::place::{ADDRESS_A, ADDRESS_B};
use super::process::Guarded;
use crate::lab::netns::Netns;
use crate::lab::spec::{LinkSpec, QueueLimit};

/// A link between two namespaces.
#[derive(Debug)]
pub struct Wan(Kind);

#[derive(Debug)]
enum Kind {
    Emulated(Emulated),
    Plain(Plain),
}

#[derive(Debug)]
struct Emulated {
    // In this order: the end of its input ends the emulator by itself.
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    _process: Guarded,
}

/// Its card at either end has the same name.
const CARD: &str = "lab";

#[derive(Debug)]
struct Plain {
    /// The namespaces.
    ends: [String; 2],
    /// What the cards had sent at the last reset.
    sent_before: [u64; 2],
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
        let mut wan = Emulated { commands, answers, _process: process };
        ensure!(wan.answer()?["event"] == "ready", "wan is not ready");
        Ok(Wan(Kind::Emulated(wan)))
    }

    /// A link that nothing shapes. It goes when its namespaces do.
    pub fn plain(a: &Netns, b: &Netns) -> Result<Self> {
        let pair = ["link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", b.name()];
        a.ip(&pair)?;
        for (end, address) in [(a, ADDRESS_A), (b, ADDRESS_B)] {
            end.ip(&["address", "add", &format!("{address}/30"), "dev", CARD])?;
            end.ip(&["link", "set", CARD, "up"])?;
        }
        let ends = [a, b].map(|end| end.name().to_owned());
        Ok(Wan(Kind::Plain(Plain { ends, sent_before: [0; 2] })))
    }

    /// Has packets of up to `mtu` bytes cross a link that nothing shapes.
    pub fn set_mtu(&self, mtu: u16) -> Result<()> {
        let Kind::Plain(plain) = &self.0 else { bail!("the emulator has an MTU of its own") };
        for end in &plain.ends {
            Netns::existing(end)?.ip(&["link", "set", CARD, "mtu", &mtu.to_string()])?;
        }
        Ok(())
    }

    /// Sends a command of `wan` (`cut`, `rate 25Mbit` ...) and gives its answer. A link that nothing shapes
    /// knows `reset` only.
    pub fn command(&mut self, line: &str) -> Result<Value> {
        match &mut self.0 {
            Kind::Emulated(wan) => wan.command(line),
            Kind::Plain(plain) if line == "reset" => {
                plain.sent_before = plain.sent_bytes()?;
                Ok(Value::Null)
            }
            Kind::Plain(_) => bail!("nothing shapes this link: it cannot {line}"),
        }
    }

    /// Bytes that have used the link since the last reset: from a to b, and back.
    pub fn carried_bytes_each_way(&mut self) -> Result<[u64; 2]> {
        match &mut self.0 {
            Kind::Emulated(wan) => {
                let totals = wan.command("totals")?;
                let of = |way: &str| totals[way]["carried_bytes"].as_u64().unwrap_or(0);
                Ok([of("a_to_b"), of("b_to_a")])
            }
            Kind::Plain(plain) => {
                let [[a, b], [a_before, b_before]] = [plain.sent_bytes()?, plain.sent_before];
                Ok([a - a_before, b - b_before])
            }
        }
    }

    /// The same, in both directions together.
    pub fn carried_bytes(&mut self) -> Result<u64> {
        Ok(self.carried_bytes_each_way()?.iter().sum())
    }
}

impl Emulated {
    fn command(&mut self, line: &str) -> Result<Value> {
        writeln!(self.commands, "{line}").context("speak to wan")?;
        let answer = self.answer()?;
        if answer["event"] == "error" {
            bail!("wan: {}", answer["message"]);
        }
        Ok(answer)
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("listen to wan")?;
        serde_json::from_str(&line).with_context(|| format!("wan has said {line:?}"))
    }
}

impl Plain {
    fn sent_bytes(&self) -> Result<[u64; 2]> {
        let sent = |netns: &String| {
            let arguments = ["-n", netns, "-s", "-j", "link", "show", "dev", CARD];
            let shown = std::process::Command::new("ip").args(arguments).output();
            let shown = shown.context("run `ip` (package iproute2)")?.stdout;
            let cards: Value = serde_json::from_slice(&shown).context("what `ip` shows")?;
            cards[0]["stats64"]["tx"]["bytes"].as_u64().context("`ip` shows no bytes sent")
        };
        let [a, b] = &self.ends;
        Ok([sent(a)?, sent(b)?])
    }
}
