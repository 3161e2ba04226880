//! Samples of the memory of real guests, for `cargo bench --bench codec`.
//!
//! Guests of 512 MiB are booted in QEMU one after the other and work: a redis server under load; SQLite
//! with transactions; Python that compiles its own library; and one that has read many files and is idle. Each
//! is stopped three times for as long as it takes to copy its memory: now, 2 s later, and 10 s later. From the
//! copies come
//!
//! * `NAME.full`: pages that are not zero, each content once;
//! * `NAME.old` and `NAME.new`: pages that changed, as they were and as they became, half of them after 2 s
//!   and half after 10 s. Pages that became zero are left out: they need no codec.
//! * `NAME.guest`: all pages that are not zero, each content once, in their order: 100 to 250 MiB.
//!
//! The others have at most 16 MiB each: blocks of 64 pages that follow each other in memory, spread evenly over
//! all that there are, since that is what a frame of pages is coded from.
//!
//! As root, in the source tree, after `tools/build-guest-with redis` and `tools/build-guest-with python`:
//! `cargo run --release -p farfault-corpus`. It takes some minutes.

mod sample;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use farfault::lab::stage::place::{Image, Place, Tools, Turn};
use farfault::lab::stage::process::{pause, wait_for};
use farfault::lab::stage::qemu::{Guest, GuestSpec, Machine, Programs};
use farfault::page::PAGE_SIZE_BYTES;
use sample::{changed, distinct};
use serde_json::json;

const MEMORY_MIB: u64 = 512;
/// Bytes of a file, in pages.
const MAX_PAGES: usize = 4096;
/// Under emulation, on a machine that does other things too.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// The guest works for so long before it is looked at.
const SETTLE: Duration = Duration::from_secs(10);
const FIRST_CHANGE_AFTER: Duration = Duration::from_secs(2);
const SECOND_CHANGE_AFTER: Duration = Duration::from_secs(8);

/// Takes samples of the memory of real guests.
#[derive(Parser)]
struct Arguments {
    /// Where to put them.
    #[arg(long, value_name = "DIRECTORY", default_value = "target/corpus")]
    out: PathBuf,
    /// Only these: redis, sqlite, compile, idle.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Where tools/build-guest-with has put the images.
    #[arg(long, value_name = "DIRECTORY", default_value = "target/guest")]
    image: PathBuf,
}

struct Job {
    name: &'static str,
    programs: Programs,
    work: &'static str,
    /// Begins the line with which the guest says that it is in full work.
    ready: &'static str,
}

const fn python(name: &'static str, work: &'static str) -> Job {
    Job { name, programs: Programs::Python, work, ready: "job ready" }
}

const JOBS: [Job; 4] = [
    Job {
        name: "redis",
        programs: Programs::Redis,
        work: "ff.ws=128M ff.pattern=redis ff.rate=500 ff.verify=100",
        ready: "ready",
    },
    python("sqlite", "ff.ws=64K ff.hb=1000 ff.verify=16 ff.job=sqlite"),
    python("compile", "ff.ws=64K ff.hb=1000 ff.verify=16 ff.job=compile"),
    python("idle", "ff.ws=64K ff.hb=1000 ff.verify=16 ff.job=idle"),
];

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let image = Image::in_directory(&arguments.image)?;
    let wanted = |job: &&Job| {
        arguments.only.is_empty() || arguments.only.iter().any(|name| name == job.name)
    };
    let jobs: Vec<&Job> = JOBS.iter().filter(wanted).collect();
    for job in &jobs {
        image.initrd_with(job.programs)?;
    }
    // No guest is moved, so neither program is ever started but for the link.
    let programs = std::env::current_exe()?;
    let tools = Tools {
        farfault: programs.with_file_name("farfault"),
        wan: programs.with_file_name("wan"),
        image,
    };
    fs::create_dir_all(&arguments.out)?;
    for job in jobs {
        take(job, &tools, &arguments.out).with_context(|| format!("guest {}", job.name))?;
    }
    Ok(())
}

fn take(job: &Job, tools: &Tools, out: &Path) -> Result<()> {
    // Nothing crosses it.
    let link = Some("1Gbit,1ms".parse()?);
    let place = Place::open(link, "bdp".parse()?, 1, tools.clone(), Turn::Alone)?;
    let mut spec = GuestSpec::new(Machine::Pc, MEMORY_MIB, job.work);
    spec.programs = job.programs;
    let mut guest = Guest::prepare(&place, job.name, &spec)?;
    guest.start(place.a().name(), &[])?;
    wait_for("the guest to be in full work", BOOT_LIMIT, || Ok(guest.log.last_line(job.ready)))
        .with_context(|| guest.diagnosis())?;
    pause(SETTLE)?;
    let first = snapshot(&guest)?;
    pause(FIRST_CHANGE_AFTER)?;
    let second = snapshot(&guest)?;
    pause(SECOND_CHANGE_AFTER)?;
    let third = snapshot(&guest)?;

    let full = distinct(&first);
    let changes = [changed(&first, &second), changed(&first, &third)];
    println!(
        "{}: {:.1} % of {MEMORY_MIB} MiB are distinct pages; {:.2} % changed within {:?}, {:.2} % within {:?}",
        job.name,
        percent(full.len(), &first),
        percent(changes[0].len(), &first),
        FIRST_CHANGE_AFTER,
        percent(changes[1].len(), &first),
        FIRST_CHANGE_AFTER + SECOND_CHANGE_AFTER,
    );
    let pages = |memory: &[u8], numbers: &[usize]| -> Vec<u8> {
        let page = |&number: &usize| &memory[number * PAGE_SIZE_BYTES..][..PAGE_SIZE_BYTES];
        numbers.iter().flat_map(page).copied().collect()
    };
    let [soon, later] = changes.map(|pages| sample::blocks(&pages, MAX_PAGES / 2));
    let file = |extension: &str| out.join(format!("{}.{extension}", job.name));
    fs::write(file("guest"), pages(&first, &full))?;
    fs::write(file("full"), pages(&first, &sample::blocks(&full, MAX_PAGES)))?;
    fs::write(file("old"), [pages(&first, &soon), pages(&first, &later)].concat())?;
    fs::write(file("new"), [pages(&second, &soon), pages(&third, &later)].concat())?;
    Ok(())
}

fn percent(pages: usize, memory: &[u8]) -> f64 {
    100.0 * pages as f64 / (memory.len() / PAGE_SIZE_BYTES) as f64
}

/// A copy of the guest's memory, between two instructions of the guest.
fn snapshot(guest: &Guest) -> Result<Vec<u8>> {
    let mut monitor = guest.monitor()?;
    monitor.execute("stop", json!({}))?;
    let copy = guest.ram_files().first().context("the guest's memory is no file").and_then(read);
    monitor.execute("cont", json!({}))?;
    copy
}

/// The bytes of a file in memory. Its holes are not populated by that, as they would be through a mapping.
fn read(path: &PathBuf) -> Result<Vec<u8>> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    let mut at = 0;
    while at < bytes.len() {
        match file.read_at(&mut bytes[at..], at as u64) {
            Ok(0) => break,
            Ok(count) => at += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        }
    }
    Ok(bytes)
}
