//! Whoever dies or is told to end, and whenever: the guest is at one place, whole, and a person finds it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farfault_integration::farfault::{self, Running, command, journal_of, status_of};
use farfault_integration::lab::Lab;
use farfault_integration::leftovers::Inventory;
use farfault_integration::process::wait_for;
use farfault_integration::qemu::{Guest, GuestSpec, Machine};
use farfault_integration::recovery::{migration_id, see_through};

const LIMIT: Duration = Duration::from_secs(60);
const WORK: &str = "ff.ws=64M ff.pattern=sparse ff.rate=1000 ff.verify=50000";
/// Memory that does not compress: some seconds of post-copy.
const BULKY: &str = "ff.ws=64M ff.pattern=sparse ff.rate=1000 ff.fill=random ff.verify=50000";

/// A guest at work that is being moved.
struct Move {
    source: Guest,
    destination: Guest,
    send: Option<Running>,
    receive: Option<Running>,
    lab: Lab,
    /// What was there before farfault came.
    before: Inventory,
}

impl Move {
    fn begin(link: &str, work: &str, send_options: &[&str]) -> Result<Option<Self>> {
        let Some(lab) = Lab::start(link)? else { return Ok(None) };
        let spec = GuestSpec::new(Machine::Pc, 256, work);
        let source = Guest::boot(&lab, "source", &spec)?;
        let destination = Guest::prepare(&lab, "destination", &spec)?;
        let before = Inventory::of(&lab)?;
        // Who is killed here does not come back.
        let patience = ["--reconnect-for", "3s"];
        let mut receive = Running::receive(&lab, &destination, &patience)?;
        let ticket = receive.ticket()?;
        let send_options = [send_options, &patience].concat();
        let send = Running::send(&lab, &source, &ticket, &send_options)?;
        let (send, receive) = (Some(send), Some(receive));
        Ok(Some(Move { source, destination, send, receive, lab, before }))
    }

    /// One whose guest runs at the destination and lacks most of its pages.
    fn in_postcopy() -> Result<Option<Self>> {
        let Some(mut moving) = Self::begin("100Mbit,20ms", BULKY, &["--strategy", "postcopy"])?
        else {
            return Ok(None);
        };
        moving.send()?.wait_for_event("post-copy", LIMIT, |event| event["phase"] == "postcopy")?;
        Ok(Some(moving))
    }

    /// Starts what was killed again, until the migration is over.
    fn take_over(&mut self) -> Result<()> {
        let id = migration_id(&self.lab)?;
        see_through(&self.lab, &id, &mut self.send, &mut self.receive, LIMIT)
            .with_context(|| self.destination.diagnosis())
    }

    /// It runs there alone, with all its memory as it was.
    fn runs_whole_at_the_destination(&self) -> Result<()> {
        assert_ne!(self.source.monitor()?.status()?, "running");
        let sweeps = self.destination.log.wait_for_sweeps(2, LIMIT);
        sweeps.with_context(|| self.destination.diagnosis())?;
        assert_eq!(self.destination.monitor()?.status()?, "running");
        ensure!(self.source.log.complaints().is_empty(), "{:?}", self.source.log.complaints());
        let state = std::fs::read_dir(self.lab.state_directory())?.count();
        assert_eq!(state, 0, "a journal is left");
        Ok(())
    }

    fn send(&mut self) -> Result<&mut Running> {
        self.send.as_mut().context("send was taken")
    }

    /// Ends a side without warning.
    fn kill(running: &mut Option<Running>) -> Result<()> {
        running.take().context("it was taken")?.kill()
    }

    /// Waits for a side that must fail, and gives its reason.
    fn failure(running: &mut Option<Running>) -> Result<String> {
        running.take().context("it was taken")?.wait(LIMIT)?.failure()
    }

    /// One that will be in pre-copy for long.
    fn in_precopy() -> Result<Option<Self>> {
        let Some(mut moving) = Self::begin("20Mbit,20ms", WORK, &["--strategy", "precopy"])? else {
            return Ok(None);
        };
        moving.send()?.wait_for_event("pre-copy", LIMIT, |event| event["phase"] == "precopy")?;
        Ok(Some(moving))
    }

    /// The id of a side, for commands.
    fn name(&self, side: &str) -> Result<String> {
        let status = status_of(&self.lab, side)?.with_context(|| format!("no {side}"))?;
        Ok(format!("{}.{side}", status["migration"].as_str().context("an id")?))
    }

    /// Runs `farfault resolve` on a side; it must be done.
    fn resolve(&self, side: &str, choice: &str) -> Result<String> {
        let output = command(&self.lab, &["resolve", &self.name(side)?, choice])?;
        let [told, why] =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        ensure!(output.status.success(), "resolve {side} {choice}: {why}");
        Ok(told)
    }

    /// The same, when it must be refused; gives the reason.
    fn resolve_refused(&self, side: &str, choice: &str) -> Result<String> {
        let output = command(&self.lab, &["resolve", &self.name(side)?, choice])?;
        ensure!(!output.status.success(), "resolve {side} {choice} was not refused");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn source_goes_on(&self) -> Result<()> {
        assert_eq!(self.source.monitor()?.status()?, "running");
        self.source.log.wait_for_sweeps(2, LIMIT)
    }

    /// Neither processes nor files, also no RAM of a QEMU that was ended.
    fn nothing_is_left(&self) -> Result<()> {
        let mut left = Vec::new();
        let gone = wait_for("everything to be cleaned up", Duration::from_secs(20), || {
            left = self.before.new_since(&self.lab)?;
            Ok(left.is_empty().then_some(()))
        });
        gone.with_context(|| format!("left behind: {left:?}"))
    }
}

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
    second.log.wait_for_sweeps(2, LIMIT)?;
    Move::failure(&mut moving.receive)?;
    drop(second);
    moving.nothing_is_left()
}

/// Both sides killed at the worst moment: decided here, loaded there, and neither knows of the other.
fn in_doubt() -> Result<Option<Move>> {
    // The decision is half a round trip on its way.
    let options = ["--strategy", "precopy", "--handover", "strict", "--downtime", "10s"];
    let Some(mut moving) = Move::begin("200Mbit,600ms", WORK, &options)? else { return Ok(None) };
    wait_for("the decision", LIMIT, || {
        Ok(journal_of(&moving.lab, "source").contains("decided").then_some(()))
    })?;
    Move::kill(&mut moving.receive)?;
    Move::kill(&mut moving.send)?;
    let journal = journal_of(&moving.lab, "destination");
    ensure!(journal.contains("loaded") && !journal.contains("committed"), "{journal}");
    assert_eq!(moving.source.monitor()?.status()?, "postmigrate");
    for side in ["source", "destination"] {
        let shown = moving.resolve(side, "--show")?;
        assert!(shown.contains("in doubt"), "{shown}");
        assert_eq!(shown.matches("possible").count(), 2, "{shown}");
    }
    Ok(Some(moving))
}

#[test]
fn a_guest_in_doubt_runs_at_the_source_when_both_are_told_so() -> Result<()> {
    let Some(moving) = in_doubt()? else { return Ok(()) };
    moving.resolve("destination", "--run-source")?;
    moving.resolve("source", "--run-source")?;
    moving.source_goes_on()?;
    assert!(moving.resolve_refused("source", "--run-destination")?.contains("at the source"));
    assert_eq!(moving.destination.log.last_beat(), None, "it ran at the destination");
    Ok(())
}

#[test]
fn a_guest_in_doubt_runs_at_the_destination_when_both_are_told_so() -> Result<()> {
    let Some(mut moving) = in_doubt()? else { return Ok(()) };
    moving.resolve("source", "--run-destination")?;
    moving.resolve("destination", "--run-destination")?;
    assert!(moving.resolve_refused("source", "--run-source")?.contains("at the destination"));
    assert!(moving.resolve_refused("destination", "--run-source")?.contains("has arrived"));
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

#[test]
fn a_receiver_killed_in_postcopy_is_taken_over() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy()? else { return Ok(()) };
    Move::kill(&mut moving.receive)?;
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

#[test]
fn a_sender_killed_in_postcopy_is_taken_over() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy()? else { return Ok(()) };
    Move::kill(&mut moving.send)?;
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

#[test]
fn both_sides_killed_in_postcopy_are_taken_over() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy()? else { return Ok(()) };
    std::thread::sleep(Duration::from_secs(1));
    Move::kill(&mut moving.send)?;
    Move::kill(&mut moving.receive)?;
    moving.take_over()?;
    moving.runs_whole_at_the_destination()
}

/// farfault has the guest's memory, whatever becomes of the QEMU that it has left.
#[test]
fn a_source_whose_qemu_ends_in_postcopy_still_gives_every_page() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy()? else { return Ok(()) };
    moving.source.kill();
    let (send, receive) = (moving.send.take(), moving.receive.take());
    send.context("it runs")?.wait(LIMIT)?.report()?;
    receive.context("it runs")?.wait(LIMIT)?.report()?;
    moving.destination.log.wait_for_sweeps(2, LIMIT)?;
    assert_eq!(moving.destination.monitor()?.status()?, "running");
    Ok(())
}

/// The host that has the last pages dies: the destination says so, and its guest waits rather than see wrong bytes.
#[test]
fn a_source_host_that_dies_in_postcopy_leaves_a_guest_that_waits_and_is_told_of() -> Result<()> {
    let Some(mut moving) = Move::in_postcopy()? else { return Ok(()) };
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
