//! Whoever dies or is told to end, and whenever: the guest is at one place, whole, and a person finds it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farfault_integration::farfault::{self, Running, command, directory_of, status_of};
use farfault_integration::moving::{LIMIT, Move, SHORT, WORK};
use farfault_integration::qemu::{Guest, GuestSpec, Machine};

#[test]
fn a_migration_is_watched_and_cancelled_by_command() -> Result<()> {
    let Some(mut moving) = Move::in_precopy()? else { return Ok(()) };
    for side in ["source", "destination"] {
        let status = status_of(&moving.lab, side)?.context("it runs")?;
        assert_eq!(status["state"], "running", "{status}");
        assert_eq!(status["link"], "up", "{status}");
        assert!(status["monitor_pid"].is_number(), "{status}");
    }
    let phase = status_of(&moving.lab, "source")?.context("it runs")?["phase"].clone();
    assert_eq!(phase, "precopy");
    // What goes on is not settled by hand.
    let refused = moving.resolve_refused("source", "--run-source")?;
    assert!(refused.contains("works on"), "{refused}");
    let output = command(&moving.lab, &["cancel", &moving.name("source")?])?;
    assert!(output.status.success(), "{output:?}");
    let told = Move::failure(&mut moving.send)?;
    assert!(told.contains("cancelled"), "{told}");
    Move::failure(&mut moving.receive)?;
    moving.source_goes_on()?;
    moving.nothing_is_left()
}

#[test]
fn a_copy_left_by_a_killed_receiver_is_given_up_by_command() -> Result<()> {
    let Some(mut moving) = Move::in_precopy()? else { return Ok(()) };
    Move::kill(&mut moving.receive)?;
    let left = status_of(&moving.lab, "destination")?.context("it is left")?;
    assert_eq!(left["state"], "left", "{left}");
    let next = left["next"].as_str().context("what to do")?;
    assert!(next.contains("--run-source"), "{next}");
    let refused = moving.resolve_refused("destination", "--run-destination")?;
    assert!(refused.contains("never loaded"), "{refused}");
    moving.resolve("destination", "--run-source")?;
    Move::failure(&mut moving.send)?;
    moving.source_goes_on()?;
    moving.nothing_is_left()
}

#[test]
fn after_a_killed_sender_another_one_moves_the_guest() -> Result<()> {
    let Some(mut moving) = Move::in_precopy()? else { return Ok(()) };
    Move::kill(&mut moving.send)?;
    assert!(moving.resolve_refused("source", "--run-destination")?.contains("never told"));
    moving.resolve("source", "--run-source")?;
    moving.source_goes_on()?;
    // The receiver finds out by itself; there is room for another in the meantime.
    moving.lab.wan.command("rate 500Mbit")?;
    let spec = GuestSpec::new(Machine::Pc, 256, WORK);
    let second = Guest::prepare(&moving.lab, "second", &spec)?;
    farfault::migrate(&moving.lab, &moving.source, &second, &[], &[], LIMIT)?;
    second.log.wait_for_a_sweep(LIMIT)?;
    Move::failure(&mut moving.receive)?;
    drop(second);
    moving.nothing_is_left()
}

#[test]
fn a_guest_in_doubt_runs_at_the_source_when_both_are_told_so() -> Result<()> {
    let Some(moving) = Move::in_doubt()? else { return Ok(()) };
    moving.resolve("destination", "--run-source")?;
    moving.resolve("source", "--run-source")?;
    moving.source_goes_on()?;
    assert!(moving.resolve_refused("source", "--run-destination")?.contains("at the source"));
    assert_eq!(moving.destination.log.last_beat(), None, "it ran at the destination");
    Ok(())
}

#[test]
fn a_guest_in_doubt_runs_at_the_destination_when_both_are_told_so() -> Result<()> {
    let Some(mut moving) = Move::in_doubt()? else { return Ok(()) };
    moving.resolve("source", "--run-destination")?;
    moving.resolve("destination", "--run-destination")?;
    assert!(moving.resolve_refused("source", "--run-source")?.contains("at the destination"));
    assert!(moving.resolve_refused("destination", "--run-source")?.contains("has arrived"));
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

#[test]
fn a_receiver_killed_in_postcopy_is_taken_over() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy(SHORT)? else { return Ok(()) };
    Move::kill(&mut moving.receive)?;
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

/// What another process needs cannot be read: the guest, which runs here, is left alone until it can.
#[test]
fn a_receiver_that_cannot_be_taken_over_leaves_the_guest_running() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy("60s")? else { return Ok(()) };
    Move::kill(&mut moving.receive)?;
    let directory =
        directory_of(&moving.lab.state_directory(), "destination").context("it is left")?;
    let kept = directory.join("takeover");
    let content = std::fs::read(&kept)?;
    std::fs::write(&kept, b"{\"of another version\": true}")?;
    let id = moving.name("destination")?;
    let id = id.trim_end_matches(".destination");
    let lab = &moving.lab;
    let resumed = Running::start(lab, lab.b(), &[], "receive", &["--resume", id])?;
    let told = resumed.wait(LIMIT)?.failure()?;
    ensure!(told.contains("takeover"), "{told}");
    std::fs::write(&kept, content)?;
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

#[test]
fn a_sender_killed_in_postcopy_is_taken_over() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy(SHORT)? else { return Ok(()) };
    Move::kill(&mut moving.send)?;
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

#[test]
fn both_sides_killed_in_postcopy_are_taken_over() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy(SHORT)? else { return Ok(()) };
    std::thread::sleep(Duration::from_secs(1));
    Move::kill(&mut moving.send)?;
    Move::kill(&mut moving.receive)?;
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

/// farfault has the guest's memory, whatever becomes of the QEMU that it has left.
#[test]
fn a_source_whose_qemu_ends_in_postcopy_still_gives_every_page() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy(SHORT)? else { return Ok(()) };
    moving.source.kill();
    let (send, receive) = (moving.send.take(), moving.receive.take());
    send.context("it runs")?.wait(LIMIT)?.report()?;
    receive.context("it runs")?.wait(LIMIT)?.report()?;
    moving.destination.log.wait_for_a_sweep(LIMIT)?;
    assert_eq!(moving.destination.monitor()?.status()?, "running");
    Ok(())
}

/// The host that has the last pages dies: the destination says so, and its guest waits rather than see wrong bytes.
#[test]
fn a_source_host_that_dies_in_postcopy_leaves_a_guest_that_waits_and_is_told_of() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy(SHORT)? else { return Ok(()) };
    Move::kill(&mut moving.send)?;
    moving.source.kill();
    let told = Move::failure(&mut moving.receive)?;
    assert!(told.contains("could not be reached again"), "{told}");
    let left = status_of(&moving.lab, "destination")?.context("it is told of")?;
    assert_eq!(left["state"], "left", "{left}");
    assert!(moving.resolve_refused("destination", "--run-source")?.contains("has arrived"));
    let complaints = moving.destination.log.complaints();
    ensure!(complaints.is_empty(), "{complaints:?}");
    // What is there for a successor, who cannot come any more.
    let pages = format!("/dev/shm/farfault-{}.pages", moving.name("destination")?);
    std::fs::remove_file(&pages).context(pages)?;
    Ok(())
}
