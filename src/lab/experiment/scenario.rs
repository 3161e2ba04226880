//! What is to be tried: guests, links and methods, each with each, as a TOML file says it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::guest::workload::{Pattern, Workload};
use crate::lab::link::SplitMix64;
use crate::lab::spec::{LinkSpec, QueueLimit};
use crate::lab::stage::native;
use crate::lab::stage::qemu::Programs;
use crate::units::{parse_bytes, parse_duration};

/// The work that is not on the guest's own pages.
const REDIS: &str = "redis";
/// That on its pages, and frames of them for a client outside.
const STREAM: &str = "stream";
/// The test guest takes no less.
const MIN_WORKING_SET_BYTES: u64 = 64 << 10;
/// Of farfault.
const DOWNTIME: &str = "--downtime";
/// More cells than this are a slip of the pen.
const MAX_CELLS: usize = 10_000;

/// A whole experiment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// One line for a person.
    pub title: String,
    /// What it is to show.
    #[serde(default)]
    pub about: String,
    /// Decides the order of the runs and which packets are lost.
    #[serde(default = "one")]
    pub seed: u64,
    /// How many times each cell is run.
    #[serde(default = "three")]
    pub repeat: u32,
    /// A migration that takes longer is given up, and counts as one that did not converge.
    #[serde(default = "limit")]
    pub limit: String,
    /// How long the guest may stand still, told to every method alike.
    #[serde(default = "downtime")]
    pub downtime: String,
    /// Ask `farfault estimate` before each of farfault's migrations of a guest in QEMU.
    #[serde(default)]
    pub estimate: bool,
    /// Write traces of farfault's migrations of guests in QEMU, for `farfault replay`; they run slower then.
    #[serde(default)]
    pub trace: bool,
    /// Have memory ready for destinations in QEMU, which the host of a virtual machine may give slowly.
    #[serde(default)]
    pub ready_memory: bool,
    /// What is moved.
    pub guest: Vec<GuestPart>,
    /// What it is moved over.
    pub link: Vec<LinkPart>,
    /// How it is moved.
    pub method: Vec<MethodPart>,
}

fn one() -> u64 {
    1
}

fn three() -> u32 {
    3
}

fn limit() -> String {
    "120s".to_owned()
}

fn downtime() -> String {
    "300ms".to_owned()
}

/// What a guest runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestKind {
    /// The test guest in QEMU, in a network namespace.
    #[default]
    Qemu,
    /// The built-in microVM.
    Kvm,
    /// The built-in guest of native threads.
    Threads,
}

/// A guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPart {
    /// Its name in this scenario.
    pub name: String,
    /// What it runs on.
    #[serde(default)]
    pub kind: GuestKind,
    /// All its memory.
    pub memory: String,
    /// QEMU only: how much of it the guest's kernel may use; the rest is never touched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usable: Option<String>,
    /// QEMU only: memory that it fills and works on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<String>,
    /// The pattern of its work on pages; in QEMU also `stream`, with a client outside, and
    /// `redis`, a server with its client.
    pub work: String,
    /// Operations a second, each on one page or key; 0 is as fast as it can.
    pub rate: u64,
    /// QEMU only: first content of the working set: text, random, zero. redis has content of its own.
    #[serde(default = "text", skip_serializing_if = "String::is_empty")]
    pub fill: String,
    /// QEMU only: pages or keys that it verifies a second, besides its work.
    #[serde(default = "verify")]
    pub verify: u64,
}

fn text() -> String {
    "text".to_owned()
}

fn verify() -> u64 {
    500
}

/// What QUIC needs at least, and what a virtual network card has room for.
const MTUS: std::ops::RangeInclusive<u16> = 1280..=65_000;

/// Of Ethernet.
const USUAL_MTU_BYTES: u16 = 1500;

/// A link that is as fast as the machine.
pub(super) const UNSHAPED: &str = "none";

/// A link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkPart {
    /// Its name in this scenario.
    pub name: String,
    /// Rate, round trip and, if any, loss; or `none`: two virtual network cards, and nothing that shapes what crosses.
    pub link: String,
    /// The largest packet in bytes, where nothing shapes the link; 1500 unless told otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// What may wait at each end.
    #[serde(default = "bdp")]
    pub queue: String,
    /// Times in which it carries nothing, counted from the start of the migration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cut: Vec<CutPart>,
}

fn bdp() -> String {
    "bdp".to_owned()
}

/// A time without a link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CutPart {
    /// When it begins.
    pub at: String,
    /// How long it is.
    pub lasts: String,
}

/// A method: of farfault's, or of QEMU's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MethodPart {
    /// Its name in this scenario.
    pub name: String,
    /// farfault, with these options of `farfault send`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send: Option<Vec<String>>,
    /// QEMU's own migration, in this way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<String>,
    /// Further parameters of QEMU's migration, as `migrate-set-parameters` has them.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub parameters: Map<String, Value>,
    /// Further arguments of QEMU's command line, on both sides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
    /// QEMU's migration is encrypted, by TLS with a key that both sides have.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tls: bool,
}

/// One run to be made.
#[derive(Clone, Debug)]
pub struct Cell {
    /// What is moved.
    pub guest: GuestPart,
    /// Over what.
    pub link: LinkPart,
    /// How.
    pub method: MethodPart,
    /// Counted from 1.
    pub repetition: u32,
}

impl Cell {
    /// `GUEST/LINK/METHOD`
    pub fn name(&self) -> String {
        format!("{}/{}/{}", self.guest.name, self.link.name, self.method.name)
    }
}

impl Scenario {
    /// Reads a scenario that an experiment was made by, and does not check it: what is refused by now may have been taken.
    pub fn noted(text: &str) -> Result<Self> {
        Ok(toml::from_str(text)?)
    }

    /// Reads a scenario and checks all of it.
    pub fn parse(text: &str) -> Result<Self> {
        let scenario: Scenario = toml::from_str(text)?;
        scenario.check()?;
        Ok(scenario)
    }

    fn check(&self) -> Result<()> {
        ensure!(self.repeat >= 1, "repeat: at least 1");
        self.limit()?;
        self.downtime()?;
        let parts = [
            ("guest", self.guest.iter().map(|part| &part.name).collect::<Vec<_>>()),
            ("link", self.link.iter().map(|part| &part.name).collect()),
            ("method", self.method.iter().map(|part| &part.name).collect()),
        ];
        for (kind, names) in parts {
            ensure!(!names.is_empty(), "a scenario needs at least one [[{kind}]]");
            for name in &names {
                let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
                ensure!(
                    !name.is_empty() && name.chars().all(plain),
                    "{kind} {name:?}: a name has letters, digits and any of -_.+"
                );
            }
            let unique: BTreeSet<_> = names.iter().collect();
            ensure!(unique.len() == names.len(), "two [[{kind}]] have the same name");
        }
        for guest in &self.guest {
            guest.check().with_context(|| format!("guest {}", guest.name))?;
        }
        for link in &self.link {
            link.check().with_context(|| format!("link {}", link.name))?;
        }
        for method in &self.method {
            method.check().with_context(|| format!("method {}", method.name))?;
        }
        let cells = self.guest.len() * self.link.len() * self.method.len();
        let runs = cells.saturating_mul(self.repeat as usize);
        ensure!(runs <= MAX_CELLS, "{runs} runs are more than {MAX_CELLS}");
        let in_qemu = self.guest.iter().any(|guest| guest.kind == GuestKind::Qemu);
        ensure!(in_qemu || !self.ready_memory, "ready_memory: there is no guest in QEMU");
        let moves_them = in_qemu && self.method.iter().any(|method| method.send.is_some());
        for (option, is_set) in [("trace", self.trace), ("estimate", self.estimate)] {
            ensure!(
                moves_them || !is_set,
                "{option}: there is no guest in QEMU that farfault would move"
            );
        }
        let builtin = self.guest.iter().find(|guest| guest.kind != GuestKind::Qemu);
        let unshaped = |link: &&LinkPart| link.link == UNSHAPED;
        if let Some(link) = self.link.iter().find(unshaped).filter(|_| self.estimate) {
            bail!("estimate: nothing is known beforehand of a link such as {}", link.name);
        }
        let is_special =
            |link: &&LinkPart| link.queue != bdp() || !link.cut.is_empty() || unshaped(link);
        let special = self.link.iter().find(is_special);
        if let (Some(guest), Some(link)) = (builtin, special) {
            bail!(
                "guest {} is a built-in one, whose link is emulated, has a queue of one bdp and is \
                 never cut; link {} is another kind",
                guest.name,
                link.name
            );
        }
        Ok(())
    }

    /// The limit of a migration.
    pub fn limit(&self) -> Result<Duration> {
        parse_duration(&self.limit).context("limit")
    }

    /// The downtime that is allowed.
    pub fn downtime(&self) -> Result<Duration> {
        let downtime = parse_duration(&self.downtime).context("downtime")?;
        let is_whole = downtime.subsec_nanos().is_multiple_of(1_000_000);
        // QEMU counts in them.
        ensure!(is_whole && !downtime.is_zero(), "downtime: whole milliseconds, at least one");
        Ok(downtime)
    }

    /// What farfault is told of it with a method: that of its own, if it has one.
    pub fn downtime_of<'a>(&'a self, method: &'a MethodPart) -> &'a str {
        method.told(DOWNTIME).unwrap_or(&self.downtime)
    }

    /// Decides which packets are lost: the same for each method, others in each repetition.
    pub fn seed_of(&self, repetition: u32) -> u64 {
        self.seed.wrapping_add(u64::from(repetition))
    }

    /// All runs, in the order in which they are to be made: every repetition of the whole matrix is
    /// shuffled for itself, so that neither a slow hour of the machine nor an end before the time
    /// favours a method. QEMU's methods are for guests in QEMU only.
    pub fn runs(&self, only: &[String]) -> Vec<Cell> {
        let mut random = SplitMix64(self.seed);
        let mut all = Vec::new();
        for repetition in 1..=self.repeat {
            let mut cells = Vec::new();
            for guest in &self.guest {
                for link in &self.link {
                    for method in &self.method {
                        if method.qemu.is_some() && guest.kind != GuestKind::Qemu {
                            continue;
                        }
                        let (guest, link, method) = (guest.clone(), link.clone(), method.clone());
                        cells.push(Cell { guest, link, method, repetition });
                    }
                }
            }
            // Fisher and Yates.
            for last in (1..cells.len()).rev() {
                cells.swap(last, (random.next() % (last as u64 + 1)) as usize);
            }
            all.extend(cells);
        }
        all.retain(|cell| is_wanted(&cell.name(), only));
        all
    }
}

/// Whether the cell of this name is among those that are wanted: all, when nothing is said of any.
pub(super) fn is_wanted(name: &str, only: &[String]) -> bool {
    only.is_empty() || only.iter().any(|text| name.contains(text.as_str()))
}

impl GuestPart {
    fn check(&self) -> Result<()> {
        let memory = parse_bytes(&self.memory).context("memory")?;
        if self.kind != GuestKind::Qemu {
            let workload = self.workload().context("work")?;
            ensure!(
                workload.pattern != Pattern::Idle,
                "work: a built-in guest that does nothing has no heartbeat"
            );
            ensure!(self.working_set.is_none(), "working_set is for guests in QEMU");
            ensure!(self.usable.is_none(), "usable is for guests in QEMU");
            ensure!(self.fill == text(), "fill is for guests in QEMU");
            ensure!(self.verify == verify(), "verify is for guests in QEMU");
            return Ok(());
        }
        ensure!(memory.is_multiple_of(1 << 20), "memory: whole MiB");
        let working_set = self.working_set_bytes()?;
        ensure!(working_set >= MIN_WORKING_SET_BYTES, "working_set: at least 64KiB");
        let usable = self.usable_bytes()?.unwrap_or(memory);
        ensure!(usable.is_multiple_of(1 << 20) && usable <= memory, "usable: whole MiB of memory");
        ensure!(
            working_set + (64 << 20) <= usable,
            "working_set: leave the guest's kernel 64 MiB of its memory"
        );
        ensure!(
            self.work != REDIS || working_set / 2 * 3 + (64 << 20) <= usable,
            "working_set: redis takes up to half as much again as its data, and the kernel 64 MiB"
        );
        let works = [
            "idle", "sparse", "counter", "half", "random", "hotcold", "readseq", "readrand",
            STREAM, REDIS,
        ];
        ensure!(
            works.contains(&self.work.as_str()),
            "work {:?}: one of {}",
            self.work,
            works.join(", ")
        );
        ensure!(
            ["text", "random", "zero"].contains(&self.fill.as_str()),
            "fill {:?}: one of text, random, zero",
            self.fill
        );
        Ok(())
    }

    /// All memory, in bytes.
    pub fn memory_bytes(&self) -> Result<u64> {
        Ok(parse_bytes(&self.memory)?)
    }

    /// What the guest's kernel may use of it, in bytes, when that is not all.
    pub fn usable_bytes(&self) -> Result<Option<u64>> {
        let text = self.usable.as_ref();
        text.map(|text| parse_bytes(text).context("usable")).transpose()
    }

    /// Whether a guest in QEMU streams to a client outside.
    pub fn streams(&self) -> bool {
        self.work == STREAM
    }

    /// What a guest in QEMU needs for its work.
    pub fn programs(&self) -> Programs {
        if self.work == REDIS { Programs::Redis } else { Programs::TestGuest }
    }

    /// What the test guest fills, in bytes.
    pub fn working_set_bytes(&self) -> Result<u64> {
        let text = self.working_set.as_ref().context("a guest in QEMU needs a working_set")?;
        parse_bytes(text).context("working_set")
    }

    /// What a built-in guest does.
    pub fn workload(&self) -> Result<Workload> {
        let text = match self.rate {
            0 => self.work.clone(),
            rate => format!("{}:{rate}/s", self.work),
        };
        Ok(text.parse()?)
    }
}

impl LinkPart {
    fn check(&self) -> Result<()> {
        let is_unshaped = self.spec()?.is_none();
        self.queue_limit()?;
        ensure!(self.queue == bdp() || !is_unshaped, "queue: only an emulated link has one");
        ensure!(self.cuts()?.is_empty() || !is_unshaped, "cut: only an emulated link can be cut");
        ensure!(self.mtu.is_none() || is_unshaped, "mtu: an emulated link has one of 1500");
        ensure!(self.mtu.is_none_or(|mtu| MTUS.contains(&mtu)), "mtu: from 1280 to 65000");
        Ok(())
    }

    /// Rate, round trip and loss; `None` for one that nothing shapes.
    pub fn spec(&self) -> Result<Option<LinkSpec>> {
        if self.link == UNSHAPED { Ok(None) } else { Ok(Some(self.link.parse()?)) }
    }

    /// What may wait, in the scenario's words, where the laboratory's emulator decides that.
    pub fn queue_if_emulated(&self) -> Option<&str> {
        (self.link != UNSHAPED).then_some(&self.queue)
    }

    /// The largest packet.
    pub fn mtu_bytes(&self) -> u16 {
        self.mtu.unwrap_or(USUAL_MTU_BYTES)
    }

    /// What may wait.
    pub fn queue_limit(&self) -> Result<QueueLimit> {
        self.queue.parse().context("queue")
    }

    /// Begin and length of each cut, in order.
    pub fn cuts(&self) -> Result<Vec<(Duration, Duration)>> {
        let read = |cut: &CutPart| Ok((parse_duration(&cut.at)?, parse_duration(&cut.lasts)?));
        let cuts: Vec<(Duration, Duration)> =
            self.cut.iter().map(read).collect::<Result<_>>().context("cut")?;
        let in_order = cuts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0);
        ensure!(in_order, "cut: in order, and one after the other");
        Ok(cuts)
    }
}

impl MethodPart {
    fn check(&self) -> Result<()> {
        match (&self.send, &self.qemu) {
            (Some(_), None) => {
                let plain = self.parameters.is_empty() && self.arguments.is_empty() && !self.tls;
                ensure!(plain, "parameters, arguments and tls are for QEMU's methods");
            }
            (None, Some(_)) => drop(self.native()?),
            _ => {
                bail!("either send = [options of farfault send], or qemu = \"a method of QEMU's\"")
            }
        }
        self.downtime()?;
        Ok(())
    }

    /// The downtime that farfault is told with this method alone.
    pub fn downtime(&self) -> Result<Option<Duration>> {
        let text = self.told(DOWNTIME);
        text.map(|text| parse_duration(text).context(DOWNTIME)).transpose()
    }

    /// What farfault is told with an option: `--option value` or `--option=value`.
    fn told(&self, option: &str) -> Option<&str> {
        let mut words = self.send.iter().flatten();
        while let Some(word) = words.next() {
            if word == option {
                return Some(words.next().map_or("", String::as_str));
            }
            if let Some(value) = word.strip_prefix(option).and_then(|rest| rest.strip_prefix('=')) {
                return Some(value);
            }
        }
        None
    }

    /// QEMU's method, if it is one.
    pub fn native(&self) -> Result<Option<native::Method>> {
        let parse = |name: &String| name.parse().map_err(|why: String| anyhow::anyhow!(why));
        self.qemu.as_ref().map(parse).transpose()
    }
}

#[cfg(test)]
mod tests;
