//! Guests that move onto hugetlbfs, where pages are mapped by 2 MiB.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farfault_integration::farfault;
use farfault_integration::huge_pool::HugePool;
use farfault_integration::lab::Lab;
use farfault_integration::moving::{BULKY, LIMIT, Move, SHORT};
use farfault_integration::qemu::{Guest, GuestSpec, Machine};
use farfault_integration::ram;

const MIB: u64 = 256;
const WORK: &str = "ff.ws=64M ff.pattern=sparse ff.rate=2000 ff.verify=20000";

/// A guest in shared memory, and the same in huge pages.
fn specs(work: &str, pool: &HugePool) -> [GuestSpec; 2] {
    let small = || GuestSpec::new(Machine::Pc, MIB, work);
    let huge = GuestSpec { ram_directory: PathBuf::from(pool.path()), ..small() };
    [small(), huge]
}

#[test]
fn a_guest_moves_from_shared_memory_to_hugetlbfs_and_works_on() -> Result<()> {
    let Some(lab) = Lab::start("1Gbit,1ms")? else { return Ok(()) };
    let Some(pool) = HugePool::of_mib(MIB)? else { return Ok(()) };
    let [small, huge] = specs(WORK, &pool);
    let source = Guest::boot(&lab, "source", &small)?;
    let destination = Guest::prepare(&lab, "destination", &huge)?;
    let moved = farfault::migrate(&lab, &source, &destination, &["--huge-pages"], &[], LIMIT)?;
    let report = &moved.destination;
    assert_eq!(report["result"], "migrated", "{report}");
    // Of what was dirty at the freeze only the 4 KiB that had changed crossed.
    let remaining = report["remaining_pages_at_freeze"].as_u64().context("remaining")?;
    assert!(remaining < MIB * 256 / 4, "{report}");
    // All of it is mapped so from the first, so there is nothing to gather.
    let gathered = |when: &str| report["huge_pages"][when].as_u64().context("huge_pages");
    let before = gathered("before_bytes")?;
    assert!(before > 64 << 20 && gathered("after_bytes")? >= before, "{report}");
    destination.log.wait_for_a_sweep(LIMIT).with_context(|| destination.diagnosis())?;
    ensure!(source.log.complaints().is_empty(), "{:?}", source.log.complaints());
    assert_eq!(destination.monitor()?.status()?, "running");
    Ok(())
}

#[test]
fn a_guest_that_has_nothing_yet_faults_once_for_a_huge_page() -> Result<()> {
    let Some(lab) = Lab::start("1Gbit,1ms")? else { return Ok(()) };
    let Some(pool) = HugePool::of_mib(MIB)? else { return Ok(()) };
    let [small, huge] = specs(WORK, &pool);
    let source = Guest::boot(&lab, "source", &small)?;
    let destination = Guest::prepare(&lab, "destination", &huge)?;
    let options = ["--strategy", "postcopy"];
    let moved = farfault::migrate(&lab, &source, &destination, &[], &options, LIMIT)?;
    let report = &moved.destination;
    assert_eq!(report["result"], "migrated", "{report}");
    let faults = report["remote_faults"].as_u64().context("faults")?;
    assert!((1..=MIB / 2).contains(&faults), "{faults} of {} huge pages: {report}", MIB / 2);
    destination.log.wait_for_a_sweep(LIMIT).with_context(|| destination.diagnosis())?;
    ensure!(source.log.complaints().is_empty(), "{:?}", source.log.complaints());
    Ok(())
}

#[test]
fn between_two_hugetlbfs_a_receiver_killed_in_postcopy_is_taken_over() -> Result<()> {
    let Some(lab) = Lab::start("200Mbit,10ms")? else { return Ok(()) };
    let Some(pool) = HugePool::of_mib(2 * MIB)? else { return Ok(()) };
    let [_, huge] = specs(BULKY, &pool);
    let options = ["--strategy", "postcopy"];
    let mut moving = Move::begin_between(lab, [&huge, &huge], &options, SHORT, [&[], &[]])?;
    moving.send()?.wait_for_event("post-copy", LIMIT, |event| event["phase"] == "postcopy")?;
    std::thread::sleep(Duration::from_millis(500));
    Move::kill(&mut moving.receive)?;
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

#[test]
fn after_paused_moves_to_hugetlbfs_the_memory_files_are_equal() -> Result<()> {
    for strategy in ["precopy", "postcopy"] {
        let Some(lab) = Lab::start("1Gbit,1ms")? else { return Ok(()) };
        let Some(pool) = HugePool::of_mib(MIB)? else { return Ok(()) };
        let [small, huge] = specs(WORK, &pool);
        let source = Guest::boot(&lab, "source", &small)?;
        let destination = Guest::prepare(&lab, "destination", &huge)?;
        let options = ["--strategy", strategy];
        farfault::migrate(&lab, &source, &destination, &["--paused"], &options, LIMIT)?;
        assert_eq!(destination.log.last_beat(), None, "the guest ran on the destination");
        for (left, right) in source.ram_files().iter().zip(destination.ram_files()) {
            assert_eq!(ram::compare(left, right)?, ram::Difference::default(), "{strategy}");
        }
    }
    Ok(())
}
