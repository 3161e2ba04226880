//! One run on a guest in QEMU: two hosts and a link are made, the guest boots, works, is moved, works
//! on, and verifies its memory; then all of it is removed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::record::{Measured, Outcome};
use super::scenario::{Cell, Scenario};
use crate::lab::stage::ballast::Ballast;
use crate::lab::stage::film::Camera;
use crate::lab::stage::place::{Place, Tools, Turn};
use crate::lab::stage::process::{pause, wait_for};
use crate::lab::stage::qemu::{Devices, Guest, GuestSpec, Machine, Ram};
use crate::lab::stage::stream::StreamClient;
use crate::lab::stage::timeline::{Interruption, SlowTouches, Throughput, silences};
use crate::lab::stage::watch::{Usage, Watch, Who};
use crate::lab::stage::{farfault, native};
use crate::page::PAGE_SIZE_BYTES;

/// A guest under emulation that fills gigabytes.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// The guest works undisturbed for so long before it is moved, to know what it does then.
const BEFORE: Duration = Duration::from_secs(3);
/// And so long after, to see it recover.
const AFTER: Duration = Duration::from_secs(2);
const ESTIMATE_LIMIT: Duration = Duration::from_secs(60);
const VERIFY_LIMIT: Duration = Duration::from_secs(240);
/// Of the throughput over time.
const BIN: Duration = Duration::from_millis(100);
/// How much of it is kept around the stop.
const KEPT_BEFORE: Duration = Duration::from_secs(120);
const KEPT_AFTER: Duration = Duration::from_secs(120);

/// What has come of a run.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) outcome: Outcome,
    pub(super) measured: Option<Measured>,
    pub(super) reports: BTreeMap<String, Value>,
}

impl Seen {
    pub(super) fn not_converged() -> Self {
        Seen { outcome: Outcome::NotConverged, measured: None, reports: BTreeMap::new() }
    }
}

/// Carries out a run. Traces of farfault's migrations go to `traces`, if the scenario wants them.
pub(super) fn run(
    scenario: &Scenario,
    cell: &Cell,
    seed: u64,
    tools: &Tools,
    traces: &Path,
) -> Result<Seen> {
    let (link, queue) = (cell.link.spec()?, cell.link.queue_limit()?);
    let mut place = Place::open(link, queue, seed, tools.clone(), Turn::Alone)?;
    if let Some(mtu) = cell.link.mtu {
        place.wan.set_mtu(mtu)?;
    }
    let spec = guest_spec(cell)?;
    let client = match cell.guest.streams() {
        true => Some(StreamClient::listen(
            &place,
            cell.guest.working_set_bytes()? / PAGE_SIZE_BYTES as u64,
        )?),
        false => None,
    };
    let mut source = Guest::prepare(&place, "source", &spec)?;
    source.start(place.a().name(), &[])?;
    wait_for("the guest to boot and to begin its work", BOOT_LIMIT, || {
        source.must_run()?;
        source.log.fail_on_complaints()?;
        Ok(source.log.last_beat())
    })
    .with_context(|| source.errors())?;
    let estimate = estimate(scenario, cell, &place, &source)?;
    pause(BEFORE)?;
    let mut destination = Guest::prepare(&place, "destination", &spec)?;
    let ballast = match scenario.ready_memory {
        true => Some(Ballast::take(cell.guest.memory_bytes()?)?),
        false => None,
    };
    place.wan.command("reset")?;

    let traces = if scenario.trace { Some(Traces::prepare(traces, cell)?) } else { None };
    let giving_back = ballast.map(Ballast::give_back).transpose()?;
    let moved = migrate(scenario, cell, &mut place, &source, &mut destination, traces.as_ref())?;
    drop(giving_back);
    let [there_bytes, back_bytes] = place.wan.carried_bytes_each_way()?;
    let Some(Moved { started, took, mut reports, usage, camera }) = moved else {
        return Ok(Seen::not_converged());
    };
    reports.extend(estimate.map(|told| ("estimate".to_owned(), told)));
    let film = camera.zip(source.log.last_beat()).map(|(camera, last)| camera.end(last.at));
    pause(AFTER)?;
    let (beats, after) = (source.log.beats(), destination.log.beats());
    let seen = Interruption::measure(&beats, &after, started)?;
    let stream = client.zip(beats.last()).map(|(client, last)| client.seen(started, last.at));
    let slow = destination.log.slow_touches();
    let slow_touches = (!slow.is_empty()).then(|| SlowTouches::of(slow));
    // From here on as fast as it can: the measurement is over.
    destination.ear.say(b'v')?;
    let verified = destination.log.wait_until_verified_anew(VERIFY_LIMIT);
    let corrupt_pages = destination.log.last_beat().map_or(0, |beat| beat.errors);
    if corrupt_pages == 0 {
        verified.with_context(|| destination.diagnosis())?;
    }
    let corrupt_frames = stream.as_ref().map_or(0, |seen| seen.corrupt);
    let measured = Measured {
        total_ms: ms(took),
        downtime_ms: ms(seen.downtime),
        recovered_after_ms: seen.recovered_after.map(ms),
        longest_stall_after_ms: ms(seen.longest_stall_after),
        silences_of_40_ms: silences(&beats, &after, started),
        stream,
        slow_touches,
        there_bytes,
        back_bytes,
        source_cpu_s: Some(usage.source_cpu_s()),
        destination_cpu_s: Some(usage.destination_cpu_s()),
        source_extra_bytes: Some(usage.source_extra_bytes()),
        destination_extra_bytes: Some(usage.receive.peak_anonymous_bytes),
        destination_qemu_bytes: Some(usage.destination.peak_resident_bytes),
        corrupt_pages: corrupt_pages + corrupt_frames,
        throughput: Throughput::of(&beats, &after, BIN, KEPT_BEFORE, KEPT_AFTER),
        memory: film,
    };
    Ok(Seen { outcome: Outcome::Moved, measured: Some(measured), reports })
}

pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Memory of a large guest below the addresses of its devices (machine `pc`), and what those take.
const LOW_MEMORY_BYTES: u64 = 3 << 30;
const DEVICES_BYTES: u64 = 1 << 30;

fn guest_spec(cell: &Cell) -> Result<GuestSpec> {
    let guest = &cell.guest;
    let mut work = format!(
        "ff.ws={}K ff.pattern={} ff.rate={} ff.fill={} ff.verify={}",
        guest.working_set_bytes()? >> 10,
        guest.work,
        guest.rate,
        guest.fill,
        guest.verify
    );
    if let Some(usable_bytes) = guest.usable_bytes()? {
        // The kernel counts up to an address, and what does not fit below the devices is behind them.
        let hole = if usable_bytes > LOW_MEMORY_BYTES { DEVICES_BYTES } else { 0 };
        work = format!("mem={}M {work}", (usable_bytes + hole) >> 20);
    }
    let mut spec = GuestSpec::new(Machine::Pc, guest.memory_bytes()? >> 20, &work);
    spec.programs = guest.programs();
    if guest.streams() {
        spec.devices = Devices::Network;
    }
    spec.further = cell.method.arguments.clone();
    if cell.method.qemu.is_some() {
        // Its default. Sharing is what farfault needs.
        spec.ram = Ram::Private;
    }
    Ok(spec)
}

/// What `farfault estimate` expects, where it is asked.
fn estimate(
    scenario: &Scenario,
    cell: &Cell,
    place: &Place,
    source: &Guest,
) -> Result<Option<Value>> {
    if !scenario.estimate || cell.method.send.is_none() {
        return Ok(None);
    }
    let qmp = source.qmp_path().display().to_string();
    let arguments = ["estimate", "--json", "--qmp", &qmp, "--link", &cell.link.link];
    let arguments = [&arguments[..], &["--downtime", scenario.downtime_of(&cell.method)]].concat();
    let running =
        farfault::Running::here(&place.tools().farfault, &arguments, &place.temporary_directory())?;
    let ended = running.wait(ESTIMATE_LIMIT)?;
    let told = ended.events.iter().find(|event| event["event"] == "estimate");
    match told {
        Some(told) => Ok(Some(told.clone())),
        None => bail!("farfault estimate: {}", ended.failure()?),
    }
}

/// A migration that has come to its end.
struct Moved {
    started: Instant,
    took: Duration,
    reports: BTreeMap<String, Value>,
    usage: Usages,
    /// Of farfault's destination.
    camera: Option<Camera>,
}

/// What each process used. Zero of those that a method does not have.
struct Usages {
    source: Usage,
    destination: Usage,
    send: Usage,
    receive: Usage,
}

impl Usages {
    fn of(seen: &[Usage]) -> Self {
        let of = |index: usize| seen.get(index).copied().unwrap_or_default();
        Usages { source: of(0), destination: of(1), send: of(2), receive: of(3) }
    }

    /// QEMU's from the start of the migration on, since it was there before; farfault's from its own.
    fn source_cpu_s(&self) -> f64 {
        self.source.cpu_s - self.source.cpu_before_s + self.send.cpu_s
    }

    fn destination_cpu_s(&self) -> f64 {
        self.destination.cpu_s - self.destination.cpu_before_s + self.receive.cpu_s
    }

    fn source_extra_bytes(&self) -> u64 {
        let Usage { peak_anonymous_bytes, first_anonymous_bytes, .. } = self.source;
        self.send.peak_anonymous_bytes + (peak_anonymous_bytes - first_anonymous_bytes)
    }
}

fn migrate(
    scenario: &Scenario,
    cell: &Cell,
    place: &mut Place,
    source: &Guest,
    destination: &mut Guest,
    traces: Option<&Traces>,
) -> Result<Option<Moved>> {
    let limit = scenario.limit()?;
    let qemu = [source.pid_file(), destination.pid_file()].map(|path| Who::File(path.to_owned()));
    let mut cuts = Cuts::new(cell.link.cuts()?);
    if let Some(method) = cell.method.native()? {
        let further = native::Further {
            parameters: cell.method.parameters.clone(),
            encrypted: cell.method.tls,
        };
        let downtime = scenario.downtime()?;
        let migration =
            native::Migration::begin(place, source, destination, method, downtime, &further)?;
        let watch = Watch::start(qemu.to_vec());
        let done = migration.finish(limit, |elapsed| cuts.tick(elapsed, place));
        let Some(done) = done.with_context(|| destination.errors())? else { return Ok(None) };
        let usage = Usages::of(&watch.end());
        let reports = [("source".to_owned(), done.report)].into();
        let native::Done { started, took, .. } = done;
        return Ok(Some(Moved { started, took, reports, usage, camera: None }));
    }
    let mut options: Vec<&str> = cell.method.send.iter().flatten().map(String::as_str).collect();
    if cell.method.downtime()?.is_none() {
        options.extend(["--downtime", &scenario.downtime]);
    }
    let mut receive_options: Vec<&str> = Vec::new();
    if let Some(Traces { source, destination }) = traces {
        options.extend(["--trace", source]);
        receive_options.extend(["--trace", destination]);
    }
    let migration =
        farfault::Migration::begin(place, source, destination, &receive_options, &options)?;
    let pids = [migration.send.pid(), migration.receive.pid()].map(Who::Pid);
    let watch = Watch::start([qemu, pids].concat());
    let camera = Some(Camera::start(place.state_directory()));
    let moved = migration.finish(limit, |elapsed| cuts.tick(elapsed, place))?;
    let Some(moved) = moved else { return Ok(None) };
    let usage = Usages::of(&watch.end());
    let reports = [("source", moved.source), ("destination", moved.destination)];
    let reports = reports.map(|(side, report)| (side.to_owned(), report)).into();
    Ok(Some(Moved { started: moved.started, took: moved.took, reports, usage, camera }))
}

/// Where each side writes its trace.
struct Traces {
    source: String,
    destination: String,
}

impl Traces {
    fn prepare(directory: &Path, cell: &Cell) -> Result<Self> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("create {}", directory.display()))?;
        // Both sides are started elsewhere.
        let directory = directory.canonicalize()?;
        let (name, repetition) = (cell.name().replace('/', "."), cell.repetition);
        let file = |side: &str| {
            directory.join(format!("{name}.{repetition}.{side}.jsonl")).display().to_string()
        };
        Ok(Traces { source: file("source"), destination: file("destination") })
    }
}

/// What is still to happen to the link: moments since the start, in order.
struct Cuts(std::collections::VecDeque<(Duration, &'static str)>);

impl Cuts {
    fn new(cuts: Vec<(Duration, Duration)>) -> Self {
        let events = |(at, lasts)| [(at, "cut"), (at + lasts, "restore")];
        Cuts(cuts.into_iter().flat_map(events).collect())
    }

    fn tick(&mut self, elapsed: Duration, place: &mut Place) -> Result<()> {
        while self.0.front().is_some_and(|(at, _)| *at <= elapsed) {
            if let Some((_, command)) = self.0.pop_front() {
                place.wan.command(command)?;
            }
        }
        Ok(())
    }
}
