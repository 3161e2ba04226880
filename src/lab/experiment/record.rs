//! What is kept of a run: one JSON line with all that is needed to judge and to repeat it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::scenario::{Cell, GuestKind, GuestPart, LinkPart, MethodPart, Scenario};
use crate::lab::stage::film::MemoryFilm;
use crate::lab::stage::place::Image;
use crate::lab::stage::stream::StreamSeen;
use crate::lab::stage::timeline::{SlowTouches, Throughput};

/// A run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Two runs with the same key are repetitions of each other's conditions.
    pub key: String,
    /// Counted from 1.
    pub repetition: u32,
    /// What was moved.
    pub guest: GuestPart,
    /// Over what.
    pub link: LinkPart,
    /// How.
    pub method: MethodPart,
    /// Downtime that was allowed.
    pub downtime: String,
    /// Limit of the migration.
    pub limit: String,
    /// Whether the destination had memory that was touched before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ready_memory: bool,
    /// Decided which packets were lost.
    pub seed: u64,
    /// Where it was run.
    pub machine: Machine,
    /// When, in seconds since 1970.
    pub unix_s: u64,
    /// How long all of it took, with booting the guest and verifying its memory.
    pub wall_s: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What was seen of it, if it came to an end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// What farfault tells of itself: both sides' reports.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub reports: BTreeMap<String, Value>,
}

impl Record {
    /// `GUEST/LINK/METHOD`
    pub fn name(&self) -> String {
        format!("{}/{}/{}", self.guest.name, self.link.name, self.method.name)
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest has moved.
    Moved,
    /// Not within the limit.
    NotConverged,
    /// An error; the run is made again when the experiment is resumed.
    Failed,
}

impl Outcome {
    /// For a person, and in the CSV file.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Moved => "moved",
            Outcome::NotConverged => "not-converged",
            Outcome::Failed => "failed",
        }
    }
}

/// What was measured, from outside and alike for every method. `None`: cannot be seen of this guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// From the order to move until all processes that move it were done.
    pub total_ms: f64,
    /// From the last heartbeat on the source to the first on the destination.
    pub downtime_ms: f64,
    /// Until the guest did 90 % of its work before.
    pub recovered_after_ms: Option<f64>,
    /// Longest time without a heartbeat on the destination.
    pub longest_stall_after_ms: f64,
    /// How many times 40 ms went by whole without a heartbeat.
    #[serde(alias = "missed_frames")]
    pub silences_of_40_ms: u64,
    /// What the client of a guest that streams has seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<StreamSeen>,
    /// Touches of pages on the destination that took long, as the guest timed them.
    #[serde(default)]
    pub slow_touches: Option<SlowTouches>,
    /// IP packets towards the destination, as the link counted them.
    pub there_bytes: u64,
    /// And back.
    pub back_bytes: u64,
    /// Processor time of QEMU and farfault at the source, with the guest's own.
    pub source_cpu_s: Option<f64>,
    /// The same at the destination.
    pub destination_cpu_s: Option<f64>,
    /// Most private memory of farfault at the source, and what that of QEMU grew by.
    pub source_extra_bytes: Option<u64>,
    /// Most private memory of farfault at the destination.
    pub destination_extra_bytes: Option<u64>,
    /// Most resident memory of QEMU at the destination, with the guest's.
    pub destination_qemu_bytes: Option<u64>,
    /// Pages that are not what the guest wrote last, and frames that it has not sent so.
    pub corrupt_pages: u64,
    /// What the guest did over time.
    pub throughput: Throughput,
    /// The memory at farfault's destination over time, of a guest in QEMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryFilm>,
}

/// The machine that a run was made on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Version of farfault.
    pub farfault: String,
    /// Hash of the program, which tells two builds apart whatever their version.
    #[serde(default)]
    pub build: String,
    /// What the source tree that the program lies in was at, as `git describe` has it, if it lies in one;
    /// it ends in `-dirty` when files were changed.
    #[serde(default)]
    pub commit: Option<String>,
    /// Hash of the test guest's kernel and initramfs, if a guest in QEMU was moved.
    #[serde(default)]
    pub guest_image: Option<String>,
    /// Version of QEMU, if it is there.
    pub qemu: Option<String>,
    /// Version of the kernel.
    pub kernel: String,
    /// Model of the processor.
    pub cpu: String,
    /// Processors.
    pub cpus: usize,
    /// Memory.
    pub memory_bytes: u64,
    /// Of TCP, which QEMU's methods use.
    pub congestion_control: String,
}

impl Machine {
    /// This one, where `program` moves the guests in QEMU that are made of `image`.
    pub fn here(program: &Path, image: Option<&Image>) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let after = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map_or("", |(_, value)| value).trim().to_owned()
        };
        let memory = after(&read("/proc/meminfo"), "MemTotal");
        let memory_kib = memory.trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        Machine {
            farfault: env!("CARGO_PKG_VERSION").to_owned(),
            build: hash_of(&[program]),
            commit: commit_of(program),
            guest_image: image.map(|image| hash_of(&[&image.kernel, &image.initrd])),
            qemu: qemu_version(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: after(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory_kib << 10,
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control").trim().to_owned(),
        }
    }
}

/// Of all bytes of some files, one after the other; empty when one cannot be read.
fn hash_of(files: &[&Path]) -> String {
    let mut hash = Xxh3::new();
    for file in files {
        let Ok(bytes) = std::fs::read(file) else { return String::new() };
        hash.update(&bytes);
    }
    format!("{:016x}", hash.digest())
}

fn commit_of(program: &Path) -> Option<String> {
    let mut git = Command::new("git");
    git.arg("-C").arg(program.parent()?).args(["describe", "--always", "--dirty", "--abbrev=10"]);
    let output = git.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn qemu_version() -> Option<String> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split("version ").nth(1)?.split_whitespace().next().map(str::to_owned)
}

/// Names the conditions of a cell: everything in the scenario that changes what is measured. A cell
/// whose conditions were edited has another key, so it is run again.
pub(super) fn key(scenario: &Scenario, cell: &Cell) -> String {
    let conditions = (&cell.guest, &cell.link, &cell.method, &scenario.downtime, &scenario.limit);
    let mut text = serde_json::to_vec(&conditions).unwrap_or_default();
    let in_qemu = cell.guest.kind == GuestKind::Qemu;
    // Each only where it is asked for: other runs keep the keys that they had before there was such a thing.
    for (is_set, word) in [
        (scenario.trace, &b"traced"[..]),
        (scenario.ready_memory && in_qemu, b"ready memory"),
        (scenario.estimate && in_qemu && cell.method.send.is_some(), b"estimated"),
    ] {
        if is_set {
            text.extend(word);
        }
    }
    format!("{}#{:016x}", cell.name(), xxh3_64(&text))
}

#[cfg(test)]
mod tests {
    use super::super::testing::scenario;
    use super::*;

    #[test]
    fn a_run_is_another_one_when_a_condition_that_matters_for_it_is_set() {
        let plain = scenario();
        let cells = plain.runs(&["lan".to_owned()]);
        let cell = |method: &str| cells.iter().find(|cell| cell.method.name == method).unwrap();
        let (ours, theirs) = (cell("farfault"), cell("xbzrle"));
        let estimated = Scenario { estimate: true, ..plain.clone() };
        let ready = Scenario { ready_memory: true, ..plain.clone() };
        let keys = [&plain, &estimated, &ready].map(|scenario| key(scenario, ours));
        assert!(keys[0] != keys[1] && keys[0] != keys[2] && keys[1] != keys[2], "{keys:?}");
        assert_eq!(key(&plain, theirs), key(&estimated, theirs));
        assert_ne!(key(&plain, theirs), key(&ready, theirs));
        // What was found before there were such conditions is found for ever.
        let conditions = (&ours.guest, &ours.link, &ours.method, "300ms", "120s");
        let hash = xxh3_64(&serde_json::to_vec(&conditions).unwrap());
        assert_eq!(keys[0], format!("db/lan/farfault#{hash:016x}"));
    }

    #[test]
    fn this_machine_can_be_told_from_others() {
        let program = std::env::current_exe().unwrap();
        let machine = Machine::here(&program, None);
        assert!(!machine.kernel.is_empty() && !machine.cpu.is_empty(), "{machine:?}");
        assert!(machine.build.len() == 16 && machine.guest_image.is_none(), "{machine:?}");
        assert!(machine.cpus > 0 && machine.memory_bytes > 64 << 20, "{machine:?}");
    }
}
