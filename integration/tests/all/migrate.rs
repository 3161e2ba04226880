//! Whole migrations of real QEMU guests with farfault.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farfault_integration::farfault::{self, Moved, Running};
use farfault_integration::huge_pool::HugePool;
use farfault_integration::lab::Lab;
use farfault_integration::leftovers::{Inventory, nothing_is_left_after};
use farfault_integration::process::wait_for;
use farfault_integration::qemu::{Devices, Guest, GuestSpec, Machine, Ram};
use farfault_integration::ram;
use farfault_integration::timeline::Interruption;
use serde_json::Value;

const LINK: &str = "500Mbit,10ms";
const LIMIT: Duration = Duration::from_secs(90);
const SPARSE: &str = "ff.ws=128M ff.pattern=sparse ff.rate=2000 ff.verify=20000";

/// A guest that was moved, with everything around it still there.
struct After {
    source: Guest,
    destination: Guest,
    moved: Moved,
    lab: Lab,
}

/// Boots a guest, moves it, and checks what must hold for every migration. `None`: skipped.
fn move_guest(
    spec: &GuestSpec,
    receive_options: &[&str],
    send_options: &[&str],
) -> Result<Option<After>> {
    move_guest_over(LINK, spec, receive_options, send_options)
}

fn move_guest_over(
    link: &str,
    spec: &GuestSpec,
    receive_options: &[&str],
    send_options: &[&str],
) -> Result<Option<After>> {
    let Some(lab) = Lab::start(link)? else { return Ok(None) };
    let source = Guest::boot(&lab, "source", spec)?;
    let destination = Guest::prepare(&lab, "destination", spec)?;
    let moved =
        farfault::migrate(&lab, &source, &destination, receive_options, send_options, LIMIT)?;
    for (report, role) in [(&moved.source, "source"), (&moved.destination, "destination")] {
        assert_eq!(report["role"], role, "{report}");
        assert_eq!(report["result"], "migrated", "{report}");
        let pages = spec.memory_mib * 256;
        assert_eq!(report["pages_total"].as_u64(), Some(pages), "{report}");
        for number in ["total_ms", "downtime_ms", "wire_sent_bytes", "wire_received_bytes"] {
            assert!(report[number].is_number(), "{number} in {report}");
        }
    }
    if let Some(at) = send_options.iter().position(|option| *option == "--strategy") {
        assert_eq!(moved.source["strategy"], send_options[at + 1], "{}", moved.source);
        assert_eq!(moved.destination["strategy"], send_options[at + 1], "{}", moved.destination);
    }
    Ok(Some(After { source, destination, moved, lab }))
}

impl After {
    /// The guest runs on the destination only, and its memory is right.
    fn guest_is_unharmed(&self) -> Result<()> {
        let log = &self.destination.log;
        let sweep = log.wait_for_a_sweep(LIMIT);
        sweep.with_context(|| {
            let [source, destination] =
                [&self.source, &self.destination].map(|guest| guest.diagnosis());
            format!("source: {source}\ndestination: {destination}\n{:?}", self.moved)
        })?;
        let (before, after) = (self.source.log.beats(), log.beats());
        let seen = Interruption::measure(&before, &after, self.moved.started)?;
        eprintln!("{seen:?}\n{}\n{}", self.moved.source, self.moved.destination);
        ensure!(self.source.log.complaints().is_empty(), "{:?}", self.source.log.complaints());
        assert_eq!(self.destination.monitor()?.status()?, "running");
        Ok(())
    }

    /// Ends everything; neither farfault nor the laboratory may have left anything.
    fn nothing_is_left(self) -> Result<()> {
        let After { source, destination, lab, .. } = self;
        drop((source, destination));
        nothing_is_left_in(lab)
    }
}

fn nothing_is_left_in(lab: Lab) -> Result<()> {
    assert_eq!(Inventory::of(&lab)?, Inventory::default(), "farfault has left something");
    nothing_is_left_after(lab)
}

/// A running guest moves, and everything is as it should be.
fn moves_unharmed(spec: &GuestSpec, strategy: &str, more: &[&str]) -> Result<()> {
    let send_options = [&["--strategy", strategy], more].concat();
    let Some(after) = move_guest(spec, &[], &send_options)? else { return Ok(()) };
    after.guest_is_unharmed()?;
    assert_eq!(after.source.monitor()?.status()?, "postmigrate");
    after.nothing_is_left()
}

#[test]
fn pc_moves_by_hybrid() -> Result<()> {
    moves_unharmed(&GuestSpec::new(Machine::Pc, 512, SPARSE), "hybrid", &[])
}

#[test]
fn pc_moves_by_precopy() -> Result<()> {
    moves_unharmed(&GuestSpec::new(Machine::Pc, 256, SPARSE), "precopy", &[])
}

#[test]
fn pc_moves_by_postcopy() -> Result<()> {
    moves_unharmed(&GuestSpec::new(Machine::Pc, 256, SPARSE), "postcopy", &[])
}

#[test]
fn microvm_moves_by_postcopy() -> Result<()> {
    let work = "ff.ws=128M ff.pattern=half ff.rate=1000 ff.verify=20000";
    moves_unharmed(&GuestSpec::new(Machine::Microvm, 256, work), "postcopy", &[])
}

#[test]
fn a_guest_that_writes_whole_random_pages_moves_by_hybrid() -> Result<()> {
    let work = "ff.ws=96M ff.pattern=random ff.rate=2000 ff.fill=random ff.verify=20000";
    moves_unharmed(&GuestSpec::new(Machine::Pc, 256, work), "hybrid", &[])
}

#[test]
fn an_idle_guest_moves_by_precopy() -> Result<()> {
    let work = "ff.ws=64M ff.pattern=idle ff.verify=20000";
    moves_unharmed(&GuestSpec::new(Machine::Q35, 256, work), "precopy", &[])
}

#[test]
fn a_guest_of_4_gib_moves_by_hybrid() -> Result<()> {
    moves_unharmed(&GuestSpec::new(Machine::Pc, 4096, SPARSE), "hybrid", &[])
}

#[test]
fn a_guest_moves_by_four_connections() -> Result<()> {
    let send_options = ["--connections", "4"];
    let spec = GuestSpec::new(Machine::Pc, 512, SPARSE);
    let Some(after) = move_guest(&spec, &[], &send_options)? else { return Ok(()) };
    after.guest_is_unharmed()?;
    for report in [&after.moved.source, &after.moved.destination] {
        ensure!(report["connections"] == 4, "{report}");
    }
    after.nothing_is_left()
}

#[test]
fn a_guest_with_two_memory_nodes_moves_by_hybrid() -> Result<()> {
    let mut spec = GuestSpec::new(Machine::Pc, 512, "ff.ws=320M ff.pattern=sparse ff.rate=2000");
    spec.ram = Ram::SharedTwoNodes;
    moves_unharmed(&spec, "hybrid", &[])
}

/// Pings, blocks and random bytes so far; fails on an error of a device.
fn device_counters(guest: &Guest) -> Result<[u64; 3]> {
    let line = guest.log.last_line("io net").context("no word of devices")?.text;
    let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [_sent, answered, blocks, random, errors] = numbers[..] else {
        anyhow::bail!("{line:?}");
    };
    ensure!(errors == 0, "devices have failed: {line}");
    Ok([answered, blocks, random])
}

/// With a disk past the host's page cache, as the guide wants it. Returns the source's report.
fn devices_go_on(
    machine: Machine,
    work: &str,
    strategy: &str,
    link: &str,
) -> Result<Option<Value>> {
    let work = format!("ff.ws=64M ff.verify=20000 {work}");
    let mut spec = GuestSpec::new(machine, 256, &work);
    spec.devices = Devices::All;
    spec.direct_disk = true;
    let options = ["--strategy", strategy];
    let Some(after) = move_guest_over(link, &spec, &[], &options)? else { return Ok(None) };
    after.guest_is_unharmed()?;
    let on_source = device_counters(&after.source)?;
    wait_for("all devices to go on working", Duration::from_secs(20), || {
        let now = device_counters(&after.destination)?;
        let go_on = now.iter().zip(&on_source).all(|(now, then)| *now > then + 20);
        Ok(go_on.then_some(()))
    })?;
    let report = after.moved.source.clone();
    after.nothing_is_left()?;
    // Its writes are collected only while it stands still.
    let stood_still = report["phases_ms"]["precopy.standstill"].as_f64();
    eprintln!("{} rounds, {stood_still:?} ms still in them", report["precopy_rounds"]);
    ensure!(stood_still.is_some() == (strategy != "postcopy"), "{report}");
    Ok(Some(report))
}

/// Its device state is 0.7 MB, which a rehearsal carries over before the switchover; on a slow link only.
#[test]
fn virtio_devices_in_use_go_on_after_a_hybrid_move_of_q35() -> Result<()> {
    if let Some(report) =
        devices_go_on(Machine::Q35, "ff.pattern=hotcold ff.rate=4000", "hybrid", "100Mbit,10ms")?
    {
        assert!(report["rehearsal_ms"].is_number(), "{report}");
        let crossed = report["device_state_bytes"].as_u64().context("device_state_bytes")?;
        assert!(crossed <= 32 << 10, "{report}");
    }
    Ok(())
}

#[test]
fn virtio_devices_in_use_go_on_after_a_postcopy_move_of_pc() -> Result<()> {
    devices_go_on(Machine::Pc, "ff.pattern=sparse", "postcopy", LINK).map(drop)
}

#[test]
fn virtio_devices_in_use_go_on_after_a_hybrid_move_of_microvm() -> Result<()> {
    devices_go_on(Machine::Microvm, "ff.pattern=counter ff.rate=4000", "hybrid", LINK).map(drop)
}

/// Without running the guest on the destination, both memories are the same, byte by byte.
fn memories_are_equal(machine: Machine, strategy: &str) -> Result<()> {
    let spec = GuestSpec::new(machine, 256, SPARSE);
    let options = ["--strategy", strategy];
    let Some(after) = move_guest(&spec, &["--paused"], &options)? else { return Ok(()) };
    let status = after.destination.monitor()?.status()?;
    assert!(["paused", "prelaunch"].contains(&status.as_str()), "{status}");
    assert_eq!(after.destination.log.last_beat(), None, "the guest ran on the destination");
    for (left, right) in after.source.ram_files().iter().zip(after.destination.ram_files()) {
        assert_eq!(ram::compare(left, right)?, ram::Difference::default());
    }
    after.nothing_is_left()
}

#[test]
fn after_a_paused_hybrid_move_the_memory_files_are_equal() -> Result<()> {
    memories_are_equal(Machine::Pc, "hybrid")
}

#[test]
fn after_a_paused_precopy_move_the_memory_files_are_equal() -> Result<()> {
    memories_are_equal(Machine::Q35, "precopy")
}

#[test]
fn after_a_paused_postcopy_move_the_memory_files_are_equal() -> Result<()> {
    memories_are_equal(Machine::Microvm, "postcopy")
}

#[test]
fn after_a_strict_handover_with_quit_source_the_source_qemu_has_ended() -> Result<()> {
    let spec = GuestSpec::new(Machine::Microvm, 256, SPARSE);
    let options = ["--handover", "strict", "--quit-source"];
    let Some(mut after) = move_guest(&spec, &[], &options)? else { return Ok(()) };
    after.guest_is_unharmed()?;
    let process = after.source.process().context("the source's process")?;
    assert!(process.wait(Duration::from_secs(10))?.success());
    after.nothing_is_left()
}

#[test]
fn a_qemu_that_waits_already_is_attached_to() -> Result<()> {
    let Some(lab) = Lab::start(LINK)? else { return Ok(()) };
    let spec = GuestSpec::new(Machine::Pc, 256, SPARSE);
    let source = Guest::boot(&lab, "source", &spec)?;
    let mut destination = Guest::prepare(&lab, "destination", &spec)?;
    destination.start(lab.b().name(), &["-incoming", "defer", "-S"])?;
    let mut receive = Running::receive_attached(&lab, &destination)?;
    let ticket = receive.ticket()?;
    let send = Running::send(&lab, &source, &ticket, &[])?;
    send.wait(LIMIT)?.report().context("send")?;
    receive.wait(LIMIT)?.report().context("receive")?;
    destination.log.wait_for_a_sweep(LIMIT)?;
    drop((source, destination));
    nothing_is_left_in(lab)
}

#[test]
fn a_guest_on_hugetlbfs_moves_to_shared_memory_and_there_into_huge_pages() -> Result<()> {
    let Some(lab) = Lab::start(LINK)? else { return Ok(()) };
    let Some(pool) = HugePool::of_mib(256)? else { return Ok(()) };
    let mut spec = GuestSpec::new(Machine::Pc, 256, SPARSE);
    spec.fits_huge_pages = true;
    let destination = Guest::prepare(&lab, "destination", &spec)?;
    spec.ram_directory = pool.path().to_owned();
    let source = Guest::boot(&lab, "source", &spec)?;
    let moved = farfault::migrate(&lab, &source, &destination, &["--huge-pages"], &[], LIMIT)?;
    assert_eq!(moved.source["tracker"], "write-protect", "{}", moved.source);
    // In 2 MiB around each page that was written to most were not.
    let rounds = moved.source["precopy_rounds"].as_u64().context("rounds")?;
    let by_codec = moved.source["pages_by_codec"].as_object().context("codecs")?;
    let told: u64 = by_codec.values().filter_map(serde_json::Value::as_u64).sum();
    assert!(told < 256 * 256 + rounds * 20_000, "{told} pages in {rounds} rounds: {by_codec:?}");
    let huge = &moved.destination["huge_pages"];
    let bytes = |when: &str| huge[when].as_u64().with_context(|| format!("{when} in {huge}"));
    assert!(bytes("after_bytes")? >= bytes("before_bytes")? + (16 << 20), "{huge}");
    let after = After { source, destination, moved, lab };
    after.guest_is_unharmed()?;
    assert_eq!(after.source.monitor()?.status()?, "postmigrate");
    after.nothing_is_left()
}
